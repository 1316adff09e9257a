// A dashboard's data layer: typed fetches with retry, a reactive store, and formatting helpers.

type Json = null | boolean | number | string | Json[] | { [key: string]: Json };

export interface Metric {
  name: string;
  unit: "ms" | "bytes" | "count";
  points: Array<{ at: number; value: number }>;
}

export class HttpError extends Error {
  constructor(readonly status: number, readonly url: string, body: string) {
    super(`${status} from ${url}: ${body.slice(0, 200)}`);
  }
}

const sleep = (ms: number) => new Promise<void>((resolve) => setTimeout(resolve, ms));

export async function fetchJson<T extends Json>(
  url: string,
  { retries = 3, timeoutMs = 5000, signal }: { retries?: number; timeoutMs?: number; signal?: AbortSignal } = {},
): Promise<T> {
  for (let attempt = 0; ; attempt++) {
    const controller = new AbortController();
    const timer = setTimeout(() => controller.abort(new Error("timeout")), timeoutMs);
    signal?.addEventListener("abort", () => controller.abort(signal.reason), { once: true });
    try {
      const response = await fetch(url, { signal: controller.signal, headers: { accept: "application/json" } });
      if (!response.ok) throw new HttpError(response.status, url, await response.text());
      return (await response.json()) as T;
    } catch (error) {
      const final = attempt >= retries || signal?.aborted || (error instanceof HttpError && error.status < 500);
      if (final) throw error;
      await sleep(2 ** attempt * 100 + Math.random() * 100);
    } finally {
      clearTimeout(timer);
    }
  }
}

type Listener<S> = (state: S, previous: S) => void;

export function createStore<S extends object>(initial: S) {
  let state = Object.freeze({ ...initial });
  const listeners = new Set<Listener<S>>();
  return {
    get: () => state,
    set(change: Partial<S> | ((current: S) => Partial<S>)) {
      const previous = state;
      const patch = typeof change === "function" ? change(state) : change;
      state = Object.freeze({ ...state, ...patch });
      for (const listener of listeners) listener(state, previous);
    },
    subscribe(listener: Listener<S>) {
      listeners.add(listener);
      return () => listeners.delete(listener);
    },
  };
}

export function select<S extends object, T>(
  store: ReturnType<typeof createStore<S>>,
  pick: (state: S) => T,
  onChange: (value: T) => void,
) {
  let current = pick(store.get());
  onChange(current);
  return store.subscribe((state) => {
    const next = pick(state);
    if (!Object.is(next, current)) onChange((current = next));
  });
}

const UNITS = ["B", "KiB", "MiB", "GiB", "TiB"];

export function format(value: number, unit: Metric["unit"]): string {
  if (unit === "ms") return value < 1000 ? `${value.toFixed(0)} ms` : `${(value / 1000).toFixed(2)} s`;
  if (unit === "count") return new Intl.NumberFormat("en").format(value);
  const power = Math.min(Math.floor(Math.log2(Math.max(value, 1)) / 10), UNITS.length - 1);
  return `${(value / 1024 ** power).toFixed(power ? 1 : 0)} ${UNITS[power]}`;
}

export function quantile(values: readonly number[], q: number): number {
  if (values.length === 0) return Number.NaN;
  const sorted = [...values].sort((a, b) => a - b);
  const place = (sorted.length - 1) * q;
  const [low, high] = [Math.floor(place), Math.ceil(place)];
  return sorted[low] + (sorted[high] - sorted[low]) * (place - low);
}

export function sparkline(metric: Metric, width = 120, height = 24): string {
  const values = metric.points.map((point) => point.value);
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const x = (i: number) => ((i / Math.max(1, values.length - 1)) * width).toFixed(1);
  const y = (v: number) => (height - ((v - low) / (high - low || 1)) * height).toFixed(1);
  const path = values.map((v, i) => `${i ? "L" : "M"}${x(i)},${y(v)}`).join(" ");
  return `<svg viewBox="0 0 ${width} ${height}" role="img" aria-label="${metric.name}"><path d="${path}" fill="none" stroke="currentColor"/></svg>`;
}

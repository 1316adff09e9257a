"""Numerical methods with numpy: linear systems, eigenvalues, integration, optimisation, statistics."""

from typing import Callable, NamedTuple

import numpy as np

Array = np.ndarray


class Convergence(NamedTuple):
    x: Array
    iterations: int
    residual: float
    converged: bool


def conjugate_gradient(a: Array | Callable[[Array], Array], b: Array, tolerance: float = 1e-10, limit: int | None = None) -> Convergence:
    """Solves A x = b for a symmetric positive definite A, given as a matrix or as a product."""
    multiply = a if callable(a) else lambda v: a @ v
    x = np.zeros_like(b)
    r = b - multiply(x)
    p = r.copy()
    rs = float(r @ r)
    limit = limit or 10 * len(b)
    for k in range(1, limit + 1):
        ap = multiply(p)
        alpha = rs / float(p @ ap)
        x += alpha * p
        r -= alpha * ap
        new = float(r @ r)
        if np.sqrt(new) <= tolerance * np.linalg.norm(b):
            return Convergence(x, k, np.sqrt(new), True)
        p = r + (new / rs) * p
        rs = new
    return Convergence(x, limit, np.sqrt(rs), False)


def power_iteration(a: Array, rng: np.random.Generator, steps: int = 1000, tolerance: float = 1e-12) -> tuple[float, Array]:
    v = rng.standard_normal(a.shape[0])
    v /= np.linalg.norm(v)
    value = 0.0
    for _ in range(steps):
        w = a @ v
        new = float(v @ w)
        v = w / np.linalg.norm(w)
        if abs(new - value) < tolerance * max(1.0, abs(new)):
            break
        value = new
    return new, v


def householder_qr(a: Array) -> tuple[Array, Array]:
    m, n = a.shape
    q, r = np.eye(m), a.astype(float).copy()
    for j in range(min(m - 1, n)):
        x = r[j:, j]
        norm = np.linalg.norm(x)
        if norm == 0:
            continue
        v = x.copy()
        v[0] += np.copysign(norm, x[0])
        v /= np.linalg.norm(v)
        r[j:, :] -= 2 * np.outer(v, v @ r[j:, :])
        q[:, j:] -= 2 * np.outer(q[:, j:] @ v, v)
    return q, r


def least_squares(a: Array, b: Array) -> Array:
    q, r = householder_qr(a)
    n = a.shape[1]
    y = q.T @ b
    x = np.zeros(n)
    for i in reversed(range(n)):
        x[i] = (y[i] - r[i, i + 1 : n] @ x[i + 1 :]) / r[i, i]
    return x


def simpson(f: Callable[[float], float], a: float, b: float, tolerance: float = 1e-9, depth: int = 50) -> float:
    """Adaptive Simpson quadrature."""

    def rule(fa: float, fm: float, fb: float, a: float, b: float) -> float:
        return (b - a) / 6 * (fa + 4 * fm + fb)

    def recurse(a: float, b: float, fa: float, fm: float, fb: float, whole: float, eps: float, left: int) -> float:
        m = (a + b) / 2
        flm, frm = f((a + m) / 2), f((m + b) / 2)
        lower, upper = rule(fa, flm, fm, a, m), rule(fm, frm, fb, m, b)
        error = lower + upper - whole
        if left == 0 or abs(error) <= 15 * eps:
            return lower + upper + error / 15
        return recurse(a, m, fa, flm, fm, lower, eps / 2, left - 1) + recurse(m, b, fm, frm, fb, upper, eps / 2, left - 1)

    fa, fm, fb = f(a), f((a + b) / 2), f(b)
    return recurse(a, b, fa, fm, fb, rule(fa, fm, fb, a, b), tolerance, depth)


def runge_kutta(f: Callable[[float, Array], Array], y0: Array, t: Array) -> Array:
    y = np.empty((len(t), len(y0)))
    y[0] = y0
    for i in range(len(t) - 1):
        h = t[i + 1] - t[i]
        k1 = f(t[i], y[i])
        k2 = f(t[i] + h / 2, y[i] + h / 2 * k1)
        k3 = f(t[i] + h / 2, y[i] + h / 2 * k2)
        k4 = f(t[i] + h, y[i] + h * k3)
        y[i + 1] = y[i] + h / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
    return y


def nelder_mead(f: Callable[[Array], float], start: Array, size: float = 0.5, limit: int = 2000) -> tuple[Array, float]:
    n = len(start)
    simplex = np.vstack([start, start + size * np.eye(n)])
    values = np.array([f(p) for p in simplex])
    for _ in range(limit):
        order = np.argsort(values)
        simplex, values = simplex[order], values[order]
        if np.ptp(values) < 1e-12:
            break
        centre = simplex[:-1].mean(axis=0)
        reflected = centre + (centre - simplex[-1])
        fr = f(reflected)
        if values[0] <= fr < values[-2]:
            simplex[-1], values[-1] = reflected, fr
            continue
        if fr < values[0]:
            expanded = centre + 2 * (centre - simplex[-1])
            fe = f(expanded)
            simplex[-1], values[-1] = (expanded, fe) if fe < fr else (reflected, fr)
            continue
        contracted = centre + 0.5 * (simplex[-1] - centre)
        fc = f(contracted)
        if fc < values[-1]:
            simplex[-1], values[-1] = contracted, fc
            continue
        simplex[1:] = simplex[0] + 0.5 * (simplex[1:] - simplex[0])
        values[1:] = [f(p) for p in simplex[1:]]
    return simplex[0], float(values[0])


def bootstrap_interval(data: Array, statistic: Callable[[Array], float], rng: np.random.Generator, draws: int = 2000, level: float = 0.95) -> tuple[float, float]:
    found = np.array([statistic(rng.choice(data, size=len(data))) for _ in range(draws)])
    low, high = np.quantile(found, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def kmeans(points: Array, k: int, rng: np.random.Generator, limit: int = 100) -> tuple[Array, Array]:
    centres = [points[rng.integers(len(points))]]
    while len(centres) < k:
        distance = np.min([((points - c) ** 2).sum(1) for c in centres], axis=0)
        centres.append(points[rng.choice(len(points), p=distance / distance.sum())])
    centres = np.array(centres)
    for _ in range(limit):
        labels = np.argmin(((points[:, None] - centres) ** 2).sum(-1), axis=1)
        new = np.array([points[labels == j].mean(0) if (labels == j).any() else centres[j] for j in range(k)])
        if np.allclose(new, centres):
            break
        centres = new
    return centres, labels


if __name__ == "__main__":
    rng = np.random.default_rng(7)
    m = rng.standard_normal((40, 40))
    spd = m @ m.T + 40 * np.eye(40)
    b = rng.standard_normal(40)
    result = conjugate_gradient(spd, b)
    print(f"converged={result.converged} after {result.iterations} steps, residual {result.residual:.2e}")
    print(f"integral of exp(-x^2) on [-3, 3]: {simpson(lambda x: np.exp(-x * x), -3, 3):.10f}")
    orbit = runge_kutta(lambda t, y: np.array([y[1], -y[0]]), np.array([1.0, 0.0]), np.linspace(0, 2 * np.pi, 201))
    print("error after one period:", np.abs(orbit[-1] - orbit[0]).max())

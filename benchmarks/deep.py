"""What depth does to quantization: presets, longer calibration, errors by layer and chosen widths on a deep model.

    python scripts/train_tiny_r1.py --size deep --output out --tokens 400000000 --seconds 300 --batch 12 --seq-len 2048
    python -m benchmarks.deep out/deep-r1 --text FILE --wiki FILE --work DIR [--jobs 8] [--seconds 300] [--write FILE]

Each output is a job: quantized, and measured by `benchmarks/peers/reference.py` on both texts. Calibration takes
windows of the first half of the text, evaluation windows of its second half and of the other text, as in
benchmarks/quality.py. At the first two of the bits `dsquant eval` tells how errors grow over the layers. Widths that
`--target-bits` chose stand beside random ones of the same size, every weight as likely to get more bits as any other.

What is finished in DIR is not done again, so DIR is for one model and one dsquant. With `--seconds` jobs are ended
there, and the tables hold what was finished.
"""

import argparse
import json
import multiprocessing
import queue
import random
import shutil
import statistics
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks.peers.tokens import chosen_windows, halves, read_tokens, spaced_windows, tokens_of, write_tokens
from benchmarks.quality import read_json, tell

SHAPES = ("32x512", "128x2048")
EVALUATED = ("plain", "compact", "follow", "descend", "best")
# So many of the bits get tables of how errors grow.
GROWN = 2
FOLLOWING = "scales,clip,compensate,top-up,follow"
STEPS = {"plain": "none", "follow": FOLLOWING, "descend": f"{FOLLOWING},descend"}
"""Name -> steps; the others are presets. `best` follows, descends, and rounds for predictions."""
COMMON = {"to": "compressed-tensors", "rest": "bf16", "kv_b": "quantize", "symmetric": True}
MEMORY = {"memory_budget": "16GiB"}
Shape = tuple[int, int]


@dataclass(frozen=True)
class Output:
    """One output of the model."""

    name: str
    way: str
    """One of `EVALUATED`, or how widths were chosen."""
    size: str
    """Such as `4 bits`; what shares it is compared."""
    calibration: str
    options: Mapping[str, Any]
    draw: int | None = None
    """Number of a random choice of widths."""
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Growth:
    """`dsquant eval` of outputs that are kept for it."""

    name: str
    needs: tuple[str, ...]


Task = Output | Growth


def tasks_of(arguments: argparse.Namespace) -> Iterator[Task]:
    """Everything that is made, what tells most first, and of that the longest."""
    targets = list(arguments.targets)
    for place, bits in enumerate(arguments.bits):
        yield from _presets(bits, arguments.calibration)
        if targets and place == 0:
            yield from _choices(targets.pop(0), arguments)
        if place < GROWN:
            yield Growth(f"growth-{bits}", _kept(bits, arguments.calibration[0]))
    for target in targets:
        yield from _choices(target, arguments)


def _kept(bits: int, shape: str) -> tuple[str, ...]:
    return tuple(f"{way}-{bits}-{shape}" for way in EVALUATED)


def _presets(bits: int, shapes: list[str]) -> Iterator[Output]:
    for way in reversed(EVALUATED):
        for shape in reversed(shapes) if way != "plain" else shapes[:1]:
            steps = {"steps": STEPS[way]} if way in STEPS else {}
            options = {"bits": bits, "preset": "best" if way == "best" else "compact", **steps}
            yield Output(f"{way}-{bits}-{shape}", way, f"{bits} bits", shape, options)


def _choices(target: float, arguments: argparse.Namespace) -> Iterator[Output]:
    shape, options = arguments.calibration[0], {"preset": "compact", "target_bits": target}
    for draw in (None, *range(arguments.draws)):
        way = "measured" if draw is None else f"random {draw}"
        name = f"widths-{target}-{way.replace(' ', '-')}"
        yield Output(name, way, f"{target} bits, mixed", shape, options, draw)


def random_widths(mixed: Any, generator: random.Random) -> dict[str, Any]:
    """Group -> width, of a plan that leaves them to choose: random steps to the next width, until none fits."""
    ladders = {group.name: sorted(group.num_bytes, key=group.num_bytes.__getitem__) for group in mixed.groups}
    sizes = {group.name: group.num_bytes for group in mixed.groups}
    left = mixed.budget_bytes - sum(sizes[name][ladder[0]] for name, ladder in ladders.items())
    while True:
        steps = {
            name: sizes[name][ladder[1]] - sizes[name][ladder[0]] for name, ladder in ladders.items() if len(ladder) > 1
        }
        steps = {name: more for name, more in steps.items() if more <= left}
        if not steps:
            return {name: ladder[0] for name, ladder in ladders.items()}
        (name,) = generator.choices(list(steps), weights=[max(1, more) for more in steps.values()])
        left -= steps[name]
        ladders[name].pop(0)


def random_choices(draw: int, run: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """What `dsquant.pipeline.choice` would have measured: folder -> group -> its width."""
    found = {}
    for folder, mixed in run.source.plan.mixed.items():
        widths = random_widths(mixed, random.Random(draw))
        found[str(folder)] = {
            group.name: {
                "width": widths[group.name],
                "bytes": {str(width): size for width, size in group.num_bytes.items()},
                "errors": dict.fromkeys(map(str, group.num_bytes), 0.0),
            }
            for group in mixed.groups
        }
    return found


class Bench:
    """The work folder: tokens, outputs, and what was found."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.model, self.work = arguments.model, arguments.work.resolve()

    def prepare(self) -> None:
        """Writes the tokens of calibration and evaluation, and the text that `dsquant eval` reads."""
        self.work.mkdir(parents=True, exist_ok=True)
        calibration, evaluation = halves(self.arguments.text)
        texts = {"code": evaluation, "wiki": self.arguments.wiki.read_text(encoding="utf-8")}
        self.code.write_text(evaluation, encoding="utf-8")
        for name, text in texts.items():
            windows = spaced_windows(tokens_of(self.model, text), *shape_of(self.arguments.evaluation))
            write_tokens(windows, self.tokens(name))
        tokens = tokens_of(self.model, calibration)
        for shape in self.arguments.calibration:
            write_tokens(chosen_windows(tokens, *shape_of(shape), seed=0), self.tokens(shape))

    @property
    def code(self) -> Path:
        return self.work / "code.txt"

    def tokens(self, name: str) -> Path:
        return self.work / f"tokens-{name}.safetensors"

    def result(self, name: str) -> Path:
        return self.work / f"{name}.json"

    def found(self, name: str) -> dict[str, Any]:
        """What was found of an output; empty if it is not finished."""
        return read_json(self.result(name))

    def run(self, task: Task) -> None:
        """Does it, and stores what was found."""
        found = self._quantized(task) if isinstance(task, Output) else self._growth(task)
        partial_file = self.work / f"{task.name}.partial"
        partial_file.write_text(json.dumps(found, indent=1))
        partial_file.rename(self.result(task.name))

    @cached_property
    def _evaluator(self) -> Any:
        from benchmarks.peers.reference import Evaluator

        texts = {name: read_tokens(self.tokens(name)) for name in ("code", "wiki")}
        return Evaluator(self.model, texts, self.arguments.device)

    def _quantized(self, task: Output) -> dict[str, Any]:
        import dsquant
        from benchmarks.peers.decoding import stored_bits
        from dsquant.pipeline import choice

        output = self.work / task.name
        shutil.rmtree(output, ignore_errors=True)
        choices = choice._choices if task.draw is None else partial(random_choices, task.draw)
        started = time.monotonic()
        with patch.object(choice, "_choices", choices):
            dsquant.awq(
                self.model, output=output, calibration=str(self.tokens(task.calibration)), evaluate=False,
                progress=False, device=self.arguments.device, **COMMON, **MEMORY, **task.options,
            )  # fmt: skip
        found: dict[str, Any] = {"seconds": time.monotonic() - started, "bits": stored_bits(output)}
        found["texts"] = {name: asdict(figures) for name, figures in self._evaluator.of_folder(output).items()}
        found["evaluation_seconds"] = time.monotonic() - started - found["seconds"]
        found["precision"] = read_json(output / "dsquant.json").get("precision", {})
        if not any(task.name in _kept(bits, self.arguments.calibration[0]) for bits in self.arguments.bits[:GROWN]):
            shutil.rmtree(output)
        return found

    def _growth(self, task: Growth) -> dict[str, Any]:
        import dsquant

        samples, seq_len = shape_of(self.arguments.evaluation)
        evaluation = dsquant.evaluate(
            self.model, *(self.work / name for name in task.needs), texts=[str(self.code)], samples=samples,
            seq_len=seq_len, prompts="none", progress=False, device=self.arguments.device, **MEMORY,
        )  # fmt: skip
        return {one["name"]: one["layers"] for one in evaluation.as_json()["candidates"]}


def shape_of(words: str) -> Shape:
    """Windows and tokens of one, of `32x512`."""
    windows, tokens = map(int, words.split("x"))
    return windows, tokens


def work_through(arguments: argparse.Namespace, tasks: Any, done: Any) -> None:
    """What a process does: the tasks that it gets, one after another."""
    import torch

    torch.set_num_threads(1)
    bench = Bench(arguments)
    while True:
        task = tasks.get()
        try:
            bench.run(task)
            done.put((task.name, None))
        except Exception:
            done.put((task.name, traceback.format_exc()))


def run_all(bench: Bench, tasks: list[Task], until: float) -> None:
    """Runs what is not finished in processes beside each other, and ends them at a time."""
    context = multiprocessing.get_context("spawn")
    given, done = context.Queue(), context.Queue()
    waiting = [task for task in tasks if not bench.found(task.name)]
    arguments = (bench.arguments, given, done)
    count = min(len(waiting), bench.arguments.jobs)
    workers = [context.Process(target=work_through, args=arguments) for _ in range(count)]
    for worker in workers:
        worker.start()
    running: set[str] = set()
    failed: set[str] = set()
    while (waiting or running) and time.monotonic() < until and any(worker.is_alive() for worker in workers):
        waiting = [task for task in waiting if not failed.intersection(task.needs)]
        ready = [task for task in waiting if all(bench.found(name) for name in task.needs)]
        for task in ready[: len(workers) - len(running)]:
            given.put(task)
            running.add(task.name)
            waiting.remove(task)
        try:
            name, error = done.get(timeout=0.5)
        except queue.Empty:
            if ended := [worker.exitcode for worker in workers if not worker.is_alive()]:
                tell(f"processes ended with {ended}, and their tasks with them")
                break
            continue
        running.remove(name)
        failed |= {name} if error else set()
        tell(f"{name}: {error or words_of(bench.found(name))}")
    for worker in workers:
        worker.kill()
    if running:
        tell(f"not finished: {', '.join(sorted(running))}, and {len(waiting)} not begun")


def words_of(found: dict[str, Any]) -> str:
    """A finished task in a line."""
    if "texts" not in found:
        return "done"
    kl = ", ".join(f"{text} {figures['mean_kl']:.4f}" for text, figures in found["texts"].items())
    return f"{found['seconds']:.0f} + {found['evaluation_seconds']:.0f} s, {found['bits']:.2f} bits, KL {kl}"


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def figures_table(bench: Bench, tasks: list[Task]) -> str:
    """A row for each output but random choices."""
    of_text = ["perplexity", "same top"]
    head = ["", "calibration", "stored bits", "code: KL", *of_text, "wiki: KL", *of_text, "seconds"]
    rows = []
    for task in tasks:
        if isinstance(task, Growth) or task.draw is not None or not (found := bench.found(task.name)):
            continue
        cells = [f"{task.way}, {task.size}", "" if task.way == "plain" else task.calibration, f"{found['bits']:.2f}"]
        for figures in found["texts"].values():
            kl, error = figures["mean_kl"], figures["mean_kl_standard_error"]
            cells += [f"{kl:.4f} ± {error:.4f}", f"{figures['perplexity']:.3f}", f"{figures['top_1_agreement']:.1%}"]
        rows.append([*cells, f"{found['seconds']:.0f}"])
    return table(head, rows)


def choices_table(bench: Bench, tasks: list[Task]) -> str:
    """Measured widths beside random ones, a row for each target and text."""
    rows = []
    for size in dict.fromkeys(task.size for task in tasks if isinstance(task, Output) and "mixed" in task.size):
        own = [task for task in tasks if isinstance(task, Output) and task.size == size]
        drawn = [found for task in own if task.draw is not None and (found := bench.found(task.name))]
        measured = next((found for task in own if task.draw is None and (found := bench.found(task.name))), None)
        if not measured or not drawn:
            continue
        for text in measured["texts"]:
            kls = sorted(found["texts"][text]["mean_kl"] for found in drawn)
            middle = [kls[0], statistics.median(kls), kls[-1]]
            own_kl = measured["texts"][text]["mean_kl"]
            figures = [f"{kl:.4f}" for kl in (own_kl, *middle)]
            bits = sorted(found["bits"] for found in drawn)
            stored = [f"{measured['bits']:.3f}", f"{bits[0]:.3f} to {bits[-1]:.3f}"]
            rows.append([size, text, *stored, *figures, f"{sum(kl < own_kl for kl in kls)} of {len(kls)}"])
    head = ["", "text", "measured: bits", "random: bits", "measured: KL", "random: least", "median", "most"]
    return table([*head, "better than measured"], rows)


def growth_table(found: dict[str, Any]) -> str:
    """Errors by layer, a column for each output: of the layer alone, and of the hidden states behind it."""
    rows = []
    for layers in zip(*found.values(), strict=True):
        cells = [f"{one['local_error']:.4f}, {one['hidden_error']:.4f}, {one['kl']:.4f}" for one in layers]
        rows.append([str(layers[0]["index"]), *cells])
    return table(["layer", *found], rows)


def error_at_fewest(entry: dict[str, Any]) -> float:
    """Nats of a group at the fewest bits."""
    return entry["errors"][min(entry["errors"], key=float)]


def sensitivity_table(precision: dict[str, Any]) -> str:
    """What each group costs at its fewest bits in 1/1000 nats, and the width that it got."""
    from dsquant.precision.groups import place_of, width_words

    places = {name: place_of(name) for name in precision}
    kinds = list(dict.fromkeys(kind for kind, _ in places.values()))
    cells = {
        (places[name][1], places[name][0]): f"{1000 * error_at_fewest(entry):.3f}: {width_words(entry['width'])}"
        for name, entry in precision.items()
    }
    layers = sorted({layer for _, layer in places.values() if layer is not None})
    return table(
        ["layer", *kinds], [[str(layer), *(cells.get((layer, kind), "") for kind in kinds)] for layer in layers]
    )


def report(bench: Bench, tasks: list[Task]) -> str:
    """All tables, as far as they can be made."""
    parts = [
        f"Evaluation: {bench.arguments.evaluation} tokens of each text; {bench.arguments.jobs} jobs at once.",
        figures_table(bench, tasks),
        choices_table(bench, tasks),
    ]
    for task in tasks:
        found = bench.found(task.name)
        if isinstance(task, Growth) and found:
            parts += [f"Errors by layer: of its update alone, of what is behind it, KL through the head; {task.name}"]
            parts += [growth_table(found)]
        elif found.get("precision") and isinstance(task, Output) and task.draw is None:
            parts += [f"Measured, {task.size}: 1/1000 nats at the fewest bits, and the width chosen"]
            parts += [sensitivity_table(found["precision"])]
    return "\n\n".join(parts) + "\n"


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True, help="UTF-8 code that the model was not trained on")
    parser.add_argument("--wiki", type=Path, required=True, help="UTF-8 text of another kind, for evaluation only")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", type=int, default=8, help="at the same time, on one device")
    parser.add_argument("--seconds", type=float, default=float("inf"))
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calibration", nargs="+", default=SHAPES, metavar="WINDOWSxTOKENS")
    parser.add_argument("--evaluation", default="16x2048", metavar="WINDOWSxTOKENS")
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 2, 3])
    parser.add_argument("--targets", type=float, nargs="*", default=[4.5, 3.0], help="stored bits of mixed widths")
    parser.add_argument("--draws", type=int, default=10, help="random choices beside each measured one")
    parser.add_argument("--write", type=Path, help="Markdown file for the tables; printed in any case")
    return parser.parse_args()


def main() -> None:
    """Prepares, runs, reports."""
    until, arguments = time.monotonic(), parse()
    bench, tasks = Bench(arguments), list(tasks_of(arguments))
    bench.prepare()
    run_all(bench, tasks, until + arguments.seconds)
    text = report(bench, tasks)
    if arguments.write:
        arguments.write.write_text(text)
    print(text)


if __name__ == "__main__":
    main()

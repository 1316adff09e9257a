"""Compares candidates with a reference on texts, in one pass over the disk: `dsquant eval`."""

import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import TypeVar

import torch

from dsquant.errors import GateError, InconclusiveError, InputError, UsageError
from dsquant.evaluation.bands import written
from dsquant.evaluation.code.drift import CodeDrift
from dsquant.evaluation.code.drift_plan import drift_caveats, left_over_caveats
from dsquant.evaluation.code.measure_drift import measure_drift
from dsquant.evaluation.comparison_inputs import Inputs, check_alike, memory_budget, open_inputs, versions
from dsquant.evaluation.diagnosis import diagnose
from dsquant.evaluation.divergence import SafePoint
from dsquant.evaluation.gates import decide
from dsquant.evaluation.harness.measure_tasks import Drawing, measure_tasks
from dsquant.evaluation.harness.task_plan import task_caveats
from dsquant.evaluation.harness.task_scores import TaskScores
from dsquant.evaluation.intervals import BLOCK_TOKENS
from dsquant.evaluation.lockstep import LENS_TOKENS, Lockstep, noise_batch
from dsquant.evaluation.measures import Measures
from dsquant.evaluation.needs import needs, stays_on_gpu
from dsquant.evaluation.opening import Original
from dsquant.evaluation.report.report_files import write_reports
from dsquant.evaluation.request import EvaluationRequest
from dsquant.evaluation.results import SCHEMA_VERSION, Candidate, Evaluation, Identity, Reference, TextScores
from dsquant.evaluation.summary import layer_scores, routers_of, scores_by_text
from dsquant.evaluation.weight_errors import by_kind, worst
from dsquant.files.disk import remove_empty
from dsquant.formats.gguf.gguf_weights import RELEASE_BYTES
from dsquant.jobs.ranks import ALONE, Ranks
from dsquant.jobs.resources import check_disk, resolved_device
from dsquant.jobs.stopping import not_resumable, stop_on_signals
from dsquant.kernels.threads import one_thread_an_operation
from dsquant.options import format_size
from dsquant.reporting.progress import Progress, Report, Stage, peak_resident_bytes, resident_bytes, silent
from dsquant.source.vocabulary import surplus_notes

Value = TypeVar("Value")
MEMORY_STEP = 16 * 2**20
# What a GPU needs next is read into at most this much page-locked memory, and half of what the budget leaves: the disk
# works while attention is computed, which takes about a second of R1's layer.
MOST_AHEAD_BYTES = 2 * 2**30


def evaluate(request: EvaluationRequest, report: Report = silent, ranks: Ranks = ALONE) -> Evaluation:
    """Measures what candidates lose against a reference; writes the reports where the request names a folder. All ranks
    call this and get the evaluation; rank 0 writes.

    Raises InputError where a model, text or gates file cannot be used or a candidate is a different model, UsageError
    where the memory budget is too small or a gate is on something that is not measured, and Interrupted on a signal or
    where a rank is lost.
    """
    with not_resumable("an evaluation"), one_thread_an_operation(torch.device(resolved_device(request.device))):
        started = time.monotonic()
        inputs = ranks.together(lambda: open_inputs(request))
        check_alike(inputs, ranks)
        found = _measure(inputs, report, ranks)
        taken = ranks.gather((peak_resident_bytes(), sum(model.bytes_read for model in inputs.opened)))

        def conclude() -> Evaluation:
            evaluation = _evaluation(inputs, found, _identity(inputs, started, taken))
            report(Progress("evaluate", 1, 1, "", gates=_decided(evaluation)))
            if request.output is not None:
                write_reports(evaluation, request.output)
            return evaluation

        return ranks.once(conclude)


@dataclass(frozen=True)
class _Found:
    """What was measured: the noise floor, and of each candidate all else."""

    noise: Measures
    measures: Mapping[str, Measures]
    drifts: Mapping[str, CodeDrift]
    tasks: Mapping[str, Mapping[str, TaskScores]]


def _evaluation(inputs: Inputs, found: _Found, identity: Identity) -> Evaluation:
    request, noise = inputs.request, found.noise
    noise_overlaps = [
        one.router_overlap.estimate
        for one in layer_scores(noise, inputs.layers, inputs.confidence, request.seed)
        if one.router_overlap is not None
    ]
    noise_floor = scores_by_text(noise, inputs.texts.samples, inputs.confidence, request.seed)
    vocabulary = int(inputs.original.skeleton.config["vocab_size"])
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        identity=identity,
        reference=_reference(inputs.original),
        texts=inputs.texts.described,
        noise_floor=noise_floor,
        noise_router_overlap=min(noise_overlaps, default=None),
        candidates=tuple(_candidate(inputs, name, found) for name in inputs.candidates),
        caveats=(
            *worse_than_chance(noise_floor, vocabulary),
            *_caveats(inputs),
            *left_over_caveats(found.drifts.values()),
        ),
    )


def _decided(evaluation: Evaluation) -> dict[str, bool]:
    """Returns gate -> whether it passed; inconclusive gates are left out."""
    return {
        " ".join(part for part in (candidate.name, gate.metric, gate.text) if part): gate.verdict == "pass"
        for candidate in evaluation.candidates
        for gate in candidate.gates
        if gate.verdict != "inconclusive"
    }


def raise_verdict(evaluation: Evaluation) -> None:
    """Raises GateError where a gate failed, InconclusiveError where none failed but more samples are needed."""
    if evaluation.verdict in (None, "pass"):
        return
    lines = [
        f"{candidate.name}: {gate.message}"
        for candidate in evaluation.candidates
        for gate in candidate.gates
        if gate.verdict == evaluation.verdict
    ]
    if evaluation.verdict == "fail":
        raise GateError("gates failed:\n" + "\n".join(lines))
    raise InconclusiveError("inconclusive, more samples are needed:\n" + "\n".join(lines))


def _measure(inputs: Inputs, report: Report, ranks: Ranks) -> _Found:
    """Checks memory and disk, and runs everything; returns what is found, on every rank."""
    request, texts, models = inputs.request, inputs.texts, inputs.models
    need, budget = needs(models, *texts.tokens_NT.shape), memory_budget(request)
    on_gpu = all(ranks.gather(stays_on_gpu(models.original.device, need.memory + need.disk)))
    ranks.together(lambda: _check_memory(inputs, need.memory, budget))
    with stop_on_signals() as request_to_stop, ExitStack() as stack:
        work = ranks.once(lambda: stack.enter_context(_work_folder(request.output)))
        if ranks.size > 1:
            ranks.check_shared(work)
        ranks.once(lambda: check_disk(work, 0 if on_gpu else need.disk))

        def safe_point(done: int, total: int, what: str, stage: Stage = "evaluate") -> None:
            request_to_stop.safe_point()
            if resident_bytes() > budget:
                raise UsageError(
                    f"resident memory is {format_size(resident_bytes())}, above --memory-budget "
                    f"{format_size(budget)}; raise the budget, or lower --samples or --seq-len"
                )
            report(Progress(stage, done, total, what, sum(model.bytes_read for model in inputs.opened)))

        ahead = max(0, min(MOST_AHEAD_BYTES, (budget - need.memory - resident_bytes()) // 2))
        states = None if on_gpu else work
        noise, measures = Lockstep(models, texts.tokens_NT, states, safe_point, ranks, ahead).run()
        drifts, tasks = _with_whole_models(inputs, work, safe_point, ranks)
        return _Found(noise, measures, drifts, tasks)


def _with_whole_models(
    inputs: Inputs, work: Path, safe_point: Callable[[int, int, str, Stage], None], ranks: Ranks
) -> tuple[Mapping[str, CodeDrift], Mapping[str, Mapping[str, TaskScores]]]:
    """Measures what needs whole models in memory, on rank 0 alone: code drift and tasks of every candidate."""
    models, tokenizer, plan, tasks = inputs.models, inputs.original.tokenizer, inputs.plan, inputs.tasks
    drawing = Drawing(inputs.confidence, inputs.request.seed)

    def alone(stage: Stage, measure: Callable[[SafePoint], Mapping[str, Value]]) -> Mapping[str, Value]:
        def run(beat: Callable[[], None]) -> Mapping[str, Value]:
            def step(done: int, total: int, what: str) -> None:
                beat()
                safe_point(done, total, what, stage)

            return measure(step)

        return ranks.alone(run)

    return (
        {} if plan is None else alone("generate", lambda step: measure_drift(models, tokenizer, plan, work, step)),
        {} if tasks is None else alone("tasks", lambda step: measure_tasks(models, tokenizer, tasks, drawing, step)),
    )


def _check_memory(inputs: Inputs, needed_bytes: int, budget: int) -> None:
    mapped = [min(one.size_bytes, RELEASE_BYTES) for one in inputs.candidates.values() if one.index is None]
    memory = needed_bytes + sum(mapped) + resident_bytes()
    if memory > budget:
        raise UsageError(
            f"--memory-budget {format_size(budget)} is too small: these models and texts need "
            f"{format_size(_rounded_up(memory))}; raise the budget, evaluate fewer candidates at once, or lower "
            "--samples or --seq-len"
        )


def _rounded_up(size_bytes: int) -> int:
    """Returns a figure for messages: what a process holds at the start differs by some MiB from run to run."""
    return (size_bytes // MEMORY_STEP + 2) * MEMORY_STEP


@contextmanager
def _work_folder(output: Path | None) -> Iterator[Path]:
    """Creates a folder for hidden states, on the disk of the output where one is named: /tmp may be in memory."""
    missing = [] if output is None else [folder for folder in (output, *output.parents) if not folder.exists()]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".dsquant-", dir=output) as work:
            yield Path(work)
    except InputError:
        remove_empty(missing)
        raise


def _candidate(inputs: Inputs, name: str, found: _Found) -> Candidate:
    opened, texts, seed, measures = inputs.candidates[name], inputs.texts, inputs.request.seed, found.measures[name]
    scores = layer_scores(measures, inputs.layers, inputs.confidence, seed)
    candidate = Candidate(
        name=name,
        path=opened.path,
        format=opened.format,
        size_bytes=opened.size_bytes,
        bits_per_weight=opened.bits_per_weight,
        fingerprint=opened.fingerprint,
        texts=scores_by_text(measures, texts.samples, inputs.confidence, seed),
        layers=scores,
        weights=worst(measures.weights),
        weight_error_by_kind=by_kind(measures.weights, fmean),
        findings=diagnose(scores, measures.weights, routers_of(inputs.layers)),
        drift=found.drifts.get(name),
        gates=(),
        plain_of=inputs.plain_of.get(name),
        tasks=found.tasks.get(name, {}),
    )
    if inputs.gates is None or candidate.plain_of is not None:
        return candidate
    blocks_per_sample = -(-(texts.tokens_NT.shape[1] - 1) // BLOCK_TOKENS)
    return replace(candidate, gates=decide(inputs.gates, candidate, blocks_per_sample))


def _reference(original: Original) -> Reference:
    opened, config = original.opened, original.skeleton.config
    return Reference(
        path=opened.path,
        format=opened.format,
        architecture=original.checkpoint.architecture,
        size_bytes=opened.size_bytes,
        fingerprint=opened.fingerprint,
        num_layers=original.skeleton.num_layers,
        num_experts=original.skeleton.sizes.num_experts,
        vocabulary=int(config["vocab_size"]),
    )


def _identity(inputs: Inputs, started: float, taken: Sequence[tuple[int, int]]) -> Identity:
    """Returns how it was measured; `taken` are the peak of resident memory and the bytes read of every rank."""
    models, tokens_NT = inputs.models, inputs.texts.tokens_NT
    return Identity(
        versions=versions(),
        seed=inputs.request.seed,
        confidence=inputs.confidence,
        block_tokens=BLOCK_TOKENS,
        dtype="float32",
        device=str(models.original.device),
        batch_samples=models.batch_samples,
        noise_batch_samples=noise_batch(models.batch_samples),
        lens_tokens=min(LENS_TOKENS, tokens_NT.numel()),
        elapsed_s=time.monotonic() - started,
        peak_resident_bytes=max(peak for peak, _ in taken),
        bytes_read=sum(count for _, count in taken),
    )


def worse_than_chance(noise_floor: Mapping[str, TextScores], vocabulary: int) -> list[str]:
    """Returns a caveat where the original does not know a text: its perplexity is above the number of tokens."""
    lost = [
        f"{name} {written(scores.perplexity_original)}"
        for name, scores in noise_floor.items()
        if scores.perplexity_original > vocabulary
    ]
    words = (
        f"the original predicts worse than chance (perplexity {', '.join(lost)} with {vocabulary:,} tokens): "
        "perplexity, and code that it wrote, say nothing of the candidates; check that it is the model you mean"
    )
    return [words] if lost else []


def _caveats(inputs: Inputs) -> tuple[str, ...]:
    """Returns what the numbers do not show, in words."""
    original = inputs.original
    words = [
        "both models were run in float32 by one implementation: errors of an engine's kernels are not in these numbers",
        f"intervals rest on blocks of {BLOCK_TOKENS} tokens of these texts; other texts may differ by more",
    ]
    if any(one.rounds_activations for one in inputs.opened):
        words.append(
            "only where they meet weights of GGUF files, activations are rounded as llama.cpp does on CPUs, to 8 bits "
            "where the weight is quantized, in all numbers but the weight errors; on tiny-r1 that adds 0.0005 to 0.001 "
            "to the mean KL, whichever the type: 3 % of Q4_K_M's, half of Q8_0's"
        )
    asking = ", ".join(one.path for one in inputs.opened if one.engines_round)
    if asking:
        words.append(f"engines round activations beside the weights of {asking}: that error is not in these numbers")
    few = [f"{text.name} ({text.samples})" for text in inputs.texts.described if text.samples < 4]
    if few:
        words.append(f"few samples: {', '.join(few)}; more text or a smaller --seq-len makes the intervals reliable")
    words += [*original.checkpoint.notes, *surplus_notes(original.tokenizer)]
    words += [note for one in inputs.opened for note in one.notes]
    words += [*drift_caveats(inputs.plan), *task_caveats(inputs.tasks)]
    if original.skeleton.num_mtp_layers:
        words.append("the multi-token-prediction layer was not evaluated")
    words.append(
        "weight errors are measured after undoing scales folded into norms and projections; other transformations of "
        "the weights, such as rotations, show as errors"
    )
    return tuple(words)

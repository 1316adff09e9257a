"""Compares candidates with a reference on texts, in one pass over the disk: what `dsquant eval` does."""

import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean

import torch

from dsquant.errors import GateError, InconclusiveError, InputError, Interrupted, UsageError
from dsquant.evaluation.code.drift import CodeDrift
from dsquant.evaluation.code.drift_plan import drift_caveats, left_over_caveats, plan_drift, run_drift
from dsquant.evaluation.code.measure_drift import DriftPlan
from dsquant.evaluation.diagnosis import diagnose
from dsquant.evaluation.gates import Gates, check_measured, decide, read_gates
from dsquant.evaluation.intervals import BLOCK_TOKENS, CONFIDENCE
from dsquant.evaluation.lockstep import LENS_TOKENS, Lockstep
from dsquant.evaluation.measures import Measures
from dsquant.evaluation.needs import needs
from dsquant.evaluation.opening import Opened, Original, open_candidate, open_original
from dsquant.evaluation.report.files import write_reports
from dsquant.evaluation.request import EvaluationRequest, Texts, candidate_names, read_texts
from dsquant.evaluation.results import SCHEMA_VERSION, Candidate, Evaluation, Identity, Reference
from dsquant.evaluation.summary import layer_scores, routers_of, scores_by_text
from dsquant.evaluation.weights import by_kind, worst
from dsquant.files.disk import remove_empty
from dsquant.formats.gguf.weights import RELEASE_BYTES
from dsquant.jobs.folder import check_name, stop_on_signals
from dsquant.jobs.resources import check_disk, default_memory_budget, resolved_device
from dsquant.kernels.threads import one_thread_an_operation
from dsquant.model.streaming import samples_together
from dsquant.packages import PACKAGES, load, version
from dsquant.recipes import format_size
from dsquant.reporting.progress import Progress, Report, Stage, peak_resident_bytes, resident_bytes, silent
from dsquant.source.quantized import DecodedWeights
from dsquant.source.vocabulary import surplus_notes

MEMORY_STEP = 16 * 2**20


def evaluate(request: EvaluationRequest, report: Report = silent) -> Evaluation:
    """Measures what candidates cost against a reference.

    Args:
        request: what to evaluate.
        report: gets the progress.

    Returns:
        The evaluation; its reports are written where a folder is named.

    Raises:
        InputError: where a model, text or file of gates cannot be used, or a candidate is not the same model.
        UsageError: where the memory budget cannot work, or a gate is on what is not measured.
        Interrupted: where a signal stopped it.
    """
    device = torch.device(resolved_device(request.device))
    with one_thread_an_operation(device):
        return _evaluate(request, device, report)


def _evaluate(request: EvaluationRequest, device: torch.device, report: Report) -> Evaluation:
    started = time.monotonic()
    gates = None if request.gates is None else read_gates(request.gates)
    confidence = CONFIDENCE if gates is None else gates.confidence
    if request.output is not None:
        check_name(request.output)
    original = open_original(request.reference, device)
    candidates = {name: open_candidate(path, original) for name, path in candidate_names(request.candidates).items()}
    texts = read_texts(request, original.tokenizer)
    plan = plan_drift(request.drift, original, _budget(request) - resident_bytes())
    if gates is not None:
        check_measured(gates, list(texts.samples), () if plan is None else plan.measures)
    _check_packages(request, (original.opened, *candidates.values()), plan)
    noise, measures, drifts = _measure(request, original, candidates, texts, plan, report)
    layers = original.skeleton.layers[: original.skeleton.num_layers]
    found = [
        _candidate(name, opened, measures[name], drifts.get(name), original, texts, confidence, request.seed, gates)
        for name, opened in candidates.items()
    ]
    noise_overlaps = [
        one.router_overlap.estimate
        for one in layer_scores(noise, layers, confidence, request.seed)
        if one.router_overlap is not None
    ]
    evaluation = Evaluation(
        schema_version=SCHEMA_VERSION,
        identity=_identity(request, original, candidates, texts, confidence, started),
        reference=_reference(original),
        texts=texts.described,
        noise_floor=scores_by_text(noise, texts.samples, confidence, request.seed),
        noise_router_overlap=min(noise_overlaps, default=None),
        candidates=tuple(found),
        caveats=(*_caveats(original, candidates, texts, plan), *left_over_caveats(drifts.values())),
    )
    report(Progress("evaluate", 1, 1, "", gates=_decided(evaluation)))
    if request.output is not None:
        write_reports(evaluation, request.output)
    return evaluation


def check_request(request: EvaluationRequest, gates: Gates | None) -> None:
    """Refuses what `evaluate` would refuse of texts, prompts and gates, where the candidates are still to be made.

    Args:
        request: what will be evaluated; candidates do not count.
        gates: what will be decided.

    Raises:
        InputError: where the reference, a text or a prompt cannot be used.
        UsageError: where code cannot be run as wanted, or a gate is on what is not measured.
    """
    original = open_original(request.reference, torch.device(resolved_device(request.device)))
    texts = read_texts(request, original.tokenizer)
    plan = plan_drift(request.drift, original, _budget(request) - resident_bytes())
    if gates is not None:
        check_measured(gates, list(texts.samples), () if plan is None else plan.measures)
    _check_packages(request, (original.opened,), plan)


def _versions() -> dict[str, str]:
    return {name: version(name) for name in (*PACKAGES, "gguf")}


def _check_packages(request: EvaluationRequest, models: Iterable[Opened], plan: DriftPlan | None) -> None:
    """Looks up now what the last steps need of other packages, so that no evaluation ends there."""
    _versions()
    for model in models:
        if isinstance(model.weights, DecodedWeights):
            load(*model.weights.decoder)
    if plan is not None:
        load("sacrebleu", "sacrebleu")
    if request.output is not None:
        load("jinja2", "jinja2")


def _decided(evaluation: Evaluation) -> dict[str, bool]:
    """Gate -> whether it passed; without those that need more samples."""
    return {
        " ".join(part for part in (candidate.name, gate.metric, gate.text) if part): gate.verdict == "pass"
        for candidate in evaluation.candidates
        for gate in candidate.gates
        if gate.verdict != "inconclusive"
    }


def raise_verdict(evaluation: Evaluation) -> None:
    """Turns gates that did not pass into an error.

    Args:
        evaluation: the evaluation.

    Raises:
        GateError: where a gate failed.
        InconclusiveError: where none failed, but more samples are needed.
    """
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
    raise InconclusiveError("undecided, more samples are needed:\n" + "\n".join(lines))


def _measure(
    request: EvaluationRequest,
    original: Original,
    candidates: Mapping[str, Opened],
    texts: Texts,
    plan: DriftPlan | None,
    report: Report,
) -> tuple[Measures, dict[str, Measures], dict[str, CodeDrift]]:
    """Checks memory and disk, and runs everything."""
    num_samples, seq_len = texts.tokens_NT.shape
    batch, noise_batch = _batches(seq_len)
    weights = original.checkpoint.weights
    need = needs(original.skeleton, weights, num_samples, seq_len, len(candidates), batch)
    mapped = [min(one.size_bytes, RELEASE_BYTES) for one in candidates.values() if one.index is None]
    memory, budget = need.memory + sum(mapped) + resident_bytes(), _budget(request)
    if memory > budget:
        raise UsageError(
            f"--memory-budget {format_size(budget)} is too small: these models and texts need "
            f"{format_size(_rounded_up(memory))}; raise the budget, evaluate fewer candidates "
            "at once, or lower --samples or --seq-len"
        )
    with _not_resumable(), stop_on_signals() as request_to_stop, _work_folder(request.output) as work:
        check_disk(work, need.disk)
        opened = (original.opened, *candidates.values())

        def safe_point(done: int, total: int, what: str, stage: Stage = "evaluate") -> None:
            request_to_stop.safe_point()
            if resident_bytes() > budget:
                raise UsageError(
                    f"resident memory is {format_size(resident_bytes())}, above --memory-budget "
                    f"{format_size(budget)}; raise the budget, or lower --samples or --seq-len"
                )
            report(Progress(stage, done, total, what, sum(model.bytes_read for model in opened)))

        lanes = {name: model.weights for name, model in candidates.items()}
        lockstep = Lockstep(original.skeleton, weights, lanes, texts.tokens_NT, work, batch, noise_batch, safe_point)
        noise, measures = lockstep.run()
        if plan is None:
            return noise, measures, {}
        return noise, measures, run_drift(plan, original, candidates, work, partial(safe_point, stage="generate"))


def _budget(request: EvaluationRequest) -> int:
    return request.memory_budget or default_memory_budget()


def _rounded_up(size_bytes: int) -> int:
    """A number to state: what a process holds at the start differs by some MiB from run to run."""
    return (size_bytes // MEMORY_STEP + 2) * MEMORY_STEP


def _batches(seq_len: int) -> tuple[int, int]:
    """Samples that pass attention together, and the same for the noise floor."""
    batch = samples_together(seq_len)
    return batch, batch // 2 or 2


@contextmanager
def _not_resumable() -> Iterator[None]:
    try:
        yield
    except Interrupted as error:
        raise Interrupted("stopped by a signal; an evaluation keeps nothing: run it again") from error


@contextmanager
def _work_folder(output: Path | None) -> Iterator[Path]:
    """A folder for hidden states, on the disk of the output where one is named: /tmp may be memory."""
    missing = [] if output is None else [folder for folder in (output, *output.parents) if not folder.exists()]
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix=".dsquant-", dir=output) as work:
            yield Path(work)
    except InputError:
        remove_empty(missing)
        raise


def _candidate(
    name: str,
    opened: Opened,
    measures: Measures,
    drift: CodeDrift | None,
    original: Original,
    texts: Texts,
    confidence: float,
    seed: int,
    gates: Gates | None,
) -> Candidate:
    layers = original.skeleton.layers[: original.skeleton.num_layers]
    scores = layer_scores(measures, layers, confidence, seed)
    candidate = Candidate(
        name=name,
        path=opened.path,
        format=opened.format,
        size_bytes=opened.size_bytes,
        bits_per_weight=opened.bits_per_weight,
        fingerprint=opened.fingerprint,
        texts=scores_by_text(measures, texts.samples, confidence, seed),
        layers=scores,
        weights=worst(measures.weights),
        weight_error_by_kind=by_kind(measures.weights, fmean),
        findings=diagnose(scores, measures.weights, routers_of(layers)),
        drift=drift,
        gates=(),
    )
    if gates is None:
        return candidate
    blocks_per_sample = -(-(texts.tokens_NT.shape[1] - 1) // BLOCK_TOKENS)
    return replace(candidate, gates=decide(gates, candidate, blocks_per_sample))


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


def _identity(
    request: EvaluationRequest,
    original: Original,
    candidates: Mapping[str, Opened],
    texts: Texts,
    confidence: float,
    started: float,
) -> Identity:
    batch, noise_batch = _batches(texts.tokens_NT.shape[1])
    return Identity(
        versions=_versions(),
        seed=request.seed,
        confidence=confidence,
        block_tokens=BLOCK_TOKENS,
        dtype="float32",
        device=str(original.checkpoint.weights.device),
        batch_samples=batch,
        noise_batch_samples=noise_batch,
        lens_tokens=min(LENS_TOKENS, texts.tokens_NT.numel()),
        elapsed_s=time.monotonic() - started,
        peak_resident_bytes=peak_resident_bytes(),
        bytes_read=sum(model.bytes_read for model in (original.opened, *candidates.values())),
    )


def _caveats(
    original: Original, candidates: Mapping[str, Opened], texts: Texts, plan: DriftPlan | None
) -> tuple[str, ...]:
    """What the numbers do not tell, in words."""
    words = [
        "both models were run in float32 by one implementation: what an engine's kernels add is not in these numbers",
        f"intervals rest on blocks of {BLOCK_TOKENS} tokens of these texts; other texts may differ by more",
    ]
    if any(one.rounds_activations for one in (original.opened, *candidates.values())):
        words.append(
            "only beside weights of GGUF files activations are rounded as llama.cpp does on CPUs, to 8 bits where the "
            "weight is quantized, in all numbers but the errors of weights; on tiny-r1 that is 0.0005 to 0.001 of the "
            "mean KL, whatever the type: 3 % of Q4_K_M's, half of Q8_0's"
        )
    few = [f"{text.name} ({text.samples})" for text in texts.described if text.samples < 4]
    if few:
        words.append(f"few samples: {', '.join(few)}; more text or a smaller --seq-len makes its intervals trustworthy")
    words += [*original.checkpoint.notes, *surplus_notes(original.tokenizer)]
    words += drift_caveats(plan)
    if original.skeleton.num_mtp_layers:
        words.append("the multi-token-prediction layer was not evaluated")
    words.append(
        "weight errors are measured after undoing scales folded into norms and projections; other transformations of "
        "the weights, such as rotations, would show as errors"
    )
    return tuple(words)

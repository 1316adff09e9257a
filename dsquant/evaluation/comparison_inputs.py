"""What an evaluation works on: opened, read and checked, on every rank alike."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dsquant.errors import InputError, UsageError
from dsquant.evaluation.code.drift_plan import plan_drift
from dsquant.evaluation.code.tasks import DriftPlan
from dsquant.evaluation.divergence import ComparedModels
from dsquant.evaluation.gates import Gates, check_measured, read_gates
from dsquant.evaluation.harness.task_plan import TaskPlan, plan_tasks
from dsquant.evaluation.intervals import CONFIDENCE
from dsquant.evaluation.opening import Opened, Original, open_candidate, open_original
from dsquant.evaluation.plain_rounding import with_plain_rounding
from dsquant.evaluation.request import EvaluationRequest, candidate_names
from dsquant.evaluation.samples import Texts, read_texts
from dsquant.formats.decoded import DecodedWeights
from dsquant.jobs.folder_state import check_name
from dsquant.jobs.ranks import Ranks
from dsquant.jobs.resources import default_memory_budget, resolved_device
from dsquant.model.streaming import samples_together
from dsquant.model.structure import DecoderLayer
from dsquant.packages import PACKAGES, load, version
from dsquant.reporting.progress import resident_bytes


@dataclass(frozen=True)
class Inputs:
    """Models, texts, prompts, tasks and gates of an evaluation."""

    request: EvaluationRequest
    gates: Gates | None
    original: Original
    candidates: Mapping[str, Opened]
    texts: Texts
    plan: DriftPlan | None
    tasks: TaskPlan | None
    plain_of: Mapping[str, str]
    """Yardstick of plain rounding -> the candidate that it is for."""

    @property
    def opened(self) -> tuple[Opened, ...]:
        """The original and the candidates."""
        return self.original.opened, *self.candidates.values()

    @property
    def models(self) -> ComparedModels:
        """The same as networks with weights."""
        candidates = {name: model.weights for name, model in self.candidates.items()}
        batch_samples = samples_together(self.texts.tokens_NT.shape[1])
        return ComparedModels(self.original.skeleton, self.original.checkpoint.weights, candidates, batch_samples)

    @property
    def layers(self) -> tuple[DecoderLayer, ...]:
        """The decoder layers that run."""
        return self.original.skeleton.layers[: self.original.skeleton.num_layers]

    @property
    def confidence(self) -> float:
        """Confidence of every interval, 0 to 1."""
        return CONFIDENCE if self.gates is None else self.gates.confidence


def open_inputs(request: EvaluationRequest) -> Inputs:
    """Opens everything that an evaluation reads.

    Raises InputError where a model, text, task or gates file cannot be used or a candidate is a different model,
    UsageError where a task is unknown or a gate is on something that is not measured.
    """
    gates = None if request.gates is None else read_gates(request.gates)
    if request.output is not None:
        check_name(request.output)
    return _open(request, gates, request.candidates)


def check_request(request: EvaluationRequest, gates: Gates | None) -> None:
    """Checks reference, texts, prompts, tasks and gates as `evaluate` does, before the candidates exist.

    Raises InputError where the reference, a text, a prompt or a task cannot be used, UsageError where code cannot be
    run as requested, a task is unknown, or a gate is on something that is not measured.
    """
    _open(request, gates, ())


def _open(request: EvaluationRequest, gates: Gates | None, paths: tuple[str, ...]) -> Inputs:
    original = open_original(request.reference, torch.device(resolved_device(request.device)))
    candidates = {name: open_candidate(path, original) for name, path in candidate_names(paths).items()}
    plain_of: dict[str, str] = {}
    if request.plain_rounding:
        candidates, plain_of = with_plain_rounding(original.checkpoint.weights, candidates)
    texts = read_texts(request, original.tokenizer)
    left = memory_budget(request) - resident_bytes()
    plan, tasks = plan_drift(request, original, left), plan_tasks(request, original, left)
    if gates is not None:
        measures, names = () if plan is None else plan.measures, () if tasks is None else tasks.names
        check_measured(gates, list(texts.samples), measures, names)
    inputs = Inputs(request, gates, original, candidates, texts, plan, tasks, plain_of)
    _check_packages(inputs)
    return inputs


def check_alike(inputs: Inputs, ranks: Ranks) -> None:
    """Raises UsageError or InputError where ranks were told or read something different."""
    if ranks.size == 1:
        return
    told = inputs.request.model_dump(exclude={"reference", "candidates", "memory_budget"})
    ranks.check_alike({key: str(value) for key, value in told.items()}, UsageError, "start all with the same options")
    models = {f"model {number}": model.fingerprint for number, model in enumerate(inputs.opened)}
    texts = {f"text {text.name}": text.tokens_sha256 for text in inputs.texts.described}
    ranks.check_alike({**models, **texts, "gates": repr(inputs.gates)}, InputError, "give every rank the same files")


def memory_budget(request: EvaluationRequest) -> int:
    """Returns the bytes that an evaluation may keep in memory."""
    return request.memory_budget or default_memory_budget()


def versions() -> dict[str, str]:
    """Returns package -> version."""
    return {name: version(name) for name in (*PACKAGES, "gguf")}


def _check_packages(inputs: Inputs) -> None:
    """Loads the packages that the last steps need, so that a missing one is found before the work begins."""
    versions()
    for model in inputs.opened:
        if isinstance(model.weights, DecodedWeights) and model.weights.decoder is not None:
            load(*model.weights.decoder)
    if inputs.plan is not None:
        load("sacrebleu", "sacrebleu")
    if inputs.request.output is not None:
        load("jinja2", "jinja2")

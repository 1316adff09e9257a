"""The results of an evaluation: the content of report.json, from which every report is made.

    Evaluation
    ├─ reference, identity, texts
    ├─ noise_floor: text -> TextScores, of the original against itself at another batch size
    ├─ candidates: Candidate
    │  ├─ texts: TextScores     perplexity, KL, agreement, Δp; KL by position
    │  ├─ layers: LayerScores   errors, router overlap, KL through the head after each layer
    │  ├─ weights: WeightError  the worst tensors
    │  ├─ findings: Finding     broken parts, the first layer first
    │  ├─ drift: CodeDrift      scores of generated code, where prompts were given
    │  ├─ tasks: TaskScores     of lm-evaluation-harness, where tasks were named
    │  └─ gates: GateOutcome    pass, fail or inconclusive
    └─ caveats

All numbers are shares (0 to 1), nats or bytes, never percentages.
"""

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from dsquant.evaluation.code.drift import CodeDrift
from dsquant.evaluation.harness.task_scores import TaskScores
from dsquant.evaluation.intervals import Interval
from dsquant.reporting.notebook import Shown

if TYPE_CHECKING:
    from rich.console import RenderableType

# report.json's layout. 1: first.
SCHEMA_VERSION = 1

Verdict = Literal["pass", "fail", "inconclusive"]
FindingKind = Literal["weight", "router", "layer"]


@dataclass(frozen=True)
class Ladder:
    """Distribution of a quantity over tokens, in the quantiles that llama.cpp reports."""

    mean: float
    median: float
    p90: float
    p95: float
    p99: float
    p999: float
    maximum: float
    minimum: float
    p01: float
    p05: float
    p10: float


@dataclass(frozen=True)
class TextScores:
    """A candidate against the original on one text; the last token of each sample predicts nothing."""

    tokens: int
    """Predicted tokens."""
    perplexity_original: float
    perplexity: float
    log_ratio: Interval
    """Mean of log(perplexity / original's), paired token by token, nats."""
    perplexity_ratio: Interval
    """exp of `log_ratio`."""
    mean_kl: Interval
    """KL(original || candidate), nats a token."""
    mean_kl_reverse: Interval
    """KL(candidate || original), nats a token."""
    kl: Ladder
    kl_reverse: Ladder
    top1_agreement: Interval
    """Share of tokens where both rank the same token first."""
    top5_agreement: Interval
    """Mean share of the original's five most likely tokens among the candidate's five."""
    delta_p: Ladder
    """Probability of the actual token, candidate's less original's; skewed to the left is damage."""
    delta_p_rms: float
    kl_by_position: tuple[tuple[int, float], ...]
    """(first position of a bin in the sample, mean KL in the bin)."""


@dataclass(frozen=True)
class LayerScores:
    """A candidate against the original in and after one decoder layer, over all texts.

    `local` numbers come from the candidate's layer run on the original's inputs, so that they measure this layer alone;
    the others accumulate over the layers before.
    """

    index: int
    name: str
    """model.layers.3"""
    hidden_error: float
    """|candidate's hidden states - original's| / |original's| after the layer (Frobenius norms)."""
    local_error: float
    """The same for the layer's update of the residual stream, on the original's input."""
    local_attention_error: float
    """The same for attention's update."""
    local_mlp_error: float
    """The same for the update of the MLP or experts."""
    router_overlap: Interval | None
    """Mean share of the original's experts among the candidate's, each on its own hidden states; None without a router.
    """
    local_router_overlap: float | None
    """The same on the original's hidden states."""
    router_weight_distance: float | None
    """Mean L1 distance of the experts' shares in the mixture, divided by the sum of the original's shares."""
    load_shift: float | None
    """Share of routed tokens that would have to change experts to restore the original's loads (total variation)."""
    kl: float
    """Mean KL(original || candidate) of the hidden states after the layer through final norm and head, on a subset of
    tokens (`Identity.lens_tokens`)."""


@dataclass(frozen=True)
class WeightError:
    """A tensor against the original's, folded scales undone."""

    name: str
    layer: int | None
    """None outside the decoder layers."""
    relative: float
    """|candidate - original| / |original| (Frobenius norms)."""
    activation_weighted: float | None
    """The same with each column weighted by the root mean square of the original's inputs; None where no token
    reached it."""


@dataclass(frozen=True)
class Finding:
    """A broken tensor, router or layer."""

    kind: FindingKind
    layer: int | None
    name: str
    """Tensor or layer."""
    value: float
    expected: float
    """Largest value of a healthy one (overlap: smallest)."""
    message: str


@dataclass(frozen=True)
class GateOutcome:
    """The outcome of one gate."""

    metric: str
    text: str | None
    """Or the task; None where the metric concerns the whole model."""
    bound: Literal["at_most", "at_least"]
    limit: float
    found: Interval
    verdict: Verdict
    needed: int | None
    """Total samples (of a text), prompts or documents that would settle it; None where it is settled or no number
    would."""
    unit: str
    """Unit of `needed`: samples, prompts or documents."""
    message: str


@dataclass(frozen=True)
class Candidate:
    """All results of one candidate."""

    name: str
    """Heading, unique among the candidates."""
    path: str
    """As the caller gave it."""
    format: str
    """Such as FP8, `AWQ 4 bits, groups of 128` or `GGUF Q4_K_M`."""
    size_bytes: int
    """Data of all its tensors, without the files' headers."""
    bits_per_weight: float
    """From `size_bytes`."""
    fingerprint: str
    """SHA-256 of names, sizes and headers of its files."""
    texts: Mapping[str, TextScores]
    layers: tuple[LayerScores, ...]
    weights: tuple[WeightError, ...]
    """The worst twenty, the worst first."""
    weight_error_by_kind: Mapping[str, float]
    """Module kind, such as `mlp.experts.down_proj` -> mean relative error."""
    findings: tuple[Finding, ...]
    """Ordered by layer; empty where nothing stands out."""
    drift: CodeDrift | None
    gates: tuple[GateOutcome, ...]
    plain_of: str | None = None
    """The candidate on whose grids this is the original, plainly rounded; None for a candidate that was given."""
    tasks: Mapping[str, TaskScores] = field(default_factory=dict)
    """Group or task of lm-evaluation-harness -> scores; groups first."""

    @property
    def first_broken_layer(self) -> int | None:
        """The first layer with a finding."""
        return next((finding.layer for finding in self.findings if finding.layer is not None), None)

    @property
    def mean_kls(self) -> dict[str, float]:
        """Text -> mean KL divergence in nats."""
        return {name: text.mean_kl.estimate for name, text in self.texts.items()}

    @property
    def mean_kl(self) -> float:
        """Mean over the texts."""
        return sum(self.mean_kls.values()) / len(self.texts)

    @property
    def verdict(self) -> Verdict | None:
        """fail where a gate failed, inconclusive where one is inconclusive; None without gates."""
        verdicts = [gate.verdict for gate in self.gates]
        ordered: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
        return next((verdict for verdict in ordered if verdict in verdicts), None)


@dataclass(frozen=True)
class Text:
    """A text that was scored."""

    name: str
    samples: int
    seq_len: int
    tokens_sha256: str


@dataclass(frozen=True)
class Reference:
    """The original."""

    path: str
    format: str
    architecture: str
    size_bytes: int
    """Data of all its tensors, without the files' headers, as `dsquant plan` reports it."""
    fingerprint: str
    num_layers: int
    num_experts: int
    vocabulary: int


@dataclass(frozen=True)
class Identity:
    """How the numbers were measured."""

    versions: Mapping[str, str]
    seed: int
    """Seed of the bootstrap's draws."""
    confidence: float
    """Confidence of every interval."""
    block_tokens: int
    """Tokens of a bootstrap block."""
    dtype: str
    device: str
    batch_samples: int
    """Samples that pass attention together; the noise floor has another number."""
    noise_batch_samples: int
    lens_tokens: int
    """Number of tokens that `LayerScores.kl` averages."""
    elapsed_s: float
    peak_resident_bytes: int
    bytes_read: int


@dataclass(frozen=True)
class Evaluation(Shown):
    """The losses of candidates against the original."""

    schema_version: int
    identity: Identity
    reference: Reference
    texts: tuple[Text, ...]
    noise_floor: Mapping[str, TextScores]
    """Text -> the original against itself at another batch size."""
    noise_router_overlap: float | None
    """Lowest over the layers."""
    candidates: tuple[Candidate, ...]
    caveats: tuple[str, ...]
    """What these numbers do not show."""

    @property
    def given(self) -> tuple[Candidate, ...]:
        """The candidates without the yardsticks of plain rounding."""
        return tuple(one for one in self.candidates if one.plain_of is None)

    @property
    def verdict(self) -> Verdict | None:
        """The worst of the candidates' verdicts; None without gates."""
        verdicts = [candidate.verdict for candidate in self.candidates]
        ordered: tuple[Verdict, ...] = ("fail", "inconclusive", "pass")
        return next((verdict for verdict in ordered if verdict in verdicts), None)

    def as_json(self) -> dict[str, Any]:
        """Returns plain JSON values: the content of report.json. Numbers that are not finite become null."""
        found: dict[str, Any] = _plain(self)
        for plain, candidate in zip(found["candidates"], self.candidates, strict=True):
            plain["verdict"] = candidate.verdict
            plain["first_broken_layer"] = candidate.first_broken_layer
        return found | {"verdict": self.verdict}

    def tables(self) -> "Iterator[RenderableType]":
        """Yields the tables of the command line: candidates, texts, code, tasks, findings, gates."""
        from dsquant.evaluation.report.terminal_tables import tables

        return tables(self)

    def _repr_html_(self) -> str:
        """Returns the report page for a notebook, as in report.html."""
        from dsquant.evaluation.report.page import part

        return part(self)


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value

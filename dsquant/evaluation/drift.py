"""Code drift: what generated code tells. Placeholder, replaced by the branch eval-code."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from dsquant.evaluation.intervals import Interval


@dataclass(frozen=True)
class CodeDrift:
    """What generation from fixed prompts tells about one candidate."""

    measures: Mapping[str, Interval] = field(default_factory=dict)
    """What gates can be set on, such as `code_bleu_drop` and `accuracy_retained`; `units` are prompts."""

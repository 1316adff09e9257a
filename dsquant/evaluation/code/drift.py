"""Scores of a candidate's generated code: a part of `results`.

Scores are shares, 0 to 1. "Against gold" compares with the prompts' own completions, "against the original" with what
the original generated from the same prompt.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from dsquant.evaluation.intervals import Interval

DriftMethod = Literal["generated", "teacher_forced"]


@dataclass(frozen=True)
class CodeBleu:
    """CodeBLEU and its components (arXiv 2009.10297, as `code_bleu` defines them)."""

    total: float
    """Mean of the components that are not None."""
    ngram: float
    weighted_ngram: float
    syntax: float | None
    """None where neither side has a syntax tree to compare."""
    data_flow: float | None
    """None where neither side has data flow."""


@dataclass(frozen=True)
class Similarity:
    """Similarity of one set of completions to another."""

    bleu: float
    """Corpus BLEU-4 on Python tokens."""
    chrf: float
    code_bleu: CodeBleu
    exact_match: float
    """Share of completions with identical text."""
    first_divergence: float
    """Mean number of the model's tokens before the first difference; completions that agree count in full."""
    length_ratio: float
    """Tokens of all completions, divided by the reference's."""


@dataclass(frozen=True)
class Health:
    """Rates that need only one model's completions."""

    parse_rate: float
    """Share of prompts that are Python with their completion; the unfinished last line of a truncated one is left out.
    """
    loop_rate: float
    """Share of completions that end in one block repeated three times or more."""
    truncation_rate: float
    """Share of completions that reached the largest number of tokens."""
    mean_tokens: float


@dataclass(frozen=True)
class Execution:
    """Results of the prompts' tests on the completions; original and candidate under the same limits."""

    tasks: int
    pass_original: Interval
    """pass@1 of greedy completions, with Wilson's interval."""
    pass_candidate: Interval
    pass_gold: float | None
    """Of the prompts' own completions: below 1, tests or limits are at fault. None where a prompt has none."""
    only_original: int
    """Tasks that the original alone passes."""
    only_candidate: int
    p_value: float
    """McNemar's exact test, two-sided: the probability that chance splits the differing tasks at least as unevenly."""
    outcomes_original: Mapping[str, int]
    """passed, failed, error, time limit, memory limit, killed -> tasks."""
    outcomes_candidate: Mapping[str, int]
    protections: tuple[str, ...]
    """The protections that held, in words."""
    left_over: tuple[str, ...] = ()
    """Folders of programs that could not be removed."""


@dataclass(frozen=True)
class PromptDrift:
    """One prompt and its completions."""

    name: str
    prompt: str
    gold: str | None
    original: str
    candidate: str
    first_divergence: int | None
    """The model's tokens before the first difference; None where the completions agree."""


@dataclass(frozen=True, kw_only=True)
class CodeDrift:
    """Scores of one candidate's completions of fixed prompts."""

    method: DriftMethod
    """teacher_forced where the model does not fit in memory and nothing was generated."""
    note: str
    """How the numbers are measured, in one sentence."""
    prompts: int
    max_tokens: int
    """Largest number of tokens of a completion."""
    signatures: Mapping[str, str] = field(default_factory=dict)
    """Metric -> the signature to publish with its score."""
    original_vs_gold: Similarity | None = None
    """None where a prompt has no completion, and where nothing was generated."""
    candidate_vs_gold: Similarity | None = None
    candidate_vs_original: Similarity | None = None
    noise_floor: Similarity | None = None
    """The original against itself at another batch size."""
    original: Health | None = None
    candidate: Health | None = None
    agreement: Interval | None = None
    """Teacher-forced: share of the original's greedy tokens that the candidate ranks first too, `units` are prompts."""
    execution: Execution | None = None
    examples: tuple[PromptDrift, ...] = ()
    measures: Mapping[str, Interval] = field(default_factory=dict)
    """Values that gates can be set on; `units` are prompts. Drops are the original's less the candidate's.

    code_bleu_drop, codebleu_drop: BLEU and CodeBLEU against gold, in points (of 100, as they are published).
    code_exact_match: share of completions that equal the original's. parse_rate_drop, loop_rate_rise: shares.
    pass_rate_drop: share. accuracy_retained: the candidate's pass@1 divided by the original's. greedy_agreement:
    `agreement`, where nothing was generated.
    """

"""Compares completions with gold and with the original's, and examines each model's by themselves. No model runs here.

Shape legend: N prompts, D draws of the bootstrap, C counts.
"""

import itertools
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dsquant.calibration.tokenizer import encode
from dsquant.evaluation.code import code_bleu
from dsquant.evaluation.code.drift import CodeDrift, Health, PromptDrift, Similarity
from dsquant.evaluation.code.execution import ProgramRun, compare_runs, paired_difference, paired_ratio
from dsquant.evaluation.code.generation import Completion
from dsquant.evaluation.code.python_tokens import parsed, python_tokens
from dsquant.evaluation.code.tasks import DriftPlan, Task
from dsquant.evaluation.intervals import CONFIDENCE, DRAWS, Interval

LOOP_REPEATS = 3
LOOP_TOKENS = 12
# BLEU and CodeBLEU are published on a scale of 100.
POINTS = 100.0


@dataclass(frozen=True)
class Written:
    """One side of a comparison: a completion of every prompt."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    """The model's tokens of each."""


@dataclass(frozen=True)
class Sides:
    """Everything that was written for the same prompts, and what its tests said."""

    gold: Written | None
    """The prompts' own completions."""
    original: Sequence[Completion]
    candidate: Sequence[Completion]
    noise: Sequence[Completion] | None = None
    """The original's at another batch size."""
    runs: tuple[Sequence[ProgramRun] | None, Sequence[ProgramRun], Sequence[ProgramRun]] | None = None
    """Of gold (None without gold), original and candidate, for each task with a test; None where nothing ran."""


def written(completions: Sequence[Completion]) -> Written:
    """Returns a model's completions as one side of a comparison."""
    return Written(tuple(one.text for one in completions), tuple(one.tokens for one in completions))


def gold_of(tasks: Sequence[Task], tokenizer: Any) -> Written | None:
    """Returns the prompts' own completions as one side of a comparison; None where a prompt has none."""
    texts = tuple(task.gold for task in tasks if task.gold is not None)
    if len(texts) < len(tasks):
        return None
    return Written(texts, tuple(tuple(encode(text, tokenizer, add_special_tokens=False)) for text in texts))


def signatures() -> dict[str, str]:
    """Returns the metrics' signatures, to publish with the scores so that they can be compared."""
    lexer = f"lexer:python-{sys.version_info.major}.{sys.version_info.minor}"
    bleu, chrf = _metrics()
    for metric in (bleu, chrf):
        metric.corpus_score(["x"], [["x"]])  # only then it knows how many references there are
    return {
        "bleu": f"{bleu.get_signature()}|{lexer}",
        "chrf": str(chrf.get_signature()),
        "code_bleu": f"dsquant|weights:0.25,0.25,0.25,0.25|syntax:f1|data_flow:f1|{lexer}",
    }


def corpus_bleu(candidates: Sequence[str], references: Sequence[str], prefixes: Sequence[str]) -> float:
    """Returns corpus BLEU-4 on Python tokens, 0 to 1, by sacrebleu without a tokenizer of its own.

    Candidates and references both follow the prefixes, which are not scored.
    """
    bleu, _ = _metrics()
    sides = [[_words(*pair) for pair in zip(side, prefixes, strict=True)] for side in (candidates, references)]
    # sacrebleu skips a segment without a reference, and its candidate with it.
    return min(1.0, bleu.corpus_score(sides[0], [[side or "<nothing>" for side in sides[1]]]).score / 100)


def _words(text: str, prefix: str) -> str:
    """Joins tokens with spaces; a space inside a token (a string's) is made visible."""
    return " ".join(re.sub(r"\s", "␣", token) for token in python_tokens(text, prefix))


def _metrics() -> tuple[Any, Any]:
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    # chrF counts spaces too: they are Python's syntax.
    return BLEU(tokenize="none", force=True), CHRF(whitespace=True)


def similarity(candidate: Written, reference: Written, prefixes: Sequence[str]) -> Similarity:
    """Scores completions against others of the same prompts.

    `prefixes` are the code that each completion continues; it is parsed with the completion and not scored.
    """
    _, chrf = _metrics()
    same = [ours.rstrip() == theirs.rstrip() for ours, theirs in zip(candidate.texts, reference.texts, strict=True)]
    pairs = list(zip(candidate.tokens, reference.tokens, strict=True))
    agreed = [len(ours) if (place := first_divergence(ours, theirs)) is None else place for ours, theirs in pairs]
    return Similarity(
        bleu=corpus_bleu(candidate.texts, reference.texts, prefixes),
        chrf=chrf.corpus_score(candidate.texts, [list(reference.texts)]).score / 100,
        code_bleu=code_bleu.code_bleu(candidate.texts, reference.texts, prefixes),
        exact_match=float(np.mean(same)),
        first_divergence=float(np.mean(agreed)),
        length_ratio=sum(map(len, candidate.tokens)) / max(1, sum(map(len, reference.tokens))),
    )


def first_divergence(ours: Sequence[int], theirs: Sequence[int]) -> int | None:
    """Returns how many tokens agree before the first that differs; None where all do."""
    pairs = itertools.zip_longest(ours, theirs)
    return next((place for place, (one, other) in enumerate(pairs) if one != other), None)


def health(tasks: Sequence[Task], completions: Sequence[Completion]) -> Health:
    """Computes the rates (0 to 1) that need only one model's completions, and their mean length."""
    parse = [parses(task, completion) for task, completion in zip(tasks, completions, strict=True)]
    return Health(
        parse_rate=float(np.mean(parse)),
        loop_rate=float(np.mean([ends_in_loop(one.tokens) for one in completions])),
        truncation_rate=float(np.mean([one.truncated for one in completions])),
        mean_tokens=float(np.mean([len(one.tokens) for one in completions])),
    )


def parses(task: Task, completion: Completion) -> bool:
    """Returns whether prompt and completion are Python, without the unfinished last line of a truncated completion."""
    text = completion.text
    if completion.truncated and "\n" in text:
        text = text[: text.rindex("\n") + 1]
    return bool(text.strip()) and parsed(task.prefix + text) is not None


def ends_in_loop(tokens: Sequence[int]) -> bool:
    """Returns whether tokens end in one block that is repeated three times or more and spans at least 12 tokens."""
    for period in range(1, len(tokens) // LOOP_REPEATS + 1):
        repeats = max(LOOP_REPEATS, -(-LOOP_TOKENS // period))
        tail = tokens[-period * repeats :]
        if len(tail) == period * repeats and all(tail[at] == tail[at - period] for at in range(period, len(tail))):
            return True
    return False


def code_drift(plan: DriftPlan, sides: Sides, seed: int = 0) -> CodeDrift:
    """Compares a candidate's completions with the original's and with gold; `seed` is that of the bootstrap's draws."""
    tasks, gold, original, candidate = plan.tasks, sides.gold, sides.original, sides.candidate
    prefixes = [task.prefix for task in tasks]
    first, second = written(original), written(candidate)
    examples = tuple(
        PromptDrift(task.name, task.prompt, task.gold, one.text, two.text, first_divergence(one.tokens, two.tokens))
        for task, one, two in zip(tasks, original, candidate, strict=True)
    )
    return CodeDrift(
        method="generated",
        note=plan.note,
        prompts=len(tasks),
        max_tokens=plan.max_tokens,
        signatures=signatures(),
        original_vs_gold=similarity(first, gold, prefixes) if gold else None,
        candidate_vs_gold=similarity(second, gold, prefixes) if gold else None,
        candidate_vs_original=similarity(second, first, prefixes),
        noise_floor=similarity(written(sides.noise), first, prefixes) if sides.noise is not None else None,
        original=health(tasks, original),
        candidate=health(tasks, candidate),
        execution=compare_runs(*sides.runs) if sides.runs else None,
        examples=examples,
        measures=_measures(tasks, sides, seed),
    )


def _measures(tasks: Sequence[Task], sides: Sides, seed: int) -> Mapping[str, Interval]:
    """Computes what gates can be set on. A drop is the original's less the candidate's: positive is worse."""
    gold, original, candidate = sides.gold, sides.original, sides.candidate
    first, second = written(original), written(candidate)
    prefixes = [task.prefix for task in tasks]
    chosen_DN = np.random.default_rng(seed).integers(len(tasks), size=(DRAWS, len(tasks)))
    found: dict[str, Interval] = {}

    def shares(values: Sequence[bool] | Sequence[float]) -> Interval:
        values_N1 = np.asarray(values, dtype=np.float64)[:, None]
        return _bootstrap([values_N1], chosen_DN, lambda sums: float(sums[0][0]) / len(tasks), widest=1.0)

    same = [one.rstrip() == two.rstrip() for one, two in zip(first.texts, second.texts, strict=True)]
    found["code_exact_match"] = shares(same)
    ours, theirs = (
        [parses(task, one) for task, one in zip(tasks, side, strict=True)] for side in (original, candidate)
    )
    found["parse_rate_drop"] = shares([float(one) - float(two) for one, two in zip(ours, theirs, strict=True)])
    loops = [[float(ends_in_loop(one.tokens)) for one in side] for side in (candidate, original)]
    found["loop_rate_rise"] = shares([one - two for one, two in zip(*loops, strict=True)])
    if gold:
        sides_NC = [_pair_counts(side.texts, gold.texts, prefixes) for side in (first, second)]
        found["code_bleu_drop"] = _bootstrap(
            sides_NC, chosen_DN, lambda sums: POINTS * (_bleu(sums[0]) - _bleu(sums[1]))
        )
        found["codebleu_drop"] = _bootstrap(
            sides_NC, chosen_DN, lambda sums: POINTS * (_total(sums[0]) - _total(sums[1]))
        )
    if sides.runs:
        passed = [tuple(run.outcome == "passed" for run in pair) for pair in zip(*sides.runs[1:], strict=True)]
        both, only, other = (passed.count(kind) for kind in ((True, True), (True, False), (False, True)))
        neither = len(passed) - both - only - other
        found["pass_rate_drop"] = paired_difference(both, only, other, neither)
        # Where the original passes nothing, any share may have been retained.
        unknown = Interval(1.0, 0.0, float(len(passed)), len(passed))
        found["accuracy_retained"] = paired_ratio(both, only, other, neither) if both + only else unknown
    return found


def _pair_counts(candidates: Sequence[str], references: Sequence[str], prefixes: Sequence[str]) -> np.ndarray:
    return np.stack(list(map(code_bleu.pair_counts, candidates, references, prefixes)))


def _bleu(counts: np.ndarray) -> float:
    return code_bleu.score([counts]).ngram


def _total(counts: np.ndarray) -> float:
    return code_bleu.score([counts]).total


def _bootstrap(
    sides_NC: Sequence[np.ndarray],
    chosen_DN: np.ndarray,
    statistic: Callable[[Sequence[np.ndarray]], float],
    widest: float = POINTS,
) -> Interval:
    """Returns a statistic of sums over prompts, with percentiles over draws of prompts (with replacement).

    One prompt says nothing about others: the interval is then the widest possible.
    """
    prompts = len(sides_NC[0])
    estimate = statistic([side.sum(0) for side in sides_NC])
    if prompts < 2:
        return Interval(estimate, -widest, widest, prompts)
    drawn = [statistic([side[chosen_N].sum(0) for side in sides_NC]) for chosen_N in chosen_DN]
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Interval(estimate, float(low), float(high), prompts)

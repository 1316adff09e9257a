"""Lays out an evaluation as tables of words, for report.md and report.html."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsquant.escaping import counted
from dsquant.evaluation.code.drift import Health, Similarity
from dsquant.evaluation.intervals import Interval
from dsquant.options import format_size

if TYPE_CHECKING:
    from dsquant.evaluation.results import Candidate, Evaluation, GateOutcome, Ladder, TextScores

NOISE = "noise floor"
NOTHING = "–"
BLEU_CHANGE = (
    "Code BLEU change: the candidate's BLEU against the prompts' solutions less the original's, in points; an interval "
    "that contains 0 shows no difference."
)


@dataclass(frozen=True)
class Table:
    """A table of words; the first column names the row."""

    title: str
    headings: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    """How to read it."""


def number(value: float | None, digits: int = 4) -> str:
    """Formats a number with `digits` significant digits."""
    if value is None or math.isnan(value):
        return NOTHING
    if math.isinf(value):
        return "∞" if value > 0 else "-∞"
    if value and not 1e-4 <= abs(value) < 1e6:
        return f"{value:.{digits - 2}e}"
    return f"{value:.{max(0, digits - 1 - _magnitude(value))}f}"


def _magnitude(value: float) -> int:
    return math.floor(math.log10(abs(value))) if value else 0


def share(value: float | None) -> str:
    """Formats a share in per cent."""
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.1f}%"


def points(value: float | None) -> str:
    """Formats a score from 0 to 1 in points of 100, as it is published."""
    return NOTHING if value is None or not math.isfinite(value) else f"{100 * value:.2f}"


def interval(found: Interval | None, shares: bool = False) -> str:
    """Formats a number and its interval."""
    if found is None:
        return NOTHING
    write = share if shares else number
    return f"{write(found.estimate)} [{write(found.low)}, {write(found.high)}]"


def summary(evaluation: "Evaluation") -> Table:
    """Returns one row for each candidate: the most important numbers."""
    headings = ["candidate", "gates", "format", "size", "of original", "bits", "mean KL", "perplexity ×"]
    headings += ["same top token", "router overlap", "code BLEU change", "pass@1"]
    original = evaluation.reference.size_bytes
    rows = tuple(
        (
            one.name,
            one.verdict or NOTHING,
            one.format,
            format_size(one.size_bytes).replace(" ", "\N{NO-BREAK SPACE}"),
            share(one.size_bytes / original),
            f"{one.bits_per_weight:.2f}",
            number(one.mean_kl),
            number(_mean([text.perplexity_ratio.estimate for text in one.texts.values()])),
            share(_mean([text.top1_agreement.estimate for text in one.texts.values()])),
            share(lowest_overlap(one)),
            bleu_change(one),
            share(one.drift.execution.pass_candidate.estimate) if one.drift and one.drift.execution else NOTHING,
        )
        for one in evaluation.candidates
    )
    reference = evaluation.reference
    code = any(bleu_change(one) != NOTHING for one in evaluation.candidates)
    note = (
        f"Reference: {reference.path} ({reference.format}, {format_size(original)}). Sizes are those of the tensors' "
        "data, without headers; bits those of an average weight, embeddings and all that is not quantized among them. "
        "Means over the texts; router overlap of the worst layer." + (f" {BLEU_CHANGE}" if code else "")
    )
    return _without_empty_columns(Table("Candidates", tuple(headings), rows, note))


def lowest_overlap(candidate: "Candidate") -> float | None:
    """Returns the router overlap of the worst layer; None where no layer has a router."""
    found = [layer.router_overlap.estimate for layer in candidate.layers if layer.router_overlap is not None]
    return min(found, default=None)


def bleu_change(candidate: "Candidate") -> str:
    """Returns how much better the candidate solves the prompts than the original, with the interval."""
    found = candidate.drift.measures.get("code_bleu_drop") if candidate.drift else None
    return NOTHING if found is None else f"{-found.estimate:+.1f} [{-found.high:+.1f}, {-found.low:+.1f}]"


def _mean(values: list[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _without_empty_columns(table: Table) -> Table:
    kept = [at for at in range(len(table.headings)) if at == 0 or any(row[at] != NOTHING for row in table.rows)]
    rows = tuple(tuple(row[at] for at in kept) for row in table.rows)
    return Table(table.title, tuple(table.headings[at] for at in kept), rows, table.note)


def ordered_gates(evaluation: "Evaluation") -> "list[tuple[Candidate, GateOutcome]]":
    """Returns every candidate's gates: failed ones first, then inconclusive ones, then passed ones."""
    pairs = [(one, gate) for one in evaluation.candidates for gate in one.gates]
    return sorted(pairs, key=lambda pair: ("fail", "inconclusive", "pass").index(pair[1].verdict))


def gates(evaluation: "Evaluation") -> Table | None:
    """Returns every gate's outcome; None without gates."""
    rows = tuple(
        (
            one.name,
            gate.verdict,
            gate.metric + (f" on {gate.text}" if gate.text else ""),
            interval(gate.found),
            f"{'at most' if gate.bound == 'at_most' else 'at least'} {gate.limit:g}",
            counted(gate.needed, gate.unit.removesuffix("s")) if gate.needed else NOTHING,
        )
        for one, gate in ordered_gates(evaluation)
    )
    headings = ("candidate", "verdict", "gate", "found", "limit", "needed to settle it")
    return _without_empty_columns(Table("Gates", headings, rows)) if rows else None


def texts(evaluation: "Evaluation") -> list[Table]:
    """Returns perplexity, KL and agreement on each text."""
    agreement = ("same top token", "top five shared")
    headings = ("candidate", "perplexity", "perplexity ×", "log ratio", "mean KL", "reverse KL", *agreement)

    def row(name: str, found: "TextScores") -> tuple[str, ...]:
        agreement = (interval(found.top1_agreement, shares=True), interval(found.top5_agreement, shares=True))
        distances = (interval(found.log_ratio), interval(found.mean_kl), interval(found.mean_kl_reverse))
        return (name, number(found.perplexity), number(found.perplexity_ratio.estimate), *distances, *agreement)

    tables = []
    for text in evaluation.texts:
        rows = [row(one.name, one.texts[text.name]) for one in evaluation.candidates if text.name in one.texts]
        noise = evaluation.noise_floor.get(text.name)
        if noise is not None:
            rows.append(row(NOISE, noise))
        scored = next((one.texts[text.name] for one in evaluation.candidates if text.name in one.texts), noise)
        original = number(scored.perplexity_original) if scored else NOTHING
        note = (
            f"{counted(text.samples, 'sample')} of {text.seq_len} tokens; the original's perplexity is {original}. "
            "Noise floor: the original against itself, in batches of another size."
        )
        tables.append(Table(text.name, headings, tuple(rows), note))
    return tables


def ladders(evaluation: "Evaluation") -> list[Table]:
    """Returns the distribution of KL and Δp over the tokens of each text."""
    kl_headings = ("candidate", "mean", "median", "90 %", "95 %", "99 %", "99.9 %", "max")
    delta_headings = ("candidate", "mean", "RMS", "min", "1 %", "5 %", "median", "95 %", "99 %", "max")

    def kl(name: str, found: "Ladder") -> tuple[str, ...]:
        steps = (found.mean, found.median, found.p90, found.p95, found.p99, found.p999, found.maximum)
        return (name, *(number(step) for step in steps))

    def delta(name: str, found: "TextScores") -> tuple[str, ...]:
        ladder = found.delta_p
        low = (ladder.mean, found.delta_p_rms, ladder.minimum, ladder.p01, ladder.p05)
        high = (ladder.median, ladder.p95, ladder.p99, ladder.maximum)
        return (name, *(share(step) for step in (*low, *high)))

    tables = []
    for text in evaluation.texts:
        scored = [(one.name, one.texts[text.name]) for one in evaluation.candidates if text.name in one.texts]
        both = [(name, found.kl) for name, found in scored]
        both += [(f"{name}, reverse", found.kl_reverse) for name, found in scored]
        tables.append(Table(f"KL of single tokens, {text.name}", kl_headings, tuple(kl(*pair) for pair in both)))
        rows = tuple(delta(*pair) for pair in scored)
        note = (
            "Probability that the candidate gives to the token that came, less the original's: skewed to the left is "
            "damage, symmetric is noise."
        )
        tables.append(Table(f"Change in the probability of the actual token, {text.name}", delta_headings, rows, note))
    return tables


def layers(candidate: "Candidate") -> Table:
    """Returns the errors of every decoder layer of a candidate."""
    headings = (
        "layer",
        "KL after it",
        "error after it",
        "own error",
        "of attention",
        "of MLP or experts",
        "router overlap",
        "own router overlap",
        "load shift",
    )
    rows = tuple(
        (
            str(layer.index),
            number(layer.kl),
            share(layer.hidden_error),
            share(layer.local_error),
            share(layer.local_attention_error),
            share(layer.local_mlp_error),
            share(layer.router_overlap.estimate if layer.router_overlap else None),
            share(layer.local_router_overlap),
            share(layer.load_shift),
        )
        for layer in candidate.layers
    )
    note = "Own: the layer alone, on the original's inputs; the other numbers add up over the layers before."
    return _without_empty_columns(Table(f"Layers of {candidate.name}", headings, rows, note))


def weights(candidate: "Candidate") -> Table:
    """Returns the worst tensors of a candidate."""
    rows = tuple((one.name, share(one.relative), share(one.activation_weighted)) for one in candidate.weights)
    note = "Relative error of the weights, and the same with each column weighted by the inputs that it sees."
    return Table(f"Worst tensors of {candidate.name}", ("tensor", "error", "activation-weighted"), rows, note)


def drift(evaluation: "Evaluation") -> list[Table]:
    """Returns the scores of generated code; empty where nothing was generated."""
    drifts = [(one.name, one.drift) for one in evaluation.candidates if one.drift is not None]
    if not drifts:
        return []
    first = drifts[0][1]
    tables = []
    rows = [("original against the prompts' solutions", first.original_vs_gold)]
    for name, found in drifts:
        rows += [(f"{name} against the prompts' solutions", found.candidate_vs_gold)]
    for name, found in drifts:
        rows += [(f"{name} against the original", found.candidate_vs_original)]
    rows += [(NOISE, first.noise_floor)]
    headings = (
        "completions",
        "BLEU",
        "chrF",
        "CodeBLEU",
        "n-gram",
        "weighted",
        "syntax",
        "data flow",
        "exact match",
        "first divergence",
        "length ×",
    )
    scored = tuple(_similarity(name, found) for name, found in rows if found is not None)
    if scored:
        words = "; ".join(f"{name}: {signature}" for name, signature in first.signatures.items())
        prompts = counted(first.prompts, "prompt")
        note = (
            f"{prompts}, {first.note}. The prompts' solutions are those that the task sets ship; a candidate is judged "
            f"against the original. First divergence: mean number of tokens that agree. {words}."
        )
        tables.append(Table("Generated code", headings, scored, note))
    healthy = [("original", first.original), *((name, found.candidate) for name, found in drifts)]
    states = tuple(_health(name, found) for name, found in healthy if found is not None)
    if states:
        tables.append(Table("Completions by themselves", ("model", "parse", "loop", "cut off", "mean tokens"), states))
    agreed = tuple((name, interval(found.agreement, shares=True)) for name, found in drifts if found.agreement)
    if agreed:
        tables.append(
            Table(
                "Greedy tokens agreed on", ("candidate", "share"), agreed, f"{first.note[0].upper()}{first.note[1:]}."
            )
        )
    return tables


def _similarity(name: str, found: Similarity) -> tuple[str, ...]:
    parts = found.code_bleu
    scores = (found.bleu, found.chrf, parts.total, parts.ngram, parts.weighted_ngram, parts.syntax, parts.data_flow)
    counts = (share(found.exact_match), f"{found.first_divergence:.1f}", f"{found.length_ratio:.2f}")
    return (name, *(points(score) for score in scores), *counts)


def _health(name: str, found: Health) -> tuple[str, ...]:
    rates = (found.parse_rate, found.loop_rate, found.truncation_rate)
    return (name, *(share(rate) for rate in rates), f"{found.mean_tokens:.1f}")


def execution(evaluation: "Evaluation") -> Table | None:
    """Returns pass@1; None where nothing ran."""
    runs = [
        (one.name, one.drift.execution)
        for one in evaluation.candidates
        if one.drift is not None and one.drift.execution
    ]
    if not runs:
        return None
    first = runs[0][1]
    rows = [("original", interval(first.pass_original, shares=True), NOTHING, NOTHING, NOTHING)]
    for name, run in runs:
        alone = (str(run.only_original), str(run.only_candidate), number(run.p_value))
        rows.append((name, interval(run.pass_candidate, shares=True), *alone))
    held = "; ".join(first.protections)
    note = (
        f"{counted(first.tasks, 'task')}, greedy; the tasks' solutions pass {share(first.pass_gold)}. Limits: {held}."
    )
    headings = ("model", "pass@1", "original alone passes", "candidate alone passes", "McNemar's exact p")
    return Table("Tests run on the completions", headings, tuple(rows), note)


def identity(evaluation: "Evaluation") -> Table:
    """Returns how the numbers were measured."""
    about, reference = evaluation.identity, evaluation.reference
    rows = [
        ("reference", f"{reference.path}, {reference.architecture}, {reference.format}, {reference.fingerprint[:16]}"),
        *((one.name, f"{one.path}, {one.format}, {one.fingerprint[:16]}") for one in evaluation.candidates),
        *((f"text {text.name}", f"SHA-256 of its tokens {text.tokens_sha256[:16]}") for text in evaluation.texts),
        ("arithmetic", f"{about.dtype} on {about.device}, {counted(about.batch_samples, 'sample')} together"),
        ("noise floor", f"{counted(about.noise_batch_samples, 'sample')} together"),
        ("intervals", f"{about.confidence:.0%}, block bootstrap of {about.block_tokens} tokens, seed {about.seed}"),
        ("versions", ", ".join(f"{name} {version}" for name, version in about.versions.items())),
        ("cost", _cost(evaluation)),
    ]
    return Table("How these numbers were measured", ("what", "value"), tuple(rows))


def _cost(evaluation: "Evaluation") -> str:
    about = evaluation.identity
    memory, read = format_size(about.peak_resident_bytes), format_size(about.bytes_read)
    return f"{about.elapsed_s:.0f} s, at most {memory} of memory, {read} read"

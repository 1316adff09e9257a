"""Quantizes one decoder layer: the original's forward, the search, the proof, and what a writer gets.

The layer's weights pass through memory once, one expert at a time; 32 experts are read once more for the search of
the scales that all of them share. The next layer's inputs are the original layer's outputs.

Shape legend: N samples, T tokens, H hidden size, R tokens of all samples, E experts.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial

import torch

from dsquant.errors import InputError
from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import apply_linear
from dsquant.model.activations import Activations
from dsquant.model.overlays import Fold, FoldedWeights, ReplacedWeights, ResidentWeights, fold_of
from dsquant.model.streaming import ROWS_AT_ONCE, Observer, Routing, Stream, run_dense_part
from dsquant.model.structure import KEYS_SUFFIX, DecoderLayer, Mlp, ScaleGroup
from dsquant.quantization.attention import AttentionResult, quantize_attention, round_attention, under_scales
from dsquant.quantization.layer_job import GridReport, LayerJob, LayerReport
from dsquant.quantization.layer_mlps import MlpOutcome, quantize_mlps
from dsquant.quantization.mlp import MlpInputs, prove_same, search_norm_scales
from dsquant.quantization.sharing import SampleStatistics, share_routing, share_rows
from dsquant.quantization.statistics import Importance, InputMoments
from dsquant.recipes import Step
from dsquant.schemes import Grid
from dsquant.source.weights import Weights

# An expert with fewer tokens than this gets those that the router scores highest for it besides its own.
FEWEST_TOKENS = 256
# The scales of the norm before the MLPs are judged by at most this many experts, those with the most tokens.
SCALE_EXPERTS = 32
# The fold is proven, and attention's output error measured, on at most this many samples.
CHECK_SAMPLES = 2


def quantize_layer(job: LayerJob) -> LayerReport:
    """Runs the original layer, quantizes it onto every grid and hands everything to `emit`.

    Args:
        job: the layer and its surroundings.

    Returns:
        Errors before and after, tokens per expert, fallbacks.

    Raises:
        InputError: where the original's hidden states are not finite.
    """
    return checked(job, _quantize)


def checked(job: LayerJob, quantize: Callable[[LayerJob], LayerReport]) -> LayerReport:
    """Quantizes a layer and checks that the original's outputs are finite.

    Args:
        job: the layer and its surroundings.
        quantize: does it.

    Returns:
        What `quantize` returns.

    Raises:
        InputError: where the original's hidden states are not finite.
    """
    try:
        report = quantize(job)
    except FloatingPointError as error:
        raise out_of_range(job.layer.prefix) from error
    job.ranks.together(lambda: _check_outputs(job))
    return report


def out_of_range(where: str) -> InputError:
    """The error of hidden states that are not finite."""
    return InputError(
        f"{where}: the hidden states are not finite here; the weights of this or an earlier layer, or numbers in "
        "config.json, are out of any sensible range. Correct the model and run again."
    )


def _check_outputs(job: LayerJob) -> None:
    first, end = job.shares.samples(job.ranks.rank)
    for start in range(first, end, job.batch_samples):
        if not bool(job.outputs.samples(start, min(start + job.batch_samples, end)).isfinite().all()):
            raise out_of_range(f"{job.layer.prefix}, its outputs")


def _quantize(job: LayerJob) -> LayerReport:
    job.safe_point(f"{job.layer.prefix}.self_attn")
    attention_moments, norm_rms_H, routing = run_original(job)
    if not bool(norm_rms_H.isfinite().all()):
        raise out_of_range(job.layer.norm)
    inputs, added = read_by_mlps(job, job.mlp_inputs, routing)
    folds: list[torch.Tensor] = []
    reports: list[GridReport] = []
    for grid in job.grids:
        report = GridReport()
        norm_fold, norm_scales_H = search_norm_fold(job, grid, inputs, norm_rms_H)
        if job.ranks.first:
            _quantize_dense_part(job, grid, attention_moments, norm_fold, report)
            if norm_fold.rows:
                job.keep_scales(grid, job.layer.norm, norm_scales_H)
        folds.append(norm_scales_H)
        reports.append(report)
    found = quantize_mlps(job, inputs, folds, routing)
    reports = job.ranks.once(lambda: reports)
    for place, report in enumerate(reports):
        sum_up(report, [outcomes[place] for outcomes in found])
    counts = routing.counts(len(job.layer.experts)).tolist() if routing else []
    return LayerReport(counts, {expert: len(rows_R) for expert, rows_R in added.items()}, reports)


def run_original(job: LayerJob) -> tuple[dict[ScaleGroup, InputMoments], torch.Tensor, Routing | None]:
    """The original's dense part: fills outputs (still without experts) and mlp_inputs, collects statistics.

    Returns the moments of attention's inputs (on rank 0), the root mean square of the MLPs' input [H] and the routing.
    """
    device, ranks, shares = job.weights.device, job.ranks, job.shares
    num_tokens, own = job.inputs.shape[1], shares.samples(job.ranks.rank)
    statistics = {
        group: SampleStatistics(
            job.weights.shape(f"{group.consumers[0]}.weight")[1],
            job.seed,
            device,
            ranks,
            shares,
            job.compensates(group.consumers[0]),
        )
        for group in job.layer.attention
        if job.anywhere(group.consumers[0])
    }
    norm_statistics = SampleStatistics(job.inputs.shape[2], job.seed, device, ranks, shares)
    observers: dict[str, Observer] = {
        group.consumers[0]: group_statistics.add for group, group_statistics in statistics.items()
    }
    record = job.mlp_inputs.recorder(own[0] * num_tokens)
    chunk_ends = {stop for _, stop in shares.chunks(ranks.rank)}

    def note_mlp_inputs(inputs_RH: torch.Tensor) -> None:
        record(inputs_RH)
        norm_statistics.add(inputs_RH)

    def after_batch(stop: int) -> None:
        for collected in (*statistics.values(), norm_statistics):
            if stop in chunk_ends:
                collected.end_chunk()

    observers[f"{job.layer.prefix}.mlp"] = note_mlp_inputs
    stream = Stream(job.weights, job.inputs, job.outputs)
    routing = None
    if own[0] < own[1]:
        with fast_matmuls(device):
            routing = run_dense_part(job.skeleton, job.layer, stream, job.batch_samples, observers, own, after_batch)
    moments = {group: group_statistics.moments(num_tokens) for group, group_statistics in statistics.items()}
    norm_rms_H = norm_statistics.moments(num_tokens).rms_I
    ranks.broadcast(norm_rms_H)
    share_rows(job.mlp_inputs, ranks, shares)
    return moments, norm_rms_H, share_routing(routing, ranks, device)


def top_up(layer: DecoderLayer, weights: Weights, mlp_inputs: Activations, routing: Routing) -> dict[int, torch.Tensor]:
    """For each rare expert the tokens to add: those whose router scores for it are highest among all others.

    Args:
        layer: a layer with experts.
        weights: its weights.
        mlp_inputs: what the experts read.
        routing: the tokens of each expert.

    Returns:
        Expert -> int64 rows of `mlp_inputs`, so many that with its own it has `FEWEST_TOKENS` or all there are.
    """
    assert layer.router is not None
    counts = routing.counts(len(layer.experts))
    wanted = min(FEWEST_TOKENS, mlp_inputs.num_rows)
    rare = [expert for expert, count in enumerate(counts.tolist()) if count < wanted]
    if not rare:
        return {}
    router_EH = weights[layer.router][rare]
    parts = torch.arange(mlp_inputs.num_rows, device=weights.device).split(ROWS_AT_ONCE)
    scores_RE = torch.cat([apply_linear(mlp_inputs.rows(part_R), router_EH) for part_R in parts])
    added = {}
    for place, expert in enumerate(rare):
        own_R, _ = routing.tokens_of(expert)
        scores_RE[own_R, place] = -torch.inf
        added[expert] = scores_RE[:, place].topk(wanted - len(own_R)).indices.sort().values
    return added


def read_by_mlps(
    job: LayerJob, mlp_inputs: Activations, routing: Routing | None
) -> tuple[dict[Mlp, MlpInputs], dict[int, torch.Tensor]]:
    """The tokens that each MLP is judged on.

    Args:
        job: the layer and its surroundings.
        mlp_inputs: what the MLPs read.
        routing: the tokens of each expert; None where the layer has none.

    Returns:
        By MLP, its tokens; and by rare expert those that were added to its own, where `top-up` is a step.
    """
    added = {}
    if routing and "top-up" in job.steps and job.anywhere(job.layer.experts[0].up):
        added = top_up(job.layer, job.weights, mlp_inputs, routing)
    return {mlp: inputs_of(mlp_inputs, mlp, routing, added, job.steps) for mlp in job.layer.mlps}, added


def inputs_of(
    mlp_inputs: Activations,
    mlp: Mlp,
    routing: Routing | None,
    added: Mapping[int, torch.Tensor],
    steps: Collection[Step],
) -> MlpInputs:
    """The tokens that an MLP is judged on.

    Args:
        mlp_inputs: what the MLPs read.
        mlp: the MLP.
        routing: the tokens of each expert; None where the layer has none.
        added: by expert, tokens that were added to its own.
        steps: of the quantization.

    Returns:
        All tokens; or an expert's own and the added ones, each with the expert's share in it where `gate-weights` is a
        step. The added ones, of which it has no share, get the least of its shares; 1 where it has no token at all.
    """
    if mlp.expert is None:
        return MlpInputs(mlp_inputs, torch.arange(mlp_inputs.num_rows, device=mlp_inputs.device))
    assert routing is not None
    own_R, share_R = routing.tokens_of(mlp.expert)
    added_R = added.get(mlp.expert, own_R[:0])
    rows_R = torch.cat([own_R, added_R])
    if "gate-weights" not in steps:
        return MlpInputs(mlp_inputs, rows_R)
    least = share_R.min() if len(share_R) else share_R.new_ones(())
    return MlpInputs(mlp_inputs, rows_R, torch.cat([share_R, least.expand(len(added_R))]))


def _quantize_dense_part(
    job: LayerJob, grid: Grid, moments: dict[ScaleGroup, InputMoments], norm_fold: Fold, report: GridReport
) -> None:
    """Quantizes attention and emits all that changes outside the MLPs."""
    attention = _attention(job, grid, moments, report)
    if not grid.rounded:
        note_attention(job, grid, moments, attention.scales)
    emit_dense_part(job, grid, attention, norm_fold, report)
    for group, scales_I in attention.scales.items():
        job.keep_scales(grid, group.producer, scales_I)


def _attention(
    job: LayerJob, grid: Grid, moments: dict[ScaleGroup, InputMoments], report: GridReport
) -> AttentionResult:
    """Attention quantized; plainly rounded where the search does not lower its own output's error."""
    own = {group: found for group, found in moments.items() if group.consumers[0] in job.linears[grid]}
    if not own:
        return AttentionResult()
    weights, grid_of = ResidentWeights(job.weights), partial(job.grid_of, grid)
    searched = quantize_attention(weights, own, grid, grid_of, job.steps)
    rounded = round_attention(searched.linears, weights, grid_of)
    wanted, _ = few_samples(job, weights)
    energy = (wanted - job.inputs.samples(0, len(wanted))).square().sum()

    def error(result: AttentionResult) -> float:
        quantized = ReplacedWeights(FoldedWeights(weights, result.fold), result.dequantized())
        found, _ = few_samples(job, quantized)
        return float((found - wanted).square().sum() / energy)

    report.attention_error, report.attention_error_plain = error(searched), error(rounded)
    if report.attention_error <= report.attention_error_plain:
        return searched
    report.attention_error = report.attention_error_plain
    report.fallbacks.append(f"{job.layer.prefix}.self_attn")
    return rounded


def note_attention(
    job: LayerJob,
    grid: Grid,
    moments: Mapping[ScaleGroup, InputMoments],
    scales: Mapping[ScaleGroup, torch.Tensor],
) -> None:
    """Notes the importance of what attention's linears read under the scales.

    Args:
        job: the layer and its surroundings.
        grid: the grid.
        moments: of each group's input.
        scales: float32 [I] of each group that has them.
    """
    config = job.skeleton.config
    for group, group_moments in moments.items():
        divided = under_scales(group_moments, scales.get(group))
        for linear in group.consumers:
            job.note(grid, linear, divided.importance)
        query = next((name for name in group.consumers if name.endswith((".q_b_proj", ".q_proj"))), None)
        if query is not None and "qk_nope_head_dim" in config:  # folding does not change what comes out of q_b_proj
            squares_HD = group_moments.loss_O(job.weights[f"{query}.weight"]).unflatten(
                0, (config["num_attention_heads"], -1)
            )
            keys = squares_HD[:, : config["qk_nope_head_dim"]] * group_moments.count
            linear = f"{job.layer.prefix}.self_attn.kv_b_proj{KEYS_SUFFIX}"
            job.note(grid, linear, Importance(keys.contiguous(), group_moments.count))


def few_samples(
    job: LayerJob, weights: Weights, hidden: Activations | None = None
) -> tuple[torch.Tensor, Routing | None]:
    """The dense part's outputs and the routing of a few samples under other weights.

    Args:
        job: the layer and its surroundings.
        weights: the weights.
        hidden: the layer's inputs [N, T, H]; None is the original's.

    Returns:
        float32 [n, T, H], and the routing.
    """
    hidden = hidden or job.inputs
    inputs = Activations(hidden.samples(0, min(CHECK_SAMPLES, hidden.shape[0])))
    outputs = Activations(torch.zeros(inputs.shape, device=job.weights.device))
    routing = run_dense_part(job.skeleton, job.layer, Stream(weights, inputs, outputs), job.batch_samples)
    return outputs.samples(0, inputs.shape[0]), routing


def search_norm_fold(
    job: LayerJob, grid: Grid, inputs: dict[Mlp, MlpInputs], norm_rms_H: torch.Tensor
) -> tuple[Fold, torch.Tensor]:
    """The fold of the norm before the MLPs, and its scales [H]; identity where no MLP is quantized or scaled."""
    layer = job.layer
    identity_H = torch.ones(job.inputs.shape[2], device=job.weights.device)
    judges = [mlp for mlp in layer.mlps if mlp.up in job.linears[grid] and len(inputs[mlp].rows_R)]
    if not judges or "scales" not in job.steps:
        return Fold(), identity_H
    judges = sorted(judges, key=lambda mlp: -len(inputs[mlp].rows_R))[:SCALE_EXPERTS]
    choice = search_norm_scales(
        job.skeleton,
        job.weights,
        [(mlp, inputs[mlp]) for mlp in judges],
        job.weights[f"{layer.norm}.weight"],
        norm_rms_H,
        grid,
        bool(layer.mlp_norm.followers),
        job.seed,
        job.ranks,
    )
    return fold_of(job.weights, layer.mlp_norm, choice.scales_I), choice.scales_I


def emit_dense_part(job: LayerJob, grid: Grid, attention: AttentionResult, norm_fold: Fold, report: GridReport) -> None:
    """Proves that the folds change nothing, then emits what changed outside the MLPs."""
    fold = Fold()
    fold.update(attention.fold)
    fold.update(norm_fold)
    weights = ResidentWeights(job.weights)
    folded = FoldedWeights(weights, fold)
    wanted, wanted_routing = few_samples(job, weights)
    found, found_routing = few_samples(job, folded)
    prove_same(job.layer.prefix, wanted, found)
    if wanted_routing is not None and found_routing is not None:
        same = torch.equal(wanted_routing.expert_RK.sort(1).values, found_routing.expert_RK.sort(1).values)
        assert same, f"{job.layer.prefix}: folding the scales changed the routing; please report this"
    in_mlps = {f"{linear}.weight" for mlp in job.layer.mlps for linear in mlp.linears}
    emitted = attention.linears if grid.rounded else {}
    for linear, weight in emitted.items():
        job.emit(grid, linear, weight)
        report.weight_errors[linear] = float(weight.relative_error(folded[f"{linear}.weight"]))
    for name in dict.fromkeys((*fold.rows, *fold.columns)):
        if name not in in_mlps and name.removesuffix(".weight") not in emitted:
            job.emit(grid, name, folded[name])


def sum_up(report: GridReport, outcomes: list[MlpOutcome]) -> None:
    """Takes what MLPs cost on a grid into its report."""
    for outcome in outcomes:
        report.weight_errors |= outcome.weight_errors
    results = [outcome.errors for outcome in outcomes if outcome.errors is not None]
    if not results:
        return
    energy = sum(result.energy for result in results) or 1.0
    report.mlp_error = sum(result.error * result.energy for result in results) / energy
    report.mlp_error_plain = sum(result.error_plain * result.energy for result in results) / energy
    report.fallbacks += [result.name for result in results if result.plain]

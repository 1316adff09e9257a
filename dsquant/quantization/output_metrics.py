"""What errors of a linear's outputs cost at the model's output, so that rows can be rounded together.

With x an input and g the gradient of the likelihood of a drawn prediction by the linear's outputs (`model.gradients`),
an error D of the weight causes a KL divergence of E[(g D x)^2] / 2. It is taken apart as tr(A D H D^T) / 2 with A =
E[g^T g], the metric, and H = E[x^T x] (K-FAC: Martens and Grosse, arXiv 1503.05671; for rounding: YAQA, Tseng et al.,
arXiv 2505.22988).

Shape legend: N samples, T tokens, R tokens, H hidden size, W width of an MLP, O out features.
"""

from collections.abc import Sequence

import torch

from dsquant.kernels.precision import fast_matmuls
from dsquant.kernels.products import add_product
from dsquant.model.gated import GatedWeights
from dsquant.model.gradients import attention_gradients, gated_gradients
from dsquant.model.overlays import ResidentWeights
from dsquant.model.streaming import ROWS_AT_ONCE, Routing
from dsquant.model.structure import Mlp
from dsquant.quantization.layer_job import LayerJob

# Metrics are of at most this many samples.
SAMPLES = 64
# Linears with more out features than this (R1's q_b_proj, its dense MLPs) have no metric.
WIDEST_METRIC = 8192


class _Metric:
    """The mean of g^T g over the tokens added, float32 [O, O]."""

    def __init__(self, num_features: int, device: torch.device) -> None:
        self._sum_OO = torch.zeros(num_features, num_features, device=device)
        self._count = 0

    def add(self, gradients_RO: torch.Tensor) -> None:
        add_product(self._sum_OO, gradients_RO.T, gradients_RO)
        self._count += len(gradients_RO)

    def mean(self) -> torch.Tensor | None:
        return self._sum_OO / self._count if self._count else None


def mlp_metrics(job: LayerJob, mlp: Mlp, original: GatedWeights, routing: Routing | None) -> list[torch.Tensor | None]:
    """Returns the metrics of gate, up and down, float32 [O, O], on the tokens that reach the MLP in the original.

    None where there are no gradients, the outputs are wide, or no token reaches it.
    """
    states = job.gradients
    if states is None:
        return [None, None, None]
    device, (num_samples, num_tokens, _) = job.weights.device, states.outputs.shape
    rows_R, share_R = torch.arange(num_samples * num_tokens, device=device), None
    if mlp.expert is not None:
        assert routing is not None
        rows_R, share_R = routing.tokens_of(mlp.expert)
        known_R = rows_R < num_samples * num_tokens
        rows_R, share_R = rows_R[known_R], share_R[known_R]
    sizes = [len(original.gate_WH), len(original.up_WH), len(original.down_HW)]
    metrics = [_Metric(size, device) if size <= WIDEST_METRIC else None for size in sizes]
    for start in range(0, len(rows_R), ROWS_AT_ONCE):
        part_R = rows_R[start : start + ROWS_AT_ONCE]
        of_outputs_RH = states.outputs.rows(part_R)
        if share_R is not None:
            of_outputs_RH = of_outputs_RH * share_R[start : start + ROWS_AT_ONCE].unsqueeze(1)
        found = (*gated_gradients(job.skeleton, original, job.mlp_inputs.rows(part_R), of_outputs_RH), of_outputs_RH)
        with fast_matmuls(device):
            for metric, gradients_RO in zip(metrics, found, strict=True):
                if metric is not None:
                    metric.add(gradients_RO)
    return [None if metric is None else metric.mean() for metric in metrics]


def attention_metrics(job: LayerJob, linears: Sequence[str]) -> dict[str, torch.Tensor]:
    """Returns the metrics of attention's linears, float32 [O, O]; of none where there are no gradients, or outputs are
    wide."""
    states = job.gradients
    sizes = {linear: job.weights.shape(f"{linear}.weight")[0] for linear in linears}
    narrow = [linear for linear, size in sizes.items() if size <= WIDEST_METRIC]
    if states is None or not narrow:
        return {}
    metrics = {linear: _Metric(sizes[linear], job.weights.device) for linear in narrow}
    weights, num_samples = ResidentWeights(job.weights), states.outputs.shape[0]
    for start in range(0, num_samples, job.batch_samples):
        stop = min(start + job.batch_samples, num_samples)
        hidden_NTH, of_attended_NTH = (one.samples(start, stop) for one in (job.inputs, states.attended))
        found = attention_gradients(job.skeleton, job.layer, weights, hidden_NTH, of_attended_NTH, narrow)
        with fast_matmuls(job.weights.device):
            for linear, gradients_RO in found.items():
                metrics[linear].add(gradients_RO)
    return {linear: mean_OO for linear, metric in metrics.items() if (mean_OO := metric.mean()) is not None}

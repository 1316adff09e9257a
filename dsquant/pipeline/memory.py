"""Computes a run's peak needs from headers alone: the largest stage of any layer, head, host, disk."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

from dsquant.errors import UsageError
from dsquant.jobs.ranks import CHUNKS, Shares
from dsquant.kernels.graphs import graph_bytes
from dsquant.model.activations import RELEASE_BYTES
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import BATCH_TOKENS, ROWS_AT_ONCE, VOCABULARY_AT_ONCE, samples_together
from dsquant.model.structure import DecoderLayer
from dsquant.options import format_size
from dsquant.precision.sensitivity import SAMPLES
from dsquant.quantization.clip import ELEMENTS_AT_ONCE
from dsquant.quantization.output_metrics import SAMPLES as PREDICTED_SAMPLES
from dsquant.quantization.output_metrics import WIDEST_METRIC
from dsquant.quantization.pairs import WIDEST_PAIRS
from dsquant.quantization.statistics import FACTOR_ROWS, GPU_ELEMENTS_AT_ONCE, WIDEST_PART, is_wide, part_width
from dsquant.recipes import Recipe
from dsquant.schemes import CLIP_RATIOS, Scheme
from dsquant.source.checkpoint import Checkpoint

FLOAT32_BYTES = 4
# What transformers, accelerate and the formats' packages take once a run uses them.
LIBRARY_BYTES = 256 * 2**20
# CUDA's libraries, page-locked buffers of weights on their way to the GPU and of results on their way to the disk.
CUDA_HOST_BYTES = 4 * 2**30
# Of these, the buffers alone.
BUFFER_BYTES = 2**28
# A hidden value that a GPU keeps between layers, or for a layer's MLPs.
BFLOAT16_BYTES = 2


@dataclass(frozen=True)
class Workload:
    """Everything that the needs of a run depend on."""

    recipe: Recipe
    checkpoint: Checkpoint
    skeleton: Skeleton
    linears: Mapping[Scheme, frozenset[str]]
    """Grid -> the linears that are quantized onto it, or scaled for it."""
    storing_bytes: int
    """Memory for storing a weight in addition to the weight."""
    rounded: frozenset[str] = frozenset()
    """Those that the quantization rounds, and not the format."""
    num_grids: int = 1
    """Grids that share the calibration."""
    num_ranks: int = 1
    """Planned for the rank with the most samples."""
    gpu_budget_bytes: int = 0
    """The most GPU memory; where it suffices, hidden states stay there."""

    @cached_property
    def everything(self) -> frozenset[str]:
        """The linears that are quantized or scaled."""
        return frozenset[str]().union(*self.linears.values())

    @cached_property
    def compensated(self) -> frozenset[str]:
        """Those of them whose errors are compensated."""
        return self.rounded if "compensate" in self.recipe.steps else frozenset()

    @property
    def follows(self) -> bool:
        """Whether the quantized models are followed, one for each grid."""
        return "follow" in self.recipe.steps

    @property
    def num_gradient_tokens(self) -> int:
        """Calibration tokens that gradients are computed for before the first unit; 0 where nothing needs them."""
        samples = SAMPLES if self.recipe.target else 0
        if "predictions" in self.recipe.steps:
            samples = max(samples, PREDICTED_SAMPLES)
        return min(samples, self.recipe.samples) * self.recipe.seq_len

    @property
    def streams(self) -> int:
        """Models whose hidden states pass: the original, and the quantized ones that are followed."""
        return 1 + self.num_grids if self.follows else 1

    @property
    def num_tokens(self) -> int:
        """Calibration tokens."""
        return self.recipe.samples * self.recipe.seq_len

    @property
    def batch_tokens(self) -> int:
        """Tokens that pass attention together."""
        return min(self.num_tokens, max(BATCH_TOKENS, self.recipe.seq_len))

    @property
    def hidden_size(self) -> int:
        """Of the network."""
        return int(self.skeleton.config["hidden_size"])

    def width(self, linear: str) -> int:
        """In features of a linear."""
        return self.checkpoint.weights.shape(f"{linear}.weight")[1]

    def num_elements(self, linear: str) -> int:
        """Weights of a linear."""
        return math.prod(self.checkpoint.weights.shape(f"{linear}.weight"))


@dataclass(frozen=True)
class Needs:
    """Memory and disk that a run needs, in bytes."""

    memory_bytes: int
    """Resident memory beyond what the process has when it starts."""
    gpu_memory_bytes: int = 0
    """GPU memory; 0 on a CPU."""
    gpu_resident: frozenset[int] = frozenset()
    """The layers whose hidden states stay on the GPU while their experts pass."""
    launch_bytes: int = 0
    """The most GPU memory for launches that are recorded of experts: part of `gpu_memory_bytes`; where they are kept,
    all that it leaves of the budget."""
    keeps_launches: bool = False
    """Whether recorded launches are kept from layer to layer, while other parts of a layer pass."""
    work_bytes: int = 0
    """Disk for hidden states while the run lasts."""


def run_needs(work: Workload) -> Needs:
    """Works out the memory and disk that a run needs."""
    recipe, storing = work.recipe, work.storing_bytes
    if not recipe.calibration:
        return Needs(storing + (BUFFER_BYTES if recipe.device == "cuda" else 0))
    num_hidden, head = work.num_tokens * work.hidden_size, _head_bytes(work.skeleton)
    shared = _sharing_bytes(work) + (_pair_bytes(work) if work.follows else 0)
    needs = {layer.index: _layer_bytes(work, layer) + shared for layer in work.skeleton.layers}
    memory, gpu_memory = max(storing, max(head, *needs.values()) + _host_bytes(num_hidden, work.streams)), 0
    resident, graphs = frozenset[int](), 0
    if recipe.device == "cuda":
        hidden = work.streams * work.hidden_size * passing_bytes(recipe.samples, recipe.seq_len, work.num_ranks)
        there = {layer.index: needs[layer.index] + hidden + _lack_bytes(work, layer) for layer in work.skeleton.layers}
        resident = frozenset(layer for layer, need in there.items() if need <= work.gpu_budget_bytes)
        gpu_memory = max(head, *(there[layer] if layer in resident else need for layer, need in needs.items()))
        graphs = max(_graph_bytes(work, layer) for layer in work.skeleton.layers)
        memory = CUDA_HOST_BYTES + max(storing, _host_bytes(num_hidden, work.streams))
    prepares = recipe.mtp == "quantize" and work.skeleton.num_mtp_layers > 0
    kept = work.streams * num_hidden * _kept_bytes(recipe.device, len(resident) == len(needs), prepares)
    work_bytes = max(kept, _measuring_bytes(work)) + _gradient_bytes(work)
    left = work.gpu_budget_bytes - gpu_memory
    keeps = 0 < graphs <= left
    return Needs(memory, gpu_memory, resident, left if keeps else graphs, keeps, work_bytes)


def _lack_bytes(work: Workload, layer: DecoderLayer) -> int:
    """What all ranks' hidden states lack, on rank 0's GPU, where the MLP that is always read makes up for it."""
    first = layer.mlps[0]
    makes_up = first.expert is None and first.down in work.rounded and work.width(first.down) <= WIDEST_PAIRS
    if not work.follows or work.num_ranks == 1 or not makes_up:
        return 0
    return work.num_grids * FLOAT32_BYTES * work.num_tokens * work.hidden_size


def _measuring_bytes(work: Workload) -> int:
    """Bytes in files for the pass that computes gradients: hidden states around every layer, and three more."""
    return FLOAT32_BYTES * (work.skeleton.num_layers + 4) * work.num_gradient_tokens * work.hidden_size


def _gradient_bytes(work: Workload) -> int:
    """Bytes in files for the gradients that a run keeps: of every layer's outputs, and behind its attention."""
    if "predictions" not in work.recipe.steps:
        return 0
    return 2 * FLOAT32_BYTES * work.skeleton.num_layers * work.num_gradient_tokens * work.hidden_size


def _kept_bytes(device: str, resident: bool, prepares: bool) -> int:
    """Bytes in files for each hidden value while a layer is made: its inputs, its outputs, what its MLPs read.

    A multi-token-prediction layer's inputs are prepared in one more file.
    """
    if device != "cuda":
        return (3 + prepares) * FLOAT32_BYTES
    return (2 + prepares) * BFLOAT16_BYTES + (0 if resident else BFLOAT16_BYTES + FLOAT32_BYTES)


def _layer_bytes(work: Workload, layer: DecoderLayer) -> int:
    """The need of a layer's largest stage; benchmarks/r1_width.py compares it with what a run really takes."""
    linears, hidden, num_tokens = work.everything, work.hidden_size, work.num_tokens
    sizes = {linear: work.num_elements(linear) for linear in layer.linears}
    quantized = [size for linear, size in sizes.items() if linear in linears]
    # clip and rounding work on parts with about 8 temporaries; gate and up of an MLP are rounded together
    rounds = 8 * FLOAT32_BYTES * min(ELEMENTS_AT_ONCE, len(CLIP_RATIOS) * max(quantized, default=0))
    together = max((sizes[mlp.gate] + sizes[mlp.up] for mlp in layer.mlps if mlp.up in linears), default=0)
    on_gpu = 8 * FLOAT32_BYTES * min(GPU_ELEMENTS_AT_ONCE, together) * (work.recipe.device == "cuda")
    routed = {linear for mlp in layer.experts for linear in mlp.linears}
    dense = FLOAT32_BYTES * sum(size for linear, size in sizes.items() if linear not in routed)
    folded_and_rounded = 1.5 if layer.attention_linears[0] in linears else 1
    mlps = [
        sum(sizes[linear] for linear in mlp.linears) * FLOAT32_BYTES * (5 if mlp.up in linears else 1)
        for mlp in layer.mlps
    ]
    widths = [work.width(linear) for linear in layer.attention_linears]
    sums = 2 if layer.attention_linears[0] in linears else 1  # attention's: of all samples, and of a chunk of them
    statistics = FLOAT32_BYTES * FACTOR_ROWS * (sums * sum(widths) + 4 * hidden)
    attention = (
        (18 if work.num_gradient_tokens else 6)  # with what gradients are computed from
        * FLOAT32_BYTES
        * work.batch_tokens
        * max(sizes[linear] // work.width(linear) for linear in layer.attention_linears)
    )
    # what an MLP reads and puts out in both models; with `follow` also what hidden states lack behind it
    rows = (9 if work.follows else 6) * FLOAT32_BYTES * min(ROWS_AT_ONCE, num_tokens) * hidden
    whole, matrix = _attention_matrices(work, layer)
    downs = {work.width(mlp.down) for mlp in layer.mlps if mlp.down in work.compensated}
    down = max((width for width in downs if is_wide(width)), default=0)
    shared = _matrices(hidden if downs and is_wide(hidden) else 0)
    return (
        statistics
        + 3 * whole  # sums of all samples and of a chunk, and their means
        + max(
            int(dense * (1 + folded_and_rounded)) + max(attention, rounds, 2 * matrix + _inverting(matrix)),
            (3 + work.num_grids) * shared + _inverting(shared),
            max(mlps)
            + _graph_bytes(work, layer)
            + max(rounds, on_gpu)
            + rows
            + work.num_grids * shared
            + 4 * _matrices(down)
            + _inverting(_part(down)),
        )
    )


def _attention_matrices(work: Workload, layer: DecoderLayer) -> tuple[int, int]:
    """Bytes of the Gram matrices of attention's wide inputs that are compensated: of all, and of the widest."""
    inputs = [group.consumers[0] for group in layer.attention if group.consumers[0] in work.compensated]
    widths = [work.width(linear) for linear in inputs]
    matrices = [_matrices(width) for width in widths if is_wide(width) and width <= WIDEST_PART]
    return sum(matrices), max(matrices, default=0)


def _matrices(width: int) -> int:
    """Bytes of the Gram matrices of the parts of inputs so wide, float32."""
    return FLOAT32_BYTES * width * part_width(width)


def _graph_bytes(work: Workload, layer: DecoderLayer) -> int:
    """What launches that are recorded for a mixture's MLPs keep, for each grid and shape: they read columns in float32
    and their factor; gate and up are rounded together."""
    if work.recipe.device != "cuda" or not layer.experts:
        return 0
    kept = dict[tuple[int, int], int]()
    for mlp in layer.mlps:
        for linears in ((mlp.gate, mlp.up), (mlp.down,)):
            if linears[0] in work.compensated:
                columns, width = sum(map(work.num_elements, linears)), work.width(linears[0])
                kept[columns, width] = graph_bytes(FLOAT32_BYTES * columns, _part(width))
    return work.num_grids * sum(kept.values())


def _part(width: int) -> int:
    return _matrices(part_width(width))


def _inverting(matrix_bytes: int) -> int:
    """What inverting a float32 matrix of this size takes: four of double precision."""
    return 8 * matrix_bytes


def passing_bytes(samples: int, seq_len: int, num_ranks: int) -> int:
    """Counts the bytes of GPU memory for each channel of hidden states that stay there while a layer's MLPs run: their
    inputs, all samples in bfloat16, and the outputs, in float32 those of the rank with the most samples."""
    shares = Shares(samples, samples_together(seq_len), num_ranks)
    own = max(end - first for first, end in map(shares.samples, range(num_ranks)))
    return seq_len * (BFLOAT16_BYTES * samples + FLOAT32_BYTES * own)


def _pair_bytes(work: Workload) -> int:
    """Returns the bytes of step `follow`: whole matrices of the widest inputs, attention again and what it reads."""
    widths = {work.width(linear) for layer in work.skeleton.layers for linear in layer.linears}
    widest = max((width for width in widths if width <= WIDEST_PAIRS), default=0)
    # Gram matrix and drift with their divided copies in float32, five double precision matrices for the factor
    matrices = widest**2 * (6 * FLOAT32_BYTES + 5 * 8)
    # wider ones: the parts' sums, means, divided copies and factors
    matrices = max([matrices, *(4 * _matrices(width) + _inverting(_part(width)) for width in widths)])
    attention = max(sum(map(work.num_elements, layer.attention_linears)) for layer in work.skeleton.layers)
    # what all groups of attention read in a batch, or one of them in both models; on rank 0 another rank's too
    read = max(sum(work.width(group.consumers[0]) for group in layer.attention) for layer in work.skeleton.layers)
    # and what hidden states lack
    batches = min(2, work.num_ranks) * work.batch_tokens * max(read, 2 * max(widths) + work.hidden_size)
    return matrices + FLOAT32_BYTES * (2 * attention + batches) + _metric_bytes(work)


def _metric_bytes(work: Workload) -> int:
    """Returns the bytes of step `predictions`: metrics of all attention's linears, and what factoring one takes."""
    if "predictions" not in work.recipe.steps:
        return 0
    shapes = work.checkpoint.weights.shape
    rows = [[shapes(f"{linear}.weight")[0] for linear in layer.attention_linears] for layer in work.skeleton.layers]
    attention = max(sum(size**2 for size in sizes if size <= WIDEST_METRIC) for sizes in rows)
    widest = max(size for sizes in [*rows, [work.hidden_size]] for size in sizes if size <= WIDEST_METRIC)
    return FLOAT32_BYTES * (attention + 3 * widest**2) + 5 * 8 * widest**2


def _sharing_bytes(work: Workload) -> int:
    """Returns a rank's bytes for exchange with others; planned for experts with up to 4 times their share of tokens."""
    if work.num_ranks == 1:
        return 0
    layers, num_tokens = work.skeleton.layers, work.num_tokens
    sums = -(-CHUNKS // work.num_ranks) * max(_chunk_bytes(work, layer) for layer in layers)
    if work.follows and work.recipe.target is None:  # what is read travels instead
        sums = 0
    num_experts = max(len(layer.experts) for layer in layers)
    rows = min(num_tokens, ROWS_AT_ONCE) if work.follows else 0
    if num_experts:
        rows = max(rows, min(num_tokens, 4 * num_tokens * work.skeleton.sizes.experts_per_token // num_experts))
    return sums + 3 * FLOAT32_BYTES * rows * work.hidden_size  # made, put together, received


def _chunk_bytes(work: Workload, layer: DecoderLayer) -> int:
    """A chunk's sums over the inputs of a layer's norm and of its attention."""
    inputs = [group.consumers[0] for group in layer.attention if group.consumers[0] in work.everything]
    widths = work.hidden_size + sum(map(work.width, inputs))
    return FLOAT32_BYTES * FACTOR_ROWS * widths + _attention_matrices(work, layer)[0]


def _head_bytes(skeleton: Skeleton) -> int:
    """Returns the bytes of a part of a vocabulary-sized table with its scores."""
    hidden, vocabulary = skeleton.config["hidden_size"], skeleton.config["vocab_size"]
    return FLOAT32_BYTES * min(VOCABULARY_AT_ONCE, vocabulary) * (2 * hidden + 4 * 1024)


def _host_bytes(num_hidden: int, streams: int) -> int:
    """Returns the bytes besides a layer's: libraries, and touched pages of three files of hidden states a stream.

    On a GPU there may be a fourth, which `CUDA_HOST_BYTES` has room for.
    """
    return 3 * streams * min(RELEASE_BYTES, FLOAT32_BYTES * num_hidden) + LIBRARY_BYTES


def check_memory(needed_bytes: int, budget_bytes: int, resident_bytes: int, option: str = "--memory-budget") -> None:
    """Raises UsageError with the bytes needed where a budget, given by `option`, does not suffice."""
    needed = needed_bytes + resident_bytes
    if needed > budget_bytes:
        raise UsageError(
            f"{option} {format_size(budget_bytes)} is too small: this model and calibration need "
            f"{format_size(needed)}, {format_size(needed - budget_bytes)} more; raise the budget or lower --seq-len"
        )

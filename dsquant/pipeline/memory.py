"""What a run takes at its peak, worked out from headers alone: the largest stage of any layer, head, host."""

from dsquant.errors import UsageError
from dsquant.jobs.ranks import CHUNKS, Shares
from dsquant.model.activations import RELEASE_BYTES
from dsquant.model.skeleton import Skeleton
from dsquant.model.streaming import BATCH_TOKENS, ROWS_AT_ONCE, VOCABULARY_AT_ONCE, samples_together
from dsquant.model.structure import DecoderLayer
from dsquant.quantization.clip import ELEMENTS_AT_ONCE
from dsquant.quantization.pairs import WIDEST_PAIRS
from dsquant.quantization.statistics import FACTOR_ROWS, WIDEST_PART, is_wide, part_width
from dsquant.recipes import format_size
from dsquant.schemes import CLIP_RATIOS
from dsquant.source.checkpoint import Checkpoint

FLOAT32_BYTES = 4
# What transformers, accelerate and the formats' packages take once a run uses them.
LIBRARY_BYTES = 256 * 2**20
# CUDA's libraries, page-locked buffers of weights on their way to the GPU and of results on their way to the disk.
CUDA_HOST_BYTES = 4 * 2**30
# A hidden value that a GPU keeps between layers, or for a layer's MLPs.
BFLOAT16_BYTES = 2


def layer_memory_bytes(
    num_tokens: int,
    seq_len: int,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    linears: frozenset[str],
    compensated: frozenset[str] = frozenset(),
    num_grids: int = 1,
) -> dict[int, int]:
    """The need of each layer's largest stage; benchmarks/r1_width.py compares it with what a run really takes.

    Args:
        num_tokens: calibration tokens.
        seq_len: tokens of a sample.
        checkpoint: the source.
        skeleton: its network.
        linears: those that are quantized onto a grid.
        compensated: those of them whose errors are compensated.
        num_grids: grids that share the calibration.

    Returns:
        Layer -> bytes on the device that computes.
    """
    return {
        layer.index: _layer_bytes(layer, num_tokens, seq_len, checkpoint, skeleton, linears, compensated, num_grids)
        for layer in skeleton.layers
    }


def _layer_bytes(
    layer: DecoderLayer,
    num_tokens: int,
    seq_len: int,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    linears: frozenset[str],
    compensated: frozenset[str],
    num_grids: int,
) -> int:
    hidden = skeleton.config["hidden_size"]
    sizes = {linear: _num_elements(checkpoint, linear) for linear in layer.linears}
    quantized = [size for linear, size in sizes.items() if linear in linears]
    # clip and rounding work on parts with about 8 temporaries
    rounds = 8 * FLOAT32_BYTES * min(ELEMENTS_AT_ONCE, len(CLIP_RATIOS) * max(quantized, default=0))
    routed = {linear for mlp in layer.experts for linear in mlp.linears}
    dense = FLOAT32_BYTES * sum(size for linear, size in sizes.items() if linear not in routed)
    folded_and_rounded = 1.5 if layer.attention_linears[0] in linears else 1
    mlps = [
        sum(sizes[linear] for linear in mlp.linears) * FLOAT32_BYTES * (5 if mlp.up in linears else 1)
        for mlp in layer.mlps
    ]
    widths = [checkpoint.weights.shape(f"{linear}.weight")[1] for linear in layer.attention_linears]
    sums = 2 if layer.attention_linears[0] in linears else 1  # attention's: of all samples, and of a chunk of them
    statistics = FLOAT32_BYTES * FACTOR_ROWS * (sums * sum(widths) + 4 * hidden)
    batch_tokens = min(num_tokens, max(BATCH_TOKENS, seq_len))
    attention = 6 * FLOAT32_BYTES * batch_tokens * _widest_attention(checkpoint, layer)
    rows = 6 * FLOAT32_BYTES * min(ROWS_AT_ONCE, num_tokens) * hidden
    whole, matrix = _attention_matrices(checkpoint, layer, compensated)
    downs = {checkpoint.weights.shape(f"{mlp.down}.weight")[1] for mlp in layer.mlps if mlp.down in compensated}
    down = max((width for width in downs if is_wide(width)), default=0)
    shared = hidden if downs and is_wide(hidden) else 0
    return (
        statistics
        + 3 * whole  # sums of all samples and of a chunk, and their means
        + max(
            int(dense * (1 + folded_and_rounded)) + max(attention, rounds, 2 * matrix + _inverting(matrix)),
            3 * _matrices(shared) + num_grids * _matrices(shared) + _inverting(_matrices(shared)),
            max(mlps) + rounds + rows + num_grids * _matrices(shared) + 4 * _matrices(down) + _inverting(_part(down)),
        )
    )


def _attention_matrices(checkpoint: Checkpoint, layer: DecoderLayer, compensated: frozenset[str]) -> tuple[int, int]:
    """Bytes of the Gram matrices of attention's wide inputs that are compensated: of all, and of the widest."""
    widths = [
        checkpoint.weights.shape(f"{group.consumers[0]}.weight")[1]
        for group in layer.attention
        if group.consumers[0] in compensated
    ]
    matrices = [_matrices(width) for width in widths if is_wide(width) and width <= WIDEST_PART]
    return sum(matrices), max(matrices, default=0)


def _matrices(width: int) -> int:
    """Bytes of the Gram matrices of the parts of inputs so wide, float32."""
    return FLOAT32_BYTES * width * part_width(width)


def _part(width: int) -> int:
    return _matrices(part_width(width))


def _inverting(matrix_bytes: int) -> int:
    """What inverting a float32 matrix of this size takes: four of double precision."""
    return 8 * matrix_bytes


def passing_bytes(samples: int, seq_len: int, num_ranks: int) -> int:
    """What a GPU takes for each channel of the hidden states while a layer's MLPs pass, where they stay on it.

    Args:
        samples: calibration samples.
        seq_len: tokens of each.
        num_ranks: how many ranks share the samples; planned for the one with the most of them.

    Returns:
        Bytes: of what the MLPs read, all samples in bfloat16; of the outputs, the rank's own in float32.
    """
    shares = Shares(samples, samples_together(seq_len), num_ranks)
    own = max(end - first for first, end in map(shares.samples, range(num_ranks)))
    return seq_len * (BFLOAT16_BYTES * samples + FLOAT32_BYTES * own)


def pair_memory_bytes(checkpoint: Checkpoint, skeleton: Skeleton) -> int:
    """What the step `follow` takes: whole matrices of the widest inputs, and attention once more.

    Args:
        checkpoint: the source.
        skeleton: its network.

    Returns:
        Bytes on the device that computes.
    """
    linears = {linear for layer in skeleton.layers for linear in layer.linears}
    widths = {checkpoint.weights.shape(f"{linear}.weight")[1] for linear in linears}
    widest = max((width for width in widths if width <= WIDEST_PAIRS), default=0)
    # Gram matrix and drift with their divided copies in float32, five double precision matrices for the factor
    matrices = widest**2 * (6 * FLOAT32_BYTES + 5 * 8)
    # wider ones: the parts' sums, means, divided copies and factors
    matrices = max([matrices, *(4 * _matrices(width) + _inverting(_part(width)) for width in widths)])
    attention = max(
        sum(_num_elements(checkpoint, linear) for linear in layer.attention_linears) for layer in skeleton.layers
    )
    return matrices + 2 * FLOAT32_BYTES * attention


def sharing_memory_bytes(
    num_tokens: int,
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    linears: frozenset[str],
    compensated: frozenset[str],
    num_ranks: int,
) -> int:
    """What a rank keeps and passes on for the others; planned for experts with up to 4 times their share of tokens.

    Args:
        num_tokens: calibration tokens.
        checkpoint: the source.
        skeleton: its network.
        linears: those that are quantized onto a grid.
        compensated: those of them whose errors are compensated.
        num_ranks: how many ranks share a layer.

    Returns:
        Bytes on the device that computes; 0 for one rank.
    """
    if num_ranks == 1:
        return 0
    hidden = skeleton.config["hidden_size"]
    chunk = max(_chunk_bytes(layer, checkpoint, hidden, linears, compensated) for layer in skeleton.layers)
    sums = -(-CHUNKS // num_ranks) * chunk
    num_experts = max(len(layer.experts) for layer in skeleton.layers)
    if not num_experts:
        return sums
    rows = min(num_tokens, 4 * num_tokens * skeleton.sizes.experts_per_token // num_experts)
    return sums + 3 * FLOAT32_BYTES * rows * hidden  # made, put together, received


def _chunk_bytes(
    layer: DecoderLayer, checkpoint: Checkpoint, hidden: int, linears: frozenset[str], compensated: frozenset[str]
) -> int:
    """A chunk's sums over the inputs of a layer's norm and of its attention."""
    inputs = [group.consumers[0] for group in layer.attention if group.consumers[0] in linears]
    widths = hidden + sum(checkpoint.weights.shape(f"{linear}.weight")[1] for linear in inputs)
    return FLOAT32_BYTES * FACTOR_ROWS * widths + _attention_matrices(checkpoint, layer, compensated)[0]


def head_memory_bytes(skeleton: Skeleton) -> int:
    """What a part of a vocabulary-sized table takes with its scores."""
    hidden, vocabulary = skeleton.config["hidden_size"], skeleton.config["vocab_size"]
    return FLOAT32_BYTES * min(VOCABULARY_AT_ONCE, vocabulary) * (2 * hidden + 4 * 1024)


def host_memory_bytes(num_hidden: int, streams: int = 1) -> int:
    """What a run takes beside its layer: libraries, and touched pages of three files of hidden states for each stream.

    On a GPU there may be a fourth, which `CUDA_HOST_BYTES` has room for.

    Args:
        num_hidden: calibration tokens times hidden size.
        streams: models whose hidden states pass: the original, and with the step `follow` the quantized one.

    Returns:
        Bytes of resident memory.
    """
    return 3 * streams * min(RELEASE_BYTES, FLOAT32_BYTES * num_hidden) + LIBRARY_BYTES


def _num_elements(checkpoint: Checkpoint, linear: str) -> int:
    rows, columns = checkpoint.weights.shape(f"{linear}.weight")
    return rows * columns


def _widest_attention(checkpoint: Checkpoint, layer: DecoderLayer) -> int:
    return max(checkpoint.weights.shape(f"{linear}.weight")[0] for linear in layer.attention_linears)


def conversion_memory_bytes(
    checkpoint: Checkpoint,
    skeleton: Skeleton,
    largest_whole: int,
    tokens: tuple[int, int] | None,
    linears: frozenset[str],
) -> int:
    """What a conversion needs beyond what the process has when it starts.

    Args:
        checkpoint: the source.
        skeleton: its network.
        largest_whole: weights of the largest parameter that is not stored in parts.
        tokens: calibration samples, and tokens of each; None without calibration.
        linears: those whose inputs are scaled.

    Returns:
        Bytes of resident memory.
    """
    memory = 6 * FLOAT32_BYTES * max(ELEMENTS_AT_ONCE, largest_whole)
    if tokens is None:
        return memory
    samples, seq_len = tokens
    needs = layer_memory_bytes(samples * seq_len, seq_len, checkpoint, skeleton, linears)
    layer = max(head_memory_bytes(skeleton), *needs.values())
    return max(memory, layer + host_memory_bytes(samples * seq_len * skeleton.config["hidden_size"]))


def check_memory(needed_bytes: int, budget_bytes: int, resident_bytes: int, option: str = "--memory-budget") -> None:
    """Refuses a budget that cannot work.

    Args:
        needed_bytes: what the run needs.
        budget_bytes: the budget.
        resident_bytes: what the process holds already.
        option: where the budget was given.

    Raises:
        UsageError: where the run needs more, with the number.
    """
    needed = needed_bytes + resident_bytes
    if needed > budget_bytes:
        raise UsageError(
            f"{option} {format_size(budget_bytes)} is too small: this model and calibration need "
            f"{format_size(needed)}, {format_size(needed - budget_bytes)} more; raise the budget or lower --seq-len"
        )

"""Places an output's bytes on a machine, and forecasts how fast a token is decoded there.

Decoding one sequence reads every active weight once a token: the time is the bytes in each place over that place's
bandwidth, divided by the share of the bandwidth that engines reach.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dsquant.deployment.facts import (
    DISK,
    ENGINE_SHARE,
    GPU_RESERVE_BYTES,
    ONE_GPU,
    RAM,
    RAM_RESERVE_BYTES,
    TENSOR_PARALLEL,
    Range,
)
from dsquant.deployment.hardware import Machine
from dsquant.deployment.sizes import OutputSize
from dsquant.model.families import sizes_of
from dsquant.model.families.family import Sizes

KV_BYTES = 2  # BF16 or F16


@dataclass(frozen=True)
class Network:
    """The facts about a model that placement needs."""

    num_layers: int
    num_split: int
    """Layers whose experts, or in a dense model whose weights, can lie in different places."""
    first_split: int
    """The first of them."""
    has_experts: bool
    active_share: float
    """Share of the routed experts that a token uses."""
    kv_values: int
    """Cached values of a token in one layer: 576 for R1, the latent and the rotary key."""
    shared_kv: bool
    """Whether all heads share them, so that every tensor-parallel rank keeps them all."""
    num_heads: int
    sizes: Sizes
    is_fp8: bool
    """Whether the source is stored in FP8."""

    @property
    def kv_bytes_per_token(self) -> int:
        """KV cache of all layers, in BF16: 70,272 for R1."""
        return self.kv_values * self.num_layers * KV_BYTES


def network_of(config: Mapping[str, Any]) -> Network:
    """Reads the facts from the content of a config.json."""
    layers, sizes = int(config["num_hidden_layers"]), sizes_of(config)
    mixture = layers > sizes.num_dense_layers
    experts, dense = (sizes.num_experts, sizes.num_dense_layers) if mixture else (0, 0)
    return Network(
        num_layers=layers,
        num_split=layers - dense,
        first_split=dense,
        has_experts=bool(experts),
        active_share=sizes.experts_per_token / experts if experts else 0.0,
        kv_values=sizes.cache.num_values,
        shared_kv=sizes.cache.is_shared,
        num_heads=sizes.num_heads,
        sizes=sizes,
        is_fp8=(config.get("quantization_config") or {}).get("quant_method") == "fp8",
    )


@dataclass(frozen=True)
class MachinePlacement:
    """An output on a machine."""

    kind: str
    """gpu: all of it in GPUs; unified: in memory that processor and GPU share; split: GPUs, RAM and perhaps disk; cpu:
    RAM and perhaps disk; none: it cannot run."""
    gpu_bytes: int
    ram_bytes: int
    disk_bytes: int
    kv_bytes: int
    gpu_layers: int
    """Layers whose experts (all weights, in a dense model) lie in GPUs."""
    tensor_parallel: int
    pipeline_parallel: int
    max_context: int
    """Tokens of KV cache that fit."""
    tokens_per_s: Range | None
    reason: str
    """Why it cannot run, or what is tight; may be empty."""


def place(output: OutputSize, network: Network, machine: Machine, context: int) -> MachinePlacement:
    """Places an output in GPUs where all of it fits, else in GPUs, RAM and disk as llama.cpp can; adds its decoding
    speed.

    `context` is in tokens of KV cache.
    """
    if machine.unified:
        return _place_unified(output, network, machine, context)
    if output.placement == "unified":
        return _impossible("mlx-lm runs on Apple silicon (--unified-memory)", context * network.kv_bytes_per_token)
    placing = _place_split if output.placement == "split" else _place_parallel
    return placing(output, network, machine, context)


def _active_bytes(output: OutputSize, network: Network) -> tuple[float, float]:
    """Returns the bytes read for a token: of the routed experts, and of the rest, without the embedding's one row."""
    kinds = output.by_kind
    experts = kinds.get("routed experts", 0)
    head = 0 if "head" in kinds else kinds.get("embedding", 0)  # the embedding is the head too
    rest = output.served_bytes - experts - kinds.get("embedding", 0) + head
    return experts * network.active_share, rest


def _speed(parts: list[tuple[float, Range, Range]], kv_bytes: int, kv_bandwidth: Range) -> Range:
    """Returns tokens a second from each place's (bytes, bandwidth, share reached); the slow end reads a full KV
    cache."""
    slow = sum(size / (bandwidth.low * share.low) for size, bandwidth, share in parts) + kv_bytes / kv_bandwidth.low
    fast = sum(size / (bandwidth.high * share.high) for size, bandwidth, share in parts)
    return Range(1 / slow, 1 / fast)


def _impossible(reason: str, kv_bytes: int) -> MachinePlacement:
    return MachinePlacement("none", 0, 0, 0, kv_bytes, 0, 0, 0, 0, None, reason)


def _place_parallel(output: OutputSize, network: Network, machine: Machine, context: int) -> MachinePlacement:
    """Places an output for vLLM and SGLang: every rank holds its part of the weights, and all of MLA's cache."""
    kv_bytes = context * network.kv_bytes_per_token
    if machine.gpus is None:
        return _impossible("vLLM and SGLang need GPUs for this", kv_bytes)
    count = machine.gpus.count
    tensor = network.sizes.tensor_parallel(count)
    pipeline = count // tensor
    room = machine.gpus.memory_bytes * ENGINE_SHARE - GPU_RESERVE_BYTES - output.served_bytes / count
    kv_per_rank = network.kv_bytes_per_token / pipeline / (1 if network.shared_kv else tensor)
    max_context = int(room / kv_per_rank)
    if max_context < context:
        needed = output.served_bytes / count + GPU_RESERVE_BYTES + context * kv_per_rank
        where = "the GPU, which has" if count == 1 else f"each of {count} GPUs, each has"
        return _impossible(
            f"needs {needed / ENGINE_SHARE / 2**30:.0f} GiB on {where} {machine.gpus.memory_bytes / 2**30:.0f}",
            kv_bytes,
        )
    experts, rest = _active_bytes(output, network)
    share = TENSOR_PARALLEL.value if tensor > 1 else ONE_GPU.value
    bandwidth = machine.gpus.bandwidth * tensor
    speed = _speed([(experts + rest, bandwidth, share)], kv_bytes, machine.gpus.bandwidth)
    return MachinePlacement(
        kind="gpu",
        gpu_bytes=output.served_bytes,
        ram_bytes=0,
        disk_bytes=0,
        kv_bytes=kv_bytes,
        gpu_layers=network.num_layers,
        tensor_parallel=tensor,
        pipeline_parallel=pipeline,
        max_context=max_context,
        tokens_per_s=speed,
        reason="tight: little room for more sequences" if max_context < 4 * context else "",
    )


def _place_unified(output: OutputSize, network: Network, machine: Machine, context: int) -> MachinePlacement:
    """Places an output in memory that processor and GPU share, for mlx-lm and llama.cpp; that reads what does not fit
    from disk."""
    kv_bytes = context * network.kv_bytes_per_token
    room = machine.ram_bytes - RAM_RESERVE_BYTES - output.served_bytes
    if output.placement == "parallel":
        return _impossible("vLLM and SGLang need GPUs with memory of their own", kv_bytes)
    if room < kv_bytes:
        if output.placement == "split":
            return _place_split(output, network, machine, context)
        needed = (machine.ram_bytes - room + kv_bytes) / 2**30
        return _impossible(f"needs {needed:.0f} GiB of memory, there are {machine.ram_bytes / 2**30:.0f}", kv_bytes)
    experts, rest = _active_bytes(output, network)
    return MachinePlacement(
        kind="unified",
        gpu_bytes=0,
        ram_bytes=output.served_bytes,
        disk_bytes=0,
        kv_bytes=kv_bytes,
        gpu_layers=network.num_layers,
        tensor_parallel=1,
        pipeline_parallel=1,
        max_context=int(room / network.kv_bytes_per_token),
        tokens_per_s=_speed([(experts + rest, machine.ram_bandwidth, ONE_GPU.value)], kv_bytes, machine.ram_bandwidth),
        reason="",
    )


def _place_split(output: OutputSize, network: Network, machine: Machine, context: int) -> MachinePlacement:
    """Places an output for llama.cpp: attention and shared weights in GPUs, then experts; the rest in RAM, then on
    disk."""
    kv_bytes = context * network.kv_bytes_per_token
    embedding = output.by_kind.get("embedding", 0)  # llama.cpp looks its rows up in RAM
    splittable = output.by_kind.get("routed experts", 0)
    if not network.has_experts:
        splittable = output.served_bytes - embedding - output.by_kind.get("head", 0)
    base = output.served_bytes - embedding - splittable + kv_bytes
    layer_bytes = splittable / network.num_split
    in_gpu, gpu_layers, max_context = 0, 0, 0
    if machine.gpus is not None:
        each = machine.gpus.memory_bytes - GPU_RESERVE_BYTES - base / machine.gpus.count
        if each >= 0:
            gpu_layers = min(network.num_split, int(each / layer_bytes) * machine.gpus.count)
            in_gpu = int(base - kv_bytes + gpu_layers * layer_bytes)
            free = machine.gpus.count * each - gpu_layers * layer_bytes
            max_context = context + int(free / network.kv_bytes_per_token)
    ram_room = machine.ram_bytes - RAM_RESERVE_BYTES - (0 if in_gpu else kv_bytes)
    rest = output.served_bytes - in_gpu
    in_ram = max(0, min(rest, ram_room))
    if machine.disk_bytes is not None and machine.disk_bytes < output.num_bytes:
        return _impossible(
            f"the file has {output.num_bytes / 2**30:.0f} GiB, the disk {machine.disk_bytes / 2**30:.0f}", kv_bytes
        )
    if ram_room < 0:
        return _impossible("the KV cache alone does not fit into RAM", kv_bytes)
    if not in_gpu:
        max_context = max(context, int((machine.ram_bytes - RAM_RESERVE_BYTES - rest) / network.kv_bytes_per_token))
    speed = _split_speed(output, network, machine, (in_gpu, in_ram, rest - in_ram), kv_bytes)
    all_in_gpu = gpu_layers == network.num_split
    kind = ("gpu" if all_in_gpu else "split") if in_gpu else "cpu"
    reason = ""
    if rest > in_ram:
        reason = f"{(rest - in_ram) / 2**30:.0f} GiB are read from disk repeatedly"
    elif machine.gpus is not None and not in_gpu:
        reason = "the GPUs cannot hold even the weights that every token uses"
    return MachinePlacement(
        kind, in_gpu, in_ram, rest - in_ram, kv_bytes, gpu_layers, 1, 1, max_context, speed, reason
    )  # fmt: skip


def _split_speed(
    output: OutputSize, network: Network, machine: Machine, places: tuple[int, int, int], kv_bytes: int
) -> Range:
    """Returns the speed if weights outside the GPUs are used evenly: experts by chance, dense layers all of them."""
    in_gpu, in_ram, on_disk = places
    experts, rest = _active_bytes(output, network)
    outside = in_ram + on_disk
    splittable = output.by_kind.get("routed experts", 0) if network.has_experts else output.served_bytes
    if not in_gpu:
        active_outside = experts + rest
    elif network.has_experts:
        embedding = output.by_kind.get("embedding", 0)
        active_outside = experts * max(0, outside - embedding) / splittable
    else:
        active_outside = (experts + rest) * max(0, outside - output.by_kind.get("embedding", 0)) / splittable
    disk_share = on_disk / outside if outside else 0.0
    parts = [
        (active_outside * (1 - disk_share), machine.ram_bandwidth, RAM.value),
        (active_outside * disk_share, machine.disk_read, DISK.value),
    ]
    if in_gpu and machine.gpus is not None:
        parts.append((experts + rest - active_outside, machine.gpus.bandwidth, ONE_GPU.value))
        return _speed(parts, kv_bytes, machine.gpus.bandwidth)
    return _speed(parts, kv_bytes, machine.ram_bandwidth)

"""States in words what works on a machine and what does not."""

from collections.abc import Sequence

from dsquant.deployment.facts import SWAP_GAIN, SWAP_SOURCE
from dsquant.deployment.hardware import Machine
from dsquant.deployment.placement import MachinePlacement, Network
from dsquant.deployment.sizes import OutputSize
from dsquant.options import format_size

Placed = Sequence[tuple[OutputSize, MachinePlacement]]


def statements_about(machine: Machine, network: Network, placed: Placed) -> tuple[str, ...]:
    """Returns sentences on what does not fit and why, and which workarounds do not help."""
    words: list[str] = []
    first = next((size.format for size, _ in placed if size.preset), None)
    four_bits = [(size, found) for size, found in placed if size.format == first and size.bits == 4]
    if four_bits and not machine.unified and all(found.kind == "none" for _, found in four_bits):
        words.append(_four_bits_do_not_fit(machine, network, [size for size, _ in four_bits]))
    on_disk = [(size, found) for size, found in placed if size.format == "gguf:Q4_K_M" and found.disk_bytes]
    for size, found in on_disk:
        words.append(_disk_bound(machine, size, found))
    if on_disk:
        held = format_size(machine.ram_bytes * SWAP_GAIN)
        words.append(
            f"Compressed swap (zram) does not help: 4-bit weights shrink by a factor of {SWAP_GAIN:.1f}, not 3 "
            f"({SWAP_SOURCE}); {format_size(machine.ram_bytes)} of RAM would hold at most {held} of them, and "
            "unpacking them takes time for every token."
        )
    of_eight = dict.fromkeys(size.format for size, found in placed if size.fp8 and found.kind == "gpu")
    if of_eight:
        words.append(
            f"FP8 ({', '.join(of_eight)}) needs GPUs with FP8 units (Ada, Hopper, Blackwell): on Ampere vLLM runs it "
            "weight-only, SGLang does not."
        )
    return tuple(words)


def _four_bits_do_not_fit(machine: Machine, network: Network, outputs: list[OutputSize]) -> str:
    sizes = [output.served_bytes for output in outputs]
    between = f"{min(sizes) / 2**30:,.0f} to {max(sizes) / 2**30:,.0f} GiB"
    if max(sizes) < 2**30:
        between = f"{format_size(min(sizes))} to {format_size(max(sizes))}"
    cards = "there is no GPU"
    if machine.gpus is not None:
        cards = (
            f"{machine.gpus.count}x{machine.gpus.memory_bytes / 2**30:.0f} GiB of GPU memory are "
            f"{machine.gpu_bytes / 2**30:.0f} GiB"
        )
    way_out = "its routed experts have to be" if network.has_experts else "some of its layers have to be"
    return (
        f"At 4 bits ({outputs[0].format}) this model takes {between}; {cards}: {way_out} in RAM or on disk, which "
        "llama.cpp does."
    )


def _disk_bound(machine: Machine, size: OutputSize, found: MachinePlacement) -> str:
    assert found.tokens_per_s is not None
    holders = "Memory holds" if machine.unified else "GPUs and RAM hold"
    return (
        f"{holders} {format_size(found.gpu_bytes + found.ram_bytes)} of Q4_K_M's "
        f"{format_size(size.served_bytes)}; {format_size(found.disk_bytes)} stay on disk and are read again for every "
        f"token that needs them: at {machine.disk_read.high / 1e9:g} GB/s no engine decodes more than "
        f"{found.tokens_per_s.high:.2g} tokens/s."
    )

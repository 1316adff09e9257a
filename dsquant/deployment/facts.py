"""Measurements of others and of dsquant with their sources: every factor of a forecast."""

from dataclasses import dataclass

from dsquant.presets import WIDEST_FOR_PREDICTIONS

GB = 10**9
GIB = 2**30


@dataclass(frozen=True)
class Range:
    """A number that is known between two bounds."""

    low: float
    high: float

    def __mul__(self, factor: "float | Range") -> "Range":
        other = factor if isinstance(factor, Range) else Range(factor, factor)
        return Range(self.low * other.low, self.high * other.high)


@dataclass(frozen=True)
class Fact:
    """A measured share or rate."""

    name: str
    value: Range
    source: str


@dataclass(frozen=True)
class GpuClass:
    """Cards of one memory size."""

    memory_gib: int
    bandwidth_gbs: Range
    """Memory bandwidth in GB/s of the slowest and the fastest card."""
    cards: str


# Data sheets.
GPU_CLASSES = (
    GpuClass(16, Range(288, 960), "RTX 4060 Ti to RTX 5080"),
    GpuClass(24, Range(600, 1008), "A10 to RTX 4090; RTX 3090 has 936, L4 only 300"),
    GpuClass(32, Range(1134, 1792), "V100S to RTX 5090"),
    GpuClass(48, Range(696, 960), "A40, L40S 864, RTX 6000 Ada"),
    GpuClass(80, Range(1935, 3352), "A100 PCIe to H100 SXM"),
    GpuClass(96, Range(1792, 4022), "RTX PRO 6000 to H20"),
    GpuClass(141, Range(4800, 4800), "H200"),
    GpuClass(192, Range(5300, 8000), "MI300X to B200"),
    GpuClass(288, Range(6000, 8000), "MI325X to B300"),
)
# Data sheets: card -> memory in GiB, bandwidth in GB/s. A name stands for the largest memory that it is sold with.
CARDS = {
    "T4": (16, 320), "V100": (32, 900), "A10": (24, 600), "A30": (24, 933), "A40": (48, 696), "A100": (80, 2039),
    "L4": (24, 300), "L40": (48, 864), "L40S": (48, 864), "H100": (80, 3352), "H200": (141, 4800), "H20": (96, 4022),
    "MI300X": (192, 5300), "A5000": (24, 768), "A6000": (48, 768), "6000 Ada": (48, 960), "PRO 6000": (96, 1792),
    "3060": (12, 360), "3090": (24, 936), "3090 Ti": (24, 1008), "4060 Ti": (16, 288), "4070": (12, 504),
    "4080": (16, 717), "4090": (24, 1008), "5070 Ti": (16, 896), "5080": (16, 960), "5090": (32, 1792),
}  # fmt: skip
# Apple's technical specifications; the memory is the GPU's as well.
UNIFIED_CLASSES = (
    GpuClass(32, Range(100, 410), "M2 to M4 Max"),
    GpuClass(64, Range(273, 800), "M4 Pro to M1 Ultra; M4 Max has 410 or 546"),
    GpuClass(128, Range(400, 800), "M3 Max to M1 Ultra; M4 Max has 546"),
    GpuClass(192, Range(800, 800), "M2 Ultra"),
    GpuClass(256, Range(819, 819), "M3 Ultra"),
    GpuClass(512, Range(819, 819), "M3 Ultra"),
)
# The rule by which one output is called the best for a machine (`forecast.CANDIDATES`).
BEST = (
    "The best is the first that fits with its context, whatever its speed: in GPUs or unified memory alone before RAM "
    "before disk; in each place the source, then 8 bits before 4, quality before compact, then GGUF from Q8_0 down "
    "(IQ2_XXS and IQ1_M behind all that RAM holds, from disk Q4_K_M first)."
)
# Outputs of less than 4 bits -> mean KL divergence of tiny-r1 on unseen code, as the tables cited in FEW_BITS have it.
KL_OF_FEW_BITS = {
    "compressed-tensors compact 3-bit": 0.065, "compressed-tensors compact 2-bit": 0.39, "gguf:IQ3_S": 0.029,
    "gguf:Q2_K": 0.097, "gguf:IQ2_S": 0.16, "gguf:IQ2_XXS": 0.22, "gguf:IQ1_S": 0.55,
}  # fmt: skip
FEW_BITS = (
    "less than 4 bits: mean KL divergence of tiny-r1 on unseen code, "
    + ", ".join(f"{name} {value:g}" for name, value in KL_OF_FEW_BITS.items())
    + " (4 bits 0.018, IQ4_XS 0.011; benchmarks/quality_widths_cpu_202611.md and gguf_sizes_202611.md), with --preset "
    "best 3 and 2 bits 0.038 and 0.18 (quality_autoround_cpu_202611.md); SmolLM2-135M has 0.15 and 0.60 with best, "
    "0.043 at 4 bits (quality_smollm2_h200_202611.md); from 0.1 on answers differ visibly"
)
# Up to this much RAM a machine counts as a desktop.
DESKTOP_RAM_GIB = 192
DESKTOP_RAM = Fact("RAM, two channels", Range(51, 90), "DDR4-3200 to DDR5-5600, 8 bytes a channel and transfer")
SERVER_RAM = Fact("RAM, eight to twelve channels", Range(205, 538), "8 x DDR4-3200 to 12 x DDR5-5600")
DEFAULT_DISK = Fact("disk", Range(3.5, 7.0), "assumed: one NVMe drive of PCIe 3 to 4; give --disk-read")

# Share of the bandwidth's bound that decoding one sequence reaches.
TENSOR_PARALLEL = Fact(
    "several GPUs, tensor-parallel",
    Range(0.045, 0.14),
    "model card of cognitivecomputations/DeepSeek-R1-AWQ, one sequence: 61.5 tokens/s on 8xH100 of a bound of 1,300; "
    "46.3 on 8xL40S of 335",
)
ONE_GPU = Fact(
    "one GPU, or layers one GPU after another",
    Range(0.32, 0.77),
    "pavlokhmel.com, 7 June 2026, llama.cpp Q4_K_M of 5.7 GB: 190 tokens/s on H100 SXM (32 %), 137 on RTX 4090 (77 %)",
)
RAM = Fact(
    "CPU and RAM",
    Range(0.33, 0.52),
    "KTransformers' R1 report: 8.73 of 26.7 tokens/s on one socket; Tencent X-Lab: Q8_0 at 7.17 of 13.8 on 12 channels",
)
DISK = Fact(
    "disk, read through mmap",
    Range(0.3, 1.0),
    "assumed; level1techs' R1 thread reports that llama.cpp's buffered reads, not the drives, are the limit",
)
EFFICIENCIES = (TENSOR_PARALLEL, ONE_GPU, RAM, DISK)

# Measured gain of compressed swap (zram) on 4-bit weights: entropy of their bytes.
SWAP_GAIN = 1.10
SWAP_SOURCE = "entropy of INT4 g128 codes 1.10, Q4_K 1.05 to 1.08, FP8 1.23 (arXiv 2508.19263 has 83 % for FP8)"

# Reserves. Assumed: memory of engines in addition to weights and KV cache.
GPU_RESERVE_BYTES = int(1.5 * GIB)
ENGINE_SHARE = 0.95  # share of a GPU that vLLM and SGLang are told to use
RAM_RESERVE_BYTES = 4 * GIB

# Building an output: seconds of one core for each weight, from benchmarks/planning_cpu_202611.md.
SCAN_S, READ_S = 2.6e-9, 5.0e-9
SEARCH_S, SEARCH_NARROW_S = 6.2e-7, 2.6e-6
NARROW_COLUMNS = 2048  # hidden sizes below take the second
CALIBRATE_S, EVALUATE_S = 1.5e-10, 8.5e-11  # and for each token; evaluated are two models
STORE_S = {"Q8_0": 3.1e-9, "Q6_K": 3.0e-8, "F32": 0.0, "F16": 0.0, "BF16": 0.0}
STORE_OTHER_S = 1.2e-7  # as Q4_K
MEASURED_CORES = 2
MEASURED_IN = "benchmarks/planning_cpu_202611.md"
PRESET_BEST = (
    "--preset best makes files of compact's size and layout with lower drift, in 2.0 to 2.6 times its processor time, "
    f"or 3 to 6 where the hidden size is at most {WIDEST_FOR_PREDICTIONS} (benchmarks/quality_peers_cpu_202611.md, "
    "quality_smollm2_cpu_202611.md and quality_smollm2_h200_202611.md)"
)
TARGETS = (
    "--target-bits and --target-size first measure what each width costs, in 1.7 to 3.1 times the time of the rest of "
    "the job (benchmarks/r1_ranks_h200_202611.md)"
)
# benchmarks/r1_layer_h200_202611.md, a layer of 11,507,286,272 weights and 262,144 tokens on an H200: 11.7 s where
# files lie in memory (7c8dde6), 16.1 on a disk of 1.2 to 1.7 GB/s (396cf8f).
SEARCH_ON_GPU_S = Range(1.02e-9, 1.40e-9)
MEASURED_ON_GPU_IN = (
    "H200, 262,144 tokens, from memory or a disk of 1.2 to 1.7 GB/s (benchmarks/r1_layer_h200_202611.md)"
)
# benchmarks/r1_ranks_h200_202611.md, one rank, the last layer: 3.05e9 weights, 16,384 tokens. IQ2_XXS 14.9 s, Q4_K_M
# 15.4; eval 5.2, of which the disk 2.3.
STORE_ON_GPU_S = Range(4.9e-9, 5.1e-9)
EVALUATE_ON_GPU_S = Range(0.8e-9, 1.7e-9)
RANKS_MEASURED_IN = "H200, 16,384 tokens, from files to files (benchmarks/r1_ranks_h200_202611.md)"

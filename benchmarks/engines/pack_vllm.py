"""Packs vLLM for a machine without a network that has an H100 or H200, CUDA 13 and PyTorch 2.11, in pieces of 38 MB.

    python benchmarks/engines/pack_vllm.py --folder DIR     # needs pip, ptxas, fatbinary, zstd and xz; 15 minutes
    cat DIR/vllm.tar.xz.* | tar xJ -C SITE                    # there; SITE is what PYTHONPATH names

vLLM 0.22.0 is the newest that fits PyTorch 2.11. Its wheel has 260 MB and needs two gigabytes more; what a card of
compute capability 9.0 loads when it scores tokens is 91 MB with all packages that PyTorch's image lacks. Machine code
of other cards is zeroed, which compresses to nothing, and FlashAttention 2 left out. Marlin's experts in bfloat16 are
in the wheel as PTX alone, which the driver would compile for minutes: it is compiled here, for groups of 16, 32 and 128
columns and for whole rows.
"""

import argparse
import re
import shutil
import struct
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

WHEEL = "vllm==0.22.0"
PYTHON = "3.12"
PLATFORMS = ("manylinux_2_31_x86_64", "manylinux_2_28_x86_64", "manylinux_2_24_x86_64", "manylinux2014_x86_64")
# What `import vllm` wants of packages that PyTorch's image does not have; the second with all that they need.
ALONE = (
    "xgrammar==0.2.0", "depyf==0.20.0", "compressed-tensors==0.15.0.1", "astor", "dill", "humming-kernels==0.1.2",
    "apache-tvm-ffi==0.1.9", "mistral_common==1.11.2", "pydantic-extra-types", "pycountry",
)  # fmt: skip
WHOLE = (
    "cachetools", "tqdm", "blake3", "fastapi<0.137", "uvicorn", "python-multipart", "email-validator", "httptools",
    "websockets", "openai<3", "prometheus-fastapi-instrumentator", "lm-format-enforcer==0.11.3", "llguidance<1.8",
    "outlines_core==0.2.14", "diskcache==5.6.3", "lark==1.2.2", "partial-json-parser", "pyzmq", "msgspec", "watchfiles",
    "python-json-logger", "pybase64", "cbor2", "ijson", "setproctitle", "openai-harmony", "anthropic",
    "model-hosting-container-standards<1", "mcp", "opentelemetry-sdk", "opentelemetry-api",
    "opentelemetry-semantic-conventions-ai", "gguf", "py-cpuinfo", "regex", "pydantic", "psutil", "loguru",
    "nvidia-ml-py", "pyelftools",
)  # fmt: skip
# The image has its own numpy; the rest is of no use there.
LEFT_OUT = ("numpy*", "setuptools*", "pip*", "bin", "grpc*", "xgrammar/lib", "pycountry/locales")
UNUSED = (
    "vllm_flash_attn/_vllm_fa2_C.abi3.so",
    *(f"third_party/deep_gemm/_C.cpython-3{minor}-x86_64-linux-gnu.so" for minor in (10, 11, 13, 14)),
)
MAGIC = struct.pack("<I", 0xBA55ED50)
PTX, MACHINE_CODE = 1, 2
CAPABILITY = 90
BLOCKS_OF_16 = ("n1", "1", "2", "8")  # n1: a row of weights has one scale
PIECE_BYTES = 38 * 2**20


@dataclass(frozen=True)
class Entry:
    """Code of one kind for one compute capability in a fat binary."""

    kind: int
    capability: int
    start: int
    stop: int


def fat_binaries(raw: bytes) -> Iterator[tuple[int, int, list[Entry]]]:
    """Yields start, end and entries of every fat binary in a library (layout: nvcc's fatbinary.h and cuobjdump)."""
    start = raw.find(MAGIC)
    while start >= 0:
        version, header, size = struct.unpack_from("<HHQ", raw, start + 4)
        end = start + header + size
        if version == 1 and header == 16 and end <= len(raw):
            yield start, end, list(_entries(raw, start + header, end))
        else:
            end = start + len(MAGIC)
        start = raw.find(MAGIC, end)


def _entries(raw: bytes, start: int, end: int) -> Iterator[Entry]:
    while start < end:
        kind, _, header = struct.unpack_from("<HHI", raw, start)
        (size,) = struct.unpack_from("<Q", raw, start + 8)
        (capability,) = struct.unpack_from("<I", raw, start + 28)
        yield Entry(kind, capability, start + header, start + header + size)
        start += header + size


def pruned(library: Path, scratch: Path) -> None:
    """Zeroes what the card does not load, and puts machine code where Marlin's experts in bfloat16 have PTX alone."""
    raw = bytearray(library.read_bytes())
    for start, end, entries in list(fat_binaries(bytes(raw))):
        native = any(one.kind == MACHINE_CODE and one.capability == CAPABILITY for one in entries)
        texts = [one for one in entries if one.kind == PTX and one.capability <= CAPABILITY]
        best = None if native or not texts else max(texts, key=lambda one: one.capability)
        if best is not None and (made := _compiled(bytes(raw[best.start : best.stop]), scratch)):
            assert len(made) <= end - start, f"{library.name}: compiled code does not fit into its place"
            raw[start:end] = made + bytes(end - start - len(made))
            continue
        for one in entries:
            is_native = one.kind == MACHINE_CODE and one.capability == CAPABILITY
            if one.kind in (PTX, MACHINE_CODE) and not is_native and one != best:
                raw[one.start : one.stop] = bytes(one.stop - one.start)
    library.write_bytes(raw)


def _compiled(packed: bytes, scratch: Path) -> bytes | None:
    """A fat binary of one with Marlin's experts in bfloat16, compressed; None for any other code."""
    text = subprocess.run(["zstd", "-dc"], input=packed, capture_output=True).stdout.rstrip(b"\0").decode()
    if "marlin_moe" not in text or not re.search(r"kernel_(bfloat16|s8)_\w+_bfloat16_cu", text):
        return None
    parts = re.split(r"(?m)(?=^\.visible \.entry)", text)
    groups = (re.search(r"ELi(n?\d+)ELb[01]E+v", part.partition("(")[0]) for part in parts)
    wanted = [part for part, group in zip(parts, groups, strict=True) if group is None or group[1] in BLOCKS_OF_16]
    source, machine, made = (scratch / f"marlin.{end}" for end in ("ptx", "cubin", "fatbin"))
    source.write_text("".join(wanted))
    subprocess.run(["ptxas", f"-arch=sm_{CAPABILITY}", "-O3", source, "-o", machine], check=True)
    image = f"--image3=kind=elf,sm={CAPABILITY},file={machine}"
    subprocess.run(["fatbinary", f"--create={made}", "-64", "--compress-all", image], check=True)
    return made.read_bytes()


def main() -> None:
    """Downloads, prunes, packs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    folder = parser.parse_args().folder
    site = folder / "site"
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    pip = [sys.executable, "-m", "pip"]
    for_there = [
        "-q",
        "--python-version",
        PYTHON,
        "--only-binary",
        ":all:",
        *(f"--platform={one}" for one in PLATFORMS),
    ]
    subprocess.run([*pip, "download", *for_there, "--no-deps", "-d", folder, WHEEL], check=True)
    subprocess.run([*pip, "install", *for_there, "--no-deps", "--target", site, *ALONE], check=True)
    subprocess.run([*pip, "install", *for_there, "--target", site, *WHOLE], check=True)
    for pattern in LEFT_OUT:
        for path in site.glob(pattern):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with zipfile.ZipFile(next(folder.glob("vllm-*.whl"))) as wheel:
        wheel.extractall(site)
    for name in UNUSED:
        path = site / "vllm" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    for library in (site / "vllm").rglob("*.so"):
        pruned(library, folder)
    packed = subprocess.Popen(["tar", "c", "-C", site, "."], stdout=subprocess.PIPE)
    pieces = ["split", "-b", str(PIECE_BYTES), "-", folder / "vllm.tar.xz."]
    squeezed = subprocess.Popen(["xz", "-T2", "-6"], stdin=packed.stdout, stdout=subprocess.PIPE)
    subprocess.run(pieces, stdin=squeezed.stdout, check=True)
    if packed.wait() or squeezed.wait():
        raise SystemExit("tar or xz failed")


if __name__ == "__main__":
    main()

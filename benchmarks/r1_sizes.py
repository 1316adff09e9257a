"""R1's sizes in `dsquant plan` beside what jobs write for one of its mixture layers.

    python -m benchmarks.r1_sizes --folder /tmp/r1-sizes [--only NAME...] [--write FILE]

Makes one mixture layer of R1's shapes with two experts, random weights in FP8 blocks, quantizes it to each output
(`--steps none`: sizes are what is compared), and adds up the tensors of the layer that the job has written; those that
grow with the number of experts count 128 times. R1's plan comes from its config alone, without the layer for
multi-token prediction; all its mixture layers have one size, but for GGUF's, where layer 30 is meant: the job gets the
types that the plan gives that layer's tensors.
"""

import argparse
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gguf

import dsquant
from benchmarks.r1_width import config, make_checkpoint
from dsquant.deployment.subject import Subject, open_subject
from dsquant.formats.gguf.target import choose_tensors, loadable_shapes
from dsquant.formats.safetensors_target import only_checkpoint
from dsquant.pipeline.planning import plan_run, plan_units
from dsquant.recipes import Recipe
from dsquant.source.shards import read_index
from tests.support.r1_config import R1_CONFIG

GIB = 2**30
EXPERTS, ALL_EXPERTS = 2, 256
FIRST_MIXTURE = 3
LAYER = 30
GROWING = (".experts.", ".switch_mlp.", ".mlp.gate.", "_exps.", "ffn_gate_inp.", "exp_probs_b.")


@dataclass(frozen=True)
class Output:
    """One output: a format with its options, or a type of GGUF."""

    to: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The output in the table."""
        words = [self.options[key] for key in ("preset",) if key in self.options]
        words += [f"{self.options[key]} bits" for key in ("bits",) if key in self.options]
        words += ["zero points" for key in ("symmetric",) if self.options.get(key) is False]
        words += [f"groups of {self.options[key]}" for key in ("group_size",) if key in self.options]
        words += [f"rest {self.options[key].upper()}" for key in ("rest",) if key in self.options]
        words += [f"activations {self.options[key].upper()}" for key in ("activations",) if key in self.options]
        return ", ".join([self.to, *words])


def outputs() -> list[Output]:
    """Every width of every format of safetensors, and types of GGUF that need no calibration."""
    fp8, bf16 = {"rest": "fp8"}, {"rest": "bf16"}
    kinds = [Output("awq", {"bits": 4})]
    kinds += [Output("compressed-tensors", {"bits": bits, **fp8}) for bits in range(2, 9)]
    kinds += [Output("compressed-tensors", {"bits": bits, **bf16}) for bits in (3, 4)]
    kinds += [Output("compressed-tensors", {"bits": 2, "group_size": 64, **rest}) for rest in (fp8, bf16)]
    kinds += [Output("compressed-tensors", {"bits": 4, "symmetric": False, **fp8})]
    kinds += [Output("compressed-tensors", {"preset": "compact", "bits": 4, **fp8})]
    kinds += [Output(name, rest) for name in ("nvfp4", "mxfp4") for rest in (fp8, bf16)] + [Output("nvfp4-modelopt")]
    kinds += [Output(name, {"activations": "fp4", **rest}) for name, rest in (("nvfp4", fp8), ("nvfp4-modelopt", {}))]
    kinds += [Output("mlx", {"bits": bits}) for bits in (2, 3, 4, 5, 6, 8)]
    return [*kinds, *(Output(f"gguf:{name}") for name in ("Q8_0", "Q6_K", "Q4_K_M", "Q4_0", "Q2_K", "MXFP4_MOE"))]


def planned(output: Output, r1: Subject) -> tuple[int, int]:
    """Returns the bytes that the plan has for R1's tensors, and for those of one mixture layer."""
    sample = r1.sample
    recipe = Recipe.checked(
        model=r1.model, output=Path("planned"), to=(output.to,), mtp="drop", device="cpu",
        **{"preset": "quality", "group_size": 128} | output.options,
    )  # fmt: skip
    sizes: Counter[str] = Counter()
    for shard in only_checkpoint(plan_run(recipe, sample.checkpoint, sample.skeleton).targets).shards.shards:
        sizes[shard.unit] += sum(tensor.num_bytes for tensor in shard.tensors)
    total = sum(size * sample.of_unit(unit) for unit, size in sizes.items())
    return total, sizes[f"model.layers.{FIRST_MIXTURE}"]


def planned_gguf(output: Output, r1: Subject) -> tuple[int, int, dict[str, str]]:
    """Returns the same of a GGUF file, and the types of the layer's tensors: name in the layer -> type."""
    units = plan_units("drop", r1.checkpoint, r1.skeleton)
    parameters = [name for unit in units if unit.action != "drop" for name in unit.parameters]
    shapes = loadable_shapes(r1.checkpoint, parameters)
    tensors, _ = choose_tensors(r1.skeleton.config, shapes, output.to.partition(":")[2], 0, False)
    inside = {name.removeprefix(f"blk.{LAYER}."): one for name, one in tensors.items() if f"blk.{LAYER}." in name}
    total = sum(tensor.num_bytes for tensor in tensors.values())
    return total, sum(one.num_bytes for one in inside.values()), {name: one.type_name for name, one in inside.items()}


def made(output: Output, model: Path, folder: Path) -> int:
    """Quantizes the layer; returns the bytes of its tensors, as with all experts."""
    dsquant.awq(
        model, output=folder, to=output.to, steps="none", samples=1, seq_len=8, calibration="code", mtp="keep",
        evaluate=False, progress=False, restart=folder.exists(), memory_budget="8GiB",
        **{"preset": "quality"} | output.options,
    )  # fmt: skip
    stored = {name: info.num_bytes for name, info in read_index(folder).items() if name.startswith("model.layers.0.")}
    return whole(stored.items())


def made_gguf(output: Output, types: dict[str, str], model: Path, folder: Path) -> int:
    """Converts the layer with the types of R1's; returns the same."""
    chosen = [f"{re.escape(f'blk.0.{name}')}$={kind}" for name, kind in types.items() if name.endswith(".weight")]
    dsquant.gguf(
        model, output=folder, type=output.to.partition(":")[2], tensor_types=chosen, calibration="none", evaluate=False,
        progress=False, restart=folder.exists(),
    )  # fmt: skip
    (file,) = folder.glob("*.gguf")
    tensors = gguf.GGUFReader(file).tensors
    return whole((one.name, int(one.n_bytes)) for one in tensors if one.name.startswith("blk.0."))


def whole(sizes: Iterable[tuple[str, int]]) -> int:
    """Adds up a layer's tensors, those of experts as often as R1 has them."""
    times = ALL_EXPERTS // EXPERTS
    return sum(size * (times if any(mark in name for mark in GROWING) else 1) for name, size in sizes)


def rows(options: argparse.Namespace, r1: Subject, model: Path) -> Iterator[str]:
    """Yields the table's lines; raises SystemExit where a layer is not as the plan says, to 0.1 %."""
    yield "| output | R1 without MTP, GiB | a mixture layer, planned, MB | written, MB | difference |"
    yield "|---|---|---|---|---|"
    for output in outputs():
        if options.only and not any(name in output.name for name in options.only):
            continue
        folder = options.folder / "out"
        if output.to.startswith("gguf:"):
            total, layer, types = planned_gguf(output, r1)
            written = made_gguf(output, types, model, folder)
        else:
            total, layer = planned(output, r1)
            written = made(output, model, folder)
        away = written / layer - 1
        yield f"| {output.name} | {total / GIB:.1f} | {layer / 1e6:.2f} | {written / 1e6:.2f} | {away:+.3%} |"
        if not math.isclose(written, layer, rel_tol=1e-3):
            raise SystemExit(f"{output.name}: the layer is not as planned")


def main() -> None:
    """Makes the layer where it is not there, prints a line for each output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="parts of the names of outputs")
    parser.add_argument("--write", type=Path, help="file for the table; printed in any case")
    options = parser.parse_args()
    model, described = options.folder / "layer", options.folder / "r1" / "config.json"
    if not model.exists():
        make_checkpoint(model, EXPERTS)
        few = {"n_group": 1, "topk_group": 1, "num_experts_per_tok": EXPERTS}
        (model / "config.json").write_text(json.dumps(config(EXPERTS, 1, 0) | few))
    described.parent.mkdir(exist_ok=True)
    described.write_text(json.dumps(R1_CONFIG))
    lines = []
    for line in rows(options, open_subject(str(described)), model):
        print(line, flush=True)
        lines.append(line)
    if options.write:
        options.write.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()

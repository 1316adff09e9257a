"""How near the divergence that `dsquant eval` reports of a GGUF file comes to llama.cpp's own.

    python -m benchmarks.activation_rounding Q3_K_M Q4_K_M [--text FILE]...

On a CPU, llama.cpp rounds what it multiplies with a quantized weight to 8 bits, and so does evaluation. Here both run
the same tokens; evaluation runs them without rounding too. Figures: activation_rounding_cpu_202611.md.

Shape legend: N samples, T tokens of a sample, V vocabulary.
"""

import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import click
import torch

import dsquant
from dsquant.calibration.texts import HELD_OUT_TEXTS, text_tokens
from dsquant.evaluation.divergence import ComparedModels, compare
from dsquant.evaluation.opening import Original, open_candidate, open_original
from dsquant.kernels.activation_rounding import Rounding, unrounded
from dsquant.model.overlays import Overlay
from tests.support.llama_cpp import decoded, every_position

SEQ_LEN, SAMPLES_AT_ONCE = 256, 32


class Unrounded(Overlay):
    """The same weights as an engine without rounding runs them."""

    def activation_quantizer(self, name: str, values: bool = False) -> Rounding:
        """None, beside any weight."""
        return unrounded


def divergence(original_NTV: torch.Tensor, candidate_NTV: torch.Tensor) -> torch.Tensor:
    """KL of every predicted position."""
    return (original_NTV.exp() * (original_NTV - candidate_NTV)).sum(2)[:, :-1].flatten()


def against(wanted: torch.Tensor, found: torch.Tensor) -> str:
    """How much larger a mean is, with the standard error of the paired difference."""
    difference, scale = found - wanted, 100 / float(wanted.mean())
    error = scale * float(difference.std()) / len(difference) ** 0.5
    return f"{scale * float(difference.mean()):+.2f} ± {error:.2f} %"


def kl_of_parts(
    file: Path, decoded_file: Path, original: Original, tokens_NT: torch.Tensor, work: Path
) -> Iterator[dict[str, torch.Tensor]]:
    """KL of every predicted position by how it was computed, some samples at a time."""
    weights = open_candidate(str(file), original).weights
    candidates = {"rounded": weights, "plain": Unrounded(weights)}
    models = ComparedModels(original.skeleton, original.checkpoint.weights, candidates)
    for part_NT in tokens_NT.split(SAMPLES_AT_ONCE):
        own = every_position(original.opened.files[0], part_NT)
        scores = compare(models, part_NT, work)
        yield {name: scores[name].kl_NT.flatten().double() for name in candidates} | {
            "exact": divergence(own, every_position(decoded_file, part_NT)),
            "batch": divergence(own, every_position(file, part_NT)),
            "single": divergence(own, every_position(file, part_NT, 1)),
        }


@click.command()
@click.argument("type_names", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, help="A text file beside the shipped texts.")
@click.option("--samples", default=10, help="Of each text, at most.")
def main(type_names: tuple[str, ...], texts: tuple[str, ...], samples: int) -> None:
    """Prints a row for each type."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make = partial(dsquant.gguf, evaluate=False, progress=False)
        original = open_original(str(make(type="F32", output=work / "F32").folders["gguf:F32"]))
        parts = [text_tokens(text, original.tokenizer, SEQ_LEN, samples) for text in (*HELD_OUT_TEXTS, *texts)]
        click.echo(
            "| type | positions | eval's mean KL | llama.cpp's | against eval's | not rounded | decoded to F32 "
            "| one token at a time |"
        )
        click.echo("|---|---|---|---|---|---|---|---|")
        for name in type_names:
            file = make(type=name, output=work / name).folders[f"gguf:{name}"]
            found = list(kl_of_parts(file, decoded(file, work / "decoded.gguf"), original, torch.cat(parts), work))
            kl = {how: torch.cat([part[how] for part in found]) for how in found[0]}
            pairs = (("rounded", "batch"), ("plain", "batch"), ("plain", "exact"), ("batch", "single"))
            cells = " | ".join(against(kl[wanted], kl[seen]) for wanted, seen in pairs)
            means = f"{float(kl['rounded'].mean()):.5f} | {float(kl['batch'].mean()):.5f}"
            click.echo(f"| {name} | {len(kl['batch'])} | {means} | {cells} |")


if __name__ == "__main__":
    main()

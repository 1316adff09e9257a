"""How near the divergence that `dsquant eval` reports of a GGUF file comes to llama.cpp's own.

    python -m benchmarks.activation_rounding Q3_K_M Q4_K_M [--text FILE]...

On a CPU, llama.cpp rounds what it multiplies with a quantized weight to 8 bits, and so does evaluation. Here both run
the same tokens; evaluation runs them without rounding too, and once with the mixed latents rounded that MLA's values
are made of, which it leaves as they are. Figures: activation_rounding_cpu_202611.md.

Shape legend: N samples, T tokens of a sample, V vocabulary, H heads, C latent width.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import click
import gguf
import torch

import dsquant
from dsquant.calibration import HELD_OUT_TEXTS, text_tokens
from dsquant.evaluation.divergence import compare
from dsquant.kernels.activation_rounding import Rounding, rounding_of_block, unrounded
from dsquant.model.overlays import Overlay
from dsquant.model.skeleton import Skeleton
from dsquant.opening import Original, open_candidate, open_original
from dsquant.source.locate import locate
from dsquant.source.weights import Weights
from tests.llama_cpp import decoded, every_position
from tests.streams import stream_logits

SAMPLES, SEQ_LEN = 10, 256


class Unrounded(Overlay):
    """The same weights as an engine without rounding runs them."""

    def rounding_beside(self, name: str) -> Rounding:
        """None, beside any weight."""
        return unrounded


def attention(
    module: Any, hidden_states: torch.Tensor, position_embeddings: Any, values: Rounding, **_: Any
) -> tuple[torch.Tensor, None]:
    """MLA as llama.cpp computes it: queries meet the latents, which are cached in F16; q_b_proj rounds its queries."""
    from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave

    num_samples, num_tokens, _width = hidden_states.shape
    query = module.q_b_proj(module.q_a_layernorm(module.q_a_proj(hidden_states)))
    query = query.view(num_samples, num_tokens, module.num_heads, -1).transpose(1, 2)
    plain, turned = query.split([module.qk_nope_head_dim, module.qk_rope_head_dim], -1)
    latent, key = module.kv_a_proj_with_mqa(hidden_states).split([module.kv_lora_rank, module.qk_rope_head_dim], -1)
    latent = module.kv_a_layernorm(latent).half().float()
    turned, key = apply_rotary_pos_emb_interleave(turned, key.unsqueeze(1), *position_embeddings)
    weight = module.kv_b_proj.weight.view(module.num_heads, -1, module.kv_lora_rank)
    to_keys, to_values = weight.split([module.qk_nope_head_dim, module.v_head_dim], 1)
    absorbed = torch.einsum("nhtd,hdc->nhtc", plain, to_keys)
    scores = torch.einsum("nhtc,nsc->nhts", absorbed, latent) + turned @ key.half().float().transpose(2, 3)
    future = torch.ones(num_tokens, num_tokens).triu(1).bool()
    shares = (scores * module.scaling).masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("nhts,nsc->nhtc", shares, latent)
    output = torch.einsum("nhtc,hvc->nthv", values(mixed.contiguous()), to_values)
    return module.o_proj(output.reshape(num_samples, num_tokens, -1)), None


@contextmanager
def rounded_values(skeleton: Skeleton, file: Path) -> Iterator[None]:
    """Lets attention round mixed latents beside a file's attn_v_b, whatever runs meanwhile."""
    sizes = {one.name: gguf.GGML_QUANT_SIZES[one.tensor_type][0] for one in gguf.GGUFReader(file).tensors}
    own = {layer.index: skeleton.module(f"{layer.prefix}.self_attn") for layer in skeleton.layers}
    kept = {number: module.forward for number, module in own.items()}
    for number in range(skeleton.num_layers):
        values = rounding_of_block(sizes[f"blk.{number}.attn_v_b.weight"])
        own[number].forward = MethodType(partial(attention, values=values), own[number])
    try:
        yield
    finally:
        for number, module in own.items():
            module.forward = kept[number]


def divergence(original_NTV: torch.Tensor, candidate_NTV: torch.Tensor) -> torch.Tensor:
    """KL of every predicted position."""
    return (original_NTV.exp() * (original_NTV - candidate_NTV)).sum(2)[:, :-1].flatten()


def against(wanted: torch.Tensor, found: torch.Tensor) -> str:
    """How much larger a mean is, with the standard error of the paired difference."""
    difference, scale = found - wanted, 100 / float(wanted.mean())
    error = scale * float(difference.std()) / len(difference) ** 0.5
    return f"{scale * float(difference.mean()):+.2f} ± {error:.2f} %"


def streamed(folder: Path, original: Original, weights: Weights, tokens_NT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float64 [N, T, V], as evaluation comes to them."""
    logits_NTV, _ = stream_logits(folder, weights, tokens_NT, 1, original.skeleton)
    return logits_NTV.double().log_softmax(-1)


@click.command()
@click.argument("type_names", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, help="A text file beside the shipped texts.")
def main(type_names: tuple[str, ...], texts: tuple[str, ...]) -> None:
    """Prints a row for each type."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        make = partial(dsquant.gguf, evaluate=False, progress=False)
        original = open_original(str(make(type="F32", output=work / "F32").folders["gguf:F32"]))
        parts = [text_tokens(text, original.tokenizer, SEQ_LEN, SAMPLES) for text in (*HELD_OUT_TEXTS, *texts)]
        tokens_NT = torch.cat(parts)
        own = streamed(locate("tiny-r1"), original, original.checkpoint.weights, tokens_NT)
        theirs = every_position(original.opened.files[0], tokens_NT)
        click.echo(
            "| type | positions | eval's mean KL | llama.cpp's | against eval's | not rounded | decoded to F32 "
            "| values rounded too | one token at a time |"
        )
        click.echo("|---|---|---|---|---|---|---|---|---|")
        for name in type_names:
            file = make(type=name, output=work / name).folders[f"gguf:{name}"]
            weights = open_candidate(str(file), original).weights
            candidates = {"rounded": weights, "plain": Unrounded(weights)}
            scores = compare(original.skeleton, original.checkpoint.weights, candidates, tokens_NT, work, 1)
            ours, plain = (scores[one].kl_NT.flatten() for one in candidates)
            with rounded_values(original.skeleton, file):
                values = divergence(own, streamed(locate("tiny-r1"), original, weights, tokens_NT))
            exact = divergence(theirs, every_position(decoded(file, work / "decoded.gguf"), tokens_NT))
            batch, single = (divergence(theirs, every_position(file, tokens_NT, at_once)) for at_once in (512, 1))
            means = f"{float(ours.mean()):.5f} | {float(batch.mean()):.5f}"
            pairs = ((ours, batch), (plain, batch), (plain, exact), (values, batch), (batch, single))
            cells = " | ".join(against(wanted, found) for wanted, found in pairs)
            click.echo(f"| {name} | {len(ours)} | {means} | {cells} |")


if __name__ == "__main__":
    main()

"""What llama.cpp's rounding of activations adds to the divergence that `dsquant eval` reports of a GGUF file.

    python -m benchmarks.activation_rounding Q3_K_M Q4_K_M [--text FILE]...

On a CPU, llama.cpp rounds what it multiplies with a quantized weight to 8 bits: in blocks of 256 beside K-quants
(ggml's Q8_K), of 32 beside the others (Q8_0). Here the same is done to transformers' own model, with MLA's queries and
values absorbed as llama.cpp absorbs them, and compared with llama.cpp on the same tokens. Figures:
activation_rounding_cpu_202611.md.

Shape legend: N samples, T tokens of a sample, V vocabulary, H heads, C latent width.
"""

import tempfile
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from types import MethodType
from typing import Any

import click
import gguf
import torch
import torch.nn.functional as F

import dsquant
from dsquant.calibration import HELD_OUT_TEXTS, text_tokens
from dsquant.opening import open_candidate, open_original
from dsquant.source.locate import locate
from tests.checkpoints import full_model
from tests.llama_cpp import decoded, every_position

SAMPLES, SEQ_LEN = 10, 256
Rounding = Callable[[torch.Tensor], torch.Tensor]


def q8_k(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 256: the largest magnitude becomes -127 (ggml-quants.c, `quantize_row_q8_K_ref`)."""
    blocks = values.reshape(-1, 256)
    largest = blocks.gather(1, blocks.abs().argmax(1, keepdim=True))
    inverse = torch.where(largest == 0, 0.0, -127 / largest)
    scale = torch.where(largest == 0, 0.0, 1 / inverse)
    return ((blocks * inverse).round().clamp(max=127) * scale).reshape(values.shape)


def q8_0(values: torch.Tensor) -> torch.Tensor:
    """Blocks of 32, the scale in F16, halves away from zero (ggml-quants.c, `quantize_row_q8_0_ref`)."""
    blocks = values.reshape(-1, 32)
    scale = blocks.abs().amax(1, keepdim=True) / 127
    codes = blocks * torch.where(scale == 0, 0.0, 1 / scale)
    return (codes.sign() * (codes.abs() + 0.5).floor() * scale.half().float()).reshape(values.shape)


def rounding_beside(type_name: str) -> Rounding:
    """What a weight of this type makes of its activations."""
    if type_name == "F32":
        return lambda values: values
    return q8_k if type_name.endswith("_K") else q8_0


def attention(
    module: Any, hidden_states: torch.Tensor, position_embeddings: Any, keys: Rounding, values: Rounding, **_: Any
) -> tuple[torch.Tensor, None]:
    """MLA as llama.cpp computes it: queries meet the latents, which are cached in F16."""
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
    absorbed = torch.einsum("nhtd,hdc->nhtc", keys(plain.contiguous()), to_keys)
    scores = torch.einsum("nhtc,nsc->nhts", absorbed, latent) + turned @ key.half().float().transpose(2, 3)
    future = torch.ones(num_tokens, num_tokens).triu(1).bool()
    shares = (scores * module.scaling).masked_fill(future, -torch.inf).softmax(-1)
    mixed = torch.einsum("nhts,nsc->nhtc", shares, latent)
    output = torch.einsum("nhtc,hvc->nthv", values(mixed.contiguous()), to_values)
    return module.o_proj(output.reshape(num_samples, num_tokens, -1)), None


def experts(
    module: Any, hidden: torch.Tensor, chosen: torch.Tensor, shares: torch.Tensor, inner: Rounding, outer: Rounding
) -> torch.Tensor:
    """Routed experts, each on its own tokens."""
    output = torch.zeros_like(hidden)
    for expert in range(module.num_experts):
        rows, places = torch.where(chosen == expert)
        if len(rows):
            gate, up = F.linear(inner(hidden[rows]), module.gate_up_proj[expert]).chunk(2, -1)
            found = F.linear(outer(module.act_fn(gate) * up), module.down_proj[expert])
            output.index_add_(0, rows, found * shares[rows, places, None])
    return output


def rounds_activations(model: Any, types: Mapping[str, str]) -> Any:
    """Makes transformers' DeepSeek-V3 round activations as llama.cpp does beside weights of these types."""

    def watch(linear: Any, tensor: str) -> None:
        rounding = rounding_beside(types[tensor])
        linear.register_forward_pre_hook(lambda _, arguments: (rounding(arguments[0]),))

    watch(model.lm_head, "output.weight")
    for number, layer in enumerate(model.model.layers):
        block, own = f"blk.{number}", layer.self_attn
        for name in ("q_a", "q_b", "output", "kv_a_mqa"):
            linear = {"output": "o_proj", "kv_a_mqa": "kv_a_proj_with_mqa"}.get(name, f"{name}_proj")
            watch(getattr(own, linear), f"{block}.attn_{name}.weight")
        sides = {side: rounding_beside(types[f"{block}.attn_{side[0]}_b.weight"]) for side in ("keys", "values")}
        own.forward = MethodType(partial(attention, **sides), own)
        mlp, suffix = layer.mlp, ""
        if hasattr(mlp, "experts"):
            inner, outer = (rounding_beside(types[f"{block}.ffn_{side}_exps.weight"]) for side in ("gate", "down"))
            mlp.experts.forward = MethodType(partial(experts, inner=inner, outer=outer), mlp.experts)
            mlp, suffix = mlp.shared_experts, "_shexp"
        for side in ("gate", "up", "down"):
            watch(getattr(mlp, f"{side}_proj"), f"{block}.ffn_{side}{suffix}.weight")
    return model


@torch.no_grad()
def run(model: Any, tokens_NT: torch.Tensor) -> torch.Tensor:
    """Log-probabilities, float64 [N, T, V]."""
    rows = (model(sample_T.unsqueeze(0), use_cache=False).logits for sample_T in tokens_NT)
    return torch.cat([logits.double().log_softmax(-1) for logits in rows])


def divergence(original_NTV: torch.Tensor, candidate_NTV: torch.Tensor) -> torch.Tensor:
    """KL of every predicted position."""
    return (original_NTV.exp() * (original_NTV - candidate_NTV)).sum(2)[:, :-1].flatten()


def against(wanted: torch.Tensor, found: torch.Tensor) -> str:
    """How much larger a mean is, with the standard error of the paired difference."""
    difference, scale = found - wanted, 100 / float(wanted.mean())
    error = scale * float(difference.std()) / len(difference) ** 0.5
    return f"{scale * float(difference.mean()):+.2f} ± {error:.2f} %"


@click.command()
@click.argument("type_names", nargs=-1, required=True)
@click.option("--text", "texts", multiple=True, help="A text file beside the shipped texts.")
def main(type_names: tuple[str, ...], texts: tuple[str, ...]) -> None:
    """Prints a row for each type."""
    folder = locate("tiny-r1")
    with tempfile.TemporaryDirectory() as work:
        make = partial(dsquant.gguf, evaluate=False, progress=False)
        original = open_original(str(make(type="F32", output=Path(work) / "F32").folders["gguf:F32"]))
        parts = [text_tokens(text, original.tokenizer, SEQ_LEN, SAMPLES) for text in (*HELD_OUT_TEXTS, *texts)]
        tokens_NT = torch.cat(parts)
        ours = run(full_model(folder, original.checkpoint.weights), tokens_NT)
        theirs = every_position(original.opened.files[0], tokens_NT)
        click.echo(
            "| type | positions | mean KL | decoded to F32 | as it is | rounding emulated | one token at a time |"
        )
        click.echo("|---|---|---|---|---|---|---|")
        for name in type_names:
            file = make(type=name, output=Path(work) / name).folders[f"gguf:{name}"]
            weights = open_candidate(str(file), original).weights
            types = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(file).tensors}
            plain = divergence(ours, run(full_model(folder, weights), tokens_NT))
            emulated = divergence(ours, run(rounds_activations(full_model(folder, weights), types), tokens_NT))
            exact = divergence(theirs, every_position(decoded(file, Path(work) / "decoded.gguf"), tokens_NT))
            batch, single = (divergence(theirs, every_position(file, tokens_NT, at_once)) for at_once in (512, 1))
            cells = (against(plain, exact), against(plain, batch), against(emulated, batch), against(batch, single))
            click.echo(f"| {name} | {len(plain)} | {float(plain.mean()):.5f} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()

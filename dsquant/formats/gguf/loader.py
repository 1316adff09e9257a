"""What llama.cpp's loader accepts: its rules for numbers and tensors, checked before the first weight is converted.

Reference: load_hparams in src/llama-model.cpp, and the `deepseek2`, `llama`, `qwen2` and `qwen3` of src/models.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from dsquant.formats.gguf.rope import rope_refusal
from dsquant.model.rotary import Rotary

Shapes = dict[str, tuple[int, ...]]

LARGEST_LAYERS, LARGEST_EXPERTS = 512, 1024
# Numbers of layers by which llama.cpp knows DeepSeek-V2-Lite and its kin, whose queries are projected directly.
LITE_LAYERS = (26, 27)
LITE_LAYERS_AND_TOKENS = (48, 128256)
# transformers normalizes latents with this epsilon whatever the config says, llama.cpp with the config's.
LATENT_EPSILON = 1e-6
LARGEST_EPSILON = 1e-4


def loading_problem(
    architecture: str, config: Mapping[str, Any], rotary: Rotary, shapes: Mapping[str, tuple[int, ...]], num_mtp: int
) -> str | None:
    """Says why llama.cpp would not load a file, or would compute another function with it; None where it is right.

    Args:
        architecture: `general.architecture`.
        config: the network's, with transformers' defaults filled in.
        rotary: the network's rotary embedding.
        shapes: the file's tensors, columns last.
        num_mtp: multi-token-prediction layers among them.

    Returns:
        The reason in words.
    """
    problem = number_problem(architecture, config) or rope_refusal(architecture, config, rotary)
    if problem:
        return problem
    needed, allowed = loader_tensors(architecture, config, num_mtp)
    for name, shape in shapes.items():
        wanted = needed.get(name, allowed.get(name))
        if wanted is None:
            return f"llama.cpp's {architecture} has no tensor {name!r}, and loads no file with one"
        if wanted != shape:
            return f"tensor {name!r} has the shape {list(shape)}, llama.cpp's {architecture} wants {list(wanted)}"
    missing = next((name for name in needed if name not in shapes), None)
    return f"llama.cpp's {architecture} needs tensor {missing!r}, which the model lacks" if missing else None


def number_problem(architecture: str, config: Mapping[str, Any]) -> str | None:
    """Says which number of a network llama.cpp does not load, or takes for another; None where there is none.

    Args:
        architecture: `general.architecture`.
        config: the network's, with transformers' defaults filled in.

    Returns:
        The reason in words.
    """
    return next(_number_problems(architecture, config), None)


def _number_problems(architecture: str, config: Mapping[str, Any]) -> Iterator[str]:
    if config["hidden_act"] not in ("silu", "swish"):
        yield f"hidden_act {config['hidden_act']!r}: llama.cpp's {architecture} computes silu"
    layers = config["num_hidden_layers"]
    if layers > LARGEST_LAYERS:
        yield f"num_hidden_layers {layers}: llama.cpp loads up to {LARGEST_LAYERS}"
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    if architecture == "qwen2" and heads * config["head_dim"] != hidden:
        yield f"{heads} heads of {config['head_dim']}: llama.cpp's qwen2 wants hidden_size {hidden} divided among them"
    if architecture == "deepseek2":
        yield from _deepseek_problems(config)


def _deepseek_problems(config: Mapping[str, Any]) -> Iterator[str]:
    layers = config["num_hidden_layers"]
    lite = layers in LITE_LAYERS or (layers, config["vocab_size"]) == LITE_LAYERS_AND_TOKENS
    if lite != (config["q_lora_rank"] is None):
        yield (
            f"q_lora_rank {config['q_lora_rank']} with {layers} layers: llama.cpp looks for directly projected queries "
            f"in models of {LITE_LAYERS[0]} or {LITE_LAYERS[1]} layers (or {LITE_LAYERS_AND_TOKENS[0]} with "
            f"{LITE_LAYERS_AND_TOKENS[1]} tokens), and nowhere else"
        )
    if not config["rope_interleave"]:
        yield "rope_interleave false: llama.cpp's deepseek2 rotates neighbouring dimensions"
    if config["n_routed_experts"] > LARGEST_EXPERTS:
        yield f"n_routed_experts {config['n_routed_experts']}: llama.cpp loads up to {LARGEST_EXPERTS}"
    if config["routed_scaling_factor"] == 0:
        yield "routed_scaling_factor 0: llama.cpp takes it for 1"
    if config["rms_norm_eps"] != LATENT_EPSILON and config["rms_norm_eps"] > LARGEST_EPSILON:
        yield (
            f"rms_norm_eps {config['rms_norm_eps']}: llama.cpp normalizes latents with it too, the model with "
            f"{LATENT_EPSILON}"
        )


def loader_tensors(architecture: str, config: Mapping[str, Any], num_mtp: int) -> tuple[Shapes, Shapes]:
    """The tensors that llama.cpp looks for.

    Args:
        architecture: `general.architecture`.
        config: the network's, with transformers' defaults filled in.
        num_mtp: multi-token-prediction layers that the file announces.

    Returns:
        Name -> shape, columns last, of those that it needs, and of those that it takes where they are.
    """
    hidden, vocabulary = config["hidden_size"], config["vocab_size"]
    needed: Shapes = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    allowed: Shapes = {"output.weight": (vocabulary, hidden)}
    layers = config["num_hidden_layers"]
    for layer in range(layers + num_mtp):
        block = f"blk.{layer}"
        needed |= {f"{block}.attn_norm.weight": (hidden,), f"{block}.ffn_norm.weight": (hidden,)}
        if architecture == "deepseek2":
            needed |= _latent_attention(block, config)
            dense = layer < config["first_k_dense_replace"]
            needed |= _mlp(block, hidden, config["intermediate_size"]) if dense else _mixture(block, config)
            allowed |= {} if dense else {f"{block}.exp_probs_b.bias": (config["n_routed_experts"],)}
        else:
            more_needed, more_allowed = _attention(block, architecture, config)
            needed |= more_needed | _mlp(block, hidden, config["intermediate_size"])
            allowed |= more_allowed
        if layer >= layers:
            needed[f"{block}.nextn.eh_proj.weight"] = (hidden, 2 * hidden)
            needed |= {f"{block}.nextn.{norm}.weight": (hidden,) for norm in ("enorm", "hnorm")}
            allowed |= {f"{block}.nextn.{name}.weight": (vocabulary, hidden) for name in _MTP_TABLES}
            allowed[f"{block}.nextn.shared_head_norm.weight"] = (hidden,)
    if architecture == "llama":
        allowed["rope_freqs.weight"] = (config["head_dim"] // 2,)
    return needed, allowed


_MTP_TABLES = ("embed_tokens", "shared_head_head")


def _attention(block: str, architecture: str, config: Mapping[str, Any]) -> tuple[Shapes, Shapes]:
    hidden, head = config["hidden_size"], config["head_dim"]
    queries, keys = config["num_attention_heads"] * head, config["num_key_value_heads"] * head
    rows = {"q": queries, "k": keys, "v": keys}
    needed: Shapes = {f"{block}.attn_{kind}.weight": (size, hidden) for kind, size in rows.items()}
    needed[f"{block}.attn_output.weight"] = (hidden, queries)
    biases: Shapes = {f"{block}.attn_{kind}.bias": (size,) for kind, size in rows.items()}
    if architecture == "qwen2":  # older versions of llama.cpp need them
        return needed | biases, {}
    if architecture == "qwen3":
        return needed | {f"{block}.attn_{kind}_norm.weight": (head,) for kind in "qk"}, biases
    return needed, biases | {f"{block}.attn_output.bias": (hidden,)}


def _latent_attention(block: str, config: Mapping[str, Any]) -> Shapes:
    hidden, heads, latent = config["hidden_size"], config["num_attention_heads"], config["kv_lora_rank"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query = config["q_lora_rank"]
    rows = heads * (nope + rope)
    shapes: Shapes = {
        f"{block}.attn_kv_a_mqa.weight": (latent + rope, hidden),
        f"{block}.attn_kv_a_norm.weight": (latent,),
        f"{block}.attn_k_b.weight": (heads, latent, nope),
        f"{block}.attn_v_b.weight": (heads, value, latent),
        f"{block}.attn_output.weight": (hidden, heads * value),
    }
    if query is None:
        return shapes | {f"{block}.attn_q.weight": (rows, hidden)}
    return shapes | {
        f"{block}.attn_q_a.weight": (query, hidden),
        f"{block}.attn_q_a_norm.weight": (query,),
        f"{block}.attn_q_b.weight": (rows, query),
    }


def _mlp(block: str, hidden: int, width: int, suffix: str = "") -> Shapes:
    return {
        f"{block}.ffn_gate{suffix}.weight": (width, hidden),
        f"{block}.ffn_up{suffix}.weight": (width, hidden),
        f"{block}.ffn_down{suffix}.weight": (hidden, width),
    }


def _mixture(block: str, config: Mapping[str, Any]) -> Shapes:
    hidden, width, experts = config["hidden_size"], config["moe_intermediate_size"], config["n_routed_experts"]
    routed = {name: (experts, *shape) for name, shape in _mlp(block, hidden, width, "_exps").items()}
    shared = _mlp(block, hidden, width * config["n_shared_experts"], "_shexp")
    return routed | shared | {f"{block}.ffn_gate_inp.weight": (experts, hidden)}

"""Small real checkpoints that the tests make: R1's layout (FP8 blocks, split shards) and the dense distills."""

import json
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

PICO_R1: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "model_type": "deepseek_v3",
    "hidden_size": 256,
    "num_hidden_layers": 5,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "intermediate_size": 320,
    "moe_intermediate_size": 192,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "n_group": 4,
    "topk_group": 2,
    "topk_method": "noaux_tc",
    "scoring_func": "sigmoid",
    "norm_topk_prob": True,
    "routed_scaling_factor": 2.5,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "q_lora_rank": 128,
    "kv_lora_rank": 128,
    "qk_nope_head_dim": 64,
    "qk_rope_head_dim": 64,
    "v_head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000,
    "rope_scaling": {
        "type": "yarn",
        "factor": 8,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 512,
    },
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "num_nextn_predict_layers": 1,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "torch_dtype": "bfloat16",
}
R1: dict[str, Any] = PICO_R1 | {
    "hidden_size": 7168, "num_hidden_layers": 61, "first_k_dense_replace": 3, "intermediate_size": 18432,
    "moe_intermediate_size": 2048, "n_routed_experts": 256, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
    "num_attention_heads": 128, "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512,
    "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip
FP8 = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
PLAIN = ("embed_tokens", "lm_head", "mlp.gate.", "eh_proj", "shared_head")
DENSE = {
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "intermediate_size": 384,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 300,
    "max_position_embeddings": 1024,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
QWEN2 = {**DENSE, "architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"}
QWEN3 = {**DENSE, "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "tie_word_embeddings": True}
LLAMA = {**DENSE, "architectures": ["LlamaForCausalLM"], "model_type": "llama"}


def quantize_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Block-wise FP8 as DeepSeek stores it: e4m3 and one float32 scale for each begun 128x128 block."""
    rows, columns = -(-weight.shape[0] // 128), -(-weight.shape[1] // 128)
    padded = torch.zeros(rows * 128, columns * 128)
    padded[: weight.shape[0], : weight.shape[1]] = weight
    blocks = padded.view(rows, 128, columns, 128)
    scales = blocks.abs().amax((1, 3)).clamp(min=1e-12) / 448
    stored = (blocks / scales[:, None, :, None]).reshape(padded.shape)[: weight.shape[0], : weight.shape[1]]
    return stored.to(torch.float8_e4m3fn).contiguous(), scales


def r1_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a DeepSeek-V3 checkpoint, written down independently of dsquant."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    nope, rope, value = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    query, latent, vocabulary = config["q_lora_rank"], config["kv_lora_rank"], config["vocab_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        "lm_head.weight": (vocabulary, hidden),
    }
    num_mtp = config["num_nextn_predict_layers"]
    for layer in range(config["num_hidden_layers"] + num_mtp):
        prefix = f"model.layers.{layer}"
        shapes |= {
            f"{prefix}.input_layernorm.weight": (hidden,),
            f"{prefix}.post_attention_layernorm.weight": (hidden,),
            f"{prefix}.self_attn.q_a_proj.weight": (query, hidden),
            f"{prefix}.self_attn.q_a_layernorm.weight": (query,),
            f"{prefix}.self_attn.q_b_proj.weight": (heads * (nope + rope), query),
            f"{prefix}.self_attn.kv_a_proj_with_mqa.weight": (latent + rope, hidden),
            f"{prefix}.self_attn.kv_a_layernorm.weight": (latent,),
            f"{prefix}.self_attn.kv_b_proj.weight": (heads * (nope + value), latent),
            f"{prefix}.self_attn.o_proj.weight": (hidden, heads * value),
        }
        if query is None:  # Moonlight projects queries directly
            for name in ("q_a_proj", "q_a_layernorm", "q_b_proj"):
                del shapes[f"{prefix}.self_attn.{name}.weight"]
            shapes[f"{prefix}.self_attn.q_proj.weight"] = (heads * (nope + rope), hidden)
        if config["attention_bias"]:
            biases = {"q_a_proj": query, "kv_a_proj_with_mqa": latent + rope, "o_proj": hidden}
            shapes |= {f"{prefix}.self_attn.{name}.bias": (size,) for name, size in biases.items()}
        if layer < config["first_k_dense_replace"]:
            mlps = {f"{prefix}.mlp": config["intermediate_size"]}
        else:
            width = config["moe_intermediate_size"]
            mlps = {f"{prefix}.mlp.experts.{expert}": width for expert in range(config["n_routed_experts"])}
            mlps[f"{prefix}.mlp.shared_experts"] = width * config["n_shared_experts"]
            shapes[f"{prefix}.mlp.gate.weight"] = (config["n_routed_experts"], hidden)
            shapes[f"{prefix}.mlp.gate.e_score_correction_bias"] = (config["n_routed_experts"],)
        for name, width in mlps.items():
            shapes[f"{name}.gate_proj.weight"] = shapes[f"{name}.up_proj.weight"] = (width, hidden)
            shapes[f"{name}.down_proj.weight"] = (hidden, width)
        if layer >= config["num_hidden_layers"]:
            shapes |= {
                f"{prefix}.enorm.weight": (hidden,),
                f"{prefix}.hnorm.weight": (hidden,),
                f"{prefix}.eh_proj.weight": (hidden, 2 * hidden),
                f"{prefix}.shared_head.norm.weight": (hidden,),
                f"{prefix}.shared_head.head.weight": (vocabulary, hidden),
                f"{prefix}.embed_tokens.weight": (vocabulary, hidden),
            }
    return shapes


def dense_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every weight of a Qwen2, Qwen3 or Llama checkpoint."""
    hidden, width, head = config["hidden_size"], config["intermediate_size"], config["head_dim"]
    sizes = {"q": config["num_attention_heads"] * head, "k": config["num_key_value_heads"] * head}
    sizes["v"] = sizes["k"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}.{norm}.weight"] = (hidden,)
        for kind, size in sizes.items():
            shapes[f"{prefix}.self_attn.{kind}_proj.weight"] = (size, hidden)
            if config["model_type"] == "qwen2" or config.get("attention_bias"):
                shapes[f"{prefix}.self_attn.{kind}_proj.bias"] = (size,)
        if config["model_type"] == "qwen3":
            shapes[f"{prefix}.self_attn.q_norm.weight"] = shapes[f"{prefix}.self_attn.k_norm.weight"] = (head,)
        if config.get("attention_bias"):
            shapes[f"{prefix}.self_attn.o_proj.bias"] = (hidden,)
        shapes[f"{prefix}.self_attn.o_proj.weight"] = (hidden, sizes["q"])
        shapes[f"{prefix}.mlp.gate_proj.weight"] = shapes[f"{prefix}.mlp.up_proj.weight"] = (width, hidden)
        shapes[f"{prefix}.mlp.down_proj.weight"] = (hidden, width)
    return shapes


def random_weights(shapes: dict[str, tuple[int, ...]], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random float32 weights at the scale of trained ones."""
    generator = torch.Generator().manual_seed(seed)

    def make(name: str, shape: tuple[int, ...]) -> torch.Tensor:
        values = torch.randn(shape, generator=generator)
        if len(shape) == 2:
            return values / shape[1] ** 0.5
        return values * 0.1 + (0.0 if name.endswith("bias") else 1.0)

    return {name: make(name, shape) for name, shape in shapes.items()}


def put_outliers_into_norms(config: dict[str, Any], weights: dict[str, torch.Tensor], seed: int = 1) -> None:
    """Multiplies every norm's gain by a log-normal vector with x50 channels and divides every consumer's columns."""
    generator = torch.Generator().manual_seed(seed)
    suffixes = {
        "input_layernorm": ("self_attn.q_a_proj", "self_attn.kv_a_proj_with_mqa"),
        "self_attn.q_a_layernorm": ("self_attn.q_b_proj",),
        "self_attn.kv_a_layernorm": ("self_attn.kv_b_proj",),
        "post_attention_layernorm": ("gate_proj", "up_proj", "mlp.gate"),
    }
    for layer in range(config["num_hidden_layers"] + config["num_nextn_predict_layers"]):
        prefix = f"model.layers.{layer}."
        for norm, consumers in suffixes.items():
            gain = weights[f"{prefix}{norm}.weight"]
            factor = torch.exp(torch.randn(len(gain), generator=generator))
            factor[torch.randperm(len(gain), generator=generator)[:4]] *= 50
            gain.mul_(factor)
            for name, weight in weights.items():
                if name.startswith(prefix) and name.removesuffix(".weight").endswith(consumers):
                    weight.div_(factor)


def stored(weights: dict[str, torch.Tensor], fp8: bool) -> dict[str, torch.Tensor]:
    """The tensors as a release stores them: FP8 linears with scales, F32 router bias, the rest BF16."""
    tensors: dict[str, torch.Tensor] = {}
    for name, weight in weights.items():
        plain = any(part in name for part in PLAIN)
        if name.endswith("e_score_correction_bias"):
            tensors[name] = weight
        elif fp8 and weight.dim() == 2 and not plain:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_fp8(weight)
        else:
            tensors[name] = weight.to(torch.bfloat16)
    return tensors


def save_checkpoint(
    folder: Path, config: dict[str, Any], tensors: dict[str, torch.Tensor], num_shards: int = 3
) -> Path:
    """Writes shards that layers and pairs straddle, their index, config.json and no tokenizer."""
    folder.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    weight_map = {name: f"model-{number % num_shards + 1:05d}.safetensors" for number, name in enumerate(names)}
    for file_name in sorted(set(weight_map.values())):
        save_file({name: tensors[name] for name in names if weight_map[name] == file_name}, folder / file_name)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_pico_r1(folder: Path, outliers: bool = False, seed: int = 0, **changes: Any) -> Path:
    """A random 5-layer DeepSeek-V3 checkpoint with ragged FP8 blocks and an MTP layer."""
    config = {**PICO_R1, **changes, "quantization_config": FP8}
    weights = random_weights(r1_shapes(config), seed)
    if outliers:
        put_outliers_into_norms(config, weights)
    return save_checkpoint(folder, config, stored(weights, fp8=True))


def make_r1_headers(folder: Path) -> Path:
    """R1's 61 layers and MTP layer as files of headers with holes where the weights would be: 689 GB in 20 MB."""
    folder.mkdir()
    config = {**R1, "quantization_config": FP8}
    weight_map: dict[str, str] = {}
    headers: dict[str, dict[str, Any]] = {}
    ends: dict[str, int] = {}
    for name, shape in r1_shapes(config).items():
        scales = tuple(-(-extent // 128) for extent in shape)
        parts = {name: ("BF16", 2, shape)}
        if name.endswith("e_score_correction_bias"):
            parts = {name: ("F32", 4, shape)}
        elif len(shape) == 2 and not any(part in name for part in PLAIN):
            parts = {name: ("F8_E4M3", 1, shape), f"{name}_scale_inv": ("F32", 4, scales)}
        layer = name.split(".")[2] if ".layers." in name else "others"
        for part, (dtype, size, extents) in parts.items():
            weight_map[part] = file_name = f"model-{layer}.safetensors"
            start = ends.get(file_name, 0)
            ends[file_name] = start + size * prod(extents)
            offsets = [start, ends[file_name]]
            headers.setdefault(file_name, {})[part] = {"dtype": dtype, "shape": extents, "data_offsets": offsets}
    for file_name, header in headers.items():
        raw = json.dumps(header).encode()
        with (folder / file_name).open("wb") as file:
            file.write(len(raw).to_bytes(8, "little") + raw)
            file.truncate(8 + len(raw) + ends[file_name])
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(config))
    return add_tokenizer(folder)


def make_dense(folder: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """A random dense BF16 checkpoint of an R1-Distill family."""
    tensors = stored(random_weights(dense_shapes(config), seed), fp8=False)
    return save_checkpoint(folder, {**config, "torch_dtype": "bfloat16"}, tensors, num_shards=2)


def add_tokenizer(folder: Path, vocabulary: int = 300) -> Path:
    """Puts a byte-level BPE with DeepSeek's special tokens into a checkpoint folder."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bos, eos = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[bos, eos, "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text()], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": bos, "eos_token": eos}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def put_into_norm(folder: Path, layer: int, value: float) -> None:
    """Makes every gain of a layer's first norm the same number."""
    for path in folder.glob("*.safetensors"):
        tensors = load_file(path)
        name = f"model.layers.{layer}.input_layernorm.weight"
        if name in tensors:
            tensors[name] = torch.full_like(tensors[name], value)
            save_file(tensors, path)


def full_model(folder: Path, weights: Mapping[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' whole model in float32 with the given weights put in: shares nothing with dsquant's streaming."""
    import transformers

    config = json.loads((folder / "config.json").read_text())
    name = config["architectures"][0].removesuffix("ForCausalLM") + "Config"
    dropped = ("quantization_config", "torch_dtype")
    config = getattr(transformers, name).from_dict({k: v for k, v in config.items() if k not in dropped})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    state = {}
    for key in model.state_dict():
        prefix, _, part = key.rpartition(".")
        if part == "gate_up_proj":
            pairs = [
                [weights[f"{prefix}.{e}.{kind}_proj.weight"] for kind in ("gate", "up")]
                for e in range(config.n_routed_experts)
            ]
            state[key] = torch.stack([torch.cat(pair) for pair in pairs])
        elif part == "down_proj" and prefix.endswith("experts"):
            state[key] = torch.stack(
                [weights[f"{prefix}.{e}.down_proj.weight"] for e in range(config.n_routed_experts)]
            )
        elif key == "lm_head.weight" and config.tie_word_embeddings:
            state[key] = weights["model.embed_tokens.weight"]
        else:
            state[key] = weights[key]
    model.load_state_dict(state)
    return model.eval()

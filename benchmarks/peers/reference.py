"""An evaluator that shares no code with dsquant: transformers' whole model in memory, float32, on the CPU.

    python -m benchmarks.peers.reference ORIGINAL TOKENS [CANDIDATE]... [--rounding]

It prints, for the original and each candidate folder, perplexity, the mean KL divergence from the original
and how often both prefer the same token. A candidate is AWQ GEMM, compressed-tensors pack-quantized, GPTQ, GGUF
(`decoding.py` here reads these), FP8 or plain; a DeepSeek-V3 or, in GGUF or plain, a Llama.

Use it for models that fit in memory; in tests `reference_logits` is the oracle for dsquant's streamed
evaluation.
"""

import argparse
import json
import re
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DeepseekV32Config,
    DeepseekV32ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
)

from benchmarks.peers.decoding import DECODERS, decode_gguf
from benchmarks.peers.rounded_inputs import input_scales, round_inputs
from benchmarks.peers.to_bf16 import dequantized_tensors, is_mtp, read_config, read_tensors
from benchmarks.peers.tokens import read_tokens

BATCH_SIZE = 4
"""Windows in one forward."""
NETWORKS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "deepseek_v3": (DeepseekV3Config, DeepseekV3ForCausalLM),
    "deepseek_v32": (DeepseekV32Config, DeepseekV32ForCausalLM),
    "llama": (LlamaConfig, LlamaForCausalLM),
}
"""`model_type` -> transformers' own classes."""


@dataclass(frozen=True)
class Divergence:
    """What a candidate costs; all figures are means over every position that has a next token."""

    perplexity: float
    mean_kl: float
    """KL(original || candidate) per token, in nats."""
    mean_kl_standard_error: float
    """Standard error of `mean_kl`, from the means of the windows."""
    top_1_agreement: float


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The decoder's weights in float32, without the MTP layer, whatever the checkpoint's format.

    Raises:
        ValueError: a format that this file does not know.
    """
    config = read_config(folder)
    quantization = config.get("quantization_config", {})
    method = quantization.get("quant_method", "fp8")
    if method == "fp8":
        weights = dequantized_tensors(folder)
    elif method == "gguf":
        weights = decode_gguf(folder)
    elif method in DECODERS:
        weights = DECODERS[method](read_tensors(folder), quantization)
    else:
        raise ValueError(f"{folder}: quant_method {method!r}, expected fp8, gguf or one of {sorted(DECODERS)}")
    return {name: w for name, w in weights.items() if not is_mtp(name, config["num_hidden_layers"])}


def is_rounded(name: str) -> bool:
    """Whether plain rounding quantizes a tensor: every linear of a decoder layer, not the router nor an indexer's."""
    return re.search(r"^model\.layers\.\d+\.(?!.*indexer).*_proj(_with_mqa)?\.weight$", name) is not None


def round_to_nearest(weight_OI: torch.Tensor, symmetric: bool, bits: int = 4, group_size: int = 128) -> torch.Tensor:
    """Plain rounding with float32 scales, the range of each group of a row spanned in full.

    Symmetric: codes -8..7, scale = max|w| / 7.5 (compressed-tensors). Asymmetric: codes 0..15, scale =
    (max - min) / 15 and an integer zero point, the range widened to hold 0.

    Args:
        weight_OI: float32 [O, I], I a multiple of the group size.
        symmetric: which of the two.
        bits: bits of a code.
        group_size: columns that share a scale.

    Returns:
        float32 [O, I].
    """
    groups_OGS = weight_OI.unflatten(1, (-1, group_size))
    levels = 2**bits - 1
    if symmetric:
        scale = groups_OGS.abs().amax(-1, keepdim=True).clamp(min=1e-12) * 2 / levels
        low_code, zero_point = -(2 ** (bits - 1)), 0
    else:
        low = groups_OGS.amin(-1, keepdim=True).clamp(max=0)
        high = groups_OGS.amax(-1, keepdim=True).clamp(min=0)
        scale = ((high - low) / levels).clamp(min=1e-12)
        low_code, zero_point = 0, (-low / scale).round()
    codes = ((groups_OGS / scale).round() + zero_point).clamp(low_code, low_code + levels)
    return ((codes - zero_point) * scale).flatten(1)


def rounded_weights(
    weights: dict[str, torch.Tensor], symmetric: bool, bits: int = 4, group_size: int = 128
) -> dict[str, torch.Tensor]:
    """The weights with every decoder linear rounded to nearest."""
    return {
        name: round_to_nearest(weight, symmetric, bits, group_size) if is_rounded(name) else weight
        for name, weight in weights.items()
    }


def with_fused_experts(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """transformers 5's names: a layer's experts as `gate_up_proj` [E, 2M, H] and `down_proj` [E, H, M]."""
    expert = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight")
    fused = {name: tensor for name, tensor in weights.items() if not expert.fullmatch(name)}
    found = [match.groups() for match in map(expert.fullmatch, weights) if match]
    for layer in {prefix for prefix, _, _ in found}:
        count = 1 + max(int(index) for prefix, index, _ in found if prefix == layer)
        stacks = {
            projection: torch.stack([weights[f"{layer}.{index}.{projection}.weight"] for index in range(count)])
            for projection in ("gate_proj", "up_proj", "down_proj")
        }
        fused[f"{layer}.gate_up_proj"] = torch.cat([stacks["gate_proj"], stacks["up_proj"]], dim=1)
        fused[f"{layer}.down_proj"] = stacks["down_proj"]
    return fused


def build_model(folder: Path, weights: dict[str, torch.Tensor]) -> PreTrainedModel:
    """transformers' model from the folder's config with these weights.

    Args:
        folder: whose config.json is read.
        weights: name -> float32, one tensor for each expert; every parameter of the model and nothing else, but for a
            head that is the embedding too.

    Returns:
        The model in float32 on the CPU, in evaluation mode.
    """
    config_values = read_config(folder) | {"num_nextn_predict_layers": 0}
    config_values.pop("quantization_config", None)
    config_class, model_class = NETWORKS[config_values["model_type"]]
    config = config_class.from_dict(config_values)
    with torch.device("meta"):
        model = model_class(config)
    if config.tie_word_embeddings:
        weights = {"lm_head.weight": weights["model.embed_tokens.weight"]} | weights
    model.load_state_dict(with_fused_experts(weights), strict=True, assign=True)
    # Buffers that no checkpoint holds are still on the meta device: the rotary frequencies.
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    if config.model_type.startswith("deepseek"):
        model.set_experts_implementation("eager")
    return model.float().eval()


@torch.no_grad()
def model_logits(model: PreTrainedModel, tokens_NT: torch.Tensor) -> torch.Tensor:
    """Logits float32 [N, T, V] of int64 tokens [N, T], where the model is."""
    batches = tokens_NT.to(model.device).split(BATCH_SIZE)
    return torch.cat([model(batch, use_cache=False).logits for batch in batches])


def reference_logits(folder: Path, tokens_NT: torch.Tensor) -> torch.Tensor:
    """What the checkpoint in a folder computes: float32 logits [N, T, V] of int64 tokens [N, T]."""
    return model_logits(build_model(folder, read_weights(folder)), tokens_NT)


def divergence(original_NTV: torch.Tensor, candidate_NTV: torch.Tensor, tokens_NT: torch.Tensor) -> Divergence:
    """Compares the candidate's predictions with the original's.

    Args:
        original_NTV: logits float32 [N, T, V].
        candidate_NTV: logits float32 [N, T, V].
        tokens_NT: int64 [N, T]; a window's last position predicts nothing and is left out.

    Returns:
        The means over N * (T - 1) positions, summed in float64.
    """
    negative_log_likelihood, kl_per_window, agreement = [], [], []
    for original, candidate, tokens in zip(original_NTV, candidate_NTV, tokens_NT, strict=True):
        log_p = original[:-1].double().log_softmax(-1)
        log_q = candidate[:-1].double().log_softmax(-1)
        negative_log_likelihood.append(-log_q.gather(1, tokens[1:, None]).mean())
        kl_per_window.append((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        agreement.append((log_p.argmax(-1) == log_q.argmax(-1)).double().mean())
    kl = torch.stack(kl_per_window)
    standard_error = float(kl.std() / len(kl) ** 0.5) if len(kl) > 1 else float("nan")
    return Divergence(
        perplexity=float(torch.stack(negative_log_likelihood).mean().exp()),
        mean_kl=float(kl.mean()),
        mean_kl_standard_error=standard_error,
        top_1_agreement=float(torch.stack(agreement).mean()),
    )


class Evaluator:
    """Compares candidates with one original on named texts; the original's predictions are computed once."""

    def __init__(self, original: Path, texts: dict[str, torch.Tensor], device: str = "cpu") -> None:
        """Runs the original.

        Args:
            original: the folder of the original.
            texts: name -> tokens, int64 [N, T].
            device: where models run and predictions lie.
        """
        self.original, self.device = original, device
        self.texts = {name: tokens_NT.to(device) for name, tokens_NT in texts.items()}
        self.weights = read_weights(original)
        model = build_model(original, self.weights).to(device)
        self.predictions = {name: model_logits(model, tokens_NT) for name, tokens_NT in texts.items()}

    def of_original(self) -> dict[str, Divergence]:
        """The original's own figures by text."""
        return {
            name: divergence(self.predictions[name], self.predictions[name], self.texts[name]) for name in self.texts
        }

    def of_rounding(self, symmetric: bool, bits: int = 4, group_size: int = 128) -> dict[str, Divergence]:
        """Plain rounding's figures by text."""
        return self._compare(build_model(self.original, rounded_weights(self.weights, symmetric, bits, group_size)))

    def of_folder(self, folder: Path) -> dict[str, Divergence]:
        """A candidate's figures by text; where it has engines round inputs to NVFP4, they are."""
        model, quantization = build_model(folder, read_weights(folder)), read_config(folder).get("quantization_config")
        if quantization and quantization.get("quant_method") in ("compressed-tensors", "modelopt"):
            round_inputs(model, input_scales(read_tensors(folder), quantization))
        return self._compare(model)

    def _compare(self, model: PreTrainedModel) -> dict[str, Divergence]:
        model = model.to(self.device)
        return {
            name: divergence(self.predictions[name], model_logits(model, tokens_NT), tokens_NT)
            for name, tokens_NT in self.texts.items()
        }


def main() -> None:
    """Parses the command line and prints one JSON object: label -> figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("candidates", type=Path, nargs="*")
    parser.add_argument("--rounding", action="store_true", help="plain rounding of the original too")
    arguments = parser.parse_args()
    evaluator = Evaluator(arguments.original, {"text": read_tokens(arguments.tokens)})
    rows = {"original": evaluator.of_original()}
    for symmetric in (True, False) if arguments.rounding else ():
        rows[f"plain rounding, {'symmetric' if symmetric else 'asymmetric'}"] = evaluator.of_rounding(symmetric)
    rows |= {str(folder): evaluator.of_folder(folder) for folder in arguments.candidates}
    print(json.dumps({label: asdict(row["text"]) for label, row in rows.items()}, indent=2))


if __name__ == "__main__":
    main()

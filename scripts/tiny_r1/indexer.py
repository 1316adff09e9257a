"""DeepSeek-V3.2's indexers, trained beside a network that sees all keys, to score keys as its attention weighs them.

This is the dense warm-up of DeepSeek-V3.2-Exp (its report, section 2.1): the loss is the KL divergence of the softmax
of the scores from attention's weights, averaged over heads; the network itself stays as it is.

Shape legend: N samples, T tokens (of queries; S of keys), H hidden size, Q width of the latent queries, K index heads,
D their width.
"""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from tiny_r1.network import Config, TinyR1

# Of 4,096 tokens; the releases choose 2,048 of up to 163,840.
KEYS: Config = {
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_head_dim": 128,
    "index_n_heads": 16,
    "index_topk": 512,
}
RATE = 1e-3
WARMUP = 20


class Indexer(nn.Module):
    """One layer's, with the names of a release."""

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.heads, self.width, self.rotated = KEYS["index_n_heads"], KEYS["index_head_dim"], config["qk_rope_head_dim"]
        self.wq_b = nn.Linear(config["q_lora_rank"], self.heads * self.width, bias=False)
        self.wk = nn.Linear(config["hidden_size"], self.width, bias=False)
        self.k_norm = nn.LayerNorm(self.width, eps=1e-6)
        self.weights_proj = nn.Linear(config["hidden_size"], self.heads, bias=False)

    def scores(self, hidden_NTH: torch.Tensor, queries_NTQ: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Scores of every key for every query, float32 [N, T, S]; later keys are not masked."""
        queries_NTKD = self._rotate(self.wq_b(queries_NTQ).unflatten(2, (self.heads, self.width)), rotary)
        keys_NS1D = self._rotate(self.k_norm(self.wk(hidden_NTH)).unsqueeze(2), rotary)
        products_NTKS = torch.einsum("ntkd,nsd->ntks", queries_NTKD, keys_NS1D.squeeze(2)) * self.width**-0.5
        weights_NTK = self.weights_proj(hidden_NTH) * self.heads**-0.5
        return torch.einsum("ntk,ntks->nts", weights_NTK, products_NTKS.relu()).float()

    def _rotate(self, values: torch.Tensor, rotary: Any) -> torch.Tensor:
        """Rotates the first dimensions by halves, where attention rotates neighbours."""
        cos, sin = (part.unsqueeze(2) for part in rotary)
        turned, rest = values[..., : self.rotated], values[..., self.rotated :]
        first, second = turned.chunk(2, dim=-1)
        return torch.cat([turned * cos + torch.cat([-second, first], dim=-1) * sin, rest], dim=-1)


def train(
    model: TinyR1, tokens: torch.Tensor, num_tokens: int, batch: int, seq_len: int, log: Callable[[str], None],
    seconds: float = math.inf,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Trains an indexer for every layer on random windows of a stream of tokens; returns their weights by their names.

    The schedule ends with the tokens; `seconds` may end training before.
    """
    device, losses = tokens.device, dict[int, torch.Tensor]()
    layers = model.model.model.layers
    indexers = nn.ModuleList(Indexer(model.config) for _ in layers).to(device)
    optimizer = torch.optim.AdamW(indexers.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.0)

    def learn(number: int) -> Any:
        def after(attention: Any, _: Any, read: dict[str, Any], made: tuple[torch.Tensor, torch.Tensor]) -> None:
            hidden_NTH, rotary = read["hidden_states"], read["position_embeddings"]
            queries_NTQ = attention.q_a_layernorm(attention.q_a_proj(hidden_NTH))
            wanted_NTS = made[1].float().mean(1)
            with torch.enable_grad():
                scores_NTS = indexers[number].scores(hidden_NTH, queries_NTQ, rotary)
                later = torch.ones_like(scores_NTS[0], dtype=torch.bool).triu(1)
                log_shares_NTS = scores_NTS.masked_fill(later, -torch.inf).log_softmax(-1).masked_fill(later, 0)
                losses[number] = F.kl_div(log_shares_NTS, wanted_NTS, reduction="sum") / wanted_NTS[..., 0].numel()
                losses[number].backward()

        return after

    model.model.set_attn_implementation("eager")  # the only one that tells its weights
    model.masked = True
    hooks = [
        layer.self_attn.register_forward_hook(learn(number), with_kwargs=True) for number, layer in enumerate(layers)
    ]
    steps, started, offsets = (
        max(1, num_tokens // (batch * seq_len)),
        time.monotonic(),
        torch.arange(seq_len, device=device),
    )
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                RATE * min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        starts = torch.randint(0, len(tokens) - seq_len, (batch, 1), device=device)
        with torch.no_grad(), torch.autocast(device.type, dtype=torch.bfloat16):
            model.logits(tokens[starts + offsets].long())
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        elapsed = time.monotonic() - started
        if step % 100 == 0 or step == steps - 1 or elapsed > seconds:
            found = ", ".join(f"{loss.item():.3f}" for loss in losses.values())
            log(f"indexers: step {step}/{steps}, divergence by layer {found}, {elapsed:.0f} s")
        if elapsed > seconds:
            break
    for hook in hooks:
        hook.remove()
    model.model.set_attn_implementation("sdpa")
    model.masked = False
    return {
        f"model.layers.{number}.self_attn.indexer.{name}": tensor.detach().float().cpu().clone()
        for number, one in enumerate(indexers)
        for name, tensor in one.state_dict().items()
    }

"""Training: AdamW with a cosine schedule, bfloat16 autocast, router biases moved towards balance."""

import math
import time
from collections.abc import Callable

import torch

from tiny_r1.network import TinyR1

MTP_SHARE = 0.2
WARMUP = 100
BIAS_STEP = 0.003
# The first steps compile and warm up; those up to TIMED_STEPS tell what a step takes.
SLOW_STEPS, TIMED_STEPS = 10, 40


def train(
    model: TinyR1,
    tokens: torch.Tensor,
    num_tokens: int,
    batch: int,
    seq_len: int,
    rate: float,
    log: Callable[[str], None],
    seconds: float = math.inf,
) -> int:
    """Trains on random windows of a stream of tokens.

    Args:
        model: the network, on its device.
        tokens: int16 or int32 [all], on the same device.
        num_tokens: how many to train on.
        batch: samples of a step.
        seq_len: tokens of a sample.
        rate: the highest learning rate.
        log: gets a line from time to time.
        seconds: how long to train at most; a shorter run still ends at the schedule's end.

    Returns:
        How many tokens it trained on.
    """
    device = tokens.device
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() <= 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=device.type == "cuda")
    if device.type == "cuda":
        compile_layers(model)
    steps = max(1, num_tokens // (batch * seq_len))
    started = time.monotonic()
    offsets = torch.arange(seq_len, device=device)
    step = 0
    while step < steps:
        if step == SLOW_STEPS:
            settled = _now(device)
        elif step == TIMED_STEPS:
            per_step = (_now(device) - settled) / (TIMED_STEPS - SLOW_STEPS)
            left = seconds - (_now(device) - started)
            log(f"{1000 * per_step:.0f} ms a step, {batch * seq_len / per_step:.0f} tokens a second")
            steps = min(steps, step + max(1, int(left / per_step))) if left < math.inf else steps
        scale = min(1.0, (step + 1) / WARMUP) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimizer.param_groups:
            group["lr"] = rate * scale
        starts = torch.randint(0, len(tokens) - seq_len, (batch, 1), device=device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            first, second = model.losses(tokens[starts + offsets].long())
        (first + MTP_SHARE * second).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        model.balance(BIAS_STEP * scale)
        if step % 100 == 0 or step == steps - 1:
            elapsed = time.monotonic() - started
            log(f"step {step}/{steps} loss {first.item():.3f} mtp {second.item():.3f} {elapsed:.0f} s")
        step += 1
    torch.compiler.set_stance("force_eager")  # what comes after the training has other shapes
    return steps * batch * seq_len


def compile_layers(model: TinyR1) -> None:
    """Has the decoder's layers compiled when they first run: one graph for dense ones and one for mixtures.

    What cannot be compiled runs as it is. The MTP layer does, too: its samples are a token shorter.
    """
    torch._dynamo.config.suppress_errors = True
    for layer in model.model.model.layers[: model.num_layers]:
        layer.compile(dynamic=False)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.monotonic()


@torch.no_grad()
def evaluate(model: TinyR1, tokens: torch.Tensor, seq_len: int, num_samples: int) -> tuple[float, float]:
    """Mean losses of the next token and of the token after next on the first samples of a stream."""
    sums = torch.zeros(2)
    count = min(num_samples, len(tokens) // seq_len)
    for sample in tokens[: count * seq_len].view(count, 1, seq_len):
        with torch.autocast(sample.device.type, dtype=torch.bfloat16):
            sums += torch.tensor([loss.item() for loss in model.losses(sample.long())])
    first, second = (sums / count).tolist()
    return first, second

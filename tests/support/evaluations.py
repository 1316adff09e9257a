"""An evaluation made up by hand: what reports are drawn from, in tests that look at their form alone."""

import math
from typing import Any

from dsquant.evaluation.code.drift import CodeBleu, CodeDrift, Execution, Health, PromptDrift, Similarity
from dsquant.evaluation.harness.task_scores import MetricScores, TaskScores
from dsquant.evaluation.intervals import Interval
from dsquant.evaluation.results import (
    SCHEMA_VERSION,
    Candidate,
    Evaluation,
    Finding,
    GateOutcome,
    Identity,
    Ladder,
    LayerScores,
    Reference,
    Text,
    TextScores,
    WeightError,
)

NUM_LAYERS = 6


def around(value: float, width: float = 0.1) -> Interval:
    return Interval(value, value * (1 - width), value * (1 + width), 64)


def ladder(scale: float) -> Ladder:
    steps = (scale, scale * 0.4, scale * 2.2, scale * 3.5, scale * 8, scale * 20, scale * 31)
    return Ladder(*steps, 0.0, scale * 0.001, scale * 0.01, scale * 0.03)


def text_scores(kl: float) -> TextScores:
    return TextScores(
        tokens=4088,
        perplexity_original=5.317,
        perplexity=5.317 * math.exp(kl / 2),
        log_ratio=around(kl / 2),
        perplexity_ratio=around(math.exp(kl / 2), 0.01),
        mean_kl=around(kl),
        mean_kl_reverse=around(kl * 1.1),
        kl=ladder(kl),
        kl_reverse=ladder(kl * 1.1),
        top1_agreement=around(0.97 - kl, 0.01),
        top5_agreement=around(0.95 - kl, 0.01),
        delta_p=ladder(kl / 3),
        delta_p_rms=kl,
        kl_by_position=tuple((at, kl * (0.7 + at / 500)) for at in range(0, 512, 32)),
    )


def layer(index: int, kl: float, routed: bool) -> LayerScores:
    grown = kl * (index + 1) / NUM_LAYERS
    return LayerScores(
        index=index,
        name=f"model.layers.{index}",
        hidden_error=grown,
        local_error=kl,
        local_attention_error=kl * 0.8,
        local_mlp_error=kl * 1.3,
        router_overlap=around(1 - grown / 2, 0.01) if routed else None,
        local_router_overlap=1 - kl / 4 if routed else None,
        router_weight_distance=kl if routed else None,
        load_shift=kl / 5 if routed else None,
        kl=grown,
    )


def similarity(score: float) -> Similarity:
    parts = CodeBleu(score, score * 0.9, score, score * 1.05, None)
    return Similarity(score, score * 1.1, parts, score / 2, 20 * score, 1.02)


def code_drift(score: float, executed: bool) -> CodeDrift:
    health = Health(0.75, 0.3, 0.5, 44.8)
    execution = Execution(
        24,
        around(0.4),
        around(0.3),
        1.0,
        3,
        1,
        0.625,
        {"passed": 10, "failed": 14},
        {"passed": 8, "error": 16},
        ("5 s",),
    )
    example = PromptDrift(
        "add",
        'def add(a, b):\n    """<sum> & more"""\n',
        "    return a + b\n",
        "    return a + b\n",
        "    return a\n",
        4,
    )
    measures = {"code_bleu_drop": around(100 * (0.3 - score / 3))}
    return CodeDrift(
        method="generated",
        note="greedy, at most 64 tokens",
        prompts=24,
        max_tokens=64,
        signatures={"bleu": "nrefs:1|tok:none"},
        original_vs_gold=similarity(0.3),
        candidate_vs_gold=similarity(score / 3),
        candidate_vs_original=similarity(score),
        noise_floor=similarity(1.0),
        original=health,
        candidate=health,
        agreement=None,
        execution=execution if executed else None,
        examples=(example,),
        measures=measures,
    )


def gate(kl: float, limit: float) -> GateOutcome:
    found = around(kl)
    verdict: Any = "pass" if found.high <= limit else "fail" if found.low > limit else "inconclusive"
    needed = 40 if verdict == "inconclusive" else None
    return GateOutcome("mean_kl", "code", "at_most", limit, found, verdict, needed, "samples", f"mean_kl is {kl}")


def task_scores(kl: float, group: str | None = None) -> TaskScores:
    change = Interval(-kl, -kl - 0.01, 0.01 - kl, 100)
    metrics = {
        "acc": MetricScores(0.61, 0.02, 0.61 - kl, 0.02, change, True),
        "perplexity": MetricScores(9.5, None, math.inf, None, Interval(math.inf, -math.inf, math.inf, 1), False),
    }
    return TaskScores(100, 2000, 5, "1.0", group, metrics)


def candidate(name: str, kl: float, size_bytes: int, limit: float | None = 0.03, drift: bool = True) -> Candidate:
    names = [f"model.layers.{at % NUM_LAYERS}.mlp.experts.{at}.down_proj.weight" for at in range(20)]
    broken = limit is not None and kl > 10 * limit
    finding = Finding(
        "weight", 2, names[2], 1.0, 0.2, f"layer 2: {names[2]} has relative error 1, others 0.1: it is zero"
    )
    return Candidate(
        name=name,
        path=f"out/{name}",
        format="AWQ 4-bit",
        size_bytes=size_bytes,
        bits_per_weight=8 * size_bytes / 10_000_000,
        fingerprint="ab" * 32,
        texts={text: text_scores(kl * factor) for text, factor in (("code", 1.0), ("wiki", 1.6))},
        layers=tuple(layer(index, kl, routed=index > 0) for index in range(NUM_LAYERS)),
        weights=tuple(
            WeightError(one, at % NUM_LAYERS, 0.2 / (at + 2), 0.15 / (at + 2)) for at, one in enumerate(names)
        ),
        weight_error_by_kind={"mlp.experts.down_proj": 0.08},
        findings=(finding,) if broken else (),
        drift=code_drift(1 - 5 * min(kl, 0.15), executed=True) if drift else None,
        gates=(gate(kl, limit),) if limit is not None else (),
        tasks={"mmlu": task_scores(kl), "mmlu_anatomy": task_scores(2 * kl, "mmlu")} if drift else {},
    )


def evaluation(*candidates: Candidate) -> Evaluation:
    identity = Identity(
        versions={"dsquant": "0.1.0", "torch": "2.13.0"},
        seed=0,
        confidence=0.95,
        block_tokens=64,
        dtype="float32",
        device="cpu",
        batch_samples=8,
        noise_batch_samples=3,
        lens_tokens=512,
        elapsed_s=63.0,
        peak_resident_bytes=700 * 2**20,
        bytes_read=90 * 2**20,
    )
    return Evaluation(
        schema_version=SCHEMA_VERSION,
        identity=identity,
        reference=Reference("tiny-r1", "FP8", "DeepseekV3ForCausalLM", 14_000_000, "cd" * 32, NUM_LAYERS, 8, 2000),
        texts=(Text("code", 8, 512, "ef" * 32), Text("wiki", 8, 512, "12" * 32)),
        noise_floor={"code": text_scores(1e-9), "wiki": text_scores(2e-9)},
        noise_router_overlap=1.0,
        candidates=candidates,
        caveats=("Greedy completions of 24 short prompts say little about long programs.",),
    )

"""What a prompt's tokens have for log-probabilities in vLLM, on any device. Runs in vLLM's environment."""

import gc
from pathlib import Path

from vllm import LLM, SamplingParams
from vllm.distributed.parallel_state import cleanup_dist_env_and_memory
from vllm.inputs import TokensPrompt

from benchmarks.engines.scoring import Scores


def score(model: Path, tokens: list[list[int]], **options: float) -> Scores:
    """vLLM's own log-probabilities of prompts, in bfloat16; `options` are more of vLLM's."""
    engine = None
    try:
        engine = LLM(
            str(model), dtype="bfloat16", enforce_eager=True, max_model_len=1024, max_num_seqs=4,
            max_num_batched_tokens=2048, enable_prefix_caching=False, skip_tokenizer_init=True, **options,
        )  # fmt: skip
        asked = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0, detokenize=False)
        prompts = [TokensPrompt(prompt_token_ids=sample) for sample in tokens]
        answers = engine.generate(prompts, asked, use_tqdm=False)
        return [
            [found[token].logprob for found, token in zip(answer.prompt_logprobs[1:], sample[1:], strict=True)]
            for answer, sample in zip(answers, tokens, strict=True)
        ]
    finally:
        del engine
        cleanup_dist_env_and_memory()
        gc.collect()

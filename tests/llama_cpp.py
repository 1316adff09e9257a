"""A real llama.cpp, through the package xllamacpp: loads a GGUF file, tokenizes, predicts."""

import json
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class LlamaCpp:
    """A running server with one model."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def tokenize(self, text: str) -> list[int]:
        """Token ids of a text, special tokens parsed, none added."""
        body = json.dumps({"content": text, "add_special": False, "parse_special": True}).encode()
        request = urllib.request.Request(
            f"{self._server.listening_address}/tokenize", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["tokens"]

    def next_token(self, prompt: list[int], count: int) -> dict[int, float]:
        """The `count` likeliest next tokens with their log-probabilities, the likeliest first."""
        answer = self._complete(prompt, n_predict=1, n_probs=count)
        first = answer["choices"][0]["logprobs"]["content"][0]
        return {found["id"]: found["logprob"] for found in first["top_logprobs"]}

    def generate(self, prompt: list[int], count: int) -> str:
        """Text of at most `count` greedily chosen tokens."""
        return str(self._complete(prompt, n_predict=count)["choices"][0]["text"])

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        return self._server.handle_completions({"prompt": prompt, "temperature": 0, "cache_prompt": True, **options})


@contextmanager
def llama_cpp(path: Path) -> Iterator[LlamaCpp]:
    """Loads a GGUF file."""
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(path)
    parameters.n_ctx = 1024
    parameters.n_parallel = 1
    parameters.warmup = False
    parameters.verbosity = -1
    parameters.cpuparams.n_threads = 1
    server = xllamacpp.Server(parameters)
    yield LlamaCpp(server)

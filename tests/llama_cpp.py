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
        return list(self._post("tokenize", {"content": text, "add_special": False, "parse_special": True})["tokens"])

    def next_token(self, prompt: list[int], count: int) -> dict[int, float]:
        """The `count` likeliest next tokens with their log-probabilities, the likeliest first.

        Empty where the likeliest is a part of a character: the server holds such a token back.
        """
        found = self._complete(prompt, n_predict=1, n_probs=count).get("completion_probabilities")
        return {token["id"]: token["logprob"] for token in found[0]["top_logprobs"]} if found else {}

    def generate(self, prompt: list[int], count: int) -> str:
        """Text of at most `count` greedily chosen tokens."""
        return str(self._complete(prompt, n_predict=count)["content"])

    def _complete(self, prompt: list[int], **options: Any) -> dict[str, Any]:
        return self._post("completion", {"prompt": prompt, "temperature": 0, "cache_prompt": True, **options})

    def _post(self, path: str, content: dict[str, Any]) -> dict[str, Any]:
        address = f"{self._server.listening_address}/{path}"
        request = urllib.request.Request(address, json.dumps(content).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return dict(json.load(answer))


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

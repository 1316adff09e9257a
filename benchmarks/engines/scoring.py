"""What the engines' runners share: models in, log-probabilities out. Needs nothing but Python's own library.

    python -m benchmarks.engines.run_ENGINE TOKENS.json OUT NAME=MODEL...

TOKENS.json holds samples of token ids. OUT/NAME.json gets `log_probabilities`, in nats, of every token of a sample but
the first, given those before it; or `error`, which ends the process: engines do not clean up behind their own.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path

Scores = list[list[float]]


def score_all(score: Callable[[Path, list[list[int]]], Scores]) -> None:
    """Runs a runner's command line: `score` loads a model and scores samples."""
    tokens, out = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    for argument in sys.argv[3:]:
        name, _, model = argument.partition("=")
        answer = out / f"{name}.json"
        try:
            answer.write_text(json.dumps({"log_probabilities": score(Path(model), tokens)}))
        except Exception as error:
            answer.write_text(json.dumps({"error": f"{type(error).__name__}: {error}"}))
            raise

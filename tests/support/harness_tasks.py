"""Small tasks for lm-evaluation-harness, one of each kind, written as its users write theirs."""

import json
from pathlib import Path
from typing import Any

import yaml

COMMON: dict[str, Any] = {"dataset_path": "json", "test_split": "test"}
WORDS = ("def", "return", "self", "import", "class", "for", "while", "None")

TASKS: dict[str, dict[str, Any]] = {
    "choice": {
        "output_type": "multiple_choice",
        "num_fewshot": 1,
        "fewshot_split": "test",
        "doc_to_text": "What follows {{word}}?\nAnswer:",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "answer",
        "metric_list": [{"metric": name} for name in ("acc", "acc_norm")],
    },
    "letters": {
        "output_type": "multiple_choice",
        "doc_to_text": "Which one is {{word}}?",
        "doc_to_choice": ["A", "B", "C"],
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc"}],
    },
    "continued": {
        "output_type": "generate_until",
        "doc_to_text": "{{word}} {{text}}",
        "doc_to_target": "{{word}}",
        "generation_kwargs": {"until": ["\n", "e"], "max_gen_toks": 8},
        "metric_list": [{"metric": "exact_match"}],
    },
    "whole": {
        "output_type": "loglikelihood_rolling",
        "doc_to_text": "",
        "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    },
}


def write_tasks(folder: Path, documents: int = 6, **changes: Any) -> dict[str, Path]:
    """Writes the tasks as YAML files with their documents; `changes` go into each. Returns name -> file."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [
        {
            "word": WORDS[at % len(WORDS)],
            "text": " ".join(WORDS[(at + step) % len(WORDS)] for step in range(5 + 9 * at)),
            "choices": [WORDS[(at + step) % len(WORDS)] * (1 + step) for step in range(3)],
            "answer": at % 3,
        }
        for at in range(documents)
    ]
    data = folder / "documents.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {}
    for name, task in TASKS.items():
        files[name] = folder / f"{name}.yaml"
        own = {"task": name, **COMMON, "dataset_kwargs": {"data_files": {"test": str(data)}}}
        files[name].write_text(yaml.safe_dump(own | task | changes))
    return files

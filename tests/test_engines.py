"""The engine bench: its tables are what was measured, and its model for engines is the one that it stands for."""

import json
from pathlib import Path

import pytest
import torch
from checkpoints import full_model

from benchmarks.engines import table
from benchmarks.engines.padded import padded, padded_config
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.formats.table import FORMATS


def test_readmes_and_the_documents_tables_of_engines_are_the_measured_ones() -> None:
    for path, text in table.documents().items():
        assert path.read_text() == text, f"python -m benchmarks.engines.table writes {path.name} anew"


def test_every_format_ran_somewhere_or_says_that_it_did_not_and_what_did_not_run_lacks_a_kernel() -> None:
    rows = table.results()["rows"]
    ran = {row["output"].split(" ")[0].partition(":")[0].strip(",") for row in rows if not row["error"]}
    notes = {name: known.engine_notes((4,), mixture=True, to_choose=False) for name, known in FORMATS.items()}
    taken = (name for name in FORMATS if not any("no engine" in note for note in notes[name]))
    assert ran == {*table.BASELINES, *taken}
    for row in rows:
        assert not row["error"] or table.lacks_kernel(row) or row["output"] in table.BASELINES, row
        times = table.ratio(row, rows)
        assert times is None or times <= table.MOST_NOISE or (row["family"], row["output"]) in table.SENSITIVE, row


def test_the_padded_model_computes_what_the_small_one_does(nano_r1: Path, tmp_path: Path) -> None:
    small = open_checkpoint(nano_r1)
    config = padded_config(small.config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    tokens_NT = torch.randint(6, 280, (2, 24), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = full_model(nano_r1, small.weights)(tokens_NT).logits
        found = full_model(tmp_path, padded(small.config, small.weights))(tokens_NT).logits
    assert config["kv_lora_rank"] == 512 and config["num_attention_heads"] == 16
    assert float((found - wanted).abs().max()) < 1e-4 * float(wanted.std())


@pytest.mark.parametrize(("output", "kind"), [
    ("awq, symmetric", "awq"), ("mlx 3 bits", "mlx"), ("gguf:F16", "gguf, unquantized"), ("gguf:Q4_0", "gguf"),
    ("compressed-tensors 4 bits, quality", "compressed-tensors 4 bits"),
])  # fmt: skip
def test_outputs_of_one_format_are_one_row_of_the_summary(output: str, kind: str) -> None:
    assert table.kind(output) == kind

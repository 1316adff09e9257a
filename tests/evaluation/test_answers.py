"""A model of any format answers and goes on with texts, as transformers' own greedy generation of the same weights."""

from pathlib import Path

import pytest
import torch
from checkpoints import full_model
from click.testing import CliRunner

import dsquant
from dsquant.calibration.texts import load_tokenizer
from dsquant.cli import main
from dsquant.errors import InputError, UsageError
from dsquant.formats.checkpoints import open_checkpoint


def test_a_text_goes_on_as_transformers_own_model_goes_on(tiny_r1: Path) -> None:
    text = "def add(a, b):\n    "
    tokenizer = load_tokenizer(tiny_r1)
    ids = torch.tensor([tokenizer.encode(text)])
    model = full_model(tiny_r1, open_checkpoint(tiny_r1).weights)
    mask = torch.ones_like(ids)
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, pad_token_id=1)
    found = dsquant.generate(tiny_r1, text, raw=True, max_tokens=12)
    assert found == tokenizer.decode(wanted[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_prompt_is_answered_behind_the_chat_template(tiny_r1: Path) -> None:
    ended = CliRunner().invoke(main, ["generate", str(tiny_r1), "-", "--max-tokens", "3"], input="Hi")
    assert ended.exit_code == 0
    tokenizer = load_tokenizer(tiny_r1)
    messages = [{"role": "user", "content": "Hi"}]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    raw = dsquant.generate(tiny_r1, rendered.removeprefix(tokenizer.bos_token), raw=True, max_tokens=3)
    assert ended.output == raw + "\n"


def test_a_chat_ends_with_its_input(tiny_r1: Path) -> None:
    ended = CliRunner().invoke(main, ["chat", str(tiny_r1), "--max-tokens", "2"], input="Hi\nAgain\n")
    assert ended.exit_code == 0
    assert ended.output.count("you>") == 3


def test_sampling_repeats_under_a_seed_and_differs_between_seeds(nano_r1: Path) -> None:
    one, same, other = (
        dsquant.generate(nano_r1, "x", raw=True, max_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    )
    assert one == same != other


def test_a_model_without_a_chat_template_goes_on_with_texts(nano_r1: Path) -> None:
    assert load_tokenizer(nano_r1).chat_template is None
    assert dsquant.generate(nano_r1, "x", max_tokens=2) == dsquant.generate(nano_r1, "x", raw=True, max_tokens=2)
    ended = CliRunner().invoke(main, ["chat", str(nano_r1)], input="Hi\n")
    assert ended.exit_code == 2 and "has no chat template" in ended.output and "you>" not in ended.output
    told = CliRunner().invoke(main, ["generate", str(nano_r1), "x", "--max-tokens", "2"])
    assert told.exit_code == 0 and "its text goes on, as with --raw" in told.stderr


@pytest.mark.parametrize(
    ("prompt", "options", "error"),
    [
        ("x", {"max_tokens": 10**6}, UsageError),
        ("x", {"memory_budget": 1024}, InputError),
    ],
)
def test_what_cannot_be_generated_is_refused(
    prompt: str, options: dict[str, object], error: type[Exception], nano_r1: Path
) -> None:
    with pytest.raises(error):
        dsquant.generate(nano_r1, prompt, raw=True, **options)

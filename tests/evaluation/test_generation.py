"""Completions equal those of transformers' whole model, whatever the batch."""

import functools
from pathlib import Path

import pytest
import torch
from checkpoints import QWEN3, add_tokenizer, full_model, make_dense
from streams import stream_logits

from dsquant.calibration.texts import load_tokenizer
from dsquant.evaluation.code.generation import complete, resident_size
from dsquant.evaluation.code.tasks import DriftPlan, Task
from dsquant.formats.checkpoints import open_checkpoint
from dsquant.model.skeleton import Skeleton

PROMPTS = [
    "def add(a, b):\n",
    "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n",
    "import os\n\ndef read(path):\n    with open(",
    "x",
]


def asked(prompts: list[str], max_tokens: int, batch_prompts: int, stops: tuple[str, ...] = ()) -> DriftPlan:
    return DriftPlan(tuple(Task("", prompt, None, stops, None) for prompt in prompts), max_tokens, batch_prompts)


@functools.cache
def reference(folder: Path, num_tokens: int) -> list[list[int]]:
    """The tokens that transformers' whole model generates for each prompt by itself."""
    tokenizer = load_tokenizer(folder)
    model = full_model(folder, open_checkpoint(folder).weights)
    found = []
    for prompt in PROMPTS:
        tokens = torch.tensor([tokenizer.encode(prompt)])
        options = {"max_new_tokens": num_tokens, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
        output = model.generate(tokens, attention_mask=torch.ones_like(tokens), pad_token_id=0, **options)
        found.append(output[0, tokens.shape[1] :].tolist())
    return found


@pytest.mark.parametrize("batch_prompts", [1, 3])
def test_completions_are_those_of_transformers_whole_model(tiny_r1: Path, batch_prompts: int) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    tokenizer = load_tokenizer(tiny_r1)
    plan = asked(PROMPTS, 12, batch_prompts)
    found = complete(Skeleton(checkpoint), checkpoint.weights, tokenizer, plan)
    assert [list(one.tokens) for one in found] == reference(tiny_r1, 12)
    assert all(one.text == tokenizer.decode(one.tokens, skip_special_tokens=True) for one in found)


def test_a_dense_model_with_a_tied_head_completes_too(tmp_path: Path) -> None:
    folder = add_tokenizer(make_dense(tmp_path / "qwen3", QWEN3))
    checkpoint = open_checkpoint(folder)
    skeleton = Skeleton(checkpoint)
    found = complete(skeleton, checkpoint.weights, load_tokenizer(folder), asked(PROMPTS, 8, 4))
    assert [list(one.tokens) for one in found] == reference(folder, 8)


def test_the_network_is_without_weights_again_afterwards_and_streams_as_before(pico_r1: Path) -> None:
    checkpoint = open_checkpoint(pico_r1)
    skeleton, tokens = Skeleton(checkpoint), torch.arange(40).view(2, 20)
    before, _ = stream_logits(pico_r1, checkpoint.weights, tokens)
    complete(skeleton, checkpoint.weights, load_tokenizer(pico_r1), asked(["a"], 2, 1))
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    assert len(skeleton.model.model.layers) == skeleton.num_layers + skeleton.num_mtp_layers
    after, _ = stream_logits(pico_r1, checkpoint.weights, tokens, skeleton=skeleton)
    assert torch.equal(before, after)


def test_a_stop_string_ends_a_completion_and_is_not_part_of_it(tiny_r1: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    tokenizer = load_tokenizer(tiny_r1)
    whole, stopped = (
        complete(Skeleton(checkpoint), checkpoint.weights, tokenizer, asked(PROMPTS[1:2], 24, 1, stops))[0]
        for stops in ((), ("items",))
    )
    assert whole.truncated and "items" in whole.text and len(whole.tokens) == 24
    assert not stopped.truncated and stopped.text == whole.text[: whole.text.index("items")]
    assert len(stopped.tokens) < 24


def test_the_name_of_a_special_token_stops_a_completion_too(tiny_r1: Path) -> None:
    checkpoint = open_checkpoint(tiny_r1)
    tokenizer = load_tokenizer(tiny_r1)
    whole = complete(Skeleton(checkpoint), checkpoint.weights, tokenizer, asked(PROMPTS[:1], 8, 1))[0]
    name = tokenizer.convert_ids_to_tokens(whole.tokens[4])
    tokenizer.add_special_tokens({"additional_special_tokens": [name]})
    stopped = complete(Skeleton(checkpoint), checkpoint.weights, tokenizer, asked(PROMPTS[:1], 8, 1, (name,)))[0]
    first = whole.tokens.index(whole.tokens[4])
    assert stopped.tokens == whole.tokens[: first + 1] and not stopped.truncated and name not in stopped.text


def test_generation_stops_where_the_safe_point_raises_and_leaves_no_weights(pico_r1: Path) -> None:
    checkpoint = open_checkpoint(pico_r1)
    skeleton = Skeleton(checkpoint)

    def stop(done: int, total: int) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        complete(skeleton, checkpoint.weights, load_tokenizer(pico_r1), asked(["a"], 8, 1), stop)
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())


def test_the_size_in_memory_is_that_of_every_weight_but_the_mtp_layers(pico_r1: Path) -> None:
    checkpoint = open_checkpoint(pico_r1)
    skeleton = Skeleton(checkpoint)
    mtp = skeleton.layers[-1].prefix + "."
    held = [checkpoint.weights[name].numel() for name in checkpoint.weights if not name.startswith(mtp)]
    assert resident_size(skeleton) == 4 * sum(held)

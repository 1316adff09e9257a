"""Several processes that do one job (gloo on the CPU): the bytes of one, and what happens when one is lost."""

import json
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import forked
import pytest
import torch
from as_on_gpus import KEPT
from as_on_gpus import patch as as_on_gpus
from checkpoints import add_tokenizer, make_pico_r1
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import command, finish, launched, start, variables
from shapes import NARROW
from small_jobs import contents

from dsquant.cli import main
from dsquant.evaluation import comparison
from dsquant.jobs.ranks import CHUNKS, Shares, dealt
from dsquant.pipeline.inputs import open_model
from dsquant.pipeline.planning import plan_run
from dsquant.quantization.statistics import FACTOR_ROWS, InputStatistics
from dsquant.recipes import Recipe

pytestmark = pytest.mark.usefixtures("imported")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a dense layer, a mixture layer, and a layer for multi-token prediction."""
    folder = tmp_path_factory.mktemp("ranks") / "model"
    return add_tokenizer(make_pico_r1(folder, outliers=True, **NARROW))


REPORTS = ["report.html", "report.json", "report.md"]
# Every linear is quantized, in both kinds of format.
ALL = ("--preset", "compact", "--steps", "scales,top-up", "--to", "awq", "--to", "gguf:Q4_K_M")


@pytest.fixture(scope="module")
def whole(model: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output of one uninterrupted process."""
    output = tmp_path_factory.mktemp("whole") / "out"
    forked.finish(*command(model, text_file, output, *ALL))
    return output


def test_two_ranks_write_the_bytes_of_one_in_both_formats(model: Path, text_file: Path, tmp_path: Path) -> None:
    more = ("--to", "awq", "--to", "compressed-tensors", "--preset", "quality", "--samples", "3")
    forked.finish(*command(model, text_file, tmp_path / "one", *more))
    finish(start(2, model, text_file, tmp_path / "two", *more))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize(
    "more",
    [
        ("--to", "gguf:IQ4_XS", "--preset", "compact", "--steps", "none", "--mtp", "quantize", "--samples", "2"),
        ("--to", "awq", "--to", "gguf:Q4_K_M", "--preset", "compact", "--target-bits", "6", "--samples", "2"),
    ],
)
def test_two_ranks_write_the_gguf_of_one(model: Path, text_file: Path, tmp_path: Path, more: tuple[str, ...]) -> None:
    forked.finish(*command(model, text_file, tmp_path / "one", *more))
    finish(start(2, model, text_file, tmp_path / "two", *more))
    assert contents(tmp_path / "two") == contents(tmp_path / "one")


@pytest.mark.slow
def test_ranks_convert_to_gguf_without_calibration(model: Path, tmp_path: Path) -> None:
    def convert(output: Path) -> list[str]:
        options = ["--type", "Q8_0", "--calibration", "none", "--mtp", "keep", "--no-evaluate", "--json"]
        return ["gguf", str(model), "--output", str(output), *options]

    forked.finish(*convert(tmp_path / "one"))
    for size in (2, 3):
        finish(launched(size, convert(tmp_path / str(size))))
        assert contents(tmp_path / str(size)) == contents(tmp_path / "one")


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["scales,clip,compensate,top-up", "scales,follow"])
def test_hidden_states_on_gpus_or_in_files_give_the_same_bytes_on_any_number_of_ranks(
    model: Path, text_file: Path, tmp_path: Path, steps: str
) -> None:
    more = ("--preset", "compact", "--mtp", "quantize", "--steps", steps)
    for kept, size in (("none", 1), ("odd", 3)):
        finish(start(size, model, text_file, tmp_path / kept, *more, before=partial(as_on_gpus, KEPT[kept])))
    assert contents(tmp_path / "odd") == contents(tmp_path / "none")


def lose(rank: int, model: Path, text: Path, output: Path, *more: str, after: int = 1) -> None:
    """Kills one of two ranks after so many units."""
    processes = start(2, model, text, output, *more)
    journal = output / ".dsquant-work" / "journal.jsonl"
    while not (journal.exists() and journal.read_text().count("\n") >= after):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(0.01)
    processes[rank].send_signal(signal.SIGKILL)
    _, errors = processes[1 - rank].communicate(timeout=120)
    processes[rank].communicate()
    assert processes[1 - rank].returncode == 75, errors
    assert "another is lost" in errors and "--resume" in errors
    assert not (output / "dsquant.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "resumed_on"), [(1, 1), (0, 3)])
def test_a_lost_rank_stops_the_other_with_75_and_any_number_of_ranks_goes_on(
    model: Path, text_file: Path, whole: Path, tmp_path: Path, lost: int, resumed_on: int
) -> None:
    output = tmp_path / "out"
    lose(lost, model, text_file, output, *ALL)
    again = (model, text_file, output, *ALL, "--resume")
    if resumed_on == 1:
        forked.finish(*command(*again))
    else:
        finish(start(resumed_on, *again))
    assert contents(output) == contents(whole)


@pytest.mark.slow
def test_a_mixture_that_lost_a_rank_has_the_hashes_of_one_on_any_number_of_ranks(
    model: Path, text_file: Path, tmp_path: Path
) -> None:
    more = ("--to", "gguf:IQ4_XS", "--preset", "compact", "--steps", "none", "--mtp", "quantize", "--samples", "2")
    forked.finish(*command(model, text_file, tmp_path / "one", *more))
    lose(1, model, text_file, tmp_path / "out", *more, after=2)
    for rank in range(3):  # as if killed while ranks opened these, with words on every tensor
        told = b"".join(struct.pack("<QQQ", number, 0, 2**40) for number in range(60))
        (tmp_path / "out" / ".dsquant-work" / f"written-{rank}").write_bytes(told)
    finish(start(3, model, text_file, tmp_path / "out", *more, "--resume"))
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


@pytest.mark.slow
def test_three_ranks_go_on_following_where_two_had_lost_one(model: Path, text_file: Path, tmp_path: Path) -> None:
    more = ("--preset", "best", "--to", "awq", "--to", "compressed-tensors", "--target-bits", "6")
    forked.finish(*command(model, text_file, tmp_path / "one", *more))
    lose(1, model, text_file, tmp_path / "out", *more)
    finish(start(3, model, text_file, tmp_path / "out", *more, "--resume"))
    assert contents(tmp_path / "out") == contents(tmp_path / "one")


def told(line: list[str], size: int, before: Callable[[], object] | None = None) -> tuple[set[int | None], str]:
    """The exit codes of ranks that run a command, and what the first printed: no other prints anything."""
    processes = launched(size, line, before)
    printed, errors = zip(*(process.communicate(timeout=300) for process in processes), strict=True)
    assert not any(printed[1:])
    assert all(process.returncode != 1 for process in processes), errors
    return {process.returncode for process in processes}, printed[0]


def states_in_memory() -> None:
    """Keeps an evaluation's hidden states where a GPU does."""
    comparison.stays_on_gpu = lambda *_: True  # type: ignore[assignment]


@pytest.mark.slow
def test_ranks_report_the_numbers_of_one_to_the_last_bit(
    model: Path, text_file: Path, whole: Path, tmp_path: Path
) -> None:
    options = ["--text", str(text_file), "--samples", "7", "--seq-len", "250", "--prompts", "none", "--json"]
    gates = tmp_path / "gates.yaml"
    gates.write_text("gates:\n- {metric: mean_kl, at_most: 0.0000001}\n")
    found = []
    for size, before in ((1, None), (2, None), (3, states_in_memory)):
        output = tmp_path / str(size)
        line = ["eval", str(model), str(whole / "awq"), *options, "--gates", str(gates), "--output", str(output)]
        codes, printed = told(line, size, before)
        assert codes == {4} and sorted(path.name for path in output.iterdir()) == REPORTS
        found.append(json.loads(printed))
        for what_it_took in ("elapsed_s", "peak_resident_bytes", "bytes_read"):
            del found[-1]["identity"][what_it_took]
    assert found[0] == found[1] == found[2]


@pytest.mark.slow
def test_ranks_find_the_damage_that_one_finds(model: Path, whole: Path, tmp_path: Path) -> None:
    output = tmp_path / "out"
    shutil.copytree(whole, output)
    for damaged in (False, True):
        if damaged:
            path = next((output / "awq").glob("*.safetensors"))
            content = bytearray(path.read_bytes())
            content[-1] ^= 1
            path.write_bytes(content)
        line = ["verify", str(output), "--source", str(model), "--all", "--json"]
        results = [told(line, size) for size in (1, 2)]
        assert results[0] == results[1] and results[0][0] == {3 if damaged else 0}


@pytest.mark.slow
@pytest.mark.parametrize("lost", [0, 1])
def test_a_rank_that_is_lost_ends_an_evaluation_with_75(
    model: Path, text_file: Path, whole: Path, tmp_path: Path, lost: int
) -> None:
    options = ["--text", str(text_file), "--samples", "8", "--seq-len", "500", "--prompts", "none"]
    processes = launched(2, ["eval", str(model), str(whole / "awq"), *options, "--output", str(tmp_path / "out")])
    while not list(tmp_path.glob("out/.dsquant-*/evaluate-*.f32")):
        assert all(process.poll() is None for process in processes), processes[0].communicate()[1]
        time.sleep(0.01)
    processes[lost].send_signal(signal.SIGKILL)
    _, errors = processes[1 - lost].communicate(timeout=120)
    processes[lost].communicate()
    assert processes[1 - lost].returncode == 75, errors
    assert "another is lost" in errors and "run it again" in errors and "--resume" not in errors
    assert not list(tmp_path.glob("out/report*"))


@pytest.mark.slow
def test_torchrun_starts_the_ranks(model: Path, text_file: Path, whole: Path, tmp_path: Path) -> None:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    what = command(model, text_file, tmp_path / "out", *ALL)
    subprocess.run([*launcher, "-m", "dsquant.cli", *what], check=True, capture_output=True)
    assert contents(tmp_path / "out") == contents(whole)


@pytest.mark.parametrize(
    ("size", "more"),
    [
        pytest.param(2, ("--preset", "compact", "--steps", "top-up,follow", "--samples", "3"), marks=pytest.mark.slow),
        pytest.param(3, ("--preset", "best", "--mtp", "quantize"), marks=pytest.mark.slow),
        pytest.param(2, ("--steps", "compensate,follow,predictions", "--mtp", "quantize"), marks=pytest.mark.slow),
    ],
)
def test_ranks_that_follow_the_quantized_model_write_the_bytes_of_one(
    model: Path, text_file: Path, tmp_path: Path, size: int, more: tuple[str, ...]
) -> None:
    forked.finish(*command(model, text_file, tmp_path / "one", *more))
    finish(start(size, model, text_file, tmp_path / "several", *more))
    assert contents(tmp_path / "several") == contents(tmp_path / "one")


def pair(model: tuple[Path, Path], text: Path, output: Path, *more: tuple[str, ...]) -> list[tuple[int, str]]:
    """Two ranks with a model and options of their own; their exit codes and messages."""
    processes = [
        forked.start(*command(model[rank], text, output, *more[rank]), environment=told)
        for rank, told in enumerate(variables(2))
    ]
    told = [process.communicate(timeout=120)[1] for process in processes]
    return [(process.returncode, words) for process, words in zip(processes, told, strict=True)]


def test_ranks_with_other_weights_are_refused_by_all_of_them(model: Path, text_file: Path, tmp_path: Path) -> None:
    other = make_pico_r1(tmp_path / "model", outliers=True, seed=1, **NARROW)
    ends = pair((model, add_tokenizer(other)), text_file, tmp_path / "out", (), ())
    for code, words in ends:
        assert code == 3 and "the model's tensors is not the same on rank 1" in words, ends
    assert not (tmp_path / "out").exists()


def test_ranks_with_other_options_are_refused_by_all_of_them(model: Path, text_file: Path, tmp_path: Path) -> None:
    ends = pair((model, model), text_file, tmp_path / "out", (), ("--preset", "compact"))
    for code, words in ends:
        assert code == 2 and "preset is not the same on rank 1" in words, ends
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE is ''"),
        ({"RANK": "2"}, "RANK is '2', expected a number from 0 to 1"),
        ({"RANK": None}, "RANK is not set"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK is 'x'"),
        ({"MASTER_PORT": "abc"}, "MASTER_PORT is 'abc'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set"),
    ],
)
def test_a_launchers_variable_that_makes_no_sense_is_named(
    changes: dict[str, str | None], named: str, model: Path, text_file: Path, tmp_path: Path
) -> None:
    usual = {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29999"}
    run = CliRunner(env=usual | changes)
    assert run.invoke(main, ["--help"]).exit_code == 0
    found = run.invoke(main, ["awq", str(model), "--output", str(tmp_path / "out")])
    assert found.exit_code == 2 and named in found.stderr and "Traceback" not in found.stderr


def test_a_rank_that_waits_for_the_others_can_be_stopped(model: Path, text_file: Path, tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()  # somebody who says nothing
        launched = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1"}
        launched["MASTER_PORT"] = str(taken.getsockname()[1])
        what = command(model, text_file, tmp_path / "out")
        process = forked.start(*what, environment=launched)
        silent, _ = taken.accept()
        with silent:
            process.send_signal(signal.SIGTERM)
            _, errors = process.communicate(timeout=30)
    assert process.returncode == 75 and "stopped by SIGTERM" in errors


def test_what_ranks_exchange_is_planned_by_the_layers_that_are_quantized(model: Path, tmp_path: Path) -> None:
    without_mtp = make_pico_r1(tmp_path / "model", outliers=True, num_nextn_predict_layers=0, **NARROW)
    planned = []
    for folder in (model, add_tokenizer(without_mtp)):
        recipe = Recipe.checked(
            model=str(folder), output=tmp_path / "out", preset="compact", group_size=64, device="cpu"
        )
        one, two = (plan_run(recipe, *open_model(recipe.model), num_ranks=size).needs.memory_bytes for size in (1, 2))
        planned.append(two - one)
    assert planned[0] == planned[1] > 0


@given(st.lists(st.integers(0, 100)), st.integers(1, 8))
def test_items_are_dealt_so_that_no_rank_has_more_than_another_by_more_than_one_of_its_items(
    sizes: list[int], num_ranks: int
) -> None:
    places = dealt(sizes, num_ranks)
    assert sorted(place for own in places for place in own) == list(range(len(sizes)))
    taken = [sum(sizes[place] for place in own) for own in places]
    for own, total in zip(places, taken, strict=True):
        assert not own or total - min(sizes[place] for place in own) <= min(taken)


@given(st.integers(1, 300), st.integers(1, 8), st.integers(1, 40))
def test_chunks_do_not_depend_on_the_number_of_ranks(num_samples: int, batch_samples: int, size: int) -> None:
    shares = Shares(num_samples, batch_samples, size)
    chunks = [chunk for rank in range(size) for chunk in shares.chunks(rank)]
    assert chunks == Shares(num_samples, batch_samples).chunks(0)
    assert len(chunks) == min(CHUNKS, -(-num_samples // batch_samples))
    assert [sample for start, stop in chunks for sample in range(start, stop)] == list(range(num_samples))
    assert all(start % batch_samples == 0 for start, _ in chunks)
    for rank in range(size):
        own = shares.chunks(rank)
        assert shares.samples(rank) == (own[0][0], own[-1][1]) if own else len(set(shares.samples(rank))) == 1


@settings(max_examples=4, deadline=None)
@given(st.lists(st.integers(1, FACTOR_ROWS + 200), min_size=1, max_size=4))
def test_sums_of_chunks_tell_what_sums_of_all_tokens_tell(counts: list[int]) -> None:
    features = 2048 + 128  # too wide for a Gram matrix
    generator = torch.Generator().manual_seed(sum(counts))
    inputs = [torch.randn(count, features, generator=generator) for count in counts]
    total = InputStatistics(features, seed=99)
    for number, inputs_RI in enumerate(inputs):
        chunk = InputStatistics(features, seed=number)
        chunk.add(inputs_RI)
        total.merge(chunk)
    merged, everything = total.moments(), torch.cat(inputs)
    wanted_I = everything.square().mean(0)
    assert merged.count == sum(counts)
    assert torch.allclose(merged.rms_I.square(), wanted_I, rtol=1e-4)
    assert merged.factor_KI is not None and len(merged.factor_KI) == min(sum(counts), FACTOR_ROWS)
    few_OI = torch.randn(64, features, generator=generator)
    exact = float((few_OI @ everything.T).square().sum() / len(everything))
    assert abs(float(merged.loss(few_OI)) / exact - 1) < (1e-3 if sum(counts) <= FACTOR_ROWS else 0.2)

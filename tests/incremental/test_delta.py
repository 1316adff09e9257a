"""Deltas: equal to a full run under the recorded scales, each source read once, patches that give the same bytes."""

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import make_pico_r1
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from shapes import NARROW
from small_jobs import changed_copy, contents, noise

import dsquant
from dsquant.cli import main
from dsquant.errors import InputError, Interrupted, UsageError
from dsquant.formats.table import FORMATS
from dsquant.incremental.recording import Recording
from dsquant.incremental.release import full_run
from dsquant.incremental.rule import rounded_as_recorded
from dsquant.schemes import Grid, round_to_nearest
from dsquant.source.shards import read_index

FORMATS_OF_OLD = ("awq", "compressed-tensors")


@pytest.fixture(scope="module")
def old(narrow_r1: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A narrow R1 in two formats; tests leave it as it is."""
    output = tmp_path_factory.mktemp("delta") / "old"
    dsquant.awq(
        narrow_r1, output=output, to=FORMATS_OF_OLD, preset="compact", steps="scales",
        calibration=text_file,
        samples=6, seq_len=32, group_size=64, evaluate=False, progress=False,
    )  # fmt: skip
    return output


@pytest.fixture(scope="module")
def new(narrow_r1: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A narrow R1 with some tensors changed, none of them in layer 0, and their names."""
    change = noise(0.15, seed=7)
    folder = tmp_path_factory.mktemp("delta") / "new"
    return folder, changed_copy(
        narrow_r1, folder, lambda name, values: None if ".layers.0." in name else change(name, values)
    )


def test_a_delta_equals_a_full_run_with_the_same_scales_and_so_does_its_patch(
    narrow_r1: Path, old: Path, new: tuple[Path, list[str]], tmp_path: Path
) -> None:
    folder, changed = new
    made = dsquant.delta(narrow_r1, folder, quantized=old, output=tmp_path / "delta", progress=False)
    full_run(str(folder), old, tmp_path / "full")
    assert contents(tmp_path / "delta") == contents(tmp_path / "full")
    assert set(made.changed) == set(changed) and 5 < len(changed) < 40
    size = read_index(folder).num_bytes
    assert made.new_read_bytes == size and made.old_read_bytes == read_index(narrow_r1).num_bytes
    assert made.patch_bytes == (tmp_path / "delta.patch").stat().st_size < made.output_bytes / 3
    assert dsquant.verify(tmp_path / "delta", everything=True, progress=False).ok
    applied = dsquant.apply_patch(made.patch, old, output=tmp_path / "applied", progress=False)
    assert contents(tmp_path / "applied") == contents(tmp_path / "full")
    assert applied.num_files == len(contents(tmp_path / "full"))


def test_only_what_changed_is_done_again(old: Path, new: tuple[Path, list[str]], tmp_path: Path) -> None:
    folder, changed = new
    made = dsquant.delta(old, folder, output=tmp_path / "delta", progress=False)
    assert made.old_read_bytes == 0
    assert sum(made.reused.values()) > 0 and made.reused_bytes > 0
    for name in ("awq", "compressed-tensors"):
        before, after = (
            {tensor: entry[1] for file in json.loads((output / name / "dsquant.json").read_text())["files"].values()
             for tensor, entry in file.get("tensors", {}).items()}
            for output in (old, tmp_path / "delta")
        )  # fmt: skip
        different = {tensor for tensor in before if before[tensor] != after[tensor]}
        stems = tuple(parameter.removesuffix("weight") for parameter in changed)
        assert different and all(tensor.startswith(stems) for tensor in different)


def test_the_folder_of_one_format_of_several_is_brought_up_to_date_alone(
    old: Path, new: tuple[Path, list[str]], tmp_path: Path
) -> None:
    name = FORMATS_OF_OLD[1]
    outputs = [tmp_path / "whole" / name, tmp_path / "alone"]
    dsquant.delta(old, new[0], output=tmp_path / "whole", progress=False)
    dsquant.delta(old / name, new[0], output=tmp_path / "alone", progress=False)
    whole, alone = map(contents, outputs)
    shards = {file for file in whole if file.endswith((".safetensors", ".scales", ".json"))} - {"dsquant.json"}
    assert shards and all(whole[file] == alone[file] for file in shards)
    assert dsquant.verify(tmp_path / "alone", everything=True, progress=False).ok
    layers = [json.loads((output / "dsquant.json").read_text())["layers"] for output in outputs]
    for of_whole, of_one in zip(*layers, strict=True):
        assert of_one["grids"] == of_whole["grids"][1:]


def test_a_release_like_the_old_one_gives_the_old_weights(narrow_r1: Path, old: Path, tmp_path: Path) -> None:
    same = Path(shutil.copytree(narrow_r1, tmp_path / "same"))
    made = dsquant.delta(old, same, output=tmp_path / "delta", progress=False)
    assert made.changed == [] and made.anew == []
    full_run(str(same), old, tmp_path / "full")
    shards = {name: found for name, found in contents(old).items() if name.endswith((".safetensors", ".scales"))}
    for output in (tmp_path / "delta", tmp_path / "full"):
        assert shards.items() <= contents(output).items()


def test_a_weight_that_has_grown_gets_a_new_grid(narrow_r1: Path, old: Path, tmp_path: Path) -> None:
    name = "model.layers.1.mlp.experts.3.down_proj"
    changed_copy(
        narrow_r1, tmp_path / "new", lambda found, values: values * 2.5 / 4 if found == f"{name}.weight" else None
    )
    scales = sorted((tmp_path / "new").glob("*.safetensors"))
    for file in scales:
        tensors = load_file(file)
        if f"{name}.weight_scale_inv" in tensors:
            tensors[f"{name}.weight_scale_inv"] *= 4
            save_file(tensors, file)
    made = dsquant.delta(old, tmp_path / "new", output=tmp_path / "delta", progress=False)
    assert made.anew == [f"awq: {name}", f"compressed-tensors: {name}"]
    assert dsquant.verify(tmp_path / "delta", everything=True, progress=False).ok


def test_an_interrupted_delta_goes_on_to_the_same_bytes(
    old: Path, new: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsquant.incremental import requantize

    whole = dsquant.delta(old, new[0], output=tmp_path / "whole", progress=False)
    make, done = requantize._make_unit, 0

    def stop_after_three(*arguments: Any) -> Any:
        nonlocal done
        done += 1
        if done > 3:
            raise Interrupted("here")
        return make(*arguments)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(requantize, "_make_unit", stop_after_three)
        dsquant.delta(old, new[0], output=tmp_path / "delta", progress=False)
    made = dsquant.delta(old, new[0], output=tmp_path / "delta", resume=True, progress=False)
    assert contents(tmp_path / "delta") == contents(tmp_path / "whole") and made.changed == whole.changed
    again = dsquant.delta(old, new[0], output=tmp_path / "delta", resume=True, progress=False)
    assert again.already_finished and again.patch_bytes == made.patch_bytes


@pytest.mark.slow
def test_a_unit_that_is_made_twice_leaves_no_second_name_of_a_reused_file(
    old: Path, new: tuple[Path, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dsquant.incremental import requantize

    dsquant.delta(old, new[0], output=tmp_path / "whole", progress=False)

    def stop(*arguments: Any) -> None:
        raise Interrupted("here")

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(requantize, "finish", stop)
        dsquant.delta(old, new[0], output=tmp_path / "delta", progress=False)
    journal = tmp_path / "delta" / ".dsquant-work" / "journal.jsonl"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-4]))  # killed before they were noted
    dsquant.delta(old, new[0], output=tmp_path / "delta", resume=True, progress=False)
    assert contents(tmp_path / "delta") == contents(tmp_path / "whole")
    assert dsquant.verify(tmp_path / "delta", progress=False).ok


def test_a_patch_is_the_same_bytes_whenever_it_is_written(
    old: Path, new: tuple[Path, list[str]], tmp_path: Path
) -> None:
    made = dsquant.delta(old, new[0], output=tmp_path / "delta", progress=False)
    first = made.patch.read_bytes()
    for path in (tmp_path / "delta").rglob("*"):
        path.chmod(0o755)
        os.utime(path, (10**9, 10**9))
    made.patch.unlink()
    dsquant.delta(old, new[0], output=tmp_path / "delta", resume=True, progress=False)
    assert made.patch.read_bytes() == first
    with zipfile.ZipFile(made.patch) as archive:
        assert {info.date_time for info in archive.infolist()} == {(1980, 1, 1, 0, 0, 0)}


def test_what_does_not_belong_together_is_refused(
    narrow_r1: Path, old: Path, new: tuple[Path, list[str]], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match="was not made from"):
        dsquant.delta(new[0], new[0], quantized=old, output=tmp_path / "a", progress=False)
    with pytest.raises(UsageError, match="--quantized"):
        dsquant.delta(narrow_r1, new[0], output=tmp_path / "a", progress=False)
    wider = make_pico_r1(tmp_path / "wider", **NARROW | {"moe_intermediate_size": 128})
    with pytest.raises(InputError, match="other tensors or shapes"):
        dsquant.delta(old, wider, output=tmp_path / "a", progress=False)
    damaged = Path(shutil.copytree(old, tmp_path / "damaged"))
    shard = sorted((damaged / "awq").glob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(InputError, match="verify"):
        dsquant.delta(damaged, new[0], output=tmp_path / "a", progress=False)


def test_a_patch_is_applied_to_its_own_output_only_and_not_when_damaged(
    old: Path, new: tuple[Path, list[str]], tmp_path: Path
) -> None:
    made = dsquant.delta(old, new[0], output=tmp_path / "delta", progress=False)
    with pytest.raises(InputError, match="not the output"):
        dsquant.apply_patch(made.patch, tmp_path / "delta", output=tmp_path / "b", progress=False)
    raw = made.patch.read_bytes()
    for place in (10, len(raw) // 2, len(raw) - 30):
        content = bytearray(raw)
        content[place] ^= 1
        (tmp_path / "bad.patch").write_bytes(content)
        try:
            dsquant.apply_patch(tmp_path / "bad.patch", old, output=tmp_path / f"c{place}", progress=False)
        except InputError:
            assert not (tmp_path / f"c{place}").exists()
        else:  # a bit of the archive that means nothing, such as a time
            assert contents(tmp_path / f"c{place}") == contents(tmp_path / "delta")


def test_the_commands_do_what_the_functions_do(
    old: Path, new: tuple[Path, list[str]], narrow_r1: Path, tmp_path: Path
) -> None:
    def run(*arguments: str | Path) -> Result:
        return CliRunner().invoke(main, [str(argument) for argument in arguments])

    delta = run("delta", narrow_r1, new[0], "--quantized", old, "--output", tmp_path / "delta", "--json")
    assert delta.exit_code == 0, delta.stderr
    assert len(json.loads(delta.stdout)["changed"]) == len(new[1])
    full = run("awq", new[0], "--scales-from", old, "--output", tmp_path / "full", "--json")
    assert full.exit_code == 0, full.stderr
    assert json.loads(full.stdout)["elapsed_s"] > 0 and json.loads(full.stdout)["peak_resident_bytes"] > 0
    applied = run("delta", "--apply", tmp_path / "delta.patch", old, "--output", tmp_path / "applied")
    assert applied.exit_code == 0, applied.stderr
    assert contents(tmp_path / "delta") == contents(tmp_path / "full") == contents(tmp_path / "applied")
    refused = run("awq", new[0], "--scales-from", old, "--bits", "8", "--output", tmp_path / "no")
    assert refused.exit_code == 2 and "--bits" in refused.stderr


@pytest.mark.parametrize(("linear", "found"), [("self_attn.kv_b_proj", "quantize"), ("self_attn.o_proj", "keep")])
def test_an_output_from_before_the_option_kv_b_is_requantized_as_it_is(linear: str, found: str, tmp_path: Path) -> None:
    errors = {f"model.layers.1.{linear}": 0.1}
    record = {"recipe": {"preset": "compact"}, "outputs": {"awq": {"weight_errors": errors}}}
    assert Recording(tmp_path, record, "0" * 64).recipe("model", tmp_path / "new").kv_b == found


@given(st.sampled_from([(4, True), (4, False), (3, True), (8, True)]), st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_what_is_packed_is_unpacked(kind: tuple[int, bool], seed: int) -> None:
    bits, symmetric = kind
    weight_OI = torch.randn(64, 96, generator=torch.Generator().manual_seed(seed))
    weight = round_to_nearest(weight_OI, Grid(bits, 32, symmetric))
    for name in ("awq", "compressed-tensors") if bits == 4 else ("compressed-tensors",):
        found = FORMATS[name].unpack("linear", FORMATS[name].pack("linear", weight), weight.grid)
        assert torch.equal(found.codes_OI, weight.codes_OI) and torch.equal(found.scales_OG, weight.scales_OG)
        assert torch.equal(found.zero_points_OG, weight.zero_points_OG)


@given(st.floats(0.0, 3.0), st.booleans(), st.integers(0, 2**32 - 1))
@settings(max_examples=30, deadline=None)
def test_a_changed_weight_errs_at_most_a_quarter_more_than_recorded_or_less_than_on_a_new_grid(
    change: float, symmetric: bool, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    before_OI, noise_OI = torch.randn(2, 16, 64, generator=generator)
    recorded = round_to_nearest(before_OI, Grid(4, 32, symmetric))
    weight_OI, limit = before_OI + change * noise_OI, recorded.relative_error(before_OI)
    found, anew = rounded_as_recorded(weight_OI, recorded, limit)
    error = found.relative_error(weight_OI)
    fresh = round_to_nearest(weight_OI, recorded.grid).relative_error(weight_OI)
    assert error <= max(1.25 * limit, fresh)
    assert anew or torch.equal(found.scales_OG, recorded.scales_OG)


@pytest.mark.slow
def test_five_percent_of_tiny_r1_changed(tiny_r1: Path, tmp_path: Path) -> None:
    changed = changed_copy(tiny_r1, tmp_path / "new", noise(0.05, seed=1))
    dsquant.awq(output=tmp_path / "old", evaluate=False, progress=False)
    made = dsquant.delta(
        "tiny-r1", tmp_path / "new", quantized=tmp_path / "old", output=tmp_path / "delta", progress=False
    )
    full_run(str(tmp_path / "new"), tmp_path / "old", tmp_path / "full")
    dsquant.apply_patch(made.patch, tmp_path / "old", output=tmp_path / "applied", progress=False)
    assert contents(tmp_path / "delta") == contents(tmp_path / "full") == contents(tmp_path / "applied")
    assert set(made.changed) == set(changed)
    assert made.new_read_bytes == made.old_read_bytes == read_index(tiny_r1).num_bytes

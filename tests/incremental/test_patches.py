"""Patches from anywhere: what they tell is checked, what is not theirs stays, and a failure leaves nothing."""

import hashlib
import json
import shutil
import signal
import stat
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_jobs import changed_copy, contents, noise

import dsquant
from dsquant.errors import InputError, Interrupted
from dsquant.files.sealing import seal
from dsquant.incremental import applying, patch_manifest

Parts = dict[str, bytes]


@pytest.fixture(scope="module")
def made(nano_r1: Path, text_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an old output, a new release, its output and the patch; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("patches")
    dsquant.awq(
        nano_r1, output=folder / "old", calibration=text_file, samples=2, seq_len=16, group_size=64, steps="none",
        evaluate=False, progress=False,
    )  # fmt: skip
    changed_copy(nano_r1, folder / "release", noise(0.15, seed=7))
    dsquant.delta(folder / "old", folder / "release", output=folder / "new", progress=False)
    return folder


def rewritten(patch: Path, target: Path, change: Callable[[dict[str, Any], Parts], object]) -> Path:
    with zipfile.ZipFile(patch) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    manifest = json.loads(parts.pop("patch.json"))
    changed = change(manifest, parts)
    content = changed if isinstance(changed, str) else json.dumps(manifest)
    with zipfile.ZipFile(target, "w") as archive:
        for name, part in {**parts, "patch.json": content}.items():
            archive.writestr(name, part)
    return target


def renamed(name: str) -> Callable[[dict[str, Any], Parts], None]:
    def change(manifest: dict[str, Any], parts: Parts) -> None:
        manifest["files"][name] = manifest["files"].pop("README.md")
        parts[f"new/{name}"] = parts.pop("new/README.md")

    return change


def with_places(places: object) -> Callable[[dict[str, Any], Parts], None]:
    def change(manifest: dict[str, Any], parts: Parts) -> None:
        next(entry for entry in manifest["files"].values() if entry["how"] == "tensors")["tensors"] = places

    return change


def without(word: str) -> Callable[[dict[str, Any], Parts], None]:
    """A patch that tells nothing of the files whose names have a word in them, and holds nothing of them."""

    def change(manifest: dict[str, Any], parts: Parts) -> None:
        manifest["files"] = {name: entry for name, entry in manifest["files"].items() if word not in name}
        for name in [name for name in parts if word in name]:
            del parts[name]

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any], Parts], object], str]] = {
    "unknown version": (lambda manifest, _: manifest.update(patch_version=2), "patch_version"),
    "no version": (lambda manifest, _: bool(manifest.pop("patch_version")), "patch_version"),
    "no shards": (without(".safetensors"), "with another hash or size than the new output's"),
    "no record": (without("dsquant.json"), "does not hold"),
    "wrong size": (lambda manifest, _: manifest["files"]["README.md"].update(bytes=1), "lists 1"),
    "short part": (lambda _, parts: parts.update({"new/README.md": b"x"}), "has 1 bytes"),
    "missing part": (lambda _, parts: bool(parts.pop("new/README.md")), "'new/README.md' is in it 0 times"),
    "part of nothing": (lambda _, parts: parts.update({"x": b"y" * 10**6}), "'x' is in it 1 time,"),
    "part outside": (lambda _, parts: parts.update({"../../evil": b"y"}), "evil' is in it 1 time,"),
    "a list": (lambda *_: "[]", "object"),
    "deep": (lambda *_: "[" * 100_000, "recursion"),
    "files null": (lambda manifest, _: manifest.update(files=None), "files"),
    "entry a number": (lambda manifest, _: manifest["files"].update({"README.md": 5}), "README.md"),
    "no name": (renamed(""), "not a plain path"),
    "dot": (renamed("."), "not a plain path"),
    "outside": (renamed("a/../../evil"), "not a plain path"),
    "absolute": (renamed("/evil"), "not a plain path"),
    "long name": (renamed("a" * 300), "255"),
    "file and folder": (renamed("config.json/x"), "cannot be a file and hold"),
    "negative place": (with_places([[-5, 10]]), "greater than or equal to 0"),
    "places in each other": (with_places([[0, 16], [8, 16]]), "begins before"),
    "place behind the end": (with_places([[2**62, 10]]), "end after"),
    "old file absent": (
        lambda manifest, _: manifest["files"].update(gone={"bytes": 1, "sha256": "0" * 64, "how": "same"}),
        "gone is missing",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_patch_that_tells_something_wrong_is_refused_before_anything_is_written(
    made: Path, tmp_path: Path, damage: str
) -> None:
    change, message = DAMAGES[damage]
    patch = rewritten(made / "new.patch", tmp_path / "bad.patch", change)
    with pytest.raises(InputError, match=message):
        dsquant.apply_patch(patch, made / "old", output=tmp_path / "a" / "out", progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["bad.patch"]


def copied(patch: Path, target: Path, change: Callable[[zipfile.ZipFile], object]) -> Path:
    """A patch with the same members, whose list of members is changed before it is written."""
    with zipfile.ZipFile(patch) as archive, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        for name in archive.namelist():
            copy.writestr(name, archive.read(name))
        change(copy)
    return target


def as_link(archive: zipfile.ZipFile) -> None:
    archive.getinfo("new/README.md").external_attr = (stat.S_IFLNK | 0o777) << 16


def as_huge(archive: zipfile.ZipFile) -> None:
    archive.getinfo("patch.json").file_size = 3 * 2**30


def of_zeros(archive: zipfile.ZipFile) -> None:
    """Stands in the list with the size of what it replaces, and inflates to a thousand times its own."""
    before = archive.getinfo("new/dsquant.json")
    with pytest.warns(UserWarning, match="Duplicate name"), archive.open("new/dsquant.json", "w") as member:
        for _ in range(64):
            member.write(bytes(2**20))
    archive.filelist.remove(before)
    archive.getinfo("new/dsquant.json").file_size = before.file_size


def twice(archive: zipfile.ZipFile) -> None:
    with pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr("new/README.md", b"other")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (as_link, "a link or a folder"),
        (as_huge, "patch.json has 3.00 GiB"),
        (of_zeros, "Bad CRC-32"),
        (twice, "2 times"),
    ],
)
def test_a_member_that_is_not_what_the_list_says_is_refused_in_little_memory(
    made: Path, tmp_path: Path, change: Callable[[zipfile.ZipFile], object], message: str
) -> None:
    patch = copied(made / "new.patch", tmp_path / "bad.patch", change)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=message):
            dsquant.apply_patch(patch, made / "old", output=tmp_path / "out", progress=False)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    assert [path.name for path in tmp_path.iterdir()] == ["bad.patch"]


def test_a_list_of_members_that_is_longer_than_any_is_not_read(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patch_manifest, "LARGEST_TEXT_BYTES", 1000)
    with pytest.raises(InputError, match="list of members has"):
        dsquant.apply_patch(made / "new.patch", made / "old", output=tmp_path / "out", progress=False)


def test_a_large_new_file_passes_through_little_memory(made: Path, tmp_path: Path) -> None:
    big, size = made / "new.patch", 64 * 2**20
    parts = {}
    with zipfile.ZipFile(big) as archive:
        parts = {name: archive.read(name) for name in archive.namelist()}
    content, record = bytes(size), json.loads(parts["new/dsquant.json"])
    entry = {"bytes": size, "sha256": hashlib.sha256(content).hexdigest()}
    record["files"]["README.md"] = entry
    del record["sections_sha256"]
    parts["new/dsquant.json"] = seal(record)
    told = json.loads(parts["patch.json"])
    told["files"]["README.md"] |= entry
    digest = hashlib.sha256(parts["new/dsquant.json"]).hexdigest()
    told["files"]["dsquant.json"] |= {"bytes": len(parts["new/dsquant.json"]), "sha256": digest}
    parts |= {"patch.json": json.dumps(told).encode(), "new/README.md": content}
    patch = tmp_path / "big.patch"
    with zipfile.ZipFile(patch, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
    del content, parts
    tracemalloc.start()
    try:
        dsquant.apply_patch(patch, made / "old", output=tmp_path / "out", progress=False)
        assert tracemalloc.get_traced_memory()[1] < 32 * 2**20
    finally:
        tracemalloc.stop()
    assert (tmp_path / "out" / "README.md").stat().st_size == size


def test_a_failure_halfway_leaves_nothing(made: Path, tmp_path: Path) -> None:
    raw = bytearray((made / "new.patch").read_bytes())
    with zipfile.ZipFile(made / "new.patch") as archive:
        info = archive.getinfo("new/README.md")
    raw[info.header_offset + 30 + len("new/README.md") + info.compress_size // 2] ^= 255
    bad = tmp_path / "bad.patch"
    bad.write_bytes(raw)
    with pytest.raises(InputError, match="damaged"):
        dsquant.apply_patch(bad, made / "old", output=tmp_path / "a" / "out", progress=False)
    assert list(tmp_path.iterdir()) == [bad]


def test_an_old_output_that_lacks_or_spoils_a_file_is_named(made: Path, tmp_path: Path) -> None:
    old = Path(shutil.copytree(made / "old", tmp_path / "old"))
    shard = sorted(old.glob("*.safetensors"))[0]
    raw = bytearray(shard.read_bytes())
    raw[-5] ^= 1
    shard.write_bytes(raw)
    with pytest.raises(InputError, match=f"{shard}.* is damaged"):
        dsquant.apply_patch(made / "new.patch", old, output=tmp_path / "out", progress=False)
    shard.unlink()
    with pytest.raises(InputError, match=f"{shard} is missing"):
        dsquant.apply_patch(made / "new.patch", old, output=tmp_path / "out", progress=False)
    assert list(tmp_path.iterdir()) == [old]


def test_a_patch_is_applied_only_where_nothing_is_in_the_way(made: Path, tmp_path: Path) -> None:
    def refused(output: Path, match: str, patch: Path = made / "new.patch") -> None:
        with pytest.raises(InputError, match=match):
            dsquant.apply_patch(patch, made / "old", output=output, progress=False)

    file = tmp_path / "file"
    file.write_text("mine")
    refused(file, "is a file")
    refused(file / "x", "is a file")
    refused(made / "old" / "x", "lies in the other")
    refused(tmp_path / "out", "does not exist", tmp_path / "absent.patch")
    refused(tmp_path / "out", "is a folder", tmp_path)
    (tmp_path / "out.partial").mkdir()
    refused(tmp_path / "out", "in the way")
    (tmp_path / "out.partial" / ".dsquant-work").mkdir()
    (tmp_path / "out.partial" / ".dsquant-work" / "job.json").write_text("an interrupted job's")
    refused(tmp_path / "out", "in the way")
    (tmp_path / "linked.partial").symlink_to(tmp_path / "out.partial")
    refused(tmp_path / "linked", "in the way")
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    refused(tmp_path / "link", "is a link")
    assert {path.name for path in tmp_path.iterdir()} == {"file", "out.partial", "linked.partial", "empty", "link"}
    assert [path.name for path in (tmp_path / "out.partial").rglob("*")] == [".dsquant-work", "job.json"]


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="no limits on file sizes here")
def test_where_there_is_no_room_for_what_a_patch_makes_nothing_is_left_and_the_new_file_is_named(
    made: Path, tmp_path: Path
) -> None:
    import resource

    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
    try:
        with pytest.raises(Interrupted, match=rf"limit on file sizes.*{tmp_path}/out.*nothing is left.*apply it again"):
            dsquant.apply_patch(made / "new.patch", made / "old", output=tmp_path / "out", progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_run_has_left_is_no_hindrance(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(applying.shutil, "rmtree", lambda _, **__: None)  # as if there had been no time to clean up
        patch.setattr(applying, "hash_files", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        dsquant.apply_patch(made / "new.patch", made / "old", output=output, progress=False)
    assert (tmp_path / "out.partial").is_dir()
    dsquant.apply_patch(made / "new.patch", made / "old", output=output, progress=False)
    assert contents(output) == contents(made / "new") and list(tmp_path.iterdir()) == [output]


def test_a_delta_overwrites_nothing_but_its_own_patch(made: Path, tmp_path: Path) -> None:
    def delta(output: Path, patch: Path | None = None, **options: bool) -> object:
        return dsquant.delta(made / "old", made / "release", output=output, patch=patch, progress=False, **options)

    before, mine = contents(made), tmp_path / "mine"
    mine.write_text("mine")
    for output, patch, match in (
        (tmp_path / "out", mine, "exists already"),
        (tmp_path / "out", tmp_path, "exists already"),
        (tmp_path / "out", tmp_path / "absent" / "x", "cannot be written"),
        (tmp_path / "out", tmp_path / ("x" * 300), "cannot be written"),
        (tmp_path / "out", tmp_path / "out" / "x", "would lie in the output"),
        (tmp_path / "out", made / "old" / "x", "would lie in the output"),
        (made / "old" / "x", tmp_path / "x", "lies in the other"),
    ):
        with pytest.raises(InputError, match=match):
            delta(output, patch)
    with pytest.raises(InputError, match="lies in the other"):
        delta(made / "old", restart=True)
    with pytest.raises(InputError, match="exists already"):
        delta(made / "new", mine, resume=True)
    assert list(tmp_path.iterdir()) == [mine] and mine.read_text() == "mine"
    delta(made / "new", resume=True)
    assert {*contents(made)} == {*before}

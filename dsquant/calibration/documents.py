"""Documents of texts, mixes and hub sets: each a text, or the messages of a conversation (`records`)."""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dsquant.calibration.records import column_of, document_of
from dsquant.errors import InputError, UsageError
from dsquant.files.strict_json import parse_json
from dsquant.files.strict_yaml import read_yaml

_PACKAGE = Path(__file__).parent.parent
# Beside the package in a checkout, inside it in a wheel.
FOLDERS = (_PACKAGE.parent / "calibration", _PACKAGE / "assets" / "calibration")
HUB_SPEC = re.compile(
    r"hf:(?P<name>[\w.-]+(?:/[\w.-]+)?)(?:/(?P<config>[\w.-]+))?(?::(?P<split>[\w.\[\]%:-]+))?(?:#(?P<column>\w+))?"
)


@dataclass(frozen=True)
class TextSource:
    """One source of documents."""

    name: str
    spec: str
    """A file, a folder of the shipped texts, or `hf:NAME`."""
    share: float
    """Of the samples."""
    columns: tuple[tuple[str, str], ...] = ()
    """(part, column) of a hub set that keeps a dialogue in columns; parts are prompt, reasoning and completion."""


def text_sources(spec: str, share: float) -> list[TextSource]:
    """Returns the sources of a text that a user names, a file, the name of a mix, or `hf:NAME`: one, or those in the
    mix's YAML file. `share` is the part of all samples that they give together."""
    mix = next((folder / f"{spec}.yaml" for folder in FOLDERS if (folder / f"{spec}.yaml").is_file()), None)
    if mix is None or Path(spec).exists() or not re.fullmatch(r"[\w-]+", spec):
        return [TextSource(spec if spec.startswith("hf:") else Path(spec).name, spec, share)]
    entries = read_yaml(mix, "mix")["sources"]
    total = sum(entry["weight"] for entry in entries)
    return [
        TextSource(
            f"{spec}:{entry['source']}",
            entry["source"],
            share * entry["weight"] / total,
            tuple(entry.get("columns", {}).items()),
        )
        for entry in entries
    ]


def documents_of(spec: str, columns: dict[str, str] | None = None) -> Iterator[Any]:
    """Yields every document of a source, a text or a list of messages; `columns` (part -> column) is for a hub set that
    keeps a dialogue in columns. Raises InputError where it is missing or damaged, UsageError for a malformed spec."""
    if spec.startswith("hf:"):
        yield from _hub_documents(spec, columns or {})
        return
    file, column = split_column(spec)
    for path in _paths(file):
        if path.suffix in _TABLES:
            raise InputError(f"{path}: {_TABLES[path.suffix]}")
        if path.suffix not in _RECORDS:
            yield _read_text(path)
            continue
        for record, where in _RECORDS[path.suffix](path):
            if column is not None:
                record = {"text": column_of(record, column, where)}
            yield document_of(record, where)


def split_column(spec: str) -> tuple[str, str | None]:
    """Splits FILE#COLUMN, for files of records; a file of that whole name comes first."""
    file, _, column = spec.rpartition("#")
    is_column = Path(file).suffix in _RECORDS and not Path(spec).expanduser().exists()
    return (file, column) if is_column else (spec, None)


def _paths(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if re.fullmatch(r"[\w-]+(/[\w-]+)*/\*", spec) and not path.is_absolute():  # a folder of the shipped texts
        for folder in FOLDERS:
            found = sorted(path for path in folder.glob(spec) if path.is_file())
            if found:
                return found
    if path.is_dir():
        raise InputError(f"text {spec!r}: a folder; name each of its files")
    if path.with_name(path.name.partition("#")[0]).is_file():
        raise InputError(f"text {spec!r}: only {' and '.join(_RECORDS)} files have columns; leave #... out")
    mixes = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
    raise InputError(
        f"text {spec!r}: no such file, and no mix of that name (there are {', '.join(mixes)}); "
        "hub sets are written hf:NAME"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors put a byte order mark before UTF-8
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); give text in UTF-8, .jsonl or .parquet") from error
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a text file") from error


def _lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Yields the records of a file of JSON lines, one at a time, and where each stands."""
    try:
        # Not splitlines: a JSON text may hold U+2028 and its like as they are.
        with path.open(encoding="utf-8-sig", newline="\n") as file:
            for number, line in enumerate(file, start=1):
                if line.strip():
                    where = f"{path}, line {number}"
                    yield parse_json(line, where, "mend the line or leave it out"), where
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error}); give text in UTF-8, .jsonl or .parquet") from error
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a text file") from error


def _parquet_rows(path: Path) -> Iterator[tuple[Any, str]]:
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except ImportError:
        raise
    except Exception as error:  # pyarrow's errors have no common base
        raise InputError(f"{path}: not a readable parquet file: {error}") from error
    for number, record in enumerate(table):
        yield record, f"{path}, row {number}"


_RECORDS = {".jsonl": _lines, ".parquet": _parquet_rows}
_TABLES = {
    ".csv": "a table, not a text; write its rows as lines of JSON (pandas: read_csv(FILE).to_json('FILE.jsonl', "
    "orient='records', lines=True))",
    ".json": "records in one JSON text; write one a line (jq -c '.[]' FILE.json > FILE.jsonl)",
}
"""What records also come in, and how they become a file that is read one by one."""


def _hub_documents(spec: str, columns: dict[str, str]) -> Iterator[Any]:
    """Streams a hub set; `hf:owner/name/config:split#column`, or `hf:name` where it has no owner."""
    match = HUB_SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"text {spec!r}: write hub sets as hf:NAME[/CONFIG][:SPLIT][#COLUMN]")
    name = match["name"]
    if any(set(part) == {"."} for part in name.split("/")) or Path(name).is_dir():
        raise InputError(f"text {spec!r}: hf: is for sets on the hub, {name} is a folder here; name its files instead")
    import datasets
    from datasets.packaged_modules import _PACKAGED_DATASETS_MODULES as loaders

    if name in loaders:  # it would take whatever files of its kind lie in the folder that this process runs in
        raise InputError(f"text {spec!r}: {name} is a loader of local files, no set on the hub; name its files instead")
    try:
        records = datasets.load_dataset(name, match["config"], split=match["split"] or "train", streaming=True)
        for number, record in enumerate(records):
            where = f"{spec}, record {number}"
            if match["column"]:
                record = {"text": column_of(record, match["column"], where)}
            elif columns:
                record = {part: column_of(record, column, where) for part, column in columns.items()}
            yield document_of(record, where)
    except InputError:
        raise
    except ImportError:
        raise
    except Exception as error:  # the hub, the network and the set's own loader each raise their own
        raise InputError(
            f"text {spec!r}: the hub did not give it: {error}; r1-mix, which comes with dsquant, and files need no hub"
        ) from error


def shuffled(documents: Iterator[Any], seed: int, name: str, buffer: int = 4096) -> Iterator[Any]:
    """Yields documents in an order that depends on seed and source name alone; at most `buffer` are held."""
    order = random.Random(f"{seed} {name}")
    held: list[Any] = []
    for document in documents:
        held.append(document)
        if len(held) == buffer:
            yield held.pop(order.randrange(buffer))
    order.shuffle(held)
    yield from held

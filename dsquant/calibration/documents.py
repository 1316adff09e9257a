"""Documents of texts, mixes and hub sets: each a text, or the messages of a conversation.

Not covered: audio or images in messages, and tool calls; such messages are refused.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

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
    for path in _paths(spec):
        if path.suffix == ".jsonl":
            yield from _lines(path)
        elif path.suffix == ".parquet":
            yield from _parquet_documents(path)
        else:
            yield _read_text(path)


def _paths(spec: str) -> list[Path]:
    path = Path(spec).expanduser()
    if path.is_file():
        return [path]
    if re.fullmatch(r"[\w-]+(/[\w-]+)*/\*", spec) and not path.is_absolute():  # a folder of the shipped texts
        for folder in FOLDERS:
            found = sorted(path for path in folder.glob(spec) if path.is_file())
            if found:
                return found
    mixes = sorted({path.stem for folder in FOLDERS for path in folder.glob("*.yaml")})
    raise InputError(
        f"text {spec!r}: no such file, and no mix of that name (there are {', '.join(mixes)}); "
        "hub sets are written hf:NAME"
    )


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # editors put a byte order mark before UTF-8
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 text ({error})") from error
    except (OSError, MemoryError) as error:
        raise InputError(f"{path}: cannot be read ({error}); name a text file") from error


def _lines(path: Path) -> Iterator[Any]:
    # Not splitlines: a JSON text may hold U+2028 and its like as they are.
    for number, line in enumerate(_read_text(path).split("\n"), start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        yield _document(parse_json(line, where, "mend the line or leave it out"), where)


def _document(record: Any, where: str) -> Any:
    """The text or the messages in a record."""
    if isinstance(record, dict):
        if isinstance(record.get("text"), str):
            return record["text"]
        if isinstance(record.get("messages"), list):
            return _checked_messages(record["messages"], where)
        if isinstance(record.get("prompt"), str) and isinstance(record.get("completion"), str):
            answer = {"role": "assistant", "content": record["completion"]}
            if isinstance(record.get("reasoning"), str):
                answer["reasoning_content"] = record["reasoning"]
            return [{"role": "user", "content": record["prompt"]}, answer]
    raise InputError(f"{where}: expected an object with 'text', 'messages', or 'prompt' and 'completion'")


def _checked_messages(messages: list[Any], where: str) -> list[dict[str, str]]:
    for message in messages:
        known = isinstance(message, dict) and message.get("role") in ("system", "user", "assistant")
        if not known or not isinstance(message.get("content"), str):
            raise InputError(f"{where}: each message needs a 'role' (system, user, assistant) and a text 'content'")
    return messages


def _parquet_documents(path: Path) -> Iterator[Any]:
    import datasets

    try:
        table = datasets.Dataset.from_parquet(str(path))
    except ImportError:
        raise
    except Exception as error:  # pyarrow's errors have no common base
        raise InputError(f"{path}: not a readable parquet file: {error}") from error
    for number, record in enumerate(table):
        yield _document(record, f"{path}, row {number}")


def _hub_documents(spec: str, columns: dict[str, str]) -> Iterator[Any]:
    """Streams a hub set; `hf:owner/name/config:split#column`, or `hf:name` where it has no owner."""
    match = HUB_SPEC.fullmatch(spec)
    if match is None:
        raise UsageError(f"text {spec!r}: write hub sets as hf:NAME[/CONFIG][:SPLIT][#COLUMN]")
    name = match["name"]
    if any(set(part) == {"."} for part in name.split("/")) or Path(name).is_dir():
        raise InputError(f"text {spec!r}: hf: is for sets on the hub, {name} is a folder here; name its files instead")
    import datasets

    try:
        records = datasets.load_dataset(name, match["config"], split=match["split"] or "train", streaming=True)
        for number, record in enumerate(records):
            if match["column"]:
                record = {"text": record[match["column"]]}
            elif columns:
                record = {part: record[column] for part, column in columns.items()}
            yield _document(record, f"{spec}, record {number}")
    except InputError:
        raise
    except ImportError:
        raise
    except Exception as error:  # the hub, the network and the set's own loader each raise their own
        raise InputError(f"text {spec!r}: the hub did not give it: {error}") from error


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

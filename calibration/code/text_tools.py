"""Text processing: a Markdown subset, diffs, fuzzy search, CSV reports and a log analyser with a command line."""

from __future__ import annotations

import argparse
import collections
import csv
import datetime as dt
import functools
import html
import io
import itertools
import re
import statistics
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

INLINE = [
    (re.compile(r"`([^`]+)`"), r"<code>\1</code>"),
    (re.compile(r"\*\*([^*]+)\*\*"), r"<strong>\1</strong>"),
    (re.compile(r"\*([^*]+)\*"), r"<em>\1</em>"),
    (re.compile(r"\[([^\]]+)\]\((https?://[^\s)]+)\)"), r'<a href="\2">\1</a>'),
]


def inline(text: str) -> str:
    text = html.escape(text, quote=False)
    for pattern, replacement in INLINE:
        text = pattern.sub(replacement, text)
    return text


def blocks(lines: Iterable[str]) -> Iterator[tuple[str, list[str]]]:
    """Groups lines into ("heading" | "list" | "code" | "paragraph", lines)."""
    pending: list[str] = []
    kind = "paragraph"
    in_code = False
    for line in itertools.chain(lines, [""]):
        line = line.rstrip("\n")
        if line.startswith("```"):
            if pending:
                yield ("code" if in_code else kind), pending
                pending = []
            in_code = not in_code
            continue
        if in_code:
            pending.append(line)
            continue
        if not line.strip():
            if pending:
                yield kind, pending
            pending, kind = [], "paragraph"
        elif line.startswith("#"):
            yield "heading", [line]
        else:
            if not pending:
                kind = "list" if re.match(r"[-*] ", line) else "paragraph"
            pending.append(line)


def to_html(markdown: str) -> str:
    out = []
    for kind, lines in blocks(markdown.splitlines()):
        if kind == "heading":
            level = len(lines[0]) - len(lines[0].lstrip("#"))
            out.append(f"<h{level}>{inline(lines[0][level:].strip())}</h{level}>")
        elif kind == "code":
            out.append("<pre><code>" + html.escape("\n".join(lines)) + "</code></pre>")
        elif kind == "list":
            items = "".join(f"<li>{inline(line[2:])}</li>" for line in lines)
            out.append(f"<ul>{items}</ul>")
        else:
            out.append(f"<p>{inline(' '.join(lines))}</p>")
    return "\n".join(out)


def longest_common_subsequence(a: Sequence[str], b: Sequence[str]) -> list[tuple[int, int]]:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in range(len(a) - 1, -1, -1):
        for j in range(len(b) - 1, -1, -1):
            table[i][j] = table[i + 1][j + 1] + 1 if a[i] == b[j] else max(table[i + 1][j], table[i][j + 1])
    pairs, i, j = [], 0, 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif table[i + 1][j] >= table[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs


def diff(a: Sequence[str], b: Sequence[str]) -> Iterator[str]:
    i = j = 0
    for x, y in [*longest_common_subsequence(a, b), (len(a), len(b))]:
        yield from (f"- {line}" for line in a[i:x])
        yield from (f"+ {line}" for line in b[j:y])
        if x < len(a):
            yield f"  {a[x]}"
        i, j = x + 1, y + 1


@functools.lru_cache(maxsize=4096)
def edit_distance(a: str, b: str) -> int:
    """Levenshtein distance, one row at a time."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def suggest(word: str, vocabulary: Iterable[str], limit: int = 3) -> list[str]:
    scored = sorted((edit_distance(word.lower(), known.lower()), known) for known in vocabulary)
    return [known for distance, known in scored[:limit] if distance <= max(2, len(word) // 3)]


LOG_LINE = re.compile(
    r'(?P<host>\S+) \S+ \S+ \[(?P<time>[^\]]+)\] "(?P<method>[A-Z]+) (?P<path>\S+) [^"]*" (?P<status>\d{3}) (?P<size>\d+|-)(?: (?P<ms>[\d.]+))?'
)


class LogSummary:
    def __init__(self) -> None:
        self.statuses: collections.Counter[int] = collections.Counter()
        self.paths: collections.Counter[str] = collections.Counter()
        self.latencies: dict[str, list[float]] = collections.defaultdict(list)
        self.bad_lines: list[tuple[int, str]] = []
        self.first: dt.datetime | None = None
        self.last: dt.datetime | None = None

    def feed(self, lines: Iterable[str]) -> None:
        for number, line in enumerate(lines, start=1):
            match = LOG_LINE.match(line)
            if match is None:
                self.bad_lines.append((number, line.rstrip()))
                continue
            when = dt.datetime.strptime(match["time"], "%d/%b/%Y:%H:%M:%S %z")
            self.first = min(filter(None, (self.first, when)))
            self.last = max(filter(None, (self.last, when)))
            path = match["path"].partition("?")[0]
            self.statuses[int(match["status"])] += 1
            self.paths[path] += 1
            if match["ms"]:
                self.latencies[path].append(float(match["ms"]))

    def rows(self) -> Iterator[dict[str, object]]:
        for path, count in self.paths.most_common():
            times = self.latencies.get(path, [])
            yield {
                "path": path,
                "requests": count,
                "median_ms": round(statistics.median(times), 1) if times else "",
                "p95_ms": round(statistics.quantiles(times, n=20)[18], 1) if len(times) > 1 else "",
            }

    def to_csv(self) -> str:
        buffer = io.StringIO()
        writer = csv.DictWriter(buffer, fieldnames=["path", "requests", "median_ms", "p95_ms"], lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        return buffer.getvalue()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="text-tools")
    commands = parser.add_subparsers(dest="command", required=True)
    render = commands.add_parser("render", help="Markdown to HTML")
    render.add_argument("file", type=Path)
    logs = commands.add_parser("logs", help="summarise access logs")
    logs.add_argument("files", nargs="+", type=Path)
    logs.add_argument("--fail-on-bad-lines", action="store_true")
    options = parser.parse_args(argv)
    if options.command == "render":
        print(to_html(options.file.read_text(encoding="utf-8")))
        return 0
    summary = LogSummary()
    for path in options.files:
        with path.open(encoding="utf-8", errors="replace") as file:
            summary.feed(file)
    print(summary.to_csv(), end="")
    for number, line in summary.bad_lines[:5]:
        print(f"line {number}: cannot read {line!r}", file=sys.stderr)
    return 1 if summary.bad_lines and options.fail_on_bad_lines else 0


def test_markdown_escapes_html_before_it_adds_its_own() -> None:
    assert to_html("a < b and **c**") == "<p>a &lt; b and <strong>c</strong></p>"


def test_diff_marks_changed_lines() -> None:
    assert list(diff(["a", "b", "c"], ["a", "x", "c"])) == ["  a", "- b", "+ x", "  c"]


def test_suggestions_are_close() -> None:
    assert suggest("pyhton", ["python", "perl", "typhoon"])[0] == "python"


if __name__ == "__main__":
    raise SystemExit(main())

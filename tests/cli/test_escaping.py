"""Names and prompts of others in every medium: they show as what they are."""

import io
import json
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from markdown_it import MarkdownIt
from prometheus_client.parser import text_string_to_metric_families

from dsquant.cli import main
from dsquant.escaping import markdown, markdown_cell, printable
from dsquant.evaluation.report.report_files import write_reports
from dsquant.pipeline.card import _markdown_table
from dsquant.reporting.notebook import as_html, as_text, plain_console, table_of
from dsquant.reporting.progress import Progress, silent
from dsquant.reporting.prometheus import monitored
from dsquant.reporting.terminal import print_evaluation, progress_bar
from tests.support.evaluations import candidate, evaluation

# Each would be a tag, a link, a style, a cell, or an order to a terminal.
EVIL = (
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "![pixel](http://evil/x.png) [click](javascript:alert(1)) [a][b] [a]: http://evil",
    "a|b\\|c **bold** __bold__ _it_ ~~gone~~ `code` $x$ &lt; &#60;b&#62;",
    "[red]red[/red] [/nothing] [link=http://evil]x[/link] :skull: \\[x]",
    "\x1b[31mred\x1b]0;title\x07 \x9b31m \u202eback \r\nnew line\n# heading\n\n<b>",
    "\udcff no text",
)
PLAIN = MarkdownIt("commonmark").enable(["table", "strikethrough"])


class Parts(HTMLParser):
    """The tags and the words of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.words: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.append(tag)

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())


@pytest.mark.parametrize("text", EVIL)
def test_markdown_shows_text_as_it_is(text: str) -> None:
    line = " ".join(printable(" ".join(text.splitlines())).split())
    paragraph = Parts(PLAIN.render(f"about {markdown(text)} x"))
    assert paragraph.text == f"about {line} x" and paragraph.tags == ["p"]
    table = Parts(PLAIN.render(_markdown_table(["a", "b"], [[text, "2"]])))
    assert line in table.text and table.tags == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]


@given(st.text(alphabet="<>&[]()!*_`|\\~$:#-+ ab1\n", max_size=30))
def test_no_text_makes_markdown_of_its_own(text: str) -> None:
    assert Parts(PLAIN.render(f"x{markdown(text)}x")).tags == ["p"]
    cells = Parts(PLAIN.render(f"|a|b|\n|---|---|\n|x{markdown_cell(text)}x|2|")).tags
    assert cells == ["table", "thead", "tr", "th", "th", "tbody", "tr", "td", "td"]


def test_names_as_they_are_in_use_stay_readable_in_markdown() -> None:
    for name in ("model.layers.0.self_attn.q_a_proj.weight", "0.013 [0.012, 0.014]", "r1-awq (4 bits), -3 %, C# #1"):
        assert markdown(name) == name


@pytest.mark.parametrize("text", EVIL)
def test_reports_carry_no_markup_of_names_and_prompts(text: str, tmp_path: Path) -> None:
    tags = []
    for number, words in enumerate(("harmless", text)):
        one = candidate(words, 0.02, 10**6)
        assert one.drift is not None
        example = replace(one.drift.examples[0], name=words, prompt=words, original=words, candidate=words + "x")
        one = replace(one, drift=replace(one.drift, examples=(example,)), path=words)
        found = replace(evaluation(one), caveats=(words,))
        found = replace(found, reference=replace(found.reference, path=words, architecture=words))
        folder = tmp_path / str(number)
        write_reports(found, folder)
        page, report = (folder / "report.html").read_text(), (folder / "report.md").read_text()
        assert not set("\x1b\x07\x9b\u202e") & set(page + report)
        small = {"small"}  # our own, around what looks like an interval
        tags.append(([tag for tag in Parts(page).tags if tag not in small], Parts(PLAIN.render(report)).tags))
    assert tags[0] == tags[1]
    assert json.loads((tmp_path / "1" / "report.json").read_text())["candidates"][0]["name"] == text
    output = io.StringIO()
    print_evaluation(found, None, plain_console(file=output, width=200))
    assert not set("\x1b\x07\x9b\u202e\r\U0001f480") & set(output.getvalue())


def test_terminal_and_notebook_show_names_that_look_like_markup() -> None:
    for text in EVIL[:4]:
        shown = " ".join(as_text([table_of(text, (text, "b"), [(text, "1")]), text], width=300).split())
        assert shown.count(" ".join(text.split())) == 4
        assert not {"script", "img", "a"} & set(Parts(as_html([text])).tags)


def test_a_progress_bar_takes_any_name(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar() as report:
        for text in EVIL:
            report(Progress("scan", 1, 2, text))
    assert "\x1b[31m" not in capsys.readouterr().err


def test_messages_drive_no_terminal() -> None:
    result = CliRunner().invoke(main, ["inspect", "/no\x1b[31mwhere\x07"])
    assert result.exit_code == 3 and "where" in result.output and "\x1b" not in result.output


@pytest.mark.parametrize("text", EVIL)
def test_gates_of_any_name_can_be_read_back_by_the_next_job(text: str, tmp_path: Path) -> None:
    file = tmp_path / "a.prom"
    gate = f'{text} "quoted" {{x}} \\n'
    with monitored(silent, file) as report:
        report(Progress("evaluate", 1, 2, "", gates={gate: True}))
    with monitored(silent, file):
        pass
    families = text_string_to_metric_families(file.read_bytes().decode())
    labels = [sample.labels for family in families for sample in family.samples if family.name == "dsquant_gate_passed"]
    assert labels == [{"gate": printable(gate)}]

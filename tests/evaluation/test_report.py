"""The reports: everything is in them, and nothing that would break a page."""

import dataclasses
import io
import json
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
from evaluations import candidate, evaluation, text_scores
from rich.console import Console

from dsquant.evaluation.intervals import Interval
from dsquant.evaluation.report.charts import Series, axis_of, line_chart, scatter_chart
from dsquant.evaluation.report.figures import short_name, size_against_drift
from dsquant.evaluation.report.markdown import markdown
from dsquant.evaluation.report.page import page
from dsquant.evaluation.report.report_files import write_reports
from dsquant.evaluation.report.tables import interval, number
from dsquant.reporting.terminal import print_evaluation

SEVERAL = evaluation(
    candidate("awq", 0.0246, 9_000_000),
    candidate("compact", 0.029, 7_000_000),
    candidate("broken", 0.6, 7_050_000),
)


class Outline(HTMLParser):
    """Checks that tags are closed in the order in which they were opened, and collects text."""

    VOID = ("meta", "br", "hr", "img", "input", "link")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.words: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.outside += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "xlink:href")]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def outline(html: str) -> Outline:
    found = Outline()
    found.feed(html)
    assert not found.open
    return found


def test_the_page_is_well_formed_loads_nothing_and_shows_the_verdict_first() -> None:
    html = page(SEVERAL)
    found = outline(html)
    words = " ".join(" ".join(found.words).split())
    assert not found.outside and "url(" not in html and "@import" not in html and "<script" not in html
    assert words.index("broken: mean_kl (breaks first in layer 2)") < words.index("At a glance") < words.index("Gates")
    assert "prefers-color-scheme: dark" in html
    for svg in re.findall(r"<svg.*?</svg>", html, flags=re.S):
        ET.fromstring(svg)
    assert words.index("awq is as near to the original as 4-bit weights usually are") < words.index("At a glance")
    for heading in ("KL by layer", "Router overlap", "KL by position, code", "Worst tensors, awq", "Mean KL"):
        assert heading in words


def test_generated_code_and_names_cannot_become_markup() -> None:
    one = candidate("<script>alert(1)</script>", 0.02, 9_000_000)
    html = page(evaluation(one))
    assert "<script>" not in html and "&lt;script&gt;" in html
    assert '"""&lt;sum&gt; &amp; more"""' in html or "&#34;&#34;&#34;&lt;sum&gt; &amp; more&#34;&#34;&#34;" in html
    outline(html)


@pytest.mark.parametrize("drift", [True, False])
def test_a_single_candidate_without_gates_is_shown_too(drift: bool) -> None:
    one = evaluation(candidate("awq", 0.02, 9_000_000, limit=None, drift=drift))
    html, text = page(one), markdown(one)
    outline(html)
    assert '<div class="verdict' not in html and "Verdict" not in text
    assert ("CodeBLEU" in html) == ("CodeBLEU" in text) == drift


def test_the_original_stands_in_the_scatter_plots_and_a_single_candidate_makes_none() -> None:
    several, single = (size_against_drift(evaluation(*some)) for some in (SEVERAL.candidates, SEVERAL.candidates[:1]))
    assert [figure.title for figure in several] == ["Mean KL", "Generated code"] and single == []
    assert all(figure.svg.count("<circle") == 4 and '"dot original"' in figure.svg for figure in several)
    assert "log scale" in several[0].svg  # though the original's KL is 0


def test_the_terminal_has_one_table_for_all_candidates_and_no_words_that_need_a_glossary() -> None:
    printed = str(SEVERAL)
    assert printed.count("On each text") == 1 and printed.count("original  ") >= 2
    assert "no gates" not in printed and re.search(r"compact +-?\+?[\d.]+", printed)
    told = printed + page(SEVERAL) + markdown(SEVERAL)
    assert not re.search(r"\bgold\b|Δp|BLEU lost", told)
    assert "-0.8 [-0.8, -0.7]" in printed


def test_tasks_stand_beside_the_original_and_those_of_a_group_in_the_files_alone() -> None:
    printed = str(SEVERAL)
    assert re.search(r"mmlu, acc +original +0\.6100 ± 0\.020 +– *\n *100 documents, 5-shot +\w", printed)
    assert "mmlu, perplexity ↓" in printed and "mmlu_anatomy" not in printed
    for text in (page(SEVERAL), markdown(SEVERAL)):
        assert "mmlu" in text and text.count("anatomy, acc") == 1 and "paired by document" in text


def test_a_verdict_tells_what_plain_rounding_costs_and_has_none_of_its_own() -> None:
    plain = dataclasses.replace(candidate("awq, plain", 0.05, 7_000_000, limit=None), plain_of="awq")
    shown = " ".join(str(evaluation(candidate("awq", 0.01, 7_000_000), plain)).split())
    assert "Over all texts 0.0130; plain rounding to the same grids would cost 0.0650." in shown
    assert "awq, plain is" not in shown and "awq, plain: layer" not in shown
    drawn = page(evaluation(candidate("awq", 0.01, 7_000_000), plain))
    assert (
        "<h1>awq against tiny-r1</h1>" in drawn and 'class="line s0 dashed"' in drawn and 'class="line s1' not in drawn
    )


def test_numbers_that_are_none_break_no_report(tmp_path: Path) -> None:
    one = candidate("nan", 0.02, 9_000_000)
    nothing = Interval(math.nan, -math.inf, math.inf, 1)
    scores = dataclasses.replace(
        text_scores(0.02), mean_kl=nothing, perplexity=math.inf, kl_by_position=((0, math.nan), (32, 0.1))
    )
    layers = tuple(dataclasses.replace(layer, kl=math.nan, local_error=math.inf) for layer in one.layers)
    gate = dataclasses.replace(one.gates[0], found=nothing, verdict="fail")
    odd = dataclasses.replace(one, texts={"code": scores, "wiki": scores}, layers=layers, gates=(gate,))
    paths = write_reports(evaluation(odd), tmp_path / "deep" / "folder")
    html = paths[2].read_text()
    outline(html)
    assert not re.search(r'(?:x|y|x1|x2|cx|cy|width|points)="[^"]*(?:nan|inf)', html)
    assert json.loads(paths[0].read_text())["candidates"][0]["layers"][0]["kl"] is None
    assert "| mean_kl on code | – [-∞, ∞] |" in paths[1].read_text()


def test_the_three_files_tell_the_same(tmp_path: Path) -> None:
    paths = write_reports(SEVERAL, tmp_path)
    assert [path.name for path in paths] == ["report.json", "report.md", "report.html"]
    found = json.loads(paths[0].read_text())
    assert found["schema_version"] == 1 and found["verdict"] == "fail"
    assert found["candidates"][2]["first_broken_layer"] == 2
    text, html = paths[1].read_text(), paths[2].read_text()
    for words in ("0.02460", "layer 2: model.layers.2", "broken", "24 prompts", "McNemar", "experts.3.down_proj"):
        assert words in text and words in html
    tables = [block for block in text.split("\n\n") if block.startswith("|")]
    assert all(len({line.count("|") for line in table.split("\n")}) == 1 for table in tables)


def test_a_notebook_shows_the_page_without_touching_the_rest_of_it() -> None:
    html = SEVERAL._repr_html_()
    style = re.search(r"<style>(.*?)</style>", html, flags=re.S)
    assert style is not None and "<html" not in html
    selectors = re.findall(r"^([^@\s{}][^{}]*)\{", style[1], flags=re.M)
    assert selectors and all(".dsquant-report" in part for selector in selectors for part in selector.split(","))


def test_printing_an_evaluation_shows_what_the_command_line_shows() -> None:
    terminal = Console(file=io.StringIO(), width=100, color_system=None)
    print_evaluation(SEVERAL, console=terminal)
    printed = str(SEVERAL)
    assert printed == terminal.file.getvalue().rstrip()  # type: ignore[attr-defined]
    assert "mean KL" in printed and all(one.name in printed for one in SEVERAL.candidates) and "\x1b" not in printed


def test_axes_have_round_ticks_inside_and_are_logarithmic_for_magnitudes() -> None:
    axis = axis_of([0.5, 3.1], 100, 0)
    assert axis.ticks() == [1.0, 2.0, 3.0]
    assert not axis.logarithmic and axis_of([0.001, 1.0], 100, 0).logarithmic
    assert axis_of([5.0, 5.0], 100, 0).ticks()
    wide = axis_of([1e-6, 1.0], 100, 0)
    assert wide.place(1e-6) > wide.place(1e-3) > wide.place(1.0) >= 0


def test_charts_of_nothing_are_empty_and_labels_do_not_lie_on_one_another() -> None:
    assert line_chart([Series("a", ((0.0, math.nan),), 0)], "x", "y") == ""
    assert scatter_chart([], "x", "y") == ""
    svg = scatter_chart([Series(f"model {number}", ((1.0, 1.0),), number) for number in range(5)], "x", "y")
    places = [
        (float(text.get("x", "0")), float(text.get("y", "0")))
        for text in ET.fromstring(svg).iter("text")
        if text.get("class") == "label"
    ]
    assert len(places) == 5 and len({round(y / 14) for _, y in places}) == 5


def test_numbers_are_written_with_the_digits_that_count() -> None:
    assert [number(value) for value in (0.024604, 5.31749, 123.456, 0.0, 1.2e-7)] == [
        "0.02460", "5.317", "123.5", "0.000", "1.20e-07",
    ]  # fmt: skip
    assert number(math.nan) == number(None) == "–" and number(math.inf) == "∞"
    assert interval(Interval(0.5, 0.25, 0.75, 3), shares=True) == "50.0% [25.0%, 75.0%]"
    assert short_name("model.layers.3.mlp.experts.17.down_proj.weight") == "3 · experts.17.down"
    assert short_name("lm_head.weight") == "lm_head.weight"


def test_a_model_that_was_only_read_says_so() -> None:
    one = candidate("awq", 0.02, 9_000_000)
    assert one.drift is not None
    nothing = dict.fromkeys(
        ("original_vs_gold", "candidate_vs_gold", "candidate_vs_original", "noise_floor", "original", "candidate")
    )
    agreement = Interval(0.9, 0.85, 0.95, 24)
    read = dataclasses.replace(
        one.drift, method="teacher_forced", note="nothing was generated: a model takes 1 TiB", agreement=agreement,
        execution=None, examples=(), measures={"greedy_agreement": agreement}, **nothing,
    )  # fmt: skip
    html, text = (
        page(evaluation(dataclasses.replace(one, drift=read))),
        markdown(evaluation(dataclasses.replace(one, drift=read))),
    )
    outline(html)
    assert all(words in text for words in ("90.0% [85.0%, 95.0%]", "Nothing was generated: a model takes 1 TiB"))
    assert "Nothing was generated: a model takes 1 TiB" in html and "Generated code" not in text

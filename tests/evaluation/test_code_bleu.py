"""CodeBLEU and its parts against examples worked by hand, and what it must not reward."""

import math
import sys
from pathlib import Path

import pytest

from dsquant.evaluation.code.code_bleu import code_bleu
from dsquant.evaluation.code.completion_scores import corpus_bleu
from dsquant.evaluation.code.data_flow import data_flow
from dsquant.evaluation.code.python_tokens import parsed, python_tokens

REFERENCE = "def f(a, b):\n    c = a + b\n    return c\n"
CODEXGLUE = Path(__file__).parents[3] / "shared" / "data" / "codexglue"


@pytest.mark.parametrize(
    "program",
    [
        REFERENCE,
        "x\n",
        "pass\n",
        "class A:\n    async def f(self):\n        async with a as b:\n            yield [c for c in b if (d := c)]\n",
        "match p:\n    case {'x': y, **r}:\n        try:\n            del y\n        except* E as e:\n            a\n",
        "def f(:\n  no python $ at all 'open",
        "# a comment alone\n",
    ],
)
def test_a_program_scores_one_against_itself(program: str) -> None:
    found = code_bleu([program], [program])
    assert (found.total, found.ngram, found.weighted_ngram) == (1, 1, 1)
    assert found.syntax in (1, None) and found.data_flow in (1, None)


def test_every_source_file_scores_one_against_itself() -> None:
    texts = [path.read_text() for path in sorted(Path(__file__).parents[2].glob("dsquant/evaluation/*.py"))]
    assert code_bleu(texts, texts).total == 1


def test_tokens_are_pythons_and_blocks_have_beginnings_and_ends() -> None:
    assert python_tokens(REFERENCE) == (
        [
            "def",
            "f",
            "(",
            "a",
            ",",
            "b",
            ")",
            ":",
            "<newline>",
            "<indent>",
            "c",
            "=",
            "a",
            "+",
            "b",
            "<newline>",
            "return",
            "c",
            "<newline>",
            "<dedent>",
        ]
    )


def test_comments_and_blank_lines_are_no_tokens_and_the_width_of_indentation_is_none_either() -> None:
    assert python_tokens("if a:  # why\n\n  b\n") == python_tokens("if a:\n    b\n")


def test_the_prefix_is_lexed_with_the_text_but_not_returned() -> None:
    assert python_tokens(" b\n", "def f(a):\n    return a +") == ["b", "<newline>", "<dedent>"]
    assert python_tokens("turn a\n", "def f(a):\n    re")[0] == "return"


def test_text_that_is_cut_off_keeps_its_tokens() -> None:
    assert python_tokens("c = (a +\n  'x y") == ["c", "=", "(", "a", "+", "'", "x", "y"]


def test_data_flow_follows_each_value_to_where_it_is_read() -> None:
    tree = parsed(REFERENCE)
    assert tree is not None
    # f is variable 0, a and b are 1 and 2, c is 3; each has one definition, number 0.
    assert dict(data_flow(tree)) == {((3, 0), (1, 0)): 1, ((3, 0), (2, 0)): 1, ("return", (3, 0)): 1}


def test_data_flow_tells_a_variables_definitions_apart() -> None:
    # Names alone say the same of both: y comes from x.
    early, late = parsed("x = 1\ny = x\nx = 2\n"), parsed("x = 1\nx = 2\ny = x\n")
    assert early is not None and late is not None
    assert dict(data_flow(early)) == {((1, 0), (0, 0)): 1}
    assert dict(data_flow(late)) == {((1, 0), (0, 1)): 1}


def test_data_flow_joins_branches_and_goes_round_loops() -> None:
    branch = parsed("if 1:\n    x = 1\nelse:\n    x = 2\nprint(x)\n")
    assert branch is not None
    assert dict(data_flow(branch)) == {("value", (0, 0)): 1, ("value", (0, 1)): 1}
    loop = parsed("x = 0\nwhile x:\n    x = x + 1\n")
    assert loop is not None
    both = {(sink, source): 1 for sink in ("test", (0, 1)) for source in ((0, 0), (0, 1))}
    assert dict(data_flow(loop)) == both


def test_each_component_is_what_it_is_by_hand() -> None:
    # Candidate: def f ( a ) : NEWLINE INDENT return a NEWLINE DEDENT   (12 tokens, 2 keywords)
    # Reference: def f ( a ) : NEWLINE INDENT return b NEWLINE DEDENT   (12 tokens)
    found = code_bleu(["def f(a):\n    return a\n"], ["def f(a):\n    return b\n"])
    # Of n-grams 1..4 the candidate has 12, 11, 10, 9; those that hold the second `a` (place 10 of 12) match none:
    # 0 unigrams beyond the clipped count of `a` (two against one), 2 bigrams, 3 trigrams, 3 four-grams.
    precisions = (11 / 12, 9 / 11, 7 / 10, 6 / 9)
    assert found.ngram == pytest.approx(math.prod(precisions) ** 0.25)
    # Two keywords of weight 1 and ten others of 0.2, of which one does not match.
    assert found.weighted_ngram == pytest.approx((2 + 9 * 0.2) / (2 + 10 * 0.2))
    assert found.syntax == 1  # names are no part of a subtree
    assert found.data_flow == 0  # the candidate returns its parameter, the reference does not
    assert found.total == pytest.approx((found.ngram + found.weighted_ngram + 1 + 0) / 4)


def test_a_shorter_candidate_pays_the_brevity_penalty_in_both_ngram_components() -> None:
    found = code_bleu(["a = b\n"], ["a = b\nc = d\n"])  # 4 tokens of 8, all of them right
    assert (found.ngram, found.weighted_ngram) == pytest.approx((math.exp(1 - 8 / 4),) * 2)


def test_syntax_is_an_f1_of_subtrees_so_a_candidate_with_everything_in_it_gains_nothing() -> None:
    # Subtrees of the reference: module, expression statement, sum. Of the candidate: those of two sums, and its module,
    # which is another one: 2 shared, 5 and 3 in all.
    found = code_bleu(["a + b\nc * d\n"], ["a + b\n"])
    assert found.syntax == pytest.approx(2 * 2 / (5 + 3))


def test_indentation_matters() -> None:
    inside = "for x in y:\n    f(x)\n    g(x)\n"
    outside = "for x in y:\n    f(x)\ng(x)\n"
    found = code_bleu([outside], [inside])
    assert found.ngram < 1 and found.syntax is not None and found.syntax < 1 and found.total < 1


@pytest.mark.parametrize("output", ["", "   \n", "def f(a, b:\n    return", "return )"])
def test_empty_and_unparsable_output_gets_nothing_for_syntax_and_data_flow(output: str) -> None:
    for reference in (REFERENCE, "pass\n"):
        found = code_bleu([output], [reference])
        assert found.syntax == 0 and found.data_flow in (0, None) and found.total < 0.2
    assert code_bleu([""], ["pass\n"]).total == 0


def test_renaming_changes_neither_syntax_nor_data_flow() -> None:
    found = code_bleu(["def g(x, y):\n    z = x + y\n    return z\n"], [REFERENCE])
    assert found.syntax == 1 and found.data_flow == 1 and found.ngram < 0.5


def test_a_completion_is_scored_without_its_prompt() -> None:
    prompt = "def f(a, b):\n    assert a and b and a + b\n"
    with_prompt = code_bleu([prompt + "    return a\n"], [prompt + "    return [b]\n"])
    alone = code_bleu(["    return a\n"], ["    return [b]\n"], [prompt])
    assert alone.total < with_prompt.total
    assert code_bleu(["    return a\n"], ["    return a\n"], [prompt]).total == 1


def test_python_nested_too_deep_is_unparsable_and_no_crash() -> None:
    deep = "x = " + "(" * 5000 + ")" * 5000
    longer = "x = " + " + ".join(["a"] * 3000)
    assert parsed(deep) is None and parsed(longer) is None
    assert code_bleu([longer], [REFERENCE]).syntax == 0


def test_corpus_bleu_of_tokens_is_one_for_the_same_and_knows_strings_with_spaces() -> None:
    program = "print('a b', \"c\")\nprint(d, e)\n"
    assert corpus_bleu([program], [program], [""]) == 1
    assert corpus_bleu(["print('ab', \"c\")\nprint(d, e)\n"], [program], [""]) < 1


@pytest.mark.skipif(not CODEXGLUE.is_dir(), reason="the shared data are not on this machine")
def test_sacrebleu_gives_codexglues_golden_figure() -> None:
    from sacrebleu.metrics.bleu import BLEU

    sides = [(CODEXGLUE / f"evaluator_{side}.txt").read_text().splitlines() for side in ("predictions", "references")]
    # That evaluator splits at spaces and smooths by adding one to the counts of every order, unigrams too.
    bleu = BLEU(tokenize="none", force=True)
    counts = bleu.corpus_score(sides[0], [sides[1]])
    orders = zip(counts.counts, counts.totals, strict=True)
    mean = sum(math.log((match + 1) / (total + 1)) for match, total in orders) / 4
    assert 100 * counts.bp * math.exp(mean) == pytest.approx(61.08, abs=0.005)


def test_nothing_of_a_program_is_run_or_warned_about() -> None:
    before = set(sys.modules)
    assert code_bleu(["import antigravity\n'\\d'\n"], ["import antigravity\n'\\d'\n"]).total == 1
    assert "antigravity" not in set(sys.modules) - before

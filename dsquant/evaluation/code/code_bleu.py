"""CodeBLEU of Python (Ren et al., arXiv 2009.10297) on the standard library's lexer and parser.

CodeBLEU is the mean of four components, each here between 0 and 1 and summed up over a corpus before it is divided:

* n-gram: BLEU-4 on Python tokens (sacrebleu's, effective order so that short programs have one).
* weighted n-gram: unigram precision with the brevity penalty, a keyword weighing five times others (section 3.1).
* syntax: subtrees that both programs have, names and constants left out (section 3.2).
* data flow: edges of the data-flow graphs that both have (section 3.3), see `data_flow`.

Where it differs from the authors' implementation (CodeXGLUE, code-to-code-trans/evaluator/CodeBLEU), on purpose:

* Tokens come from Python's lexer, not from splitting at spaces, and blocks' begins and ends are tokens. The authors'
  files hold one program a line, whose indentation is gone.
* Syntax and data flow are F1 scores. The authors divide by the reference's count alone, so that a candidate with
  everything in it scores 1.
* The weighted n-gram match is the paper's precision of unigrams; the authors' code computes a recall up to 4-grams.
* Comments are always removed as Python's; the authors' code always removes them as Java's.
* Where neither side has data flow (or syntax), the component is None and the total is the mean of the others; the
  authors' code counts 0 there with a warning, others' 1. A candidate that is empty or does not parse gets 0 against a
  reference that has some: it is never excused.
* Data flow tells a variable's definitions apart; the authors' compares names alone. Both number variables in the order
  of their appearance, so an additional variable shifts those after it.

Scores are therefore comparable among each other and not with published ones.
"""

import ast
import keyword
from collections import Counter
from collections.abc import Hashable, Sequence

import numpy as np

from dsquant.evaluation.code.data_flow import data_flow
from dsquant.evaluation.code.drift import CodeBleu
from dsquant.evaluation.code.python_tokens import Behind, parsed, python_tokens

ORDERS = 4
KEYWORD_WEIGHT, OTHER_WEIGHT = 1.0, 0.2
# Not part of a program's meaning: the use of a name follows from its place.
FIELDS_LEFT_OUT = ("ctx", "type_comment", "kind", "type_ignores")

# Places in a pair's counts, which add up over a corpus.
LENGTHS = slice(0, 2)
NGRAM_MATCHES = slice(2, 2 + ORDERS)
NGRAM_TOTALS = slice(2 + ORDERS, 2 + 2 * ORDERS)
WEIGHTED, SYNTAX, FLOW = slice(10, 12), slice(12, 15), slice(15, 18)
NUM_COUNTS = 18


def code_bleu(candidates: Sequence[str], references: Sequence[str], prefixes: Sequence[str] | None = None) -> CodeBleu:
    """Returns CodeBLEU of a corpus of programs with one reference each.

    `prefixes` are what candidate and reference both begin with; they are parsed with them and not scored.
    """
    pairs = zip(candidates, references, prefixes or [""] * len(candidates), strict=True)
    return score([pair_counts(*pair) for pair in pairs])


def pair_counts(candidate: str, reference: str, prefix: str = "") -> np.ndarray:
    """Returns the counts that one pair adds to a corpus's score, float64 [18]; `score` sums and reads them."""
    counts = np.zeros(NUM_COUNTS)
    ours, theirs = python_tokens(candidate, prefix), python_tokens(reference, prefix)
    counts[LENGTHS] = len(ours), len(theirs)
    for order in range(1, ORDERS + 1):
        found, wanted = _ngrams(ours, order), _ngrams(theirs, order)
        counts[NGRAM_MATCHES.start + order - 1] = (found & wanted).total()
        counts[NGRAM_TOTALS.start + order - 1] = found.total()
    counts[WEIGHTED] = _weight(Counter(ours) & Counter(theirs)), _weight(Counter(ours))
    trees = [parsed(prefix + text) if text.strip() else None for text in (candidate, reference)]
    subtrees = [_subtrees(tree, prefix) if tree else Counter() for tree in trees]
    counts[SYNTAX] = _matches(*subtrees)
    flows: list[Counter[Hashable]] = [Counter(dict(data_flow(tree, prefix))) if tree else Counter() for tree in trees]
    counts[FLOW] = _matches(*flows)
    return counts


def score(counts: Sequence[np.ndarray]) -> CodeBleu:
    """Returns CodeBLEU of a corpus from the `pair_counts` of its pairs."""
    total = np.sum(counts, axis=0)
    length, wanted = total[LENGTHS]
    penalty = float(np.exp(min(0.0, 1 - wanted / length))) if length else 0.0
    matched, weight = total[WEIGHTED]
    ngram, weighted = _bleu(total), penalty * float(matched / weight) if weight else 0.0
    if not length and not wanted:
        ngram = weighted = 1.0  # nothing was to be written, and nothing was
    syntax, flow = _f1(total[SYNTAX]), _f1(total[FLOW])
    components = [value for value in (ngram, weighted, syntax, flow) if value is not None]
    return CodeBleu(sum(components) / len(components), ngram, weighted, syntax, flow)


def _ngrams(tokens: Sequence[str], order: int) -> Counter[tuple[str, ...]]:
    return Counter(tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def _weight(tokens: Counter[str]) -> float:
    return sum(
        count * (KEYWORD_WEIGHT if keyword.iskeyword(token) else OTHER_WEIGHT) for token, count in tokens.items()
    )


def _bleu(total: np.ndarray) -> float:
    from sacrebleu.metrics.bleu import BLEU

    found = BLEU.compute_bleu(
        [int(count) for count in total[NGRAM_MATCHES]],
        [int(count) for count in total[NGRAM_TOTALS]],
        int(total[LENGTHS][0]),
        int(total[LENGTHS][1]),
        smooth_method="exp",
        effective_order=True,
    )
    return min(1.0, float(found.score) / 100)


def _matches(found: Counter[Hashable], wanted: Counter[Hashable]) -> tuple[int, int, int]:
    """Returns the number that both have, and that each has."""
    return (found & wanted).total(), found.total(), wanted.total()


def _f1(counts: np.ndarray) -> float | None:
    both, found, wanted = counts
    return float(2 * both / (found + wanted)) if found + wanted else None


def _subtrees(tree: ast.Module, prefix: str) -> Counter[Hashable]:
    """Returns every subtree that ends after the prefix and is more than a leaf, without names and constants' values."""
    behind, found = Behind(prefix), Counter[Hashable]()

    def visit(node: ast.AST) -> tuple[Hashable, bool]:
        """Returns the subtree of a node, and whether it ends after the prefix."""
        parts: list[Hashable] = []
        inside = False
        for field, value in ast.iter_fields(node):
            children = [part for part in (value if isinstance(value, list) else [value]) if isinstance(part, ast.AST)]
            if field in FIELDS_LEFT_OUT or not children:
                continue
            visited = [visit(child) for child in children]
            inside = inside or any(one for _, one in visited)
            parts.append((field, *(subtree for subtree, _ in visited)))
        own = behind(node)
        inside = inside if own is None else own
        kind = type(node).__name__
        if isinstance(node, ast.Constant):
            kind += f":{type(node.value).__name__}"
        subtree = (kind, *parts)
        if inside and (parts or isinstance(node, ast.stmt)):
            found[subtree] += 1
        return subtree, inside

    visit(tree)
    return found

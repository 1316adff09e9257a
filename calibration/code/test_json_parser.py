import json
import math

import pytest

from json_parser import ParseError, loads

DOCUMENTS = [
    "null",
    "[]",
    "{}",
    '"caf\\u00e9 \\ud83d\\ude00"',
    "-0",
    "1e3",
    "[1, 2.5, -3e-2, true, false, null]",
    '{"a": {"b": [{"c": "d"}]}, "e": ""}',
    ' \n\t{"spaces" : [ 1 , 2 ] } ',
]


@pytest.mark.parametrize("text", DOCUMENTS)
def test_agrees_with_the_standard_library(text):
    assert loads(text) == json.loads(text)


def test_integers_stay_integers_and_floats_floats():
    assert isinstance(loads("12"), int)
    assert isinstance(loads("12.0"), float)
    assert isinstance(loads("12e0"), float)
    assert math.copysign(1, loads("-0.0")) == -1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "unexpected end"),
        ("[1, 2", "expected ']'"),
        ('{"a" 1}', "expected ':'"),
        ("{a: 1}", "quotation marks"),
        ('{"a": 1, "a": 2}', "occurs twice"),
        ("01", "must not begin with 0"),
        ('"abc', "not closed"),
        ('"tab\there"', "control character U+0009"),
        ('"\\x41"', "unknown escape"),
        ('"\\u12g4"', "four hexadecimal digits"),
        ("[1] 2", "after the value"),
        ("nul", "expected a value"),
    ],
)
def test_errors_say_what_is_wrong(text, message):
    with pytest.raises(ParseError, match=message):
        loads(text)


def test_errors_name_line_and_column():
    with pytest.raises(ParseError) as caught:
        loads('{\n  "a": 1,\n  "b": ?\n}')
    assert (caught.value.line, caught.value.column) == (3, 8)


def test_deep_nesting_is_refused_instead_of_overflowing_the_stack():
    with pytest.raises(ParseError, match="nested deeper"):
        loads("[" * 100_000)

"""A JSON parser written by hand, with positions in its error messages.

Recursive descent over a string; numbers keep their kind (int or float), duplicate keys are an error because two
readers would otherwise disagree about which one counts.
"""

import re
from typing import NoReturn

WHITESPACE = re.compile(r"[ \t\r\n]*")
NUMBER = re.compile(r"-?(?:0|[1-9]\d*)(\.\d+)?([eE][+-]?\d+)?")
PLAIN = re.compile(r'[^"\\\x00-\x1f]*')
ESCAPES = {'"': '"', "\\": "\\", "/": "/", "b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}
LITERALS = {"true": True, "false": False, "null": None}
MAX_DEPTH = 500


class ParseError(ValueError):
    def __init__(self, message: str, text: str, position: int) -> None:
        line = text.count("\n", 0, position) + 1
        column = position - text.rfind("\n", 0, position)
        super().__init__(f"line {line}, column {column}: {message}")
        self.line, self.column = line, column


class Parser:
    def __init__(self, text: str) -> None:
        self.text = text
        self.position = 0
        self.depth = 0

    def parse(self):
        value = self.value()
        self.skip()
        if self.position != len(self.text):
            self.fail("unexpected text after the value")
        return value

    def fail(self, message: str, position: int | None = None) -> NoReturn:
        raise ParseError(message, self.text, self.position if position is None else position)

    def skip(self) -> None:
        self.position = WHITESPACE.match(self.text, self.position).end()

    def peek(self) -> str:
        self.skip()
        return self.text[self.position : self.position + 1]

    def expect(self, character: str) -> None:
        if self.peek() != character:
            self.fail(f"expected {character!r}")
        self.position += 1

    def value(self):
        start = self.peek()
        if start == "{":
            return self.nested(self.object)
        if start == "[":
            return self.nested(self.array)
        if start == '"':
            return self.string()
        if start and (start == "-" or start.isdigit()):
            return self.number()
        for word, value in LITERALS.items():
            if self.text.startswith(word, self.position):
                self.position += len(word)
                return value
        self.fail("expected a value" if start else "unexpected end of text")

    def nested(self, read):
        self.depth += 1
        if self.depth > MAX_DEPTH:
            self.fail(f"nested deeper than {MAX_DEPTH} levels")
        try:
            return read()
        finally:
            self.depth -= 1

    def object(self) -> dict:
        self.expect("{")
        found: dict = {}
        if self.peek() == "}":
            self.position += 1
            return found
        while True:
            if self.peek() != '"':
                self.fail("expected a key in quotation marks")
            where = self.position
            key = self.string()
            if key in found:
                self.fail(f"key {key!r} occurs twice", where)
            self.expect(":")
            found[key] = self.value()
            if self.peek() == ",":
                self.position += 1
                continue
            self.expect("}")
            return found

    def array(self) -> list:
        self.expect("[")
        found: list = []
        if self.peek() == "]":
            self.position += 1
            return found
        while True:
            found.append(self.value())
            if self.peek() == ",":
                self.position += 1
                continue
            self.expect("]")
            return found

    def number(self) -> int | float:
        match = NUMBER.match(self.text, self.position)
        if match is None:
            self.fail("malformed number")
        self.position = match.end()
        if self.text[self.position : self.position + 1].isdigit():
            self.fail("a number must not begin with 0", match.start())
        fraction, exponent = match.groups()
        return float(match[0]) if fraction or exponent else int(match[0])

    def string(self) -> str:
        opening = self.position
        self.position += 1
        parts: list[str] = []
        while True:
            match = PLAIN.match(self.text, self.position)
            parts.append(match[0])
            self.position = match.end()
            character = self.text[self.position : self.position + 1]
            if character == '"':
                self.position += 1
                return "".join(parts)
            if character == "\\":
                parts.append(self.escape())
            elif not character:
                self.fail("string is not closed", opening)
            else:
                self.fail(f"control character U+{ord(character):04X} in a string")

    def escape(self) -> str:
        kind = self.text[self.position + 1 : self.position + 2]
        if kind in ESCAPES and kind:
            self.position += 2
            return ESCAPES[kind]
        if kind != "u":
            self.fail(f"unknown escape \\{kind}")
        code = self.hexadecimal()
        if 0xD800 <= code < 0xDC00 and self.text.startswith("\\u", self.position):
            before = self.position
            low = self.hexadecimal()
            if 0xDC00 <= low < 0xE000:
                return chr(0x10000 + ((code - 0xD800) << 10) + (low - 0xDC00))
            self.position = before
        return chr(code)

    def hexadecimal(self) -> int:
        digits = self.text[self.position + 2 : self.position + 6]
        if not re.fullmatch(r"[0-9a-fA-F]{4}", digits):
            self.fail("\\u needs four hexadecimal digits")
        self.position += 6
        return int(digits, 16)


def loads(text: str):
    """Parses a JSON document."""
    return Parser(text).parse()

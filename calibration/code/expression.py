"""A calculator language: lexer, Pratt parser, constant folding, interpreter and a small compiler to stack code."""

import math
import operator
import re
from dataclasses import dataclass, field
from typing import Callable, Iterator, Union


class ParseError(SyntaxError):
    pass


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    position: int


TOKEN_PATTERN = re.compile(
    r"""
    (?P<space>\s+)
  | (?P<number>\d+(\.\d*)?([eE][+-]?\d+)?|\.\d+)
  | (?P<name>[A-Za-z_]\w*)
  | (?P<op>\*\*|//|<=|>=|==|!=|[-+*/%^(),=<>?:])
    """,
    re.VERBOSE,
)


def tokenize(source: str) -> Iterator[Token]:
    position = 0
    while position < len(source):
        match = TOKEN_PATTERN.match(source, position)
        if match is None:
            raise ParseError(f"unexpected {source[position]!r} at {position}")
        kind = match.lastgroup
        if kind != "space":
            yield Token(kind, match.group(), position)
        position = match.end()
    yield Token("end", "", position)


@dataclass(frozen=True)
class Number:
    value: float


@dataclass(frozen=True)
class Name:
    name: str


@dataclass(frozen=True)
class Unary:
    op: str
    operand: "Node"


@dataclass(frozen=True)
class Binary:
    op: str
    left: "Node"
    right: "Node"


@dataclass(frozen=True)
class Call:
    function: str
    arguments: tuple["Node", ...]


@dataclass(frozen=True)
class Conditional:
    test: "Node"
    yes: "Node"
    no: "Node"


Node = Union[Number, Name, Unary, Binary, Call, Conditional]

BINDING = {"?": 1, "==": 2, "!=": 2, "<": 3, "<=": 3, ">": 3, ">=": 3, "+": 4, "-": 4, "*": 5, "/": 5, "//": 5, "%": 5, "**": 7, "^": 7}
RIGHT_ASSOCIATIVE = {"**", "^"}
UNARY_BINDING = 6


class Parser:
    def __init__(self, source: str) -> None:
        self.tokens = list(tokenize(source))
        self.place = 0

    @property
    def token(self) -> Token:
        return self.tokens[self.place]

    def advance(self) -> Token:
        token = self.token
        self.place += 1
        return token

    def expect(self, text: str) -> None:
        if self.token.text != text:
            raise ParseError(f"expected {text!r}, found {self.token.text or 'end'!r} at {self.token.position}")
        self.advance()

    def parse(self) -> Node:
        node = self.expression(0)
        if self.token.kind != "end":
            raise ParseError(f"unexpected {self.token.text!r} at {self.token.position}")
        return node

    def expression(self, minimum: int) -> Node:
        left = self.prefix()
        while BINDING.get(self.token.text, 0) > minimum:
            op = self.advance().text
            if op == "?":
                yes = self.expression(0)
                self.expect(":")
                left = Conditional(left, yes, self.expression(0))
                continue
            power = BINDING[op]
            right = self.expression(power - 1 if op in RIGHT_ASSOCIATIVE else power)
            left = Binary("**" if op == "^" else op, left, right)
        return left

    def prefix(self) -> Node:
        token = self.advance()
        if token.kind == "number":
            return Number(float(token.text))
        if token.text in ("-", "+"):
            operand = self.expression(UNARY_BINDING)
            return Unary("-", operand) if token.text == "-" else operand
        if token.text == "(":
            node = self.expression(0)
            self.expect(")")
            return node
        if token.kind == "name":
            if self.token.text != "(":
                return Name(token.text)
            self.advance()
            arguments = []
            while self.token.text != ")":
                arguments.append(self.expression(0))
                if self.token.text != ",":
                    break
                self.advance()
            self.expect(")")
            return Call(token.text, tuple(arguments))
        raise ParseError(f"unexpected {token.text or 'end'!r} at {token.position}")


OPERATORS: dict[str, Callable] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "//": operator.floordiv,
    "%": operator.mod, "**": operator.pow, "<": operator.lt, "<=": operator.le, ">": operator.gt,
    ">=": operator.ge, "==": operator.eq, "!=": operator.ne,
}
FUNCTIONS: dict[str, Callable] = {"sqrt": math.sqrt, "sin": math.sin, "cos": math.cos, "log": math.log, "max": max, "min": min, "abs": abs}
CONSTANTS = {"pi": math.pi, "e": math.e, "tau": math.tau}


@dataclass
class Environment:
    variables: dict[str, float] = field(default_factory=lambda: dict(CONSTANTS))

    def evaluate(self, node: Node) -> float:
        match node:
            case Number(value):
                return value
            case Name(name):
                try:
                    return self.variables[name]
                except KeyError:
                    raise NameError(f"unknown variable {name!r}") from None
            case Unary("-", operand):
                return -self.evaluate(operand)
            case Binary(op, left, right):
                return OPERATORS[op](self.evaluate(left), self.evaluate(right))
            case Conditional(test, yes, no):
                return self.evaluate(yes if self.evaluate(test) else no)
            case Call(function, arguments):
                if function not in FUNCTIONS:
                    raise NameError(f"unknown function {function!r}")
                return FUNCTIONS[function](*map(self.evaluate, arguments))
        raise TypeError(node)


def fold(node: Node) -> Node:
    """Replaces constant parts by their values; 0 * x is kept, since x may be infinite."""
    match node:
        case Unary("-", operand):
            inner = fold(operand)
            return Number(-inner.value) if isinstance(inner, Number) else Unary("-", inner)
        case Binary(op, left, right):
            left, right = fold(left), fold(right)
            if isinstance(left, Number) and isinstance(right, Number):
                return Number(float(OPERATORS[op](left.value, right.value)))
            if op == "*" and Number(1.0) in (left, right):
                return right if left == Number(1.0) else left
            return Binary(op, left, right)
        case Call(function, arguments):
            return Call(function, tuple(map(fold, arguments)))
        case Conditional(test, yes, no):
            test = fold(test)
            if isinstance(test, Number):
                return fold(yes if test.value else no)
            return Conditional(test, fold(yes), fold(no))
    return node


def compile_to_stack(node: Node) -> list[tuple[str, object]]:
    code: list[tuple[str, object]] = []

    def emit(part: Node) -> None:
        match part:
            case Number(value):
                code.append(("push", value))
            case Name(name):
                code.append(("load", name))
            case Unary(op, operand):
                emit(operand)
                code.append(("neg", None))
            case Binary(op, left, right):
                emit(left)
                emit(right)
                code.append(("op", op))
            case Call(function, arguments):
                for argument in arguments:
                    emit(argument)
                code.append(("call", (function, len(arguments))))
            case Conditional(test, yes, no):
                emit(test)
                jump_no = len(code)
                code.append(("jump_if_false", None))
                emit(yes)
                jump_end = len(code)
                code.append(("jump", None))
                code[jump_no] = ("jump_if_false", len(code))
                emit(no)
                code[jump_end] = ("jump", len(code))

    emit(node)
    return code


def test_precedence() -> None:
    for source, expected in [("1 + 2 * 3", 7), ("-2 ** 2", -4), ("2 ^ 3 ^ 2", 512), ("(1 + 2) * 3", 9), ("7 // 2 % 2", 1)]:
        assert Environment().evaluate(Parser(source).parse()) == expected, source


def test_conditionals_and_calls() -> None:
    env = Environment({"x": 3.0})
    assert env.evaluate(Parser("x > 2 ? max(x, 10) : 0").parse()) == 10
    assert fold(Parser("1 < 2 ? y * 1 : z").parse()) == Name("y")

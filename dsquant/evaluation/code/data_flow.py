"""Builds the data-flow graph of a Python program for CodeBLEU: which value reaches which use.

A *definition* is one place that binds a name: an assignment, a parameter, a loop's target, an import, a `def`. An
*edge* leads from a definition to a place that reads it, and says what that place makes of it: another definition, a
returned value, a condition, a stored value or an evaluated one. Names do not count (renaming changes nothing); which
definition of a name is read does.

Not covered: attributes and subscripts count as the name before them, `global` and `nonlocal` names as the
function's own, and what a called function does with its arguments is ignored.
"""

import ast
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from dsquant.evaluation.code.python_tokens import Behind

Definition = tuple[int, int]
"""Number of the variable in order of appearance, and of its definition among the variable's."""
Sink = Definition | str
Edge = tuple[Sink, Definition]

State = dict[str, tuple[int, frozenset[Definition]]]
"""Name -> its variable and the definitions that may be its value here."""

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.GeneratorExp, ast.DictComp)


def data_flow(tree: ast.Module, prefix: str = "") -> Counter[Edge]:
    """Returns the edges of a program's data flow with their counts, without reads in its beginning `prefix`."""
    walker = _Walker(Behind(prefix))
    walker.block(tree.body)
    return Counter((sink, source) for _, sink, source in walker.edges)


class _Walker:
    """Follows definitions through statements, in the order of execution."""

    def __init__(self, behind: Behind) -> None:
        self.behind = behind
        # A loop's body is walked twice; the reading place makes an edge one.
        self.edges: set[tuple[int, Sink, Definition]] = set()
        self.state: State = {}
        self._numbers: dict[tuple[int, str], int] = {}
        self._definitions: dict[tuple[int, str], Definition] = {}
        self._counts: Counter[int] = Counter()
        self._scope = 0

    def define(self, place: ast.AST, name: str) -> Definition:
        """Makes a place the only definition of a name from here on."""
        definition = self.definition(place, name)
        self.state[name] = (definition[0], frozenset({definition}))
        return definition

    def definition(self, place: ast.AST, name: str) -> Definition:
        """Returns the definition at a place; the same each time the place is walked."""
        key = (id(place), name)
        if key not in self._definitions:
            number = self._numbers.setdefault((self._scope, name), len(self._numbers))
            self._definitions[key] = (number, self._counts[number])
            self._counts[number] += 1
        return self._definitions[key]

    def bind(self, target: ast.expr, values: Sequence[ast.expr], also: Sequence[Sink] = ()) -> None:
        """Lets values flow into an assignment's target, then defines its names."""
        if isinstance(target, ast.Tuple | ast.List) and len(values) == 1:
            value = values[0]
            if isinstance(value, ast.Tuple | ast.List) and len(value.elts) == len(target.elts):
                pairs = list(zip(target.elts, value.elts, strict=True))
                for part, element in pairs:
                    self.read(element, self._sinks(part))
                for part, _ in pairs:
                    self._define_names(part)
                return
        for value in values:
            self.read(value, [*self._sinks(target), *also])
        self._define_names(target)

    def _sinks(self, target: ast.expr) -> list[Sink]:
        names = [node for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)]
        stores = any(isinstance(node, ast.Attribute | ast.Subscript) for node in ast.walk(target))
        return [*(self.definition(node, node.id) for node in names), *(["store"] if stores else [])]

    def _define_names(self, target: ast.expr) -> None:
        for node in ast.walk(target):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                self.define(node, node.id)
        self.read(target, ["store"])  # the base and the index of what is stored to

    def read(self, node: ast.AST | None, sinks: Sequence[Sink]) -> None:
        """Records the reads of an expression on behalf of the sinks."""
        if node is None:
            return
        if isinstance(node, ast.Name):
            if isinstance(node.ctx, ast.Load) and node.id in self.state and self.behind(node):
                for sink in sinks:
                    self.edges |= {(id(node), sink, source) for source in self.state[node.id][1]}
        elif isinstance(node, ast.NamedExpr):
            self.bind(node.target, [node.value], sinks)
        elif isinstance(node, COMPREHENSIONS):
            self._comprehension(node, sinks)
        elif isinstance(node, ast.Lambda):
            with self._inner(node):
                self._parameters(node.args)
                self.read(node.body, sinks)
        else:
            for child in ast.iter_child_nodes(node):
                self.read(child, sinks)

    def _comprehension(
        self, node: ast.ListComp | ast.SetComp | ast.GeneratorExp | ast.DictComp, sinks: Sequence[Sink]
    ) -> None:
        with self._inner(node):
            for part in node.generators:
                self.bind(part.target, [part.iter])
                for condition in part.ifs:
                    self.read(condition, ["test"])
            results = (node.key, node.value) if isinstance(node, ast.DictComp) else (node.elt,)
            for result in results:
                self.read(result, sinks)

    @contextmanager
    def _inner(self, node: ast.AST) -> Iterator[None]:
        """Opens a scope: its names end with it."""
        before, scope = dict(self.state), self._scope
        self._scope = id(node)
        yield
        self.state, self._scope = before, scope

    def _parameters(self, arguments: ast.arguments) -> None:
        every = [*arguments.posonlyargs, *arguments.args, arguments.vararg, *arguments.kwonlyargs, arguments.kwarg]
        for parameter in every:
            if parameter is not None:
                self.define(parameter, parameter.arg)

    def block(self, statements: Iterable[ast.stmt]) -> None:
        """Walks statements one after the other."""
        for statement in statements:
            getattr(self, f"_{type(statement).__name__.lower()}", self._other)(statement)

    def _other(self, node: ast.stmt) -> None:
        kinds = {ast.Return: "return", ast.Assert: "test"}
        for child in ast.iter_child_nodes(node):
            self.read(child, [kinds.get(type(node), "value")])

    def _assign(self, node: ast.Assign) -> None:
        for target in node.targets:
            self.bind(target, [node.value])

    def _annassign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.bind(node.target, [node.value])

    def _augassign(self, node: ast.AugAssign) -> None:
        if isinstance(node.target, ast.Name):
            sinks = self._sinks(node.target)
            if node.target.id in self.state and self.behind(node.target):
                sources = self.state[node.target.id][1]
                self.edges |= {(id(node.target), sink, source) for sink in sinks for source in sources}
        self.bind(node.target, [node.value])

    def _if(self, node: ast.If) -> None:
        self.read(node.test, ["test"])
        before = dict(self.state)
        self.block(node.body)
        after, self.state = self.state, before
        self.block(node.orelse)
        self._join(after)

    def _join(self, other: State) -> None:
        """Merges another state: both are possible from here on."""
        for name, (variable, definitions) in other.items():
            known = self.state.get(name)
            both = definitions | known[1] if known else definitions
            self.state[name] = (variable, both)

    def _loop(self, body: Sequence[ast.stmt], begin: ast.While | ast.For | ast.AsyncFor) -> None:
        for _ in range(2):  # the second time with what the first has defined
            before = dict(self.state)
            if isinstance(begin, ast.While):
                self.read(begin.test, ["test"])
            else:
                self.bind(begin.target, [begin.iter])
            self.block(body)
            self._join(before)
        self.block(begin.orelse)

    def _for(self, node: ast.For | ast.AsyncFor) -> None:
        self._loop(node.body, node)

    def _while(self, node: ast.While) -> None:
        self._loop(node.body, node)

    def _with(self, node: ast.With | ast.AsyncWith) -> None:
        for item in node.items:
            if item.optional_vars is None:
                self.read(item.context_expr, ["value"])
            else:
                self.bind(item.optional_vars, [item.context_expr])
        self.block(node.body)

    def _try(self, node: ast.Try) -> None:
        before = dict(self.state)
        self.block(node.body)
        self._join(before)  # any part of the body may have run
        ends = [dict(self.state)]
        for handler in node.handlers:
            self.state = dict(ends[0])
            self.read(handler.type, ["test"])
            if handler.name:
                self.define(handler, handler.name)
            self.block(handler.body)
            ends.append(self.state)
        self.state = dict(ends[0])
        self.block(node.orelse)
        for end in ends[1:]:
            self._join(end)
        self.block(node.finalbody)

    def _functiondef(self, node: ast.FunctionDef | ast.AsyncFunctionDef) -> None:
        defaults = [value for value in (*node.args.defaults, *node.args.kw_defaults) if value is not None]
        for expression in (*node.decorator_list, *defaults):
            self.read(expression, ["value"])
        self.define(node, node.name)
        with self._inner(node):
            self._parameters(node.args)
            self.block(node.body)

    def _classdef(self, node: ast.ClassDef) -> None:
        for expression in (*node.decorator_list, *node.bases, *(keyword.value for keyword in node.keywords)):
            self.read(expression, ["value"])
        self.define(node, node.name)
        with self._inner(node):
            self.block(node.body)

    def _import(self, node: ast.Import | ast.ImportFrom) -> None:
        for alias in node.names:
            self.define(alias, alias.asname or alias.name.split(".")[0])

    def _delete(self, node: ast.Delete) -> None:
        for target in node.targets:
            if isinstance(target, ast.Name):
                self.state.pop(target.id, None)

    def _match(self, node: ast.Match) -> None:
        before, ends = dict(self.state), []
        for case in node.cases:
            self.state = dict(before)
            captures = [part for part in ast.walk(case.pattern) if getattr(part, "name", None)]
            names = [self.definition(part, str(part.name)) for part in captures if hasattr(part, "name")]
            self.read(node.subject, ["test", *names])
            for part in captures:
                if hasattr(part, "name"):
                    self.define(part, str(part.name))
            self.read(case.guard, ["test"])
            self.block(case.body)
            ends.append(self.state)
        self.state = before
        for end in ends:
            self._join(end)

    _asyncfunctiondef, _asyncfor, _asyncwith, _importfrom, _trystar = _functiondef, _for, _with, _import, _try

"""A formula as a graph of operations, each of which is there once, and its source as Python.

Whoever reads a formula twice, or makes a derivative of it, gets the same node for the same
operation on the same arguments: what is computed twice in the maths is computed once in the code.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from .. import formula
from .written import Written

__all__ = ["LEAVES", "Graph", "names_in_code", "source_of"]

_ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"
}  # fmt: skip
_COMPARES: dict[type[ast.cmpop], str] = {
    ast.Lt: "<", ast.LtE: "<=", ast.Gt: ">", ast.GtE: ">=", ast.Eq: "==", ast.NotEq: "!="
}  # fmt: skip
#: What has no arguments that are operations.
LEAVES = ("tensor", "option", "number")
#: A whole power up to this one is made of products.
_MOST_PRODUCTS = 32
#: Of operations in one expression: Python's parser takes some hundred parentheses.
_DEEPEST = 12
_OPERATORS: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b,
    "/": lambda a, b: a / b, "power": lambda a, b: a**b,
    "<": lambda a, b: a < b, "<=": lambda a, b: a <= b, ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b, "==": lambda a, b: a == b, "!=": lambda a, b: a != b,
}  # fmt: skip


class Graph:
    """Operations, known by their numbers; the arguments of one have smaller numbers.

    An operation is its name and its arguments. The names are those of operators and of the
    vocabulary, and for what has no arguments "tensor", "option" and "number".
    """

    def __init__(self) -> None:
        self.operations: list[tuple[str, tuple[Any, ...]]] = []
        self._known: dict[Any, int] = {}

    def _add(self, name: str, *arguments: Any) -> int:
        key = (name, *map(repr, arguments))  # of which 0.0 and -0.0 have two
        if name in ("+", "*") and (name, *key[:0:-1]) in self._known:
            key = (name, *key[:0:-1])
        if key not in self._known:
            self._known[key] = len(self.operations)
            self.operations.append((name, arguments))
        return self._known[key]

    def tensor(self, name: str) -> int:
        return self._add("tensor", name)

    def option(self, name: str) -> int:
        return self._add("option", name)

    def number(self, value: float | bool) -> int:
        return self._add("number", value)

    def number_of(self, node: int) -> float | None:
        """The number that an operation is, None if it is none."""
        name, arguments = self.operations[node]
        return arguments[0] if name == "number" else None

    def call(self, name: str, *arguments: int) -> int:
        """An operation, or what is the same to the last bit and simpler."""
        values = [self.number_of(a) for a in arguments]
        if all(v is not None for v in values):
            return self.number(_computed(name, values))
        if name == "where":
            _, a, b = arguments
            if values[0] is not None or a == b:
                return a if values[0] or a == b else b
        if name in ("+", "-", "*", "/"):
            return self._arithmetic(name, *arguments)
        if name == "negative":
            return self._negative(*arguments)
        if name in ("**", "power"):
            return self._power(*arguments)
        return self._add(name, *arguments)

    def _negative(self, a: int) -> int:
        name, arguments = self.operations[a]
        if name == "negative":
            return int(arguments[0])
        return self._add("negative", a)

    def _arithmetic(self, name: str, a: int, b: int) -> int:
        x, y = self.number_of(a), self.number_of(b)
        if name in "*/" and y in (1.0, -1.0):
            return a if y == 1.0 else self._negative(a)
        if name == "*" and x in (1.0, -1.0):
            return b if x == 1.0 else self._negative(b)
        if name == "*" and x is not None and math.frexp(x)[0] == 0.5:
            inner, arguments = self.operations[b]
            if inner == "*" and (factor := self.number_of(arguments[0])) is not None:
                return self._arithmetic("*", self.number(x * factor), arguments[1])
        if name in "*/" and "negative" in (self.operations[a][0], self.operations[b][0]):
            # a sign is taken out of products, so that those that differ by it alone are one
            size = self._arithmetic(name, *map(self._without_sign, (a, b)))
            both = self.operations[a][0] == self.operations[b][0]
            return size if both else self._negative(size)
        if name in "+-" and self.operations[b][0] == "negative":
            return self._arithmetic("-" if name == "+" else "+", a, self._without_sign(b))
        return self._add(name, a, b)

    def _without_sign(self, node: int) -> int:
        name, arguments = self.operations[node]
        return int(arguments[0]) if name == "negative" else node

    def _power(self, a: int, b: int) -> int:
        exponent = self.number_of(b)
        if exponent == 0.0:
            return self.number(1.0)
        if exponent == 1.0:
            return a
        if exponent in (0.5, -0.5):
            return self._add("sqrt" if exponent > 0 else "rsqrt", a)
        return self._add("power", a, b)

    def exponents(self) -> tuple[str, ...]:
        """The options to whose power something is raised."""
        powers = [arguments for name, arguments in self.operations if name == "power"]
        found = [self.operations[exponent] for _, exponent in powers]
        return tuple(dict.fromkeys(given[0] for name, given in found if name == "option"))

    def multiplied_out(self, nodes: Sequence[int]) -> dict[int, int]:
        """What to compute in place of some operations and their arguments: products for powers.

        That is for the end: of x ** -2 the derivative at infinity is 0, of 1 / (x * x) it is NaN.
        """
        wanted = self.reached_from(nodes)
        instead: dict[int, int] = {}
        for node in sorted(wanted):
            name, arguments = self.operations[node]
            if name in LEAVES:
                instead[node] = node
                continue
            exponent = self.number_of(arguments[1]) if name == "power" else None
            given = [instead[a] for a in arguments]
            if exponent is not None and exponent % 1 == 0 and abs(exponent) <= _MOST_PRODUCTS:
                instead[node] = self._product(given[0], int(exponent))
            else:
                instead[node] = self.call(name, *given)
        return instead

    def _product(self, a: int, exponent: int) -> int:
        result, square, left = None, a, abs(exponent)
        while left:
            if left % 2:
                result = square if result is None else self.call("*", result, square)
            left //= 2
            if left:
                square = self.call("*", square, square)
        assert result is not None
        return result if exponent > 0 else self.call("/", self.number(1.0), result)

    def reached_from(self, nodes: Sequence[int]) -> set[int]:
        """These operations, and all that they use."""
        found: set[int] = set()
        pending = list(nodes)
        while pending:
            node = pending.pop()
            if node not in found:
                found.add(node)
                name, arguments = self.operations[node]
                pending += () if name in LEAVES else arguments
        return found

    # -- from a user's function ----------------------------------------------------------------

    def read(
        self, written: Written, numbers: Mapping[str, float]
    ) -> tuple[list[int], dict[int, str]]:
        """What a function returns, and the names that it gives to operations.

        numbers: of options that are known.
        """
        known = {name: self.tensor(name) for name in written.tensors}
        known |= {name: self.option(name) for name in (*written.options, *written.given)}
        known |= {name: self.number(number) for name, number in numbers.items()}
        named: dict[int, str] = {}
        for assignment in written.assignments:
            node = self._expression(assignment.value, known)
            known[assignment.name] = node
            if self.operations[node][0] not in ("tensor", "option", "number"):
                named.setdefault(node, assignment.name)
        return [self._expression(value, known) for value in written.returned], named

    def _expression(self, node: ast.expr, known: Mapping[str, int]) -> int:
        match node:
            case ast.Constant(value=int() | float() as value):
                return self.number(float(value))
            case ast.Name(id=name):
                return known[name]
            case ast.UnaryOp(operand=operand):
                return self.call("negative", self._expression(operand, known))
            case ast.BinOp(left=left, op=op, right=right):
                a, b = self._expression(left, known), self._expression(right, known)
                return self.call(_ARITHMETIC[type(op)], a, b)
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                a, b = self._expression(left, known), self._expression(right, known)
                return self.call(_COMPARES[type(op)], a, b)
            case ast.Call(func=ast.Name(id=name), args=arguments):
                values = [self._expression(argument, known) for argument in arguments]
                if name == "rounded":  # all numbers of a loss are of one dtype
                    return values[0]
                return self.call({"divide": "/"}.get(name, name), *values)
        raise AssertionError(ast.dump(node))  # the function has been checked


def _computed(name: str, values: Sequence[Any]) -> float | bool:
    """An operation of numbers alone, in float64 and as IEEE 754 has it."""
    if name == "where":
        return values[1] if values[0] else values[2]  # type: ignore[no-any-return]
    given = [torch.tensor(v, dtype=torch.float64) for v in values]
    if name == "negative":
        result = -given[0]
    elif name in ("**", "power"):
        result = given[0] ** given[1]
    elif name in _OPERATORS:
        result = _OPERATORS[name](*given)
    else:
        result = getattr(formula, name)(*given)
    return result.item()


# -- to a function's source ------------------------------------------------------------------


def source_of(
    graph: Graph, name: str, operands: Sequence[str], results: Sequence[int],
    named: Mapping[int, str], fields: Mapping[str, str],
) -> str:  # fmt: skip
    """The source of a function of a record and the operands that returns these operations.

    Its record's name is `h`, and the vocabulary's `m`, unless operands have those names.

    Args:
        graph: of the operations.
        name: the function's.
        operands: the names of its arguments.
        results: what it returns, one after another; one alone is no tuple.
        named: operations that have names in what a user wrote.
        fields: what the record calls each option.
    """
    instead = graph.multiplied_out(results)
    results = [instead[node] for node in results]
    named = {instead[node]: name for node, name in reversed(list(named.items())) if node in instead}
    uses = [0] * len(graph.operations)
    pending = list(results)
    while pending:
        node = pending.pop()
        uses[node] += 1
        if uses[node] == 1 and graph.operations[node][0] not in LEAVES:
            pending += graph.operations[node][1]
    record, module = names_in_code(operands)
    taken = {record, module, *operands}
    depths = [0] * len(graph.operations)
    variables: dict[int, str] = {}
    lines = [f"def {name}({', '.join((record, *operands))}):"]

    def written(node: int) -> ast.expr:
        if node in variables:
            return ast.Name(variables[node])
        kind, arguments = graph.operations[node]
        if kind == "option":
            return ast.Attribute(ast.Name(record), fields[arguments[0]])
        return _written(kind, arguments, written, module)

    for node, (kind, arguments) in enumerate(graph.operations):
        if not uses[node] or kind in LEAVES:
            continue
        depths[node] = 1 + max(depths[a] for a in arguments)
        if uses[node] > 1 or node in named or depths[node] > _DEEPEST:
            depths[node] = 0
            text = ast.unparse(written(node))
            variables[node] = _free(named.get(node, f"t{node}"), taken)
            lines.append(f"    {variables[node]} = {text}")
    values = [ast.unparse(written(node)) for node in results]
    return "\n".join([*lines, f"    return {', '.join(values)}"]) + "\n"


_SYMBOLS: dict[str, ast.operator] = {word: kind() for kind, word in _ARITHMETIC.items()}
_COMPARING: dict[str, ast.cmpop] = {word: kind() for kind, word in _COMPARES.items()}


def names_in_code(operands: Sequence[str]) -> tuple[str, str]:
    """What a function of these operands calls its record, and the vocabulary."""
    taken = set(operands)
    return _free("h", taken), _free("m", taken)


def _free(name: str, taken: set[str]) -> str:
    while name in taken:
        name += "_"
    taken.add(name)
    return name


def _written(
    name: str, arguments: tuple[Any, ...], written: Callable[[int], ast.expr], module: str
) -> ast.expr:
    if name == "tensor":
        return ast.Name(arguments[0])
    if name == "number":
        return _literal(arguments[0])
    given = list(map(written, arguments))
    if name == "negative":
        return ast.UnaryOp(ast.USub(), *given)
    if name in _COMPARING:
        return ast.Compare(given[0], [_COMPARING[name]], given[1:])
    if name in _SYMBOLS:
        return ast.BinOp(given[0], _SYMBOLS[name], given[1])
    return ast.Call(ast.Attribute(ast.Name(module), name), given, [])


def _literal(value: float) -> ast.expr:
    if math.isnan(value):
        return ast.BinOp(ast.Constant(math.inf), ast.Sub(), ast.Constant(math.inf))
    if math.copysign(1.0, value) < 0:
        return ast.UnaryOp(ast.USub(), ast.Constant(-value))
    return ast.Constant(value)

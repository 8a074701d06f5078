"""What a formula may say, statement by statement, and what to write instead of all else."""

from __future__ import annotations

import ast
import difflib
import inspect
import math
from collections.abc import Callable, Collection, Sequence
from types import FunctionType, ModuleType
from typing import Any

from .. import formula
from ..errors import FormulaError

__all__ = ["Body"]

_OPERATORS = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow)
_COMPARISONS = (ast.Lt, ast.LtE, ast.Gt, ast.GtE, ast.Eq, ast.NotEq)

#: What the functions of other libraries are called here, the first that the vocabulary has.
_OTHER_NAMES = {
    "abs": ("abs", "absolute"), "absolute": ("abs", "absolute"), "fabs": ("abs", "absolute"),
    "max": ("maximum",), "fmax": ("maximum",), "min": ("minimum",), "fmin": ("minimum",),
    "sgn": ("sign",), "logsigmoid": ("log_sigmoid",), "expit": ("sigmoid",), "pow": ("power",),
}  # fmt: skip
#: What is written by other means: {m} is what the user calls the vocabulary.
_OTHER_MEANS = {
    "clamp": "{m}minimum({m}maximum(x, low), high)",
    "clip": "{m}minimum({m}maximum(x, low), high)",
    "relu": "{m}maximum(x, 0.0)",
    "pow": "x ** y",
    "power": "x ** y",
    "square": "x * x",
    "reciprocal": "1.0 / x",
    "rsqrt": "1.0 / {m}sqrt(x)",
    "add": "x + y",
    "sub": "x - y",
    "mul": "x * y",
    "div": "x / y",
    "neg": "-x",
    "lerp": "x + weight * (y - x)",
    "float": "x itself, as all numbers are floats",
    "int": "x itself, as all numbers are floats",
    "isinf": "{m}abs(x) == INFINITY, with INFINITY = math.inf ahead of the function",
    "isfinite": "{m}abs(x) < INFINITY, with INFINITY = math.inf ahead of the function",
}
#: What one element doesn't know.
_OF_ALL = ("sum", "mean", "norm", "std", "var", "median", "cumsum", "softmax", "argmax", "sort")
_STATEMENTS = {
    ast.If: "a branch; write where(condition, a, b), which computes both sides",
    ast.For: "a loop; a formula is straight-line code of one element: write the steps out",
    ast.While: "a loop; a formula is straight-line code of one element: write the steps out",
    ast.FunctionDef: "a definition within a formula; write out what it computes",
    ast.Assert: "an assertion; check options where they are given, as a formula can't raise",
    ast.Raise: "an error; check options where they are given, as a formula can't raise",
    ast.Delete: "leave it out",
    ast.Pass: "leave it out",
    ast.Import: "import ahead of the function",
    ast.ImportFrom: "import ahead of the function",
    ast.Global: "a formula can't write to names of outside; return the value",
    ast.Nonlocal: "a formula can't write to names of outside; return the value",
    ast.With: "leave the block out",
    ast.Try: "leave the block out, as a formula raises nothing",
}
_EXPRESSIONS = {
    ast.IfExp: "a branch; write where(condition, a, b), which computes both sides",
    ast.BoolOp: "conditions don't combine; nest them: where(a, where(b, x, y), y)",
    ast.Subscript: "an element has no others; a formula sees one number of each tensor",
    ast.NamedExpr: "assign in a line of its own",
    ast.Tuple: "a tuple; one name and one value a line, tuples in the return alone",
    ast.List: "a list; a formula has numbers alone",
    ast.Dict: "a dict; a formula has numbers alone",
    ast.Lambda: "a function; write out what it computes",
    ast.Starred: "name each value",
}


class Body:
    """The statements of one formula, checked in their order.

    Args:
        fail: makes the error of a node and of words.
        outside: what the names mean that the function doesn't define.
        parameters: the names of its parameters.
        conditions: those of them that are true or false.
    """

    def __init__(
        self,
        fail: Callable[[ast.AST | None, str], FormulaError],
        outside: dict[str, Any],
        parameters: Sequence[str],
        conditions: Collection[str],
    ) -> None:
        self._fail, self._outside = fail, outside
        #: whether each name that there is so far is a condition
        self._known = {name: name in conditions for name in parameters}
        self._own: set[str] = set(parameters)
        aliases = (name for name, value in outside.items() if value is formula)
        #: what stands ahead of the vocabulary's names in what users are told
        self._prefix = f"{next(aliases, 'fastopt.formula')}."

    def read(
        self, statements: list[ast.stmt]
    ) -> tuple[tuple[tuple[str, ast.expr], ...], tuple[ast.expr, ...]]:
        """The assignments as (name, value), and what is returned, in one plain form."""
        if _is_docstring(statements[0]):
            statements = statements[1:]
        for statement in statements:
            for node in ast.walk(statement):
                if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                    self._own.add(node.id)
        assignments = [self._assignment(statement) for statement in statements[:-1]]
        last = statements[-1] if statements else None
        if isinstance(last, ast.Return):
            return tuple(assignments), self._returned(last)
        if last is not None:
            self._assignment(last)  # refused for what it is, if for anything
        raise self._fail(last, "nothing is returned; end with return and the new values")

    def _returned(self, statement: ast.Return) -> tuple[ast.expr, ...]:
        value = statement.value
        if value is None:
            raise self._fail(statement, "nothing is returned; end with return and the new values")
        values = value.elts if isinstance(value, ast.Tuple) else [value]
        return tuple(map(self._number, values))

    def _assignment(self, statement: ast.stmt) -> tuple[str, ast.expr]:
        match statement:
            case ast.Assign(targets=[ast.Name(id=name)], value=ast.expr() as value):
                pass
            case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value):
                pass
            case ast.AugAssign(target=ast.Name(id=name) as target, op=op, value=right):
                left = ast.copy_location(ast.Name(name, ast.Load()), target)
                value = ast.copy_location(ast.BinOp(left, op, right), statement)
            case ast.Return():
                raise self._fail(
                    statement, "an early return; a formula has one, at its end: choose by where"
                )
            case ast.Assign() | ast.AnnAssign() | ast.AugAssign():
                raise self._fail(statement, "assign to one plain name: name = value")
            case ast.Expr(value=value):
                self._any(value)  # refused for what it is, if for anything
                raise self._fail(statement, "a value that nobody uses; leave it out")
            case _:
                words = _STATEMENTS.get(type(statement), "write assignments and one return")
                raise self._fail(statement, self._told(words))
        plain, is_condition = self._any(value)
        self._known[name] = is_condition
        return name, plain

    # -- expressions ----------------------------------------------------------------------

    def _number(self, node: ast.expr) -> ast.expr:
        plain, is_condition = self._any(node)
        if is_condition:
            raise self._fail(
                node, self._told("true or false, where a number is due; where(condition, 1.0, 0.0)")
            )
        return plain

    def _condition(self, node: ast.expr) -> ast.expr:
        plain, is_condition = self._any(node)
        if not is_condition:
            raise self._fail(node, "a number, where a condition is due; compare it, as in x != 0.0")
        return plain

    def _any(self, node: ast.expr) -> tuple[ast.expr, bool]:
        """An expression in its plain form, and whether it is a condition."""
        is_condition = False
        plain: ast.expr
        match node:
            case ast.Constant(value=value):
                plain = self._literal(node, value)
            case ast.Name(id=name):
                if name in self._own:
                    is_condition = self._is_condition(node, name)
                    plain = ast.Name(name, ast.Load())
                else:
                    plain = self._literal(node, self._from_outside(node))
            case ast.BinOp(left=left, op=op, right=right):
                if not isinstance(op, _OPERATORS):
                    raise self._fail(node, self._told(_operator_words(op)))
                plain = ast.BinOp(self._number(left), op, self._number(right))
            case ast.UnaryOp(op=ast.USub() as op, operand=operand):
                plain = ast.UnaryOp(op, self._number(operand))
            case ast.UnaryOp(op=ast.UAdd(), operand=operand):
                plain = self._number(operand)
            case ast.UnaryOp():
                words = "conditions can't be negated; swap the sides of where(condition, a, b)"
                raise self._fail(node, self._told(words))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                if not isinstance(op, _COMPARISONS):
                    raise self._fail(node, "compare numbers with < <= > >= == or !=")
                is_condition = True
                plain = ast.Compare(self._number(left), [op], [self._number(right)])
            case ast.Compare():
                words = (
                    "a chain; compare two numbers at a time: where(a < b, where(b < c, x, y), y)"
                )
                raise self._fail(node, self._told(words))
            case ast.Call():
                plain, is_condition = self._call(node)
            case ast.Attribute():
                plain = self._attribute(node)
            case _:
                words = _EXPRESSIONS.get(
                    type(node), "write numbers, operators and calls of the vocabulary"
                )
                raise self._fail(node, self._told(words))
        return ast.copy_location(plain, node), is_condition

    def _literal(self, node: ast.expr, value: Any) -> ast.expr:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fail(
                node, f"{_described(value)}, where a formula has numbers: ints and floats"
            )
        try:
            number = float(value)
        except OverflowError:
            number = math.nan
        if math.isnan(number):
            raise self._fail(node, f"{value!r:.40} is no number that a formula can have")
        plain: ast.expr = ast.Constant(abs(number))
        return plain if math.copysign(1.0, number) > 0 else ast.UnaryOp(ast.USub(), plain)

    def _is_condition(self, node: ast.expr, name: str) -> bool:
        if name not in self._known:
            raise self._fail(node, f"{name} is used ahead of its first assignment")
        return self._known[name]

    def _from_outside(self, node: ast.Name) -> Any:
        """The number that a name of outside is."""
        if node.id not in self._outside:
            raise self._fail(node, f"an unknown name{self._guess(node.id)}")
        value = self._outside[node.id]
        if _name_of(value) is not None or value is formula:
            raise self._fail(node, "a function is called: name its arguments")
        if isinstance(value, ModuleType | FunctionType | type) or callable(value):
            raise self._fail(node, f"{_described(value)}, where a formula has numbers")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self._fail(
                node,
                f"{_described(value)}; of the names of outside a formula may use numbers, which "
                "it keeps as they are when it is decorated: make it an int, a float or an option",
            )
        return value

    def _attribute(self, node: ast.Attribute) -> ast.expr:
        value = self._resolve(node)
        if _name_of(value) is not None:
            raise self._fail(node, "a function is called: name its arguments")
        if isinstance(value, int | float) and not isinstance(value, bool):
            name = node.attr.upper()
            raise self._fail(
                node, f"an attribute; name the number ahead of the function, {name} = …, and use it"
            )
        raise self._fail(node, "an attribute; a formula has numbers, which have none")

    def _call(self, node: ast.Call) -> tuple[ast.expr, bool]:
        value = self._resolve(node.func)
        name = _name_of(value)
        if name is None:
            raise self._fail(node, self._instead_of(node.func, value))
        if node.keywords:
            raise self._fail(node, f"give the arguments of {name} by position")
        count = len(inspect.signature(getattr(formula, name)).parameters)
        if len(node.args) != count or any(isinstance(a, ast.Starred) for a in node.args):
            raise self._fail(
                node, f"{name} takes {count} arguments, and {len(node.args)} are given"
            )
        if name == "where":
            condition, *values = node.args
            given = [self._condition(condition), *map(self._number, values)]
        else:
            given = list(map(self._number, node.args))
        called = ast.copy_location(ast.Name(name, ast.Load()), node.func)
        return ast.Call(called, given, []), name == "isnan"

    # -- names and words ------------------------------------------------------------------

    def _resolve(self, node: ast.expr) -> Any:
        """The object of outside that a name, or a module's attribute, is; else None."""
        if isinstance(node, ast.Name) and node.id not in self._own:
            return self._outside.get(node.id)
        if isinstance(node, ast.Attribute):
            base = self._resolve(node.value)
            if isinstance(base, ModuleType):
                return getattr(base, node.attr, None)
        return None

    def _instead_of(self, called: ast.expr, value: Any) -> str:
        """What to write instead of a call."""
        if isinstance(called, ast.Attribute):
            name, is_method = called.attr, not self._is_module(called.value)
        elif isinstance(called, ast.Name):
            name, is_method = called.id, False
        else:
            return "call functions by their names"
        is_there = name in self._own or name in self._outside or self._same(name)
        if isinstance(called, ast.Name) and not is_there:
            return f"an unknown name{self._guess(name)}"
        what = "numbers have no methods" if is_method else "not of the vocabulary"
        if same := self._same(name):
            return f"{what}; write {self._prefix}{same}(…)"
        if name in _OTHER_MEANS:
            return self._told(f"{what}; write {_OTHER_MEANS[name]}")
        if name in _OF_ALL:
            return f"{what}; a formula sees one element of each tensor, not all of them"
        if isinstance(value, FunctionType):
            return f"{what}; write out what {name} computes"
        return f"{what}{self._guess(name) or ', which has: ' + ', '.join(formula.__all__)}"

    def _is_module(self, node: ast.expr) -> bool:
        return isinstance(self._resolve(node), ModuleType)

    def _same(self, name: str) -> str | None:
        """The vocabulary's function for what other libraries have under a name."""
        names = (name, *_OTHER_NAMES.get(name, ()))
        return next((n for n in names if n in formula.__all__ and n != "power"), None)

    def _guess(self, name: str) -> str:
        near = difflib.get_close_matches(name, [*self._known, *formula.__all__], 1)
        if not near:
            return ""
        return f"; did you mean {near[0] if near[0] in self._known else self._prefix + near[0]}?"

    def _told(self, words: str) -> str:
        return words.replace("{m}", self._prefix).replace(" where(", f" {self._prefix}where(")


def _name_of(value: Any) -> str | None:
    """The name that the vocabulary has for a function; None for all else."""
    if not isinstance(value, FunctionType):
        return None
    return next((n for n in formula.__all__ if getattr(formula, n) is value), None)


def _described(value: Any) -> str:
    if isinstance(value, ModuleType | FunctionType | type):
        return f"{type(value).__name__} {value.__name__}"
    return f"a {type(value).__name__}"


def _operator_words(op: ast.operator) -> str:
    if isinstance(op, ast.BitAnd | ast.BitOr | ast.BitXor):
        return "conditions don't combine; nest them: where(a, where(b, x, y), y)"
    return "an operator that formulas lack; they have + - * / ** and comparisons"


def _is_docstring(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )

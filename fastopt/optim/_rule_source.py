"""A user's rule as the formulas of a record: what differs between elements, and what doesn't.

Of a rule's expressions those that options and the step alone decide, as ``1 - beta2**step``, are
computed once a tensor, in float64, as torch computes them in Python: they go into `at_step`. The
rest, for each element, is `update`, in which they are numbers of the record. Expressions of
literals alone are literals.
"""

from __future__ import annotations

import ast
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from .. import formula
from ..front.written import Written

__all__ = ["Formulas", "formulas_of"]

#: What decides an expression's value.
_LITERALS, _OPTIONS, _ELEMENTS = range(3)


@dataclass(frozen=True)
class Formulas:
    """The source of a record's formulas.

    Attributes:
        source: the definitions of `at_step`, if there is one, and `update`.
        vocabulary: the name that the vocabulary has there.
        derived: the names by which `update` finds what `at_step` gives.
    """

    source: str
    vocabulary: str
    derived: tuple[str, ...]


@dataclass(frozen=True)
class _Value:
    """An expression of a formula's source. By options it may be that of `at_step` alone."""

    source: ast.expr
    by: int
    is_condition: bool = False

    @property
    def literal(self) -> Any:
        assert isinstance(self.source, ast.Constant)
        return self.source.value


def formulas_of(rule: Written) -> Formulas:
    """Make a record's formulas of a rule.

    Raises:
        FormulaError: literals of which there is no number, as of 1 / 0.
    """
    return _Splitting(rule).formulas()


class _Splitting:
    def __init__(self, rule: Written) -> None:
        self._rule = rule
        self._taken = {*rule.tensors, *rule.options, *rule.given, "step", "at_step", "update"}
        self._record, self._vocabulary = self._fresh("h"), self._fresh("m")
        self._per_step: list[ast.stmt] = []
        self._per_element: list[ast.stmt] = []
        #: the names of what `at_step` gives, by the source of the expression
        self._derived: dict[str, str] = {}
        self._gives: list[ast.expr] = []
        #: the conditions that options are by themselves
        self._flags: list[ast.expr] = []
        self._values = {name: _Value(_name(name), _ELEMENTS) for name in rule.tensors}
        for name, default in rule.options.items():
            field = self._field(name)
            if type(default) is bool:
                self._flags.append(_is_not_zero(field))
                self._values[name] = _Value(self._flags[-1], _OPTIONS, True)
            else:
                self._values[name] = _Value(field, _OPTIONS)
        self._values |= {name: _Value(_name(name), _OPTIONS) for name in rule.given}

    def formulas(self) -> Formulas:
        _, grad, *_ = self._rule.tensors
        signed = ast.BinOp(_name(grad), ast.Mult(), self._field("grad_scale"))
        self._values[grad] = self._kept(grad, _Value(signed, _ELEMENTS))
        for assignment in self._rule.assignments:
            value = self._value(assignment.value)
            self._values[assignment.name] = self._kept(assignment.name, value)
        results = [self._of_element(self._value(r), exact=True) for r in self._rule.returned]
        definitions = [self._definition("update", self._rule.tensors, self._per_element, results)]
        if self._gives:
            first = self._definition("at_step", ("step",), self._per_step, self._gives)
            definitions.insert(0, first)
        source = "\n\n\n".join(definitions)
        return Formulas(f"{source}\n", self._vocabulary, tuple(self._derived.values()))

    def _definition(
        self, name: str, names: Iterable[str], body: list[ast.stmt], results: list[ast.expr]
    ) -> str:
        arguments = [ast.arg(argument) for argument in (self._record, *names)]
        returned = ast.Return(ast.Tuple(results, ast.Load()))
        made = ast.parse(f"def {name}(): pass")
        (definition,) = made.body
        assert isinstance(definition, ast.FunctionDef)
        definition.args.args, definition.body = arguments, [*body, returned]
        return ast.unparse(ast.fix_missing_locations(definition))

    # -- values ---------------------------------------------------------------------------

    def _value(self, node: ast.expr) -> _Value:
        match node:
            case ast.Constant():
                return _Value(node, _LITERALS)
            case ast.Name(id=name):
                return self._values[name]
            case ast.UnaryOp(operand=operand):
                value = self._value(operand)
                if value.by == _LITERALS:
                    return _literal(-value.literal)
                return _Value(ast.UnaryOp(ast.USub(), value.source), value.by)
            case ast.BinOp(left=left, op=op, right=right):
                return self._operation(node, op, self._value(left), self._value(right))
            case ast.Compare(left=left, ops=[op], comparators=[right]):
                operands = self._together(map(self._value, (left, right)))
                if operands[0].by == operands[1].by == _LITERALS:
                    return self._folded(node, operands)
                a, b = (operand.source for operand in operands)
                by = max(operand.by for operand in operands)
                return _Value(ast.Compare(a, [op], [b]), by, True)
            case ast.Call(func=ast.Name(id=name), args=args):
                return self._call(node, name, [self._value(a) for a in args])
        raise AssertionError(f"{ast.dump(node)} is in no plain form")

    def _operation(self, node: ast.expr, op: ast.operator, a: _Value, b: _Value) -> _Value:
        if a.by == b.by == _LITERALS:
            return self._folded(node, [a, b])
        if isinstance(op, ast.Pow):
            return self._power(a, b)
        if isinstance(op, ast.Div) and _ELEMENTS in (a.by, b.by):
            return self._called("divide", [a, b])  # rounded as torch's, on GPUs as well
        a, b = self._together((a, b))
        return _Value(ast.BinOp(a.source, op, b.source), max(a.by, b.by))

    def _power(self, base: _Value, exponent: _Value) -> _Value:
        """A power; those that torch computes by products or roots as it does."""
        count = exponent.literal if exponent.by == _LITERALS else None
        if count in (2.0, 3.0):
            base = self._kept("base", base)
            product = ast.BinOp(base.source, ast.Mult(), base.source)
            if count == 3.0:
                product = ast.BinOp(product, ast.Mult(), base.source)
            return _Value(product, base.by)
        if count == 0.5:
            return self._called("sqrt", [base])
        return self._called("power", [base, exponent])

    def _call(self, node: ast.expr, name: str, values: list[_Value]) -> _Value:
        if name == "rounded":  # to the dtype of another one: all have the same
            return values[0]
        if all(value.by == _LITERALS for value in values):
            return self._folded(node, values)
        if name == "where" and values[0].by == _LITERALS:
            return values[1] if values[0].literal else values[2]
        return self._called(name, values)

    def _called(self, name: str, values: list[_Value]) -> _Value:
        """A function of the vocabulary. Compilers give a literal there a dtype of their own."""
        by = max(value.by for value in values)
        if by == _ELEMENTS:
            given = [self._of_element(value, exact=True) for value in values]
        else:
            given = [_at_step(value) for value in values]
        function = ast.Attribute(_name(self._vocabulary), name, ast.Load())
        return _Value(ast.Call(function, given, []), by, name == "isnan")

    def _folded(self, node: ast.expr, values: list[_Value]) -> _Value:
        """What Python or torch makes of literals, in float64."""
        try:
            match node:
                case ast.Call(func=ast.Name(id=name)):
                    numbers = [_as_tensor(value.literal) for value in values]
                    found = getattr(formula, name)(*numbers).item()
                case ast.BinOp(op=op):
                    found = _evaluated(ast.BinOp(values[0].source, op, values[1].source))
                case ast.Compare(ops=[op]):
                    found = _evaluated(ast.Compare(values[0].source, [op], [values[1].source]))
                case _:
                    raise AssertionError(ast.dump(node))
        except ArithmeticError as error:
            raise self._rule.error(node, f"no number: {error}") from error
        if not isinstance(found, bool | float) or math.isnan(found):
            raise self._rule.error(node, f"no number, but {found}")
        return _literal(found)

    # -- where they are computed ----------------------------------------------------------

    def _together(self, values: Iterable[_Value]) -> list[_Value]:
        """Operands of one operator, as the one of them needs it that is decided by most."""
        values = list(values)
        by = max(value.by for value in values)
        if by != _ELEMENTS:
            return values
        return [_Value(self._of_element(v), v.by, v.is_condition) for v in values]

    def _of_element(self, value: _Value, exact: bool = False) -> ast.expr:
        """A value in `update`. exact: as a number of the record, if it is a literal."""
        if value.by == _LITERALS:
            return self._given(_at_step(value)) if exact else value.source
        if value.by == _ELEMENTS:
            return value.source
        if isinstance(value.source, ast.Attribute) or value.source in self._flags:
            return value.source
        if value.is_condition:  # decided in float64, where numbers differ that in float32 don't
            ones = [_at_step(_literal(number)) for number in (1.0, 0.0)]
            function = ast.Attribute(_name(self._vocabulary), "where", ast.Load())
            return _is_not_zero(self._given(ast.Call(function, [value.source, *ones], [])))
        return self._given(value.source)

    def _given(self, source: ast.expr) -> ast.expr:
        """What `at_step` gives, as `update` finds it."""
        text = ast.unparse(ast.fix_missing_locations(source))
        if text not in self._derived:
            self._derived[text] = self._fresh(f"derived{len(self._gives)}")
            self._gives.append(source)
        return self._field(self._derived[text])

    def _kept(self, name: str, value: _Value) -> _Value:
        """A value under a name of its own, so that its expression is computed once."""
        if value.by == _LITERALS or isinstance(value.source, ast.Name | ast.Attribute):
            return value
        fresh = self._fresh(name)
        body = self._per_element if value.by == _ELEMENTS else self._per_step
        body.append(ast.Assign([ast.Name(fresh, ast.Store())], value.source))
        return _Value(_name(fresh), value.by, value.is_condition)

    def _field(self, name: str) -> ast.expr:
        return ast.Attribute(_name(self._record), name, ast.Load())

    def _fresh(self, name: str) -> str:
        """A name that nothing else has."""
        fresh, count = name, 1
        while fresh in self._taken:
            fresh, count = f"{name}_{count}", count + 1
        self._taken.add(fresh)
        return fresh


def _name(name: str) -> ast.expr:
    return ast.Name(name, ast.Load())


def _literal(value: Any) -> _Value:
    return _Value(ast.Constant(value), _LITERALS, isinstance(value, bool))


def _is_not_zero(source: ast.expr) -> ast.expr:
    return ast.Compare(source, [ast.NotEq()], [ast.Constant(0.0)])


def _at_step(value: _Value) -> ast.expr:
    """A value in `at_step`, where a literal has to have the step's dtype."""
    if value.by != _LITERALS:
        return value.source
    zero = ast.BinOp(_name("step"), ast.Mult(), ast.Constant(0.0))
    return ast.BinOp(zero, ast.Add(), value.source)


def _as_tensor(number: Any) -> torch.Tensor:
    dtype = torch.bool if isinstance(number, bool) else torch.float64
    return torch.tensor(number, dtype=dtype, device="cpu")


def _evaluated(expression: ast.expr) -> Any:
    whole = ast.fix_missing_locations(ast.Expression(expression))
    return eval(compile(whole, "<literals>", "eval"), {"__builtins__": {}})

"""Formulas: small Python functions of numbers, of which every backend makes compiled code.

A formula is written in the names of :mod:`fastopt.formula`. A compiler gets the same function
with other globals, in which those names are its own functions, so that there is one source for
Numba, for Triton and for torch's tensors.
"""

from __future__ import annotations
import __future__

import ast
import inspect
import linecache
import textwrap
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["translate", "without"]

#: The module that formulas take their names from, and the one it takes its own from.
VOCABULARIES = ("fastopt.formula", "fastopt.kernels.reference.vocabulary")


def translate(
    function: Any,
    vocabulary: ModuleType,
    compiled: Callable[[FunctionType], Any],
    number: Callable[[float], Any] | None = None,
) -> FunctionType:
    """The function with a backend's vocabulary in place of the public one.

    Args:
        function: a formula.
        vocabulary: the backend's module of the same names.
        compiled: what becomes of the other functions that it calls.
        number: what becomes of its numbers; a compiler may take them for a wider type than that
            of the arguments.
    """
    code: CodeType = function.__code__
    if number is not None:
        constants = (number(c) if type(c) in (int, float) else c for c in code.co_consts)
        code = code.replace(co_consts=tuple(constants))
    names = dict(function.__globals__)
    for name in code.co_names:
        value: Any = names.get(name)
        if isinstance(value, ModuleType) and value.__name__ in VOCABULARIES:
            names[name] = vocabulary
        elif number is not None and type(value) in (int, float):
            names[name] = number(value)
        elif isinstance(value, FunctionType):
            if value.__module__ in VOCABULARIES:
                names[name] = getattr(vocabulary, value.__name__)
            else:
                names[name] = compiled(translate(value, vocabulary, compiled, number))
    result = FunctionType(
        code, names, function.__name__, function.__defaults__, function.__closure__
    )
    result.__module__, result.__qualname__ = function.__module__, function.__qualname__
    result.__annotations__ = function.__annotations__
    return result


def without(function: Any, absent: tuple[str, ...]) -> FunctionType:
    """The function as it is where some of its arguments are None: it neither takes nor returns any.

    For a compiler that knows no None among values.
    """
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    source = ast.unparse(ast.fix_missing_locations(_Without(absent).visit(definition)))
    # There, whoever asks for the new function's source finds it.
    name = f"<{function.__module__}.{function.__qualname__} without {', '.join(absent)}>"
    linecache.cache[name] = len(source), None, source.splitlines(keepends=True), name
    made: dict[str, Any] = {}
    # Annotations stay words, whatever names they have.
    flags = __future__.annotations.compiler_flag
    exec(compile(source, name, "exec", flags, dont_inherit=True), {}, made)
    (new,) = made.values()
    result = FunctionType(new.__code__, function.__globals__, function.__name__)
    result.__module__, result.__qualname__ = function.__module__, function.__qualname__
    result.__annotations__ = {
        key: value for key, value in function.__annotations__.items() if key not in absent
    }
    return result


class _Without(ast.NodeTransformer):
    """Puts None for names, and takes it out of a definition's arguments, conditions and results."""

    def __init__(self, absent: tuple[str, ...]) -> None:
        self._absent = absent

    def visit_arguments(self, node: ast.arguments) -> ast.arguments:
        node.args = [argument for argument in node.args if argument.arg not in self._absent]
        return node

    def visit_Name(self, node: ast.Name) -> ast.expr:
        is_read = isinstance(node.ctx, ast.Load) and node.id in self._absent
        return ast.Constant(None) if is_read else node

    def visit_If(self, node: ast.If) -> Any:
        test = self.visit(node.test)
        match test:
            case ast.Compare(left=ast.Constant(None), comparators=[ast.Constant(None)]):
                chosen = node.body if isinstance(test.ops[0], ast.Is) else node.orelse
                return [self.visit(statement) for statement in chosen]
        return self.generic_visit(node)

    def visit_Return(self, node: ast.Return) -> ast.Return:
        self.generic_visit(node)
        if isinstance(node.value, ast.Tuple):
            node.value.elts = [e for e in node.value.elts if not _is_none(e)]
        return node


def _is_none(node: ast.expr) -> bool:
    return isinstance(node, ast.Constant) and node.value is None

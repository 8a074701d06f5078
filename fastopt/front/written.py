"""Formulas that users write: read from their source, and refused with what to write instead.

A formula is straight-line code of one number of each tensor: assignments to plain names, the
operators, the functions of :mod:`fastopt.formula`, and one `return` at its end. Whatever else a
function may say would mean something else to a compiler than to Python, or nothing. So it is
refused when the function is decorated, at the line and the expression that say it.
"""

from __future__ import annotations

import ast
import builtins
import dis
import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CodeType, FunctionType
from typing import Any

from ..errors import FormulaError
from ._words import Body

__all__ = ["Assignment", "Written", "read"]


@dataclass(frozen=True)
class Assignment:
    """A name and the expression that it becomes."""

    name: str
    value: ast.expr


@dataclass(frozen=True)
class Written:
    """What a user's function says.

    In `assignments` and `returned` a function of the vocabulary is called by its bare name,
    whatever the user calls it (a variable may have that name, too), numbers of outside are
    literals, literals are floats, `x += y` is `x = x + y`, and annotations are gone.

    Attributes:
        function: itself.
        tensors: the names of its positional parameters.
        options: the defaults of its keyword-only parameters, of type bool, int or float.
        given: the names of keyword-only parameters without a default, which are numbers.
        tree: its source, with the lines of its file.
        assignments: its statements but for the last.
        returned: what it returns, an expression for each value.
        file: the name of the file that it is in.
    """

    function: FunctionType
    tensors: tuple[str, ...]
    options: Mapping[str, bool | int | float]
    given: tuple[str, ...]
    tree: ast.FunctionDef
    assignments: tuple[Assignment, ...]
    returned: tuple[ast.expr, ...]
    file: str

    @property
    def results(self) -> int:
        """How many values it returns."""
        return len(self.returned)

    def error(self, node: ast.AST | None, words: str) -> FormulaError:
        """An error at a node of its source, or, with None, at the function itself."""
        return _error(self.file, self.tree, node, words)

    def expect_results(self, names: Sequence[str]) -> None:
        """Refuse it if it doesn't return as many values as there are names.

        Raises:
            FormulaError: which says what the values are.
        """
        if self.results == len(names):
            return
        values = "one value" if len(names) == 1 else f"{len(names)} values"
        raise self.error(
            self.tree.body[-1],
            f"{self.results} returned; return {values}: {', '.join(names)}",
        )


def read(function: Any, given: Sequence[str] = ()) -> Written:
    """Read a user's function and check that it is a formula.

    Args:
        function: a plain Python function, defined by `def` in a file or a notebook's cell.
        given: names that it may have as keyword-only parameters without a default.

    Raises:
        TypeError: what is no such function.
        FormulaError: with file and line, for what a formula can't say.

    Example:
        >>> def decayed(param, grad, *, lr=0.1):
        ...     return param - lr * grad
        >>> read(decayed).options
        {'lr': 0.1}
    """
    if not isinstance(function, FunctionType):
        raise TypeError(
            f"expected a function that is defined by def, not {type(function).__name__}: "
            f"{function!r}"
        )
    if hasattr(function, "__wrapped__"):
        raise TypeError(
            f"{function.__qualname__} is wrapped by another decorator; decorate the formula itself"
        )
    tree, file = _tree_of(function)

    def fail(node: ast.AST | None, words: str) -> FormulaError:
        return _error(file, tree, node, words)

    tensors, options, free = _signature(function, tree, tuple(given), fail)
    body = Body(fail, _outside(function), (*tensors, *options, *free), {
        name for name, default in options.items() if type(default) is bool
    })  # fmt: skip
    assignments, returned = body.read(tree.body)
    return Written(
        function, tensors, options, free, tree,
        tuple(Assignment(name, value) for name, value in assignments), returned, file,
    )  # fmt: skip


def _error(file: str, tree: ast.FunctionDef, node: ast.AST | None, words: str) -> FormulaError:
    line = getattr(node, "lineno", tree.lineno)
    told = f"in {tree.name}"
    if node is not None and not isinstance(node, ast.FunctionDef):
        told += f": `{_shortened(ast.unparse(node))}`"
    return FormulaError(f"{file}:{line}: {told}: {words}", file, line)


def _shortened(text: str) -> str:
    first, *more = text.splitlines()
    return f"{first[:77]}…" if more or len(first) > 78 else first


# -- its source ---------------------------------------------------------------------------


def _tree_of(function: FunctionType) -> tuple[ast.FunctionDef, str]:
    """The definition with the lines of its file, and the file's name."""
    name, file = function.__qualname__, function.__code__.co_filename
    line = function.__code__.co_firstlineno
    if function.__name__ == "<lambda>":
        raise FormulaError(f"{file}:{line}: a lambda; write a function with def", file, line)
    try:
        lines, first = inspect.getsourcelines(function)
    except (OSError, TypeError) as error:
        raise FormulaError(
            f"{file}:{line}: the source of {name} can't be read, of which its formula is compiled; "
            "define it in a file or a notebook's cell",
            file, line,
        ) from error  # fmt: skip
    source, start = "".join(lines), max(first, 1)
    if source[:1].isspace():  # within another definition
        source, start = "if True:\n" + source, start - 1
    try:
        (top,) = ast.parse(source).body
        found = top.body[0] if isinstance(top, ast.If) else top
    except (SyntaxError, ValueError):
        found = None
    if isinstance(found, ast.AsyncFunctionDef):
        raise FormulaError(f"{file}:{line}: {name} is an async def; write a def", file, line)
    if not isinstance(found, ast.FunctionDef) or not _is_code_of(found, function):
        raise FormulaError(
            f"{file}:{line}: {name} isn't what its source says any more; load that anew",
            file, line,
        )  # fmt: skip
    ast.increment_lineno(found, start - 1)
    return found, file


def _is_code_of(tree: ast.FunctionDef, function: FunctionType) -> bool:
    """Whether a function was compiled from this source: a file may have been edited since."""
    inner = ast.FunctionDef(
        **{**dict(ast.iter_fields(tree)), "decorator_list": [], "returns": None}
    )  # fmt: skip
    names = [ast.arg(name) for name in function.__code__.co_freevars]
    arguments = ast.arguments([], names, None, [], [], None, [])
    outer = ast.FunctionDef(**{**dict(ast.iter_fields(inner)), "args": arguments, "body": [inner]})
    module = ast.fix_missing_locations(ast.Module([outer], []))
    (whole,) = (c for c in compile(module, "", "exec").co_consts if isinstance(c, CodeType))
    codes = [c for c in whole.co_consts if isinstance(c, CodeType) and c.co_name == tree.name]
    return any(_said_by(code) == _said_by(function.__code__) for code in codes)


def _said_by(code: CodeType) -> list[tuple[str, Any]]:
    """What code does, whatever the module around it makes of calls and places."""
    said = []
    for step in dis.get_instructions(code):
        if step.opname not in _OF_CALLS:
            is_jump = step.opcode in dis.hasjrel or step.opcode in dis.hasjabs
            is_code = isinstance(step.argval, CodeType)
            value = None if is_jump or is_code else step.argval
            said.append((_SAME_STEPS.get(step.opname, step.opname), repr(value)))
    return said


# A module's imports decide whether a call is one of a method, and the version how it is said.
_OF_CALLS = {"PUSH_NULL", "PRECALL", "CACHE", "NOP", "EXTENDED_ARG"}
_SAME_STEPS = {
    "LOAD_METHOD": "LOAD_ATTR", "CALL_METHOD": "CALL", "CALL_FUNCTION": "CALL",
}  # fmt: skip


def _outside(function: FunctionType) -> dict[str, Any]:
    """What the names mean that a function doesn't define."""
    cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
    found: dict[str, Any] = {**vars(builtins), **function.__globals__}
    for name, cell in cells:
        found.pop(name, None)
        try:
            found[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    return found


# -- its parameters -----------------------------------------------------------------------


def _signature(
    function: FunctionType, tree: ast.FunctionDef, given: tuple[str, ...], fail: Any
) -> tuple[tuple[str, ...], dict[str, bool | int | float], tuple[str, ...]]:
    """Its tensors, its options with their defaults, and which of `given` it has."""
    arguments = tree.args
    if arguments.posonlyargs:
        raise fail(arguments.posonlyargs[0], "positional-only; leave the / out")
    for variable, stars in ((arguments.vararg, "*"), (arguments.kwarg, "**")):
        if variable is not None:
            raise fail(variable, f"name each parameter instead of {stars}{variable.arg}")
    if arguments.defaults:
        named = arguments.args[-len(arguments.defaults)]
        raise fail(named, f"an option is keyword-only: put {named.arg} behind a *")
    if not arguments.args:
        raise fail(None, "no tensors; the parameters ahead of the * are tensors")
    tensors = tuple(argument.arg for argument in arguments.args)
    for argument in arguments.args:
        if argument.arg in given:
            raise fail(argument, f"{argument.arg} is a number: put it behind a *, without default")
    options: dict[str, bool | int | float] = {}
    defaults = function.__kwdefaults__ or {}
    for argument in arguments.kwonlyargs:
        name = argument.arg
        if name in given:
            if name in defaults:
                raise fail(argument, f"{name} is always given: leave its default out")
        elif name not in defaults:
            among = f"; without one there may be: {', '.join(given)}" if given else ""
            raise fail(argument, f"the option {name} has no default; give it a number{among}")
        else:
            options[name] = _default(argument, defaults[name], fail)
    names = (argument.arg for argument in arguments.kwonlyargs)
    return tensors, options, tuple(name for name in names if name in given)


def _default(argument: ast.arg, value: Any, fail: Any) -> bool | int | float:
    """A default as Python's own number."""
    kind = next((k for k in (bool, int, float) if isinstance(value, k)), None)
    if kind is None:
        raise fail(
            argument,
            f"the default of {argument.arg} is {value!r}, of type {type(value).__name__}; "
            "it has to be a bool, an int or a float, and each number an option of its own",
        )
    number: bool | int | float = kind(value)
    if math.isnan(_as_float(number)):
        raise fail(argument, f"the default of {argument.arg} is {value!r}; it has to be a number")
    return number


def _as_float(number: bool | int | float) -> float:
    try:
        return float(number)
    except OverflowError:
        return math.nan

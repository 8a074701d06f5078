"""Formulas: small Python functions of numbers, of which every backend makes compiled code.

A formula is written in the names of :mod:`fastopt.formula`. A compiler gets the same function
with other globals, in which those names are its own functions, so that there is one source for
Numba, for Triton and for torch's tensors.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["digest", "translate"]

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
        number: what becomes of its literals; a compiler may take them for a wider type than
            that of the arguments.
    """
    code: CodeType = function.__code__
    if number is not None:
        constants = (number(c) if type(c) in (int, float) else c for c in code.co_consts)
        code = code.replace(co_consts=tuple(constants))
    names = dict(function.__globals__)
    for name in code.co_names:
        value = names.get(name)
        if isinstance(value, ModuleType) and value.__name__ in VOCABULARIES:
            names[name] = vocabulary
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


def digest(*functions: Any) -> str:
    """A short name of formulas' code and of all the code that they call."""
    found, todo, seen = hashlib.sha256(), [*functions], set()
    while todo:
        one = todo.pop()
        if one in seen:
            continue
        seen.add(one)
        code = one.__code__
        found.update(repr((code.co_code, code.co_names, code.co_varnames)).encode())
        found.update(repr([c for c in code.co_consts if not inspect.iscode(c)]).encode())
        called = (one.__globals__.get(name) for name in code.co_names)
        todo += [f for f in called if isinstance(f, FunctionType)]
    return found.hexdigest()[:12]

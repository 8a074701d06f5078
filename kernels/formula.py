"""Formulas: small Python functions of numbers, of which every backend makes compiled code.

A formula is written in the names of :mod:`fastopt.formula`. A compiler gets the same function
with other globals, in which those names are its own functions, so that there is one source for
Numba, for Triton and for torch's tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from types import CodeType, FunctionType, ModuleType
from typing import Any

__all__ = ["translate"]

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

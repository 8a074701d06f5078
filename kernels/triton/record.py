"""Records of options inside kernels, and formulas as Triton's functions."""

from __future__ import annotations

import functools
import re
from collections import namedtuple
from types import FunctionType
from typing import Any

import torch
import triton.language as tl

from ..formula import translate, without
from ..operation import Operation
from . import vocabulary
from .compiler import device_function, number

__all__ = ["constants_of", "formula_of", "maker", "record_numbers"]


@functools.lru_cache(1024)  # of a user's formula each version is another one
def formula_of(operation: type[Operation], name: str, absent: tuple[str, ...] = ()) -> Any:
    """An operation's formula of this name, to be called with a record and numbers.

    absent: those of its arguments that are None. Not all Tritons have None among values.
    """
    formula = getattr(operation, name)
    if absent:
        formula = without(formula, absent)
    return _compiled(translate(formula, vocabulary, _compiled))


def _compiled(function: Any) -> Any:
    function.__globals__.setdefault("tl", tl)  # the interpreter looks for it there
    for annotation in function.__annotations__.values():
        # Triton looks them up, and takes no names but those of its own module.
        names = re.findall(r"[^\W\d]\w*", str(annotation))
        function.__globals__.update(dict.fromkeys(names, tl.constexpr))
    return device_function(function)


# By the number of flags: Triton 3.7 unpacks no compile-time tuple.
def _make_0(numbers, flags: tl.constexpr):
    return FIELDS(*numbers)  # type: ignore[name-defined]  # noqa: F821


def _make_1(numbers, flags: tl.constexpr):
    return FIELDS(*numbers, flags[0])  # type: ignore[name-defined]  # noqa: F821


def _make_2(numbers, flags: tl.constexpr):
    return FIELDS(*numbers, flags[0], flags[1])  # type: ignore[name-defined]  # noqa: F821


def _make_3(numbers, flags: tl.constexpr):
    return FIELDS(*numbers, flags[0], flags[1], flags[2])  # type: ignore[name-defined]  # noqa: F821


_MAKES = (_make_0, _make_1, _make_2, _make_3)


@functools.lru_cache(1024)
def maker(operation: type[Operation], more: tuple[str, ...] = ()) -> Any:
    """The function that makes a record of its numbers, those that `more` names, and its flags.

    A type can't be a compile-time argument, but may be among the globals of a function that is.
    """
    names = (*operation.numbers, *more, *operation.flags)
    fields: Any = namedtuple("Record", names)  # type: ignore[misc]
    make = _MAKES[len(operation.flags)]
    return _compiled(FunctionType(make.__code__, {"FIELDS": fields, "tl": tl}, make.__name__))


def constants_of(record: Any) -> dict[str, Any]:
    """The compile-time arguments of a kernel that make a record, as MAKE(numbers, FLAGS).

    That belongs among the arguments of a call: an assignment would make numbers of flags. Triton
    knows a function by its source alone, hence the names.
    """
    operation: Any = type(record)
    names = (*operation.numbers, *operation.flags)
    return {"MAKE": maker(operation), "NAMES": names, "FLAGS": record.settings}


def record_numbers(record: Operation, compute: torch.dtype) -> tuple[float | int, ...]:
    """A record's numbers as an argument of a kernel that computes in this dtype."""
    return tuple([number(value, compute) for value in record.values])

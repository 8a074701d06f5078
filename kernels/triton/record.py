"""Records of options inside kernels, and formulas as Triton's functions."""

from __future__ import annotations

import functools
from collections import namedtuple
from typing import Any

import torch
import triton.language as tl

from ..formula import translate
from ..operation import Operation
from . import vocabulary
from .compiler import device_function, number

__all__ = ["constants_of", "formula_of", "record_numbers"]


@functools.cache
def formula_of(operation: type[Operation]) -> Any:
    """An operation's formula, to be called with a record and numbers."""
    return _compiled(translate(getattr(operation, operation._formula), vocabulary, _compiled))


def _compiled(function: Any) -> Any:
    function.__globals__.setdefault("tl", tl)  # the interpreter looks for it there
    return device_function(function)


@functools.cache
def _fields(operation: type[Operation]) -> Any:
    """The record's type in a kernel: its numbers, then its flags."""
    return namedtuple(operation.__name__, (*operation.numbers, *operation.flags))


def constants_of(record: Operation) -> dict[str, Any]:
    """The compile-time arguments of a kernel: the formula, the record's type and its flags."""
    return {
        "FORMULA": formula_of(type(record)),
        "FIELDS": _fields(type(record)),
        "FLAGS": record.settings,
    }


def record_numbers(record: Operation, compute: torch.dtype) -> tuple[float | int, ...]:
    """A record's numbers as an argument of a kernel that computes in this dtype."""
    return tuple([number(value, compute) for value in record.values])

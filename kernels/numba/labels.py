"""What a loop over rows knows of a row's label: nothing to compile for an operation without."""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import overload

from .compiler import FUNCTION_OPTIONS
from .pointer import load, store
from .pointers import load_each_or_one

__all__ = ["is_label", "label_of", "numbers_of_row"]


def label_of(labels: Any, row: int, classes: int, wrong: Any) -> Any:
    """The label of a row, None without labels. Of one out of bounds 0, and `wrong` is 1."""
    raise NotImplementedError


def numbers_of_row(by_row: Any, at_class: Any, label: Any, row: int, like: Any) -> Any:
    """What formulas are told of a row: its numbers, or those at its label."""
    raise NotImplementedError


def is_label(label: Any, c: int) -> Any:
    """What formulas are told of a class: whether it is the label, if there is one."""
    raise NotImplementedError


@overload(label_of, strict=False, jit_options=FUNCTION_OPTIONS)
def _label_of(labels: Any, row: int, classes: int, wrong: Any) -> Any:
    if isinstance(labels, types.NoneType):
        return lambda labels, row, classes, wrong: None

    def checked(labels: Any, row: int, classes: int, wrong: Any) -> int:
        label: int = load(labels, row)
        if label < 0 or label >= classes:
            store(wrong, 0, 1)
            return 0
        return label

    return checked


@overload(numbers_of_row, strict=False, jit_options=FUNCTION_OPTIONS)
def _numbers_of_row(by_row: Any, at_class: Any, label: Any, row: int, like: Any) -> Any:
    if isinstance(label, types.NoneType):
        return lambda by_row, at_class, label, row, like: load_each_or_one(by_row, row, like)
    return lambda by_row, at_class, label, row, like: load_each_or_one(at_class, label, like)


@overload(is_label, strict=False, jit_options=FUNCTION_OPTIONS)
def _is_label(label: Any, c: int) -> Any:
    if isinstance(label, types.NoneType):
        return lambda label, c: ()
    return lambda label, c: (c == label,)

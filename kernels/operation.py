"""What an operation is to a backend: a record of its options with a formula as a method.

The *type* of a record chooses the code that a loop is compiled with. Its fields of type float
are numbers that a kernel is given; those of type bool are part of the compiled code.
"""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any, ClassVar, NamedTuple, dataclass_transform

import torch

from .formula import digest

__all__ = ["Elementwise", "Operation", "Options"]


@dataclass_transform(frozen_default=True)
class Operation:
    """The base of all records. A subclass is a frozen dataclass by itself.

    Attributes:
        numbers, flags: the names of the fields of type float, and of type bool.
        key: names the formula's code, for caches of what is compiled from it.
    """

    numbers: ClassVar[tuple[str, ...]]
    flags: ClassVar[tuple[str, ...]]
    key: ClassVar[str]
    _formula: ClassVar[str]

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("_abstract"):
            return
        dataclasses.dataclass(frozen=True)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        cls.numbers = tuple(f.name for f in fields if f.type in ("float", float))
        cls.flags = tuple(f.name for f in fields if f.type in ("bool", bool))
        cls.key = digest(getattr(cls, cls._formula))

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers, in their order."""
        return tuple([float(getattr(self, name)) for name in self.numbers])

    @property
    def settings(self) -> tuple[bool, ...]:
        """The flags, in their order."""
        return tuple([bool(getattr(self, name)) for name in self.flags])


class Elementwise(Operation):
    """A loss whose value at a place depends on its operands at that place alone.

    `value_and_slopes(h, *operands)` is the formula: from one number of each operand (1 for one
    that was not given) the value, and its derivatives by the first operands, one after another.

    Attributes:
        operands: their names.
        slopes: of how many of them, from the first on, there is a derivative.
        factor: what all derivatives are still to be multiplied by. It goes into the scale of
            the gradients ahead of all elements, where a factor in the formula might overflow.
        averaged_by: the operand, if given, by whose sum the mean divides.
    """

    _abstract = True
    _formula = "value_and_slopes"
    operands: ClassVar[tuple[str, ...]]
    slopes: ClassVar[int] = 1
    factor: ClassVar[float] = 1.0
    averaged_by: ClassVar[str | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parameters = inspect.signature(cls.value_and_slopes).parameters
        cls.operands = tuple(parameters)[1:]

    def value_and_slopes(self, *operands: Any) -> Any:
        raise NotImplementedError


class Options(NamedTuple):
    """One call of a loss without its tensors.

    Attributes:
        record: the operation's.
        reduction: "none", "mean", "sum" or "batchmean".
        dtype: the dtype of the result.
        grad_output: what the backward pass is expected to be given. A backend that can't look
            at a grad_output before its kernels run is told 1.
    """

    record: Operation
    reduction: str
    dtype: torch.dtype
    grad_output: float = 1.0

"""Loops of losses by their form, and what runs any of them on threads.

A loss has hundreds of loops: for each choice of operands, dtypes, gradients and results that a call
may want. So what is compiled for a form is one function, ``run(form, scale, first, last)``, which
gives the sum of the units (chunks of elements, or rows) from first to last. How units are shared
among threads, and how their sums become a loss, is compiled once for all (`run_all`).
"""

from __future__ import annotations

import functools
import itertools
from array import array
from typing import Any

import torch
from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic, register_model

from .compiler import address_of, dtype_name, kernel, optional_pointer, pointer, region
from .pointer import AddressModel, Pointer, store
from .record import RecordType, Values, emit_record
from .reduction import sum_all
from .team import on_threads
from .threads import Launcher

__all__ = ["Loop", "address_in", "dtypes_of", "opened", "sums_up"]


class Form(types.Type):
    """What a loop is compiled for; at run time the address of words of 8 bytes.

    These are the address of the record's numbers, those of all tensors that there are, and
    integers that mean something to the loop alone.

    Args:
        values: of the record.
        compute: what is computed in.
        groups: tuples of pointers, None for those of absent tensors.
        integers: how many.
        sums: whether anybody wants the sum.
    """

    def __init__(
        self, values: Values, compute: types.Type, groups: tuple[types.Tuple, ...], integers: int,
        sums: bool,
    ) -> None:  # fmt: skip
        self.values, self.compute, self.groups, self.integers = values, compute, groups, integers
        self.sums = sums
        super().__init__(f"Form({values}, {compute}, {groups}, {integers}, {sums})")

    @property
    def record(self) -> Any:
        """Its class."""
        return self.values.record

    @property
    def key(self) -> Any:
        return self.name, self.record


register_model(Form)(AddressModel)


@intrinsic
def opened(typingctx: Any, form: Any, scale: Any) -> Any:
    """The tuple (record, the same in float64, groups of pointers, integers, narrowed scale)."""
    values, compute = form.values, form.compute
    narrow = RecordType(values.record, values.flags, compute)
    exact = RecordType(values.record, values.flags, types.float64)
    integers = types.UniTuple(types.intp, form.integers)
    result = types.Tuple((narrow, exact, types.Tuple(form.groups), integers, compute))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        word = ir.IntType(64)
        base = builder.bitcast(args[0], word.as_pointer())
        place = 0

        def read() -> Any:
            nonlocal place
            place += 1
            return builder.load(builder.gep(base, [ir.Constant(word, place - 1)]))

        def address(typ: Any) -> Any:
            if isinstance(typ, Pointer):
                return builder.inttoptr(read(), context.get_value_type(typ))
            return context.get_dummy_value()

        numbers = builder.inttoptr(read(), ir.DoubleType().as_pointer())
        records = [emit_record(context, builder, typ, numbers) for typ in (narrow, exact)]
        groups = [
            context.make_tuple(builder, group, [address(typ) for typ in group])
            for group in form.groups
        ]
        whole = context.make_tuple(builder, types.Tuple(form.groups), groups)
        rest = context.make_tuple(builder, integers, [read() for _ in range(form.integers)])
        narrowed = context.cast(builder, args[1], types.float64, compute)
        return context.make_tuple(builder, result, [*records, whole, rest, narrowed])

    return result(form, types.float64), codegen


@intrinsic
def sums_up(typingctx: Any, form: Any) -> Any:
    """Whether anybody wants the sum: else what is only added up is no part of the code."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.get_constant(types.boolean, form.sums)

    return types.boolean(form), codegen


@intrinsic
def called(typingctx: Any, function: Any, form: Any, scale: Any, first: Any, last: Any) -> Any:
    """What the loop at the address `function` gives."""
    kinds = form, types.float64, types.intp, types.intp

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = context.call_conv.get_function_type(types.float64, kinds)
        loop = builder.inttoptr(args[0], kind.as_pointer())
        _, total = context.call_conv.call_function(
            builder, loop, types.float64, kinds, args[1:]
        )  # it raises nothing
        return total

    return types.float64(types.intp, *kinds), codegen


@kernel
def run_part(
    part: int, parts: int, function: int, form: Any, scale: float, sums: Any, units: int, group: int
) -> None:  # fmt: skip
    groups = (units + group - 1) // group
    for g in range(part * groups // parts, (part + 1) * groups // parts):
        total = called(function, form, scale, g * group, min((g + 1) * group, units))
        if sums is not None:
            store(sums, g, total)


@region
def run_all(
    parts: int, function: int, form: Any, scale: float, sums: Any, loss: Any, divisor: float,
    units: int, group: int,
) -> None:  # fmt: skip
    """loss = the sum over all units / divisor. sums is scratch memory, a number a group."""
    on_threads(run_part, parts, (function, form, scale, sums, units, group))
    if sums is not None:
        store(loss, 0, sum_all(sums, (units + group - 1) // group) / divisor)


@functools.cache
def _launcher(loss: torch.dtype | None) -> Launcher:
    sums = types.none if loss is None else pointer("float64", 1, "float64")
    return Launcher(
        run_all, types.intp, pointer("int64", 0), types.float64, sums,
        optional_pointer(loss, 2, "float64"), types.float64, types.intp, types.intp,
    )  # fmt: skip


class Loop:
    """One loop for one form, compiled on first use.

    Args:
        run: the loop.
        values: what its record is read as.
        compute: name of the dtype to compute in.
        groups: tuples of dtypes, None for tensors that are absent, or of a dtype, of what `load`
            gives, and of whether there is but one element.
        integers: how many the loop has.
        loss: dtype of the loss, None if there is none.
    """

    def __init__(
        self, run: Any, values: Values, compute: str, groups: tuple[tuple[Any, ...], ...],
        integers: int, loss: torch.dtype | None,
    ) -> None:  # fmt: skip
        slots = itertools.count(1)

        def typ(given: Any) -> types.Type:
            if given is None:
                return types.none
            dtype, number, fixed = given if isinstance(given, tuple) else (given, compute, False)
            return pointer(dtype_name(dtype), next(slots), number, fixed)

        kinds = tuple(types.Tuple([typ(d) for d in group]) for group in groups)
        self._form = Form(values, getattr(types, compute), kinds, integers, loss is not None)
        self._run, self._launch = run, _launcher(loss)
        self._function: int | None = None

    def __call__(
        self, parts: int, words: list[int | None], scale: float, sums: int | None,
        loss: int | None, divisor: float, units: int, group: int,
    ) -> None:  # fmt: skip
        """words: what the form says, None for what is absent."""
        if self._function is None:
            signature = self._form, types.float64, types.intp, types.intp
            self._function = address_of(self._run, *signature)
        form = array("q", [word for word in words if word is not None])
        self._launch(
            parts, self._function, form.buffer_info()[0], scale, sums, loss, divisor, units, group
        )


def dtypes_of(tensors: tuple[torch.Tensor | None, ...]) -> tuple[torch.dtype | None, ...]:
    return tuple([None if t is None else t.dtype for t in tensors])


def address_in(tensor: torch.Tensor | None) -> int | None:
    """Where in memory a tensor is, as a word of a form."""
    return None if tensor is None else tensor.data_ptr()

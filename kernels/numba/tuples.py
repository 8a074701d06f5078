"""Tuples of numbers inside compiled code, as long as the formula says that makes them."""

from __future__ import annotations

from typing import Any

from numba.core import types
from numba.extending import intrinsic

__all__ = ["added", "cast_each", "zeros", "zeros_for"]


@intrinsic
def zeros(typingctx: Any, record: Any, like: Any) -> Any:
    """As many zeros of the type of `like` as the record's operation has sums."""
    result = types.UniTuple(like, record.record.sums)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return context.make_tuple(builder, result, [context.get_constant(like, 0)] * len(result))

    return result(record, like), codegen


@intrinsic
def added(typingctx: Any, totals: Any, numbers: Any) -> Any:
    """The sums of two tuples' numbers, in the first one's types."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums = []
        for k, typ in enumerate(totals):
            number = builder.extract_value(args[1], k)
            number = context.cast(builder, number, numbers[k], typ)
            sums.append(builder.fadd(builder.extract_value(args[0], k), number))
        return context.make_tuple(builder, totals, sums)

    assert len(totals) == len(numbers), "the formula gives as many numbers as its class says"
    return totals(totals, numbers), codegen


@intrinsic
def cast_each(typingctx: Any, numbers: Any, like: Any) -> Any:
    """A tuple's numbers in the type of `like`."""
    result = types.UniTuple(like, len(numbers))

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [
            context.cast(builder, builder.extract_value(args[0], k), typ, like)
            for k, typ in enumerate(numbers)
        ]
        return context.make_tuple(builder, result, values)

    return result(numbers, like), codegen


@intrinsic
def zeros_for(typingctx: Any, pointers: Any) -> Any:
    """A zero for each of the pointers."""
    result = types.Tuple([p.compute for p in pointers])

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values = [context.get_constant(p.compute, 0) for p in pointers]
        return context.make_tuple(builder, result, values)

    return result(pointers), codegen

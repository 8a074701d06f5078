"""Records of options inside compiled code, and the formulas that their types choose.

The numbers of a record are read from memory and held in the compute dtype; its flags are part
of its type, so that what they rule out is not in the code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba.core import types
from numba.core.typing.templates import AttributeTemplate
from numba.extending import (
    infer_getattr,
    intrinsic,
    lower_getattr_generic,
    models,
    overload,
    register_model,
    unbox,
)

from ..formula import translate
from ..operation import Operation, Update
from . import vocabulary
from .compiler import EXACT_OPTIONS, FUNCTION_OPTIONS, exact, inlined
from .pointer import AddressModel, unbox_address
from .reach import body_of

__all__ = [
    "RecordType", "Values", "at_step", "completed", "emit_record", "finish", "fold", "moved",
    "next_numbers", "rate_of", "read_record", "row_at", "slopes", "update", "value_and_slopes",
]  # fmt: skip


class _OfRecord(types.Type):
    """A type that belongs to a record's class and the flags of a record."""

    def __init__(self, words: str, record: type[Operation], flags: tuple[int, ...]) -> None:
        self.record, self.flags = record, flags
        super().__init__(f"{words} of {record.__module__}.{record.__qualname__}, {flags}")

    @property
    def key(self) -> Any:
        """A notebook may have several classes of one name."""
        return self.name, self.record

    def flag(self, name: str) -> int:
        return self.flags[self.record.flags.index(name)]


class RecordType(_OfRecord):
    """A record, its numbers of type `compute`, and those that `derived` names."""

    def __init__(
        self,
        record: type[Operation],
        flags: tuple[int, ...],
        compute: types.Type,
        derived: tuple[str, ...] = (),
    ) -> None:
        self.compute, self.numbers = compute, (*record.numbers, *derived)
        super().__init__(f"Record of {self.numbers} in {compute}", record, flags)


class Values(_OfRecord):
    """The address of a record's numbers, float64 ones in their order, or of rows of such."""

    def __init__(self, record: type[Operation], flags: tuple[int, ...]) -> None:
        super().__init__("Values", record, flags)


register_model(Values)(AddressModel)
unbox(Values)(unbox_address)


@register_model(RecordType)
class _RecordModel(models.StructModel):
    def __init__(self, dmm: Any, fe_type: RecordType) -> None:
        members = [(name, fe_type.compute) for name in fe_type.numbers]
        super().__init__(dmm, fe_type, members)


@infer_getattr
class _RecordAttribute(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, typ: RecordType, attribute: str) -> Any:
        if attribute in typ.numbers:
            return typ.compute
        if attribute not in typ.record.flags:
            return None
        return types.boolean if type(typ.flag(attribute)) is bool else types.intp


@lower_getattr_generic(RecordType)
def _get(context: Any, builder: Any, typ: RecordType, value: Any, attribute: str) -> Any:
    if attribute in typ.record.flags:
        flag = typ.flag(attribute)
        return context.get_constant(types.boolean if type(flag) is bool else types.intp, flag)
    return builder.extract_value(value, typ.numbers.index(attribute))


def emit_record(context: Any, builder: Any, record: RecordType, base: Any) -> Any:
    """The record whose numbers, float64 ones, begin at a pointer to such."""
    result = ir.Constant(context.get_value_type(record), ir.Undefined)
    for k in range(len(record.record.numbers)):
        number = builder.load(builder.gep(base, [ir.Constant(ir.IntType(64), k)]))
        number = context.cast(builder, number, types.float64, record.compute)
        result = builder.insert_value(result, number, k)
    return result


@intrinsic
def read_record(typingctx: Any, values: Any, like: Any) -> Any:
    """The record whose numbers are at an address, in the dtype of the number `like`."""
    record = RecordType(values.record, values.flags, like)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.bitcast(args[0], ir.DoubleType().as_pointer())
        return emit_record(context, builder, record, base)

    return record(values, like), codegen


@intrinsic
def row_at(typingctx: Any, values: Any, index: Any) -> Any:
    """The address of a row."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        size = ir.Constant(args[1].type, 8 * len(values.record.numbers))
        return builder.gep(args[0], [builder.mul(args[1], size)])

    return values(values, types.intp), codegen


@intrinsic
def completed(typingctx: Any, record: Any, derived: Any, like: Any) -> Any:
    """An update's record with what `at_step` has found, in the dtype that `like` computes in.

    Numba computes float32 * float64 in float64, at half the vector width: numbers are brought to
    the elements' dtype once, before the loop.
    """
    operation: type[Update] = record.record
    assert len(derived) == len(operation.derived), "at_step gives what `derived` names"
    compute = like.compute
    result = RecordType(operation, record.flags, compute, operation.derived)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        found = ir.Constant(context.get_value_type(result), ir.Undefined)
        numbers = [(args[0], k, record.compute) for k in range(len(record.numbers))]
        numbers += [(args[1], k, kind) for k, kind in enumerate(derived)]
        for place, (whole, k, kind) in enumerate(numbers):
            value = context.cast(builder, builder.extract_value(whole, k), kind, compute)
            found = builder.insert_value(found, value, place)
        return found

    return result(record, derived, like), codegen


def _formula(name: str, options: dict[str, Any] = EXACT_OPTIONS, called: Any = exact) -> Any:
    """The function of a record and numbers that is this formula of the record's type.

    options, called: how it is compiled, and what makes compiled code of the functions it calls.
    """

    def formula(record: Any, *numbers: Any) -> Any:
        raise NotImplementedError

    @overload(formula, strict=False, jit_options=options)
    def body(record: Any, *numbers: Any) -> Any:
        if not isinstance(record, RecordType):
            return None
        number: Any = np.float64 if record.compute == types.float64 else np.float32
        return translate(getattr(record.record, name), vocabulary, called, number)

    body_of[formula] = lambda record: getattr(record, name, None)
    return formula


value_and_slopes = _formula("value_and_slopes")
fold, finish, slopes = map(_formula, ("fold", "finish", "slopes"))
# A step computes each element once: a product and a sum in one operation are faster and closer.
next_numbers, at_step, update, moved, rate_of = (
    _formula(name, FUNCTION_OPTIONS, inlined)
    for name in ("next_numbers", "at_step", "update", "moved", "rate_of")
)

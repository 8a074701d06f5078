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
from ..operation import Operation
from . import vocabulary
from .compiler import FUNCTION_OPTIONS, inlined
from .pointer import AddressModel, unbox_address

__all__ = [
    "RecordType", "Values", "finish", "fold", "read_record", "slopes", "value_and_slopes",
]  # fmt: skip


class RecordType(types.Type):
    """A record of `operation` with these flags, its numbers of type `compute`."""

    def __init__(self, operation: type[Operation], compute: types.Type, flags: tuple[int, ...]):
        self.operation, self.compute, self.flags = operation, compute, flags
        name = f"{operation.__module__}.{operation.__qualname__}"
        super().__init__(f"Record({name}, {compute}, {flags}, {operation.key})")

    def flag(self, name: str) -> int:
        return self.flags[self.operation.flags.index(name)]


class Values(types.Type):
    """The address of a record's numbers, float64 ones in their order."""

    def __init__(self, operation: type[Operation], flags: tuple[int, ...]) -> None:
        self.operation, self.flags = operation, flags
        name = f"{operation.__module__}.{operation.__qualname__}"
        super().__init__(f"Values({name}, {flags}, {operation.key})")


register_model(Values)(AddressModel)
unbox(Values)(unbox_address)


@register_model(RecordType)
class _RecordModel(models.StructModel):
    def __init__(self, dmm: Any, fe_type: RecordType) -> None:
        members = [(name, fe_type.compute) for name in fe_type.operation.numbers]
        super().__init__(dmm, fe_type, members)


@infer_getattr
class _RecordAttribute(AttributeTemplate):
    key = RecordType

    def generic_resolve(self, typ: RecordType, attribute: str) -> Any:
        if attribute in typ.operation.numbers:
            return typ.compute
        if attribute not in typ.operation.flags:
            return None
        return types.boolean if type(typ.flag(attribute)) is bool else types.intp


@lower_getattr_generic(RecordType)
def _get(context: Any, builder: Any, typ: RecordType, value: Any, attribute: str) -> Any:
    if attribute in typ.operation.flags:
        flag = typ.flag(attribute)
        return context.get_constant(types.boolean if type(flag) is bool else types.intp, flag)
    return builder.extract_value(value, typ.operation.numbers.index(attribute))


@intrinsic
def read_record(typingctx: Any, values: Any, like: Any) -> Any:
    """The record whose numbers are at an address, in the dtype of the number `like`."""
    record = RecordType(values.operation, like, values.flags)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        base = builder.bitcast(args[0], ir.DoubleType().as_pointer())
        result = ir.Constant(context.get_value_type(record), ir.Undefined)
        for k in range(len(values.operation.numbers)):
            number = builder.load(builder.gep(base, [ir.Constant(ir.IntType(64), k)]))
            number = context.cast(builder, number, types.float64, like)
            result = builder.insert_value(result, number, k)
        return result

    return record(values, like), codegen


def _formula(name: str) -> Any:
    """The function of a record and numbers that is this formula of the record's type."""

    def formula(record: Any, *numbers: Any) -> Any:
        raise NotImplementedError

    @overload(formula, strict=False, jit_options=FUNCTION_OPTIONS)
    def body(record: Any, *numbers: Any) -> Any:
        if not isinstance(record, RecordType):
            return None
        number: Any = np.float64 if record.compute == types.float64 else np.float32
        return translate(getattr(record.operation, name), vocabulary, inlined, number)

    return formula


value_and_slopes = _formula("value_and_slopes")
fold, finish, slopes = map(_formula, ("fold", "finish", "slopes"))

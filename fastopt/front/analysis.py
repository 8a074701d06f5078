"""What a call of a loss is, before anything is run: its request, options and operands."""

from __future__ import annotations

import numbers
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..dispatch import Request
from ..kernels.operation import Elementwise, Operation, Options

__all__ = ["Call", "analyse"]

_DEPRECATED = ("size_average", "reduce")


class Call(NamedTuple):
    """One call of a loss, analysed but not yet run.

    Attributes:
        request: for the dispatcher.
        options: the call without its tensors.
        tensors: the operation's operands, None for one that wasn't given.
        classes: of a softmax, else 0.
        warning: what torch warns of at such a call.
    """

    request: Request
    options: Options
    tensors: tuple[Tensor | None, ...]
    classes: int = 0
    warning: str | None = None

    def kind(self) -> tuple[Any, ...]:
        """What calls have in common that their backward passes are expected to agree for.

        It has no sizes but the number of classes: another batch, or sequences of another
        length, is no other kind.
        """
        return self.options, self.request.dtypes, self.classes


def record_of(
    operation: type[Operation], arguments: dict[str, Any], special: list[str]
) -> Operation:
    """The record of a call's options; what is no number for a kernel goes into `special`."""
    values: dict[str, Any] = {}
    for name in operation.numbers:
        value = arguments[name]
        if isinstance(value, bool) or not isinstance(value, numbers.Real):
            special.append(f"{name}={value!r}")
        else:
            values[name] = float(value)
    for name in operation.flags:
        value = arguments[name]
        if type(value) is not bool:
            special.append(f"{name}={value!r}")
        else:
            values[name] = value
    return operation(**values)


def analyse(operation: type[Any], function: str, arguments: dict[str, Any]) -> Call | None:
    """Summarise a call of an elementwise loss.

    Args:
        operation: the record's class.
        function: its name in torch.nn.functional.
        arguments: all of the public function's, by name.

    Returns:
        None for arguments of which torch has to say what is wrong with them.
    """
    from .call import prepare

    special = [f"the deprecated {name}" for name in _DEPRECATED if arguments.get(name) is not None]
    record: Any = record_of(operation, arguments, special)
    if not special and (reason := record.refuse()):
        special.append(reason)
    operands = record.arrange(*[arguments[name] for name in operation.operands])
    if operands is None or not all(t is None or isinstance(t, Tensor) for t in operands):
        return None
    given = [t for t in operands if t is not None]
    try:
        shape = torch.broadcast_shapes(*[t.shape for t in given])
    except RuntimeError:
        return None
    special += _size_specials(operation, operands, shape)
    special += _dtype_specials(operation, operands)
    for name, t in list(zip(operation.operands, operands, strict=True))[operation.slopes :]:
        if t is not None and t.requires_grad and name not in operation.constants:
            special.append(f"a gradient to the {name}")
    reduction = arguments["reduction"]
    call = prepare(
        function, record, operation.reductions, reduction, _result_dtype(given), operands, special
    )
    return call._replace(warning=record.warning(reduction, *operands))


def _size_specials(
    operation: type[Elementwise], operands: tuple[Tensor | None, ...], shape: torch.Size
) -> list[str]:
    first, second, *others = operands
    assert first is not None
    assert second is not None
    names = operation.operands[2:]
    special = []
    if operation.same_sizes and first.shape != second.shape:
        special.append(f"sizes {tuple(first.shape)} and {tuple(second.shape)}")
    elif operation.same_sizes and shape != first.shape:
        special.append(f"operands larger than the {operation.operands[0]}")
    for name, t in zip(names, others, strict=True):
        if t is not None and operation.weighted_as_input and t.shape != first.shape:
            special.append(f"a {name} of size {tuple(t.shape)}")
    return special


def _dtype_specials(operation: type[Elementwise], operands: tuple[Tensor | None, ...]) -> list[str]:
    special = []
    for name, t in zip(operation.operands, operands, strict=True):
        if t is None or t.is_floating_point() or t.is_complex():  # the latter by a rule of dispatch
            continue
        if name not in operation.integers:
            special.append(f"a {name} of dtype {t.dtype}")
    dtypes = {t.dtype for t in operands if t is not None and t.is_floating_point()}
    if operation.same_dtypes and len(dtypes) > 1:
        special.append(f"operands of different dtypes: {', '.join(sorted(map(str, dtypes)))}")
    return special


def _result_dtype(given: list[Tensor]) -> torch.dtype:
    """Torch's: that of tensors with dimensions counts before that of tensors without."""
    floats = [t for t in given if t.is_floating_point() or t.is_complex()]
    found = {t.dtype for t in floats if t.dim()} or {t.dtype for t in floats}
    dtype, *others = found or {torch.get_default_dtype()}
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype

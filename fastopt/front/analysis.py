"""What a call of a loss is, before anything is run: its request, options and operands."""

from __future__ import annotations

import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Request
from ..kernels.operation import NEVER, Elementwise, Loss, Operation, Options, Rowwise
from .autograd import Expected, evaluate
from .circumstances import add_circumstances, autocasts, is_traced
from .crossover import crossover, gpu_crossover

__all__ = ["Call", "Evaluation", "analyse", "expected_size", "prepare", "result_dtype"]

#: see `evaluate` in autograd.py
Evaluation = Callable[[Any, Options, Expected, tuple[Tensor | None, ...], bool], Tensor]

_DEPRECATED = ("size_average", "reduce")


class Call(NamedTuple):
    """One call of a loss, analysed but not yet run.

    Attributes:
        request: for the dispatcher.
        options: the call without its tensors.
        tensors: the operation's operands, None for one that wasn't given.
        classes: of a softmax, else 0.
        warning: what torch warns of at such a call.
        evaluate: what computes it by a compiled backend, from the arguments that are its operands.
    """

    request: Request
    options: Options
    tensors: tuple[Tensor | None, ...]
    classes: int = 0
    warning: str | None = None
    evaluate: Evaluation = evaluate

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
        value, kind = arguments[name], type(getattr(operation, name))
        whole = isinstance(value, numbers.Real) and float(value).is_integer()
        if (type(value) is bool) == (kind is bool) and whole:
            values[name] = kind(value)
        else:
            special.append(f"{name}={value!r}")
    return operation(**values)


def analyse(operation: type[Any], function: str, arguments: dict[str, Any]) -> Call | None:
    """Summarise a call of a loss that formulas say all about.

    Args:
        operation: the record's class.
        function: its name in torch.nn.functional.
        arguments: all of the public function's, by name.

    Returns:
        None for arguments of which torch has to say what is wrong with them.
    """
    special = [f"the deprecated {name}" for name in _DEPRECATED if arguments.get(name) is not None]
    record: Any = record_of(operation, arguments, special)
    if not special and (reason := record.refuse()):
        special.append(reason)
    operands = record.arrange(*[arguments[name] for name in operation.operands])
    if operands is None or not all(t is None or isinstance(t, Tensor) for t in operands):
        return None
    named = dict(zip(operation.operands, operands, strict=True))
    given = {name: t for name, t in named.items() if t is not None}
    if not all(name in given for name in operation.required):
        return None
    if issubclass(operation, Elementwise):
        sizes = [t.shape for t in given.values()]  # which lazy parameters have not
        try:
            shape = torch.broadcast_shapes(*sizes)  # type: ignore[no-untyped-call]
        except RuntimeError:
            return None
        special += _size_specials(operation, operands, shape)
    elif issubclass(operation, Rowwise):
        special += _row_specials(operation, given)
    special += _dtype_specials(operation, given)
    for name, t in given.items():
        if t.requires_grad and name not in operation.followed + operation.constants:
            special.append(f"a gradient to the {name}")
    reduction = arguments["reduction"]
    dtype = result_dtype([given[name] for name in operation.decisive if name in given])
    call = prepare(function, record, operation.reductions, reduction, dtype, operands, special)
    return call._replace(warning=record.warning(reduction, *operands))


def _size_specials(
    operation: type[Elementwise], operands: tuple[Tensor | None, ...], shape: torch.Size
) -> list[str]:
    if not operation.same_sizes and not operation.weighted_as_input:
        return []
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


def _row_specials(operation: type[Rowwise], given: dict[str, Tensor]) -> list[str]:
    shape = given[operation.columns[0]].shape
    if not shape or not shape[-1] or len(shape) > (operation.most_dims or len(shape)):
        return [f"an {operation.columns[0]} of size {tuple(shape)}"]
    right = dict.fromkeys(operation.columns, shape)
    right |= dict.fromkeys(operation.by_class, shape[-1:])
    return [
        f"a {name} of size {tuple(t.shape)} for {tuple(shape)}"
        for name, t in given.items()
        if t.shape != right.get(name, shape[:-1])
    ]


#: What is taken for a number. (Of others, as bool and uint8, torch refuses or wraps a sign.)
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


def _dtype_specials(operation: type[Loss], given: dict[str, Tensor]) -> list[str]:
    special = []
    first, *_ = given.values()
    wide = any(given[name].dtype == torch.float64 for name in operation.decisive if name in given)
    for name, t in given.items():
        if name == operation.label:
            right = t.dtype == torch.int64
        elif t.is_floating_point() or t.is_complex():  # the latter by a rule of dispatch
            right = name in operation.decisive or wide or t.dtype != torch.float64
        else:
            right = name in operation.integers and t.dtype in _INTEGERS
        if not right:
            special.append(f"a {name} of dtype {t.dtype}")
    dtypes = {t.dtype for t in given.values() if t.is_floating_point()}
    if operation.same_dtypes and len(dtypes) > 1:
        special.append(f"operands of different dtypes: {', '.join(sorted(map(str, dtypes)))}")
    if autocasts(first.device):
        if not operation.autocast:
            special.append("autocast, which leaves the parts of this loss alone")
    elif not operation.halves_on_cpu and first.is_cpu and first.itemsize == 2:
        special.append(f"{first.dtype} on the CPU, which torch refuses")
    return special


def result_dtype(given: list[Tensor]) -> torch.dtype:
    """Torch's: that of tensors with dimensions counts before that of tensors without."""
    floats = [t for t in given if t.is_floating_point() or t.is_complex()]
    found = {t.dtype for t in floats if t.dim()} or {t.dtype for t in floats}
    dtype, *others = found or {torch.get_default_dtype()}
    for other in others:
        dtype = torch.promote_types(dtype, other)
    return dtype


def expected_size(size: Any) -> Any:
    """How large what is a symbol in a graph was when it was traced; where nobody knows, large.

    But not as large as NEVER: of a loss whose crossover that is, no size is for a kernel.
    """
    if type(size) is int or not is_traced():
        return size
    hint = size.node.hint
    return NEVER - 1 if hint is None else int(hint)


def prepare(
    function: str,
    record: Operation,
    reductions: tuple[str, ...],
    reduction: str,
    dtype: torch.dtype,
    tensors: tuple[Tensor | None, ...],
    special: list[str],
    row: int = 0,
    classes: int = 0,
    label: int | None = None,
) -> Call:
    """Summarise a call.

    Args:
        function: its name in torch.nn.functional.
        record: its options.
        reductions: those that the operation has.
        reduction: the one of this call.
        dtype: of the result, outside of autocast.
        tensors: its operands, None for one that wasn't given; the first one is the input.
        special: what is known to be beyond the compiled backends.
        row: of a softmax, its classes if they lie side by side.
        classes: of a softmax.
        label: which of the operands has class indices, as its place.
    """
    input = tensors[0]
    assert input is not None
    given = [t for t in tensors if t is not None]
    add_circumstances(given, special)
    if is_traced() and not hasattr(record, "twin") and record.compiled_crossover == NEVER:
        special.append("torch.compile, where what torch has not is torch's operations")
    if not (isinstance(reduction, str) and reduction in reductions):
        special.append(f"reduction={reduction!r}")
    device = input.device
    # integers among the operands of an elementwise loss become numbers of the others' dtype
    floats = [t.is_floating_point() or t.is_complex() for t in given]
    dtypes = tuple(
        [t.dtype for k, t in enumerate(given) if floats[k] or classes or label is not None]
    )
    dtypes = dtypes or tuple([t.dtype for t in given])
    if autocasts(device):
        # Losses are on autocast's float32 list. A kernel computes in float32 anyway and
        # writes each gradient in its tensor's own dtype, so no cast copies are needed.
        dtype = torch.float32
        if torch.float64 in dtypes:
            special.append("float64 under autocast, which leaves it alone")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    numel: Any = expected_size(input.numel())
    if type(numel) is not int:
        special.append(f"{numel} elements, a symbol")
        numel = row = classes = 0
    kind, itemsize = type(record), input.dtype.itemsize
    request = Request(
        function, device.type, dtypes, numel, tuple(special), capability, dispatch.insisted(),
        kind.compiled_crossover if is_traced()
        else gpu_crossover(kind, itemsize, device) if capability or device.type == "xpu"
        else crossover(kind, itemsize, row),
        label,
    )  # fmt: skip
    return Call(request, Options(record, reduction, dtype), tensors, classes)

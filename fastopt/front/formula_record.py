"""The record of a loss that a user wrote: a class as those in `fastopt/nn`, made from a formula."""

from __future__ import annotations

import hashlib
import itertools
import linecache
import warnings
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from .. import formula
from ..kernels.elementwise import compute_dtype
from ..kernels.operation import Elementwise
from .analysis import result_dtype
from .circumstances import autocasts
from .crossover import usual_crossover
from .derivative import derivatives
from .graph import Graph, names_in_code, source_of
from .records import name_for, register
from .written import Written

__all__ = ["FormulaRecord", "Meaning", "definition", "record_of_formula", "warn_of_poles"]


class FormulaRecord(Elementwise):
    """The base of the records of formulas.

    Attributes:
        fields: what the record calls each option.
        source: of `value_and_slopes`.
    """

    _abstract = True
    fields: ClassVar[Mapping[str, str]]
    source: ClassVar[str]

    def value(self, *operands: Any) -> Any:
        """The value of `value_and_slopes` alone."""
        raise NotImplementedError


class Meaning:
    """What a user's functions say: a value, and its derivatives by some of the tensors.

    Args:
        written: the formula.
        constant: the names of the tensors without a derivative.
        numbers: options that are known to be these numbers.
    """

    def __init__(
        self, written: Written, constant: Sequence[str], numbers: Mapping[str, float] | None = None
    ) -> None:
        self.written, self.graph, self.numbers = written, Graph(), numbers or {}
        self._constant = constant
        self._by: Written | None = None
        self.followed = tuple(name for name in written.tensors if name not in constant)
        self.operands = (*self.followed, *constant)
        (self.value,), self.named = self.graph.read(written, self.numbers)
        self.exponents = self.graph.exponents()
        used = self.graph.reached_from([self.value])
        if not used.intersection(map(self.graph.tensor, self.followed)):
            words = f"has no derivative: it uses none of {', '.join(self.followed)}"
            raise written.error(written.tree.body[-1], f"the loss {words}")
        self.slopes = derivatives(self.graph, self.value, self.followed)

    def differentiate_by(self, written: Written) -> None:
        """Take a user's derivatives instead of those that are derived."""
        self.slopes, named = self.graph.read(written, self.numbers)
        self.named = named | self.named
        self._by = written

    def of(self, numbers: Mapping[str, float]) -> Meaning:
        """The same where some options are these numbers."""
        meaning = Meaning(self.written, self._constant, numbers)
        if self._by is not None:
            meaning.differentiate_by(self._by)
        return meaning


def record_of_formula(meaning: Meaning) -> type[FormulaRecord]:
    """The class of a formula's records."""
    written = meaning.written
    fields = _fields_of(written)
    texts = {
        name: source_of(meaning.graph, name, meaning.operands, results, meaning.named, fields)
        for name, results in (
            ("value", [meaning.value]),
            ("value_and_slopes", [meaning.value, *meaning.slopes]),
        )
    }
    kinds = {n: "bool" if type(v) is bool else "float" for n, v in written.options.items()}
    words = [f"{name}_{number:g}" for name, number in meaning.numbers.items()]
    made: Any = type("_".join([name_for(written.function), *words]), (FormulaRecord,), {
        "__doc__": f"The options of {written.function.__qualname__}.",
        "__annotations__": {fields[name]: kind for name, kind in kinds.items()},
        **{fields[name]: default if kinds[name] == "bool" else float(default)
           for name, default in written.options.items()},
        **{name: _function_of(text, name, meaning) for name, text in texts.items()},
        "slopes": len(meaning.followed),
        "integers": meaning.operands,
        "constants": meaning.operands[len(meaning.followed) :],
        "fields": fields,
        "source": texts["value_and_slopes"],
        "crossover": usual_crossover(""),  # of several operations of torch's
    })  # fmt: skip
    made.required = made.operands
    made.twin = _twin_of(made, written.function.__name__)
    register(made)
    return made  # type: ignore[no-any-return]


def _twin_of(kind: Any, name: str) -> Callable[..., Tensor]:
    """The loss in torch's operations, to be called as torch's functions are."""

    def twin(*, reduction: str, **given: Any) -> Tensor:
        tensors = [given.pop(name) for name in kind.operands]
        return definition(kind(**given), tensors, reduction, result_dtype(tensors))

    twin.__name__ = name
    return twin


def _fields_of(written: Written) -> dict[str, str]:
    """A field of its own for each option, under another name where a record has that already."""
    taken = {*dir(FormulaRecord), *(n for n in written.options if n.startswith("option_"))}
    taken.update(*(vars(c).get("__annotations__", ()) for c in FormulaRecord.__mro__))
    fields: dict[str, str] = {}
    for name in written.options:
        usable = name not in taken and not name.startswith("_")
        others = (f"option_{k}" for k in itertools.count())
        fields[name] = name if usable else next(n for n in others if n not in taken)
        taken.add(fields[name])
    return fields


def _function_of(text: str, name: str, meaning: Meaning) -> FunctionType:
    """The function of a source, which whoever compiles it finds as long as the function is there.

    The same source has the same file's name in each process: GPU code on the disk has it.
    """
    digest = hashlib.sha256(text.encode()).hexdigest()[:12]
    function = meaning.written.function
    file = f"<{name} of {function.__module__}.{function.__qualname__}, {digest}>"
    known = _FUNCTIONS.get(file)
    if known is not None:
        return known
    _, module = names_in_code(meaning.operands)
    made: dict[str, Any] = {module: formula}
    exec(compile(text, file, "exec"), made)
    result: FunctionType = made.pop(name)
    result.__module__ = __name__
    linecache.cache[file] = len(text), None, text.splitlines(keepends=True), file
    weakref.finalize(result, linecache.cache.pop, file, None)
    _FUNCTIONS[file] = result
    return result


_FUNCTIONS: weakref.WeakValueDictionary[str, FunctionType] = weakref.WeakValueDictionary()


# -- on torch's tensors ----------------------------------------------------------------------


class _Values(torch.autograd.Function):
    """The values of a record's formula, with its derivatives as it says them."""

    generate_vmap_rule = True

    @staticmethod
    def forward(record: FormulaRecord, *tensors: Tensor) -> Any:
        return record.value(*tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.record, *tensors = inputs
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        _, *slopes = ctx.record.value_and_slopes(*ctx.saved_tensors)
        needs = ctx.needs_input_grad[1:]
        grads = [grad_output * s if need else None for s, need in zip(slopes, needs, strict=False)]
        return (None, *grads, *[None] * (len(needs) - len(grads)))

    @staticmethod
    def jvp(ctx: Any, *grad_inputs: Any) -> Any:
        _, *tangents = grad_inputs
        _, *slopes = ctx.record.value_and_slopes(*ctx.saved_tensors)
        parts = [t * s for s, t in zip(slopes, tangents, strict=False) if t is not None]
        return sum(parts[1:], parts[0])


class _TracedValues(_Values):
    """The same in a graph of torch.compile, which takes no rule for forward mode."""

    generate_vmap_rule = False
    jvp = torch.autograd.Function.jvp

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.record, *tensors = inputs
        ctx.save_for_backward(*tensors)


def definition(
    record: FormulaRecord, tensors: Sequence[Tensor], reduction: str, dtype: torch.dtype
) -> Tensor:
    """The loss in torch's operations: of any tensors, and differentiable to any order.

    As compiled code does, it computes in float32, or in float64 where a tensor has it, and rounds
    once.

    Args:
        record: the options.
        tensors: the record's operands.
        reduction: "none", "mean" or "sum".
        dtype: of the result.
    """
    kind, device = type(record), tensors[0].device
    if autocasts(device):
        with torch.autocast(device.type, enabled=False):
            return definition(record, tensors, reduction, dtype)
    wide = compute_dtype(tuple(tensors))
    numbers = [
        (t.detach() if name in kind.constants else t).to(wide)
        for name, t in zip(kind.operands, tensors, strict=True)
    ]
    apply: Any = (_TracedValues if torch.compiler.is_compiling() else _Values).apply
    values: Tensor = apply(record, *torch.broadcast_tensors(*numbers))  # type: ignore[no-untyped-call]
    if reduction != "none":
        values = values.mean() if reduction == "mean" else values.sum()
    return values.to(dtype)


# -- where a derivative is no number -----------------------------------------------------------


def warn_of_poles(meaning: Meaning, record: FormulaRecord, stacklevel: int) -> None:
    """Warn where a loss is finite and its derivative isn't, at one of some points."""
    kind = type(record)
    points = list(_points(len(kind.operands)))
    columns = torch.tensor(points, dtype=torch.float64, device="cpu").unbind(1)
    with torch.no_grad():
        value, *slopes = record.value_and_slopes(*columns)
    for name, slope in zip(kind.followed, slopes, strict=True):
        numbers = torch.as_tensor(slope).expand(len(points))
        bad = (~numbers.isfinite() & torch.isfinite(value)).nonzero()
        if len(bad):
            place = points[int(bad[0])]
            at = ", ".join(f"{n}={v:g}" for n, v in zip(kind.operands, place, strict=True))
            error = meaning.written.error(
                None,
                f"the derivative by {name} is {numbers[bad[0]].item()} at {at}, where the loss is "
                f"{value[bad[0]].item():g}; a training that comes there ends in NaN",
            )
            warnings.warn(str(error), RuntimeWarning, stacklevel=stacklevel + 1)
            return


def _points(count: int) -> Iterator[tuple[float, ...]]:
    numbers = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)
    if count <= 3:
        yield from itertools.product(numbers, repeat=count)
        return
    size = len(numbers)
    for first, step in itertools.product(range(size), repeat=2):
        yield tuple(numbers[(first + step * k) % size] for k in range(count))

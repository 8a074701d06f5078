"""Losses as operators of torch.library: what a graph of torch.compile or torch.export has.

A loss is three operators. ``fastopt::name`` has the arguments of the public function; torch
composes it, so that the call is analysed while a graph is traced, with the tensors' metadata, as an
eager one is, and becomes torch's own operations, to be compiled with the rest, or the other two.
Those are opaque: ``fastopt::name_forward`` and ``fastopt::name_backward`` run a backend's kernels.

A graph's forward pass doesn't know what its backward pass will be given, and what an operator is
given it may not overwrite: so each gradient is computed once, in the backward pass. The exception
are gradients that are sooner scaled than computed.
"""

from __future__ import annotations

import dataclasses
import inspect
import types
import typing
import warnings
import zlib
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from .. import __version__, dispatch
from ..kernels import reference
from ..kernels.operation import Elementwise, LinearSoftmax, Operation, Options, Rowwise
from .autograd import reference_grads, saved
from .circumstances import TRACED, traced

__all__ = ["Operators"]

Tensors = tuple[Tensor | None, ...]

#: By a loss's name. A module that is loaded again defines its own anew.
_LIBRARIES: dict[str, Any] = {}
_SCHEMA = {bool: "bool", int: "int", float: "float", str: "str"}
_EXACT = (torch.Tag.needs_exact_strides,)
#: What an operator of a forward pass leaves to that of the backward pass.
_LEFT = "gradients, or what the loop keeps"


class Operators:
    """Those of one loss.

    Args:
        name: of the public function.
        operation: the class of its records.
        signature: of the public function.
        function: that.
        torchs: torch's.
        analysis: of a call's arguments, by name.
    """

    def __init__(
        self, name: str, operation: type[Operation], signature: inspect.Signature,
        function: Callable[..., Tensor], torchs: Callable[..., Tensor],
        analysis: Callable[[tuple[Any, ...], dict[str, Any]], Any],
    ) -> None:  # fmt: skip
        self._name, self._operation, self._function = name, operation, function
        if name in _LIBRARIES:
            _LIBRARIES.pop(name)._destroy()
        _LIBRARIES[name] = torch.library.Library("fastopt", "FRAGMENT")  # type: ignore[no-untyped-call]
        self._library = _LIBRARIES[name]
        self._torchs, self._analysis = torchs, analysis
        self._parameters = list(signature.parameters)
        #: Of the arguments that an operator can have: the types that their values have.
        self._kinds: dict[str, tuple[type, ...]] = {}
        arguments, star = [], False
        for parameter in signature.parameters.values():
            kinds = typing.get_args(parameter.annotation) or (parameter.annotation,)
            word = next((_SCHEMA[kind] for kind in _SCHEMA if kind in kinds), "")
            if Tensor in kinds:
                word, kinds = "Tensor", (Tensor, *({types.NoneType} & set(kinds)))
            elif not word:  # a function, or torch's options
                continue
            if parameter.kind is parameter.KEYWORD_ONLY and not star:
                arguments.append("*")
                star = True
            given = parameter.default is not parameter.empty
            optional = "?" if parameter.default is None else ""
            default = f"={parameter.default!r}".replace("'mean'", '"mean"') if given else ""
            arguments.append(f"{word}{optional} {parameter.name}{default}")
            self._kinds[parameter.name] = (*kinds, int) if float in kinds else kinds
        arguments += [*([] if star else ["*"]), 'str? backend=None, str made_by=""']
        self._library.define(f"{name}({', '.join(arguments)}) -> Tensor")
        self._library.impl(name, self._composed, "CompositeImplicitAutograd")
        known = f"{self._define_kernels()} {operation.compiled_crossover} {_LEFT}"
        # Torch keeps compiled graphs on disk. Those of another fastopt have another call in them,
        # which for one with other arguments, results or choices of these is told by a number.
        self.made_by = f"{__version__}-{zlib.crc32(known.encode()):08x}"
        self._operator = getattr(torch.ops.fastopt, name)

    # -- in a program that is being traced -------------------------------------------------

    def call(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The operator's node of a graph; torch's own function where that says what is wrong."""
        given = {**dict(zip(self._parameters, args, strict=False)), **kwargs}
        if len(given) != len(args) + len(kwargs):  # too many of them, or one that is given twice
            return self._torchs(*args, **kwargs)
        known = {}
        for argument, value in given.items():
            kinds = self._kinds.get(argument, ())
            if isinstance(value, kinds):
                known[argument] = value
            elif kinds or value is not None:
                return self._torchs(*args, **kwargs)
        insisted = dispatch.insisted_while_tracing()
        result: Tensor = self._operator(**known, backend=insisted, made_by=self.made_by)
        return result

    def _composed(
        self, *args: Any, backend: str | None = None, made_by: str = "", **kwargs: Any
    ) -> Tensor:
        with nullcontext() if backend is None else dispatch.use_backend(backend):
            if not any(isinstance(a, TRACED) for a in (*args, *kwargs.values())):
                return self._function(*args, **kwargs)
            with traced():
                call = self._analysis(args, kwargs)
            chosen = None if call is None else dispatch.choose(call.request).backend
        if chosen in (None, "reference"):
            return self._torchs(*args, **kwargs)
        if call.warning is not None:
            warnings.warn(call.warning, stacklevel=2)
        tensors = call.tensors
        if issubclass(self._operation, LinearSoftmax):
            tensors = call.options.record.arrange(*tensors)
        result: Tensor
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
            result = _Traced.apply(self, chosen, call.options, *tensors)  # type: ignore[no-untyped-call]
        else:
            rest = _rest(call.options, chosen, (False,) * len(tensors))
            result, _ = self.forward(*tensors, *rest)
        return result

    # -- the kernels ---------------------------------------------------------------------

    def _define_kernels(self) -> str:
        """The operators that run them: operands, the record's fields, what a call is besides.

        Returns their arguments.
        """
        kind: Any = self._operation
        fields = [f.name for f in dataclasses.fields(kind)]
        types_of = {**dict.fromkeys(kind.numbers, "float"), **dict.fromkeys(kind.flags, "int")}
        arguments = ", ".join(
            [
                *(f"Tensor? {name}" for name in kind.operands),
                *(f"{types_of.get(name, 'float?')} {name}" for name in fields),
                "str reduction, ScalarType dtype, str backend, bool[] needs",
            ]
        )
        forward, backward = f"{self._name}_forward", f"{self._name}_backward"
        self._library.define(f"{forward}({arguments}) -> (Tensor, Tensor[])", tags=_EXACT)
        self._library.define(
            f"{backward}(Tensor grad_output, Tensor[] left, {arguments}) -> Tensor[]", tags=_EXACT
        )
        self._library.impl(forward, self._run_forward, "CompositeExplicitAutograd")
        self._library.impl(backward, self._run_backward, "CompositeExplicitAutograd")
        self._library._register_fake(forward, self._fake_forward)
        self._library._register_fake(backward, self._fake_backward)
        self.forward = getattr(torch.ops.fastopt, forward).default
        self.backward = getattr(torch.ops.fastopt, backward).default
        return arguments

    def _call_of(self, values: tuple[Any, ...]) -> tuple[Tensors, Options, Any, tuple[bool, ...]]:
        """What an operator's arguments say."""
        kind: Any = self._operation
        tensors, rest = values[: len(kind.operands)], values[len(kind.operands) :]
        *numbers, reduction, dtype, backend, needs = rest
        fields = dataclasses.fields(kind)
        record = kind(**{
            f.name: bool(v) if f.type in ("bool", bool) else v
            for f, v in zip(fields, numbers, strict=True)
        })  # fmt: skip
        early = 1.0 if record.rescaled else None
        options = Options(record, reduction, dtype, early)
        return tensors, options, dispatch.load(backend), tuple(needs)

    def _run_forward(self, *values: Any) -> tuple[Tensor, list[Tensor]]:
        tensors, options, backend, needs = self._call_of(values)
        loss, grads, kept = backend.forward(options, tensors, needs)
        if self._operation.checked and torch.isnan(loss).any():
            reference.loss(options, tensors)  # torch says what is wrong, if anything is
        if grads is not None:
            left = _all_laid_out(grads, tensors)
        else:
            left = list(kept) if backend.empty_kept(options, tensors, needs) else []
        return loss.contiguous(), left

    def _fake_forward(self, *values: Any) -> tuple[Tensor, list[Tensor]]:
        tensors, options, backend, needs = self._call_of(values)
        input = tensors[0]
        assert input is not None
        shape = self._shape(tensors) if options.reduction == "none" else ()
        loss = input.new_empty(shape, dtype=options.dtype)
        if any(needs) and options.grad_output and backend.early(options, tensors):
            return loss, _empty_gradients(tensors, needs)
        return loss, list(backend.empty_kept(options, tensors, needs))

    def _shape(self, tensors: Tensors) -> Any:
        """Of the loss of each position."""
        first, second, *_ = tensors
        assert first is not None
        assert second is not None
        if issubclass(self._operation, Elementwise):
            return torch.broadcast_shapes(*[t.shape for t in tensors if t is not None])  # type: ignore[no-untyped-call]
        if issubclass(self._operation, Rowwise):
            return first.shape[:-1]
        if issubclass(self._operation, LinearSoftmax):
            return (*first.shape[:-1], *second.shape[1:-1])
        return first.shape[:1] * (first.dim() > 1) + first.shape[2:]

    def _run_backward(self, grad_output: Tensor, left: list[Tensor], *values: Any) -> list[Tensor]:
        tensors, options, backend, needs = self._call_of(values)
        grads, kept = None, tuple(left)
        if left and backend.early(options, tensors):
            given = iter(left)
            grads, kept = tuple([next(given).clone() if need else None for need in needs]), ()
        found = backend.backward_alone(options, tensors, grads, kept, grad_output, needs)
        return _all_laid_out(found, tensors)

    def _fake_backward(self, grad_output: Tensor, left: list[Tensor], *values: Any) -> list[Tensor]:
        tensors, _, _, needs = self._call_of(values)
        return _empty_gradients(tensors, needs)


def _rest(options: Options, backend: str, needs: tuple[bool, ...]) -> tuple[Any, ...]:
    """What the operators that run kernels are given beside tensors."""
    record: Any = options.record
    numbers = [getattr(record, f.name) for f in dataclasses.fields(record)]
    return (*numbers, options.reduction, options.dtype, backend, needs)


def _empty_gradients(tensors: Tensors, needs: tuple[bool, ...]) -> list[Tensor]:
    pairs = zip(tensors, needs, strict=True)
    return [torch.empty_like(t) for t, need in pairs if need and t is not None]


def _all_laid_out(grads: Tensors, tensors: Tensors) -> list[Tensor]:
    """The gradients as a graph knows them: in memory as `empty_like` of their tensors."""
    found = []
    for grad, tensor in zip(grads, tensors, strict=True):
        if grad is not None and tensor is not None:
            right = grad.stride() == torch.empty_like(tensor, device="meta").stride()
            found.append(grad if right else torch.empty_like(tensor).copy_(grad))
    return found


class _Traced(torch.autograd.Function):
    """A loss in a graph, by its operators."""

    @staticmethod
    def forward(
        ctx: Any, operators: Operators, backend: str, options: Options, *tensors: Tensor | None
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        ctx.operators, ctx.options, ctx.needs = operators, options, needs
        ctx.rest = _rest(options, backend, needs)
        loss, left = operators.forward(*tensors, *ctx.rest)
        every = (*tensors, *left)
        ctx.given = tuple([t is not None for t in every])
        ctx.save_for_backward(*[t for t in every if t is not None])
        ctx.set_materialize_grads(False)
        result: Tensor = loss
        return result

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> Any:
        (grad_output,) = grad_outputs
        if grad_output is None:
            return (None,) * (3 + len(ctx.needs))
        tensors, left = saved(ctx)
        if torch.is_grad_enabled():  # create_graph
            return None, None, None, *reference_grads(ctx.options, tensors, grad_output, ctx.needs)
        grads = iter(ctx.operators.backward(grad_output, list(left), *tensors, *ctx.rest))
        return None, None, None, *[next(grads) if need else None for need in ctx.needs]

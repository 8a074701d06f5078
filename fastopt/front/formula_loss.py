"""Losses that users write: a formula of numbers becomes a function of tensors, and a module."""

from __future__ import annotations

import functools
import inspect
import numbers
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Decision
from .analysis import Call, analyse, result_dtype
from .call import LossModule, tracer_of
from .circumstances import autocasts, is_foreign, is_traced
from .formula_record import (
    FormulaRecord,
    Meaning,
    definition,
    record_of_formula,
    warn_of_poles,
)
from .route import RouteCache, key_of
from .written import Written, read

__all__ = ["FormulaLoss", "FormulaModule", "loss"]

_REDUCTIONS = ("none", "mean", "sum")
#: Triton unpacks no tuple of any length.
_MOST_FLAGS = 3
#: Powers by an option that is one of these numbers are products, in code of their own.
_PRODUCTS = (0.0, 1.0, 2.0, 3.0, 4.0)
insisted, is_compiling = dispatch.insisted, torch.compiler.is_compiling


@overload
def loss(function: Callable[..., Any], /) -> FormulaLoss: ...


@overload
def loss(*, constant: Sequence[str] = ()) -> Callable[[Callable[..., Any]], FormulaLoss]: ...


def loss(function: Callable[..., Any] | None = None, /, *, constant: Sequence[str] = ()) -> Any:
    r"""Decorator: a formula of numbers becomes a loss of tensors, by compiled kernels.

    The function says what the loss of one element is, in the operators and the names of
    :mod:`fastopt.formula`: assignments to names, and one return. Its positional parameters are
    tensors, its keyword-only ones options: numbers, or bools, which are compiled in. Its derivative
    is derived from its source, or given by ``loss.gradient``. What it is given then:

    - tensors of sizes that broadcast, of float64, float32, bfloat16 or float16, or of integers;
      those of floating point have gradients unless they are `constant`;
    - ``reduction``: "none" gives values by element, "mean" (default) their mean, "sum" their sum;
    - the options, by name.

    The result has the common dtype of the tensors of floating point (float32 under autocast).
    ``loss.Module`` is a module with the same options, ``loss.source`` what is compiled.

    Args:
        function: the formula.
        constant: the names of tensors without a gradient, as of masks.

    Returns:
        The loss, to be called like torch's losses.

    Raises:
        FormulaError: what the function says is no formula; with the line, the expression, and what
            to write instead.
        TypeError, ValueError, RuntimeError: (in calls) arguments that don't go together.

    Warns:
        RuntimeWarning: a derivative that is infinite or NaN where the loss is finite.

    Example:
        >>> from fastopt import formula as m
        >>> @fastopt.loss
        ... def charbonnier(input, target, *, eps=1e-3):
        ...     d = input - target
        ...     return m.sqrt(d * d + eps * eps)
        >>> charbonnier(model(x), y, eps=1e-2).backward()
        >>> criterion = charbonnier.Module(eps=1e-2, reduction="sum")
    """
    if isinstance(constant, str):
        raise TypeError(f"constant must be a sequence of names, as ({constant!r},)")
    if function is None:
        return lambda given: FormulaLoss(given, tuple(constant))
    return FormulaLoss(function, ())


class FormulaLoss:
    """A loss that a user wrote, as :func:`fastopt.loss` makes it.

    Attributes:
        Module: its class of modules.
        source: the function of numbers that compiled code is made of, as Python.
    """

    Module: type[FormulaModule]
    __name__: str
    __qualname__: str
    __wrapped__: Callable[..., Any]

    def __init__(self, function: Callable[..., Any], constant: Sequence[str]) -> None:
        written = read(function)
        written.expect_results(["the loss of one element"])
        _check_names(written, constant)
        functools.update_wrapper(self, function)
        self._meaning = Meaning(written, constant)
        self._settle(stacklevel=4)
        self.__signature__ = _signature_of(function)
        self.Module = _module_of(self, function)

    def _settle(self, stacklevel: int) -> None:
        """Make the record anew, and forget what was known of calls."""
        self._record = record_of_formula(self._meaning)
        self._of_powers: dict[tuple[tuple[str, float], ...], type[FormulaRecord]] = {}
        self._routes = RouteCache()
        warn_of_poles(self._meaning, self._record(), stacklevel)

    def _record_for(self, options: dict[str, float | bool]) -> type[FormulaRecord]:
        """The record of a call with these options."""
        known = tuple((n, options[n]) for n in self._meaning.exponents if options[n] in _PRODUCTS)
        if not known or is_compiling():  # a graph has its options as numbers anyway
            return self._record
        if known not in self._of_powers:
            self._of_powers[known] = record_of_formula(self._meaning.of(dict(known)))
        return self._of_powers[known]

    @property
    def source(self) -> str:
        """The function of numbers that compiled code is made of, as Python."""
        return self._record.source

    @property
    def tensors(self) -> tuple[str, ...]:
        """The names of its tensors, in their order."""
        return self._meaning.written.tensors

    @property
    def followed(self) -> tuple[int, ...]:
        """The places of the tensors that aren't constant."""
        return tuple(map(self.tensors.index, self._meaning.followed))

    def gradient(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Decorator: a formula of the derivatives, to be taken instead of those that are derived.

        It has the loss's parameters, and returns one derivative for each tensor that isn't
        constant, in their order.

        Raises:
            FormulaError: it is no formula, has other parameters, or returns another number of
                values.

        Example:
            >>> @square.gradient
            ... def square_slopes(input, target):
            ...     d = 2.0 * (input - target)
            ...     return d, -d
        """
        written, loss = read(function), self._meaning.written
        mine, its = ((*w.tensors, *w.options) for w in (written, loss))
        if mine != its:
            raise written.error(
                None, f"parameters {', '.join(mine)}; those of {self.__name__} are {', '.join(its)}"
            )
        written.expect_results([f"the derivative by {n}" for n in self._meaning.followed])
        self._meaning.differentiate_by(written)
        self._settle(stacklevel=3)
        return function

    # -- a call ------------------------------------------------------------------------------

    def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
        if is_compiling():
            asked_for = dispatch.insisted_while_tracing()
            if asked_for not in (None, "reference"):
                raise RuntimeError(
                    f"use_backend({asked_for!r}) insists on kernels, but inside of what "
                    "torch.compile compiles a loss of your own is torch's operations"
                )
            return self._defined(args, kwargs)
        values = (*args, *kwargs.values())
        route = self._routes.recognise(kwargs, values)
        if route is None:
            key = key_of(kwargs, values)
            route = self._routes.find(key, kwargs, values)
        if route is None:
            if (tracer := tracer_of(*values)) is not None:
                node: Tensor = tracer.create_proxy("call_function", self, args, kwargs)
                return node
            if key is None and insisted() is None and is_foreign(values):
                return self._defined(args, kwargs)
            route = self._routes.settle(key, self._analysed(args, kwargs), self._places(kwargs))
        result = route.serve(values)
        return self._defined(args, kwargs) if result is None else result

    def decide(self, *args: Any, **kwargs: Any) -> Decision:
        """For :func:`fastopt.explain`."""
        call = self._analysed(args, kwargs)
        decision = dispatch.choose(call.request)
        if decision.backend == "reference":
            return decision._replace(variant="the formula in torch's operations")
        return dispatch.describe(decision, "describe", call.options, call.tensors)

    def __repr__(self) -> str:
        return f"<loss {self.__qualname__}{self.__signature__}>"

    def __reduce__(self) -> str:
        return self.__qualname__  # as a function is pickled: by where it is found

    def _places(self, kwargs: dict[str, Any]) -> tuple[int, ...]:
        """Where a call's arguments have the operands."""
        tensors = self.tensors
        named = [n for n in tensors if n in kwargs]
        given = [*tensors[: len(tensors) - len(named)], *kwargs]
        return tuple(given.index(name) for name in self._record.operands)

    def _analysed(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
        tensors, options, reduction = self._bound(args, kwargs)
        kind = self._record_for(options)
        values = {kind.fields[name]: value for name, value in options.items()}
        with torch._C.DisableTorchFunction():
            call = analyse(kind, self.__name__, {**tensors, **values, "reduction": reduction})
        assert call is not None, "the arguments have been checked"
        if is_traced():
            words = "torch.compile, where what torch has not is torch's operations"
            special = (*call.request.special, words)
            call = call._replace(request=call.request._replace(special=special))
        return call

    def _defined(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        """The loss in torch's operations."""
        named, options, reduction = self._bound(args, kwargs)
        kind = self._record_for(options)
        record = kind(**{kind.fields[name]: value for name, value in options.items()})
        tensors = [named[name] for name in kind.operands]
        dtype = result_dtype(tensors)
        if dtype != torch.float64 and autocasts(tensors[0].device):
            dtype = torch.float32
        return definition(record, tensors, reduction, dtype)

    # -- its arguments -----------------------------------------------------------------------

    def _bound(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[dict[str, Tensor], dict[str, float | bool], str]:
        """A call's tensors and options by name, and its reduction, all of them checked."""
        name, tensors = self.__name__, self.tensors
        if len(args) > len(tensors):
            raise TypeError(
                f"{name}() takes {len(tensors)} tensors ({', '.join(tensors)}), but {len(args)} "
                "were given by position; options are given by name"
            )
        given = dict(zip(tensors, args, strict=False))
        options = {}
        for key, value in kwargs.items():
            if key in given:
                raise TypeError(f"{name}() got {key} twice")
            if key in tensors:
                given[key] = value
            else:
                options[key] = value
        if missing := [n for n in tensors if n not in given]:
            raise TypeError(f"{name}() lacks {', '.join(missing)} ({', '.join(tensors)})")
        reduction = options.pop("reduction", "mean")
        checked = self.check_options(options, reduction)
        self._check_tensors(given)
        return given, checked, reduction

    def check_options(self, options: dict[str, Any], reduction: Any) -> dict[str, float | bool]:
        """All options, the usual ones among them, as numbers."""
        name, defaults = self.__name__, self._meaning.written.options
        if not (isinstance(reduction, str) and reduction in _REDUCTIONS):
            raise ValueError(
                f"{name}(): {reduction!r} is not a valid value for reduction "
                f"(allowed: {', '.join(_REDUCTIONS)})"
            )
        checked: dict[str, float | bool] = dict(defaults)
        for key, value in options.items():
            if key not in defaults:
                allowed = ", ".join((*defaults, "reduction"))
                raise TypeError(f"{name}() has no option {key!r} (allowed: {allowed})")
            if type(defaults[key]) is bool:
                if not isinstance(value, bool):
                    raise TypeError(f"{name}(): {key} must be True or False, not {value!r}")
                checked[key] = value
            elif isinstance(value, bool) or not isinstance(value, numbers.Real):
                raise TypeError(
                    f"{name}(): {key} must be a number, not {type(value).__name__}"
                    + (" (give what is trained with as a tensor of its own)"
                       if isinstance(value, Tensor) else "")
                )  # fmt: skip
            else:
                checked[key] = float(value)
        return {k: v if isinstance(v, bool) else float(v) for k, v in checked.items()}

    def _check_tensors(self, given: dict[str, Any]) -> None:
        name = self.__name__
        for key, t in given.items():
            if not isinstance(t, Tensor):
                raise TypeError(f"{name}(): {key} must be a tensor, not {type(t).__name__}")
            if t.is_complex():
                raise TypeError(f"{name}(): {key} must be real, not {t.dtype}")
        if not any(t.is_floating_point() for t in given.values()):
            dtypes = ", ".join(f"{key} of {t.dtype}" for key, t in given.items())
            raise TypeError(f"{name}(): at least one tensor must be floating point, not {dtypes}")
        devices = {t.device for t in given.values() if t.dim()}
        if len(devices) > 1:
            places = ", ".join(f"{key} on {t.device}" for key, t in given.items())
            raise RuntimeError(
                f"{name}(): expected all tensors to be on the same device, but found {places}"
            )
        try:
            torch.broadcast_shapes(*[t.shape for t in given.values()])  # type: ignore[no-untyped-call]
        except RuntimeError as error:
            sizes = ", ".join(f"{key} of {tuple(t.shape)}" for key, t in given.items())
            raise RuntimeError(f"{name}(): sizes that don't go together: {sizes}") from error


class FormulaModule(LossModule, torch.nn.Module):
    """The base of the modules of users' losses.

    Their options are keyword arguments and attributes; they have no parameters and no state.
    """

    _function: ClassVar[FormulaLoss]

    def __init__(self, *, reduction: str = "mean", **options: float | bool) -> None:
        super().__init__()
        for name, value in self._function.check_options(options, reduction).items():
            setattr(self, name, value)
        self.reduction = reduction

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={value!r}" for name, value in self._options().items())

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        return self._function(*args, **kwargs, **self._options())


def _check_names(written: Written, constant: Sequence[str]) -> None:
    for name in constant:
        if name not in written.tensors:
            words = f"constant={name!r} is none of its tensors ({', '.join(written.tensors)})"
            raise written.error(None, words)
    if set(written.tensors) <= set(constant):
        raise written.error(None, "all tensors are constant; a loss has a derivative by one")
    arguments = {a.arg: a for a in (*written.tree.args.args, *written.tree.args.kwonlyargs)}
    for name, argument in arguments.items():
        if name == "reduction":
            raise written.error(argument, "each loss has a reduction of its own: rename this one")
    taken = {*dir(torch.nn.Module), *torch.nn.Module.__annotations__}
    for name in written.options:
        if name in taken:
            raise written.error(arguments[name], "torch.nn.Module has this name: rename the option")
    flags = [name for name, value in written.options.items() if type(value) is bool]
    if len(flags) > _MOST_FLAGS:
        words = f"options that are true or false: {', '.join(flags)}; at most {_MOST_FLAGS}"
        raise written.error(None, words)


def _signature_of(function: Callable[..., Any]) -> inspect.Signature:
    """The formula's, of tensors, with a reduction."""
    signature = inspect.signature(function)
    kind = inspect.Parameter.KEYWORD_ONLY
    reduction = inspect.Parameter("reduction", kind, default="mean", annotation=str)
    parameters = [
        p if p.kind is kind else p.replace(annotation=Tensor) for p in signature.parameters.values()
    ]
    return signature.replace(parameters=[*parameters, reduction], return_annotation=Tensor)


def _module_of(loss: FormulaLoss, function: Callable[..., Any]) -> type[FormulaModule]:
    options = (*loss._meaning.written.options, "reduction")
    signature = loss.__signature__
    keywords = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    return type(function.__name__, (FormulaModule,), {
        "__module__": function.__module__,
        "__qualname__": f"{function.__qualname__}.Module",
        "__doc__": f"{function.__qualname__} as a module.\n\nIts options: {', '.join(options)}.",
        "__signature__": signature.replace(parameters=keywords),
        "_function": loss,
        "_named": options,
    })  # fmt: skip

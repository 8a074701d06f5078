"""The way of every loss: analysis, route, cache of routes, autograd. Holds no maths."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn._reduction import get_enum

from .. import dispatch
from ..dispatch import Decision
from ..errors import BackendUnavailable
from ..kernels.operation import LinearSoftmax, Operation, Softmax
from . import measured
from .analysis import Call, analyse
from .autograd import evaluate
from .circumstances import is_foreign
from .crossover import quick_test, usual_crossover
from .operators import Operators
from .route import RouteCache, key_of

# Names of their own, for what the smallest calls have to ask.
is_compiled, is_tracing = torch.compiler.is_dynamo_compiling, torch._C._is_tracing
insisted = dispatch.insisted

#: the operation of each public function, by its name
RECORDS: dict[str, type[Operation]] = {}

P = ParamSpec("P")
#: torch's numbers for the reductions, as its own functions pass them on
REDUCTIONS = {name: get_enum(name) for name in ("none", "mean", "sum")}


def loss(
    operation: type[Operation],
    native: Callable[..., Tensor] | None = None,
    analysis: Callable[[str, dict[str, Any]], Call | None] | None = None,
    torchs: Callable[..., Tensor] | None = None,
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorator: a public function (its body is its docstring) that computes an operation.

    Its name and arguments are those of torch's function, which is looked up now, once, unless it
    is given.

    Args:
        operation: the class of its records.
        native: torch's function by a shorter way, for calls that need not be looked at.
        analysis: of a call's function and arguments, where that of an elementwise loss won't do.
        torchs: torch's function, where torch may lack it or some of its arguments.
    """
    given = torchs
    kind: Any = operation
    analysis = analysis or functools.partial(analyse, kind)

    def decorate(documented: Callable[P, Tensor]) -> Callable[P, Tensor]:
        name = documented.__name__
        torchs: Callable[..., Tensor] = getattr(F, name) if given is None else given
        if "twin" not in vars(operation):  # a second function of the same operation is another one
            operation.twin = torchs
        signature = inspect.signature(documented, eval_str=True)
        parameters = list(signature.parameters)
        fallback = torchs if native is None else native
        if not hasattr(operation, "crossover"):
            operation.crossover = usual_crossover(name)
        if (limits := measured.read().limits.get(name)) is not None:
            operation.crossover, operation.row_crossover = limits
        is_small, surely = quick_test(operation)
        knows_shards = issubclass(operation, Softmax | LinearSoftmax)
        cache = RouteCache()
        RECORDS[name] = operation

        def analysed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
            try:
                bound = signature.bind(*args, **kwargs)
            except TypeError:
                torchs(*args, **kwargs)  # which says so in its own words
                raise
            bound.apply_defaults()
            with torch._C.DisableTorchFunction():  # no override gets to see what is asked
                return analysis(name, bound.arguments)

        def places(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int | None, ...]:
            given = [*parameters[: len(args)], *kwargs]
            values = (*args, *kwargs.values())
            return tuple(
                given.index(n) if n in given and values[given.index(n)] is not None else None
                for n in operation.operands
            )

        @functools.wraps(documented)
        def function(*args: P.args, **kwargs: P.kwargs) -> Tensor:
            if is_compiled():
                return operators.call(args, kwargs)
            values = (*args, *kwargs.values())
            # To look spares programs that have small losses alone a call.
            route = cache.recognise(kwargs, values) if cache.last else None
            if route is None:
                if is_tracing():
                    return torchs(*args, **kwargs)  # one node of the trace
                # `choose` would say the same, but asking takes a few microseconds of a small
                # call's 15.
                first: Any = args[0] if args else None
                plain = type(first) is Tensor and first.is_cpu and insisted() is None
                if plain and (first.numel() < surely or is_small(first)):
                    return fallback(*args, **kwargs)
                key = key_of(kwargs, values)
                route = cache.find(key, kwargs, values)
            if route is None:
                if torch.compiler.is_compiling():  # by torch.export, which has no Dynamo here
                    return operators.call(args, kwargs)
                if (tracer := tracer_of(*values)) is not None:
                    node: Tensor = tracer.create_proxy("call_function", function, args, kwargs)
                    return node
                if key is None and insisted() is None and is_foreign(values, knows_shards):
                    return fallback(*args, **kwargs)
                call = analysed(args, kwargs)
                if call is None:
                    return fallback(*args, **kwargs)
                try:
                    route = cache.settle(key, call, places(args, kwargs))
                except BackendUnavailable:
                    fallback(*args, **kwargs)  # bad input gets torch's own error, first of all
                    raise
            result = route.serve(values)
            if result is None or (operation.checked and result.is_cpu and _has_nan(result)):
                return fallback(*args, **kwargs)  # torch says what is wrong, if anything is
            return result

        def decide(*args: P.args, **kwargs: P.kwargs) -> Decision:
            call = analysed(args, kwargs)
            if call is None:
                raise TypeError("there is nothing to explain: arguments must be tensors")
            decision = dispatch.choose(call.request)
            beyond = call.options.record.beyond()
            if decision.backend == "reference" and beyond:
                words = "the definition in torch's operations; torch's function has no "
                return decision._replace(variant=words + ", ".join(beyond))
            if call.evaluate is not evaluate:  # by none of the loops that describe themselves
                return decision
            return dispatch.describe(decision, "describe", call.options, call.tensors)

        operators = Operators(name, operation, signature, function, torchs, analysed)
        function.decide = decide  # type: ignore[attr-defined]
        # torch.jit.script would compile the body, a docstring
        function.__prepare_scriptable__ = lambda: getattr(F, name, torchs)  # type: ignore[attr-defined]
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


_routes = RouteCache(binds=False)


def backend_for(
    function: str, tensors: tuple[Tensor | None, ...], analysis: Callable[[], Call]
) -> Any:
    """The backend that serves a call of what torch has not; None for torch's operations.

    Args:
        function: its name.
        tensors: the call's, which with the name say all that an analysis looks at.
        analysis: of the call.
    """
    if torch.compiler.is_compiling() or is_tracing():
        return None
    names = (function,)
    route = _routes.recognise(names, tensors)
    if route is None:
        key = key_of(names, tensors)
        route = _routes.find(key, names, tensors)
    if route is None:
        if key is None and insisted() is None and is_foreign(tensors):
            return None
        route = _routes.settle(key, analysis(), tuple(range(len(tensors))))
    return route.backend


def _has_nan(result: Tensor) -> bool:
    with torch.no_grad():
        return bool(torch.isnan(result).any())


def tracer_of(*arguments: object) -> Any:
    """What torch.fx traces a call with, if it does; such a call stays one of fastopt's."""
    return next((a.tracer for a in arguments if isinstance(a, torch.fx.Proxy)), None)


def shortest(
    function: Callable[..., Tensor], native: Callable[..., Tensor]
) -> Callable[..., Tensor]:
    """Torch's function of (input, target), by a shorter way where its Python has nothing to do.

    What that does before takes a quarter of a small loss's time.

    Args:
        function: torch's.
        native: its code in C++, of (input, target, number of the reduction).
    """

    def call(
        input: Tensor,
        target: Tensor,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
    ) -> Tensor:
        if (
            type(input) is Tensor
            and type(target) is Tensor
            and size_average is None
            and reduce is None
            and weight is None
            and type(reduction) is str
            and reduction in REDUCTIONS
            and input.shape == target.shape
            and not torch._C._len_torch_function_stack()
        ):
            return native(input, target, REDUCTIONS[reduction])
        return function(
            input, target, size_average=size_average, reduce=reduce, reduction=reduction,
            **({} if weight is None else {"weight": weight}),
        )  # fmt: skip

    call.__qualname__ = function.__name__  # for Python's errors about arguments
    return call


class LossModule:
    """Mixin in front of a torch loss class, of which a subclass overrides `forward` alone.

    That calls the function of the same operation, with the options that the module has.
    """

    _function: ClassVar[Callable[..., Tensor]]
    _named: ClassVar[tuple[str, ...]]

    def __init_subclass__(cls, function: Callable[..., Tensor] | None = None) -> None:
        super().__init_subclass__()
        if function is None:  # a user's subclass of ours
            return
        known = inspect.signature(function).parameters
        torchs: Any = cls.__bases__[-1]
        # Not of the class: a deprecated one has a __new__ that takes anything.
        given = inspect.signature(torchs.__init__).parameters
        options = [name for name in given if name in known]
        cls._function = staticmethod(function)
        cls._named = tuple(name for name in options if name not in ("size_average", "reduce"))

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return {name: getattr(self, name) for name in self._named}

    def _beyond(self) -> dict[str, Any]:
        """The options, of those that torch's class has not, that aren't the usual ones."""
        return {}

    def __prepare_scriptable__(self) -> Any:
        """For torch.jit.script, which can't call what isn't TorchScript: torch's own module."""
        kind: Any = type(self)
        if not kind.forward.__module__.startswith("fastopt.nn."):
            return self  # a subclass with a forward of its own
        if beyond := self._beyond():
            raise TypeError(
                f"torch.jit.script compiles torch's own {kind.__name__}, which has no "
                f"{', '.join(beyond)}"
            )
        torchs: Any = next(c for c in kind.__mro__ if c.__module__.startswith("torch.nn."))
        module = torchs.__new__(torchs)
        module.__dict__.update(self.__dict__)
        return module

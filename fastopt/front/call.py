"""The way of every loss: analysis, route, cache of routes, autograd. Holds no maths."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, ParamSpec

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn._reduction import get_enum
from torch.utils._device import DeviceContext

from .. import dispatch
from ..dispatch import Decision, Request
from ..errors import BackendUnavailable
from ..kernels.layout import is_released, released_error
from ..kernels.operation import Operation, Options
from .analysis import Call, analyse
from .autograd import Expected, evaluate
from .crossover import crossover, quick_test, usual_crossover

# Names of their own, for what the smallest calls have to ask.
is_compiling, tracing_state = torch.compiler.is_compiling, torch._C._get_tracing_state
insisted = dispatch.insisted

#: the operation of each public function, by its name
FUNCTIONS: dict[str, type[Operation]] = {}

P = ParamSpec("P")
Tensors = tuple[Tensor | None, ...]

_AUTOCAST = ("cpu", "cuda", "xpu")
#: torch's numbers for the reductions, as its own functions pass them on
REDUCTIONS = {name: get_enum(name) for name in ("none", "mean", "sum")}
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (str, int, float, bool, type(None))


def prepare(
    function: str,
    record: Operation,
    reductions: tuple[str, ...],
    reduction: str,
    dtype: torch.dtype,
    tensors: Tensors,
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
    _add_circumstances(given, special)
    if not (isinstance(reduction, str) and reduction in reductions):
        special.append(f"reduction={reduction!r}")
    device = input.device
    # integers among the operands of an elementwise loss become numbers of the others' dtype
    numbers = [t.is_floating_point() or t.is_complex() for t in given]
    dtypes = tuple([t.dtype for k, t in enumerate(given) if numbers[k] or classes or k == label])
    dtypes = dtypes or tuple([t.dtype for t in given])
    if autocasts(device):
        # Losses are on autocast's float32 list. A kernel computes in float32 anyway and
        # writes each gradient in its tensor's own dtype, so no cast copies are needed.
        dtype = torch.float32
        if torch.float64 in dtypes:
            special.append("float64 under autocast, which leaves it alone")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    numel = input.numel()
    if type(numel) is not int:
        special.append(f"{numel} elements, a symbol")
        numel = row = classes = 0
    request = Request(
        function, device.type, dtypes, numel, tuple(special), capability, dispatch.insisted(),
        crossover(type(record), input.dtype.itemsize, row), label,
    )  # fmt: skip
    return Call(request, Options(record, reduction, dtype), tensors, classes)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; asking torch about other devices (meta) raises."""
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


def _add_circumstances(tensors: list[Tensor], special: list[str]) -> None:
    """Note what only torch itself can follow, in the tensors and around the call."""
    device, ambience = tensors[0].device, _ambience()
    for t in tensors:
        if type(t) not in _PLAIN:
            special.append(f"a tensor of type {type(t).__name__}")
        elif t.layout is not torch.strided:
            special.append(f"layout={t.layout}")
        elif t.is_neg():
            special.append("a lazily negated tensor")
        elif t._is_zerotensor():
            special.append("a tensor of zeros without memory")
        elif not ambience and is_released(t):  # under a transform tensors have no address
            raise released_error("a tensor", t)  # some of torch's own code would end the process
        if t.device != device:
            special.append("tensors on different devices")
    special += ambience


def _ambience() -> list[str]:
    """What there is around a call that only torch itself can follow."""
    special = []
    if torch._C._len_torch_function_stack() and _has_function_mode():
        special.append("a torch function override")
    if torch._C._are_functorch_transforms_active():
        special.append("a torch.func transform")
    if torch.autograd.forward_ad._current_level >= 0:
        special.append("forward-mode differentiation")
    if torch.compiler.is_compiling():
        special.append("torch.compile")
    if torch._C._len_torch_dispatch_stack() or torch._C._get_tracing_state() is not None:
        special.append("tracing")
    return special


def _has_function_mode() -> bool:
    """Whether some mode wants to see torch's functions; torch.set_default_device is one, too."""
    return any(
        type(torch._C._get_function_stack_at(k)) is not DeviceContext
        for k in range(torch._C._len_torch_function_stack())
    )


def _is_foreign(values: tuple[Any, ...]) -> bool:
    """Whether a call is torch's for what its tensors are, or for what is around it.

    Nothing need be asked of such tensors then: their sizes may be symbols, on which to decide
    would narrow a trace, or not be known yet.
    """
    foreign = any(isinstance(v, Tensor) and type(v) not in _PLAIN for v in values)
    return foreign or bool(_ambience())


class Route(NamedTuple):
    """A call's analysis, for all calls of the same metadata.

    Attributes:
        backend: the one to serve it, None for the reference.
        options: the call without its tensors.
        places: where the arguments have each operand; None for one not given.
        expected: of their backward passes.
        warning: what torch warns of at such a call.
    """

    backend: Any
    options: Options
    places: tuple[int | None, ...]
    expected: Expected
    warning: str | None

    def serve(self, values: tuple[Any, ...]) -> Tensor | None:
        if self.backend is None:
            return None
        if self.warning is not None:
            warnings.warn(self.warning, stacklevel=4)
        tensors = tuple([None if k is None else values[k] for k in self.places])
        record: Any = self.options.record
        if record.arranged:
            tensors = record.arrange(*tensors)
        return evaluate(self.backend, self.options, self.expected, tensors)


class RouteCache:
    """What has been settled about the calls of one function, by all that the outcome depends on."""

    LIMIT = 1024
    _all: ClassVar[list[RouteCache]] = []

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], Route] = {}
        self._expected: dict[tuple[Any, ...], Expected] = {}
        self._all.append(self)

    @classmethod
    def forget(cls) -> None:
        """Settle everything anew, under other rules."""
        dispatch.choose.cache_clear()
        for cache in cls._all:
            cache._known.clear()
            cache._expected.clear()

    def find(self, key: tuple[Any, ...] | None) -> Route | None:
        return None if key is None else self._known.get(key)

    def settle(
        self,
        key: tuple[Any, ...] | None,
        call: Call,
        places: tuple[int | None, ...],
    ) -> Route:
        """Decide about a call, and remember it.

        Raises:
            BackendUnavailable: the backend insisted on can't serve the call.
        """
        name = dispatch.choose(call.request).backend
        backend = None if name == "reference" else dispatch.load(name)
        expected = Expected() if backend is None else self._expect(name, call)
        route = Route(backend, call.options, places, expected, call.warning)
        if key is not None:
            if len(self._known) >= self.LIMIT:
                self._known.clear()
            self._known[key] = route
        return route

    def _expect(self, backend: str, call: Call) -> Expected:
        """What the backward passes of calls like this one have asked a backend for."""
        if len(self._expected) >= self.LIMIT:
            self._expected.clear()
        return self._expected.setdefault((backend, *call.kind()), Expected())


def _key(names: Any, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All of a call that an analysis looks at; None where that may be more than this.

    Args:
        names: of those arguments that were given by name, the last ones.
        values: all arguments.
    """
    if _ambience():
        return None
    key: list[Any] = [dispatch.insisted(), *names]
    for value in values:
        kind = type(value)
        if kind in _PLAIN:
            if value.layout is not torch.strided or value.is_neg() or is_released(value):
                return None
            device = value.device
            key += (value.shape, value.stride(), value.dtype, device, value.requires_grad)
            key.append(autocasts(device))
        elif kind in _NUMBERS or isinstance(value, np.number):
            key += (kind, value)
        else:
            return None
    return tuple(key)


def loss(
    operation: type[Operation],
    native: Callable[..., Tensor] | None = None,
    analysis: Callable[[str, dict[str, Any]], Call | None] | None = None,
) -> Callable[[Callable[P, Tensor]], Callable[P, Tensor]]:
    """Decorator: a public function (its body is its docstring) that computes an operation.

    Its name and arguments are those of torch's function, which is looked up now, once.

    Args:
        operation: the class of its records.
        native: torch's function by a shorter way, for calls that need not be looked at.
        analysis: of a call's function and arguments, where that of an elementwise loss won't do.
    """
    kind: Any = operation
    analysis = analysis or functools.partial(analyse, kind)

    def decorate(documented: Callable[P, Tensor]) -> Callable[P, Tensor]:
        name = documented.__name__
        torchs: Callable[..., Tensor] = getattr(F, name)
        if "twin" not in vars(operation):  # a second function of the same operation is another one
            operation.twin = torchs
        signature = inspect.signature(documented)
        parameters = list(signature.parameters)
        fallback = torchs if native is None else native
        if not hasattr(operation, "crossover"):
            operation.crossover = usual_crossover(name)
        is_small, surely = quick_test(operation)
        cache = RouteCache()
        FUNCTIONS[name] = operation

        def analysed(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
            bound = signature.bind(*args, **kwargs)
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
            if is_compiling() or tracing_state() is not None:
                return torchs(*args, **kwargs)  # one node of the graph, compiled with the rest
            # `choose` would say the same, but asking takes a few microseconds of a small call's 15.
            if args and type(args[0]) is Tensor and (
                (args[0].numel() < surely or is_small(args[0]))
                and args[0].is_cpu
                and insisted() is None
            ):  # fmt: skip
                return fallback(*args, **kwargs)
            values = (*args, *kwargs.values())
            key = _key(kwargs, values)
            route = cache.find(key)
            if route is None:
                if (tracer := tracer_of(*values)) is not None:
                    node: Tensor = tracer.create_proxy("call_function", function, args, kwargs)
                    return node
                if key is None and insisted() is None and _is_foreign(values):
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
            return dispatch.describe(decision, "describe", call.options, call.tensors)

        function.decide = decide  # type: ignore[attr-defined]
        # torch.jit.script would compile the body, a docstring
        function.__prepare_scriptable__ = lambda: torchs  # type: ignore[attr-defined]
        function.__signature__ = signature  # type: ignore[attr-defined]
        return function

    return decorate


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
        options = [
            name for name in inspect.signature(cls.__bases__[-1]).parameters if name in known
        ]
        cls._function = staticmethod(function)
        cls._named = tuple(name for name in options if name not in ("size_average", "reduce"))

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        return {name: getattr(self, name) for name in self._named}

    def __prepare_scriptable__(self) -> Any:
        """For torch.jit.script, which can't call what isn't TorchScript: torch's own module."""
        kind: Any = type(self)
        if not kind.forward.__module__.startswith("fastopt.nn."):
            return self  # a subclass with a forward of its own
        torchs: Any = next(c for c in kind.__mro__ if c.__module__.startswith("torch.nn."))
        module = torchs.__new__(torchs)
        module.__dict__.update(self.__dict__)
        return module

"""The way of every loss: request, decision, launcher, autograd. Holds no maths."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple, ParamSpec

import numpy as np
import torch
from torch import Tensor
from torch.nn._reduction import get_enum
from torch.utils._device import DeviceContext

from .. import dispatch
from ..dispatch import Decision, Request
from ..errors import BackendUnavailable
from ..kernels import hyper
from ..kernels.layout import is_released, released_error
from ._fused import Expected, evaluate

# Names of their own, for what the smallest calls have to ask.
is_compiling, tracing_state = torch.compiler.is_compiling, torch._C._get_tracing_state
insisted = dispatch.insisted

P = ParamSpec("P")
Tensors = tuple[Tensor | None, ...]

_AUTOCAST = ("cpu", "cuda", "xpu")
#: torch's numbers for the reductions, as its own functions pass them on
REDUCTIONS = {name: get_enum(name) for name in ("none", "mean", "sum")}
_PLAIN = (Tensor, torch.nn.Parameter)
_NUMBERS = (str, int, float, bool, type(None))


class Call(NamedTuple):
    """One call of a loss, analysed but not yet run.

    Attributes:
        request: what the dispatcher has to know.
        options: the call without its tensors.
        tensors: None for one that wasn't given.
        classes: of a softmax, else 0.
    """

    request: Request
    options: hyper.Loss
    tensors: Tensors
    classes: int

    def kind(self) -> tuple[Any, ...]:
        """What calls have in common that their backward passes are expected to agree for.

        It has no sizes but the number of classes: another batch, or sequences of another
        length, is no other kind.
        """
        return self.options, self.request.dtypes, self.classes


def prepare(
    operation: str,
    record: hyper.MSE | hyper.L1 | hyper.CrossEntropy,
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
        operation: name of the function in torch.nn.functional.
        record: its hyperparameters.
        reduction: "none", "mean" or "sum".
        dtype: of the result, outside of autocast.
        tensors: its tensors, None for one that wasn't given; the first one is the input.
        special: what the operation itself knows to be beyond the compiled backends.
        row: of a softmax, its classes if they lie side by side.
        classes: of a softmax.
        label: which of the tensors has class indices, as its place.
    """
    input = tensors[0]
    assert input is not None
    given = [t for t in tensors if t is not None]
    _add_circumstances(given, special)
    if not (isinstance(reduction, str) and reduction in REDUCTIONS):
        special.append(f"reduction={reduction!r}")
    device = input.device
    dtypes = tuple([t.dtype for t in given])
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
        operation, device.type, dtypes, numel, tuple(special), capability,
        dispatch.insisted(), row, label,
    )  # fmt: skip
    return Call(request, hyper.Loss(record, reduction, dtype), tensors, classes)


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


class _Settled(NamedTuple):
    """A call's analysis, for all calls of the same metadata.

    Attributes:
        backend: the one to serve it, None for the reference.
        options: the call without its tensors.
        places: where the arguments have each of the call's tensors; None for one not given.
        expected: of their backward passes.
    """

    backend: Any
    options: hyper.Loss
    places: tuple[int | None, ...]
    expected: Expected

    def serve(self, values: tuple[Any, ...]) -> Tensor | None:
        if self.backend is None:
            return None
        tensors = tuple([None if k is None else values[k] for k in self.places])
        return evaluate(self.backend, self.options, self.expected, tensors)


class _Memory:
    """What has been settled about the calls of one function, by all that the outcome depends on."""

    LIMIT = 1024
    _all: ClassVar[list[_Memory]] = []

    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Settled] = {}
        self._expected: dict[tuple[Any, ...], Expected] = {}
        self._all.append(self)

    @classmethod
    def forget(cls) -> None:
        """Settle everything anew, under other rules."""
        dispatch.choose.cache_clear()
        for memory in cls._all:
            memory._known.clear()
            memory._expected.clear()

    def find(self, key: tuple[Any, ...] | None) -> _Settled | None:
        return None if key is None else self._known.get(key)

    def settle(self, key: tuple[Any, ...] | None, call: Call, values: tuple[Any, ...]) -> _Settled:
        """Decide about a call, and remember it.

        Raises:
            BackendUnavailable: the backend insisted on can't serve the call.
        """
        name = dispatch.choose(call.request).backend
        backend = None if name == "reference" else dispatch.load(name)
        places = [
            None if t is None else next(k for k, v in enumerate(values) if v is t)
            for t in call.tensors
        ]
        expected = Expected() if backend is None else self._expect(name, call)
        settled = _Settled(backend, call.options, tuple(places), expected)
        given = [k for k in places if k is not None]
        if key is not None and len(set(given)) == len(given):  # else places are not the arguments'
            if len(self._known) >= self.LIMIT:
                self._known.clear()
            self._known[key] = settled
        return settled

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


def loss_function(
    analyse: Callable[..., Call | None],
    torchs: Callable[..., Tensor],
    fallback: Callable[..., Tensor],
) -> Callable[[Callable[P, None]], Callable[P, Tensor]]:
    """Decorator: a public function (its body is only its docstring) from its analysis.

    Args:
        analyse: summarises a call from the public function's arguments; None for arguments
            of which torch has to say what is wrong with them.
        torchs: torch's own function, with the same arguments.
        fallback: the same outside of torch.compile, by the shortest way.
    """

    def decorate(documented: Callable[P, None]) -> Callable[P, Tensor]:
        analyse.__qualname__ = documented.__name__  # for Python's errors about arguments
        unseen = _unseen(analyse)
        is_small, surely = dispatch.is_small(documented.__name__)
        memory = _Memory()

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
            settled = memory.find(key)
            if settled is None:
                if (tracer := _tracer(*values)) is not None:
                    node: Tensor = tracer.create_proxy("call_function", function, args, kwargs)
                    return node
                if key is None and insisted() is None and _is_foreign(values):
                    return fallback(*args, **kwargs)
                call = unseen(*args, **kwargs)
                if call is None:
                    return fallback(*args, **kwargs)
                try:
                    settled = memory.settle(key, call, values)
                except BackendUnavailable:
                    fallback(*args, **kwargs)  # bad input gets torch's own error, first of all
                    raise
            loss = settled.serve(values)
            return fallback(*args, **kwargs) if loss is None else loss

        def decide(*args: P.args, **kwargs: P.kwargs) -> Decision:
            call = unseen(*args, **kwargs)
            if call is None:
                raise TypeError("there is nothing to explain: arguments must be tensors")
            decision = dispatch.choose(call.request)
            return dispatch.describe(decision, "describe", call.options, call.tensors)

        function.decide = decide  # type: ignore[attr-defined]
        # torch.jit.script would compile the body, a docstring
        function.__prepare_scriptable__ = lambda: torchs  # type: ignore[attr-defined]
        signature = inspect.signature(documented)
        function.__signature__ = signature.replace(return_annotation=Tensor)  # type: ignore[attr-defined]
        return function

    return decorate


def _unseen(analyse: Callable[..., Call | None]) -> Callable[..., Call | None]:
    """The analysis, of which no override of torch's functions gets to see what it asks tensors."""

    def analysis(*args: Any, **kwargs: Any) -> Call | None:
        with torch._C.DisableTorchFunction():
            return analyse(*args, **kwargs)

    return analysis


def _tracer(*arguments: object) -> Any:
    """What torch.fx traces a call with, if it does; such a call stays one of fastopt's."""
    return next((a.tracer for a in arguments if isinstance(a, torch.fx.Proxy)), None)


class LossModule:
    """Mixin in front of a torch loss class, of which a subclass overrides `forward` alone."""

    _function: ClassVar[Callable[..., Tensor]]

    def _options(self) -> dict[str, Any]:
        """The keyword arguments of the function."""
        raise NotImplementedError

    def __prepare_scriptable__(self) -> Any:
        """For torch.jit.script, which can't call what isn't TorchScript: torch's own module."""
        kind: Any = type(self)
        if not kind.forward.__module__.startswith(__package__):
            return self  # a subclass with a forward of its own
        torchs: Any = next(c for c in kind.__mro__ if c.__module__.startswith("torch.nn."))
        module = torchs.__new__(torchs)
        module.__dict__.update(self.__dict__)
        return module

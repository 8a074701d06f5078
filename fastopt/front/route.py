"""Routes: what has been settled about calls, for all later calls of the same metadata."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.autograd import forward_ad

from .. import dispatch
from ..kernels.layout import is_released
from ..kernels.operation import Options
from .analysis import Call, Evaluation
from .autograd import Expected, evaluate
from .circumstances import PLAIN, ambience_of, autocasts

__all__ = ["Route", "RouteCache", "key_of"]

_NUMBERS = (str, int, float, bool, type(None))
# Names of their own, for what is asked at each call.
autocast_somewhere, insisted = torch._C._is_any_autocast_enabled, dispatch.insisted
strided = torch.strided


class Route(NamedTuple):
    """A call's analysis, for all calls of the same metadata.

    Attributes:
        backend: the one to serve it, bound to such calls if it can be; None for the reference.
        options: the call without its tensors.
        places: where the arguments have each operand; None for one not given.
        expected: of their backward passes.
        warning: what torch warns of at such a call.
        followed: whether any of its tensors requires a gradient.
        evaluate: what computes it by the backend, see `Call`.
    """

    backend: Any
    options: Options
    places: tuple[int | None, ...]
    expected: Expected
    warning: str | None
    followed: bool
    evaluate: Evaluation

    def serve(self, values: tuple[Any, ...]) -> Tensor | None:
        if self.backend is None:
            return None
        if self.warning is not None:
            warnings.warn(self.warning, stacklevel=4)
        tensors = tuple([None if k is None else values[k] for k in self.places])
        record: Any = self.options.record
        if record.arranged:
            tensors = record.arrange(*tensors)
        return self.evaluate(self.backend, self.options, self.expected, tensors, self.followed)


class RouteCache:
    """What has been settled about the calls of one function, by all that the outcome depends on.

    Args:
        binds: whether such calls are losses, and a backend can be bound to a kind of them.
    """

    LIMIT = 1024
    #: So many calls of a kind are worth that what recognises them is compiled.
    OFTEN = 32
    _all: ClassVar[weakref.WeakSet[RouteCache]] = weakref.WeakSet()

    def __init__(self, binds: bool = True) -> None:
        self._binds = binds
        self._known: dict[tuple[Any, ...], Route] = {}
        #: By key: what recognises such calls, or how many there have been so far.
        self._recognitions: dict[tuple[Any, ...], Any] = {}
        #: The last call's recognition, how many arguments it had by name, on which backend was
        #: insisted, and its route.
        self.last: tuple[Any, int, str | None, Route] | None = None
        self._expected: dict[tuple[Any, ...], Expected] = {}
        self._all.add(self)

    @classmethod
    def forget(cls) -> None:
        """Settle everything anew, under other rules."""
        dispatch.choose.cache_clear()
        for cache in cls._all:
            cache._known.clear()
            cache._recognitions.clear()
            cache.last = None
            cache._expected.clear()

    def recognise(self, names: Any, values: tuple[Any, ...]) -> Route | None:
        """The last call's route, if this call is sure to be the same; arguments as of `key_of`.

        Of the questions behind a key, compiled code asks all that are about tensors.
        """
        last = self.last
        if last is None or autocast_somewhere() or forward_ad._current_level >= 0:
            return None
        recognition, count, backend, route = last
        same = len(names) == count and insisted() == backend and recognition.fits((*values, *names))
        return route if same else None

    def find(
        self, key: tuple[Any, ...] | None, names: Any, values: tuple[Any, ...]
    ) -> Route | None:
        """The route of a call whose `key_of` that is."""
        if key is None or (route := self._known.get(key)) is None:
            return None
        if hasattr(route.backend, "recognises") and not autocast_somewhere():
            recognition = self._recognitions.get(key, 0)
            if type(recognition) is int:
                self._recognitions[key] = recognition + 1
                if recognition + 1 < self.OFTEN or not route.backend.recognises():
                    return route
                recognition = route.backend.Recognition((*values, *names))
                self._recognitions[key] = recognition
            self.last = recognition, len(names), insisted(), route
        return route

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
        needs = tuple([t is not None and t.requires_grad for t in call.tensors])
        followed = any(needs)
        if self._binds and key is not None and followed and call.evaluate is evaluate:
            bind = getattr(backend, "bind", None)
            backend = (bind and bind(call.options, call.tensors, needs)) or backend
        route = Route(
            backend, call.options, places, expected, call.warning, followed, call.evaluate
        )
        if key is not None:
            if len(self._known) >= self.LIMIT:
                self._known.clear()
                self._recognitions.clear()
            self._known[key] = route
        return route

    def _expect(self, backend: str, call: Call) -> Expected:
        """What the backward passes of calls like this one have asked a backend for."""
        if len(self._expected) >= self.LIMIT:
            self._expected.clear()
        return self._expected.setdefault((backend, *call.kind()), Expected())


def key_of(names: Any, values: tuple[Any, ...]) -> tuple[Any, ...] | None:
    """All of a call that an analysis looks at; None where that may be more than this.

    Args:
        names: of those arguments that were given by name, the last ones.
        values: all arguments.
    """
    if ambience_of():
        return None
    autocast = autocast_somewhere()
    key: list[Any] = [insisted(), autocast, *names]
    for value in values:
        kind = type(value)
        if kind in PLAIN:
            if value.layout is not strided or value.is_neg():
                return None
            try:
                if is_released(value):
                    return None
            except RuntimeError:  # what a transform has left behind has no address
                return None
            key += (value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
            if autocast:
                key.append(autocasts(value.device))
        elif kind in _NUMBERS or isinstance(value, np.number):
            key += (kind, value)
        else:
            return None
    return tuple(key)

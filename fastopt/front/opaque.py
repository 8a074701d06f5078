"""Kernels for what torch has not, as operators of a graph of torch.compile."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch

from .. import __version__, dispatch
from .analysis import Call
from .circumstances import TRACED, traced

__all__ = ["GraphBackend", "define", "define_composed"]

_library: Any = torch.library.Library("fastopt", "FRAGMENT")  # type: ignore[no-untyped-call]


class GraphBackend:
    """A backend in a graph: a subclass has operators in place of the functions that it calls.

    Attributes:
        name: the backend's.
    """

    def __init__(self, name: str) -> None:
        self.name = name


def define(
    name: str, schema: str, function: Callable[..., Any], fake: Callable[..., Any]
) -> Callable[..., Any]:
    """An operator that runs kernels, and what a graph is to know of its results."""
    _library.define(f"{name}{schema}", tags=(torch.Tag.needs_exact_strides,))
    _library.impl(name, function, "CompositeExplicitAutograd")
    _library._register_fake(name, fake)
    operator: Callable[..., Any] = getattr(torch.ops.fastopt, name).default
    return operator


def define_composed(
    name: str, arguments: str, results: str, function: Callable[..., Any],
    analysis: Callable[..., Call], in_graph: Callable[..., Any],
) -> Callable[..., Any]:  # fmt: skip
    """What a public function is while torch.compile traces: an operator that torch takes apart.

    The call is analysed only then, with the tensors' metadata, as an eager one is.

    Args:
        name: of the public function.
        arguments, results: parts of the operator's schema.
        function: the public one.
        analysis: of a call, of the same arguments.
        in_graph: the call by operators of a backend, or by torch's operations: of the backend's
            name and the arguments.
    """

    def composed(*args: Any, backend: str | None, made_by: str) -> Any:
        with nullcontext() if backend is None else dispatch.use_backend(backend):
            if not any(isinstance(a, TRACED) for a in args):
                return function(*args)
            with traced():
                call = analysis(*args)
            return in_graph(dispatch.choose(call.request).backend, *args)

    _library.define(f"{name}({arguments}, *, str? backend, str made_by) -> {results}")
    _library.impl(name, composed, "CompositeImplicitAutograd")
    operator = getattr(torch.ops.fastopt, name).default

    def call(*args: Any) -> Any:
        # Torch keeps compiled graphs on disk: those of another fastopt are others.
        return operator(*args, backend=dispatch.insisted_while_tracing(), made_by=__version__)

    return call

"""What there is about the tensors of a call, and around it, that only torch itself can follow."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch._subclasses.functional_tensor import FunctionalTensor
from torch.autograd import forward_ad
from torch.utils._device import DeviceContext

from ..kernels.layout import is_released, released_error

__all__ = [
    "PLAIN", "TRACED", "add_circumstances", "ambience_of", "autocasts", "in_loss_parallel",
    "is_foreign", "is_traced", "traced",
]  # fmt: skip

_AUTOCAST = ("cpu", "cuda", "xpu")
PLAIN = (Tensor, torch.nn.Parameter)
#: What a graph is traced with.
TRACED = (FakeTensor, FunctionalTensor)

# Names of their own: a training step has emptied the caches, and each look-up waits for memory.
_functions, _dispatches = torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
_transforms, _tracing = torch._C._are_functorch_transforms_active, torch._C._is_tracing
_is_compiling = torch.compiler.is_compiling
_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


_is_traced: ContextVar[bool] = ContextVar("fastopt_traced", default=False)
is_traced = _is_traced.get


@contextmanager
def traced() -> Iterator[None]:
    """Here a call is analysed whose operator is traced: for that, nothing is foreign about it."""
    token = _is_traced.set(True)
    try:
        yield
    finally:
        _is_traced.reset(token)


def autocasts(device: torch.device) -> bool:
    """Whether autocast is on; asking torch about other devices (meta) raises."""
    return device.type in _AUTOCAST and torch.is_autocast_enabled(device.type)


def add_circumstances(tensors: list[Tensor], special: list[str]) -> None:
    """Note what only torch itself can follow, in the tensors and around the call."""
    device, around, in_graph = tensors[0].device, ambience_of(), is_traced()
    known = (*PLAIN, *TRACED) if in_graph else PLAIN
    for t in tensors:
        if type(t) not in known:
            special.append(f"a tensor of type {type(t).__name__}")
        elif t.layout is not torch.strided:
            special.append(f"layout={t.layout}")
        elif t.is_neg():
            special.append("a lazily negated tensor")
        elif t._is_zerotensor():
            special.append("a tensor of zeros without memory")
        elif in_graph:
            pass  # what a graph is traced with has no memory
        elif not around and _is_wrapped(t):
            special.append("a tensor that a torch.func transform has left behind")
        elif not around and is_released(t):  # under a transform tensors have no address
            raise released_error("a tensor", t)  # some of torch's own code would end the process
        if t.device != device:
            special.append("tensors on different devices")
    special += around


def ambience_of() -> list[str]:
    """What there is around a call that only torch itself can follow."""
    special = []
    if _functions() and _has_function_mode():
        special.append("a torch function override")
    if _transforms():
        special.append("a torch.func transform")
    if forward_ad._current_level >= 0:
        special.append("forward-mode differentiation")
    if is_traced():
        return special
    if _is_compiling():
        special.append("torch.compile")
    if _dispatches() or _tracing():
        special.append("tracing")
    return special


def _has_function_mode() -> bool:
    """Whether some mode wants to see torch's functions; torch.set_default_device is one, too."""
    return any(
        type(torch._C._get_function_stack_at(k)) is not DeviceContext
        for k in range(torch._C._len_torch_function_stack())
    )


def is_foreign(values: tuple[Any, ...], knows_shards: bool = False) -> bool:
    """Whether a call is torch's for what its tensors are, or for what is around it.

    Nothing need be asked of such tensors then: their sizes may be symbols, on which to decide
    would narrow a trace, or not be known yet.

    Args:
        knows_shards: whether the call's analysis takes classes in shards.
    """
    foreign = any(isinstance(v, Tensor) and type(v) not in PLAIN for v in values)
    return bool(ambience_of()) or (foreign and not (knows_shards and in_loss_parallel()))


def in_loss_parallel() -> bool:
    """Whether torch's cross-entropy of DTensors leaves classes in shards, by `loss_parallel`.

    That is told from what it does to DTensor; torch has no name for it.
    """
    tensor: Any = sys.modules.get("torch.distributed.tensor")
    if tensor is None:
        return False
    dispatcher = getattr(tensor.DTensor, "_op_dispatcher", None)
    return torch.ops.aten.nll_loss_forward.default in getattr(dispatcher, "_custom_op_handlers", ())

"""What there is around a step, or inside of one, that only torch's own code follows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.optim import Optimizer
from torch.utils._device import DeviceContext

__all__ = ["around", "circumstances", "torchs_parts"]


# Names of their own, for what every step has to ask.
_function_modes, _dispatch_modes = (
    torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
)  # fmt: skip
_transforms, _is_tracing = (
    torch._C._are_functorch_transforms_active, torch._C._is_tracing
)  # fmt: skip


class Parts(NamedTuple):
    """What torch's step of an optimizer is made of, as it was when fastopt was imported.

    Attributes:
        methods: what it calls of the optimizer, which a subclass may override.
        functions: what it calls of its module, which anyone may replace.
        module: the names of that module.
    """

    methods: tuple[tuple[str, Any], ...]
    functions: tuple[tuple[str, Any], ...]
    module: dict[str, Any]


@functools.cache
def torchs_parts(twin: type[Optimizer]) -> Parts:
    """The parts of the step of a class of torch's."""
    methods: dict[str, Any] = {}
    names = list(_names(twin.step))
    for name in names:  # grows: what is called by what is called
        method = getattr(twin, name, None)
        if callable(method) and name not in methods:
            methods[name] = _without_dynamo(method)
            names += _names(method)
    module = inspect.unwrap(twin.step).__globals__
    functions = {n: module[n] for n in _names(twin.step) if inspect.isfunction(module.get(n))}
    return Parts(tuple(methods.items()), tuple(functions.items()), module)


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code is not None else ()


def around() -> list[str]:
    """What there is around a call that only torch's own code follows, in words."""
    reasons = []
    if _function_modes() and _has_function_mode():
        reasons.append("a torch function mode")
    if _transforms():
        reasons.append("a torch.func transform")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation")
    if _dispatch_modes() or _is_tracing():
        reasons.append("tracing")
    return reasons


def circumstances(optimizer: Any) -> tuple[str, ...]:
    """Why torch's own step has to be taken, in words; most often nothing."""
    reasons = around()
    kind, parts, own = type(optimizer), torchs_parts(optimizer._twin), vars(optimizer)
    for name, method in parts.methods:
        found = getattr(kind, name, None)
        if name in own or (found is not method and _without_dynamo(found) is not method):
            reasons.append(f"a {name} of its own")
    for name, function in parts.functions:
        if parts.module.get(name) is not function:
            reasons.append(f"another {name} in {parts.module['__name__']} than torch's")
    return tuple(reasons)


def _without_dynamo(function: Any) -> Any:
    """A function without what the first torch.compile of a process wraps torch's own in."""
    while (inner := getattr(function, "_torchdynamo_orig_callable", None)) is not None:
        function = inner
    return function


def _has_function_mode() -> bool:
    """Whether a mode wants to see torch's functions; torch.set_default_device is none of them."""
    return any(
        type(torch._C._get_function_stack_at(k)) is not DeviceContext
        for k in range(_function_modes())
    )

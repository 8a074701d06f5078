"""What there is around a step, or inside of one, that only torch's own code follows."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from itertools import repeat
from typing import Any, NamedTuple

import torch
from torch.autograd import forward_ad
from torch.optim import Optimizer
from torch.utils._device import DeviceContext

__all__ = ["circumstances", "torchs_parts"]


# Names of their own, for what every step has to ask.
_function_modes, _dispatch_modes = (
    torch._C._len_torch_function_stack, torch._C._len_torch_dispatch_stack
)  # fmt: skip
_transforms, _tracing_state = (
    torch._C._are_functorch_transforms_active, torch._C._get_tracing_state
)  # fmt: skip


class Parts(NamedTuple):
    """What torch's step of an optimizer is made of, as it was when fastopt was imported.

    Attributes:
        methods: what it calls of the optimizer, which a subclass may override.
        functions: what it calls of its module, which anyone may replace.
        module: the names of that module.
    """

    methods: dict[str, Any]
    functions: dict[str, Any]
    module: dict[str, Any]


@functools.cache
def torchs_parts(operation: str) -> Parts:
    """The parts of an optimizer's step in torch."""
    twin: type[Optimizer] = getattr(torch.optim, operation)
    methods: dict[str, Any] = {}
    names = list(_names(twin.step))
    for name in names:  # grows: what is called by what is called
        method = getattr(twin, name, None)
        if callable(method) and name not in methods:
            methods[name] = _without_dynamo(method)
            names += _names(method)
    module = inspect.unwrap(twin.step).__globals__
    functions = {n: module[n] for n in _names(twin.step) if inspect.isfunction(module.get(n))}
    return Parts(methods, functions, module)


def _names(function: Callable[..., Any]) -> tuple[str, ...]:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return code.co_names if code is not None else ()


def circumstances(optimizer: Any) -> tuple[str, ...]:
    """Why torch's own step has to be taken, in words; most often nothing."""
    reasons = []
    if _function_modes() and _has_function_mode():
        reasons.append("a torch function mode")
    if _transforms():
        reasons.append("a torch.func transform")
    if forward_ad._current_level >= 0:
        reasons.append("forward-mode differentiation")
    if _dispatch_modes() or _tracing_state() is not None:
        reasons.append("tracing")
    operation = optimizer._operation
    methods, functions, module = torchs_parts(operation)
    own = vars(optimizer)
    reasons += [f"a {name} of its own" for name in own.keys() & methods.keys()]
    here = tuple(map(getattr, repeat(type(optimizer)), methods))
    reasons += [f"a {name} of its own" for name in _overridden(operation, here)]
    if list(map(module.get, functions)) != list(functions.values()):
        reasons += [
            f"another {name} in {module['__name__']} than torch's"
            for name, function in functions.items()
            if module.get(name) is not function
        ]
    return tuple(reasons)


@functools.lru_cache(maxsize=64)
def _overridden(operation: str, here: tuple[Any, ...]) -> tuple[str, ...]:
    """The names of those methods of a class that are not torch's."""
    theirs = torchs_parts(operation).methods.items()
    return tuple(
        name
        for (name, method), found in zip(theirs, here, strict=True)
        if found is not method and _without_dynamo(found) is not method
    )


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

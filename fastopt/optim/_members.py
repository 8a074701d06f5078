"""The parameters and buffers of a module, found without asking each module again."""

from __future__ import annotations

import weakref
from itertools import chain
from operator import attrgetter, methodcaller
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module

from ._bucket import picker
from ._proof import items_of

__all__ = ["Members", "is_walked_as_usual"]

_parts = attrgetter("_modules", "_parameters", "_buffers")
_values = methodcaller("values")
#: What torch calls of a module when it is asked for its parameters or buffers.
_CALLED = {
    name: getattr(Module, name)
    for name in (
        "parameters", "buffers", "named_parameters", "named_buffers", "named_modules",
        "_named_members",
    )
}  # fmt: skip


def is_walked_as_usual(module: Module) -> bool:
    """Whether a module has torch's own ways of finding what it has."""
    kind, own = type(module), vars(module)
    return all(getattr(kind, n) is f and n not in own for n, f in _CALLED.items())


class Members:
    """What `parameters()` and `buffers()` of a module give, at a tenth of their time.

    Those visit every module in Python, each time. Here the modules are remembered, by weak
    references, and looked up again only where the children of one of them aren't those that it
    had. What is in their dicts is taken from there each time.
    """

    def __init__(self) -> None:
        self._modules: list[weakref.ref[Module]] = []
        self._children = items_of([])
        self._parameters, self._buffers = _Distinct(), _Distinct()

    def find(self, root: Module) -> tuple[list[Tensor], list[Tensor]]:
        """The parameters and buffers that a module has now, in torch's order, each once."""
        if not is_walked_as_usual(root):
            return list(root.parameters()), list(root.buffers())
        modules: list[Any] = [module() for module in self._modules]
        if not modules or modules[0] is not root or None in modules:
            return self._walk(root)
        children, parameters, buffers = _contents(modules)
        if not self._children.are(children):
            return self._walk(root)
        return self._parameters.of(parameters), self._buffers.of(buffers)

    def _walk(self, root: Module) -> tuple[list[Tensor], list[Tensor]]:
        self._modules = []
        modules = list(root.modules())
        usual = not any(
            isinstance(module, torch.jit.ScriptModule)
            or type(module).named_modules is not _CALLED["named_modules"]
            or "named_modules" in vars(module)
            for module in modules
        )
        if not usual:
            return list(root.parameters()), list(root.buffers())
        children, parameters, buffers = _contents(modules)
        self._children = items_of(children)
        self._modules = list(map(weakref.ref, modules))
        return self._parameters.of(parameters), self._buffers.of(buffers)


def _contents(modules: list[Module]) -> list[list[Any]]:
    """All children, parameters and buffers in the dicts of some modules, None among them."""
    return [list(chain.from_iterable(map(_values, d))) for d in zip(*map(_parts, modules))]  # noqa: B905


class _Distinct:
    """Each object of a list once, and no None. Which places those are depends on ids alone."""

    def __init__(self) -> None:
        self._items, self._pick = items_of([]), picker([], 0)

    def of(self, things: list[Any]) -> list[Any]:
        if not self._items.are(things):
            first = {id(thing): place for place, thing in reversed(list(enumerate(things)))}
            first.pop(id(None), None)
            self._pick = picker(sorted(first.values()), len(things))
            self._items = items_of(things)
        return self._pick(things)

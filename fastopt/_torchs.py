"""What fastopt lacks is torch's own: names of its modules, and whole modules below them."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import find_spec
from types import ModuleType
from typing import Any

__all__ = ["install", "names"]


def names(
    torchs: ModuleType, ours: Mapping[str, Any]
) -> tuple[list[str], Callable[[str], Any], Callable[[], list[str]]]:
    """The `__all__`, `__getattr__` and `__dir__` of a module with the names of one of torch's.

    Args:
        torchs: torch's module. It is asked at each look-up, so that a patch of it counts.
        ours: what fastopt has, by name.
    """
    public: Iterable[str] | None = getattr(torchs, "__all__", None)
    if public is None:
        public = [name for name in vars(torchs) if not name.startswith("_")]

    def find(name: str) -> Any:
        if name in ours:
            return ours[name]
        try:
            return getattr(torchs, name)
        except AttributeError:
            message = f"module {_ours(torchs.__name__)!r} has no attribute {name!r}"
            raise AttributeError(message, name=name, obj=torchs) from None

    def listed() -> list[str]:
        return sorted({*ours, *dir(torchs)})

    return sorted({*ours, *public}), find, listed


def _ours(name: str) -> str:
    return name.replace("torch", "fastopt", 1)


def _torchs(name: str) -> str:
    return name.replace("fastopt", "torch", 1)


class _Finder(MetaPathFinder):
    """Finds torch's modules below fastopt's packages: those that torch hasn't loaded by itself.

    By the path of their package such modules would be loaded a second time, with classes of
    their own; so this has to come before the finder that goes by paths.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if not fullname.startswith(("fastopt.nn.", "fastopt.optim.")):
            return None
        package = fullname.rpartition(".")[0]
        if sys.modules[package].__name__ == package:  # fastopt's own, so its files come first
            own = PathFinder.find_spec(fullname, path)
            if own is not None and own.loader is not None:  # no folder of stubs for type checkers
                return own
        return ModuleSpec(fullname, _Alias()) if find_spec(_torchs(fullname)) else None


class _Alias(Loader):
    """Loads torch's module, and changes nothing about it."""

    def exec_module(self, module: ModuleType) -> None:
        # A module may put another one in its own place; that one keeps its name and its spec.
        sys.modules[module.__name__] = importlib.import_module(_torchs(module.__name__))
        _name_loaded()


def _name_loaded() -> None:
    """Give the modules that torch has loaded their second names.

    An import that finds no name yet ends by making the module an attribute of its package, and
    torch has functions in such places: torch.nn.utils.spectral_norm.
    """
    for name, module in list(sys.modules.items()):
        if name.startswith(("torch.nn.", "torch.optim.")):
            sys.modules.setdefault(_ours(name), module)


def install() -> None:
    """Have torch's modules found below fastopt's, `fastopt.nn.utils.rnn` and the like."""
    _name_loaded()
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())

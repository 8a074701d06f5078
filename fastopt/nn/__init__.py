"""The names of :mod:`torch.nn`: fastopt's losses, and of all else torch's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn as _torchs

from . import functional
from ._operations import MODULES

if TYPE_CHECKING:
    from torch.nn import *  # noqa: F403

__all__ = ["functional", *sorted(MODULES)]


def __getattr__(name: str) -> Any:
    found = MODULES.get(name)
    return getattr(_torchs, name) if found is None else found


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(_torchs)})

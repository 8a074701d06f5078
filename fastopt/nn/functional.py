"""The functions of :mod:`torch.nn.functional`: fastopt's losses, and of all else torch's own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.nn import functional as _torchs

from ._operations import FUNCTIONS

if TYPE_CHECKING:
    from torch.nn.functional import *  # noqa: F403

__all__ = sorted(FUNCTIONS)


def __getattr__(name: str) -> Any:
    found = FUNCTIONS.get(name)
    return getattr(_torchs, name) if found is None else found


def __dir__() -> list[str]:
    return sorted({*__all__, *dir(_torchs)})

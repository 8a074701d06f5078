"""The names of :mod:`torch.nn`: fastopt's losses, and of all else torch's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn as _torchs

from .._torchs import names as _names
from ._operations import MODULES

if TYPE_CHECKING:  # to type checkers all of it is torch's, typos included
    from torch.nn import *  # noqa: F403
else:
    from . import functional, utils

    __all__, __getattr__, __dir__ = _names(
        _torchs, {**MODULES, "functional": functional, "utils": utils}
    )

"""The names of :mod:`torch.optim`: fastopt's optimizers, and of all else torch's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import optim as _torchs

from .._torchs import names as _names
from ._operations import CLASSES

if TYPE_CHECKING:  # to type checkers all of it is torch's, typos included
    from torch.optim import *  # noqa: F403

    from .lion import Lion as Lion
else:
    from . import swa_utils

    __all__, __getattr__, __dir__ = _names(_torchs, {**CLASSES, "swa_utils": swa_utils})

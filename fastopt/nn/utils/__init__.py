"""The names of :mod:`torch.nn.utils`: fastopt's clipping, and of all else torch's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import utils as _torchs

from ..._torchs import names as _names

if TYPE_CHECKING:  # to type checkers all of it is torch's, typos included
    from torch.nn.utils import *  # noqa: F403
else:
    from . import clip_grad

    __all__, __getattr__, __dir__ = _names(_torchs, {**clip_grad.FUNCTIONS, "clip_grad": clip_grad})

"""The functions of :mod:`torch.nn.functional`: fastopt's losses, and of all else torch's own.

And what torch has no name for, which belongs to losses: :func:`distillation_loss`,
:func:`log_prob_and_entropy` and :func:`linear_log_prob_and_entropy`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch.nn import functional as _torchs

from .._torchs import names as _names
from ._distillation_loss import distillation_loss
from ._linear_log_prob_and_entropy import linear_log_prob_and_entropy
from ._log_prob_and_entropy import log_prob_and_entropy
from ._operations import FUNCTIONS

#: What torch has no name for.
BEYOND = {
    "distillation_loss": distillation_loss,
    "linear_log_prob_and_entropy": linear_log_prob_and_entropy,
    "log_prob_and_entropy": log_prob_and_entropy,
}

if TYPE_CHECKING:  # to type checkers all of it is torch's, typos included
    from torch.nn.functional import *  # noqa: F403
else:
    __all__, __getattr__, __dir__ = _names(_torchs, {**FUNCTIONS, **BEYOND})

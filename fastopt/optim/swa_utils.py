"""The names of :mod:`torch.optim.swa_utils`: a fast AveragedModel, and torch's own objects."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch.nn import Module
from torch.optim import swa_utils as _torchs

from .._torchs import names as _names
from ..dispatch import Decision
from ._averages import Averager

if TYPE_CHECKING:  # to type checkers all else is torch's
    from torch.optim.swa_utils import SWALR as SWALR
    from torch.optim.swa_utils import get_ema_avg_fn as get_ema_avg_fn
    from torch.optim.swa_utils import get_ema_multi_avg_fn as get_ema_multi_avg_fn
    from torch.optim.swa_utils import get_swa_avg_fn as get_swa_avg_fn
    from torch.optim.swa_utils import get_swa_multi_avg_fn as get_swa_multi_avg_fn
    from torch.optim.swa_utils import update_bn as update_bn


class AveragedModel(_torchs.AveragedModel):
    r"""A model whose parameters are averages of another one's (EMA, SWA), updated in one launch.

    The first ``update_parameters`` copies. Each further one, of parameters p of the model after n
    updates, by torch's functions:

    .. code-block:: text

        a ← a + (1 - decay) · (p - a)          get_ema_multi_avg_fn(decay)
        a ← decay · a + (1 - decay) · p        get_ema_avg_fn(decay)
        a ← a + (p - a) / (n + 1)              get_swa_multi_avg_fn(), get_swa_avg_fn(), none

    A bfloat16 average does not move by steps smaller than its last digits: it is to be float32
    (``average.module.float()`` right after the constructor), whatever the model is.

    Args:
        model: is copied; ``update_parameters`` is then given it, or a wrapper around it.
        device: where the averages are; those on another device than the model's are updated by
            torch's own code.
        avg_fn, multi_avg_fn: one of torch's functions above, from :mod:`torch.optim.swa_utils`
            or from here. With any other, torch's own code calls it.
        use_buffers: average the buffers as well (integers by torch's own code), else copy them.

    Averages and parameters may be float64, float32, bfloat16 or float16, of any dense layout; what
    is of other kinds is updated by torch's own code.

    Raises:
        AssertionError, ValueError: as torch does, for two functions, and in an update for another
            number of buffers.

    Example:
        >>> ema = fastopt.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        >>> average = fastopt.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema)
        >>> optimizer.step(); average.update_parameters(model)

    Reference: :class:`torch.optim.swa_utils.AveragedModel`; Izmailov et al.,
        https://arxiv.org/abs/1803.05407
    """

    _operation = "AveragedModel"

    def update_parameters(self, model: Module) -> None:
        """Average what the model's parameters are now into the averages.

        Inside ``torch.compile`` it is torch's own method that is compiled.

        Args:
            model: of as many parameters as the one averaged, in the same order.

        Raises:
            BackendUnavailable: inside ``use_backend``, that backend can't serve every average;
                nothing has been changed.
        """
        if torch.compiler.is_compiling():
            super().update_parameters(model)
            return
        if not self._averages().update(self, model):
            super().update_parameters(model)

    def _averages(self) -> Averager:
        averager: Averager | None = self.__dict__.get("_averager")
        if averager is None:
            averager = self.__dict__.setdefault("_averager", Averager())
        return averager

    def _decisions(self, model: Module) -> tuple[Decision, ...]:
        return self._averages().decisions(self, model)


if not TYPE_CHECKING:
    __all__, __getattr__, __dir__ = _names(_torchs, {"AveragedModel": AveragedModel})

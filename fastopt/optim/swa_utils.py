"""The names of :mod:`torch.optim.swa_utils`: a fast AveragedModel, and torch's own objects."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import Module
from torch.optim import Optimizer
from torch.optim import swa_utils as _torchs

from .._torchs import names as _names
from ..dispatch import Decision
from ._averages import Averager
from ._following import Follower
from ._planned import PlannedStep

if TYPE_CHECKING:  # to type checkers all else is torch's
    from torch.optim.swa_utils import SWALR as SWALR
    from torch.optim.swa_utils import get_ema_avg_fn as get_ema_avg_fn
    from torch.optim.swa_utils import get_ema_multi_avg_fn as get_ema_multi_avg_fn
    from torch.optim.swa_utils import get_swa_avg_fn as get_swa_avg_fn
    from torch.optim.swa_utils import get_swa_multi_avg_fn as get_swa_multi_avg_fn
    from torch.optim.swa_utils import update_bn as update_bn


_Tensors = tuple[Tensor, ...] | list[Tensor]


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
        optimizer: one of fastopt's. Its steps are then updates of the averages, too, and nobody
            is to call ``update_parameters`` after them. A launch that updates a parameter takes
            its average along, so that nothing is read twice. A step that a GradScaler skips, or
            that finds no gradient, is no update.

    Averages and parameters may be float64, float32, bfloat16 or float16, of any dense layout; what
    is of other kinds is updated by torch's own code.

    Raises:
        AssertionError, ValueError: as torch does, for two functions, and in an update for another
            number of buffers.
        TypeError: an optimizer of other classes than fastopt's.

    Example:
        >>> ema = fastopt.optim.swa_utils.get_ema_multi_avg_fn(0.999)
        >>> average = fastopt.optim.swa_utils.AveragedModel(model, multi_avg_fn=ema)
        >>> optimizer.step(); average.update_parameters(model)
        >>> average = fastopt.optim.swa_utils.AveragedModel(
        ...     model, multi_avg_fn=ema, optimizer=optimizer
        ... )
        >>> loss.backward(); optimizer.step()

    Reference: :class:`torch.optim.swa_utils.AveragedModel`; Izmailov et al.,
        https://arxiv.org/abs/1803.05407
    """

    _operation = "AveragedModel"

    def __init__(
        self,
        model: Module,
        device: int | torch.device | None = None,
        avg_fn: Callable[[Tensor, Tensor, Tensor | int], Tensor] | None = None,
        multi_avg_fn: Callable[[_Tensors, _Tensors, Tensor | int], None] | None = None,
        use_buffers: bool = False,
        *,
        optimizer: Optimizer | None = None,
    ) -> None:
        super().__init__(model, device, avg_fn, multi_avg_fn, use_buffers)
        if optimizer is not None:
            if not isinstance(optimizer, PlannedStep):
                raise TypeError(
                    f"optimizer of {type(optimizer)!r} (supported: those of fastopt.optim)"
                )
            optimizer._followers += (Follower(weakref.ref(self), model),)

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

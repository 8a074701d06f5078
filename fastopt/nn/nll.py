"""Negative log-likelihood of class indices, from log-probabilities."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor
from typing_extensions import deprecated

from ..front.analysis import Call, prepare
from ..front.call import REDUCTIONS, LossModule, loss
from ..front.circumstances import autocasts
from ..kernels.operation import Gather

__all__ = ["NLLLoss", "NLLLoss2d", "nll_loss"]


class NLL(Gather):
    """The options of a call.

    Attributes:
        ignore_index: class index whose positions count for nothing.
    """

    ignore_index: int = -100
    crossover = 8_388_608


def _analyse(function: str, arguments: dict[str, Any]) -> Call | None:
    input, target, weight = (arguments[name] for name in NLL.operands)
    ignore_index = arguments["ignore_index"]
    if not all(isinstance(t, Tensor) for t in (input, target) + (weight,) * (weight is not None)):
        return None
    special = [
        f"the deprecated {n}" for n in ("size_average", "reduce") if arguments[n] is not None
    ]
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        special.append(f"{ignore_index=}")
    shape = tuple(input.shape)
    classes = shape[min(1, len(shape) - 1)] if shape else 0
    if classes == 0:
        special.append(f"input of size {shape}")
    elif tuple(target.shape) != shape[:1] * (len(shape) > 1) + shape[2:]:
        special.append(f"sizes {shape} and {tuple(target.shape)}")
    elif target.dtype not in (torch.int64, torch.uint8):
        special.append(f"a target of dtype {target.dtype}")
    elif target.dtype == torch.uint8 and len(shape) > 2:
        special.append("uint8 targets of more than rows, which torch refuses")
    if not input.is_floating_point():
        special.append(f"an input of dtype {input.dtype}")
    if weight is not None:
        if tuple(weight.shape) != (classes,):
            special.append(f"a weight of size {tuple(weight.shape)}")
        elif weight.dtype != input.dtype and not autocasts(input.device):
            special.append(f"a weight of dtype {weight.dtype} for an input of {input.dtype}")
        if weight.requires_grad:
            special.append("a gradient to the weight, which torch has not")
    return prepare(
        function, NLL(ignore_index), tuple(REDUCTIONS), arguments["reduction"], input.dtype,
        (input, target, weight), special, label=1,
    )  # fmt: skip


@loss(NLL, analysis=_analyse)
def nll_loss(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
) -> Tensor:
    r"""Negative log-likelihood, :math:`-w_y x_y`, of log-probabilities x and a class index y.

    Args:
        input: log-probabilities, (C,), (N, C) or (N, C, d1, …), with any strides; float64,
            float32, bfloat16 or float16.
        target: class indices of input's shape without C, int64, or uint8 for (C,) and (N, C).
        weight: a weight w for each class, (C,), of input's dtype. That of an ignored class is
            never read.
        size_average, reduce: deprecated, as in torch.
        ignore_index: class index of positions that count for nothing.
        reduction: "none" gives a value per position, "sum" adds them up, "mean" divides that
            by the summed weight of the positions that count (NaN if there are none).

    Returns:
        A tensor of input's dtype (float32 under autocast).

    Raises:
        IndexError: a class index out of range; names it, its place and the classes. On a GPU
            it fails a device-side assert, as in torch.
        RuntimeError, ValueError, TypeError: as torch does, for shapes or dtypes that don't
            go together and unknown reductions.

    Example:
        >>> log_p = torch.log_softmax(model(images), dim=1)
        >>> loss = fastopt.nn.functional.nll_loss(log_p, labels)

    Reference: :func:`torch.nn.functional.nll_loss`. It differs in one case: (N, C, H, W) that is
    not contiguous has a gradient here, for which torch's own CPU code raises.
    """
    raise NotImplementedError


class NLLLoss(LossModule, torch.nn.NLLLoss, function=nll_loss):
    r"""Negative log-likelihood of log-probabilities as a module.

    Args:
        weight: a weight for each class, (C,).
        size_average, reduce: deprecated, as in torch.
        ignore_index: class index of positions that count for nothing.
        reduction: "none", "mean" (default) or "sum".

    Formula, shapes, dtypes and errors: see :func:`fastopt.nn.functional.nll_loss`.

    Example:
        >>> criterion = fastopt.nn.NLLLoss()
        >>> criterion(torch.log_softmax(model(images), dim=1), labels).backward()

    Reference: :class:`torch.nn.NLLLoss`
    """

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return nll_loss(input, target, **self._options())


with warnings.catch_warnings():
    # Torch's class is deprecated, and says so to whoever makes a subclass or an object of it.
    warnings.simplefilter("ignore")

    @deprecated(vars(torch.nn.NLLLoss2d)["__deprecated__"], category=FutureWarning)
    class NLLLoss2d(LossModule, torch.nn.NLLLoss2d, function=nll_loss):
        r"""Negative log-likelihood by its old name, deprecated in torch: use :class:`NLLLoss`.

        Args:
            args, kwargs: see :class:`fastopt.nn.NLLLoss`.

        Example:
            >>> criterion = fastopt.nn.NLLLoss2d()  # warns

        Reference: :class:`torch.nn.NLLLoss2d`
        """

        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return nll_loss(input, target, **self._options())

"""Cross-entropy of logits against class indices or class probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._C import _nn

from ..front.analysis import Call, prepare
from ..front.call import REDUCTIONS, loss
from ..front.circumstances import autocasts
from ..kernels.layout import ClassAxis, class_axis
from ..kernels.operation import Softmax
from ..kernels.reference import out_of_bounds
from . import _sharded_classes as sharded_classes
from ._softmax_options import SoftmaxModule, check, definition

__all__ = ["CrossEntropyLoss", "cross_entropy"]

# Bound now: a user may put fastopt's functions in the place of torch's.
_native = _nn.cross_entropy_loss


class CrossEntropy(Softmax):
    """The options of a call.

    Attributes:
        ignore_index: class index whose positions count for nothing.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        z_loss: what the square of a position's log-sum-exp is multiplied by.
        softcap: the bound of the logits' absolute values, None for none.
    """

    ignore_index: int = -100
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    softcap: float | None = None
    variants = ({}, {"label_smoothing": 0.1})
    crossover = 262_144
    compiled_crossover = 4_194_304
    # What is shorter than a vector torch computes number by number, a few vectors it does well.
    row_crossover = {
        2: ((31, 262_144), (128, 2_097_152)),
        4: ((15, 1_048_576), (79, 1_572_864), (256, 524_288)),
        8: ((31, 262_144),),
    }


def _analyse(function: str, arguments: dict[str, Any]) -> Call | None:
    input, target, weight = (arguments[name] for name in CrossEntropy.operands)
    size_average, reduce = arguments["size_average"], arguments["reduce"]
    if not all(isinstance(t, Tensor) for t in (input, target) + (weight,) * (weight is not None)):
        return None
    special = []
    if size_average is not None or reduce is not None:
        special.append("the deprecated size_average or reduce")
    options = options_of(arguments, special)
    axis = add_specials(special, input, target, weight, options[0], options[1], input.device)
    row = axis.classes if axis is not None and axis.class_stride == 1 else 0
    operands = input, target, weight
    dims = max(min(1, input.dim() - 1), 0), None, None
    record = CrossEntropy(*options)
    shares = sharded_classes.shares(operands, dims, target, record, special)
    call = prepare(
        function, record, tuple(REDUCTIONS), arguments["reduction"], input.dtype,
        shares or operands, special, row, 0 if axis is None else axis.classes,
        None if target.is_floating_point() else 1,
    )  # fmt: skip
    return sharded_classes.served(call, sharded_classes.of_logits) if shares else call


def options_of(arguments: dict[str, Any], special: list[str]) -> tuple[Any, ...]:
    """Those of a record, as numbers of Python's; what no kernel takes goes into `special`."""
    ignore_index, label_smoothing = arguments["ignore_index"], arguments["label_smoothing"]
    z_loss, softcap = arguments["z_loss"], arguments["softcap"]
    check(z_loss, softcap)
    if isinstance(label_smoothing, np.number):
        label_smoothing = label_smoothing.item()
    if isinstance(ignore_index, np.integer):
        ignore_index = ignore_index.item()
    if type(label_smoothing) not in (float, int) or not 0.0 <= label_smoothing <= 1.0:
        special.append(f"{label_smoothing=}")
    if type(ignore_index) is not int or not -(2**63) <= ignore_index < 2**63:
        special.append(f"{ignore_index=}")
    softcap = None if softcap is None else float(softcap)
    return ignore_index, label_smoothing, float(z_loss), softcap


def add_specials(
    special: list[str],
    input: Tensor,
    target: Tensor,
    weight: Tensor | None,
    ignore_index: Any,
    label_smoothing: Any,
    device: torch.device,
) -> ClassAxis | None:
    """Note what the kernels don't take of logits and their targets; how the logits' classes lie."""
    strided = input.layout is target.layout is torch.strided
    axis = class_axis(input) if input.dim() and strided else None
    if axis is None or axis.classes == 0:
        where = f"strides {input.stride()}" if strided else f"layout {input.layout}"
        special.append(f"input of size {tuple(input.shape)} and {where}")
    elif target.is_floating_point():
        special += _probability_specials(input, target, ignore_index)
    elif target.shape != input.shape[:1] * (input.dim() > 1) + input.shape[2:]:
        special.append(f"sizes {tuple(input.shape)} and {tuple(target.shape)}")
    if target.dtype == torch.uint8 and input.dim() > 2:
        special.append("uint8 targets of more than rows, which torch refuses")
    if weight is not None:
        if target.dtype == torch.uint8 and label_smoothing:
            special.append("uint8 targets with weights and label smoothing, which torch refuses")
        if axis is None or weight.shape != (axis.classes,):
            special.append(f"a weight of size {tuple(weight.shape)}")
        elif weight.dtype != input.dtype and not autocasts(device):
            special.append(f"a weight of dtype {weight.dtype} for an input of {input.dtype}")
        if weight.requires_grad:
            special.append("a gradient to the weight")
    return axis


def _probability_specials(input: Tensor, target: Tensor, ignore_index: int) -> list[str]:
    special = []
    if target.shape != input.shape:
        return [f"sizes {tuple(input.shape)} and {tuple(target.shape)}"]
    if target.dtype != input.dtype:
        special.append(f"probabilities of dtype {target.dtype} for an input of {input.dtype}")
    if ignore_index >= 0:
        special.append(f"{ignore_index=} with probabilities")
    return special


def _torch_cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    try:
        if z_loss != 0.0 or softcap is not None:
            return definition(
                input, target, weight, size_average, ignore_index, reduce, reduction,
                label_smoothing, z_loss=z_loss, softcap=softcap,
            )  # fmt: skip
        if (  # torch's Python has nothing to do for these
            type(input) is Tensor
            and type(target) is Tensor
            and (weight is None or type(weight) is Tensor)
            and size_average is None
            and reduce is None
            and type(reduction) is str
            and reduction in REDUCTIONS
            and not torch._C._len_torch_function_stack()
        ):
            number: Any = REDUCTIONS[reduction]
            return _native(input, target, weight, number, ignore_index, label_smoothing)
        return definition(
            input, target, weight, size_average, ignore_index, reduce, reduction, label_smoothing
        )
    except IndexError as error:
        if "out of bounds" not in str(error):
            raise
        classes = input.shape[min(1, input.dim() - 1)]
        raise out_of_bounds(target, classes, ignore_index) from None


_torch_cross_entropy.__qualname__ = "cross_entropy"  # for Python's errors about arguments


@loss(CrossEntropy, native=_torch_cross_entropy, analysis=_analyse, torchs=definition)
def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    size_average: bool | None = None,
    ignore_index: int = -100,
    reduce: bool | None = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    *,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Cross-entropy, :math:`-\log \mathrm{softmax}(x)_y`, of unnormalised logits.

    With class weights w and smoothing ε a position's loss is
    :math:`-\sum_c w_c\, t_c \log \mathrm{softmax}(x)_c`, where
    :math:`t_c = (1 - ε)\,[c = y] + ε / C` for a class index y, and
    :math:`(1 - ε)\, y_c + ε / C` for probabilities y.

    With a softcap s all of this is of :math:`s \tanh(x / s)` in place of x; and a z_loss λ adds
    :math:`λ \left(\log \sum_c e^{x_c}\right)^2` to the loss of each position that counts, of
    logits so capped. Both are part of the same kernel, which reads the logits no more often.

    Args:
        input: logits, (C,), (N, C) or (N, C, d1, …), with any strides; float64, float32,
            bfloat16 or float16. It is never written to. Inside of torch's ``loss_parallel`` a
            DTensor, whose shards are of classes; the loss is a replicated one then.
        target: class indices, int64 or uint8, of input's shape without C; or probabilities
            of input's shape and dtype.
        weight: a weight for each class, (C,), of input's dtype.
        size_average, reduce: deprecated, as in torch.
        ignore_index: class index of positions that count for nothing.
        reduction: "none" gives a value per position, "sum" adds them up, "mean" divides that
            by the summed weight of the positions that count (NaN if that is 0), and for
            probabilities by the number of positions.
        label_smoothing: ε, in [0, 1].
        z_loss: λ, a finite number >= 0. It knows no class weights; "mean" divides it as the rest.
        softcap: s, a finite number > 0; None leaves the logits as they are.

    Returns:
        A tensor of input's dtype (float32 under autocast).

    Raises:
        IndexError: a class index out of range; names it, its place and the classes. On a GPU
            it fails a device-side assert, as in torch.
        ValueError: a z_loss or a softcap out of its range; names it, and what is allowed.
        RuntimeError, ValueError, TypeError: as torch does, for shapes or dtypes that don't
            go together and unknown reductions.

    Example:
        >>> logits = model(tokens)                                   # (batch, length, vocab)
        >>> loss = fastopt.nn.functional.cross_entropy(logits.transpose(1, 2), next_tokens)

    Reference: :func:`torch.nn.functional.cross_entropy`, which has neither z_loss (PaLM, 2022,
    https://arxiv.org/abs/2204.02311) nor softcap (Gemma 2, 2024,
    https://arxiv.org/abs/2408.00118). It differs in two cases. Where the
    logits are changed in place between the forward and the backward pass, backward raises (on
    the CPU unless it is scaled as expected: not at all, or as the two before; and always for
    "none"), because the logits themselves are kept for it, not a copy of their softmax. And the
    gradient to an ignored position is 0 even where its logits are NaN or infinite, unless its
    classes are in shards.
    """
    raise NotImplementedError


class CrossEntropyLoss(SoftmaxModule, torch.nn.CrossEntropyLoss, function=cross_entropy):
    r"""Cross-entropy of logits as a module.

    Args:
        weight: a weight for each class, (C,).
        size_average, reduce: deprecated, as in torch.
        ignore_index: class index of positions that count for nothing.
        reduction: "none", "mean" (default) or "sum".
        label_smoothing: share of the target spread over all classes, in [0, 1].
        z_loss: what the square of the log-sum-exp is multiplied by and added, a number >= 0.
        softcap: the bound of the logits' absolute values, by a tanh; None for none.

    Formula, shapes, dtypes and errors: see :func:`fastopt.nn.functional.cross_entropy`.

    Example:
        >>> criterion = fastopt.nn.CrossEntropyLoss(label_smoothing=0.1)
        >>> criterion(model(images), labels).backward()

    Reference: :class:`torch.nn.CrossEntropyLoss`
    """

    def __init__(
        self,
        weight: Tensor | None = None,
        size_average: bool | None = None,
        ignore_index: int = -100,
        reduce: bool | None = None,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        *,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(weight, size_average, ignore_index, reduce, reduction, label_smoothing)
        self._set(z_loss, softcap)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(input, target, **self._options())

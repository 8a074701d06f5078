"""Cross-entropy of a linear layer's logits, which are never all in memory."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ..dispatch import Decision
from ..front.analysis import Call, expected_size, prepare
from ..front.call import REDUCTIONS, loss
from ..front.circumstances import autocasts
from ..kernels.operation import LinearSoftmax
from . import _sharded_classes as sharded_classes
from ._linear_cross_entropy_loss import Base
from ._softmax_options import SoftmaxModule, check, definition
from .cross_entropy import add_specials, options_of

__all__ = ["LinearCrossEntropyLoss", "linear_cross_entropy"]

# Bound now: a user may put fastopt's functions in the place of torch's.
_linear = F.linear
_torchs = getattr(F, "linear_cross_entropy", None)  # from torch 2.13 on


class LinearCrossEntropy(LinearSoftmax):
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
    crossover = 1_048_576  # logits
    compiled_crossover = 4_194_304
    arranged = True
    variants = ({}, {"label_smoothing": 0.1})

    @staticmethod
    def twin(
        input: Tensor,
        linear_weight: Tensor,
        target: Tensor,
        linear_bias: Tensor | None = None,
        weight: Tensor | None = None,
        **options: Any,
    ) -> Tensor:
        """The definition, in torch's operations, of arguments that go together."""
        each, places = input.shape[:-1], linear_weight.shape[1:-1]
        if input.dim() > 2:
            input, target = input.flatten(0, -2), target.flatten(0, len(each) - 1)
        bias = None if linear_bias is None else linear_bias.flatten()
        logits = _linear(input, linear_weight.flatten(0, -2), bias)
        logits = logits.reshape(*input.shape[:-1], len(linear_weight), *places)
        losses = definition(logits, target, weight, **options)
        return losses.reshape(each + places) if options["reduction"] == "none" else losses

    def arrange(self, *operands: Tensor | None) -> tuple[Tensor | None, ...]:
        """Under autocast the layer's operands in its dtype, as torch's layer has them."""
        input, linear_weight, target, linear_bias, weight = operands
        assert input is not None
        assert linear_weight is not None
        if not autocasts(input.device):
            return operands
        dtype = torch.get_autocast_dtype(input.device.type)
        bias = None if linear_bias is None else linear_bias.to(dtype)
        return input.to(dtype), linear_weight.to(dtype), target, bias, weight


def _check(
    input: Tensor, linear_weight: Tensor, target: Tensor, linear_bias: Tensor | None,
    ignore_index: int | None,
) -> None:  # fmt: skip
    """Raise torch's errors about sizes. (Inputs may have more dimensions than torch's.)"""
    if input.dim() < 1:
        raise RuntimeError(f"expected input with dimensionality 1 or 2, got {input.dim()}")
    if linear_weight.dim() < 2:
        raise RuntimeError(
            f"expected linear_weight with dimensionality at least 2, got {linear_weight.dim()}"
        )
    if input.shape[-1] != linear_weight.shape[-1]:
        raise RuntimeError(
            "expected equal input and linear_weight last dimensions (in_features), "
            f"got {input.shape[-1]} and {linear_weight.shape[-1]}, respectively"
        )
    shape, places = tuple(linear_weight.shape[:-1]), linear_weight.shape[1:-1]
    if linear_bias is not None and tuple(linear_bias.shape) != shape:
        raise RuntimeError(f"expected linear_bias shape {shape}, got {tuple(linear_bias.shape)}")
    if places and input.dim() != 2:
        raise RuntimeError(
            f"K-dimensional loss defined by linear_weight shape {tuple(linear_weight.shape)} "
            f"requires batched input, (N, {input.shape[-1]}), got "
            f"{'unbatched ' if input.dim() == 1 else ''}input with shape {tuple(input.shape)}"
        )
    if target.shape == (*input.shape[:-1], *shape) and ignore_index is not None:
        raise RuntimeError("ignore_index cannot be specified when target contains probabilities")
    if input.dim() > 2 and target.shape not in (input.shape[:-1], (*input.shape[:-1], *shape)):
        raise RuntimeError(
            f"expected input with dimensionality 1 or 2, got {input.dim()} and a target with shape "
            f"{tuple(target.shape)}, which is neither {tuple(input.shape[:-1])} of class indices "
            f"nor {(*input.shape[:-1], *shape)} of probabilities"
        )


def _plain(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    check(z_loss, softcap)
    further = z_loss != 0 or softcap is not None
    larger = isinstance(input, Tensor) and input.dim() > 2
    if _torchs is not None and not larger and not further:
        result: Tensor = _torchs(
            input, linear_weight, target, linear_bias=linear_bias, weight=weight,
            reduction=reduction, ignore_index=ignore_index, label_smoothing=label_smoothing,
            options=options,
        )  # fmt: skip
        return result
    if options is not None:
        raise TypeError(
            "options are for inputs of one or two dimensions, without z_loss and softcap, and of "
            "torch 2.13 or newer"
        )
    _check(input, linear_weight, target, linear_bias, ignore_index)
    return LinearCrossEntropy.twin(
        input, linear_weight, target, linear_bias, weight, reduction=reduction,
        ignore_index=-100 if ignore_index is None else ignore_index,
        label_smoothing=label_smoothing, z_loss=z_loss, softcap=softcap,
    )  # fmt: skip


_plain.__qualname__ = "linear_cross_entropy"  # for Python's errors about arguments


def _analyse(function: str, arguments: dict[str, Any]) -> Call | None:
    tensors = tuple(arguments[name] for name in LinearCrossEntropy.operands)
    input, linear_weight, target, linear_bias, weight = tensors
    given, index = [t for t in tensors if t is not None], arguments["ignore_index"]
    if not all(isinstance(t, Tensor) for t in (*tensors[:3], *given)):
        return None
    try:
        _check(input, linear_weight, target, linear_bias, index)
    except RuntimeError:
        return None
    special = []
    if arguments["options"] is not None:
        special.append("options, how torch's own code is to cut the work into pieces")
    if not input.shape[-1]:
        special.append("a layer of no features")
    device, soft = input.device, target.is_floating_point()
    dtypes = {t.dtype for t in (input, linear_weight, linear_bias) if t is not None}
    if autocasts(device):
        if soft:
            special.append("class probabilities under autocast")
    elif len(dtypes) > 1:
        special.append(f"a layer of dtypes {', '.join(sorted(map(str, dtypes)))}")
    rows, places = math.prod(input.shape[:-1]), linear_weight.shape[1:-1]
    classes = len(linear_weight)
    flat = target.flatten(0, input.dim() - 2) if input.dim() > 2 else target
    # The same rules as for logits, of the size and the layout that they would have.
    each = (rows,) * (input.dim() > 1)
    logits = torch.empty((*each, *linear_weight.shape[:-1]), dtype=input.dtype, device="meta")
    options = options_of(arguments | ({"ignore_index": -100} if index is None else {}), special)
    add_specials(special, logits, flat, weight, options[0], options[1], device)
    if soft and places:
        special.append("class probabilities in several places")
    dims = None, 0, None, 0, None
    record = LinearCrossEntropy(*options)
    shares = sharded_classes.shares(tensors, dims, target, record, special)
    if shares and not sharded_classes.is_dtensor(input):
        special.append("an input that is no DTensor")
    if shares and places:
        special.append("several places of classes in shards")
    if shares and autocasts(device):
        special.append("autocast of a layer in shards")
    call = prepare(
        function, record, tuple(REDUCTIONS), arguments["reduction"],
        input.dtype, shares or tensors, special, 0, classes, None if soft else 2,
    )  # fmt: skip
    layer: Any = call.tensors[1]  # or this process's part of it
    numel = expected_size(rows * math.prod(layer.shape[:-1]))
    call = call._replace(request=call.request._replace(numel=numel))
    return sharded_classes.served(call, sharded_classes.of_layer) if shares else call


@loss(LinearCrossEntropy, analysis=_analyse, torchs=_plain)
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int | None = None,
    label_smoothing: float = 0.0,
    options: Any = None,
    z_loss: float = 0.0,
    softcap: float | None = None,
) -> Tensor:
    r"""Cross-entropy of the logits that a linear layer makes of its input.

    ``cross_entropy(linear(input, linear_weight, linear_bias), target, …)``, but the logits are
    never all in memory: some rows at a time, about 32 MB of them (256 MB on a GPU), they are
    computed, and their loss and gradient, which takes their place. With `reduction` "mean" or
    "sum" all gradients are made in the forward pass. On the CPU rows whose position is ignored
    are left out of the matrix products.

    Args:
        input: samples, (in_features,), (N, in_features), or more dimensions before the features,
            which torch's function refuses; float64, float32, bfloat16 or float16.
        linear_weight: (C, in_features), or (C, d1, …, in_features) for (N, in_features). Inside
            of torch's ``loss_parallel`` a DTensor, whose shards are of classes, as linear_bias is
            then; input and the loss are replicated ones.
        target: class indices, int64 or uint8, of input's shape without in_features, then d1, …;
            or class probabilities of the logits' shape, (C,), (N, C) or (N, C, d1, …), and of
            more dimensions with C as the last one.
        linear_bias: (C,) or (C, d1, …).
        weight: a weight for each class, (C,), of input's dtype.
        reduction: "none", "mean" (default) or "sum", as for
            :func:`fastopt.nn.functional.cross_entropy`.
        ignore_index: class index of positions that count for nothing; None means -100.
        label_smoothing: share of the target spread evenly over all classes, in [0, 1].
        options: a ``torch.nn.LinearCrossEntropyOptions``: torch's own code, by these pieces.
        z_loss, softcap: as for :func:`fastopt.nn.functional.cross_entropy`; not with `options`.

    Returns:
        A tensor of input's dtype (float32 under autocast).

    Raises:
        IndexError: a class index out of range; names it, its place and the classes, before any
            gradient is computed. On a GPU it fails a device-side assert.
        ValueError: a z_loss or a softcap out of its range; names it, and what is allowed.
        RuntimeError, ValueError, TypeError: as torch does, for shapes or dtypes that don't go
            together and unknown reductions.

    Example:
        >>> loss = fastopt.nn.functional.linear_cross_entropy(hidden, head.weight, tokens)

    Reference: :func:`torch.nn.functional.linear_cross_entropy`, of torch 2.13 and newer,
    which has neither z_loss nor softcap. It differs in its order of summation; the weight's
    gradient is summed in float32 and rounded once; several backward passes through one graph are
    served, each after the first by computing anew; and of positions that are all ignored the
    gradients are 0.
    """
    raise NotImplementedError


class LinearCrossEntropyLoss(SoftmaxModule, Base, function=linear_cross_entropy):  # type: ignore[misc]
    r"""A linear layer and the cross-entropy of its logits, as a module.

    Args:
        in_features: size of each input sample.
        num_classes: number of classes C.
        out_features: (d1, …) of a loss in several places for each sample.
        bias: whether the layer has a bias.
        device, dtype: of the layer.
        reduction: "none", "mean" (default) or "sum".
        weight: a weight for each class, (C,).
        ignore_index: class index of positions that count for nothing; None means -100.
        label_smoothing: share of the target spread over all classes, in [0, 1].
        options: a ``torch.nn.LinearCrossEntropyOptions``: torch's own code, by these pieces.
        z_loss: what the square of the log-sum-exp is multiplied by and added, a number >= 0.
        softcap: the bound of the logits' absolute values, by a tanh; None for none.

    Formula, shapes, dtypes and errors: see :func:`fastopt.nn.functional.linear_cross_entropy`.
    The layer is `linear`, whose weight has the size (C · d1 · …, in_features). Torch before 2.13
    has no such class; there this one is a module by itself.

    Example:
        >>> criterion = fastopt.nn.LinearCrossEntropyLoss(256, 50_000)
        >>> criterion(hidden, tokens).backward()

    Reference: :class:`torch.nn.LinearCrossEntropyLoss`
    """

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        *,
        out_features: tuple[int, ...] = (),
        bias: bool = False,
        device: Any = None,
        dtype: Any = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
        ignore_index: int | None = None,
        label_smoothing: float = 0.0,
        options: Any = None,
        z_loss: float = 0.0,
        softcap: float | None = None,
    ) -> None:
        super().__init__(
            in_features, num_classes, out_features=out_features, bias=bias, device=device,
            dtype=dtype, reduction=reduction, weight=weight, ignore_index=ignore_index,
            label_smoothing=label_smoothing, options=options,
        )  # fmt: skip
        self._set(z_loss, softcap)

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return linear_cross_entropy(input, *self._layer(), target, **self._further())

    def decide(self, input: Tensor, target: Tensor) -> Decision:
        """The decision about a call."""
        decide: Any = linear_cross_entropy.decide  # type: ignore[attr-defined]
        decision: Decision = decide(input, *self._layer(), target, **self._further())
        return decision

    def _layer(self) -> tuple[Tensor]:
        shape = (self.num_classes, *self.out_features, self.linear.in_features)
        return (self.linear.weight.reshape(shape),)

    def _further(self) -> dict[str, Any]:
        bias = self.linear.bias
        if bias is not None:
            bias = bias.reshape((self.num_classes, *self.out_features))
        return {"linear_bias": bias, **self._options()}

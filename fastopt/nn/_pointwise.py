"""What the elementwise losses of two tensors share."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels import hyper, reference
from ..kernels.layout import same_layout
from ._loss import REDUCTIONS, Call, prepare


def analyser(
    operation: str, record: hyper.MSE | hyper.L1
) -> Callable[[Tensor, Tensor, bool | None, bool | None, str, Tensor | None], Call | None]:
    """The analysis of a loss without options of its own, in torch's order of arguments."""

    def analyse(
        input: Tensor,
        target: Tensor,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
    ) -> Call | None:
        deprecated = size_average is not None or reduce is not None
        return summarise(operation, record, input, target, reduction, weight, deprecated)

    return analyse


def direct(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Torch's function of (input, target), by its shortest way.

    Of plain tensors of one shape it is torch's own code in C++: what its Python does before is
    to prepare for others, and takes a quarter of a small loss's time.
    """
    native = reference.NATIVE[function]

    def call(
        input: Tensor,
        target: Tensor,
        size_average: bool | None = None,
        reduce: bool | None = None,
        reduction: str = "mean",
        weight: Tensor | None = None,
    ) -> Tensor:
        if (
            type(input) is Tensor
            and type(target) is Tensor
            and size_average is None
            and reduce is None
            and weight is None
            and type(reduction) is str
            and reduction in REDUCTIONS
            and input.shape == target.shape
            and not torch._C._len_torch_function_stack()
        ):
            return native(input, target, REDUCTIONS[reduction])
        return function(
            input, target, size_average=size_average, reduce=reduce, reduction=reduction,
            **({} if weight is None else {"weight": weight}),
        )  # fmt: skip

    call.__qualname__ = function.__name__  # for Python's errors about arguments
    return call


def summarise(
    operation: str,
    record: hyper.MSE | hyper.L1,
    input: Any,
    target: Any,
    reduction: str,
    weight: Any = None,
    deprecated: bool = False,
) -> Call | None:
    """Summarise a call of (input, target); None for arguments that are no tensors."""
    if not isinstance(input, Tensor) or not isinstance(target, Tensor):
        return None
    special = []
    if deprecated:
        special.append("the deprecated size_average or reduce")
    if weight is not None:
        special.append("an elementwise weight")
    if input.shape != target.shape:
        special.append(f"sizes {tuple(input.shape)} and {tuple(target.shape)} to broadcast")
    elif input.layout is target.layout is torch.strided and not same_layout(input, target):
        special.append(f"strides {input.stride()} and {target.stride()}")
    dtype = input.dtype
    if target.dtype != dtype:
        dtype = torch.promote_types(dtype, target.dtype)
    return prepare(operation, record, reduction, dtype, (input, target), special)

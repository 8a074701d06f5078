"""What is measured: one row a loss or optimizer at one size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossRow:
    """A loss, forward and backward, on tensors made by `make`."""

    name: str
    operation: str
    make: Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class OptimizerRow:
    """A step of an optimizer over tensors of these shapes, in this many groups."""

    name: str
    operation: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    groups: int = 1


def _labelled(
    *shape: int, dtype: torch.dtype = torch.float32, last: bool = False
) -> Callable[[], tuple[Tensor, ...]]:
    def make() -> tuple[Tensor, ...]:
        logits = torch.randn(shape).to(dtype)
        if last:
            logits = logits.movedim(-1, 1)
        positions = (logits.shape[0], *logits.shape[2:])
        return logits, torch.randint(0, logits.shape[1], positions)

    return make


def _pair(count: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(count), torch.randn(count))


def _cross_entropy(name: str, make: Callable[[], tuple[Tensor, ...]]) -> LossRow:
    return LossRow(f"cross_entropy {name}", "cross_entropy", make)


LOSSES = [
    _cross_entropy("8 x 10", _labelled(8, 10)),
    _cross_entropy("128 x 1000", _labelled(128, 1000)),
    _cross_entropy("512 x 32000", _labelled(512, 32_000)),
    _cross_entropy("512 x 32000 bfloat16", _labelled(512, 32_000, dtype=torch.bfloat16)),
    _cross_entropy("512 x 32000 float16", _labelled(512, 32_000, dtype=torch.float16)),
    _cross_entropy("512 x 32000 float64", _labelled(512, 32_000, dtype=torch.float64)),
    _cross_entropy("256 x 128000", _labelled(256, 128_000)),
    _cross_entropy("(8, 64, 32000) transposed", _labelled(8, 64, 32_000, last=True)),
    _cross_entropy("1048576 x 10", _labelled(1 << 20, 10)),
    _cross_entropy("segmentation (4, 21, 256, 256)", _labelled(4, 21, 256, 256)),
    *[
        LossRow(f"{operation} {count}", operation, _pair(count))
        for operation in ("mse_loss", "l1_loss")
        for count in (1, 1000, 1 << 20, 1 << 24)
    ],
]

_MOMENTUM = {"lr": 0.01, "momentum": 0.9}
_SMALL = ((16,),) * 300
_LARGE = ((1 << 24,),)
OPTIMIZERS = [
    *[
        OptimizerRow(f"{operation} {size}", operation, shapes, options)
        for operation, options in (
            ("SGD", _MOMENTUM),
            ("Adam", {}),
            ("AdamW", {}),
            ("RMSprop", {}),
        )
        for size, shapes in (("300 tensors of 16", _SMALL), ("16777216", _LARGE))
    ],
    OptimizerRow("Adam 100 groups of one", "Adam", ((16,),) * 100, groups=100),
    OptimizerRow("Adam 1 tensor of 1", "Adam", ((1,),)),
]

"""What is measured on a GPU: one row a loss or optimizer at one size."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

import torch

BF16, F32 = torch.bfloat16, torch.float32
NAMES = {BF16: "bfloat16", F32: "float32"}


@dataclass(frozen=True)
class Loss:
    """A loss on logits (or inputs) of a shape as it lies in memory.

    Attributes:
        moved: bytes that have to be moved, in sizes of the input.
        backward: whether the backward pass is part of it.
        factor: what the loss is multiplied by, and with it grad_output.
        last: classes lie last in memory, but are axis 1.
        compiled: whether torch.compile competes (its compilation takes its time).
    """

    operation: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    moved: int
    backward: bool = True
    factor: float = 1.0
    last: bool = False
    compiled: bool = False
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        words = [self.operation, " x ".join(map(str, self.shape)), NAMES[self.dtype]]
        words += ["transposed"] * self.last + [f"{k} {v}" for k, v in self.options.items()]
        words += ["forward"] * (not self.backward) + [f"* {self.factor}"] * (self.factor != 1)
        return " ".join(words)

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Update:
    """A step of an optimizer over tensors of these shapes, in this many groups.

    Attributes:
        moved: bytes that have to be moved, in sizes of the parameters.
    """

    size: str
    operation: str
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype
    moved: int
    options: dict[str, Any] = field(default_factory=dict)
    groups: int = 1

    @property
    def name(self) -> str:
        return f"{self.operation} {self.size} {NAMES[self.dtype]}"

    @property
    def elements(self) -> int:
        return sum(map(math.prod, self.shapes))


# The gradient for a grad_output of 1 needs one reading and one writing of the logits (two
# readings of a pointwise loss's tensors), for any other another reading.
def _cross_entropy(*shape: int, dtype: torch.dtype = BF16, moved: int = 2, **more: Any) -> Loss:
    return Loss("cross_entropy", shape, dtype, moved, **more)


_SMOOTH = {"label_smoothing": 0.1}
LOSSES = [
    _cross_entropy(8192, 128_256, moved=1, backward=False, compiled=True),
    _cross_entropy(8192, 128_256, compiled=True),
    _cross_entropy(8192, 128_256, moved=3, factor=0.5),
    _cross_entropy(8192, 32_000, compiled=True),
    _cross_entropy(8192, 32_000, dtype=F32),
    _cross_entropy(8192, 32_000, options=_SMOOTH),
    _cross_entropy(4096, 1000, compiled=True),
    _cross_entropy(1 << 20, 10, dtype=F32, compiled=True),
    _cross_entropy(8, 21, 512, 512, dtype=F32, compiled=True),
    _cross_entropy(8, 1024, 32_000, last=True),
    _cross_entropy(8, 128_256),
    Loss("mse_loss", (64 << 20,), F32, 3, compiled=True),
    Loss("mse_loss", (64 << 20,), BF16, 3),
    Loss("l1_loss", (64 << 20,), F32, 3),
    Loss("smooth_l1_loss", (64 << 20,), F32, 3),
    Loss("binary_cross_entropy_with_logits", (64 << 20,), F32, 3),
    # Sizes between which the crossovers of fastopt.front.crossover are, which are derived.
    Loss("mse_loss", (1 << 20,), F32, 3),
    Loss("mse_loss", (8 << 20,), F32, 3),
    _cross_entropy(1024, 32_000, dtype=F32),
    _cross_entropy(8, 10, dtype=F32),
    _cross_entropy(128, 1000, dtype=F32),
    Loss("mse_loss", (1000,), F32, 3),
]

_BLOCK = (
    (768,), (768,), (768, 2304), (2304,), (768, 768), (768,),
    (768,), (768,), (768, 3072), (3072,), (3072, 768), (768,),
)  # fmt: skip
_GPT2 = ((50_257, 768), (1024, 768), *_BLOCK * 12, (768,), (768,))
_BIG = ((4096, 4096),) * 10
_LR = {"lr": 0.05}  # large enough to show in bfloat16
_MOMENTUM = {"lr": 0.05, "momentum": 0.9}
_THREE = (("Adam", 7, _LR), ("AdamW", 7, _LR), ("SGD", 5, _MOMENTUM))
_FURTHER = (
    ("RMSprop", 5),
    ("Adagrad", 5),
    ("NAdam", 7),
    ("RAdam", 7),
    ("Adadelta", 7),
    ("Rprop", 7),
)
UPDATES = [
    *[
        Update("168M", operation, _BIG, dtype, moved, options)
        for dtype in (F32, BF16)
        for operation, moved, options in _THREE
    ],
    *[Update("168M", operation, _BIG, F32, moved, _LR) for operation, moved in _FURTHER],
    Update("GPT-2", "AdamW", _GPT2, F32, 7, _LR),
    Update("300 tensors of 16", "Adam", ((16,),) * 300, F32, 7, _LR),
    Update("100 groups of 16", "Adam", ((16,),) * 100, F32, 7, _LR, groups=100),
    Update("8M in 100 tensors", "Adam", ((83_886,),) * 100, F32, 7, _LR),
]  # fmt: skip
SMALL = 1 << 20  # elements below which the host's time is what counts


def miniature(case: Loss | Update) -> Loss | Update:
    """The same, small enough for an interpreter."""
    if isinstance(case, Update):
        shapes = tuple(tuple(min(n, 5) for n in shape) for shape in case.shapes[:4])
        changes: dict[str, Any] = {"shapes": shapes, "groups": min(case.groups, 2)}
    else:
        changes = {"shape": tuple(min(n, 7) for n in case.shape), "compiled": False}
    return dataclasses.replace(case, **changes)

"""What is measured: one row a loss, optimizer or average at one size."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

import fastopt.nn.functional  # noqa: F401  (whose operations are then in RECORDS)
from fastopt.front.call import RECORDS
from fastopt.front.samples import operands, usual
from fastopt.kernels.operation import Elementwise, Gather, Rowwise
from fastopt.optim._operations import OPTIMIZERS as KINDS

Make = Callable[[], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LossRow:
    """A loss, forward and backward, on tensors made by `make`.

    Attributes:
        name: of the case, unique.
        operation: the function's name.
        make: its tensors, the first one the input.
        size: elements of the input.
        floor: bytes that have to be moved: each tensor read once, each gradient written once.
        quick: whether the quick profile has it.
        options: further arguments.
    """

    name: str
    operation: str
    make: Make
    size: int
    floor: int
    quick: bool = False
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class OptimizerRow:
    """A step of an optimizer over tensors of these shapes, in this many groups.

    Attributes:
        clip: the norm that gradients are scaled down to in the step, or before it.
        touched: how many rows a gradient has, if it is sparse.
    """

    name: str
    operation: str
    shapes: tuple[tuple[int, ...], ...]
    options: dict[str, Any] = field(default_factory=dict)
    groups: int = 1
    dtype: torch.dtype = torch.float32
    quick: bool = False
    clip: float | None = None
    touched: int = 0

    @property
    def size(self) -> int:
        if self.touched:
            return sum(self.touched * math.prod(shape[1:]) for shape in self.shapes)
        return sum(map(math.prod, self.shapes))

    @property
    def floor(self) -> int:
        """Bytes: parameter and states read and written once, the gradient read once, or twice.

        Of a sparse gradient's rows only.
        """
        kind: Any = KINDS[self.operation]
        param = Parameter(torch.empty(2, 2))
        param.grad = torch.empty(2, 2)
        optimizer = kind([param], **self.options)
        (group,) = optimizer.param_groups
        begun = [optimizer._begin(n, param, group) for n in optimizer._active_of(group, param)]
        states = sum(state.numel() == param.numel() for state in begun)  # no rows and columns
        reads = 1 if self.clip is None else 2
        return self.size * self.dtype.itemsize * (2 + reads + 2 * states)


@dataclass(frozen=True)
class ClipRow:
    """clip_grad_norm_ of gradients of these shapes.

    Attributes:
        scales: whether each call has something to scale. A negative limit sees to that: it turns
            the signs, and leaves a norm of 1.
    """

    name: str
    shapes: tuple[tuple[int, ...], ...]
    scales: bool
    quick: bool = False
    operation: str = "clip_grad_norm_"

    @property
    def size(self) -> int:
        return sum(map(math.prod, self.shapes))

    @property
    def floor(self) -> int:
        """Bytes: gradients read once, and to be scaled read again and written."""
        return self.size * 4 * (3 if self.scales else 1)


@dataclass(frozen=True)
class AverageRow:
    """An exponential average of a model of so many layers, each a weight and a bias this wide.

    Attributes:
        optimizer: of that class is a step before the update; fastopt's takes it along.
    """

    name: str
    layers: int
    width: int
    quick: bool = False
    optimizer: str | None = None
    operation: str = "AveragedModel"

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return ((self.width,),) * (2 * self.layers)

    @property
    def size(self) -> int:
        return 2 * self.layers * self.width

    @property
    def floor(self) -> int:
        """Bytes: average and parameter read, the average written; or what AdamW moves, and it."""
        return (3 if self.optimizer is None else 7 + 2) * 4 * self.size


Row = LossRow | OptimizerRow | ClipRow | AverageRow


def _labelled(*shape: int, dtype: torch.dtype, last: bool) -> Make:
    def make() -> tuple[Tensor, ...]:
        logits = torch.randn(shape).to(dtype)
        if last:
            logits = logits.movedim(-1, 1)
        positions = (logits.shape[0], *logits.shape[2:])
        return logits, torch.randint(0, logits.shape[1], positions)

    return make


def _pair(count: int, dtype: torch.dtype) -> Make:
    return lambda: (torch.randn(count).to(dtype), torch.randn(count).to(dtype))


F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


def _classes(
    *shape: int, dtype: torch.dtype = F32, last: bool = False, quick: bool = False
) -> LossRow:
    words = "x".join(map(str, shape)) + (" transposed" if last else "")
    size = math.prod(shape)
    return LossRow(
        f"cross_entropy {words}{_suffix(dtype)}", "cross_entropy",
        _labelled(*shape, dtype=dtype, last=last), size, 2 * size * dtype.itemsize, quick,
    )  # fmt: skip


def _elements(operation: str, count: int, dtype: torch.dtype = F32, quick: bool = False) -> LossRow:
    return LossRow(
        f"{operation} {count}{_suffix(dtype)}", operation, _pair(count, dtype), count,
        3 * count * dtype.itemsize, quick,
    )  # fmt: skip


def _suffix(dtype: torch.dtype) -> str:
    return "" if dtype == F32 else f" {str(dtype).removeprefix('torch.')}"


def _composed(operation: str, count: int, **options: Any) -> LossRow:
    """A loss of any number of operands, all of one size; pos_weight is one number a column."""
    record: Any = RECORDS[operation]
    shape = (count // 16, 16) if options.pop("pos_weight", False) else (count,)
    words = " pos_weight" if len(shape) > 1 else ""

    def make() -> tuple[Tensor, ...]:
        return tuple(operands(record, shape, F32).values())

    given = {"pos_weight": torch.full((16,), 2.0)} if words else {}
    reads = len(operands(record, (1,), F32))
    return LossRow(
        f"{operation}{words} {count}", operation, make, count, (reads + 1) * 4 * count,
        count == 1 << 24, {**options, **given},
    )  # fmt: skip


def _vectors(operation: str, count: int) -> LossRow:
    """A loss of rows of 128 numbers, and of a label or a sign a row."""

    def make() -> tuple[Tensor, ...]:
        first = next(usual(RECORDS[operation], count, F32))
        return tuple(t.detach() for t in first.values())

    reads = sum(t.ndim == 2 for t in next(usual(RECORDS[operation], 128, F32)).values())
    return LossRow(
        f"{operation} {count}", operation, make, count, (reads + 1) * 4 * count, count == 1 << 24
    )


_COMPOSED = [
    *[
        (name, {"reduction": "batchmean"} if name == "kl_div" else {})
        for name, record in RECORDS.items()
        if issubclass(record, Elementwise) and name not in ("mse_loss", "l1_loss")
    ],
    ("binary_cross_entropy_with_logits", {"pos_weight": True}),
]

LOSSES = [
    *[
        _composed(name, count, **options)
        for name, options in _COMPOSED
        for count in (10_000, 1 << 20, 1 << 24)
    ],
    *[
        _vectors(name, count)
        for name, record in RECORDS.items()
        if issubclass(record, Rowwise | Gather)
        for count in (10_000, 1 << 20, 1 << 24)
    ],
    *[
        _classes(*shape, quick=quick)
        for shape, quick in (
            ((1, 2), True), ((8, 10), True), ((64, 10), False), ((128, 10), True),
            ((1000, 10), False), ((10_000, 10), True), ((100_000, 10), False),
            ((1 << 20, 10), True),
            ((1 << 15, 16), False), ((1 << 14, 32), False), ((1 << 13, 64), True),
            ((1 << 16, 64), False),
            ((8, 100), False), ((128, 100), False), ((1024, 100), False), ((10_000, 100), False),
            ((4, 1000), False), ((32, 1000), False), ((128, 1000), True), ((512, 1000), False),
            ((4096, 1000), False),
            ((1, 32_000), False), ((4, 32_000), False), ((32, 32_000), False),
            ((1, 1 << 20), False), ((3, 1 << 18), False),
            ((512, 32_000), True), ((256, 128_000), True),
            ((1, 21, 16, 16), False), ((1, 21, 64, 64), False), ((4, 21, 256, 256), True),
        )
    ],
    *[_classes(512, 32_000, dtype=dtype, quick=True) for dtype in (BF16, F16, F64)],
    *[_classes(1 << 20, 10, dtype=dtype) for dtype in (BF16, F16, F64)],
    *[_classes(1 << 13, 64, dtype=dtype) for dtype in (BF16, F16, F64)],
    _classes(8, 64, 32_000, last=True, quick=True),
    _classes(8, 64, 100, last=True),
    *[
        _elements(operation, count, quick=count in (1, 1000, 1 << 17, 1 << 24))
        for operation in ("mse_loss", "l1_loss")
        for count in (1, 10, 100, 1000, 10_000, *(1 << k for k in (15, 16, 17, 18, 20, 24)))
    ],
    *[
        _elements(operation, 1 << 24, dtype)
        for operation in ("mse_loss", "l1_loss")
        for dtype in (BF16, F16, F64)
    ],
]  # fmt: skip

_MOMENTUM = {"lr": 0.01, "momentum": 0.9}


def _block(width: int) -> tuple[tuple[int, ...], ...]:
    """The parameters of a transformer's block, as GPT-2 has them."""
    wide = 4 * width
    return (
        (width,), (width,), (width, 3 * width), (3 * width,), (width, width), (width,),
        (width,), (width,), (width, wide), (wide,), (wide, width), (width,),
    )  # fmt: skip


def _bottleneck(inner: int, outer: int) -> tuple[tuple[int, ...], ...]:
    """The parameters of a residual block, as ResNet-50 has them."""
    return (
        (inner, outer, 1, 1), (inner,), (inner,), (inner, inner, 3, 3), (inner,), (inner,),
        (outer, inner, 1, 1), (outer,), (outer,),
    )  # fmt: skip


_GPT2 = ((50_257, 768), (1024, 768), *(_block(768) * 12), (768,), (768,))
_RESNET50 = (
    (64, 3, 7, 7), (64,), (64,), *(_bottleneck(64, 256) * 3), *(_bottleneck(128, 512) * 4),
    *(_bottleneck(256, 1024) * 6), *(_bottleneck(512, 2048) * 3), (1000, 2048), (1000,),
)  # fmt: skip
_SIZES: tuple[tuple[str, tuple[tuple[int, ...], ...], bool], ...] = (
    ("1 tensor of 1", ((1,),), False),
    ("300 tensors of 16", ((16,),) * 300, True),
    ("100 tensors of 10000", ((10_000,),) * 100, False),
    ("16777216", ((1 << 24,),), True),
)
_OPTIONS: dict[str, Any] = {
    name: kind._record.variants[-1]
    for name, kind in KINDS.items()
    if name not in ("Muon", "Adafactor", "SparseAdam")
}
OPTIMIZERS = [
    *[
        OptimizerRow(f"{operation} {name}", operation, shapes, options, quick=quick)
        for operation, options in _OPTIONS.items()
        for name, shapes, quick in _SIZES
    ],
    OptimizerRow("SGD plain 16777216", "SGD", ((1 << 24,),), {"lr": 0.01}),
    *[
        OptimizerRow(f"Adam 16777216{_suffix(d)}", "Adam", ((1 << 24,),), dtype=d)
        for d in (BF16, F64)
    ],
    OptimizerRow("Adam 100 groups of one", "Adam", ((16,),) * 100, groups=100, quick=True),
    *[
        OptimizerRow(f"AdamW clipped {name}", "AdamW", shapes, quick=quick, clip=0.1)
        for name, shapes, quick in _SIZES
    ],
    OptimizerRow("Muon 48 matrices of 128", "Muon", ((128, 128),) * 48, quick=True),
    OptimizerRow("Muon 12 matrices of 512", "Muon", ((512, 512),) * 12),
    OptimizerRow("Adafactor 300 matrices of 16", "Adafactor", ((16, 16),) * 300, quick=True),
    OptimizerRow("Adafactor 300 tensors of 16", "Adafactor", ((16,),) * 300),
    OptimizerRow("Adafactor 1 matrix of 4096", "Adafactor", ((4096, 4096),), quick=True),
    OptimizerRow("Adafactor like GPT-2", "Adafactor", _GPT2),
    OptimizerRow("SparseAdam 4096 of 50257 rows of 128", "SparseAdam", ((50_257, 128),),
                 quick=True, touched=4096),
    OptimizerRow("SparseAdam 64 of 50257 rows of 128", "SparseAdam", ((50_257, 128),), touched=64),
    OptimizerRow("AdamW like GPT-2", "AdamW", _GPT2),
    OptimizerRow("SGD like ResNet-50", "SGD", _RESNET50, _MOMENTUM),
]  # fmt: skip

CLIPS = [
    ClipRow(f"clip_grad_norm_ {name}{words}", shapes, scales, quick)
    for scales, words in ((True, ""), (False, " below"))
    for name, shapes, quick in _SIZES
]

AVERAGES = [
    AverageRow("EMA 300 tensors of 16", 150, 16, quick=True),
    AverageRow("EMA 2 tensors of 8388608", 1, 1 << 23),
    AverageRow("AdamW and EMA 300 tensors of 16", 150, 16, quick=True, optimizer="AdamW"),
    AverageRow("AdamW and EMA 2 tensors of 8388608", 1, 1 << 23, optimizer="AdamW"),
]

ROWS: dict[str, Row] = {row.name: row for row in (*LOSSES, *OPTIMIZERS, *CLIPS, *AVERAGES)}

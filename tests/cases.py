"""The one table of cases: what each operation is tested and benchmarked with.

A row names an operation of torch, how to make its arguments, and whether a compiled
backend has to serve it (or must refuse it, so that torch does). The oracle is torch in
float64; the yardstick is torch's own error in the tensors' dtype.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastopt.front.call import RECORDS
from fastopt.front.route import RouteCache

#: The machine under test: where tensors are, and the compiled backend that serves them.
DEVICE = os.environ.get("FASTOPT_TEST_DEVICE", "cpu")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
BACKEND = "triton" if INTERPRETED or DEVICE != "cpu" else "numba"

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
REDUCTIONS = ("mean", "sum", "none")

Make = Callable[[torch.dtype], tuple[Tensor, ...]]


@dataclass(frozen=True)
class LossCase:
    """A call of a loss: function name, tensors, further arguments.

    compiled says whether the compiled backends serve it.
    """

    name: str
    operation: str
    make: Make
    options: dict[str, Any] = field(default_factory=dict)
    compiled: bool = True

    def __str__(self) -> str:
        return f"{self.operation}-{self.name}"


def randn(*shape: int, scale: float = 3.0) -> Callable[[torch.dtype], Tensor]:
    return lambda dtype: (torch.randn(shape, dtype=torch.float64) * scale).to(dtype)


def pair(*shape: int) -> Make:
    """Input and target of a pointwise loss, some elements equal."""

    def make(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        input, target = randn(*shape)(dtype), randn(*shape)(dtype)
        same = torch.rand(shape) < 0.1
        return input, torch.where(same, input, target)

    return make


def viewed(make: Make, view: Callable[[Tensor], Tensor]) -> Make:
    """The same, each tensor seen through `view`."""
    return lambda dtype: tuple(view(t) for t in make(dtype))


def labelled(
    shape: tuple[int, ...],
    view: Callable[[Tensor], Tensor] = lambda x: x,
    labels: torch.dtype = torch.int64,
    ignored: int | None = -100,
    weight: bool = False,
) -> Make:
    """Logits made contiguous in `shape` and seen through `view`, class indices, class weights."""

    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logits = view(randn(*shape)(dtype))
        classes = logits.shape[min(1, logits.dim() - 1)]
        positions = logits.shape[:1] + logits.shape[2:] if logits.dim() > 1 else ()
        target = torch.randint(0, classes, positions)
        if ignored is not None and target.numel() > 1:
            target[torch.rand(positions) < 0.2] = ignored
        weights = (torch.rand(classes) + 0.1).to(dtype) if weight else None
        return (logits, target.to(labels)) + ((weights,) if weights is not None else ())

    return make


def distributed(*shape: int, weight: bool = False) -> Make:
    """Logits and class probabilities that do not sum to 1."""

    def make(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logits, target = randn(*shape)(dtype), torch.rand(shape).to(dtype)
        weights = (torch.rand(shape[1] if len(shape) > 1 else shape[0]) + 0.1).to(dtype)
        return (logits, target) + ((weights,) if weight else ())

    return make


def transpose(x: Tensor) -> Tensor:
    return x.transpose(1, 2)


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _pointwise(operation: str) -> list[LossCase]:
    def case(name: str, make: Make, compiled: bool = True, **options: Any) -> LossCase:
        return LossCase(name, operation, make, options, compiled)

    return [
        case("scalar", pair()),
        case("1", pair(1)),
        case("17", pair(17)),
        case("2049", pair(2049)),
        case("3x5x7", pair(3, 5, 7)),
        case("70001", pair(70001)),  # two threads, a tail in each
        case("empty", pair(0)),
        case("empty-2d", pair(3, 0)),
        case("transposed", viewed(pair(33, 65), lambda t: t.t())),
        case("channels-last", viewed(pair(2, 3, 5, 7), channels_last)),
        case("sliced", viewed(pair(40, 50), lambda t: t[:, ::2])),
        case("rows-sliced", viewed(pair(40, 50), lambda t: t[:, 3:20])),
    ]


def _cross_entropy() -> list[LossCase]:
    def case(name: str, make: Make, compiled: bool = True, **options: Any) -> LossCase:
        return LossCase(name, "cross_entropy", make, options, compiled)

    return [
        case("C", labelled((5,))),
        case("C-long", labelled((4099,))),
        case("1x1", labelled((1, 1), ignored=None)),
        case("3x7", labelled((3, 7))),
        case("65x10", labelled((65, 10))),
        case("129x2", labelled((129, 2))),
        case("4x79", labelled((4, 79))),
        case("4x80", labelled((4, 80))),
        case("5x81", labelled((5, 81))),
        case("3x2048", labelled((3, 2048))),
        case("3x2049", labelled((3, 2049))),
        case("19x4099", labelled((19, 4099))),
        case("9000x3", labelled((9000, 3))),
        case("uint8", labelled((33, 10), labels=torch.uint8, ignored=7), ignore_index=7),
        case("ignore-0", labelled((33, 10), ignored=0), ignore_index=0),
        case("weight", labelled((33, 10), weight=True)),
        case("weight-long", labelled((5, 300), weight=True)),
        case("smooth", labelled((33, 10)), label_smoothing=0.1),
        case("smooth-long", labelled((5, 300)), label_smoothing=0.1),
        case("smooth-all", labelled((5, 300)), label_smoothing=1.0),
        case("smooth-weight", labelled((33, 10), weight=True), label_smoothing=0.3),
        case("smooth-weight-long", labelled((5, 2500), weight=True), label_smoothing=0.3),
        case("NCL", labelled((3, 6, 70))),
        case("NCHW", labelled((2, 21, 5, 33))),
        case("NCHW-weight", labelled((2, 21, 5, 33), weight=True), label_smoothing=0.2),
        case("NCL-many-classes", labelled((2, 3000, 19))),
        case("NLC", labelled((3, 17, 10), transpose)),
        case("NLC-long", labelled((3, 17, 300), transpose)),
        case(
            "NLC-long-smooth", labelled((3, 17, 300), transpose, weight=True), label_smoothing=0.1
        ),
        case("channels-last", labelled((2, 21, 5, 7), channels_last)),
        case("channels-last-long", labelled((2, 100, 5, 7), channels_last)),
        case("class-first", labelled((10, 65), lambda x: x.t())),
        case("class-first-long", labelled((300, 65), lambda x: x.t())),
        case("classes-sliced", labelled((7, 200), lambda x: x[:, ::2])),
        case("rows-sliced", labelled((14, 200), lambda x: x[::2, 50:150])),
        case("rows-expanded", labelled((1, 200), lambda x: x.expand(6, 200))),
        case("spatial-permuted", labelled((2, 5, 6, 7), lambda x: x.permute(0, 1, 3, 2)), False),
        case("no-rows", labelled((0, 5))),
        case("no-positions", labelled((3, 5, 0))),
        case("probabilities", distributed(33, 10)),
        case("probabilities-long", distributed(5, 2500)),
        case("probabilities-C", distributed(70)),
        case("probabilities-weight", distributed(33, 10, weight=True)),
        case("probabilities-smooth", distributed(33, 100, weight=True), label_smoothing=0.3),
        case("probabilities-NCL", distributed(3, 5, 7)),
    ]


LOSSES = [*_pointwise("mse_loss"), *_pointwise("l1_loss"), *_cross_entropy()]


@dataclass(frozen=True)
class OptimizerCase:
    """An optimizer's name in torch.optim and its arguments."""

    operation: str
    options: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        given = "-".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.operation}-{given}" if given else self.operation


def _optimizer(operation: str, *options: dict[str, Any]) -> list[OptimizerCase]:
    return [OptimizerCase(operation, o) for o in options]


_ADAM = (
    {},
    {"lr": 0.1, "betas": (0.5, 0.9), "eps": 1e-3},
    {"weight_decay": 0.3},
    {"amsgrad": True, "weight_decay": 0.1},
    {"maximize": True},
)
OPTIMIZERS = [
    *_optimizer(
        "SGD",
        {"lr": 0.1},
        {"lr": 0.1, "momentum": 0.9},
        {"lr": 0.1, "momentum": 0.9, "dampening": 0.4},
        {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.2},
        {"lr": 0.1, "momentum": 0.7, "maximize": True, "weight_decay": 0.2},
    ),
    *_optimizer("Adam", *_ADAM),
    *_optimizer("AdamW", *_ADAM),
    *_optimizer(
        "RMSprop",
        {},
        {"lr": 0.1, "alpha": 0.8, "eps": 1e-3, "weight_decay": 0.2},
        {"momentum": 0.7},
        {"centered": True, "eps": 1e-2},
        {"centered": True, "momentum": 0.5, "maximize": True, "eps": 1e-2},
    ),
    *_optimizer(
        "Adagrad",
        {},
        {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "eps": 1e-3},
        {"weight_decay": 0.2, "maximize": True},
    ),
    *_optimizer("Adadelta", {}, {"lr": 0.1, "rho": 0.7, "weight_decay": 0.2, "maximize": True}),
    *_optimizer("Adamax", {}, {"lr": 0.1, "betas": (0.5, 0.9), "weight_decay": 0.2, "eps": 1e-3}),
    *_optimizer(
        "RAdam",
        {},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.2},
        {"betas": (0.8, 0.9), "weight_decay": 0.2, "decoupled_weight_decay": True},
    ),
    *_optimizer(
        "NAdam",
        {},
        {"lr": 0.1, "betas": (0.5, 0.7), "eps": 1e-3, "weight_decay": 0.2, "maximize": True},
        {"momentum_decay": 0.2, "weight_decay": 0.2, "decoupled_weight_decay": True},
    ),
    *_optimizer(
        "ASGD",
        {"lr": 0.1},
        {"lr": 0.1, "lambd": 0.1, "alpha": 0.5, "t0": 1, "weight_decay": 0.2, "maximize": True},
    ),
    *_optimizer("Rprop", {}, {"lr": 0.1, "etas": (0.3, 1.7), "step_sizes": (0.02, 0.15)}),
]

#: Odd sizes, whole SIMD blocks, one that two threads share, and empty ones also at the end.
#: (In the interpreter a large one only takes longer.)
LARGE = 5003 if INTERPRETED else 40_003
SHAPES = ((1,), (64,), (70,), (3, 5, 7), (), (4099,), (0,), (LARGE,), (2, 0))


@contextmanager
def any_size_counts() -> Iterator[None]:
    """Set the sizes aside below which torch's own code is faster."""
    with ExitStack() as stack:
        for operation in set(RECORDS.values()):
            stack.enter_context(mock.patch.multiple(operation, crossover=0, row_crossover={}))
        RouteCache.forget()
        yield
    RouteCache.forget()


def ulps(dtype: torch.dtype, scale: float) -> float:
    """The distance of neighbouring numbers of a dtype near `scale`."""
    return torch.finfo(dtype).eps * scale


def level(operation: str, tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """The tensors with logits of 0 for cross-entropy, where no result is a small difference.

    Elsewhere p - 1, and what class weights and targets make of it, may cancel, above all in few
    rows. What the oracle says here is what `assert_as_accurate` calls terms.
    """
    if operation != "cross_entropy":
        return tensors
    logits = torch.zeros_like(tensors[0], requires_grad=tensors[0].requires_grad)
    return logits, *tensors[1:]


def assert_as_accurate(
    ours: Tensor, torchs: Tensor, oracle: Tensor, terms: Tensor | None = None
) -> None:
    """Our largest error is no larger than torch's, but for four times the last digit.

    terms: of what size the numbers are whose difference the result is, if it may be smaller.
    Infinities and NaN are the oracle's. Where torch alone has one (Adam in float16, whose
    eps of 1e-8 rounds to 0 there), we have the same or a number.
    """
    assert ours.dtype == torchs.dtype
    assert ours.shape == torchs.shape
    like_torch = (ours == torchs) | (ours.isnan() & torchs.isnan())
    assert (like_torch | (oracle.isfinite() & ours.isfinite())).all()
    finite = oracle.isfinite() & torchs.isfinite() & ours.isfinite()
    assert torch.equal(finite, oracle.isfinite() & torchs.isfinite())
    if not finite.any():
        return
    errors = (ours.double() - oracle)[finite].abs()
    theirs = (torchs.double() - oracle)[finite].abs().max().item()
    slack = 4
    scale = oracle[finite].abs().max().item()
    if terms is not None and terms.isfinite().any():
        scale = max(scale, terms[terms.isfinite()].abs().max().item())
    if ours.numel() < 32:
        scale = max(scale, 1.0)  # of so few, whose last digits (of p - 1, say) fall better is luck
    if ours.dtype == torch.float64:
        # Torch is the oracle itself here and its rounding counts as none, though it is that
        # of the inputs (some 10 in size), of which a small loss is a difference.
        slack, scale = 64, max(scale, 10.0)
    if INTERPRETED:
        # NumPy has no fused multiply-add: where a gradient and its weight decay cancel, what is
        # left has other digits than on any real machine.
        theirs *= 4
    limit = theirs + slack * ulps(ours.dtype, scale) + torch.finfo(ours.dtype).smallest_normal
    few = (errors > limit).sum() <= errors.numel() // 100
    if INTERPRETED and few and ours.dtype in (torch.float32, torch.float64):
        limit *= 64  # for what cancels and is then divided by its own size, some 1e-5
    mine = errors.max().item()
    assert mine <= limit, f"error {mine:.3g}, torch's {theirs:.3g}, largest value {scale:.3g}"

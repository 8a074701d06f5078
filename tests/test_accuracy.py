"""No operation's error against exact numbers is larger than torch's, in any dtype."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from accuracy import BY_TORCH, OPERATIONS, Errors, loss_sample, measure
from cases import FLOATS, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not oracle.PRECISE, reason="long double is no more precise than float64"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter has no fused multiply-add and "
                       "truncates to bfloat16, which no device does"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(
    ("operation", "dtype"),
    [*((name, dtype) for name in OPERATIONS for dtype in FLOATS), *BY_TORCH],
    ids=str,
)
def test_error_is_no_larger_than_torchs(operation: str, dtype: torch.dtype) -> None:
    for quantity, errors in measure(operation, dtype).items():
        ours, torchs = errors.roots()
        # Root mean squares of n random numbers each: their ratio is off by 1 / sqrt(n).
        chance = 4 / math.sqrt(errors.numbers)
        assert ours <= torchs * (1 + chance), f"{quantity}: {ours:.4f} eps, torch's {torchs:.4f}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("scale", [0.5, 3.0, 8.0])
@pytest.mark.parametrize(
    "classes", [2, 3, 7, 10, 16, 20, 33, 64, 79, 80, 127, 128, 300, 2047, 5001]
)
def test_any_number_of_classes(classes: int, scale: float, dtype: torch.dtype) -> None:
    """Rows and planes, each by itself: one's error can't hide behind the others'."""
    rows = 40_000 // classes + 100
    target = torch.randint(classes, (rows,))
    input = (torch.randn(rows, classes) * scale).to(dtype)
    for tensors in ((input, target), (input.t().contiguous()[None], target[None])):
        errors = Errors()
        for quantity, *sample in loss_sample("cross_entropy", tensors, "none"):
            if quantity == "gradient":
                errors.add(*sample)
        ours, torchs = errors.roots()
        assert ours <= torchs * (1 + 4 / math.sqrt(rows)), f"{ours:.4f} eps, torch's {torchs:.4f}"

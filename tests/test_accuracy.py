"""No operation's error against exact numbers is larger than torch's, in any dtype."""

from __future__ import annotations

import math

import oracle
import pytest
import torch
from accuracy import OPERATIONS, measure
from cases import FLOATS, INTERPRETED

pytestmark = [
    pytest.mark.skipif(not oracle.PRECISE, reason="long double is no more precise than float64"),
    pytest.mark.skipif(INTERPRETED, reason="the interpreter has no fused multiply-add and "
                       "truncates to bfloat16, which no device does"),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_error_is_no_larger_than_torchs(operation: str, dtype: torch.dtype) -> None:
    for quantity, errors in measure(operation, dtype).items():
        ours, torchs = errors.roots()
        # Root mean squares of n random numbers each: their ratio is off by 1 / sqrt(n).
        chance = 4 / math.sqrt(errors.numbers)
        assert ours <= torchs * (1 + chance), f"{quantity}: {ours:.4f} eps, torch's {torchs:.4f}"

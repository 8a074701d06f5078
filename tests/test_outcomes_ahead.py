"""What rows of logits say, of one tensor and of two, and linear cross-entropy: compiled for GPUs
without one.
"""

from __future__ import annotations

import re

import pytest
import torch
from ahead import MACHINES, compiling

import fastopt.nn.functional  # noqa: F401  (has the losses say what they are)
from fastopt.front.call import RECORDS
from fastopt.kernels import triton as backend
from fastopt.kernels.operation import Options
from fastopt.nn._distillation_loss import record_of

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
META = torch.device("meta")


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


@pytest.mark.parametrize(
    ("machine", "dtype", "classes"),
    [  # every two of these in one of them
        (machine, dtype, (1000, 100_000)[(i + j) % 2])
        for i, machine in enumerate(MACHINES)
        for j, dtype in enumerate([FLOAT, BFLOAT, HALF, DOUBLE])
    ],
    ids=str,
)
def test_outcomes(machine: str, dtype: torch.dtype, classes: int) -> None:
    """Nothing is spilled, and doubles are where they are asked for alone."""
    x, target = empty(64, classes, dtype=dtype), empty(64, dtype=torch.int64)
    with compiling(MACHINES[machine]) as codes:
        found = backend.outcomes(x, target)
        grads = empty(3, 64, dtype=found.entropy.dtype)
        assert backend.gradient(x, target, found.kept, grads).dtype == dtype
    assert [code.name for code in codes] == ["row_outcomes", "row_slopes"]
    for code in codes:
        assert code.resources["spills"] == code.resources["stack"] == 0, code
        assert code.machine.holds(code.threads, code.resources["registers"]), code
        doubles = any(re.search(r"[._]f64(_|\b)", i.text) for i in code.instructions)
        assert doubles == (dtype == DOUBLE)


@pytest.mark.parametrize(
    ("dtype", "beta", "classes"),
    [
        (FLOAT, 0.0, 100_000),
        (FLOAT, 0.3, 1000),
        (BFLOAT, 0.3, 100_000),
        (HALF, 1.0, 1000),
        (DOUBLE, 0.3, 1000),
    ],
)
@pytest.mark.parametrize("machine", MACHINES)
def test_divergences(machine: str, dtype: torch.dtype, beta: float, classes: int) -> None:
    """The same, and rows at multiples of 16 bytes are read and written 16 bytes a thread."""
    record, x, y = record_of(2.0, beta), *(empty(64, classes, dtype=dtype) for _ in range(2))
    with compiling(MACHINES[machine]) as codes:
        found = backend.divergences(record, x, y)
        grad = backend.divergence_gradient(record, x, y, found.kept, found.values)
    assert grad.dtype == dtype
    assert [code.name for code in codes] == ["row_divergences", "row_divergence_slopes"]
    for code in codes:
        assert code.resources["spills"] == code.resources["stack"] == 0, code
        assert code.machine.holds(code.threads, code.resources["registers"]), code
        doubles = any(re.search(r"[._]f64(_|\b)", i.text) for i in code.instructions)
        assert doubles == (dtype == DOUBLE)
        rows = [i.access for i in code.instructions if i.access and "mask=mask" in i.statement]
        assert {kind for kind, _ in rows} == {"load"} | ({"store"} if code is codes[1] else set())
        assert classes % 16 or {width for _, width in rows} == {16}


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=str)
@pytest.mark.parametrize("machine", MACHINES)
def test_linear(machine: str, dtype: torch.dtype, reduction: str) -> None:
    """A piece is read for its losses, and then again to be overwritten by its gradient."""
    record = RECORDS["linear_cross_entropy"]()
    tensors = (
        empty(64, 32, dtype=dtype), empty(50_000, 32, dtype=dtype), empty(64, dtype=torch.int64),
        None, None,
    )  # fmt: skip
    needs = (True, True, False, False, False)
    options = Options(record, reduction, dtype)
    with compiling(MACHINES[machine]) as codes:
        loss, grads, kept = backend.forward(options, tensors, needs)
        if grads is None:
            grads = backend.backward(options, tensors, None, kept, loss, needs)
    assert [g is not None for g in grads] == list(needs)
    kernels = {code.name for code in codes}
    assert kernels >= {"softmax_rows"}
    assert ("finish" in kernels) == ("target_mass" in kernels) == (reduction == "mean")
    for code in codes:
        assert code.resources["spills"] == code.resources["stack"] == 0, code

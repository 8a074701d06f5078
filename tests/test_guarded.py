"""Losses and optimizers in memory that ends at a page nobody may touch: see guarded.py.

An access out of bounds, a write to an input and any use of memory that is gone crash the child
process that a test runs in; the failure names the case. Results are compared as well: memory
that a kernel takes for itself holds NaN.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import (
    BACKEND,
    DEVICE,
    FLOATS,
    INTERPRETED,
    LOSSES,
    OPTIMIZERS,
    REDUCTIONS,
    LossCase,
    OptimizerCase,
    assert_as_accurate,
    labelled,
    pair,
)
from children import run_code
from guarded import SUPPORTED, Guards, Progress, run
from test_losses import in_double
from torch import Tensor
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours

pytestmark = [
    pytest.mark.skipif(not SUPPORTED, reason="mmap and mprotect as Linux has them"),
    pytest.mark.skipif(DEVICE != "cpu", reason="guards memory of the CPU alone"),
]
sides = pytest.mark.parametrize("at_end", [True, False], ids=["end", "begin"])

#: Every SIMD width and tail, and what is near larger blocks. (The interpreter has no SIMD.)
SIZES = (1, 2, 7, 63, 65) if INTERPRETED else (*range(1, 41), 63, 64, 65, 127, 128, 129, 4099)
DTYPES = FLOATS[:3:2] if INTERPRETED else FLOATS
# How far results may lie from torch's own in the same dtype; the other tests look closer.
CLOSE = {
    torch.float64: {"rtol": 1e-9, "atol": 1e-9},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 1e-2, "atol": 1e-2},
    torch.bfloat16: {"rtol": 6e-2, "atol": 6e-2},
}


def assert_near(mine: Tensor, torchs: Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(mine, torchs, **CLOSE[dtype], equal_nan=True)


# -- the guards themselves ----------------------------------------------------------------

CRASHES = {
    "behind": "ctypes.c_float.from_address(t.data_ptr() + 20).value",
    "before": "ctypes.memset(Guards(False).copy(t).data_ptr() - 1, 0, 1)",
    "write-to-input": "Guards(True).copy(t, read_only=True).zero_()",
    "stale": "p = t.data_ptr(); del t; ctypes.c_float.from_address(p).value",
}
# What is allowed doesn't crash, so it is the end of the line that does.
HARMLESS = "t.zero_(); v = t[4:].clone(); print('alive', flush=True)"


@pytest.mark.parametrize("what", CRASHES)
def test_a_wrong_access_crashes(what: str) -> None:
    start = "import ctypes, torch; from guarded import Guards\n"
    start += "t = Guards(True).empty((5,), torch.float32)\n"
    with pytest.raises(AssertionError, match="exit status -11\nalive"):  # SIGSEGV
        run_code(f"{start}{HARMLESS}; {CRASHES[what]}")


# -- every loss ---------------------------------------------------------------------------


def leaves(tensors: Sequence[Tensor], needs: Sequence[bool]) -> list[Tensor]:
    return [t.detach().requires_grad_(need) for t, need in zip(tensors, needs, strict=True)]


def check_loss(
    guards: Guards, progress: Progress, case: LossCase, dtype: torch.dtype, share: float
) -> None:
    """Reductions, patterns of gradients and grad_outputs, a random share of all combinations."""
    tensors = case.make(dtype)
    differentiable = 1 if case.operation == "cross_entropy" else 2
    combinations = list(
        itertools.product(REDUCTIONS, itertools.product((True, False), repeat=differentiable))
    )
    for reduction, some in random.sample(combinations, math.ceil(share * len(combinations))):
        needs = (*some, *(False,) * (len(tensors) - differentiable))
        progress(case, tuple(tensors[0].shape), dtype, reduction, needs)
        inputs = leaves([guards.copy(t, read_only=True) for t in tensors], needs)
        expected = leaves(in_double(tensors), needs)
        with fastopt.use_backend(BACKEND):
            mine = getattr(ours, case.operation)(*inputs, reduction=reduction, **case.options)
        torchs = getattr(theirs, case.operation)(*expected, reduction=reduction, **case.options)
        assert_near(mine.detach(), torchs.detach().to(dtype), dtype)
        if not any(needs):
            continue
        other = torch.rand(torchs.shape).to(dtype)
        expanded = other[..., :1].expand(other.shape) if other.dim() else other
        wanted, wanted_twins = ([t for t in ts if t.requires_grad] for ts in (inputs, expected))
        for given in (torch.ones(other.shape).to(dtype), other, expanded):
            upstream = guards.copy(given, read_only=True)
            found = torch.autograd.grad(mine, wanted, upstream, retain_graph=True)
            right = torch.autograd.grad(torchs, wanted_twins, given.double(), retain_graph=True)
            for m, t in zip(found, right, strict=True):
                assert_near(m, t.to(dtype), dtype)


def begin(file: str, at_end: bool, seed: int) -> tuple[Guards, Progress]:
    """In the child: guard memory, and repeat what the seed says.

    On one thread, or torch's own would wait for each other at every small tensor.
    """
    torch.set_num_threads(1)
    random.seed(seed)
    torch.manual_seed(seed)
    guards = Guards(at_end)
    guards.install()
    return guards, Progress(file)


def all_losses(file: str, at_end: bool, seed: int) -> None:
    guards, progress = begin(file, at_end, seed)
    for case in LOSSES:
        elements = sum(t.numel() for t in case.make(torch.float32))
        cheap = elements < 1000
        torch.set_num_threads(1 if elements < 30_000 else 2)
        if case.compiled and (cheap or not INTERPRETED):
            for dtype in DTYPES:
                check_loss(guards, progress, case, dtype, 0.2)


@sides
def test_every_loss(at_end: bool, seed: int, tmp_path: Path) -> None:
    run(all_losses, tmp_path, at_end, seed)


def sizes(operation: str, size: int) -> list[LossCase]:
    """A loss on `size` elements, classes or positions."""
    if operation != "cross_entropy":
        return [LossCase(f"{size}", operation, pair(size))]
    smooth = {"label_smoothing": 0.1}
    return [
        LossCase("rows", operation, labelled((3, size), weight=True), smooth),
        LossCase("positions", operation, labelled((size, 3))),
        LossCase("columns", operation, labelled((3, size), lambda x: x.t()), smooth),
        LossCase("strided", operation, labelled((3, 2 * size), lambda x: x[:, 1::2])),
        LossCase("inner", operation, labelled((2, 5, size), weight=True)),
    ]


def losses_of_all_sizes(file: str, at_end: bool, seed: int) -> None:
    guards, progress = begin(file, at_end, seed)
    for operation in sorted({case.operation for case in LOSSES}):
        for size in SIZES:
            for case, dtype in itertools.product(sizes(operation, size), DTYPES):
                check_loss(guards, progress, case, dtype, 0.01)


@sides
def test_losses_of_all_sizes(at_end: bool, seed: int, tmp_path: Path) -> None:
    run(losses_of_all_sizes, tmp_path, at_end, seed)


# -- every optimizer ----------------------------------------------------------------------


def shapes(dtype: torch.dtype) -> list[Tensor]:
    flat = [torch.randn(n) for n in (*SIZES, 0)]
    dense = [torch.randn(5, 7).t(), torch.randn(2, 3, 4, 5).permute(0, 2, 3, 1), torch.randn(0, 3)]
    return [t.to(dtype) for t in (*flat, *dense)]


class Twins:
    """An optimizer of fastopt over guarded parameters, and torch's over plain ones and doubles."""

    def __init__(self, guards: Guards, values: Sequence[Tensor], case: OptimizerCase) -> None:
        self.guards, self.case = guards, case
        self.mine = [Parameter(guards.copy(v)) for v in values]
        self.torchs = [Parameter(v.clone()) for v in values]
        self.doubles = [Parameter(v.double()) for v in values]
        self.begin()

    def begin(self) -> None:
        """With new optimizers."""
        self.ours = getattr(fastopt.optim, self.case.operation)(self.mine, **self.case.options)
        self.theirs, self.oracle = (
            getattr(torch.optim, self.case.operation)(params, foreach=False, **self.case.options)
            for params in (self.torchs, self.doubles)
        )

    def replicas(self) -> list[tuple[Any, list[Parameter]]]:
        return [(self.ours, self.mine), (self.theirs, self.torchs), (self.oracle, self.doubles)]

    def set_grads(self, missing: float = 0.0) -> None:
        """New ones that can't be written to; those before crash whoever still reads them."""
        for m, t, d in zip(self.mine, self.torchs, self.doubles, strict=True):
            m.grad = t.grad = d.grad = None
            if random.random() >= missing:
                t.grad = t.detach().clone().copy_(torch.randn(t.shape) + 0.1)
                m.grad = self.guards.copy(t.grad, read_only=True)
                d.grad = t.grad.double()

    def step(self) -> None:
        try:
            with fastopt.use_backend(BACKEND):
                self.ours.step()
        except fastopt.BackendUnavailable as error:  # a parameter has been transposed
            if "of another layout than the parameter's" not in str(error):
                raise
            self.ours.step()
        self.theirs.step()
        self.oracle.step()

    def assert_same(self) -> None:
        for m, t in zip(self.mine, self.torchs, strict=True):
            assert_near(m.detach(), t.detach(), t.dtype)


def all_optimizers(file: str, at_end: bool, seed: int) -> None:
    guards, progress = begin(file, at_end, seed)
    for case, dtype in itertools.product(OPTIMIZERS, DTYPES):
        progress(case, dtype)
        twins = Twins(guards, shapes(dtype), case)
        for _ in range(3):
            twins.set_grads(missing=0.1)
            twins.step()
        everything = [
            torch.cat([p.detach().flatten() for p in params])
            for params in (twins.mine, twins.torchs, twins.doubles)
        ]
        assert_as_accurate(*everything)
        for value in random.sample(shapes(dtype), 3):  # alone
            progress(case, dtype, tuple(value.shape))
            alone = Twins(guards, [value], case)
            alone.set_grads()
            alone.step()


@sides
def test_every_optimizer(at_end: bool, seed: int, tmp_path: Path) -> None:
    run(all_optimizers, tmp_path, at_end, seed)

"""Loops of losses compute with vectors: nothing else shows if they don't."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import DEVICE, INTERPRETED
from numba.core import caching

import fastopt
from fastopt.kernels.numba import (
    compiler,
    flat,
    multi_tensor,
    softmax_rows,
    softmax_schedule,
    softmax_tiles,
)
from fastopt.nn import functional

if INTERPRETED or DEVICE != "cpu":
    pytest.skip("loops for CPUs", allow_module_level=True)

#: Losses, and their other arguments.
LOSSES: dict[str, dict[str, Any]] = {
    "mse_loss": {},
    "l1_loss": {},
    "huber_loss": {},
    "smooth_l1_loss": {},
    "binary_cross_entropy": {},
    "binary_cross_entropy_with_logits": {"pos_weight": torch.ones(640)},
    "kl_div": {},
    "poisson_nll_loss": {"full": True},
    "gaussian_nll_loss": {"var": torch.ones(640)},
    "soft_margin_loss": {},
    "hinge_embedding_loss": {},
}


@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("name", LOSSES)
def test_loop_of_vectors(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has vectors of floats, and its formula is part of it."""
    monkeypatch.setattr(flat.flat_run, "_cache", caching.NullCache())
    loops: list[Any] = []
    compiled = flat.Loop

    def made(run: Any, *given: Any) -> Any:
        run.overloads.clear()  # what the disk has given is no more than machine code
        loops.append(run)
        return compiled(run, *given)

    monkeypatch.setattr(flat, "Loop", made)
    for kept in (flat._loop, flat._schedule):
        kept.cache_clear()
    input = torch.rand(640).requires_grad_()
    with fastopt.use_backend("numba"):
        loss = getattr(functional, name)(
            input, torch.rand(640), **LOSSES[name], reduction=reduction
        )
        loss.sum().backward()
    texts = flat.flat_run.inspect_llvm().values()
    assert loops
    assert texts
    for text in texts:
        (body,) = re.findall(r"^define [^\n]*flat_run.*?^}", text, re.DOTALL | re.MULTILINE)[:1]
        assert re.search(r"<\d+ x float>", body)
        assert not re.search(r"call [^\n]*value_and_slopes", body)


@pytest.mark.parametrize("capped", [False, True])
@pytest.mark.parametrize(
    ("loop", "shape"),
    [(softmax_rows.softmax_rows, (4, 640)), (softmax_tiles.softmax_tiles, (64, 10))],
    ids=["rows", "tiles"],
)
def test_softmax_of_vectors(
    loop: Any, shape: tuple[int, int], capped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A softcap's divisions are of vectors, and where there is none there are none."""
    monkeypatch.setattr(loop, "_cache", caching.NullCache())
    loop.overloads.clear()
    for known in (compiler.specialise, softmax_schedule.schedule, softmax_schedule._launcher):
        known.cache_clear()
    input = torch.rand(shape).requires_grad_()
    options = {"softcap": 30.0, "z_loss": 1e-4} if capped else {}
    with fastopt.use_backend("numba"):
        functional.cross_entropy(input, torch.zeros(shape[0]).long(), **options).backward()
    (text,) = loop.inspect_llvm().values()
    assert re.search(r"fmul[^\n]* <\d+ x float>", text)
    assert bool(re.search(r"fdiv[^\n]* <\d+ x float>", text)) == capped
    assert bool(re.search(r"fdiv[^\n]* float ", text)) == capped  # those of tails and labels


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, None), (torch.bfloat16, "stochastic")]
)
def test_random_rounding_of_vectors(
    dtype: torch.dtype, rounding: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hash of an update is computed in vectors of words of 32 bits, as the update is."""
    loop = multi_tensor.update_all
    monkeypatch.setattr(loop, "_cache", caching.NullCache())
    loop.overloads.clear()
    for known in (compiler.specialise, multi_tensor.launcher):
        known.cache_clear()
    param = torch.nn.Parameter(torch.ones(640, dtype=dtype))
    param.grad = torch.ones_like(param)
    fastopt.optim.AdamW([param], state_dtype=torch.bfloat16, rounding=rounding).step()
    (text,) = loop.inspect_llvm().values()
    assert re.search(r"mul <\d+ x i32>", text)
    assert not re.search(r"<\d+ x i64>", text)
    assert re.search(r"fdiv[^\n]* <\d+ x float>", text)

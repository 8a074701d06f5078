"""Infinities, NaN and large numbers: values and gradients of every loss by element."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, DEVICE, REDUCTIONS

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.call import RECORDS
from fastopt.kernels.operation import Elementwise

INF, NAN = math.inf, math.nan
ELEMENTWISE = [name for name, record in RECORDS.items() if issubclass(record, Elementwise)]
#: Besides the usual ones.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "binary_cross_entropy_with_logits": ({"pos_weight": 3.0}, {"pos_weight": 0.3}),
    "gaussian_nll_loss": ({"full": True},),
    "hinge_embedding_loss": ({"margin": 0.3},),
    "kl_div": ({"log_target": True},),
    "poisson_nll_loss": ({"full": True}, {"log_input": False}),
    "smooth_l1_loss": ({"beta": 0.0},),
}
#: Those that multiply nothing by an operand, so that the order of products doesn't decide whether
#: the largest numbers overflow.
DIFFERENCES = ("huber_loss", "l1_loss", "mse_loss", "smooth_l1_loss")
CASES = [(name, o) for name in ELEMENTWISE for o in ({}, *OPTIONS.get(name, ()))]


def grid(operation: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Every combination of special numbers, of the operands that a call needs."""
    big = torch.finfo(dtype).max if operation in DIFFERENCES else 1e30
    anything = (0.0, -0.0, 1.0, -1.0, 0.5, -3.5, 100.0, -100.0, 1e-30, INF, -INF, NAN, big, -big)
    domains: dict[str, tuple[float, ...]] = {
        "unit": (0.0, 1.0, 0.5, 1e-30),
        "positive": (1e-30, 0.5, 1.0, 7.0, INF, NAN),
        "sign": (1.0, -1.0),
        "log": (0.0, -1.0, -100.0, -INF, -big),
    }
    needed = inspect.signature(getattr(theirs, operation)).parameters.values()
    names = [p.name for p in needed if p.default is p.empty]
    known = RECORDS[operation].domains
    values = [domains[known[name]] if name in known else anything for name in names]
    columns = torch.tensor(list(itertools.product(*values)), dtype=dtype, device=DEVICE)
    return {name: columns[:, k].contiguous() for k, name in enumerate(names)}


@pytest.mark.filterwarnings("ignore:reduction. .mean. divides")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("operation", "options"), CASES, ids=str)
def test_extreme_elements(operation: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """The same infinities and NaN as torch, and else its values."""
    options = {
        k: torch.tensor(v, dtype=dtype, device=DEVICE) if k == "pos_weight" else v
        for k, v in options.items()
    }
    tensors = grid(operation, dtype)
    if operation == "soft_margin_loss":  # torch's overflows
        tensors["input"] = tensors["input"].where(tensors["input"].abs() < 80, 80.0)
    followed = RECORDS[operation].followed
    for reduction in REDUCTIONS:
        outcomes = []
        for module in (ours, theirs):
            leaves = {k: t.clone().requires_grad_(k in followed) for k, t in tensors.items()}
            with fastopt.use_backend(BACKEND):
                loss = getattr(module, operation)(**leaves, **options, reduction=reduction)
            wanted = [t for t in leaves.values() if t.requires_grad]
            upstream = torch.full_like(loss, 2.0)
            outcomes.append((loss.detach(), *torch.autograd.grad(loss, wanted, upstream)))
        tolerance = 8 * torch.finfo(dtype).eps
        for mine, torchs in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, torchs, rtol=tolerance, atol=tolerance, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_soft_margin_is_exact(dtype: torch.dtype) -> None:
    """Also where torch's exponential overflows, and its gradient is NaN."""
    input = torch.tensor([-1e30, -1000.0, -100.0, 100.0, 1e30, 0.5], dtype=dtype, device=DEVICE)
    target = torch.tensor([1.0, 1.0, 1.0, -1.0, -1.0, -1.0], dtype=dtype, device=DEVICE)
    input.requires_grad_()
    with fastopt.use_backend(BACKEND):
        loss = ours.soft_margin_loss(input, target, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), input)
    product = -target.double() * input.detach().double()
    torch.testing.assert_close(loss, theirs.softplus(product).to(dtype))
    torch.testing.assert_close(grad, (-target.double() * torch.sigmoid(product)).to(dtype))

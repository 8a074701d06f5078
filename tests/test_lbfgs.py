"""LBFGS: torch's own step under fastopt's name."""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from typing import Any

import pytest
import torch
from cases import DEVICE
from race import outcome
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

import fastopt
from fastopt import BackendUnavailable
from fastopt.optim import LBFGS

(INFO,) = [info for info in optim_db if info.name == "LBFGS"]
MODULES = (fastopt.optim, torch.optim)


def train(kind: Any, dtype: torch.dtype, options: dict[str, Any]) -> Any:
    torch.manual_seed(3)
    model = torch.nn.Linear(5, 3, dtype=dtype)
    optimizer = kind(model.parameters(), **copy.deepcopy(options))
    x, y = torch.randn(20, 5, dtype=dtype), torch.randn(20, 3, dtype=dtype)
    calls: list[int] = []

    def closure() -> Tensor:
        calls.append(len(calls))
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean() + model.weight.abs().sum() / 9
        loss.backward()
        return loss

    losses = [optimizer.step(closure), optimizer.step(closure=closure)]
    return optimizer, [loss.item() for loss in losses], len(calls), [*model.parameters()]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("row", INFO.optim_inputs_func(DEVICE), ids=lambda row: row.desc)
def test_inputs(row: Any, dtype: torch.dtype) -> None:
    """Torch's numbers to the bit, and its state."""
    mine, its = (train(module.LBFGS, dtype, row.kwargs) for module in MODULES)
    assert isinstance(mine[0], LBFGS)
    assert mine[1:3] == its[1:3]
    assert all(map(torch.equal, mine[3], its[3]))
    assert str(mine[0].state_dict()) == str(its[0].state_dict())
    assert repr(mine[0]) == repr(its[0])


def test_errors() -> None:
    """All that torch lists, and the closure that isn't there."""
    info: OptimizerInfo = INFO
    for row in info.optim_error_inputs_func(DEVICE, torch.float32):
        given = row.optimizer_error_input
        results = []
        for module in MODULES:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                params = copy.deepcopy(given.params)
                results.append(outcome(lambda m=module, p=params, g=given: m.LBFGS(p, **g.kwargs)))
        assert results[0][0] == results[1][0]
        assert results[1][0] == "returned" or results[0] == results[1]
    for module in MODULES:
        with pytest.raises(TypeError, match="closure"):
            module.LBFGS([Parameter(torch.ones(2))]).step()
    signatures = [inspect.signature(module.LBFGS).parameters for module in MODULES]
    assert list(signatures[0]) == list(signatures[1])


def test_explain_and_backends() -> None:
    params = [Parameter(torch.ones(3)), Parameter(torch.ones(2, 2, dtype=torch.float64))]
    optimizer = LBFGS(params)
    explanation = fastopt.explain(optimizer)
    assert [d.backend for d in explanation] == ["reference", "reference"]
    assert [d.request.numel for d in explanation] == [3, 4]
    assert "dot products and sums of whole vectors" in str(explanation)
    before = [p.detach().clone() for p in params]

    def closure() -> Tensor:
        raise AssertionError("called though nothing can be done")

    with fastopt.use_backend("numba"), pytest.raises(BackendUnavailable, match="LBFGS"):
        optimizer.step(closure)
    assert all(map(torch.equal, before, params))


def test_conversion_checkpoints_and_hooks() -> None:
    """Convert in the middle of a training, both ways; hooks once a step, under the same name."""
    results = []
    for converted in (True, False):
        torch.manual_seed(0)
        p = Parameter(torch.randn(6))
        optimizer: Any = torch.optim.LBFGS([p], lr=0.3, max_iter=4)
        calls: list[str] = []
        optimizer.register_step_pre_hook(lambda *_, c=calls: c.append("pre"))
        optimizer.register_step_post_hook(lambda *_, c=calls: c.append("post"))

        def closure(p: Parameter = p) -> Tensor:
            p.grad = None
            loss = (p.sin() + p.square() / 9).sum()
            loss.backward()
            return loss

        for target in ("fastopt", "torch", "fastopt"):
            optimizer.step(closure)
            if converted:
                assert fastopt.convert(optimizer, to=target) is optimizer
        if converted:
            assert type(optimizer) is LBFGS
            assert type(pickle.loads(pickle.dumps(optimizer))) is LBFGS
        optimizer.step(closure)
        assert calls == ["pre", "post"] * 4
        other = (torch.optim.LBFGS if converted else LBFGS)([p], lr=0.3, max_iter=4)
        other.load_state_dict(optimizer.state_dict())
        other.step(closure)
        results.append(p.detach())
    assert torch.equal(*results)

"""fastopt.explain says what happens, and makes nothing happen."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours
from fastopt import BackendUnavailable, dispatch

LOSSES = ("mse_loss", "l1_loss", "cross_entropy")
SIDE = 1280  # a square of it is larger than any crossover


def arguments(operation: str, side: int) -> tuple[Tensor, Tensor]:
    input = torch.randn(side, side, requires_grad=True)
    labels = operation == "cross_entropy"
    return input, torch.randint(0, side, (side,)) if labels else torch.randn(side, side)


MODULES = {
    "mse_loss": fastopt.nn.MSELoss,
    "l1_loss": fastopt.nn.L1Loss,
    "cross_entropy": fastopt.nn.CrossEntropyLoss,
}


@pytest.fixture
def loaded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The backends that calls run on, the reference left out."""
    names: list[str] = []
    load = dispatch.load

    def spy(name: str) -> Any:
        names.append(name)
        return load(name)

    monkeypatch.setattr(dispatch, "load", spy)
    return names


@pytest.mark.parametrize("side", [3, SIDE])
@pytest.mark.parametrize("operation", LOSSES)
def test_losses(operation: str, side: int, loaded: list[str]) -> None:
    """Of a function and of a module, by position and by name."""
    backend = "numba" if side == SIDE else "reference"
    input, target = arguments(operation, side)
    function, module = getattr(ours, operation), MODULES[operation](reduction="sum")
    for explanation in (
        fastopt.explain(function, input, target),
        fastopt.explain(function, input, target=target, reduction="none"),
        fastopt.explain(module, input, target),
        fastopt.explain(module, input=input, target=target),
    ):
        (decision,) = explanation
        assert decision.backend == backend
        assert decision.request.operation == operation
        assert decision.request.numel == side * side
        assert str(explanation) == str(decision)
        assert f": {backend}" in str(explanation)
    assert not loaded
    assert input._version == 0
    assert input.grad is None
    module(input, target)
    assert loaded == ["numba"] * (side == SIDE)


def test_module_options_count() -> None:
    input, target = arguments("cross_entropy", 4)
    module = fastopt.nn.CrossEntropyLoss(weight=torch.ones(4, requires_grad=True))
    assert "a gradient to the weight" in str(fastopt.explain(module, input, target))


def test_insisting() -> None:
    x = torch.randn(5)
    with fastopt.use_backend("numba"):
        (decision,) = explanation = fastopt.explain(ours.mse_loss, x, x)
        assert decision.backend == decision.insisted == "numba"
        assert "(insisted on with use_backend)" in str(explanation)
        with pytest.raises(BackendUnavailable, match="a gradient to the weight"):
            fastopt.explain(ours.mse_loss, x, x, weight=torch.randn(5, requires_grad=True))
    with fastopt.use_backend("triton"), pytest.raises(BackendUnavailable, match="device=cpu"):
        fastopt.explain(fastopt.optim.SGD([x]))


#: All but those that say something else of several dtypes, or of dense gradients.
EACH = [n for n in fastopt.optim._operations.OPTIMIZERS if n not in ("Adafactor", "SparseAdam")]


@pytest.mark.parametrize("backward", [False, True], ids=["before-backward", "after-backward"])
@pytest.mark.parametrize("operation", EACH)
def test_optimizers(operation: str, backward: bool, loaded: list[str]) -> None:
    """A decision a bucket: here two dtypes, and a parameter that torch has to update."""
    params = [torch.randn(s) for s in ((1, 5), (4, 3), (1, 7), (4, 6))]
    params = [*params[:2], params[2].double(), params[3][:, ::2]]
    params = [p.requires_grad_() for p in params]
    optimizer = getattr(fastopt.optim, operation)(params, lr=0.1)
    if backward:
        for p in params:
            p.grad = torch.ones_like(p)
    before = copy.deepcopy(optimizer.__getstate__())
    explanation = fastopt.explain(optimizer)
    assert [d.backend for d in explanation] == ["numba", "numba", "reference"]
    assert [d.request.numel for d in explanation] == [17, 7, 12]
    assert all(d.request.operation == operation for d in explanation)
    assert torch.float64 in explanation[1].request.dtypes
    assert "a parameter with gaps" in str(explanation)
    assert str(explanation) == "\n".join(map(str, explanation))

    assert not loaded
    assert bool(optimizer.state) == optimizer._made_early
    assert repr(optimizer.__getstate__()) == repr(before)
    assert all(p._version == 0 for p in params)
    assert all((p.grad is not None) == backward for p in params)
    optimizer.step()
    assert loaded == (["numba", "numba"] if backward or optimizer._made_early else [])


def test_after_a_step() -> None:
    """Explaining in the middle of a training changes nothing about the next step."""
    params = [torch.ones(5, requires_grad=True) for _ in range(2)]
    optimizers = [fastopt.optim.Adam([p], lr=0.1) for p in params]
    for _ in range(3):
        for param, optimizer in zip(params, optimizers, strict=True):
            param.grad = param.detach().clone()
            optimizer.step()
        (decision,) = fastopt.explain(optimizers[0])
        assert decision.backend == "numba"
        assert len(decision.request.dtypes) == 4, "parameter, gradient, two states"
    assert torch.equal(*params)


def test_nothing_to_update() -> None:
    param = torch.ones(5, requires_grad=True)
    optimizer = fastopt.optim.SGD([param])
    optimizer.param_groups.clear()
    explanation = fastopt.explain(optimizer)
    assert explanation == ()
    assert str(explanation) == "no parameters to update"


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (torch.nn.MSELoss(), "torch.nn.modules.loss.MSELoss"),
        (torch.nn.functional.mse_loss, "function"),
        (torch.optim.SGD([torch.ones(1)]), "torch.optim.sgd.SGD"),
        (fastopt.nn.MSELoss, "type"),
        (fastopt.optim.SGD, "type"),
        (None, "NoneType"),
    ],
)
def test_other_objects(target: Any, name: str) -> None:
    with pytest.raises(TypeError) as caught:
        fastopt.explain(target, torch.ones(1), torch.ones(1))
    for part in (name, "fastopt.nn", "fastopt.optim", "fastopt.nn.functional"):
        assert part in str(caught.value)


def test_arguments_that_are_no_tensors() -> None:
    with pytest.raises(TypeError, match="tensors"):
        fastopt.explain(ours.mse_loss, [1.0], [2.0])
    with pytest.raises(TypeError, match=r"mse_loss\(\) missing 1 required .*'target'"):
        fastopt.explain(ours.mse_loss, torch.ones(1))

"""What is remembered about a call must not serve another: calls that differ in one thing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.analysis import prepare
from fastopt.front.route import RouteCache
from fastopt.nn.mse import MSE

Calls = dict[str, Callable[[Any], Tensor]]


def pointwise_calls(name: str) -> Calls:
    x, y, z = torch.randn(3, 6, 8).unbind()
    square = torch.randn(8, 8)
    calls: Calls = {
        "positions": lambda f: f(x, y),
        "names": lambda f: f(input=x, target=y),
        "other names": lambda f: f(target=y, input=x),
        "half by name": lambda f: f(x, target=y, reduction="sum"),
        "exchanged": lambda f: f(y, x),
        "one tensor twice": lambda f: f(z, z),
        "one tensor twice by name": lambda f: f(target=z, input=z),
        "sum": lambda f: f(x, y, reduction="sum"),
        "none": lambda f: f(x, y, reduction="none").sum(),
        "deprecated": lambda f: f(x, y, size_average=False),
        "deprecated true": lambda f: f(x, y, size_average=True),
        "a target that is followed": lambda f: f(x, leaf(y)),
        "only the target is": lambda f: f(x.detach(), leaf(y)),
        "double": lambda f: f(x.double(), y.double()),
        "mixed": lambda f: f(x, y.bfloat16()),
        "negated": lambda f: f(torch._neg_view(x), y),
        "transposed": lambda f: f(square.t(), square.t() + 1),
        "one transposed": lambda f: f(square, square.t()),
        "weight": lambda f: f(x, y, weight=z.abs()),
        "autocast": in_autocast(lambda f: f(x.bfloat16(), y.bfloat16())),
        "no autocast": lambda f: f(x.bfloat16(), y.bfloat16()),
        "vmap": lambda f: torch.vmap(f)(x, y).sum(),
        "no grad": without_grad(lambda f: f(x, y)),
    }
    return {f"{name} {k}": v for k, v in calls.items()}


def class_calls() -> Calls:
    x, labels, weight = torch.randn(6, 5), torch.randint(0, 5, (6,)), torch.rand(5)
    square, p = torch.randn(6, 6), torch.rand(6, 5).softmax(1)
    small = (x / 8).bfloat16()  # of larger logits torch's own log-softmax is 2 % off, rounded
    calls: Calls = {
        "positions": lambda f: f(x, labels),
        "names": lambda f: f(target=labels, input=x),
        "weight": lambda f: f(x, labels, weight),
        "weight by name": lambda f: f(x, labels, weight=weight),
        "weight of none": lambda f: f(x, labels, weight=None),
        "followed weight": lambda f: f(x, p, weight=leaf(weight)),
        "ignored": lambda f: f(x, labels, ignore_index=2),
        "ignored 1": lambda f: f(x, labels, ignore_index=1),
        "ignored by position": lambda f: f(x, labels, None, None, 3),
        "smoothing 1": lambda f: f(x, labels, label_smoothing=1),
        "smoothing 1.0": lambda f: f(x, labels, label_smoothing=1.0),
        "smoothing 0.1": lambda f: f(x, labels, label_smoothing=0.1),
        "bytes": lambda f: f(x, labels.to(torch.uint8)),
        "square": lambda f: f(square, labels),
        "square transposed": lambda f: f(square.t(), labels),
        "probabilities": lambda f: f(x, p),
        "probabilities transposed": lambda f: f(x, p.t().contiguous().t()),
        "followed probabilities": lambda f: f(x, leaf(p)),
        "negated": lambda f: f(torch._neg_view(x), labels),
        "one position": lambda f: f(x[0], labels[0]),
        "sum": lambda f: f(x, labels, reduction="sum"),
        "autocast": in_autocast(lambda f: f(small, labels)),
        "no autocast": lambda f: f(small, labels),
        "no grad": without_grad(lambda f: f(x, labels)),
    }
    return calls


def leaf(t: Tensor) -> Tensor:
    return t.detach().requires_grad_()


def in_autocast(call: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def inside(f: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return call(f)

    return inside


def without_grad(call: Callable[[Any], Tensor]) -> Callable[[Any], Tensor]:
    def inside(f: Any) -> Tensor:
        with torch.no_grad():
            return call(f)

    return inside


def outcome(call: Callable[[Any], Tensor], function: Any) -> list[Tensor]:
    """The loss, and the gradients to the first floating tensors that it is given as leaves."""
    given: list[Tensor] = []

    def spied(*args: Any, **kwargs: Any) -> Tensor:
        followed = torch.is_grad_enabled() and not torch._C._are_functorch_transforms_active()
        known: dict[int, Tensor] = {}

        def follow(value: Any) -> Any:
            if not followed or not isinstance(value, Tensor) or not value.is_floating_point():
                return value
            if value.requires_grad:
                given.append(value)
            elif id(value) not in known and value.dim() and len(given) < 1:
                known[id(value)] = value.detach().requires_grad_()
                given.append(known[id(value)])
            return known.get(id(value), value)

        return function(*list(map(follow, args)), **{k: follow(v) for k, v in kwargs.items()})

    loss = call(spied)
    grads = torch.autograd.grad(loss, given) if loss.requires_grad else ()
    return [loss.detach(), *grads]


@pytest.mark.parametrize("quick", [True, False], ids=["any backend", "compiled if possible"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "cross_entropy"])
@pytest.mark.filterwarnings("ignore:size_average and reduce args will be deprecated:UserWarning")
def test_calls_in_any_order(
    name: str, quick: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not quick:
        request.getfixturevalue("no_crossovers")
    monkeypatch.setattr(RouteCache, "OFTEN", 1)
    calls = class_calls() if name == "cross_entropy" else pointwise_calls(name)
    expected = {k: outcome(call, getattr(theirs, name)) for k, call in calls.items()}
    order = [*calls, *calls, *calls]
    order = [order[k] for k in torch.randperm(len(order)) for _ in range(2)]
    try:
        for which in order:
            found = outcome(calls[which], getattr(ours, name))
            torch.testing.assert_close(
                found, expected[which], rtol=2e-2 if "autocast" in which else 1e-5, atol=1e-6,
                msg=lambda text, which=which: f"{which}: {text}",
            )  # fmt: skip
    finally:
        RouteCache.forget()


def test_insisting_counts_anew() -> None:
    x, y = torch.randn(7, 3), torch._neg_view(torch.randn(7, 3))
    for _ in range(2):
        ours.mse_loss(x, y)
        with fastopt.use_backend(BACKEND), pytest.raises(fastopt.BackendUnavailable):
            ours.mse_loss(x, y)
        with fastopt.use_backend("reference"):
            ours.mse_loss(x, y)
        with fastopt.use_backend(BACKEND):
            ours.mse_loss(x, x + 1)


def test_cache_is_bounded() -> None:
    cache = RouteCache()
    x = torch.zeros(2, 2)
    call = prepare("mse_loss", MSE(), ("mean",), "mean", torch.float32, (x, x + 1, None), [])
    for k in range(3 * cache.LIMIT):
        cache.settle(("key", k), call, (0, 1, None))
        assert len(cache._known) <= cache.LIMIT
    assert cache.find(("key", 3 * cache.LIMIT - 1), (), (x, x + 1)) is not None

"""The same call again is told in one question, and every other call is told from it."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import torch
from cases import DEVICE, INTERPRETED
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import Parameter

import fastopt
from fastopt.front import route
from fastopt.nn import functional

if INTERPRETED or DEVICE != "cpu":
    pytest.skip("compiled code for CPUs asks", allow_module_level=True)

recognition = fastopt.dispatch.load("numba").Recognition


def test_it_is_there() -> None:
    assert fastopt.dispatch.load("numba").recognises()


def leaf(*sizes: int) -> Tensor:
    return torch.randn(*sizes).requires_grad_()


def released() -> Tensor:
    t = leaf(3, 4)
    t.untyped_storage().resize_(0)
    return t


def left_behind() -> Tensor:
    kept: list[Tensor] = []
    torch.func.vmap(lambda t: kept.append(t) or t)(torch.randn(2, 3, 4))
    return kept[0]


class Sub(Tensor):
    pass


#: First arguments that are not what a leaf of 3 x 4 numbers is.
OTHERS: dict[str, Callable[[], Any]] = {
    "another size": lambda: leaf(4, 4),
    "fewer dimensions": lambda: leaf(12),
    "other strides": lambda: torch.randn(4, 3).t().requires_grad_(),
    "another dtype": lambda: torch.randn(3, 4).double().requires_grad_(),
    "no gradient": lambda: torch.randn(3, 4),
    "no gradient any more": lambda: leaf(3, 4).requires_grad_(False),
    "no gradient inside of it": lambda: leaf(3, 4).detach(),
    "negated": lambda: torch._neg_view(torch.randn(3, 4)).requires_grad_(),
    "a parameter": lambda: Parameter(torch.randn(3, 4)),
    "a subclass": lambda: torch.randn(3, 4).as_subclass(Sub).requires_grad_(),
    "released": released,
    "on the meta device": lambda: torch.empty(3, 4, device="meta").requires_grad_(),
    "sparse": lambda: torch.eye(3, 4).to_sparse().requires_grad_(),
    "what vmap has left behind": left_behind,
    "no tensor": lambda: 3.0,
    "None": lambda: None,
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_tensors(other: str) -> None:
    labels, number = torch.zeros(3).long(), 0.5
    known = recognition((leaf(3, 4), labels, number, "mean", None))
    assert known.fits((leaf(3, 4), torch.ones(3).long(), number, "mean", None))
    assert known.fits((leaf(3, 4) * 2, labels, number, "mean", None)), "no leaf, but followed"
    assert not known.fits((OTHERS[other](), labels, number, "mean", None))


def test_other_arguments() -> None:
    x, y = leaf(3, 4), torch.zeros(3).long()
    known = recognition((x, y, None, "mean"))
    assert known.fits((x, y, None, "mean"))
    others: list[tuple[Any, ...]] = [
        (x, y), (x, y, None), (x, y, None, "sum"), (x, y, "mean", None), (y, x, None, "mean"),
        (x, y, y, "mean"), (x, y, None, "mean", None), (x, None, None, "mean"), (),
    ]  # fmt: skip
    for things in others:
        assert not known.fits(things)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_surroundings() -> None:
    x = torch.randn(3)
    known = recognition((x,))
    found = []
    with torch.overrides.BaseTorchFunctionMode():
        found.append(known.fits((x,)))
    with torch.utils._python_dispatch.TorchDispatchMode():
        found.append(known.fits((x,)))

    def asked(t: Tensor) -> Tensor:
        found.append(known.fits((x,)))
        return t

    torch.func.vmap(asked)(torch.randn(2, 2))
    torch.func.grad(lambda t: asked(t).sum())(x)
    torch.func.functionalize(asked)(x)
    torch.jit.trace(asked, x, check_trace=False)
    assert found == [False] * 6
    assert known.fits((x,))


@pytest.fixture
def cache(no_crossovers: None) -> route.RouteCache:
    """Of mse_loss, which has been called with these sizes often enough."""
    caches = [c for c in route.RouteCache._all if not c._known]
    for _ in range(1 + route.RouteCache.OFTEN):
        functional.mse_loss(leaf(3, 4), torch.zeros(3, 4), reduction="sum")
    (found,) = (c for c in caches if c._known)
    return found


def test_calls_are_recognised(cache: route.RouteCache) -> None:
    x, y = leaf(3, 4), torch.ones(3, 4)
    assert cache.recognise({"reduction": "sum"}, (x, y, "sum")) is not None
    others: list[tuple[Any, tuple[Any, ...]]] = [
        ({"reduction": "sum"}, (x, y, "mean")),
        ({"reduce": "sum"}, (x, y, "sum")),
        ({}, (x, y, "sum")),
        ({}, (x, y, "sum", "reduction")),
        ({"reduction": "sum"}, (x, y, y, "sum")),
    ]
    for names, values in others:
        assert cache.recognise(names, values) is None


def test_around_a_recognised_call(cache: route.RouteCache) -> None:
    x, y = leaf(3, 4), torch.ones(3, 4)
    same = {"reduction": "sum"}, (x, y, "sum")
    with fastopt.use_backend("reference"):
        assert cache.recognise(*same) is None
    with torch.autocast("cpu"):
        assert cache.recognise(*same) is None
    with forward_ad.dual_level():
        assert cache.recognise(*same) is None
    assert cache.recognise(*same) is not None
    route.RouteCache.forget()
    assert cache.recognise(*same) is None


def test_autocast_is_not_recognised_outside(no_crossovers: None) -> None:
    x, y = torch.randn(2, 3, 4, dtype=torch.bfloat16).unbind()
    for _ in range(2 * route.RouteCache.OFTEN):
        with torch.autocast("cpu"):
            assert functional.mse_loss(x, y).dtype == torch.float32
    assert functional.mse_loss(x, y).dtype == torch.bfloat16


def test_a_list_that_others_refer_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many refer to it may be the number by which its items are found."""
    from fastopt.kernels.numba import tensors

    expected = tensors.torch_functions().items_at
    for held in range(4):
        find: Any = tensors._offset
        for _ in range(held):
            find = partial(find)  # each of them holds its arguments
        with monkeypatch.context() as patch:
            patch.setattr(tensors, "_offset", find)
            assert tensors._items_offset() == expected


def test_threads_that_ask_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """All have addresses in what stays for the process's life, and none in what one has made."""
    from fastopt.kernels.numba import tensors

    together, threads = threading.Barrier(4), ThreadPoolExecutor(4)

    class Made(tensors.Torch):
        def __init__(self) -> None:
            together.wait(60)  # all of them are in the middle of it
            super().__init__()

    monkeypatch.setattr(tensors, "Torch", Made)
    monkeypatch.setattr(tensors, "_found", {})
    with threads:
        jobs = [threads.submit(tensors.torch_functions) for _ in range(4)]
        found = {id(job.result()) for job in jobs}
    assert found == {id(tensors.torch_functions())}

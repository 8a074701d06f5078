"""What a loss keeps for its backward pass: hooks see all of it, and it goes when torch's does."""

from __future__ import annotations

import gc
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND
from torch import Tensor
from torch.autograd.graph import disable_saved_tensors_hooks, save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from watching import watch_losses

import fastopt
import fastopt.nn.functional as ours
from fastopt.front import autograd
from fastopt.front.route import RouteCache
from fastopt.kernels.numba import memory

ROWS, CLASSES = 300, 1000
UNIT = ROWS * CLASSES * 4  # bytes of a gradient, which is large enough for the pool
each_loss = pytest.mark.parametrize("name", ["cross_entropy", "l1_loss", "mse_loss"])


@pytest.fixture(autouse=True)
def fixed(no_crossovers: None) -> Iterator[None]:
    torch.manual_seed(0)
    RouteCache.forget()  # what other tests' backward passes have asked for
    fastopt.empty_cache()
    yield
    fastopt.empty_cache()


def arguments(name: str) -> tuple[Tensor, Tensor]:
    x = torch.randn(ROWS, CLASSES)
    if name == "cross_entropy":
        return x, torch.randint(CLASSES, (ROWS,))
    return x, torch.randn(ROWS, CLASSES)


def live() -> float:
    """Gradients that are alive, by their bytes, those that wait for reuse left out."""
    gc.collect()
    held = [b.size for b in memory._buffers if memory._holders(b.owner) > 1]
    return sum(size for size in held if size > UNIT / 2) / UNIT


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> Callable[[], float]:
    """The pool remembers every gradient that it has made, and so can tell who is alive."""
    monkeypatch.setattr(memory, "_buffers", deque())
    monkeypatch.setattr(memory, "kept_bytes", lambda: 1 << 40)
    leaf = torch.randn(ROWS, CLASSES, requires_grad=True)
    ours.mse_loss(leaf, torch.zeros(ROWS, CLASSES)).backward()
    assert 0.9 < live() < 1.1, "gradients are seen"
    del leaf
    assert live() == 0
    return live


def pack(tensor: Tensor) -> Tensor:
    return tensor.detach().clone()


def unpack(tensor: Tensor) -> Tensor:
    return tensor


# -- checkpointing, offloading, hooks ---------------------------------------------------------


@each_loss
@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_checkpointed_chunks(
    name: str, scale: float, traced: Callable[[], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The head and its loss chunk by chunk: forward keeps none, backward one gradient at a time."""
    left: list[Any] = []
    watch_losses(monkeypatch, lambda _, result: left.append(result[1]))
    chunks = [arguments(name) for _ in range(4)]
    grads = {}
    for module in (ours, theirs):
        leaves = [x.clone().requires_grad_() for x, _ in chunks]
        total: Any = sum(
            checkpoint(
                lambda h, t, module=module: getattr(module, name)(h * 2, t),
                leaf, second, use_reentrant=False,
            )
            for leaf, (_, second) in zip(leaves, chunks, strict=True)
        )  # fmt: skip
        if module is ours:
            assert traced() < 0.5
        (total * scale).backward()
        grads[module] = [leaf.grad for leaf in leaves]
    torch.testing.assert_close(grads[ours], grads[theirs])
    assert left == [None] * 8  # the first time and the second; the backward pass computed them


@each_loss
@pytest.mark.parametrize("last", [True, False])
def test_recomputation_that_is_left_early(
    name: str, last: bool, traced: Callable[[], float]
) -> None:
    """Where the loss comes last, an exception leaves the second forward pass in its middle."""
    x, second = arguments(name)
    dead: list[weakref.ref[Tensor]] = []

    def region(z: Tensor) -> Tensor:
        z = z * 1.0
        dead.append(weakref.ref(z))
        loss: Tensor = getattr(ours, name)(z, second)
        return loss if last else loss * 2.0

    for k in range(6):
        leaf = x.clone().requires_grad_()
        (checkpoint(region, leaf, use_reentrant=False) * (1.0 if k < 3 else 0.37)).backward()
        del leaf
        assert traced() < 0.5
    assert len(dead) == 12
    assert all(made() is None for made in dead)


def offloading() -> AbstractContextManager[None]:
    context: AbstractContextManager[None] = save_on_cpu()
    return context


@each_loss
@pytest.mark.parametrize("factor", [1.0, 3.0])
@pytest.mark.parametrize(
    "hooks", [offloading, lambda: saved_tensors_hooks(pack, unpack)], ids=["save_on_cpu", "own"]
)
def test_hooks_see_all_that_is_kept(
    name: str, factor: float, hooks: Callable[[], Any], traced: Callable[[], float]
) -> None:
    x, second = arguments(name)
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with hooks():
            loss = getattr(module, name)(leaf, second)
        if module is ours:
            assert traced() < 0.5
        (loss * factor).backward()
        grads.append(leaf.grad)
    torch.testing.assert_close(grads[0], grads[1])


@each_loss
def test_an_error_in_a_hook(name: str, traced: Callable[[], float]) -> None:
    """It comes through, and leaves nothing behind."""

    def refuse(tensor: Tensor) -> Tensor:
        raise ValueError(f"no {tensor.dim()}")

    x, second = arguments(name)
    for _ in range(3):
        with saved_tensors_hooks(refuse, unpack), pytest.raises(ValueError, match="no "):
            getattr(ours, name)(x.clone().requires_grad_(), second)
    assert traced() < 0.5


@pytest.mark.parametrize("ask", [autograd._top_hooks, autograd._probe_hooks])
def test_hooks_are_noticed(ask: Callable[[bool], object]) -> None:
    """By the question torch has for it, and by the one for older ones, which changes nothing."""
    for _ in range(2):
        assert ask(True) is None
        with saved_tensors_hooks(pack, unpack):
            assert ask(True) is not None
            with save_on_cpu():
                assert ask(True) is not None
            assert ask(True) is not None
        with disable_saved_tensors_hooks("not here"):
            assert ask(True) is None
            with pytest.raises(RuntimeError, match="not here"), saved_tensors_hooks(pack, unpack):
                pass
    with saved_tensors_hooks(pack, unpack):  # allowed again
        pass


# -- who reads the graph ----------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        *((name, {}) for name in ("cross_entropy", "l1_loss", "mse_loss")),
        ("cross_entropy", {"weight": torch.rand(CLASSES)}),
        ("cross_entropy", {"label_smoothing": 0.1}),
    ],
)
def test_saved_tensors_are_tensors(name: str, reduction: str, options: dict[str, Any]) -> None:
    """Those who draw a graph read the sizes of all that it has saved."""
    x, second = arguments(name)
    x, second = x[:9].clone().requires_grad_(), second[:9]
    with fastopt.use_backend(BACKEND):
        loss = getattr(ours, name)(x, second, reduction=reduction, **options)
    node = loss.grad_fn
    saved = node.saved_tensors
    assert all(isinstance(tensor, Tensor) for tensor in saved)
    sizes = [tuple(tensor.size()) for tensor in saved]
    assert sizes[:2] == [(9, CLASSES), tuple(second.shape)]
    assert ((CLASSES,) in sizes) == ("weight" in options)
    assert len(node._raw_saved_tensors) == len(saved)
    torch.autograd.grad(loss.sum(), x)


# -- no longer than torch ---------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("factor", [1.0, 3.0])
def test_nothing_is_kept_after_backward(
    name: str, factor: float, traced: Callable[[], float]
) -> None:
    """While the loss itself lives on; a second backward pass is torch's error."""
    x, second = arguments(name)
    leaf = x.clone().requires_grad_()
    z = leaf * 1.0
    freed = weakref.ref(z)
    loss = getattr(ours, name)(z, second)
    (loss * factor).backward()
    leaf.grad = None
    del z
    assert traced() < 0.5
    if factor != 1:  # torch itself drops what it has saved
        assert freed() is None
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@each_loss
def test_threads_that_go_back_through_one_graph(name: str) -> None:
    """The gradients left behind are handed to one of them alone."""
    x, second = arguments(name)
    reference = x.clone().requires_grad_()
    getattr(theirs, name)(reference, second).backward()
    for _ in range(10):
        leaf = x.clone().requires_grad_()
        loss = getattr(ours, name)(leaf, second)
        with ThreadPoolExecutor(4) as pool:
            jobs = [
                pool.submit(torch.autograd.grad, loss, leaf, retain_graph=True) for _ in range(4)
            ]
            grads = [job.result()[0] for job in jobs]
        assert len({grad.data_ptr() for grad in grads}) == 4
        for grad in grads:
            torch.testing.assert_close(grad, reference.grad)

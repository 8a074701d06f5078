"""Large gradients: their memory is reused once nobody can see it any more, and never before."""

from __future__ import annotations

import gc
import threading
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours

SHAPE = (1024, 300)
BYTES = 1024 * 300 * 4


@pytest.fixture(autouse=True)
def empty() -> Iterator[None]:
    fastopt.empty_cache()
    yield
    fastopt.empty_cache()


@pytest.fixture(params=["mse_loss", "l1_loss", "cross_entropy"])
def operation(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


def gradient(operation: str) -> Tensor:
    """A new large gradient, from random data."""
    input = torch.randn(SHAPE, requires_grad=True)
    labels = operation == "cross_entropy"
    target = torch.randint(0, SHAPE[1], SHAPE[:1]) if labels else torch.randn(SHAPE)
    with fastopt.use_backend("numba"):
        getattr(ours, operation)(input, target).backward()
    assert input.grad is not None
    return input.grad


def test_memory_is_reused(operation: str) -> None:
    found = gradient(operation)
    first = found.data_ptr()
    del found
    assert gradient(operation).data_ptr() == first
    assert gradient(operation).data_ptr() == first


def contents(held: Any) -> np.ndarray:
    if isinstance(held, torch.UntypedStorage):
        held = torch.empty(0).set_(held)
    return np.asarray(held)


@pytest.mark.parametrize(
    "hold",
    [
        lambda g: g,
        lambda g: g[-1],
        lambda g: g.t()[:, ::2],
        lambda g: g.detach(),
        lambda g: g.view(torch.int32)[5],
        lambda g: g.numpy()[-1],
        lambda g: memoryview(g.numpy()),
        lambda g: g.untyped_storage(),
        lambda g: np.from_dlpack(g),
    ],
    ids=["itself", "row", "view", "detached", "dtype", "numpy", "memoryview", "storage", "dlpack"],
)
def test_kept_gradient_stays(operation: str, hold: Callable[[Tensor], Any]) -> None:
    """Whatever of it the user keeps, and many steps later."""
    held = hold(gradient(operation))
    gc.collect()
    before = contents(held).copy()
    for _ in range(6):
        gradient(operation)
    np.testing.assert_array_equal(contents(held), before)


def test_gradients_of_one_step_are_apart() -> None:
    """Both arguments' gradients, accumulated over several losses that share a graph."""
    input, target = (torch.randn(SHAPE, requires_grad=True) for _ in range(2))
    expected = [torch.zeros(SHAPE), torch.zeros(SHAPE)]
    with fastopt.use_backend("numba"):
        for scale in (1.0, 2.0, 3.0):
            ours.mse_loss(input * scale, target, reduction="sum").backward()
            difference = 2 * (input.detach() * scale - target.detach())
            expected[0] += difference * scale
            expected[1] -= difference
    torch.testing.assert_close([input.grad, target.grad], expected)


def traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]


def test_empty_cache_gives_memory_back() -> None:
    gradient("mse_loss")  # whatever the first call allocates besides
    fastopt.empty_cache()
    tracemalloc.start()
    try:
        before = traced()
        kept = gradient("mse_loss")
        gradient("mse_loss")
        assert traced() - before > 1.9 * BYTES
        fastopt.empty_cache()
        assert 0.9 * BYTES < traced() - before < 1.1 * BYTES, "the kept gradient stays"
        expected = kept.clone()
        gradient("mse_loss")
        assert torch.equal(kept, expected)
        del kept
        fastopt.empty_cache()
        assert traced() - before < 0.1 * BYTES
    finally:
        tracemalloc.stop()


def test_few_buffers_are_kept() -> None:
    """What waits for reuse is bounded, however many gradients there were at a time."""
    gradient("mse_loss")
    fastopt.empty_cache()
    tracemalloc.start()
    try:
        before = traced()
        many = [gradient("mse_loss") for _ in range(12)]
        assert traced() - before > 11 * BYTES
        del many
        assert traced() - before < 5 * BYTES
    finally:
        tracemalloc.stop()


def test_a_small_gradient_takes_no_large_buffer() -> None:
    large = torch.randn(16, *SHAPE, requires_grad=True)
    with fastopt.use_backend("numba"):
        ours.mse_loss(large, torch.zeros_like(large)).backward()
    first = large.grad.data_ptr() if large.grad is not None else 0
    del large
    assert gradient("mse_loss").data_ptr() != first


def test_threads(operation: str) -> None:
    """Several threads make, keep and drop gradients at once."""
    together = threading.Barrier(4)

    def work(worker: int) -> bool:
        generator = torch.Generator().manual_seed(worker)
        input = torch.randn(SHAPE, generator=generator)
        labels = operation == "cross_entropy"
        target = torch.randn(SHAPE, generator=generator)
        if labels:
            target = torch.randint(0, SHAPE[1], SHAPE[:1], generator=generator)
        expected = None
        together.wait()
        for _ in range(25):
            leaf = input.clone().requires_grad_()
            with fastopt.use_backend("numba"):
                getattr(ours, operation)(leaf, target).backward()
            if expected is None:
                expected = leaf.grad
            if not torch.equal(leaf.grad, expected):
                return False
        leaf = input.clone().requires_grad_()
        getattr(torch.nn.functional, operation)(leaf, target).backward()
        return torch.allclose(expected, leaf.grad, rtol=1e-5, atol=1e-9)

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))


def test_memory_crosses_threads() -> None:
    """Made in one thread, dropped in another, reused in a third."""
    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(1) as another:
        made = [one.submit(gradient, "mse_loss").result()]
        first = made[0].data_ptr()
        made.clear()
        assert another.submit(lambda: gradient("mse_loss").data_ptr()).result() == first

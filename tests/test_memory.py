"""Large gradients: their memory is reused once nobody can see it any more, and never before."""

from __future__ import annotations

import ctypes
import gc
import mmap
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from children import run
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


# -- how much is kept -------------------------------------------------------------------

linux = pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux")
ROWS = 10_000
LARGE = ROWS * 1000 * 4  # bytes; malloc gives so much back at once


def resident() -> int:
    """Bytes of this process; the allocator has given back what it can, else it does so anytime."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def large_gradient(functional: Any = ours, rows: int = ROWS) -> Tensor:
    """Of rows that are one in memory, so that the gradient is all there is."""
    input = torch.zeros(1, 1000).expand(rows, 1000).requires_grad_()
    functional.cross_entropy(input, torch.zeros(rows, dtype=torch.int64)).backward()
    assert input.grad is not None
    return input.grad


@linux
def test_empty_cache_gives_memory_back() -> None:
    large_gradient()  # whatever the first call allocates besides
    gc.collect()  # what is in a cycle with a gradient would give its memory back later
    fastopt.empty_cache()
    before = resident()
    kept = large_gradient()
    large_gradient()
    assert resident() - before > 1.9 * LARGE
    fastopt.empty_cache()
    assert 0.9 * LARGE < resident() - before < 1.1 * LARGE, "the kept gradient stays"
    expected = kept.clone()
    large_gradient()
    assert torch.equal(kept, expected)
    del kept, expected
    fastopt.empty_cache()
    assert resident() - before < 0.1 * LARGE


@linux
@pytest.mark.parametrize("bound", ["buffers", "bytes"])
def test_few_buffers_are_kept(bound: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What waits for reuse is bounded, however many gradients there were at a time."""
    from fastopt.kernels.numba import memory

    if bound == "bytes":
        monkeypatch.setattr(memory, "kept_bytes", lambda: 2 * LARGE)
    large_gradient()
    fastopt.empty_cache()
    before = resident()
    many = [large_gradient() for _ in range(8)]
    assert resident() - before > 7 * LARGE
    first = {g.data_ptr() for g in many}
    del many
    left = (resident() - before) / LARGE
    assert left < (2.2 if bound == "bytes" else 4.2)
    assert large_gradient().data_ptr() in first, "some do wait"


@linux
def test_nothing_above_the_bound_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.kernels.numba import memory

    monkeypatch.setattr(memory, "kept_bytes", lambda: LARGE // 2)
    large_gradient()
    before = resident()
    large_gradient()
    assert resident() - before < 0.1 * LARGE


def out_of_memory() -> None:
    """First torch's error where there is none at all; then what waits for reuse makes room."""
    import resource

    def limit(more: int) -> None:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * mmap.PAGESIZE
        resource.setrlimit(resource.RLIMIT_AS, (used + more, resource.RLIM_INFINITY))

    torch.set_num_threads(1)
    large_gradient(rows=1000)
    fastopt.empty_cache()
    limit(LARGE)
    for functional in (torch.nn.functional, ours):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            large_gradient(functional, 3 * ROWS)
    limit(20 * LARGE)
    kept = [large_gradient() for _ in range(4)]
    del kept
    limit(LARGE)
    found = large_gradient(rows=3 * ROWS)  # it fits, as four times as much is let go
    right = torch.full((1000,), 1 / 1000)
    right[0] -= 1
    torch.testing.assert_close(found[-1], right / (3 * ROWS))
    del found
    fastopt.empty_cache()
    input = torch.zeros(2 * ROWS, 1000)
    limit(LARGE)
    for functional in (torch.nn.functional, ours):
        with pytest.raises(RuntimeError, match="can't allocate memory"):
            functional.mse_loss(input, input, reduction="none")


@linux
def test_out_of_memory() -> None:
    run(out_of_memory)


# -- torch's own memory -----------------------------------------------------------------


@pytest.mark.parametrize("act", ["release", "grow", "out", "release and grow", "share"])
def test_gradients_can_be_resized_and_released(operation: str, act: str) -> None:
    """And what has been done to one is not seen in any later one."""
    held = []
    for _ in range(3):
        found = gradient(operation)
        before = found.clone()
        if act.startswith("release"):
            found.untyped_storage().resize_(0)
            if act != "release":
                found.untyped_storage().resize_(BYTES)
                found.copy_(before)
                held.append((found, before))
        elif act == "grow":
            found.resize_(2 * SHAPE[0], SHAPE[1])
            found[SHAPE[0] :] = 7
            assert torch.equal(found[: SHAPE[0]], before)
            held.append((found, found.clone()))
        elif act == "out":
            torch.cat((before, before), out=found.resize_(0))
            held.append((found, torch.cat((before, before))))
        else:
            found.share_memory_()
            held.append((found, before))
    for _ in range(5):
        other = gradient(operation)
        assert other.untyped_storage().nbytes() >= BYTES
        other.fill_(float("nan"))
    for found, before in held:
        assert torch.equal(found, before)


def test_shared_memory_is_not_used_again() -> None:
    """Another process may see it after the last tensor here has gone."""
    found = gradient("mse_loss")
    storage = found.untyped_storage().share_memory_()
    assert found.is_shared()
    twin = torch.UntypedStorage._new_shared_filename_cpu(*storage._share_filename_cpu_())
    there = torch.empty(0).set_(twin)  # type: ignore[call-overload]
    before = there.clone()
    del found, storage
    for _ in range(5):
        gradient("mse_loss").fill_(float("nan"))
    assert torch.equal(there, before)


@pytest.mark.parametrize("save", ["tensor", "view", "hook"])
def test_what_autograd_holds_stays(save: str) -> None:
    """A graph holds memory without any Python object."""
    found = gradient("mse_loss")
    weight = torch.randn(SHAPE, requires_grad=True)
    right = found.clone()
    if save == "hook":
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t.detach(), lambda t: t):
            product = weight * found
    else:
        product = weight * (found if save == "tensor" else found.view(-1).view(SHAPE))
    del found
    for _ in range(5):
        gradient("mse_loss").fill_(float("nan"))
    assert torch.equal(torch.autograd.grad(product.sum(), weight)[0], right)


def test_without_a_count_of_holders(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a torch that does not say who holds a storage, no memory is used twice."""
    from fastopt.kernels.numba import memory

    memory._holders_are_counted.cache_clear()
    monkeypatch.setattr(memory, "_use_count", None)
    try:
        found = [gradient("mse_loss") for _ in range(3)]
        before = [g.clone() for g in found]
        gradient("mse_loss")
        assert all(map(torch.equal, found, before))
        assert not memory._buffers
    finally:
        memory._holders_are_counted.cache_clear()


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

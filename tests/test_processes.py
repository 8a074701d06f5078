"""Threads, forked children and torch's thread count: fastopt is a guest in the process."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import llvmlite.binding as llvm
import numpy as np
import pytest
import torch
from children import HANG, LENGTH, assert_right, assert_same, results, run

import fastopt

EACH = pytest.mark.parametrize("openmp", [True, False], ids=["torch's", "Python's"])
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")


def without_openmp() -> None:
    """From here on in this process, as where torch's own threads can't be entered."""
    from fastopt.kernels.numba import openmp, python_threads

    functions = dict(zip(openmp.NAMES, python_threads.FUNCTIONS, strict=True))
    for name, function in functions.items():
        llvm.add_symbol(f"fastopt_{name}", ctypes.cast(function, ctypes.c_void_p).value)


# -- several Python threads -------------------------------------------------------------


def threads_at_once(openmp: bool) -> None:
    """The first launches of all kernels, from four threads at a time, and some more."""
    if not openmp:
        without_openmp()
    torch.set_num_threads(2)
    together = threading.Barrier(4)

    def work(seed: int) -> list[list[np.ndarray]]:
        together.wait()
        found = [results(seed) for _ in range(3)]
        assert torch.get_num_threads() == 2
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    for seed, repetitions in enumerate(found):
        alone = results(seed)
        for repetition in repetitions:
            assert_same(repetition, alone)
        assert_right(alone, seed)


@EACH
def test_threads_at_once(openmp: bool) -> None:
    run(threads_at_once, openmp)


# -- forked children --------------------------------------------------------------------


def in_fork(function: Callable[[], None]) -> None:
    """Call a function in a forked child, which must succeed."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(HANG // 2)  # a child that hangs outlives its parent's end
            function()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def fork_after_use(openmp: bool) -> None:
    if not openmp:
        without_openmp()
    torch.set_num_threads(2)
    expected = results(0)

    def check() -> None:
        from fastopt.kernels.numba import flat, multi_tensor, softmax_schedule, threads

        assert_same(results(0), expected)
        assert threads.parts_for(1 << 30, 1) == 1, "a forked child runs serially"
        for loop in (flat, multi_tensor, softmax_schedule):  # and whatever has been decided
            loop.parts_for = lambda work, grain: 2
        assert_same(results(0), expected)

    in_fork(check)
    in_fork(lambda: in_fork(check))
    assert_same(results(0), expected)  # the parent goes on in parallel
    assert_right(expected, 0)


@forks
@EACH
def test_fork_after_use(openmp: bool) -> None:
    run(fork_after_use, openmp)


def fork_while_stepping() -> None:
    """The child inherits an optimizer in the middle of its training."""
    torch.set_num_threads(2)
    param = torch.zeros(LENGTH, requires_grad=True)
    param.grad = torch.ones(LENGTH)
    optimizer = fastopt.optim.SGD([param], lr=0.5, momentum=0.5)
    optimizer.step()

    def one_more() -> None:
        optimizer.step()
        assert (param.detach().numpy() == -1.25).all()

    in_fork(one_more)
    assert (param.detach().numpy() == -0.5).all(), "the child has a copy of its own"
    one_more()


@forks
def test_fork_while_stepping() -> None:
    run(fork_while_stepping)


def pool_of_forks() -> None:
    torch.set_num_threads(2)
    expected = [results(seed) for seed in range(3)]
    with multiprocessing.get_context("fork").Pool(2) as pool:
        for found, here in zip(pool.map(results, range(3)), expected, strict=True):
            assert_same(found, here)


@forks
def test_multiprocessing_with_forks() -> None:
    run(pool_of_forks)


def fork_before_use(parent: str) -> None:
    """Fork from a parent that has imported fastopt and done something else in parallel."""
    torch.set_num_threads(2)
    if parent == "torch":
        torch.ones(1 << 20).add(1)
    elif parent == "numba":
        import numba

        @numba.njit(parallel=True)
        def fill(array: np.ndarray) -> None:
            for i in numba.prange(array.size):
                array[i] = i

        fill(np.zeros(1 << 20))

    def check() -> None:
        found = results(0)
        torch.set_num_threads(1)  # torch's own parallel loops hang in a forked child
        assert_right(found, 0)

    in_fork(check)


@forks
@pytest.mark.parametrize("parent", ["idle", "torch", "numba"])
def test_fork_before_use(parent: str) -> None:
    run(fork_before_use, parent)


# -- torch's thread count ---------------------------------------------------------------


def thread_counts(first: int | None) -> None:
    """Results are the same for any number of threads, and nobody changes that number."""
    if first is not None:
        torch.set_num_threads(first)
    before = torch.get_num_threads()
    expected = results(0)
    assert torch.get_num_threads() == before
    for count in (1, 2, 3, 4):
        torch.set_num_threads(count)
        found = results(0)
        assert torch.get_num_threads() == count
        assert_same(found, expected)
        with ThreadPoolExecutor(1) as other:
            assert_same(other.submit(results, 0).result(), expected)
            assert other.submit(torch.get_num_threads).result() == count
    assert_right(expected, 0)


@pytest.mark.parametrize("first", [None, 1, 2, 3])
def test_thread_counts(first: int | None) -> None:
    run(thread_counts, first)


@pytest.mark.parametrize("variable", ["OMP_NUM_THREADS", "NUMBA_NUM_THREADS"])
def test_thread_counts_with_one_thread_in_the_environment(variable: str) -> None:
    run(thread_counts, None, **{variable: "1"})


# -- how many threads run ---------------------------------------------------------------

CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
two_cores = pytest.mark.skipif(CORES < 2, reason="takes two cores")
linux = pytest.mark.skipif(not os.path.exists("/proc/self/task"), reason="asks Linux")


def no_threads(why: str) -> None:
    """Where one thread is set, or one core is left, numba's are never started."""
    import numba

    expected = results(0)
    assert_right(expected, 0)
    before = len(os.listdir("/proc/self/task"))
    if why == "one core":
        assert torch.get_num_threads() == 2
    assert_same(results(0), expected)
    assert len(os.listdir("/proc/self/task")) == before
    with pytest.raises(ValueError, match="not initialized"):
        numba.threading_layer()


def one_thread() -> None:
    torch.set_num_threads(1)
    no_threads("one thread")


def one_core() -> None:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # as OMP_PROC_BIND does to a thread
    torch.set_num_threads(2)
    no_threads("one core")


@linux
@pytest.mark.parametrize("function", [one_thread, one_core])
def test_no_threads(function: Callable[[], None]) -> None:
    run(function)


def torchs_threads() -> None:
    """As many as torch has, and no others."""
    import numba

    torch.set_num_threads(2)
    torch.ones(1 << 20).add(1).sum()  # starts them
    before = len(os.listdir("/proc/self/task"))
    assert_right(results(0), 0)
    assert len(os.listdir("/proc/self/task")) == before
    with pytest.raises(ValueError, match="not initialized"):
        numba.threading_layer()


@linux
@two_cores
def test_torchs_threads() -> None:
    run(torchs_threads)


# -- class indices that another thread overwrites ----------------------------------------

SHAPES = [(300, 101), (300, 10), (3, 70_001), (4, 10, 50), (5, 200, 3)]


def labels_gone_bad() -> None:
    """Right when they were checked, and out of range when they are used."""
    from fastopt.kernels.numba import cross_entropy

    torch.set_num_threads(2)
    kinds = ((torch.float32, 0.0, False), (torch.bfloat16, 0.1, True))
    for shape, kind, number, reduction in itertools.product(
        SHAPES, kinds, (1 << 40, -(1 << 40), -1), ("mean", "none")
    ):
        dtype, smoothing, weighted = kind
        x = torch.randn(shape).to(dtype).requires_grad_()
        y = torch.randint(0, shape[1], (shape[0], *shape[2:]))
        options = {
            "label_smoothing": smoothing,
            "weight": torch.rand(shape[1]).to(dtype) if weighted else None,
            "reduction": reduction,
        }
        right = y.clone()
        y.view(-1)[-1] = number

        def check(*arguments: object, count: int = y.numel()) -> tuple[bool, float]:
            return True, float(count)

        with fastopt.use_backend("numba"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(cross_entropy, "_target_check", lambda *dtypes: check)
            with pytest.raises(IndexError, match=f"Target {number} is out of bounds"):
                fastopt.nn.functional.cross_entropy(x, y, **options)
            if reduction == "none":  # the gradient is computed in the backward pass
                loss = fastopt.nn.functional.cross_entropy(x, right, **options)
                right.numpy().reshape(-1)[0] = number  # unseen by autograd
                with pytest.raises(IndexError, match=f"Target {number} is out of bounds"):
                    loss.sum().backward()


def test_labels_gone_bad() -> None:
    run(labels_gone_bad)


def labels_overwritten_meanwhile() -> None:
    """Whatever another thread does to them: a result or an IndexError, and the process goes on."""
    torch.set_num_threads(2)
    rng = np.random.default_rng(0)
    for shape in SHAPES:
        count = shape[0] * int(np.prod(shape[2:]))
        memory = np.zeros(count, np.int64)
        numbers = rng.integers(-(1 << 50), 1 << 50, 64)
        stop = threading.Event()

        def overwrite(memory=memory, numbers=numbers, stop=stop) -> None:  # type: ignore[no-untyped-def]
            for turn in itertools.cycle(range(64)):
                memory[turn % len(memory)] = numbers[turn]
                memory[:] = 0
                if stop.is_set():
                    return

        labels = torch.from_numpy(memory).view(shape[0], *shape[2:])
        x, weight = torch.randn(shape), torch.rand(shape[1])
        with ThreadPoolExecutor(1) as other:
            running = other.submit(overwrite)
            try:
                for turn in range(60):
                    leaf = x.clone().requires_grad_()
                    kept = weight if turn % 2 else None
                    with contextlib.suppress(IndexError), fastopt.use_backend("numba"):
                        fastopt.nn.functional.cross_entropy(leaf, labels, kept).backward()
            finally:
                stop.set()
            running.result()
        with fastopt.use_backend("numba"):
            found = fastopt.nn.functional.cross_entropy(x, labels)
        torch.testing.assert_close(found, torch.nn.functional.cross_entropy(x, labels))


def test_labels_overwritten_meanwhile() -> None:
    run(labels_overwritten_meanwhile)

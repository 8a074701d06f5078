"""Threads, forked children and torch's thread count: fastopt is a guest in the process."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from children import HANG, LENGTH, assert_right, assert_same, results, run

import fastopt

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system can't fork")

# -- several Python threads -------------------------------------------------------------


def threads_at_once(layer: str | None) -> None:
    """The first launches of all kernels, from four threads at a time, and some more."""
    torch.set_num_threads(2)
    together = threading.Barrier(4)

    def work(seed: int) -> list[list[np.ndarray]]:
        together.wait()
        found = [results(seed) for _ in range(3)]
        assert torch.get_num_threads() == 2
        return found

    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(work, range(4)))
    if layer is not None:
        import numba

        assert numba.threading_layer() == layer
    for seed, repetitions in enumerate(found):
        alone = results(seed)
        for repetition in repetitions:
            assert_same(repetition, alone)
        assert_right(alone, seed)


def test_threads_at_once() -> None:
    run(threads_at_once, None)


def test_threads_at_once_on_a_layer_that_aborts_on_them() -> None:
    run(threads_at_once, "workqueue", NUMBA_THREADING_LAYER="workqueue")


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


def fork_after_use() -> None:
    torch.set_num_threads(2)
    expected = results(0)

    def check() -> None:
        from fastopt.kernels.numba import threads

        assert_same(results(0), expected)
        assert threads.parts_for(1 << 30, 1) == 1, "a forked child runs serially"

    in_fork(check)
    in_fork(lambda: in_fork(check))
    assert_same(results(0), expected)  # the parent goes on in parallel
    assert_right(expected, 0)


@forks
@pytest.mark.parametrize("layer", ["omp", "workqueue"])
def test_fork_after_use(layer: str) -> None:
    run(fork_after_use, NUMBA_THREADING_LAYER=layer)


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

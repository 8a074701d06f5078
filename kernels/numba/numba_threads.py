"""Numba's threads, for where torch's can't be had: the one place that starts them.

Numba's threading layers each have a way to take the process down or to change torch's
settings: "omp" terminates a forked child at its first parallel region, "workqueue"
aborts when two Python threads launch at once, and starting any of them may reset
``torch.get_num_threads()``. Hence: the serial form in a forked child, a lock where the layer needs
one, and torch's setting put back after a start. Where no layer can be loaded, everything is serial.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import torch
from numba.core import config

_lock = threading.Lock()
#: Whether several Python threads may launch at once; known after the first launch.
are_reentrant = False
#: Whether no threading layer can be loaded.
are_missing = False


@contextmanager
def starting() -> Iterator[bool]:
    """Around the first launches, and every one on a layer that can't bear two at once.

    Whether there are threads.
    """
    global are_reentrant
    torch_threads = torch.get_num_threads()
    try:
        with _lock:
            there = _start()
            yield there
            if there:
                are_reentrant = numba.threading_layer() in ("omp", "tbb")
    finally:
        if torch.get_num_threads() != torch_threads:
            torch.set_num_threads(torch_threads)


def run(parallel: Callable[..., Any], parts: int, args: tuple[Any, ...]) -> Any:
    """Run a parallel form on one thread for each part; numba would start all that it has."""
    threads = numba.get_num_threads()
    if threads <= parts:
        return parallel(parts, *args)
    numba.set_num_threads(parts)  # of this thread alone
    try:
        return parallel(parts, *args)
    finally:
        numba.set_num_threads(threads)


def _start() -> bool:
    """Whether there is a threading layer; the first time, start it, or warn that there is none."""
    global are_missing
    if not are_missing:
        try:
            numba.get_num_threads()
        except (ImportError, OSError, ValueError) as error:
            # Another layer would also be the one of the user's own code, which asked for this.
            are_missing = True
            warnings.warn(
                f"fastopt runs on one thread, as numba could not start its threads with "
                f"NUMBA_THREADING_LAYER={config.THREADING_LAYER}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return not are_missing

"""A stand-in for OpenMP's threads where torch's can't be entered: Python's, which wait for work.

A start takes some 100 µs instead of 1.
"""

from __future__ import annotations

import _thread
import ctypes
import functools
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

__all__ = ["FUNCTIONS"]

_here = threading.local()
_Body = ctypes.CFUNCTYPE(None, ctypes.c_void_p)


@functools.cache
def _pool() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(thread_name_prefix="fastopt")


@ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
def _parallel(body: Any, data: Any, threads: int, flags: int) -> None:
    """Call ``body(data)`` on so many threads, and wait for them."""
    function = _Body(body)

    def turn(number: int) -> None:
        _here.number, _here.count = number, threads
        function(data)

    interrupted = False
    running = [_pool().submit(turn, number) for number in range(threads)]
    while True:
        try:
            wait(running)
            break
        except KeyboardInterrupt:  # not before all is written
            interrupted = True
    if interrupted:
        _thread.interrupt_main()


@ctypes.CFUNCTYPE(ctypes.c_int)
def _number() -> int:
    return getattr(_here, "number", 0)


@ctypes.CFUNCTYPE(ctypes.c_int)
def _count() -> int:
    return getattr(_here, "count", 1)


#: As GOMP_parallel, omp_get_thread_num and omp_get_num_threads.
FUNCTIONS = (_parallel, _number, _count)

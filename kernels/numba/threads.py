"""On how many threads a region runs, and how it is launched there."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from numba.core import types

from ..process import is_forked
from .compiler import specialise


def parts_for(work: int, grain: int) -> int:
    """On how many threads to do `work` units, so that none has fewer than `grain`.

    A region splits its work into so many parts, one for each thread. How many pieces the work
    consists of is another matter, and another argument.
    """
    if work < 2 * grain or is_forked():
        return 1
    return min(torch.get_num_threads(), _cores(), work // grain)


def _cores() -> int:
    """On how many cores the threads that this one starts may run.

    OMP_PROC_BIND binds the main thread to one of them, and threads inherit that.
    """
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class Launcher:
    """One region, specialised to argument types; compiled on first use.

    Args:
        region: the loop, called as region(parts, *args).
        signature: numba types of args.
    """

    def __init__(self, region: Any, *signature: types.Type) -> None:
        self._region, self._signature = region, (types.intp, *signature)
        self._compiled: Callable[..., Any] | None = None

    def __call__(self, parts: int, *args: Any) -> Any:
        """Run the loop, on as many threads as there are parts; what it returns.

        A forked child has none of its parent's threads, and OpenMP would wait for them.
        """
        if self._compiled is None:
            self._compiled = specialise(self._region, *self._signature)
        return self._compiled(1 if parts > 1 and is_forked() else parts, *args)

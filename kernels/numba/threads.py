"""On how many threads a region runs, and how it is launched there.

Torch's own threads are the best ones (team.py). Where they can't be had, they are numba's.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch
from numba.core import config, types

from ..process import is_forked
from . import numba_threads
from .compiler import Region, specialise
from .team import IS_TORCHS


def parts_for(work: int, grain: int) -> int:
    """On how many threads to do `work` units, so that none has fewer than `grain`.

    A region splits its work into so many parts, one for each thread. How many pieces the work
    consists of is another matter, and another argument.
    """
    if work < 2 * grain or is_forked() or numba_threads.are_missing:
        return 1
    numbas: int = config.NUMBA_NUM_THREADS
    return min(torch.get_num_threads(), numbas, _cores(), work // grain)


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

    def __init__(self, region: Region, *signature: types.Type) -> None:
        self._region, self._signature = region, (types.intp, *signature)
        self._serial: Callable[..., Any] | None = None
        self._parallel: Callable[..., Any] | None = None

    def __call__(self, parts: int, *args: Any) -> Any:
        """Run the loop, on as many threads as there are parts; what it returns."""
        if parts > 1:
            if is_forked() or numba_threads.are_missing:  # the threads are not there
                parts = 1
            elif not IS_TORCHS:
                return self._on_numbas(parts, args)
        if self._serial is None:
            self._serial = specialise(self._region.serial, *self._signature)
        return self._serial(parts, *args)

    def _on_numbas(self, parts: int, args: tuple[Any, ...]) -> Any:
        if self._parallel is not None and numba_threads.are_reentrant:
            return numba_threads.run(self._parallel, parts, args)
        with numba_threads.starting() as there:
            if there:
                if self._parallel is None:
                    self._parallel = specialise(self._region.parallel, *self._signature)
                return numba_threads.run(self._parallel, parts, args)
        return self(parts, *args)

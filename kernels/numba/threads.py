"""Serial or parallel: the one place that decides, and the one that launches.

Numba's threading layers each have a way to take the process down or to change torch's
settings: "omp" terminates a forked child at its first parallel region, "workqueue"
aborts when two Python threads launch at once, and starting any of them may reset
``torch.get_num_threads()``. Hence: as many parts as torch has threads and this thread has
cores, the serial form in a forked child, a lock where the layer needs one, and torch's setting
put back after a start. Where no layer can be loaded, everything is serial.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba.core import config, types

from ..process import is_forked
from .compiler import Region, specialise

_lock = threading.Lock()
_reentrant = False  # may several Python threads launch at once? known after the first launch
_no_layer = False  # no threading layer can be loaded


def parts_for(work: int, grain: int) -> int:
    """On how many threads to do `work` units, so that none has fewer than `grain`.

    A region splits its work into so many parts, one for each thread. How many pieces the work
    consists of is another matter, and another argument.
    """
    if work < 2 * grain or is_forked() or _no_layer:
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
    """One loop, specialised to argument types; compiles its serial or parallel form on first use.

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
        if parts == 1 or is_forked() or _no_layer:
            if self._serial is None:
                self._serial = specialise(self._region.serial, *self._signature)
            return self._serial(parts, *args)
        if _reentrant and self._parallel is not None:
            return _on_threads(parts, self._parallel, args)
        return self._launch_guarded(parts, args)

    def _launch_guarded(self, parts: int, args: tuple[Any, ...]) -> Any:
        """The first launches, and every one on a layer that can't bear two at once."""
        global _reentrant
        torch_threads = torch.get_num_threads()
        try:
            with _lock:
                if _layer_starts():
                    if self._parallel is None:
                        self._parallel = specialise(self._region.parallel, *self._signature)
                    result = _on_threads(parts, self._parallel, args)
                    _reentrant = numba.threading_layer() in ("omp", "tbb")
                    return result
        finally:
            if torch.get_num_threads() != torch_threads:
                torch.set_num_threads(torch_threads)
        return self(parts, *args)


def _on_threads(parts: int, parallel: Callable[..., Any], args: tuple[Any, ...]) -> Any:
    """Run a parallel form on one thread for each part; numba would start all that it has."""
    threads = numba.get_num_threads()
    if threads <= parts:
        return parallel(parts, *args)
    numba.set_num_threads(parts)  # of this thread alone
    try:
        return parallel(parts, *args)
    finally:
        numba.set_num_threads(threads)


def _layer_starts() -> bool:
    """Whether there is a threading layer; the first time, start it, or warn that there is none."""
    global _no_layer
    if not _no_layer:
        try:
            numba.get_num_threads()
        except (ImportError, OSError, ValueError) as error:
            # Another layer would also be the one of the user's own code, which asked for this.
            _no_layer = True
            warnings.warn(
                f"fastopt runs on one thread, as numba could not start its threads with "
                f"NUMBA_THREADING_LAYER={config.THREADING_LAYER}: {error}",
                RuntimeWarning,
                stacklevel=2,
            )
    return not _no_layer

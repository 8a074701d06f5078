"""Serial or parallel: the one place that decides, and the one that launches.

Numba's threading layers each have a way to take the process down or to change torch's
settings: "omp" terminates a forked child at its first parallel region, "workqueue"
aborts when two Python threads launch at once, and starting any of them may reset
``torch.get_num_threads()``. Hence: as many parts as torch has threads, one in a forked
child, a lock where the layer needs one, and torch's setting put back after a start.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import numba
import torch
from numba.core import types

from ..process import is_forked
from .compiler import Region, specialise

_lock = threading.Lock()
_reentrant = False  # may several Python threads launch at once? known after the first launch


def parts_for(work: int, grain: int) -> int:
    """Into how many parts to split `work` units so that none is smaller than `grain`."""
    if work < 2 * grain or is_forked():
        return 1
    return min(torch.get_num_threads(), work // grain)


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

    def __call__(self, parts: int, *args: Any) -> None:
        if parts == 1:
            if self._serial is None:
                self._serial = specialise(self._region.serial, *self._signature)
            self._serial(1, *args)
        elif _reentrant and self._parallel is not None:
            self._parallel(parts, *args)
        else:
            self._launch_guarded(parts, args)

    def _launch_guarded(self, parts: int, args: tuple[Any, ...]) -> None:
        """The first launches, and every one on a layer that can't bear two at once."""
        global _reentrant
        torch_threads = torch.get_num_threads()
        with _lock:
            if self._parallel is None:
                self._parallel = specialise(self._region.parallel, *self._signature)
            self._parallel(parts, *args)
            _reentrant = numba.threading_layer() in ("omp", "tbb")
        if torch.get_num_threads() != torch_threads:
            torch.set_num_threads(torch_threads)

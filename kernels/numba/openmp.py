"""Where the OpenMP runtime that torch runs on is entered.

A parallel region of torch's leaves its threads waiting for the next one, for some milliseconds in
which they take a core each. A second pool of threads would have to share the cores with them, and
be waited for in turn.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path

import torch

__all__ = ["entries"]

_NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@functools.cache
def entries() -> dict[str, int] | None:
    """The addresses of functions by name; None where torch has no such runtime.

    GNU's has these names, and LLVM's has them, too, but on Windows.
    """
    suffix = {"linux": ".so", "darwin": ".dylib"}.get(sys.platform)
    if suffix is None:
        return None
    try:  # a name is looked for in what the library was linked with as well
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
        functions = [getattr(library, name) for name in _NAMES]
    except (OSError, AttributeError):
        return None
    addresses = [ctypes.cast(function, ctypes.c_void_p).value for function in functions]
    if None in addresses:
        return None
    return dict(zip(_NAMES, addresses, strict=True))  # type: ignore[arg-type]

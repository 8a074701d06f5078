"""Where the OpenMP runtime that torch runs on is entered, or what stands in for it.

A parallel region of torch's leaves its threads waiting for the next one, for some milliseconds in
which they take a core each. A second pool of threads would have to share the cores with them, and
be waited for in turn: so kernels run on torch's own.
"""

from __future__ import annotations

import ctypes
import functools
import sys
from pathlib import Path
from typing import Any

import torch

from . import python_threads

__all__ = ["entries"]

NAMES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


@functools.cache
def entries() -> dict[str, Any]:
    """Functions of C by their names.

    GNU's runtime has these names, and LLVM's has them, too, but on Windows.
    """
    suffix = {"linux": ".so", "darwin": ".dylib"}.get(sys.platform, "")
    try:  # a name is looked for in what the library was linked with as well
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
        return {name: getattr(library, name) for name in NAMES}
    except (OSError, AttributeError):
        return dict(zip(NAMES, python_threads.FUNCTIONS, strict=True))

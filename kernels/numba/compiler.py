"""What numba is told, once: options, the disk cache, the specialisation of a loop.

Options and their reasons:
    nogil           kernels touch no Python object, so other threads go on.
    error_model     "numpy": division by zero gives inf as in torch, and no branch for an
                    exception stands in the way of the vectoriser.
    fastmath        {"contract"}: a*b + c may become one fused operation, which only drops
                    a rounding. Nothing that assumes NaN or inf away. Loops that add up
                    use REASSOCIATE as well: a float sum vectorises only if its order may
                    change. It is a per-function flag, kept away from functions like `exp`
                    whose correction terms it would cancel.
    boundscheck     off whatever NUMBA_BOUNDSCHECK says: there are no arrays to check.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import llvmlite
import numba
import torch
from numba.core import caching, config, types
from numba.core.runtime import rtsys
from numba.extending import overload

from .pointer import Pointer

CONTRACT = frozenset({"contract"})
REASSOCIATE = frozenset({"contract", "reassoc", "nsz"})
_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
FUNCTION_OPTIONS = {**_OPTIONS, "fastmath": set(CONTRACT)}  # for functions made by overload


def inlined(function: Callable[..., Any]) -> Any:
    """Decorator: a small function that only kernels call, and whose code goes into theirs."""
    return numba.njit(**FUNCTION_OPTIONS)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a compiled function, its machine code cached on disk."""
    return _compiled(function, CONTRACT)


def locked_kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel that keeps the GIL, since it looks into Python's own objects."""
    return _compiled(function, CONTRACT, nogil=False)


def summing_kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel that may add up floats in any order."""
    return _compiled(function, REASSOCIATE)


def region(function: Callable[..., Any]) -> Region:
    """Decorator: ``function(parts, *args)`` with a ``prange(parts)``, serial and parallel.

    In the serial form numba reads prange as range, and no thread is ever started.
    """
    # A second name: the cache file is named after the function, and its key leaves out
    # the compile flags (numba issue 6845).
    twin = FunctionType(function.__code__, function.__globals__, f"{function.__name__}_parallel")
    twin.__qualname__ = f"{function.__qualname__}_parallel"
    return Region(_compiled(function, CONTRACT), _compiled(twin, CONTRACT, parallel=True))


class Region(NamedTuple):
    """The two forms of one parallel region, uncompiled."""

    serial: Any
    parallel: Any


def _compiled(function: Callable[..., Any], fastmath: frozenset[str], **options: bool) -> Any:
    dispatcher = numba.njit(fastmath=set(fastmath), **{**_OPTIONS, **options})(function)
    if _cache_directory() is not None:
        dispatcher._cache = _Cache(function)
    return dispatcher


def formula_of(
    stub: Callable[..., Any], default: Callable[..., Any] | None = None
) -> Callable[[type], Callable[..., Any]]:
    """Make `stub` a function whose body is chosen by the record type of its first argument.

    Returns a decorator factory: ``@register(hyper.MSE)`` above a plain Python function
    makes it the body for MSE records. `default` serves the records without a body.
    """
    bodies: dict[type, Callable[..., Any]] = {}

    @overload(stub, strict=False, jit_options=FUNCTION_OPTIONS)
    def choose(record: Any, *args: Any) -> Any:
        return bodies.get(record.instance_class, default)

    def register(record: type) -> Callable[..., Any]:
        def decorate(body: Callable[..., Any]) -> Callable[..., Any]:
            bodies[record] = body
            return body

        return decorate

    return register


@functools.cache
def specialise(dispatcher: Any, *signature: types.Type) -> Callable[..., Any]:
    """The C entry point of `dispatcher` for these argument types, compiled on first use.

    Calling it skips numba's type inspection of each argument.
    """
    dispatcher.compile(signature)
    entry: Callable[..., Any] = dispatcher.get_overload(signature)
    return entry


def record_type(record: Any, compute: types.Type) -> types.Type:
    """The numba type of a hyperparameter record held in `compute` numbers."""
    return types.NamedUniTuple(compute, len(record._fields), record)


def optional_pointer(dtype: torch.dtype | None, slot: int, compute: str) -> types.Type:
    """The pointer type for a tensor that may be absent."""
    return types.none if dtype is None else pointer(dtype_name(dtype), slot, compute)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def pointer(dtype: str, slot: int, compute: str = "float32", fixed: bool = False) -> Pointer:
    """The pointer type of a tensor's elements, e.g. ``pointer("bfloat16", 0)``."""
    if dtype in ("int64", "uint8"):
        compute = "int64"
    return Pointer(dtype, getattr(types, compute), slot, fixed)


# -- the disk cache ------------------------------------------------------------------
#
# numba invalidates a cached function when the file that defines *it* changes, but the
# formulas and helpers it calls live in other files: an edited formula would run as stale
# machine code. Here the stamp of every function covers all sources of the kernels and
# the versions that shape the code. One directory and a stamp, rather than a directory
# per stamp: an outdated entry is overwritten, so the cache never grows.


@functools.cache
def source_stamp() -> str:
    """Digest of everything that the machine code depends on (numba adds the CPU itself)."""
    digest = hashlib.sha256()
    for file in sorted(Path(__file__).parent.parent.rglob("*.py")):
        if "triton" not in file.parts:
            digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    digest.update(f"{sys.version_info[:2]} {numba.__version__} {llvmlite.__version__}".encode())
    return digest.hexdigest()


@functools.cache
def _cache_directory() -> str | None:
    """The first place that can be written to, or None: then each process compiles anew."""
    package = Path(__file__).resolve().parent
    key = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    places = []
    if config.CACHE_DIR:
        places.append(Path(config.CACHE_DIR) / f"fastopt-{key}")
    places.append(package / "__pycache__")
    user_cache = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    if os.path.isabs(user_cache):  # without HOME, "~" stays as it is
        places.append(Path(user_cache) / f"fastopt-{key}")
    for place in places:
        try:
            # Cached code is executed: nobody else may have put it there.
            place.mkdir(parents=True, exist_ok=True, mode=0o700)
            if hasattr(os, "getuid") and place.stat().st_uid not in (os.getuid(), 0):
                continue
            with tempfile.TemporaryFile(dir=place):
                return str(place)
        except OSError:
            continue
    return None


class _Locator(caching._CacheLocator):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__code__.co_filename

    def get_cache_path(self) -> str:
        return str(_cache_directory())

    def get_source_stamp(self) -> str:
        return source_stamp()

    def get_disambiguator(self) -> str:
        return f"fastopt-{Path(self._name).stem}"

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator:
        return cls(function)


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = (_Locator,)


_LOADS_ALONE = ("0.68.",)


class _CacheFile(caching.IndexDataCacheFile):
    """A file for each specialisation, named by it and marked with what it is of.

    Numba numbers its files and keeps an index of them. Where two processes compile at once, both
    may take the same number, and an index then leads to another function's code. Here a file
    that is of something else, or outdated, is one that isn't there.
    """

    def __init__(self, cache_path: str, filename_base: str, source_stamp: str) -> None:
        super().__init__(cache_path, filename_base, source_stamp)
        self._base = filename_base

    def save(self, key: Any, data: Any) -> None:
        content = self._dump(data)
        with self._open_for_write(self._file_of(key)) as file:  # in place at once, or not at all
            pickle.dump(self._mark(key), file)
            file.write(content)

    def load(self, key: Any) -> Any:
        try:
            with open(self._file_of(key), "rb") as file:
                return pickle.load(file) if pickle.load(file) == self._mark(key) else None
        except FileNotFoundError:
            return None

    def _file_of(self, key: Any) -> str:
        signature, machine, _ = key  # without the code itself: a new version overwrites the old one
        digest = hashlib.sha256(repr((signature, machine)).encode()).hexdigest()[:16]
        path: str = self._data_path(f"{self._base}.{digest}.nbc")
        return path

    def _mark(self, key: Any) -> tuple[str, str]:
        return self._source_stamp, repr(key)


class _Cache(caching.FunctionCache):
    _impl_class = _CacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        locator = self._impl.locator
        self._cache_file = _CacheFile(
            self._cache_path, self._impl.filename_base, locator.get_source_stamp()
        )

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Numba's, but for making the compiler ready first, which takes 0.2 s.

        Machine code that only has to be loaded needs nothing of that but numba's runtime. That
        is no promise of numba's, so other versions than the ones tried get the whole of it.
        """
        if not numba.__version__.startswith(_LOADS_ALONE):
            return super().load_overload(sig, target_context)
        rtsys.initialize(target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)

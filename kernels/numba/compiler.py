"""What numba is told, once: options, formulas, the specialisation of a loop.

Options and their reasons:
    nogil           kernels touch no Python object, so other threads go on.
    error_model     "numpy": division by zero gives inf as in torch, and no branch for an
                    exception stands in the way of the vectoriser.
    fastmath        {"contract"}: a*b + c may become one fused operation, which only drops
                    a rounding. Nothing that assumes NaN or inf away. Loops that add up
                    use REASSOCIATE as well: a float sum vectorises only if its order may
                    change. It is a per-function flag, kept away from functions like `exp`
                    whose correction terms it would cancel. Formulas of losses have none: which
                    product and sum become one depends on what else a loop computes, and a gradient
                    has to be the same bits from the forward pass and from another backward one.
    boundscheck     off whatever NUMBA_BOUNDSCHECK says: there are no arrays to check.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numba
import torch
from numba.core import types

from ..rounding import NEAREST
from .disk_cache import Cache, _cache_directory
from .pointer import Pointer

CONTRACT = frozenset({"contract"})
REASSOCIATE = frozenset({"contract", "reassoc", "nsz"})
_OPTIONS = {"nogil": True, "error_model": "numpy", "boundscheck": False}
# Wrappers for calls from elsewhere would take a third of the time that the function itself takes.
_INNER = {**_OPTIONS, "no_cpython_wrapper": True, "no_cfunc_wrapper": True}
# A loop is vectorised only if all that it calls is part of it, which LLVM takes for no gain where
# it believes a loop to be rarely entered.
_INLINED = {**_INNER, "forceinline": True}
try:
    from .draft import DraftCompiler

    _DRAFT = {**_INNER, "pipeline_class": DraftCompiler}
except (ImportError, AttributeError):  # a numba that is built otherwise, and compiles longer
    _DRAFT = _INNER
# For functions made by overload. Who says nothing of fastmath inherits it from the first caller.
FUNCTION_OPTIONS = {**_OPTIONS, "fastmath": set(CONTRACT), "forceinline": True}
DRAFT_OPTIONS = {**_DRAFT, "fastmath": set(CONTRACT)}
EXACT_OPTIONS = {**_OPTIONS, "fastmath": False, "forceinline": True}


def inlined(function: Callable[..., Any]) -> Any:
    """Decorator: a small function that only kernels call, and whose code goes into theirs."""
    return numba.njit(fastmath=set(CONTRACT), **_INLINED)(function)


def exact(function: Callable[..., Any]) -> Any:
    """Decorator: such a function, whose every operation is rounded by itself."""
    return numba.njit(fastmath=False, **_INLINED)(function)


def kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a function that only compiled code calls, part of what is cached there."""
    return numba.njit(fastmath=set(CONTRACT), **_DRAFT)(function)


def summing_kernel(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel that may add up floats in any order."""
    return numba.njit(fastmath=set(REASSOCIATE), **_DRAFT)(function)


def entry(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel to be called from Python, its machine code cached on disk."""
    return _compiled(function, CONTRACT)


def locked_entry(function: Callable[..., Any]) -> Any:
    """Decorator: an entry that keeps the GIL, since it looks into Python's own objects."""
    return _compiled(function, CONTRACT, nogil=False)


def region(function: Callable[..., Any]) -> Any:
    """Decorator: an entry ``function(parts, *args)`` that calls `on_threads`."""
    return entry(function)


def loop(function: Callable[..., Any]) -> Any:
    """Decorator: a kernel that other machine code calls by its address, and is cached on disk."""
    return _compiled(function, CONTRACT, no_cpython_wrapper=True)


def summing_loop(function: Callable[..., Any]) -> Any:
    """Decorator: such a one that may add up floats in any order."""
    return _compiled(function, REASSOCIATE, no_cpython_wrapper=True)


def _compiled(function: Callable[..., Any], fastmath: frozenset[str], **options: bool) -> Any:
    given = {**_OPTIONS, "no_cfunc_wrapper": True, **options}
    dispatcher = numba.njit(fastmath=set(fastmath), **given)(function)
    if _cache_directory() is not None:
        dispatcher._cache = Cache(function)
    return dispatcher


@functools.cache
def specialise(dispatcher: Any, *signature: types.Type) -> Callable[..., Any]:
    """The C entry point of `dispatcher` for these argument types, compiled on first use.

    Calling it skips numba's type inspection of each argument.
    """
    with _quiet():
        dispatcher.compile(signature)
    entry: Callable[..., Any] = dispatcher.get_overload(signature)
    return entry


def address_of(dispatcher: Any, *signature: types.Type) -> int:
    """Where the machine code of a `loop` for these argument types is, for the process's life."""
    with _quiet():
        dispatcher.compile(signature)
    found = dispatcher.overloads[signature]
    address: int = found.library.get_pointer_to_function(found.fndesc.llvm_func_name)
    return address


_quiet_lock = threading.Lock()
_quiet_count = 0


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep numba's messages out of the logs of a program that logs everything.

    A compilation has ten thousand of them at level DEBUG. Whoever has given numba's logger a level
    wants them; else it has one while something is compiled here, and none after that.
    """
    global _quiet_count
    logger = logging.getLogger("numba")
    with _quiet_lock:
        _quiet_count += 1
        if logger.level == logging.NOTSET:
            logger.setLevel(_QUIET)
    try:
        yield
    finally:
        with _quiet_lock:
            _quiet_count -= 1
            if _quiet_count == 0 and logger.level == _QUIET:
                logger.setLevel(logging.NOTSET)


_QUIET = logging.WARNING + 1  # a number by which it is known again


def optional_pointer(dtype: torch.dtype | None, slot: int, compute: str) -> types.Type:
    """The pointer type for a tensor that may be absent."""
    return types.none if dtype is None else pointer(dtype_name(dtype), slot, compute)


def dtype_name(dtype: torch.dtype) -> str:
    """ "float32" for torch.float32."""
    return str(dtype).removeprefix("torch.")


@functools.cache
def pointer(
    dtype: str, slot: int, compute: str = "float32", fixed: bool = False, rounding: str = NEAREST
) -> Pointer:
    """The pointer type of a tensor's elements, e.g. ``pointer("bfloat16", 0)``."""
    if dtype in ("int64", "uint8"):
        compute = "int64"
    return Pointer(dtype, getattr(types, compute), slot, fixed, rounding)

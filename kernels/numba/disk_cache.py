"""The disk cache of machine code.

Numba invalidates a cached function when the file that defines *it* changes, but the formulas and
helpers it calls lie in other files: an edited formula would run as stale machine code. Here an
entry is marked with everything that it was made from, and one with another mark is no entry.
So is one that is cut off, can't be read or may be somebody else's; and where nothing can be
written, each process compiles anew. One file for each specialisation, whatever its mark: an
outdated entry is overwritten, so the cache never grows.
"""

from __future__ import annotations

import functools
import hashlib
import os
import pickle
import stat
import tempfile
import uuid
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
from numba.core import caching, config
from numba.core.runtime import rtsys

from ..places import user_cache
from .reach import reached, records_of, sources

__all__ = ["Cache"]

_warned = False


def _nobody_else_wrote(status: os.stat_result) -> bool:
    """Whether a file, or what is in a folder, can only be this user's own or root's.

    Cached code is executed: nobody else may have put it there.
    """
    if not hasattr(os, "geteuid"):
        return True
    return status.st_uid in (os.geteuid(), 0) and not status.st_mode & (stat.S_IWGRP | stat.S_IWOTH)


def _prepare(place: Path) -> None:
    """Make a folder, or raise an OSError where it can't be one for cached code."""
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    if not _nobody_else_wrote(place.stat()):
        raise PermissionError(f"others may write to {place}")
    with tempfile.TemporaryFile(dir=place):
        pass


@functools.cache
def _cache_directory() -> str | None:
    """The first place that can be written to, or None: then each process compiles anew."""
    if sources() is None:
        return None
    package = Path(__file__).resolve().parent
    key = hashlib.sha256(str(package).encode()).hexdigest()[:12]
    places = []
    if config.CACHE_DIR:
        places.append(Path(config.CACHE_DIR) / f"fastopt-{key}")
    places.append(package / "__pycache__")
    if (home := user_cache()) is not None:
        places.append(home / f"fastopt-{key}")
    for place in places:
        try:
            _prepare(place)
        except OSError:
            continue
        return str(place)
    return None


class _Locator(caching._CacheLocator):
    def __init__(self, function: Callable[..., Any]) -> None:
        self._name = function.__code__.co_filename

    def get_cache_path(self) -> str:
        return str(_cache_directory())

    def ensure_cache_path(self) -> None:
        _prepare(Path(self.get_cache_path()))  # it may have vanished

    def get_source_stamp(self) -> str:
        return str(sources())

    def get_disambiguator(self) -> str:
        return f"fastopt-{Path(self._name).stem}"

    @classmethod
    def from_function(cls, function: Callable[..., Any], file: str) -> _Locator:
        return cls(function)


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = (_Locator,)


class _CacheFile(caching.IndexDataCacheFile):
    """A file for each specialisation, named by it and marked with what it is of.

    Numba numbers its files and keeps an index of them. Where two processes compile at once, both
    may take the same number, and an index then leads to another function's code. Here a file
    that is of something else, or outdated, is one that isn't there.
    """

    def __init__(self, function: Callable[..., Any], path: str, base: str, stamp: str) -> None:
        super().__init__(path, base, stamp)
        self._function, self._base = function, base

    def save(self, key: Any, data: Any) -> None:
        content = self._dump(data)
        place = self._file_of(key)
        draft = f"{place}.tmp.{uuid.uuid4().hex[:16]}"
        try:  # in place at once, or not at all
            number = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _BINARY, 0o600)
            with open(number, "wb") as file:
                file.write(self._mark(key) + hashlib.sha256(content).digest() + content)
            os.replace(draft, place)
        except BaseException:
            Path(draft).unlink(missing_ok=True)
            raise

    def load(self, key: Any) -> Any:
        with open(self._file_of(key), "rb") as file:
            if not _nobody_else_wrote(os.fstat(file.fileno())) or file.read(32) != self._mark(key):
                return None
            digest, content = file.read(32), file.read()
        # to unpickle is to execute, and LLVM ends the process over a file that is cut off
        return pickle.loads(content) if hashlib.sha256(content).digest() == digest else None

    def _file_of(self, key: Any) -> str:
        signature, machine, _ = key  # without the code itself: a new version overwrites the old one
        records = [(r.__module__, r.__qualname__) for r in records_of(signature)]
        digest = hashlib.sha256(repr((signature, machine, records)).encode()).hexdigest()[:16]
        path: str = self._data_path(f"{self._base}.{digest}.nbc")
        return path

    def _mark(self, key: Any) -> bytes:
        made_from = self._source_stamp, reached(self._function, key[0])
        return hashlib.sha256(repr((made_from, key)).encode()).digest()


_BINARY = getattr(os, "O_BINARY", 0)  # of Windows
_LOADS_ALONE = ("0.68.",)


class Cache(caching.FunctionCache):
    _impl_class = _CacheImpl

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__(function)
        stamp = self._impl.locator.get_source_stamp()
        self._cache_file = _CacheFile(function, self._cache_path, self._impl.filename_base, stamp)

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """Machine code from the disk, or None whatever stands in the way: then it is compiled.

        Numba's makes the compiler ready first, which takes 0.2 s. Machine code that only has to
        be loaded needs nothing of that but numba's runtime. That is no promise of numba's, so
        other versions than the ones tried get the whole of it.
        """
        if numba.__version__.startswith(_LOADS_ALONE):
            rtsys.initialize(target_context)
        else:
            target_context.refresh()
        try:
            found = self._load_overload(sig, target_context)
        except Exception:  # of the disk, of pickle, of a module that a record comes from, of numba
            return None
        return found if found is None or found.signature.args == sig else None

    def save_overload(self, sig: Any, data: Any) -> None:
        global _warned
        try:
            self._save_overload(sig, data)
        except Exception as error:  # of the disk, or of pickle
            if not _warned:
                _warned = True
                warnings.warn(
                    f"fastopt could not keep compiled code in {self._cache_path}, so later "
                    f"processes compile anew: {type(error).__name__}: {error}",
                    RuntimeWarning,
                    stacklevel=2,
                )

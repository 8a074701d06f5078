"""What machine code is made from: digests of the kernels' sources and of all that is theirs not.

The kernels' own files are taken whole, as code that runs while compiling is in them, too. From
there a kernel reaches functions of other files: the bodies that are registered for the records in
its signature, and whatever those use. Of each of them the bytecode counts, with its constants and
names, and so do the values of what it refers to, as the compiler freezes them.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import sys
from collections.abc import Callable, Iterator
from types import CellType, CodeType, FunctionType, ModuleType
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core import types
from numba.core.dispatcher import Dispatcher
from numba.core.typing.templates import builtin_registry

_KERNELS = __package__.rpartition(".")[0]
# What numba itself compiles to something of its own, or refuses.
_COMPILERS_OWN = frozenset({"numba", "numpy", "llvmlite", "torch"}) | sys.stdlib_module_names

#: Of each function whose body is chosen by a record: what to call for the body of a record.
body_of: dict[Callable[..., Any], Callable[[type], Callable[..., Any] | None]] = {}


@functools.cache
def sources() -> str | None:
    """Digest of all kernels and the versions that shape the code; None if there are no sources."""
    digest, found = hashlib.sha256(), False
    for name, content in _files(importlib.resources.files(_KERNELS)):
        digest.update(f"{name} {len(content)} ".encode() + content)
        found = True
    versions = sys.version_info[:2], numba.__version__, llvmlite.__version__, np.__version__
    digest.update(repr(versions).encode())
    return digest.hexdigest() if found else None


def _files(folder: Any) -> Iterator[tuple[str, bytes]]:
    """The Python files below a folder, which may be one in an archive."""
    for place in sorted(folder.iterdir(), key=lambda place: str(place.name)):
        if place.is_dir():
            if place.name not in ("triton", "__pycache__"):
                yield from _files(place)
        elif place.name.endswith((".py", ".pyc")):
            yield place.name, place.read_bytes()


def records_of(signature: Any) -> list[type]:
    """The records whose types are in a signature, each once, in their order."""
    found: dict[type, None] = {}
    pending = list(reversed(signature))
    while pending:
        typ = pending.pop()
        record = getattr(typ, "instance_class", None) or getattr(typ, "record", None)
        if isinstance(record, type):
            found[record] = None
        if isinstance(typ, types.BaseTuple):
            pending += reversed(tuple(typ))
    return list(found)


def reached(function: Callable[..., Any], signature: Any) -> str:
    """Digest of what a function, compiled for these types, is made from beside `sources`."""
    walk = _Walk()
    walk.visit(function)
    for record in records_of(signature):
        walk.visit(record)
    return walk.digest.hexdigest()


class _Walk:
    """A walk through everything that some objects refer to; what it meets goes into a digest."""

    def __init__(self) -> None:
        self.digest = hashlib.sha256()
        self._seen: dict[int, tuple[int, Any]] = {}  # by id: which one it was, and itself

    def visit(self, value: Any) -> None:
        if isinstance(value, bool | int | float | complex | str | bytes | np.generic | None):
            self._note(type(value).__name__, repr(value))
            return
        if id(value) in self._seen:
            self._note("again", self._seen[id(value)][0])
            return
        self._seen[id(value)] = len(self._seen), value
        if isinstance(value, FunctionType):
            self._visit_function(value)
        elif isinstance(value, Dispatcher):  # a compiled function
            options = value.targetoptions.items()
            self._note("compiled", sorted((k, _ordered(v)) for k, v in options))
            self.visit(value.py_func)
        elif hasattr(value, "_defn"):  # an intrinsic
            self.visit(value._defn)
        elif isinstance(value, type):
            self._visit_class(value)
        elif isinstance(value, tuple | list):
            self._note(type(value).__name__, len(value))
            for item in value:
                self.visit(item)
        elif isinstance(value, dict):
            self.visit(list(value.items()))
        elif isinstance(value, np.ndarray):
            self._note("array", value.dtype, value.shape, value.tobytes())
        elif isinstance(value, ModuleType):
            self._note("module", value.__name__)
        else:  # with an address in it, it is another one in each process: never taken for the same
            self._note(type(value).__qualname__, _ordered(value))

    def _visit_function(self, function: FunctionType) -> None:
        home = _home(function)
        if home.partition(".")[0] in _COMPILERS_OWN:
            self._note("function", function.__module__, function.__qualname__)
            return
        names = self._visit_code(function.__code__)
        cells = zip(function.__code__.co_freevars, function.__closure__ or (), strict=True)
        # a cell that is empty yet has nothing to compile
        values = {name: cell.cell_contents for name, cell in cells if cell != CellType()}
        values |= {k: v for k, v in function.__globals__.items() if k in names}
        values |= {"": (function.__defaults__, function.__kwdefaults__)}
        ours = home.startswith(_KERNELS)
        for name, value in values.items():
            # What the kernels' own files say is in `sources`; only the way out of them counts.
            if not ours or isinstance(value, FunctionType | type | ModuleType | Dispatcher):
                self._note("value", name)
                self._visit_attributes(value, names)
        if function not in body_of:
            for implementation in _overloads().get(function, ()):
                self.visit(implementation)

    def _visit_attributes(self, value: Any, names: list[str]) -> None:
        """Of a module not itself but what it has under these names, at any depth."""
        self.visit(value)
        if isinstance(value, ModuleType) and value.__name__.partition(".")[0] not in _COMPILERS_OWN:
            for name in names:
                attribute = vars(value).get(name)
                if attribute is not None and id(attribute) not in self._seen:
                    self._note("attribute", name)
                    self._visit_attributes(attribute, names)

    def _visit_code(self, code: CodeType) -> list[str]:
        """Returns the names that it and the functions inside it use."""
        names = list(code.co_names)
        self._note(
            code.co_name, code.co_code, code.co_argcount, code.co_kwonlyargcount,
            code.co_posonlyargcount, code.co_flags, code.co_names, code.co_varnames,
            code.co_freevars, code.co_cellvars,
        )  # fmt: skip
        for constant in code.co_consts:
            if isinstance(constant, CodeType):
                names += self._visit_code(constant)
            else:
                self._note(type(constant).__name__, _ordered(constant))
        return list(dict.fromkeys(names))

    def _visit_class(self, value: type) -> None:
        self._note("class", value.__module__, value.__qualname__, getattr(value, "_fields", None))
        if hasattr(value, "_fields"):
            for choose in body_of.values():
                self.visit(choose(value))

    def _note(self, *words: object) -> None:
        self.digest.update(repr(words).encode() + b"\0")


def _home(function: FunctionType) -> str:
    """The name of the module whose text a function is of, "" if there is none such."""
    name = function.__globals__.get("__name__", "")
    module = sys.modules.get(name)
    return name if module is not None and vars(module) is function.__globals__ else ""


def _ordered(value: Any) -> str:
    """A repr that is the same in each process."""
    if isinstance(value, set | frozenset):
        return repr(sorted(map(_ordered, value)))
    return repr(value)


def _overloads() -> dict[Any, list[Callable[..., Any]]]:
    """The implementations that numba has been given for functions, by function."""
    entries = builtin_registry.globals
    if len(entries) != _overloads_known[0]:
        found: dict[Any, list[Callable[..., Any]]] = {}
        for function, typ in entries:
            for template in getattr(typ, "templates", ()):
                implementation = getattr(template, "_overload_func", None)
                if implementation is not None and isinstance(function, FunctionType):
                    found.setdefault(function, []).append(implementation)
        _overloads_known[:] = len(entries), found
    known: dict[Any, list[Callable[..., Any]]] = _overloads_known[1]
    return known


_overloads_known: list[Any] = [0, {}]

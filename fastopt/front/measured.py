"""Crossovers that ``python -m fastopt tune`` has measured, for a machine like this one.

They are in a small file among the user's caches, which is looked for when fastopt is imported. What
was measured with another processor, number of threads, torch or fastopt says nothing about this
machine, and is not used.
"""

from __future__ import annotations

import functools
import json
import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from .. import __version__
from ..kernels.places import user_cache

__all__ = ["Limits", "Measured", "forget", "machine", "place", "read", "write"]

FORMAT = 1


class Limits(NamedTuple):
    """A loss's `crossover` and `row_crossover`, as its operation has them."""

    crossover: int
    rows: Mapping[int, tuple[tuple[int, int], ...]]


class Measured(NamedTuple):
    """What the file says.

    Attributes:
        limits: by the names of the functions.
        source: in words for a reader, where the crossovers in use are from.
    """

    limits: Mapping[str, Limits]
    source: str


def place() -> Path | None:
    """Where the file is, or would be; None where the user has no home."""
    home = user_cache()
    return None if home is None else home / "fastopt" / "crossovers.json"


@functools.cache
def machine() -> str:
    """What a measurement depends on, in one line."""
    return ", ".join(
        (
            f"fastopt {__version__}", f"torch {torch.__version__}", _processor(),
            torch.backends.cpu.get_cpu_capability(), f"{torch.get_num_threads()} threads",
        )
    )  # fmt: skip


def _processor() -> str:
    try:  # on Linux `platform` knows the architecture only
        with open("/proc/cpuinfo", encoding="utf-8", errors="replace") as file:
            for line in file.read(4096).splitlines():
                name, _, value = line.partition(":")
                if name.strip() == "model name":
                    return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@functools.cache
def read() -> Measured:
    """What was measured on a machine like this one, as it is when this is first asked."""
    path = place()
    try:
        if path is None or not path.exists():
            return Measured({}, "defaults (python -m fastopt tune measures this machine's)")
        machines = _machines(path)
        entry = machines.get(machine())
        if entry is None:
            return Measured({}, f"defaults: {path} is of other machines ({'; '.join(machines)})")
        limits = {name: _limits(found) for name, found in entry["crossovers"].items()}
        return Measured(limits, f"measured on {entry['date']}, in {path}")
    except _UNREADABLE as error:
        return Measured({}, f"defaults: {path} can't be read ({error!r})")


# What reading a file comes to that isn't there, or that something else has written.
_UNREADABLE = (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError)


def _machines(path: Path) -> dict[str, Any]:
    found = json.loads(path.read_text(encoding="utf-8"))
    if found["format"] != FORMAT:
        raise ValueError(f"format {found['format']!r}, not {FORMAT}")
    machines = found["machines"]
    if not isinstance(machines, dict):
        raise ValueError("no machines")
    return machines


def _limits(found: Any) -> Limits:
    rows = {
        int(size): tuple((_count(classes), _count(limit)) for classes, limit in steps)
        for size, steps in found["rows"].items()
    }
    return Limits(_count(found["crossover"]), rows)


def _count(number: Any) -> int:
    if type(number) is not int or number < 0:
        raise ValueError(f"{number!r} is no number of elements")
    return number


def write(limits: Mapping[str, Limits], date: str) -> Path:
    """Keep what was measured on this machine, beside what was on others.

    Returns: the file.

    Raises:
        OSError: it can't be written.
    """
    found = {
        name: {"crossover": some.crossover, "rows": {str(k): v for k, v in some.rows.items()}}
        for name, some in limits.items()
    }
    return _change({machine(): {"date": date, "crossovers": found}})


def forget() -> Path:
    """Forget what was measured on this machine."""
    return _change({})


def _change(entries: Mapping[str, Any]) -> Path:
    path = place()
    if path is None:
        raise OSError("there is no home folder to keep a file in")
    try:
        machines = _machines(path)
    except _UNREADABLE:
        machines = {}
    machines.pop(machine(), None)
    machines.update(entries)
    read.cache_clear()
    if not machines:
        path.unlink(missing_ok=True)
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}")
    try:
        part.write_text(
            json.dumps({"format": FORMAT, "machines": machines}, indent=1) + "\n", encoding="utf-8"
        )
        part.replace(path)  # at once: a process that reads meets a whole file
    finally:
        part.unlink(missing_ok=True)
    return path

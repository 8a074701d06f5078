"""The records of users' formulas, by their names.

Machine code on the disk names the record that it was compiled for. A user's script is `__main__`,
of which another process has another one, and a function's own records are nobody's attributes: so
here is where all of them are found. What isn't used any more isn't kept.
"""

from __future__ import annotations

import re
from typing import Any
from weakref import WeakValueDictionary

from ..kernels.operation import Operation

__all__ = ["name_for", "register"]

_KNOWN: WeakValueDictionary[str, type[Operation]] = WeakValueDictionary()


def name_for(function: Any) -> str:
    """The name of a function's record: the next version of the function has the same one."""
    return re.sub(r"\W+", "_", f"{function.__module__}.{function.__qualname__}")


def register(record: type[Operation]) -> None:
    """Have a record found here, in place of an earlier one of its name."""
    record.__module__ = __name__
    _KNOWN[record.__qualname__] = record


def __getattr__(name: str) -> type[Operation]:
    try:
        return _KNOWN[name]
    except KeyError:
        raise AttributeError(f"no record of the name {name!r}") from None

"""Triton's interpreter, made quick enough for thousands of tests.

At every call of a function it looks through all of `triton.language` for what it replaces there,
and for every value it makes a table of dtypes anew. Here replacements are made once and stay as
long as the process, and dtypes are remembered.
"""

from __future__ import annotations

import functools
from typing import Any

import triton.language as tl
from triton.language import core  # noqa: F401  `example` sees it
from triton.runtime import interpreter


def hasten() -> None:
    """To be called once, before any kernel runs."""

    def example() -> None:
        """What it sees is where functions are replaced: `tl`, and what Triton's own see, `core`."""

    replaced = interpreter._patch_lang(example)
    interpreter._patch_lang = lambda function: type(replaced)()  # with nothing to be put back
    theirs = interpreter._get_np_dtype
    remembered = functools.cache(theirs)

    def dtype_of(kind: Any) -> Any:
        scalar = kind.scalar
        # those of pointers can't be hashed, and cost no table
        return remembered(scalar) if type(scalar) is tl.dtype else theirs(scalar)

    interpreter._get_np_dtype = dtype_of

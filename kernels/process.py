"""Whether this process is a forked child, known from the first import of fastopt on.

Thread pools do not survive a fork: a child that launches threads through the OpenMP
runtime which its parent has used is terminated or hangs, whoever used it in the parent.
"""

from __future__ import annotations

import os

_forked = False


def _mark_forked() -> None:
    global _forked
    _forked = True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_mark_forked)


def is_forked() -> bool:
    """Whether this process was forked from one that had imported fastopt."""
    return _forked

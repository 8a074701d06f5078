"""Where this user's caches are."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["user_cache"]


def user_cache() -> Path | None:
    """The folder for caches in the user's home; None where there is no home."""
    place = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(place) if os.path.isabs(place) else None  # without HOME, "~" stays as it is

"""All losses, found by their files: each file of this folder is one operation."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Any

__all__ = ["FUNCTIONS", "MODULES"]

#: The public functions and module classes, by torch's names.
FUNCTIONS: dict[str, Any] = {}
MODULES: dict[str, type] = {}

_files = [f.name for f in pkgutil.iter_modules([str(Path(__file__).parent)]) if not f.ispkg]
for _file in sorted(_files):
    if _file != "functional" and not _file.startswith("_"):
        _module = importlib.import_module(f".{_file}", __package__)
        for _name in _module.__all__:
            _found = getattr(_module, _name)
            (MODULES if isinstance(_found, type) else FUNCTIONS)[_name] = _found

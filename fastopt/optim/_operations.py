"""All optimizers, found by their files: each file of this folder is one, but `swa_utils`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from ._planned import PlannedStep

__all__ = ["OPTIMIZERS", "TORCHS"]

#: The public classes, by their names.
OPTIMIZERS: dict[str, type[PlannedStep]] = {}

for _file in sorted(f.name for f in pkgutil.iter_modules([str(Path(__file__).parent)])):
    if _file != "swa_utils" and not _file.startswith("_"):
        _module = importlib.import_module(f".{_file}", __package__)
        OPTIMIZERS |= {name: getattr(_module, name) for name in _module.__all__}

#: Those of them that torch has as well.
TORCHS = {
    name: kind for name, kind in OPTIMIZERS.items() if kind._twin.__module__.startswith("torch.")
}

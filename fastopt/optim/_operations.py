"""All optimizers, found by their files: each file of this folder is one, but `swa_utils`."""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path

from ._planned import PlannedStep
from ._torchs_step import TorchsStep

__all__ = ["CLASSES", "OPTIMIZERS", "TORCHS"]

#: The public classes, by their names.
CLASSES: dict[str, type[PlannedStep] | type[TorchsStep]] = {}

for _file in sorted(f.name for f in pkgutil.iter_modules([str(Path(__file__).parent)])):
    if _file != "swa_utils" and not _file.startswith("_"):
        _module = importlib.import_module(f".{_file}", __package__)
        CLASSES |= {name: getattr(_module, name) for name in _module.__all__}

#: Those that kernels serve.
OPTIMIZERS = {name: kind for name, kind in CLASSES.items() if issubclass(kind, PlannedStep)}
#: Those that torch has as well.
TORCHS = {
    name: kind
    for name, kind in CLASSES.items()
    if kind.__bases__[-1].__module__.startswith("torch.")
}

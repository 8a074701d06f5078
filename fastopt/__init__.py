"""Compiled drop-in replacements for PyTorch's losses and optimizers, on CPU and GPU."""

__version__ = "0.1.0"

from . import _torchs, dispatch, formula, nn, optim
from ._check import check
from ._convert import convert
from ._explain import Explanation, explain
from .dispatch import use_backend
from .errors import BackendUnavailable, FormulaError
from .front.formula_loss import loss
from .memory import empty_cache
from .optim._rule import optimizer

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "FormulaError",
    "check",
    "convert",
    "dispatch",
    "empty_cache",
    "explain",
    "formula",
    "loss",
    "nn",
    "optim",
    "optimizer",
    "use_backend",
]
_torchs.install()

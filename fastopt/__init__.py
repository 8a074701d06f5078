"""Compiled drop-in replacements for PyTorch's losses and optimizers, on CPU and GPU."""

__version__ = "0.1.0"

from . import _torchs, dispatch, nn, optim
from ._convert import convert
from ._explain import Explanation, explain
from .dispatch import use_backend
from .errors import BackendUnavailable
from .memory import empty_cache

__all__ = [
    "BackendUnavailable",
    "Explanation",
    "convert",
    "dispatch",
    "empty_cache",
    "explain",
    "nn",
    "optim",
    "use_backend",
]
_torchs.install()

"""The losses of :mod:`torch.nn` that fastopt has: same names, same arguments, subclasses."""

from . import functional
from .cross_entropy import CrossEntropyLoss
from .l1 import L1Loss
from .mse import MSELoss

__all__ = ["CrossEntropyLoss", "L1Loss", "MSELoss", "functional"]

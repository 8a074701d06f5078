"""The functions of :mod:`torch.nn.functional` that fastopt has: same names, same arguments."""

from .cross_entropy import cross_entropy
from .l1 import l1_loss
from .mse import mse_loss

__all__ = ["cross_entropy", "l1_loss", "mse_loss"]

"""The optimizers of :mod:`torch.optim` that fastopt has: same names, arguments and state."""

from .adam import Adam
from .adamw import AdamW
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["SGD", "Adam", "AdamW", "RMSprop"]

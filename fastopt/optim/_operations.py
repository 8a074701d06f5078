"""All optimizers that fastopt has."""

from __future__ import annotations

from .adam import Adam
from .adamw import AdamW
from .rmsprop import RMSprop
from .sgd import SGD

__all__ = ["OPTIMIZERS"]

#: The public classes, by torch's names.
OPTIMIZERS: dict[str, type] = {kind.__name__: kind for kind in (SGD, Adam, AdamW, RMSprop)}

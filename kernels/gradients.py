"""What a launch over all gradients is told of them."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

__all__ = ["ORDERS", "Gradients"]

#: The orders of norms that kernels take; each is one line of a loop.
ORDERS = (2.0, 1.0, float("inf"))


class Gradients(NamedTuple):
    """Dense tensors of one dtype on one device, by their addresses alone.

    Attributes:
        device: of all.
        dtype: of all.
        addresses: int64; tables.EMPTY for a tensor without elements.
        offsets: int64, the running count of elements, one entry more than tensors.
    """

    device: torch.device
    dtype: torch.dtype
    addresses: np.ndarray
    offsets: np.ndarray

    @property
    def size(self) -> int:
        """How many elements they have together."""
        return int(self.offsets[-1])

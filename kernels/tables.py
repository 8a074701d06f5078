"""What an optimizer's launch reads: the tables that a step plan keeps up to date."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch

__all__ = ["Averaged", "Launch", "Tables", "Traced"]

#: What a proof (fastopt.optim._proof) knows of a tensor, a line each: of what is written the place
#: of its gradient, of a gradient whether it is there; bytes of an element, and of all; where it is
#: (0 where a step has nothing to do with it); and the address of the entry in Tables.addresses.
OWNER, ITEMSIZE, BYTES, KNOWN, CELL = range(5)
#: What it answers: something is of another kind, or overlaps; all is as before; memory has moved;
#: other gradients are there. But for the first, all addresses are in their entries then.
DIFFERENT, SAME, MOVED, OTHERS = range(4)
#: The address of a tensor without elements, which nothing reads.
EMPTY = 16


class Traced(NamedTuple):
    """A hyperparameter that lives on the tensors' GPU: to be looked up there at each step."""

    row: int
    field: int
    value: torch.Tensor


class Averaged(NamedTuple):
    """The averages that a step has of its parameters.

    Attributes:
        record: the class of the rule by which a parameter goes into its average.
        dtype: of the averages.
    """

    record: Any
    dtype: torch.dtype


class Tables(NamedTuple):
    """The arrays of one bucket. A plan writes to them in place; a launcher reads them anew.

    Attributes:
        device: of the tensors.
        hypers: float64, a row of hyperparameters for each kind of tensor.
        traced: the entries of hypers that only the device knows; NaN in this table.
        row_of: int64, each tensor's row.
        offsets: int64, the running count of elements, one entry more than tensors. A parameter
            without a gradient has none.
        addresses: int64, a line for each slot (parameter and states, unused ones too), one for
            the averages if there are any, one for each state that is one number, one for the
            gradients and one for the step counters (0 where nothing counts), each with an entry
            for every tensor. It is 0 for a gradient that
            isn't there: then the update leaves the parameter, its states and its counter alone, and
            they have no address.
        counted_on_device: whether the counters are the device's (which may be the CPU), so that
            a kernel has to count.
        rule: where parameters have averages the numbers of their rule in a step, tensors where
            only the device knows.
        streams: int64, of each tensor the words that its random numbers are drawn by
            (kernels/rounding.py), the first in the lower half; None where none are drawn.
    """

    device: torch.device
    hypers: np.ndarray
    traced: list[Traced]
    row_of: np.ndarray
    offsets: np.ndarray
    addresses: np.ndarray
    counted_on_device: bool
    rule: list[float | torch.Tensor] | None = None
    streams: np.ndarray | None = None


#: Update every tensor of a bucket: (grad_scale, found_inf) as a GradScaler leaves them.
Launch = Callable[[torch.Tensor | None, torch.Tensor | None], None]

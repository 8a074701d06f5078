"""The memory of a step: what is written must belong to one tensor, and stay while it is used."""

from __future__ import annotations

import _thread
from collections.abc import Sequence
from itertools import compress, pairwise
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

__all__ = ["Place", "Sharing", "find_sharing", "hold_storages", "others_may_run", "overlap", "span"]


class Place(NamedTuple):
    """Where an optimizer has a tensor.

    Attributes:
        owner: a parameter's place among all of them; of a group's option -1 - the group's place.
        name: of the state or option; "" for the parameter itself, ".grad" for its gradient.
    """

    owner: int
    name: str

    def find(self, optimizer: Any) -> Any:
        """What is there now."""
        if self.owner < 0:
            return optimizer.param_groups[-1 - self.owner].get(self.name)
        params = [p for group in optimizer.param_groups for p in group["params"]]
        param = params[self.owner]
        if self.name == ".grad":
            return param.grad
        return optimizer.state.get(param, {}).get(self.name) if self.name else param


Sharing = tuple[Place, Place]


def span(tensor: Any) -> tuple[int, int] | None:
    """Addresses of a tensor's first byte and of the one after its last; None if it has none."""
    if not isinstance(tensor, Tensor) or is_lazy(tensor) or tensor.layout is not torch.strided:
        return None
    if tensor.is_meta or not tensor.numel():
        return None
    start = tensor.data_ptr()
    reach = sum(
        stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return start, start + (reach + 1) * tensor.element_size()


def find_sharing(
    written: Sequence[tuple[Place, Tensor]], read: Sequence[tuple[Place, Tensor]]
) -> Sharing | None:
    """Two places whose memory overlaps, one of them written at least; None if there are none."""
    spans = sorted((*s, place) for place, t in written if (s := span(t)) is not None)
    for (_, end, a), (start, _, b) in pairwise(spans):
        if end > start:
            return a, b
    starts = np.array([s[0] for s in spans], np.int64)
    ends = np.array([s[1] for s in spans], np.int64)
    others = [(*s, place) for place, t in read if (s := span(t)) is not None]
    if not spans or not others:
        return None
    begins = np.array([s[0] for s in others], np.int64)
    first = np.searchsorted(ends, begins, side="right")
    for k in np.flatnonzero(first < len(spans)).tolist():
        if starts[first[k]] < others[k][1]:
            return spans[first[k]][2], others[k][2]
    return None


def overlap(a: tuple[int, int] | None, b: tuple[int, int] | None) -> bool:
    """Whether two spans have a byte in common."""
    return a is not None and b is not None and a[0] < b[1] and b[0] < a[1]


# -- what a launch reads stays for as long as it runs ---------------------------------------


def others_may_run() -> bool:
    """Whether this process has other threads of Python, which run while a kernel does."""
    return _thread._count() > 0


def hold_storages(tensors: Sequence[Any], addresses: np.ndarray) -> list[Any]:
    """The storages of tensors. Who has them keeps the memory, whatever the tensors get meanwhile.

    Args:
        tensors: with None for what isn't there.
        addresses: where a launch will look for their elements; below 4096 for no memory.
    """
    there = compress(tensors, (addresses > 4096).tolist())
    return list(map(Tensor.untyped_storage, there))

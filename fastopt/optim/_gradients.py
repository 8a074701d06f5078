"""Gradients that are clipped: what serves them, and where they are."""

from __future__ import annotations

import functools
from itertools import pairwise
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..dispatch import Request
from ..front.circumstances import PLAIN, add_circumstances, ambience_of
from ..kernels.gradients import Gradients
from ..kernels.layout import is_dense
from ..kernels.tables import EMPTY
from ._memory import hold_storages, others_may_run
from ._proof import increment_versions

__all__ = ["Found", "look"]


class Found(NamedTuple):
    """Some tensors that a backend serves. Whoever has this keeps them and their memory.

    Attributes:
        table: where they are.
        tensors: they.
        backend: its module.
        storages: their memory, where others may take it away.
    """

    table: Gradients
    tensors: list[Tensor]
    backend: ModuleType
    storages: list[Any]

    def norm(self, order: float) -> Tensor:
        """Of all together, a 0-d tensor; float64 on a CPU, elsewhere float32 or float64."""
        norm: Tensor = self.backend.total_norm(self.table, order)
        return norm

    def scale(self, most: float, norm: Tensor) -> None:
        """Multiply by most / (norm + 1e-6) where that is less than 1."""
        self.backend.scale_all(self.table, most, norm)
        increment_versions(self.tensors)

    def clamp(self, most: float) -> None:
        """Bring every element into [-most, most]."""
        self.backend.clamp_all(self.table, most)
        increment_versions(self.tensors)


def look(
    operation: str, tensors: list[Tensor], special: tuple[str, ...] = (), written: bool = True
) -> Found | None:
    """Find out who serves a call, and where its tensors are.

    Args:
        operation: the public function's name.
        tensors: of which the call is.
        special: what else makes it torch's, in words.
        written: whether the tensors are.

    Returns:
        None if torch's own code serves it.

    Raises:
        BackendUnavailable: the backend insisted on can't.
        RuntimeError: a tensor whose memory has been released.
    """
    if not tensors:
        return None
    around = bool(ambience_of()) or torch.is_inference_mode_enabled()
    place = None if around or special else _survey(tensors, written)
    reasons = list(special)
    if place is None:
        with torch._C.DisableTorchFunction():  # no override gets to see what is asked
            place = _ask(tensors, written, reasons)
    addresses, offsets = place
    device, dtype = tensors[0].device, tensors[0].dtype
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        reasons.append("the capture of a CUDA graph, whose replays find gradients elsewhere")
    request = Request(
        operation, device.type, (dtype,), int(offsets[-1]), tuple(reasons),
        torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dispatch.insisted(),
    )  # fmt: skip
    backend = dispatch.choose(request).backend
    if backend == "reference":
        return None
    storages: list[Any] = []
    while others_may_run():
        storages = hold_storages(tensors, addresses)
        again = _survey(tensors, written) or _ask(tensors, written, [])
        # What is at these addresses still is what is held: no other can be there now.
        if np.array_equal(again[0], addresses) and np.array_equal(again[1], offsets):
            break
        addresses, offsets = again
    table = Gradients(device, dtype, addresses, offsets)
    return Found(table, tensors, dispatch.load(backend), storages)


@functools.cache
def _compiled() -> Any:
    """The module that asks by compiled code, where numba and torch have what it needs."""
    try:
        from ..kernels.numba import survey
    except ImportError:
        return None
    return survey if survey.available() else None


def _survey(tensors: list[Tensor], apart: bool) -> tuple[np.ndarray, np.ndarray] | None:
    """Addresses and running counts of elements; None if it takes Python to say more."""
    first = tensors[0]
    if not _compiled() or type(first) not in PLAIN or first.layout is not torch.strided:
        return None
    found: tuple[np.ndarray, np.ndarray] | None = _compiled().survey(tensors, apart)
    return found


def _ask(tensors: list[Tensor], apart: bool, special: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """The same, or in words why there are none."""
    nothing = np.zeros(0, np.int64), np.zeros(1, np.int64)
    before = len(special)
    add_circumstances(tensors, special)
    if torch.is_inference_mode_enabled():
        special.append("inference mode")
    if len(special) == before:
        if len({t.dtype for t in tensors}) > 1:
            special.append("tensors of several dtypes")
        if any(t.is_inference() for t in tensors):
            special.append("a tensor made in inference mode")
        special += [
            f"a tensor with gaps or overlaps: strides {tuple(t.stride())}"
            for t in tensors
            if not is_dense(t)
        ]
    special[:] = dict.fromkeys(special)  # each once
    if len(special) > before:
        return nothing
    sizes = [t.numel() for t in tensors]
    addresses = [t.data_ptr() if size else EMPTY for t, size in zip(tensors, sizes, strict=True)]
    spans = sorted(
        (begin, begin + size * tensors[0].itemsize)
        for begin, size in zip(addresses, sizes, strict=True)
        if size
    )
    if apart and any(end > begin for (_, end), (begin, _) in pairwise(spans)):
        special.append("tensors that share memory")
    return np.array(addresses, np.int64), np.cumsum([0, *sizes], dtype=np.int64)

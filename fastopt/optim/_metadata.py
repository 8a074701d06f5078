"""Whether tensors are what and where they were."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ._kinds import Spans

__all__ = ["Proof", "Versions", "prove"]


class Proof(Protocol):
    """Of types, dtypes, devices, sizes and strides, and addresses, of a step's tensors.

    It may say no where nothing that matters has changed, never yes where something has. It keeps
    no tensor.
    """

    def holds(self, written: Sequence[Tensor], grads: Sequence[Any]) -> bool:
        """Whether all are what they were; new addresses of gradients are written down.

        Args:
            written: what the step writes to, the same objects as at first; must be where it was.
            grads: the gradients, which may be other ones, with memory of their own.
        """
        ...


@functools.cache
def _compiled() -> Any:
    """The module that proves by compiled code, where numba and torch have what it needs."""
    try:
        from ..kernels.numba import proof
    except ImportError:
        return None
    return proof if proof.available() else None


def prove(
    written: Sequence[Tensor], grads: Sequence[Tensor], addresses: np.ndarray, spans: Spans
) -> Proof:
    """The proof that a step's tensors are what they are now.

    Args:
        written, grads: as for `holds`.
        addresses: gets where each gradient's elements begin, now and whenever the proof holds.
        spans: the memory that gradients must lie outside of.
    """
    if _compiled():
        proof: Proof = _compiled().Proof(written, grads, addresses, spans.starts, spans.ends)
        return proof
    return _SlowProof(written, grads, addresses, spans)


class _SlowProof:
    def __init__(
        self, written: Sequence[Tensor], grads: Sequence[Tensor], addresses: np.ndarray,
        spans: Spans,
    ) -> None:  # fmt: skip
        self._known = list(map(_metadata, [*written, *grads]))
        self._where = list(map(Tensor.data_ptr, written))
        self._addresses, self._spans = addresses, spans
        self._sizes = np.array([t.numel() * t.itemsize for t in grads], np.int64)
        addresses[:] = list(map(Tensor.data_ptr, grads))

    def holds(self, written: Sequence[Tensor], grads: Sequence[Any]) -> bool:
        if list(map(_metadata, [*written, *grads])) != self._known:
            return False
        if list(map(Tensor.data_ptr, written)) != self._where:
            return False
        found = np.array(list(map(Tensor.data_ptr, grads)), np.int64)
        if self._sizes[found == 0].any() or self._spans.overlap(found, found + self._sizes):
            return False
        self._addresses[:] = found
        return True


def _metadata(tensor: Tensor) -> Any:
    if not isinstance(tensor, Tensor):
        return None
    strides = tensor.stride() if tensor.layout is torch.strided else None
    return type(tensor), tensor.dtype, tensor.device, tensor.is_neg(), tensor.shape, strides


class Versions:
    """What autograd knows the values of some tensors by."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._fast = tensors, None

    def increment(self) -> None:
        """Say that all values have changed."""
        if self._fast is not None and self._fast.increment():
            return
        torch.autograd.graph.increment_version(self._tensors)
        # A tensor without a version (its values began in inference mode) has passed here as
        # one that still is of that mode, or not at all: unless in that mode.
        if _compiled() and not torch.is_inference_mode_enabled():
            versioned = [t for t in self._tensors if not t.is_inference()]
            self._fast = _compiled().Versions(versioned)

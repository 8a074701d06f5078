"""Whether tensors are what and where they were."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["Proof", "Versions", "prove"]


class Proof(Protocol):
    """Of types, dtypes, devices, sizes and strides, and addresses, of some tensors.

    It may say no where nothing that matters has changed, never yes where something has. It keeps
    no tensor.
    """

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Whether the tensors, the same ones as at first, are what they were, and where."""
        ...

    def addresses(self, tensors: Sequence[Any]) -> np.ndarray | None:
        """Where the elements of as many other tensors begin; None if they are not alike.

        The array is valid until the next call.
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


def prove(tensors: Sequence[Tensor]) -> Proof:
    """The proof that tensors are what and where they are now."""
    proof: Proof = _compiled().Proof(tensors) if _compiled() else _SlowProof(tensors)
    return proof


class _SlowProof:
    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._known = list(map(_metadata, tensors))
        self._where = list(map(Tensor.data_ptr, tensors))

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        found = self.addresses(tensors)
        return found is not None and found.tolist() == self._where

    def addresses(self, tensors: Sequence[Any]) -> np.ndarray | None:
        if list(map(_metadata, tensors)) != self._known:
            return None
        return np.array(list(map(Tensor.data_ptr, tensors)), np.int64)


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

"""How a tensor lies in memory, as far as a loop has to know."""

from __future__ import annotations

from typing import NamedTuple

import torch

__all__ = ["ClassAxis", "class_axis", "is_dense", "same_layout"]


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether the elements fill one span of memory, each place once, in any order of axes."""
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def same_layout(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether equal positions in memory hold equal indices, both tensors being dense."""
    if a.shape != b.shape:
        return False
    if a.is_contiguous():
        return b.is_contiguous()
    return a.stride() == b.stride() and is_dense(a)


class ClassAxis(NamedTuple):
    """Sizes and strides, in elements, of (N, C, d1, …) seen as (outer, class, inner)."""

    classes: int
    outer: int
    inner: int
    outer_stride: int
    inner_stride: int
    class_stride: int


def class_axis(tensor: torch.Tensor) -> ClassAxis | None:
    """The view of a (C,), (N, C) or (N, C, d1, …) tensor; None if d1, … share no one stride."""
    shape, strides = tuple(tensor.shape), tensor.stride()
    if len(shape) == 1:
        return ClassAxis(shape[0], 1, 1, 0, 0, strides[0])
    if len(shape) == 2:
        return ClassAxis(shape[1], 1, shape[0], 0, strides[0], strides[1])
    inner, inner_stride = 1, 1
    for size, stride in zip(reversed(shape[2:]), reversed(strides[2:]), strict=True):
        if size != 1:
            if inner == 1:
                inner_stride = stride
            elif stride != inner * inner_stride:
                return None
        inner *= size
    return ClassAxis(shape[1], shape[0], inner, strides[0], inner_stride, strides[1])

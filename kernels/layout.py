"""How a tensor lies in memory, as far as a loop has to know."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

__all__ = [
    "ClassAxis", "as_rows", "class_axis", "classes_last", "dense_axis", "is_dense",
    "is_released", "released_error", "same_layout", "view_along",
]  # fmt: skip


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


def as_rows(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor (…, C) as (N, C), its classes side by side; a copy only where they are not."""
    rows = tensor.reshape(math.prod(tensor.shape[:-1]), tensor.shape[-1])  # maybe of symbols
    return rows if rows.stride(1) == 1 else rows.contiguous()


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


def classes_last(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it, with classes side by side."""
    axis, d = class_axis(tensor), min(1, tensor.dim() - 1)
    if axis is not None and axis.class_stride == 1:
        return tensor
    # a clone: to `contiguous` the stride of a dimension of size 1 is as good as any
    return tensor.movedim(d, -1).clone(memory_format=torch.contiguous_format).movedim(-1, d)


def dense_axis(x: ClassAxis) -> ClassAxis:
    """The same sizes without gaps, with the classes last where x has them last."""
    stride, classes, inner = x.inner * x.classes, x.classes, x.inner
    if x.class_stride == 1:
        return ClassAxis(classes, x.outer, inner, stride, classes, 1)
    return ClassAxis(classes, x.outer, inner, stride, 1, inner)


def view_along(flat: torch.Tensor, shape: torch.Size, x: ClassAxis) -> torch.Tensor:
    """A flat tensor seen in `shape`, (C,), (N, C) or (N, C, d1, …), laid out as dense_axis(x)."""
    g = dense_axis(x)
    if len(shape) == 1:
        return flat
    if len(shape) == 2:
        return flat.as_strided(shape, (g.inner_stride, g.class_stride))
    middle = flat.as_strided(
        (x.outer, x.classes, x.inner), (g.outer_stride, g.class_stride, g.inner_stride)
    )
    return middle.view(shape) if x.class_stride == 1 else middle.reshape(shape)


def is_released(tensor: torch.Tensor) -> bool:
    """Whether a tensor with elements has no memory, as after its storage was resized to 0.

    Of one whose elements begin behind the storage's beginning, the address itself isn't 0.
    """
    address = tensor.data_ptr()
    if address != 0 and tensor.storage_offset() == 0:  # as almost always
        return False
    null = address == tensor.itemsize * tensor.storage_offset()
    return null and tensor.numel() > 0 and not tensor.is_meta


def released_error(what: str, tensor: torch.Tensor) -> RuntimeError:
    """What to raise for it: some of torch's own code would end the process."""
    return RuntimeError(
        f"{what} of size {tuple(tensor.shape)} has no memory; its storage has "
        f"{tensor.untyped_storage().nbytes()} bytes"
    )

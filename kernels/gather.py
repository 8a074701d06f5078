"""What a gathered loss needs on any device: how its tensors lie, and memory for its results."""

from __future__ import annotations

import torch

from .layout import ClassAxis, class_axis, dense_axis

__all__ = ["gradient_axis", "positions", "readable"]


def readable(input: torch.Tensor) -> tuple[torch.Tensor, ClassAxis]:
    """The input, or a copy if its positions lie too unevenly; and its class axis."""
    axis = class_axis(input)
    if axis is None:
        input = input.contiguous()
        axis = class_axis(input)
        assert axis is not None
    return input, axis


def gradient_axis(input: torch.Tensor) -> ClassAxis:
    """How the gradient lies: without gaps, in the order of the input where that can be walked."""
    axis = class_axis(input)
    if axis is None:
        axis = class_axis(torch.empty(input.shape, device="meta"))
        assert axis is not None
    return dense_axis(axis)


def positions(input: torch.Tensor) -> tuple[int, ...]:
    """The shape of a number for each position."""
    shape = tuple(input.shape)
    return shape[:1] + shape[2:] if len(shape) > 1 else ()

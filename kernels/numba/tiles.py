"""Matrices of many shapes, cut into tiles that threads share.

A tensor is a stack of matrices of its last two dimensions; one of fewer dimensions is a matrix of
one row. Tiles depend on the shapes alone. Each thread gets a run of them, of about as many elements
as the others.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from .compiler import kernel
from .norm import tensor_at
from .pointer import load

__all__ = [
    "COLUMNS", "COLUMN_SUMS", "HEIGHT", "MATRIX", "ROWS", "ROW_SUMS", "TILE", "WIDTH", "entry_of",
    "next_tensor", "shapes_of", "tile_at", "tiles_of",
]  # fmt: skip

# Of a tile. Sums of columns wait in the first-level cache, 8 kB of them; what tiles leave for other
# tiles to add is an eighth of a byte an element.
ROWS, COLUMNS = 64, 1024
#: Lines of the table of shapes, each with an entry for every tensor and a last one where they end:
#: of a matrix, rows and columns; the first tile; and the places in scratch memory of the mean of
#: each matrix, of the sums of rows and of those of columns that several tiles have parts of.
HEIGHT, WIDTH, TILE, MATRIX, ROW_SUMS, COLUMN_SUMS = range(6)


@kernel
def entry_of(shapes: Any, line: int, tensors: int, t: int) -> Any:
    return load(shapes, line * (tensors + 1) + t)


@kernel
def first_tile(shapes: Any, offsets: Any, tensors: int, place: int) -> Any:
    """The tile with which the work begins whose elements begin about this place."""
    if place >= load(offsets, tensors):
        return entry_of(shapes, TILE, tensors, tensors)
    t = tensor_at(offsets, tensors, place)
    start, end = load(offsets, t), load(offsets, t + 1)
    tile, next_tile = entry_of(shapes, TILE, tensors, t), entry_of(shapes, TILE, tensors, t + 1)
    return tile + (place - start) * (next_tile - tile) // (end - start)


@kernel
def tiles_of(part: int, parts: int, shapes: Any, offsets: Any, tensors: int) -> Any:
    """The first tile of a part, the one behind its last, and the first one's tensor."""
    total = load(offsets, tensors)
    first = first_tile(shapes, offsets, tensors, part * total // parts)
    last = first_tile(shapes, offsets, tensors, (part + 1) * total // parts)
    t, high = 0, tensors
    while high - t > 1:
        middle = (t + high) // 2
        if entry_of(shapes, TILE, tensors, middle) <= first:
            t = middle
        else:
            high = middle
    return first, last, t


@kernel
def next_tensor(shapes: Any, tensors: int, t: int, tile: int) -> int:
    while entry_of(shapes, TILE, tensors, t + 1) <= tile:
        t += 1
    return t


@kernel
def tile_at(shapes: Any, tensors: int, t: int, tile: int) -> Any:
    """Where a tile is: its matrix, and in units of a tile how far down and how far to the right.

    And how many tiles the matrix has of each kind.
    """
    height, width = entry_of(shapes, HEIGHT, tensors, t), entry_of(shapes, WIDTH, tensors, t)
    down, across = (height + ROWS - 1) // ROWS, (width + COLUMNS - 1) // COLUMNS
    local = tile - entry_of(shapes, TILE, tensors, t)
    matrix = local // (down * across)
    rest = local - matrix * down * across
    return matrix, rest // across, rest % across, down, across


def shapes_of(shapes: list[torch.Size]) -> tuple[np.ndarray, int]:
    """The table of shapes; how many float64 a launch needs as scratch memory, but for buffers."""
    lines = np.zeros((6, len(shapes) + 1), np.int64)
    matrices = np.zeros(len(shapes), np.int64)
    for t, shape in enumerate(shapes):
        width = shape[-1] if shape else 1
        height = shape[-2] if len(shape) > 1 else 1
        lines[[HEIGHT, WIDTH], t] = height, width
        matrices[t] = shape.numel() // (height * width)
    heights, widths = lines[HEIGHT, :-1], lines[WIDTH, :-1]
    down, across = -(-heights // ROWS), -(-widths // COLUMNS)
    lines[TILE, 1:] = np.cumsum(matrices * down * across)
    begin = 2 * lines[TILE, -1]
    for line, sizes in (
        (MATRIX, matrices),
        (ROW_SUMS, np.where(across > 1, matrices * heights * across, 0)),
        (COLUMN_SUMS, np.where(down > 1, matrices * down * widths, 0)),
    ):
        lines[line, 0] = begin
        lines[line, 1:] = begin + np.cumsum(sizes)
        begin = lines[line, -1]
    return lines, int(begin) + len(shapes)

"""An update by the mean squares of a gradient's rows and columns, over all tensors of a bucket.

Launches of a step, each over all tensors: what doesn't depend on the element (`derive`); of
matrices the means of rows, those of columns, both into what is kept of them, and the mean of each
matrix; the size of the changes, which for other tensors moves the variance as well; the rates; and
the update. So of matrices a gradient is read four times and a parameter twice, in float32 28 bytes
an element with what is written.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from ..tables import Tables
from .compiler import TYPES, launch
from .device_table import DeviceTable
from .factored_loops import (
    change_blocks,
    column_means,
    matrix_means,
    move_means,
    row_means,
    set_rates,
)
from .multi_tensor import Launches, block_shape, describe_programs
from .record import formula_of

__all__ = ["describe_factored", "launcher"]

THREADS = 256
#: Entries of kept means that a program moves.
MEANS = 256
#: Lines of a tensor's shape, which `shape_of` reads.
HEIGHT, WIDTH, ACROSS, DOWN, ROW_PARTS, COLUMN_PARTS, MATRICES = range(7)


def row_tile(width: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows of a program, and the columns that it has of them."""
    rows = np.where(width <= 4, 512, np.where(width <= 32, 64, 8))
    return rows, 16 * 2048 // rows


def column_tile(height: np.ndarray, columns: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Columns of a program, and the rows that it has of them."""
    wide = np.where(columns <= 4, 4, np.where(columns <= 32, 32, 128))
    tile = np.where(height <= 4, 512, wide)
    return tile, 16 * 2048 // tile


def matrix_tile(height: np.ndarray) -> np.ndarray:
    """Matrices of a program."""
    return np.where(height <= 4, 512, np.where(height <= 32, 64, 1))


def _block_shape(dtype: torch.dtype) -> tuple[int, int]:
    """Elements and threads of a program: of float64 one a thread, else a root needs the stack."""
    return (256, 256) if dtype == torch.float64 else block_shape(dtype)


class Factored(Launches):
    """The launches of one bucket of Adafactor's."""

    _more_lines = 7
    _block_shape = staticmethod(_block_shape)
    _shapes = np.zeros((2, 0), np.int64)

    def _count_blocks(self) -> None:
        super()._count_blocks()
        self._matrices = len(self._lines_used) == 4
        if not self._matrices or not self._shapes.size:
            return
        shape = self._lines[-7:]
        height, width = shape[: WIDTH + 1] = self._shapes
        count = np.diff(self._offsets)  # of those without a gradient 0
        rows, columns, matrices = count // width, count // height, count // (height * width)
        tall, part = row_tile(width)
        shape[ACROSS] = -(-width // part)
        of_rows = -(-rows // tall) * shape[ACROSS]
        tile, part = column_tile(height, columns)
        shape[DOWN] = -(-height // part)
        of_columns = -(-columns // tile) * shape[DOWN]
        sizes = np.concatenate([rows * shape[ACROSS], columns * shape[DOWN], matrices])
        ends = np.cumsum(sizes)
        shape[ROW_PARTS:] = (ends - sizes).reshape(3, -1)
        self._room = int(ends[-1])
        moved = -(-rows // MEANS) + -(-columns // MEANS)
        programs = of_rows, of_columns, moved, -(-matrices // matrix_tile(height))
        self._work = [(int(p.sum()), DeviceTable(_work(p), self._tables.device)) for p in programs]

    def __call__(  # type: ignore[override]
        self, params: list[torch.Tensor], grad_scale: torch.Tensor | None,
        found_inf: torch.Tensor | None,
    ) -> None:  # fmt: skip
        if found_inf is not None and found_inf.item():
            return
        if self._matrices and not self._shapes.size:
            self._shapes = np.array([p.shape[-2:] for p in params], np.int64).T
            self._count_blocks()
        table, constants, grad_scale, _ = self._ready(grad_scale, None)
        t, device, compute = self._tables, self._tables.device, TYPES[self._compute]
        tensors, shape, lines = len(t.row_of), len(t.addresses) + 3, self._lines_used
        record = {"MAKE": self._update["MAKE"], "FIELDS": self._fields}
        common = {"SHAPE": shape, "COMPUTE": compute}
        moved = {"MOVED": formula_of(self._record, "moved")}
        slots = {"LINES": lines, "DTYPES": self._dtypes}
        room = None
        if self._matrices:
            room = torch.empty(self._room, dtype=self._compute, device=device)
            of_rows, of_columns, of_means, of_matrices = self._work
            grads = {"GRAD": lines[-1], "DTYPE": self._dtypes[-1]}
            for function, (programs, work) in ((row_means, of_rows), (column_means, of_columns)):
                launch(
                    function, (programs,), device, THREADS, table, work.current(), tensors,
                    grad_scale, room, **grads, **common,
                )  # fmt: skip
            launch(
                move_means, (of_means[0],), device, THREADS, table, of_means[1].current(),
                constants, tensors, room, BLOCK=MEANS, **slots, **common, **record, **moved,
            )  # fmt: skip
            launch(
                matrix_means, (of_matrices[0],), device, THREADS, table, of_matrices[1].current(),
                constants, tensors, room, **slots, **common, **record,
            )  # fmt: skip
        partials = torch.empty(2 * self._blocks, dtype=self._compute, device=device)
        change = functools.partial(
            launch, change_blocks, (self._blocks,), device, self._threads, table,
            self._tensor_of.current(), constants, tensors, grad_scale, room, partials,
            FORMULA=self._update["FORMULA"], BLOCK=self._block, **slots, **common, **record,
            **moved,
        )  # fmt: skip
        change(UPDATES=False)
        launch(
            set_rates, (tensors,), device, THREADS, table, constants, tensors, partials,
            RATE=formula_of(self._record, "rate_of"), PER_BLOCK=self._block, BLOCK=1024, **common,
            **record,
        )  # fmt: skip
        change(UPDATES=True)
        self._count()


def _work(programs: np.ndarray) -> np.ndarray:
    """For each program its tensor, and its number among that one's, who have so many."""
    tensor = np.repeat(np.arange(len(programs)), programs)
    first = np.cumsum(programs) - programs
    return np.stack([tensor, np.arange(len(tensor)) - first[tensor]], 1).astype(np.int32)


def launcher(
    record: Any,
    slots: tuple[torch.dtype | None, ...],
    grad: torch.dtype,
    step: torch.dtype,
) -> Callable[[Tables], Any]:
    """The update for one kind of bucket; arguments as those of the CPU backend's."""
    return functools.partial(Factored, record, (*slots, grad), (), step, None, None)


def describe_factored(param: torch.dtype, sizes: list[int]) -> str:
    """How a bucket runs, in words."""
    programs = describe_programs(_block_shape(param), sizes)
    return f"{len(sizes):,} tensors in each of several launches, of up to {programs}"

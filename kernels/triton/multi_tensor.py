"""One optimizer update over all tensors of a bucket, in one launch.

A program updates one block of one tensor, which it looks up in tables on the device; how many
tensors there are, how large or in which parameter group, makes no difference. The tables are
uploaded when they change, which with gradients that stay where they are is never. Ahead of it
a launch of one thread a tensor computes what does not depend on the element, in float64 as
torch does on the host: at every step where it depends on the step, else when it changes.

Bytes per element are those of the slots and the gradient, each read once and each slot written
once: Adam in float32 28, in bfloat16 14. A GradScaler's scale is taken along, where torch
rewrites the gradients (4 more).
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from ..rounding import MASK
from ..tables import Averaged, Launch, Tables
from .compiler import TYPES, compute_dtype, launch
from .device_table import DeviceTable, capturing, current_stream
from .record import formula_of, maker
from .rounding import codes
from .updates import ALIGNED, COUNT, FIRST, derive, update_blocks

#: Steps that may be captured in CUDA graphs before one that isn't.
CAPTURES = 8
_CAPTURED_TOO_EARLY = (
    "an optimizer's first step, or its first after parameters, states or options changed or with "
    "other gradients, can't be captured in a CUDA graph: take a step before the capture"
)


def block_shape(dtype: torch.dtype) -> tuple[int, int]:
    """Elements and threads of a program.

    8 elements a thread: one or two 16-byte loads of each of up to five tensors under way. Of
    float64 2, one such load: a number takes two registers there, and division and root are
    functions that are called. With 4, or with 2 in 128 threads, some of the Tritons from 3.6 to
    3.9 keep registers on the stack around the calls (tests/test_compiled_ahead.py).
    """
    return (512, 256) if dtype == torch.float64 else (1024, 128)


def read_numbers(addresses: np.ndarray, dtype: torch.dtype) -> torch.Tensor:
    """The numbers on the host at these addresses."""
    size = dtype.itemsize
    found = bytearray(b"".join(ctypes.string_at(a, size) for a in addresses.tolist()))
    return torch.frombuffer(found, dtype=dtype) if found else torch.empty(0, dtype=dtype)


def write_numbers(addresses: np.ndarray, numbers: torch.Tensor) -> None:
    """Put numbers where they belong on the host."""
    size = numbers.dtype.itemsize
    start = numbers.contiguous().data_ptr()
    for k, address in enumerate(addresses.tolist()):
        ctypes.memmove(address, start + k * size, size)


class Launches:
    """The launches of one bucket, bound to its tables."""

    #: of the table on the device, behind those of every update
    _more_lines = 0
    _block_shape = staticmethod(block_shape)

    def __init__(
        self,
        record: Any,
        dtypes: tuple[torch.dtype | None, ...],
        scalars: tuple[torch.dtype, ...],
        step: torch.dtype | None,
        averaged: Averaged | None,
        rounding: tuple[str, ...] | None,
        tables: Tables,
    ) -> None:
        """record: its class; dtypes: of the slots and gradients; scalars: of the states that are
        one number; step: of the counters; averaged: the parameters' averages; rounding: how the
        slots are stored."""
        self._record, self._tables = record, tables
        self._step = None if step is None else TYPES[step]
        # The dtype of the counters, if they are on the host.
        self._counted = None if tables.counted_on_device else step
        self._scalars = scalars
        self._first = len(dtypes) - 1  # the line of the first of these
        # The gradients' is behind them.
        lines = [*range(self._first), self._first + len(scalars)]
        self._lines_used = tuple(k for k, d in zip(lines, dtypes, strict=True) if d is not None)
        self._dtypes = tuple(TYPES[d] for d in dtypes if d is not None)
        self._compute = compute_dtype(dtypes[0])  # type: ignore[arg-type]
        self._block, self._threads = self._block_shape(dtypes[0])  # type: ignore[arg-type]
        # Of the slots the first is the parameter, and the last of the dtypes the gradient's.
        states = dtypes[1 : len(record.slots) + 1]
        unused = tuple(n for n, d in zip(record.slots, states, strict=True) if d is None)
        self._update = {
            "FORMULA": formula_of(record, "update", unused),
            "MAKE": maker(record, record.derived),
        }
        rule = None if averaged is None else averaged.record
        self._rule = np.zeros(0 if rule is None else len(rule.numbers))
        self._averaging = {
            "RULE": None if rule is None else formula_of(rule, "update"),
            "MAKE_RULE": None if rule is None else maker(rule),
            "RULE_FIELDS": len(self._rule),
        }
        self._at_step = {
            "FORMULA": formula_of(record, "at_step") if record.derived else None,
            "MAKE": maker(record),
            "NEXT": formula_of(record, "next_numbers") if scalars else None,
            "SCALARS": tuple(TYPES[d] for d in scalars),
            "WIDE": tuple(TYPES[compute_dtype(d)] for d in scalars),
        }
        self._drawn = tables.streams is not None
        used = [d is not None for d in dtypes[: len(rounding or ())]]
        self._rounding = {
            "ROUNDING": None if rounding is None else codes(rounding, used),
            "STATES": sum(d is not None for d in states),
            "DRAWN": self._drawn,
        }
        self._fields = len(record.numbers) + len(record.derived)
        # Every line of addresses, and for each tensor how many elements it has, its first block,
        # and whether all of its addresses are multiples of 16 bytes.
        lines_of_all = len(tables.addresses) + 3 + self._more_lines
        self._lines = np.zeros((lines_of_all, len(tables.row_of)), np.int64)
        self._per_step = (bool(record.derived) and step is not None) or self._drawn
        self._bind()

    def _bind(self) -> None:
        """Make the tables on the device. Memory belongs to the stream that it is taken on."""
        t = self._tables
        self._count_blocks()
        # Gradients and hyperparameters may be others in a captured step than before.
        self._table, self._hypers = (
            DeviceTable(host, t.device, CAPTURES) for host in (self._lines, t.hypers)
        )
        self._rules = DeviceTable(self._rule, t.device, CAPTURES)
        rows = np.zeros((3, len(t.row_of)), np.int64) if self._drawn else t.row_of
        self._row_of, self._behind, self._numbers = (
            DeviceTable(host, t.device)
            for host in (
                rows,
                np.zeros(len(t.row_of)),
                np.zeros((len(self._scalars), len(t.row_of))),
            )
        )
        if self._drawn:
            self._write_rows()
        self._constants = self._empty_constants()
        self._stream = current_stream(t.device)

    def _write_rows(self) -> None:
        """Of random numbers the streams' two words, behind each tensor's row a line each."""
        t: Any = self._tables
        self._row_of.host[:] = t.row_of, t.streams & MASK, t.streams >> 32 & MASK

    def _count_blocks(self) -> None:
        """Write down which program has which block; tensors without a gradient have none."""
        t = self._tables
        self._offsets = t.offsets.copy()
        sizes = np.diff(t.offsets)
        blocks = -(-sizes // self._block)
        self._blocks = int(blocks.sum())
        self._lines[len(t.addresses) + COUNT] = sizes
        self._lines[len(t.addresses) + FIRST] = np.cumsum(blocks) - blocks
        tensor_of = np.repeat(np.arange(len(blocks), dtype=np.int32), blocks)
        self._tensor_of = DeviceTable(tensor_of, t.device)

    def _empty_constants(self) -> torch.Tensor:
        lines = self._fields + 2 * self._drawn  # of float64 a line has room for two words
        shape = (lines, len(self._tables.row_of))
        return torch.empty(shape, dtype=self._compute, device=self._tables.device)

    def _ready(
        self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """The table and the constants of this step, and what a GradScaler has left, all there."""
        t = self._tables
        constants = self._constants
        captured = capturing(t.device)
        if captured:  # replays must not see what later steps write there
            constants = self._empty_constants()
        elif current_stream(t.device) != self._stream:
            self._bind()
            constants = self._constants
        if not np.array_equal(self._offsets, t.offsets):
            if captured:
                raise RuntimeError(_CAPTURED_TOO_EARLY)
            self._count_blocks()
        addresses = len(t.addresses)
        self._lines[:addresses] = t.addresses
        aligned = np.bitwise_or.reduce(t.addresses[list(self._lines_used)]) % 16 == 0
        self._lines[addresses + ALIGNED] = aligned
        grad_scale, found_inf = (
            None if x is None else x.to(t.device, non_blocking=True)
            for x in (grad_scale, found_inf)
        )
        table = self._table.current()
        self._derive(table, constants, found_inf, captured)
        return table, constants, grad_scale, found_inf

    def __call__(self, grad_scale: torch.Tensor | None, found_inf: torch.Tensor | None) -> None:
        t = self._tables
        table, constants, grad_scale, found_inf = self._ready(grad_scale, found_inf)
        launch(
            update_blocks, (self._blocks,), t.device, self._threads, table,
            self._tensor_of.current(), constants, len(t.row_of), grad_scale, found_inf,
            self._rule_numbers(), LINES=self._lines_used, DTYPES=self._dtypes, FIELDS=self._fields,
            COMPUTE=TYPES[self._compute], BLOCK=self._block, **self._update, **self._averaging,
            **self._rounding,
        )  # fmt: skip
        if self._counted is not None and (found_inf is None or found_inf.item() == 0):
            self._count()

    def _rule_numbers(self) -> torch.Tensor | None:
        """The numbers of the averages' rule, on the device."""
        t = self._tables
        if t.rule is None:
            return None
        there = {k: v for k, v in enumerate(t.rule) if isinstance(v, torch.Tensor)}
        self._rule[:] = [np.nan if k in there else v for k, v in enumerate(t.rule)]
        numbers = self._rules.current()
        for k, value in there.items():
            numbers[k].copy_(value.reshape(()))
        return numbers

    def _read(self, line: int, dtype: Any) -> np.ndarray:
        """Numbers on the host, in float64, of those tensors that have a gradient."""
        addresses = self._tables.addresses[line]
        return read_numbers(addresses[addresses != 0], dtype).double().numpy()

    def _count(self) -> None:
        """Bring numbers on the host to where they are after a step."""
        t = self._tables
        there = t.addresses[-1] != 0
        if self._counted is None or not there.any():
            return
        steps = read_numbers(t.addresses[-1][there], self._counted) + 1
        if self._scalars:
            rows = torch.from_numpy(t.hypers[t.row_of[there]])
            hyper = SimpleNamespace(**dict(zip(self._record.numbers, rows.unbind(1), strict=True)))
            lines = [t.addresses[self._first + k][there] for k in range(len(self._scalars))]
            old = [
                read_numbers(line, dtype).to(compute_dtype(dtype))
                for line, dtype in zip(lines, self._scalars, strict=True)
            ]
            new = self._record.next_numbers(hyper, steps, *old)
            for line, values, dtype in zip(lines, new, self._scalars, strict=True):
                write_numbers(line, values.to(dtype))
        write_numbers(t.addresses[-1][there], steps)

    def _derive(
        self,
        table: torch.Tensor,
        constants: torch.Tensor,
        found_inf: torch.Tensor | None,
        anew: bool,
    ) -> None:
        """Bring the constants up to date, and counters on the device."""
        t = self._tables
        steps = behind = step = scalars = None
        if self._step is not None and t.counted_on_device:
            steps, scalars = table[len(t.addresses) - 1], table[self._first]
        elif self._per_step:
            there = t.addresses[-1] != 0
            counts = self._read(-1, self._counted)
            step = float(counts.max()) + 1.0
            self._behind.host[there] = counts.max() - counts
            behind = self._behind.current()
            for k, dtype in enumerate(self._scalars):
                self._numbers.host[k, there] = self._read(self._first + k, dtype)
            if self._scalars:
                scalars = self._numbers.current()
        uploads, hypers = self._hypers.uploads, self._hypers.current()
        for row, field, value in t.traced:
            hypers[row, field].copy_(value.reshape(()))
        changed = anew or uploads != self._hypers.uploads or bool(t.traced)
        if steps is None and not self._per_step and not changed:
            return
        if self._drawn:
            self._write_rows()
        launch(
            derive, (-(-len(t.row_of) // 128),), t.device, 128, hypers, self._row_of.current(),
            steps, behind, step, scalars, found_inf, constants, len(t.row_of), STEP=self._step,
            FIELDS=t.hypers.shape[1], COMPUTE=TYPES[self._compute], BLOCK=128, DRAWN=self._drawn,
            **self._at_step,
        )  # fmt: skip


def launcher(
    record: Any,
    slots: tuple[torch.dtype | None, ...],
    scalars: tuple[torch.dtype, ...],
    grad: torch.dtype,
    step: torch.dtype | None,
    averaged: Averaged | None = None,
    rounding: tuple[str, ...] | None = None,
) -> Callable[[Tables], Launch]:
    """The update for one kind of bucket; arguments as those of the CPU backend's.

    Raises:
        RuntimeError: a CUDA graph is being captured; tables and states have to be there before.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(_CAPTURED_TOO_EARLY)
    if averaged is not None:
        slots = (*slots, averaged.dtype)
    return functools.partial(Launches, record, (*slots, grad), scalars, step, averaged, rounding)


def describe_step(param: torch.dtype, sizes: list[int]) -> str:
    """How a bucket runs, in words."""
    return f"{len(sizes):,} tensors in one launch of {describe_programs(block_shape(param), sizes)}"


def describe_programs(shape: tuple[int, int], sizes: list[int]) -> str:
    """How many there are, of so many elements and threads each."""
    block, threads = shape
    programs = sum(-(-size // block) for size in sizes)
    return f"{programs:,} programs, {block} elements and {threads} threads each"

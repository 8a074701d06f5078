"""The machine code of averages, compiled for GPUs that need not be there."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import torch
from cases import INTERPRETED

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES, Code, compiling

from fastopt.kernels import triton as backend
from fastopt.kernels.tables import Averaged, Tables
from fastopt.optim._averaging import RECORDS
from fastopt.optim.adam import AdamUpdate

CPU = torch.device("cpu")
FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
#: Of the average and of what goes into it.
PAIRS = (
    (FLOAT, FLOAT), (BFLOAT, BFLOAT), (HALF, HALF), (DOUBLE, DOUBLE), (FLOAT, BFLOAT),
    (FLOAT, HALF), (DOUBLE, FLOAT), (FLOAT, DOUBLE),
)  # fmt: skip


def compiled(
    machine: str, record: Any, average: torch.dtype, value: torch.dtype, weights: int = 1
) -> list[Code]:
    """What so many updates launch, each with another weight."""
    tensors = 3
    tables = Tables(
        CPU, np.ones((2, len(record.numbers))), [], np.zeros(tensors, np.int64),
        np.arange(tensors + 1) * 5000, np.zeros((3, tensors), np.int64), False,
    )  # fmt: skip
    with compiling(MACHINES[machine]) as codes:
        update = backend.step_launcher(record, (average,), (), value, None)(tables)
        for k in range(weights):
            tables.hypers[0] = 0.25 * k
            update(None, None)
    return codes


#: Every two of these in one of them.
COMBINED = [
    (machine, RECORDS[(i + j) % len(RECORDS)], pair)
    for i, machine in enumerate(MACHINES)
    for j, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize(("machine", "record", "pair"), COMBINED, ids=str)
def test_machine_code(machine: str, record: Any, pair: tuple[torch.dtype, torch.dtype]) -> None:
    """Nothing is spilled, doubles are where they are asked for alone, and accesses are wide."""
    codes = compiled(machine, record, *pair)
    assert [code.name for code in codes] == ["derive", "update_blocks"]
    for code in codes:
        assert code.resources["spills"] == code.resources["stack"] == 0, code
        assert code.machine.holds(code.threads, code.resources["registers"]), code
    code = codes[1]
    doubles = any(re.search(r"[._]f64(_|\b)", i.text) for i in code.instructions)
    assert doubles == (DOUBLE in pair)
    elements = code.constants["BLOCK"] // code.threads
    for kind, bytes_ in (("load", sum(d.itemsize for d in pair)), ("store", pair[0].itemsize)):
        widths = [
            i.access[1]
            for i in code.instructions
            if "(start + offset" in i.statement and "offset, None," in (i.caller or "")
            if i.access and i.access[0] == kind
        ]
        assert sum(widths) == elements * bytes_, "each element once"
        narrowest = min(d.itemsize for d in (pair if kind == "load" else pair[:1]))
        assert min(widths) >= min(16, elements * narrowest)


def test_weights_are_no_constants() -> None:
    for record in RECORDS:
        names = [code.name for code in compiled("sm_90", record, FLOAT, FLOAT, 5)]
        assert names == ["derive", "update_blocks"]


@pytest.mark.parametrize(
    ("machine", "record", "pair"), [c for c in COMBINED if c[2] in PAIRS[:6]], ids=str
)
def test_averages_in_a_step(machine: str, record: Any, pair: tuple[torch.dtype, ...]) -> None:
    """AdamW's launch with an average: nothing is spilled, and the parameter is read once."""
    dtype, average = pair
    tensors = 3
    tables = Tables(
        CPU, np.ones((1, len(AdamUpdate.numbers))), [], np.zeros(tensors, np.int64),
        np.arange(tensors + 1) * 5000, np.zeros((7, tensors), np.int64), False,
        [1.0, *[torch.ones(()) for _ in record.numbers[1:]]],
    )  # fmt: skip
    counters = torch.zeros(1, device=CPU)
    tables.addresses[-1] = counters.data_ptr()
    slots = (dtype, dtype, dtype, None)
    with compiling(MACHINES[machine]) as codes:
        averaged = Averaged(record, average)
        step = backend.step_launcher(AdamUpdate, slots, (), dtype, FLOAT, averaged)(tables)
        step(None, None)
    assert [code.name for code in codes] == ["derive", "update_blocks"]
    code = codes[1]
    assert code.resources["spills"] == code.resources["stack"] == 0
    assert code.machine.holds(code.threads, code.resources["registers"])
    elements = code.constants["BLOCK"] // code.threads
    moved = {"load": 4 * dtype.itemsize, "store": 3 * dtype.itemsize}
    for kind, bytes_ in moved.items():
        widths = [
            i.access[1]
            for i in code.instructions
            if "(start + offset" in i.statement and "offset, None," in (i.caller or "")
            if i.access and i.access[0] == kind
        ]
        assert sum(widths) == elements * (bytes_ + average.itemsize), "each element once"

"""The machine code of Adafactor's launches, compiled for GPUs that need not be there."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import INTERPRETED

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES, Code, compiling

from fastopt.kernels import triton as backend
from fastopt.kernels.tables import Tables
from fastopt.optim.adafactor import AdafactorUpdate

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: Narrow, small and large matrices, stacks.
SHAPES = ((300, 3), (2, 3, 3), (700, 900), (20, 50_000))
BEFORE = ["derive"]
AFTER = ["change_blocks", "set_rates", "change_blocks"]
OF_MATRICES = ["row_means", "column_means", "move_means", "matrix_means"]


def compiled(machine: str, dtype: torch.dtype, matrices: bool) -> list[Code]:
    """What a step launches."""
    params = [torch.empty(s, dtype=dtype, device="meta") for s in SHAPES]
    if not matrices:
        params = [p.flatten() for p in params]
    count = len(params)
    counters = torch.zeros(1, device=CPU)
    tables = Tables(
        CPU, np.ones((1, len(AdafactorUpdate.numbers))), [], np.zeros(count, np.int64),
        np.cumsum([0, *[p.numel() for p in params]]), np.zeros((6, count), np.int64), False,
    )  # fmt: skip
    tables.addresses[-1] = counters.data_ptr()
    states = (dtype, dtype, None) if matrices else (None, None, dtype)
    with compiling(MACHINES[machine]) as codes:
        step = backend.factored_launcher(AdafactorUpdate, (dtype, *states), dtype, torch.float32)(
            tables
        )
        step(params, None, None)
    return codes


@pytest.mark.parametrize(
    ("machine", "dtype", "matrices"),
    [  # every two of these in one of them
        (machine, dtype, (i + j) % 2 == 0)
        for i, machine in enumerate(MACHINES)
        for j, dtype in enumerate(DTYPES)
    ],
    ids=str,
)
def test_machine_code(machine: str, dtype: torch.dtype, matrices: bool) -> None:
    """Nothing is spilled, doubles are where they are asked for alone, and accesses are wide."""
    codes = compiled(machine, dtype, matrices)
    expected = [*BEFORE, *(OF_MATRICES if matrices else ()), *AFTER]
    assert [code.name for code in codes] == expected
    for code in codes:
        assert code.resources["spills"] == code.resources["stack"] == 0, code
        assert code.machine.holds(code.threads, code.resources["registers"]), code
        if code.name != "derive":
            doubles = any(re.search(r"[._]f64(_|\b)", i.text) for i in code.instructions)
            assert doubles == (dtype == torch.float64), code
    for code in codes:
        if code.name != "change_blocks":
            continue
        elements = code.constants["BLOCK"] // code.threads
        places = ["param = read(", "grad = read("]
        if code.constants["UPDATES"]:
            places.append("tl.store(params + offset")
        for place in places:
            widths = [
                i.access[1]
                for i in code.instructions
                if i.access
                and (i.statement.startswith(place) or (i.caller or "").startswith(place))
            ]
            assert max(widths) >= min(16, elements * dtype.itemsize), (code, place)

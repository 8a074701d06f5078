"""The machine code of updates that round at random or keep what is lost, for GPUs not there."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from cases import INTERPRETED

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES, compiling

from fastopt.kernels import triton as backend
from fastopt.kernels.rounding import COMPENSATION, NEAREST, STOCHASTIC
from fastopt.kernels.tables import Averaged, Tables
from fastopt.optim._averaging import RECORDS
from fastopt.optim.adam import AdamUpdate

CPU = torch.device("cpu")
FLOAT, BFLOAT, HALF = torch.float32, torch.bfloat16, torch.float16
#: Dtypes of the parameter, its states and a compensation, and how they are stored.
STORED = (
    ((FLOAT, BFLOAT, BFLOAT, None), (NEAREST, STOCHASTIC, STOCHASTIC, NEAREST)),
    ((BFLOAT, BFLOAT, BFLOAT, BFLOAT), (STOCHASTIC,) * 4),
    ((HALF, BFLOAT, BFLOAT, None, HALF), (NEAREST, *[STOCHASTIC] * 3, COMPENSATION)),
    ((BFLOAT, BFLOAT, BFLOAT, None, BFLOAT), (*[NEAREST] * 4, COMPENSATION)),
    ((HALF, HALF, HALF, None), (STOCHASTIC, *[NEAREST] * 3)),
)
#: Each of them on two machines, one of each maker, with an average or without.
CASES = [
    (machine, averaged, *stored)
    for place, stored in enumerate(STORED)
    for machine, averaged in (
        (("sm_80", "sm_90", "sm_100")[place % 3], place % 2 == 0), ("gfx942", place % 2 == 1)
    )
]  # fmt: skip


@pytest.mark.parametrize(("machine", "averaged", "slots", "rounding"), CASES)
def test_machine_code(
    machine: str,
    averaged: bool,
    slots: tuple[torch.dtype | None, ...],
    rounding: tuple[str, ...],
) -> None:
    """Nothing is spilled, no number is a double, and each element is moved once."""
    tensors, param = 3, slots[0]
    assert param is not None
    tables = Tables(
        CPU, np.ones((1, len(AdamUpdate.numbers))), [], np.zeros(tensors, np.int64),
        np.arange(tensors + 1) * 5000, np.zeros((len(slots) + averaged + 2, tensors), np.int64),
        False,
        [1.0, *[torch.ones(()) for _ in RECORDS[0].numbers[1:]]] if averaged else None,
        np.arange(tensors) if STOCHASTIC in rounding else None,
    )  # fmt: skip
    counters = torch.zeros(1, device=CPU)
    tables.addresses[-1] = counters.data_ptr()
    average = Averaged(RECORDS[0], FLOAT) if averaged else None
    with compiling(MACHINES[machine]) as codes:
        backend.step_launcher(AdamUpdate, slots, (), param, FLOAT, average, rounding)(tables)(
            None, None
        )
    assert [code.name for code in codes] == ["derive", "update_blocks"]
    code = codes[1]
    assert code.resources["spills"] == code.resources["stack"] == 0
    assert code.machine.holds(code.threads, code.resources["registers"])
    doubles = [i for i in code.instructions if re.search(r"[._]f64(_|\b)", i.text)]
    assert averaged or not doubles, "the numbers of an average's rule alone"
    elements = code.constants["BLOCK"] // code.threads
    written = sum(d.itemsize for d in slots if d is not None) + 4 * averaged
    for kind, bytes_ in (("load", written + param.itemsize), ("store", written)):
        widths = [
            i.access[1]
            for i in code.instructions
            if "(start + offset" in i.statement and "offset, None," in (i.caller or "")
            if i.access and i.access[0] == kind
        ]
        assert sum(widths) == elements * bytes_, "each element once"
        assert min(widths) >= 16

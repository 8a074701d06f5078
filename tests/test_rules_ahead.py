"""The machine code of users' rules, compiled for GPUs that need not be there."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from cases import INTERPRETED

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES
from ahead_cases import Case, Step, compiled
from rules import Adam, Lion, Mixed

CASES = [
    ("sm_90", Adam, torch.float32),
    ("sm_90", Lion, torch.bfloat16),
    ("sm_90", Mixed, torch.float32),
    ("sm_90", Adam, torch.float64),
    (next(name for name in MACHINES if name.startswith("gfx")), Adam, torch.float32),
]


@pytest.mark.parametrize(("machine", "kind", "dtype"), CASES, ids=str)
def test_machine_code(machine: str, kind: Any, dtype: torch.dtype) -> None:
    """Nothing is kept on the stack, and float64 is for what a step has in common.

    A power of elements alone is computed in float64.
    """
    record = kind._record
    codes = compiled(Case(machine, Step(record, (True,) * len(record.slots)), dtype))
    assert [code.name for code in codes] == ["derive", "update_blocks"]
    for code in codes:
        assert (code.resources["spills"], code.resources["stack"]) == (0, 0), code
        assert code.machine.holds(code.threads, code.resources["registers"]), code
    doubles = [i for i in codes[1].instructions if re.search(r"[._]f64(_|\b)", i.text)]
    assert bool(doubles) == (dtype == torch.float64 or kind is Mixed), doubles[:3]

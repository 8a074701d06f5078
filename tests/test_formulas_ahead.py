"""Every formula as machine code, compiled for GPUs that need not be there.

Triton's interpreter takes more than its compiler does, so that running there says little.
"""

from __future__ import annotations

import functools
import re
from typing import Any

import pytest
import torch
from cases import INTERPRETED

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES, Code, compiling

import fastopt
from fastopt import formula as m
from fastopt.front.call import RECORDS
from fastopt.kernels import triton as backend
from fastopt.kernels.operation import Elementwise, Options, Rowwise

META = torch.device("meta")
OPERATIONS: list[Any] = list(dict.fromkeys(RECORDS.values()))
ELEMENTWISE = [kind for kind in OPERATIONS if issubclass(kind, Elementwise)]
#: With the flags that they have by default, and with others.
FLAGS: dict[str, dict[str, Any]] = {
    "MultiMargin": {"p": 2},
    "TripletMargin": {"p": 1, "swap": True},
}
ROWS = [
    record
    for kind in OPERATIONS
    if issubclass(kind, Rowwise)
    for record in (kind(), kind(**FLAGS.get(kind.__name__, {})))
]
#: Whole rows, tiles of a long one, short rows together.
SHAPES = ((4096, 1024), (64, 100_000), (70_001, 10))
FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64


def run(record: Any, operands: dict[str, torch.Tensor], reduction: str) -> None:
    """Forward and backward, with all the gradients that there are."""
    tensors = tuple(operands[name] for name in record.operands)
    needs = tuple(name in record.followed for name in record.operands)
    options = Options(record, reduction, tensors[0].dtype)
    loss, grads, kept = backend.forward(options, tensors, needs)
    backend.backward(options, tensors, grads, kept, loss, needs)


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


def row_operands(record: Any, shape: tuple[int, int], dtype: torch.dtype) -> dict[str, Any]:
    found = dict.fromkeys(record.columns, empty(*shape, dtype=dtype))
    found |= dict.fromkeys(record.by_class, empty(shape[1], dtype=dtype))
    found |= dict.fromkeys(record.by_row, empty(shape[0], dtype=dtype))
    return found | {record.label: empty(shape[0], dtype=torch.int64)}


@functools.cache
def codes_of_rows(
    machine: str, record: Any, shape: tuple[int, int], dtype: torch.dtype, reduction: str
) -> tuple[Code, ...]:
    with compiling(MACHINES[machine]) as codes:
        run(record, row_operands(record, shape, dtype), reduction)
    return tuple(codes)


def check(codes: tuple[Code, ...], kernel: str, dtype: torch.dtype) -> None:
    """Registers suffice, sums have one order, and float64 is where it is asked for alone."""
    own = [code for code in codes if code.name == kernel]
    assert len(own) == 2, "forward and backward"
    for code in own:
        found = code.resources
        assert found["spills"] == found["stack"] == 0, (code, found)
        assert code.machine.holds(code.threads, found["registers"]), code
        doubles = [i for i in code.instructions if re.search(r"[._]f64(_|\b)", i.text)]
        assert bool(doubles) == (dtype == DOUBLE), doubles[:3]
        assumed = [i for i in code.instructions if not i.statement.startswith("tl.device_assert")]
        assert not [
            i for i in assumed if re.search(r"\b(atom|red)\.|_atomic_|\bds_(add|pk_)", i.text)
        ]


@pytest.mark.parametrize(
    ("machine", "kind"),
    [  # every formula for sm_90 and another one
        (machine, kind)
        for i, machine in enumerate(MACHINES)
        for j, kind in enumerate(ELEMENTWISE)
        if machine == "sm_90" or (i + j) % 3 == 0
    ],
    ids=str,
)
def test_elementwise(machine: str, kind: Any) -> None:
    with compiling(MACHINES[machine]) as codes:
        run(kind(), dict.fromkeys(kind.operands, empty(1 << 20, dtype=FLOAT)), "sum")
    check(tuple(codes), "flat_blocks", FLOAT)


@fastopt.loss
def bounded(input: Any, target: Any, *, scale: float = 2.0) -> Any:
    """A user's loss."""
    return m.tanh(input * scale) ** 2 * m.rsqrt(1.0 + target**2)


@fastopt.loss
def normal(input: Any, target: Any) -> Any:
    """The last one."""
    return m.erf(input - target)


@fastopt.loss(constant=("weight",))
def guarded(input: Any, target: Any, weight: Any, *, sure: bool = True) -> Any:
    """Another one, with a choice that is compiled in and one that isn't."""
    a = m.expm1(m.minimum(input, 3.0)) - m.where(m.isnan(target), 0.0, target)
    return weight * m.where(sure, m.where(a > 0.0, m.sqrt(a), -a), m.softplus(a))


@pytest.mark.parametrize("machine", MACHINES)
@pytest.mark.parametrize("loss", [bounded, normal, guarded], ids=lambda loss: loss.__name__)
def test_of_a_user(loss: Any, machine: str) -> None:
    kind = loss._record
    with compiling(MACHINES[machine]) as codes:
        run(kind(), dict.fromkeys(kind.operands, empty(1 << 20, dtype=FLOAT)), "sum")
    check(tuple(codes), "flat_blocks", FLOAT)


#: Every formula with every machine and with every shape, but all three for sm_90 alone.
COMBINED = [
    (machine, record, shape)
    for i, machine in enumerate(MACHINES)
    for j, record in enumerate(ROWS)
    for k, shape in enumerate(SHAPES)
    if machine == "sm_90" or (i + j + k) % 3 == 0
]


@pytest.mark.parametrize(("machine", "record", "shape"), COMBINED, ids=str)
def test_rows(machine: str, record: Any, shape: tuple[int, int]) -> None:
    check(codes_of_rows(machine, record, shape, FLOAT, "mean"), "row_tiles", FLOAT)


@pytest.mark.parametrize(
    ("record", "shape", "dtype"),
    [  # every two of these in one of them
        (record, shape, (BFLOAT, HALF, DOUBLE)[(i + j) % 3])
        for i, record in enumerate(ROWS)
        for j, shape in enumerate(SHAPES)
    ],
    ids=str,
)
def test_dtypes(record: Any, shape: tuple[int, int], dtype: torch.dtype) -> None:
    reduction = "none" if dtype == BFLOAT else "mean"
    check(codes_of_rows("sm_90", record, shape, dtype, reduction), "row_tiles", dtype)


@pytest.mark.parametrize("record", ROWS[::2], ids=str)
def test_wide_accesses(record: Any) -> None:
    """Rows that begin at multiples of 16 bytes are read and written 16 bytes at a time."""
    for code in codes_of_rows("sm_90", record, SHAPES[0], FLOAT, "mean"):
        if code.name == "row_tiles":
            accesses = [
                i.access
                for i in code.instructions
                if "place, mask" in i.statement or "tl.store(grads" in i.statement
                if not (i.caller or "").startswith("of_row")  # what is at the labels is anywhere
            ]
            assert {kind for kind, _ in filter(None, accesses)} == {"load", "store"}
            assert all(width == 16 for _, width in filter(None, accesses)), accesses


def test_flags_are_part_of_the_code() -> None:
    """What a flag rules out isn't compiled: one norm has roots, the other has none."""
    for p in (1, 2):
        record = next(r for r in ROWS if type(r).__name__ == "TripletMargin" and r.p == p)
        codes = codes_of_rows("sm_90", record, SHAPES[0], FLOAT, "mean")
        forward = next(code for code in codes if code.name == "row_tiles")
        assert ("sqrt" in forward.text) == (p == 2)


@pytest.mark.parametrize("record", ROWS, ids=str)
def test_labels_are_checked(record: Any) -> None:
    """And nothing else can fail."""
    for code in codes_of_rows("sm_90", record, SHAPES[0], FLOAT, "mean"):
        checks = [i for i in code.instructions if "call.uni __assertfail" in i.text]
        assert all("Target is out of bounds" in i.statement for i in checks)
        assert bool(checks) == (code.name == "row_tiles" and record.label is not None)

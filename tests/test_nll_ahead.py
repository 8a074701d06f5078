"""The machine code of NLL's GPU kernels, compiled for GPUs that need not be there."""

from __future__ import annotations

import itertools

import pytest
import torch
from cases import FLOATS, INTERPRETED

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES, Code, compiling

from fastopt.kernels import triton as backend
from fastopt.kernels.operation import Options
from fastopt.nn.nll import NLL

SHAPES = {
    "vocabulary": (8192, 32_000),
    "odd": (4096, 1001),
    "short": (70_000, 10),
    "pixels": (4, 21, 256, 256),
}


def compiled(
    machine: str, shape: tuple[int, ...], dtype: torch.dtype, reduction: str, weighted: bool
) -> list[Code]:
    """What forward and backward launch."""
    input = torch.empty(shape, dtype=dtype, device="meta")
    target = torch.empty(shape[:1] + shape[2:], dtype=torch.int64, device="meta")
    weight = torch.empty(shape[1], dtype=dtype, device="meta") if weighted else None
    options, tensors = Options(NLL(), reduction, dtype), (input, target, weight)
    needs = (True, False, False)
    with compiling(MACHINES[machine]) as codes:
        loss, grads, kept = backend.forward(options, tensors, needs)
        assert grads is None
        backend.backward(options, tensors, grads, kept, loss, needs)
    return codes


def check(codes: list[Code]) -> None:
    for code in codes:
        assert code.resources["spills"] == code.resources["stack"] == 0, code
        assert code.machine.holds(code.threads, code.resources["registers"]), code


@pytest.mark.parametrize(
    ("machine", "shape", "dtype"),
    [  # every two of these in one of them
        (machine, shape, (torch.float32, torch.bfloat16)[(i + j) % 2])
        for i, machine in enumerate(MACHINES)
        for j, shape in enumerate(SHAPES)
    ],
    ids=str,
)
def test_nothing_spills(machine: str, shape: str, dtype: torch.dtype) -> None:
    codes = compiled(machine, SHAPES[shape], dtype, "mean", weighted=False)
    assert [code.name for code in codes] == ["gather_rows", "mean_of", "scatter_rows"]
    check(codes)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_every_dtype_and_reduction(dtype: torch.dtype) -> None:
    for shape, reduction in itertools.product(("odd", "pixels"), ("none", "sum", "mean")):
        codes = compiled("sm_90", SHAPES[shape], dtype, reduction, weighted=True)
        check(codes)
        doubles = any(".f64" in code.text for code in codes)
        assert doubles == (dtype == torch.float64), "doubles are slow on most GPUs"


def test_a_gradient_is_written_in_whole_vectors() -> None:
    """Zeros go 16 bytes at a time, where rows begin at multiples of that."""
    for dtype in (torch.float32, torch.bfloat16):
        *_, code = compiled("sm_90", SHAPES["vocabulary"], dtype, "mean", weighted=False)
        stores = [i.access for i in code.instructions if i.access and i.access[0] == "store"]
        assert stores
        assert max(bytes_ for _, bytes_ in stores) == 16

"""The machine code of every GPU kernel, compiled for GPUs that need not be there.

Every operation in every variant is compiled for NVIDIA's sm_90, the most usual ones for each
machine; what holds of their instructions is what the kernels' comments promise.
"""

from __future__ import annotations

import functools
import importlib.metadata
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from cases import INTERPRETED
from hypothesis import given

if INTERPRETED:
    pytest.skip("Triton's interpreter compiles nothing", allow_module_level=True)
pytest.importorskip("triton", reason="needs the package triton")

from ahead import MACHINES, Code, compiling
from ahead_cases import (
    ADAM,
    BFLOAT,
    CASES,
    CPU,
    DOUBLE,
    FLOAT,
    HALF,
    ODD,
    SHORT,
    STEPS,
    THOUSAND,
    VOCABULARY,
    WHOLE,
    Case,
    Clip,
    Pointwise,
    Rows,
    Step,
    compiled,
    of,
)

from fastopt.kernels import triton as backend
from fastopt.kernels.gradients import Gradients
from fastopt.kernels.layout import ClassAxis
from fastopt.kernels.triton.compiler import OPTIONS
from fastopt.kernels.triton.cross_entropy import tiling
from fastopt.nn.mse import MSE
from fastopt.optim.muon import MuonUpdate

# -- registers, arithmetic, determinism -----------------------------------------------------


@pytest.mark.parametrize("case", CASES[::5], ids=str)
def test_options_are_told(case: Case) -> None:
    """Versions of Triton differ in their defaults."""
    for code in compiled(case):
        assert {name: getattr(code.options, name) for name in OPTIONS} == OPTIONS


KEPT_BY_3_6 = "sm_100-Rows-(8,128256)-float32", "row_statistics"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_registers(case: Case) -> None:
    """They suffice: nothing is spilled to memory, and a processor can hold a program."""
    for code in compiled(case):
        found = code.resources
        # Triton 3.6 keeps one number of each row in memory there, written and read once.
        old = importlib.metadata.version("triton").startswith("3.6.")
        one = old and (str(case), code.name) == KEPT_BY_3_6
        assert (found["spills"], found["stack"]) == (0, 8 if one else 0), code
        assert code.machine.holds(code.threads, found["registers"]), code
        assert code.shared <= 64 << 10, "the least that a GPU has"


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype != DOUBLE], ids=str)
def test_no_float64(case: Case) -> None:
    """But for `derive`, which computes in it what a step's elements have in common."""
    for code in compiled(case):
        doubles = [i for i in code.instructions if re.search(r"[._]f64(_|\b)", i.text)]
        assert bool(doubles) == (code.name == "derive"), (code, doubles[:3])


def test_float64_is_recognised() -> None:
    for machine in MACHINES:
        case = Case(machine, ADAM[0], DOUBLE)
        (code,) = (c for c in compiled(case) if c.name == "update_blocks")
        assert any(re.search(r"[._]f64(_|\b)", i.text) for i in code.instructions)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_no_atomics(case: Case) -> None:
    """Sums in an order that threads race for would differ from run to run."""
    for code in compiled(case):
        # On AMD a failing assert prints its message through a queue, which has some.
        own = [i for i in code.instructions if not i.statement.startswith("tl.device_assert")]
        atomics = [i for i in own if re.search(r"\b(atom|red)\.|_atomic_|\bds_(add|pk_)", i.text)]
        assert not atomics, (code, atomics[:3])


# -- accesses to memory ---------------------------------------------------------------------


def widths(code: Code, kind: str, within: str, caller: str = "") -> dict[str, list[int]]:
    """Bytes of each "load" or "store" that comes from a statement with those words, by that.

    And from one of a caller's calls; where the compiler has joined those, they share code.
    """
    found = defaultdict(list)
    for instruction in code.instructions:
        if within in instruction.statement and caller in (instruction.caller or caller):
            access = instruction.access
            if access and access[0] == kind:
                found[instruction.statement].append(access[1])
    return dict(found)


def all_of_16_bytes(found: dict[str, list[int]]) -> bool:
    return all(width >= 16 for group in found.values() for width in group)


@pytest.mark.parametrize("case", of(Pointwise), ids=str)
def test_pointwise_accesses(case: Case) -> None:
    """16 bytes at a time, each element once: in all blocks but one that ends in between."""
    operation, dtype = case.operation, case.dtype
    assert isinstance(operation, Pointwise)
    none, recomputes = operation.reduction == "none", dtype == HALF
    expected = [(2, 1 if none else 0 if recomputes else 2), (3 if none else 2, 2)]
    codes = [code for code in compiled(case) if code.name == "flat_blocks"]
    assert len(codes) == 2, "forward and backward"
    for code, streams in zip(codes, expected, strict=True):
        share = code.constants["BLOCK"] // code.threads * dtype.itemsize
        for kind, count in zip(("load", "store"), streams, strict=True):
            inside = widths(code, kind, " + place", "place, None,")
            assert sum(map(sum, inside.values())) == share * count  # of a loop over the tensors
            assert all_of_16_bytes(inside)
            last = widths(code, kind, " + place", "place, mask,")
            assert sum(map(sum, last.values())) == share * count
            assert all_of_16_bytes(last) == (not count or operation.count % 16 == 0)


@pytest.mark.parametrize("case", of(Rows), ids=str)
def test_row_accesses(case: Case) -> None:
    """Logits, probabilities and gradients 16 bytes at a time, a tile in one go."""
    operation, dtype = case.operation, case.dtype
    assert isinstance(operation, Rows)
    gradients = 0
    for code in compiled(case):
        if code.name not in ("softmax_rows", "row_statistics"):
            continue
        elements = code.constants["ROWS"] * code.constants["COLUMNS"]
        share = elements // code.threads * dtype.itemsize
        loads = widths(code, "load", "tl.load(places")
        stores = widths(code, "store", "tl.store(tile(grad")
        for group in (*loads.values(), *stores.values()):
            assert sum(group) % share == 0, "unless every access has been found"
        if operation.wide(dtype):
            assert all_of_16_bytes(loads), (code, loads)
            assert all_of_16_bytes(stores), (code, stores)
        gradients += len(stores)
        if not loads and (stores or code.name == "row_statistics"):
            # AMD's compiler has joined them with the same ones elsewhere, far from any statement.
            unknown = [i.access for i in code.instructions if not i.statement and i.access]
            assert code.machine.amd
            assert sum(width for _, width in unknown if width >= 16) == share, unknown
    assert gradients == operation.gradients(dtype)


def test_narrow_accesses_are_recognised() -> None:
    """Rows of 10 numbers begin anywhere."""
    for machine in MACHINES:
        codes = compiled(Case(machine, SHORT, FLOAT))
        (first, _) = (code for code in codes if code.name == "softmax_rows")
        for kind, words in (("load", "tl.load(places"), ("store", "tl.store(tile(grad")):
            found = widths(first, kind, words)
            assert found
            assert not all_of_16_bytes(found)


@pytest.mark.parametrize("case", of(Step), ids=str)
def test_step_accesses(case: Case) -> None:
    """Whole blocks: each slot and the gradient 16 bytes at a time, each element once."""
    operation, dtype = case.operation, case.dtype
    assert isinstance(operation, Step)
    (code,) = (code for code in compiled(case) if code.name == "update_blocks")
    written = sum(slot.itemsize for slot in operation.slots(dtype) if slot is not None)
    read = written if operation.record is not MuonUpdate else written - dtype.itemsize
    elements = code.constants["BLOCK"] // code.threads
    for kind, bytes in (("load", read + dtype.itemsize), ("store", written)):
        (inside,) = widths(code, kind, "(start + offset", "offset, None,").values()
        assert sum(inside) == elements * bytes
        assert min(inside) >= 16
        (edge,) = widths(code, kind, "(start + offset", "offset < count,").values()
        assert max(edge) < 16, "at an edge, or where addresses are not multiples of 16"


@pytest.mark.parametrize("case", of(Clip), ids=str)
def test_clip_accesses(case: Case) -> None:
    """Whole blocks 16 bytes at a time, each element once."""
    codes = [code for code in compiled(case) if code.name.endswith("_blocks")]
    assert [code.name for code in codes] in (["fold_blocks", "scale_blocks"], ["clamp_blocks"])
    for code in codes:
        share = code.constants["BLOCK"] // code.threads * case.dtype.itemsize
        folds = code.name == "fold_blocks"
        words = (
            "tl.load(tl.multiple_of(start" if folds else "tl.load(places).to",
            "tl.store(places, ",
        )
        for kind, within in zip(("load", "store")[: 2 - folds], words, strict=False):
            found = widths(code, kind, within)
            found = {words: each for words, each in found.items() if "mask=" not in words}
            (inside,) = found.values()
            assert sum(inside) == share, (code, found)
            assert min(inside) >= 16


# -- a target out of bounds -----------------------------------------------------------------


@pytest.mark.parametrize("case", of(Rows), ids=str)
def test_assert_is_compiled(case: Case) -> None:
    """That of the target, wherever there is one; and no other, of overflows say."""
    assert isinstance(case.operation, Rows)
    for code in compiled(case):
        failing = "s_trap" if code.machine.amd else "call.uni __assertfail"
        calls = [i for i in code.instructions if failing in i.text]
        assert all("Target is out of bounds" in i.statement for i in calls)
        checks = code.name == "softmax_rows" and not case.operation.probability
        assert bool(calls) == checks, code


@pytest.mark.parametrize("case", [*of(Pointwise), *of(Step), *of(Clip)], ids=str)
def test_nothing_else_can_fail(case: Case) -> None:
    for code in compiled(case):
        assert not any(re.search("__assertfail|s_trap", i.text) for i in code.instructions)


# -- compiled once --------------------------------------------------------------------------
#
# Triton compiles an integer argument of 1 as a constant, and takes it down whether one is a
# multiple of 16: kernels for three kinds of numbers. Nothing else may make a new one.


def kernels(calls: Iterable[Callable[[], None]]) -> Counter[str]:
    """How many kernels of each name some calls need together."""
    with compiling(MACHINES["sm_90"]) as codes:
        for call in calls:
            call()
    return Counter(code.name for code in codes)


def rows(operations: Iterable[Rows | Pointwise], dtype: torch.dtype = FLOAT) -> Counter[str]:
    return kernels(functools.partial(operation.run, dtype) for operation in operations)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF, DOUBLE], ids=str)
def test_label_smoothing_is_no_constant(dtype: torch.dtype) -> None:
    values = [WHOLE._replace(smoothing=value) for value in (0.1, 0.2, 0.3, 0.5, 1.0)]
    if dtype == DOUBLE:  # which goes in as an integer of the same bits: that of 0, left of 1, is
        values.pop()  # short enough for another type
    assert rows(values, dtype) == rows(values[:1], dtype)


def test_ignore_index_is_no_constant() -> None:
    values = [WHOLE._replace(ignore_index=value) for value in (-100, 255, -1, 0, 1, 16, 3)]
    assert rows(values) == rows(values[:1])


@pytest.mark.parametrize("step", [0, 16])
def test_number_of_rows_is_no_constant(step: int) -> None:
    """Once it is large enough for full tiles: multiples of 16 are one kind, others one more."""
    counts = [6000 + 80 * k + (0 if step else 2 * k + 1) for k in range(5)]
    for like in (VOCABULARY, THOUSAND):
        values = [like._replace(shape=(count, like.shape[1])) for count in counts]
        found = rows(values)
        assert found["softmax_rows"] == 2, "forward and backward"


def test_any_number_of_rows() -> None:
    """Over all of them: with the kinds of their number, and of that of sums over it.

    Rows are split among 1, 2, 4, … programs only while there are fewer than processors.
    """
    counts = [1, 2, 16, 131, 132, 264, 1000, 1024, 4096, 4097, 60_000, 65_536, 65_537, 600_001]
    found = rows(VOCABULARY._replace(shape=(count, 32_000)) for count in counts)
    assert found["softmax_rows"] <= 20
    assert found["target_mass"] <= 6
    assert found["finish"] <= 12


def test_number_of_elements_is_no_constant() -> None:
    """1, multiples of 16, others; `finish` sees that of blocks, too, and the divisor."""
    counts = [1, 2, 100, 2048, 2049, 4096, 32_768, 100_001, 1 << 20, ODD]
    found = rows(Pointwise(MSE, count) for count in counts)
    assert found["flat_blocks"] == 3 * 2, "forward and backward"
    assert found["finish"] <= 3 * 3


@pytest.mark.parametrize("like", STEPS, ids=str)
def test_hyperparameters_and_steps_are_no_constants(like: Step) -> None:
    tables, update = like.bind(FLOAT)

    def step(value: float) -> None:
        tables.hypers[:] = value
        update(None, None)

    found = kernels(functools.partial(step, value) for value in (0.0, 1.0, 16.0, 0.1, -3.5))
    assert found == {"derive": 1, "update_blocks": 1}


def test_number_of_tensors_is_no_constant() -> None:
    def step(tensors: int) -> None:
        _, update = ADAM[0].bind(FLOAT, tensors)
        update(None, None)

    found = kernels(functools.partial(step, n) for n in (1, 2, 3, 7, 16, 32, 100, 160, 1001))
    assert found == {"derive": 3, "update_blocks": 3}


def test_norms_are_no_constants() -> None:
    """Nor limits, nor the number of tensors."""

    def clip(most: float, tensors: int) -> None:
        grads = Gradients(CPU, FLOAT, np.zeros(tensors, np.int64), np.arange(tensors + 1) * 5000)
        backend.scale_all(grads, most, backend.total_norm(grads, 2.0))
        backend.clamp_all(grads, most)

    counts = (1, 2, 3, 7, 16, 32, 100, 160, 1001)
    found = kernels(functools.partial(clip, 0.0 + n % 3, n) for n in counts)
    assert found["fold_blocks"] == found["scale_blocks"] == found["clamp_blocks"] == 3
    assert found["finish_norm"] <= 3


# -- block sizes ----------------------------------------------------------------------------

SIZES = {"positions": st.integers(1, 10_000_000), "classes": st.integers(1, 300_000)}


@given(
    **SIZES,
    outer=st.integers(1, 1000),
    unit=st.booleans(),
    itemsize=st.sampled_from((2, 4, 8)),
    machine=st.sampled_from(sorted(MACHINES)),
    twice=st.booleans(),
)
def test_tiling(
    positions: int,
    classes: int,
    outer: int,
    unit: bool,
    itemsize: int,
    machine: str,
    twice: bool,
) -> None:
    """Every class once, by launches that no GPU refuses."""
    inner = -(-positions // outer)
    axis = ClassAxis(
        classes, outer, inner, classes * inner, *((classes, 1) if unit else (1, inner))
    )
    hardware = MACHINES[machine].hardware
    cut = tiling(axis, itemsize, hardware, twice)
    for size in (cut.rows, cut.columns, cut.threads):
        assert size & (size - 1) == 0, "not a power of two"
    assert hardware.warp <= cut.threads <= 1024
    assert cut.rows * cut.columns <= 2**20, "the largest tile that Triton has"
    assert (cut.splits - 1) * cut.span < classes <= cut.splits * cut.span
    assert cut.splits == 1 or cut.span % cut.columns == 0
    assert -(-axis.outer * axis.inner // cut.rows) < 2**31
    assert cut.splits <= 65_535

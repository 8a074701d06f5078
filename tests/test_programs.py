"""Tutorials' programs with nothing but their import lines changed: the same curves as torch's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from programs import PROGRAMS, with_imports_changed

import fastopt
from fastopt.nn._operations import MODULES


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Beside other processes, threads wait for each other longer than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(program: str) -> dict[str, Any]:
    """The names that a program leaves behind."""
    namespace: dict[str, Any] = {"__name__": "program"}
    exec(compile(program, "<program>", "exec"), namespace)
    return namespace


def test_only_import_lines_change() -> None:
    for program, _ in PROGRAMS.values():
        ours, torchs = with_imports_changed(program).splitlines(), program.splitlines()
        changed = [(a, b) for a, b in zip(ours, torchs, strict=True) if a != b]
        assert changed
        for mine, its in changed:
            assert its.startswith(("import torch.", "from torch"))
            assert mine == its.replace("torch", "fastopt", 1)
        left = [line for line in ours if line.startswith(("import torch", "from torch"))]
        assert set(left) <= {
            "import torch", "from torch.utils.data import DataLoader, TensorDataset",
        }  # fmt: skip


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("backend", [None, "numba"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_program(name: str, backend: str | None) -> None:
    """As chosen automatically, and with everything compiled that small sizes would not be."""
    if name == "classifier":
        pytest.importorskip("tqdm")
    program, kinds = PROGRAMS[name]
    expected = run(program)
    with fastopt.use_backend(backend) if backend else nullcontext():
        found = run(with_imports_changed(program))
    assert len(found["losses"]) >= 15
    torch.testing.assert_close(
        torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=1e-7
    )
    torch.testing.assert_close(
        [p.detach() for p in found["model"].parameters()],
        [p.detach() for p in expected["model"].parameters()],
        rtol=1e-4, atol=1e-6,
    )  # fmt: skip
    for variable, kind in kinds.items():
        ours, torchs = type(found[variable]), type(expected[variable])
        assert ours.__name__ == torchs.__name__ == kind
        assert ours.__module__.startswith("fastopt.")
        assert torchs.__module__.startswith("torch.")


def test_a_program_of_every_kind_of_loss() -> None:
    """Of the losses that the programs use, all that fastopt has are its own."""
    for program, kinds in PROGRAMS.values():
        used = {
            name for name in MODULES if f"{name}(" in program and f"class {name}" not in program
        }
        assert used <= set(kinds.values()), "a loss of fastopt's that no variable is checked for"

"""An edited formula takes effect: in a script, a module that is loaded again, a notebook's cell."""

from __future__ import annotations

import importlib
import linecache
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED
from children import ROOT, run_code

import fastopt
from fastopt import FormulaError

LOSS = """
import fastopt
from fastopt import formula as m

@fastopt.loss
def square(x, y):
    d = x - y
    return {factor} * d * d
"""
CALL = """
import sys
import torch

x = torch.full((10,), 3.0, requires_grad=True)
with fastopt.use_backend("numba"):
    value = square(x, torch.ones(10))
    value.backward()
from fastopt.kernels.numba import flat
hits = sum(flat.flat_run.stats.cache_hits.values())
misses = sum(flat.flat_run.stats.cache_misses.values())
print(value.item(), x.grad[0].item() * 10, hits, misses)
"""


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the CPU's disk cache")
def test_script(tmp_path: Path) -> None:
    """Its machine code is kept on the disk, one file however often the formula is edited."""
    pytest.importorskip("numba")
    script, cache = tmp_path / "script.py", tmp_path / "cache"
    counts = []
    for factor, read in ((1.0, False), (1.0, True), (2.5, False), (2.5, True), (1.0, False)):
        script.write_text(LOSS.format(factor=factor) + CALL)
        code = f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"
        value, slope, hits, misses = run_code(code, NUMBA_CACHE_DIR=str(cache)).split()
        assert float(value) == pytest.approx(4 * factor)
        assert float(slope) == pytest.approx(4 * factor)
        assert (int(hits), int(misses)) == ((1, 0) if read else (0, 1))
        counts.append(len([f for f in cache.rglob("flat*.nbc") if "flat_run" in f.name]))
    assert counts == [1] * 5


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the CPU's disk cache")
def test_warmup(tmp_path: Path) -> None:
    """A process after it compiles nothing of a loss in a module."""
    pytest.importorskip("numba")
    (tmp_path / "own_losses.py").write_text(LOSS.format(factor=2.0))
    env = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    here = f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
    main = "import runpy; runpy.run_module('fastopt', run_name='__main__')\n"
    words = "sys.argv[1:] = ['warmup', '--loss', 'own_losses:square']\n"
    assert "square float32" in run_code(here + words + main, **env)
    *_, hits, misses = run_code(
        here + "import fastopt\nfrom own_losses import square\n" + CALL, **env
    ).split()
    assert (int(hits), int(misses)) == (1, 0)
    for place, why in (
        ("own_losses:cube", "no attribute 'cube'"), ("own_losses:m", "not a loss"),
        ("nowhere:square", "No module named 'nowhere'"), ("square", "expected MODULE:NAME"),
    ):  # fmt: skip
        command = [sys.executable, "-m", "fastopt", "warmup", "--loss", place]
        child = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
        assert child.returncode == 2
        assert why in child.stderr


def value_of(loss: Any) -> float:
    x, y = torch.full((5,), 3.0, device=DEVICE), torch.ones(5, device=DEVICE)
    with fastopt.use_backend(BACKEND):
        result = loss(x, y)
    return float(result)


def test_module_that_is_loaded_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    file = tmp_path / "edited_formula.py"
    file.write_text(LOSS.format(factor=2.0))
    module = importlib.import_module("edited_formula")
    before = module.square
    assert value_of(before) == 8.0
    file.write_text("# a line more\n" + LOSS.format(factor=3.5))
    module = importlib.reload(module)
    assert value_of(module.square) == 14.0
    assert value_of(before) == 8.0
    del sys.modules["edited_formula"]


def run_cell(text: str, number: int, names: dict[str, Any]) -> None:
    """As IPython runs one: its source is where inspect looks for it."""
    name = f"<ipython-input-{number}-{hash(text):x}>"
    linecache.cache[name] = len(text), None, text.splitlines(keepends=True), name
    exec(compile(text, name, "exec"), names)


def test_cells_of_a_notebook() -> None:
    names: dict[str, Any] = {"__name__": "__main__"}
    found = []
    for number, factor in enumerate((2.0, 3.0, 2.0)):
        run_cell(LOSS.format(factor=factor), number, names)
        found.append(value_of(names["square"]))
    assert found == [8.0, 12.0, 8.0]


def test_no_source() -> None:
    with pytest.raises(FormulaError, match="the source of square can't be read"):
        exec(compile(LOSS.format(factor=2.0), "<string>", "exec"), {"__name__": "elsewhere"})


def test_sources_are_kept_as_long_as_the_loss_is() -> None:
    """For compilers and tracebacks. What is generated isn't left behind."""
    names: dict[str, Any] = {"__name__": "__main__"}
    run_cell(LOSS.format(factor=2.0), 0, names)
    file = names["square"]._record.value_and_slopes.__code__.co_filename
    assert "d = x - y" in "".join(linecache.getlines(file))
    linecache.checkcache()
    assert linecache.getlines(file)
    code = f"""
import gc, linecache, sys
sys.path.insert(0, {str(ROOT / "tests")!r})
from test_formula_versions import LOSS, run_cell
names = {{"__name__": "__main__"}}
counts = []
for k in range(30):
    run_cell(LOSS.format(factor=float(k)), 0, names)
    gc.collect()
    counts.append(sum("value_and_slopes of" in name for name in linecache.cache))
print(max(counts))
"""
    assert int(run_code(code)) <= 2

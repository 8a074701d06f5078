"""An operation is one file: what has to know of it finds it, and doesn't name it."""

from __future__ import annotations

import inspect
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from children import ROOT

import fastopt
from fastopt._warmup import jobs
from fastopt.front.call import FUNCTIONS as OPERATIONS
from fastopt.nn._operations import FUNCTIONS, MODULES
from fastopt.optim._operations import OPTIMIZERS

SOURCES = sorted([*(ROOT / "fastopt").rglob("*.py*"), *(ROOT / "kernels").rglob("*.py*")])
SOURCES = [file for file in SOURCES if file.suffix in (".py", ".pyi")]
EACH = pytest.mark.parametrize("name", FUNCTIONS)

#: Words in files that are no operation's own, and why they are there.
EXCEPTIONS = {
    ("cross_entropy", "kernels"): "the loops over rows, named after what they were written for",
    ("cross_entropy", "fastopt/dispatch.py"): "an example in a docstring",
    ("mse_loss", "fastopt/dispatch.py"): "an example in a docstring",
    ("MSELoss", "fastopt/_explain.py"): "an example in a docstring",
    ("MSE", "kernels/numba/compiler.py"): "an example in a docstring",
    ("L1", "kernels/numba/softmax_rows.py"): "the processor's cache",
    ("L1", "fastopt/nn/smooth_l1.py"): "the usual name of this loss",
}


def own_file(name: str) -> Path:
    return Path(inspect.getfile(OPERATIONS[name]))


def words_of(name: str) -> set[str]:
    """The function's, the class's and the record's names."""
    return {OPERATIONS[name].__name__, *sys.modules[OPERATIONS[name].__module__].__all__}


def is_exception(word: str, file: str) -> bool:
    return any(w == word and (file == f or file.startswith(f"{f}/")) for w, f in EXCEPTIONS)


@EACH
def test_no_other_file_names_an_operation(name: str) -> None:
    assert own_file(name).parent == ROOT / "fastopt" / "nn"
    found = []
    for file in SOURCES:
        path = file.relative_to(ROOT).as_posix()
        if file != own_file(name):
            words = set(re.findall(r"\w+", file.read_text())) & words_of(name)
            found += [(word, path) for word in words if not is_exception(word, path)]
    assert not found


@EACH
def test_an_operation_is_named_in_its_file(name: str) -> None:
    """Where the test above looks for words, these are the ones that count."""
    words = words_of(name)
    assert name in words
    assert words >= {kind for kind in MODULES if MODULES[kind]._function is FUNCTIONS[name]}
    assert words <= set(re.findall(r"\w+", own_file(name).read_text()))


def test_one_operation_a_file() -> None:
    files = [own_file(name) for name in FUNCTIONS]
    assert len(set(files)) == len(files)
    others = {"__init__.py", "functional.py", "_operations.py"}
    assert {f.name for f in (ROOT / "fastopt" / "nn").glob("*.py")} - others == {
        file.name for file in files
    }


@EACH
def test_everything_finds_it(name: str) -> None:
    """The exports, the decorator's table, torch's twin, warmup, convert and explain."""
    torchs: Any = getattr(torch.nn.functional, name)
    assert OPERATIONS[name].twin is torchs
    assert getattr(fastopt.nn.functional, name) is FUNCTIONS[name]
    assert name in fastopt.nn.functional.__all__
    kinds = [kind for kind in MODULES.values() if kind._function is FUNCTIONS[name]]
    assert kinds
    for kind in kinds:
        assert getattr(fastopt.nn, kind.__name__) is kind
        assert kind.__name__ in fastopt.nn.__all__
    assert len([job for job, _ in jobs(torch.float32) if job == name]) >= 2
    with pytest.raises(TypeError, match=rf"supported: .*\b{kinds[0].__name__}\b.*\b{name}\b"):
        fastopt.explain(torchs)


def test_warmup_knows_every_operation() -> None:
    assert {name for name, _ in jobs(torch.float32)} == {*FUNCTIONS, *OPTIMIZERS}


@pytest.mark.parametrize("kind", MODULES)
def test_convert_knows_every_loss(kind: str) -> None:
    """It changes the class and nothing else, inside of a model too, and back again."""
    theirs = getattr(torch.nn, kind)
    model = torch.nn.ModuleDict({"loss": theirs(reduction="sum"), "layer": torch.nn.Linear(2, 3)})
    state = dict(vars(model["loss"]))
    assert fastopt.convert(model) is model
    assert type(model["loss"]) is MODULES[kind]
    assert vars(model["loss"]) == state
    assert type(model["layer"]) is torch.nn.Linear
    fastopt.convert(model, to="torch")
    assert type(model["loss"]) is theirs


def test_convert_says_which_loss_fastopt_lacks() -> None:
    model = torch.nn.Sequential(torch.nn.CTCLoss(), torch.nn.HuberLoss())
    with pytest.warns(UserWarning, match=r"left alone: 0 \(CTCLoss, of which fastopt has none\)$"):
        fastopt.convert(model)
    assert type(model[1]) is MODULES["HuberLoss"]

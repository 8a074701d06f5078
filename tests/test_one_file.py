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
from fastopt._warmup import DTYPES, jobs
from fastopt.front.call import RECORDS
from fastopt.front.samples import usual
from fastopt.front.torch_only import TorchOnly
from fastopt.kernels.operation import LinearSoftmax
from fastopt.nn._operations import FUNCTIONS, MODULES
from fastopt.nn._softmax_options import definition
from fastopt.optim._operations import OPTIMIZERS

SOURCES = sorted([*(ROOT / "fastopt").rglob("*.py*"), *(ROOT / "kernels").rglob("*.py*")])
SOURCES = [file for file in SOURCES if file.suffix in (".py", ".pyi")]
EACH = pytest.mark.parametrize("name", FUNCTIONS)

#: Words in files that are no operation's own, and why they are there.
EXCEPTIONS = {
    ("cross_entropy", "fastopt/nn/linear_cross_entropy.py"): "what it is made of",
    ("cross_entropy", "fastopt/nn/_softmax_options.py"): "torch's, and what it has not",
    ("LinearCrossEntropyLoss", "fastopt/nn/_linear_cross_entropy_loss.py"): "for an older torch",
    ("linear_cross_entropy", "fastopt/_language_models.py"): "the loss they get",
    ("TripletMargin", "fastopt/nn/triplet_margin_with_distance.py"): "of the usual distance",
    ("cross_entropy", "kernels"): "the loops over rows, named after what they were written for",
    ("cross_entropy", "fastopt/dispatch.py"): "an example in a docstring",
    ("mse_loss", "fastopt/dispatch.py"): "an example in a docstring",
    ("MSELoss", "fastopt/_explain.py"): "an example in a docstring",
    ("MSE", "kernels/numba/compiler.py"): "an example in a docstring",
    ("L1", "kernels/numba/softmax_rows.py"): "the processor's cache",
    ("L1", "fastopt/nn/smooth_l1.py"): "the usual name of this loss",
}


def own_file(name: str) -> Path:
    return Path(inspect.getfile(sys.modules[FUNCTIONS[name].__module__]))


def words_of(name: str) -> set[str]:
    """The function's, the class's and the record's names."""
    module, record = sys.modules[FUNCTIONS[name].__module__], RECORDS[name]
    return {*module.__all__, *([record.__name__] if record.__module__ == module.__name__ else [])}


def kinds_of(name: str) -> list[Any]:
    """The module classes that call a function."""
    functions = [(kind, getattr(kind, "_function", None)) for kind in MODULES.values()]
    return [kind for kind, function in functions if function is FUNCTIONS[name]]


def order_of(kind: Any) -> int:
    return list(MODULES).index(kind.__name__)


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
    assert words >= {kind.__name__ for kind in kinds_of(name)}
    assert words <= set(re.findall(r"\w+", own_file(name).read_text()))


def test_one_operation_a_file() -> None:
    files = [own_file(name) for name in FUNCTIONS]
    assert len(set(files)) == len(files)
    modules = {Path(inspect.getfile(kind)) for kind in MODULES.values()}  # one has no function
    public = {f.name for f in (ROOT / "fastopt" / "nn").glob("[!_]*.py")} - {"functional.py"}
    assert public == {file.name for file in {*files, *modules}}


@EACH
def test_everything_finds_it(name: str) -> None:
    """The exports, the decorator's table, torch's twin, warmup, convert and explain."""
    torchs: Any = getattr(torch.nn.functional, name, torch.nn.functional.linear)
    if issubclass(RECORDS[name], LinearSoftmax):  # whose definition torch lacks before 2.13
        assert RECORDS[name].twin is vars(RECORDS[name])["twin"].__func__
    elif RECORDS[name].further:  # for which torch's function alone won't do
        assert RECORDS[name].twin is definition
    elif RECORDS[name].__module__ == FUNCTIONS[name].__module__:
        assert RECORDS[name].twin is torchs
    assert getattr(fastopt.nn.functional, name) is FUNCTIONS[name]
    assert name in fastopt.nn.functional.__all__
    kinds = kinds_of(name)
    for kind in kinds:
        assert getattr(fastopt.nn, kind.__name__) is kind
        assert kind.__name__ in fastopt.nn.__all__
    if not issubclass(RECORDS[name], TorchOnly):
        assert kinds
        assert len([job for job, _ in jobs(torch.float32, [name]) if job == name]) >= 2
    words = "".join(rf"\b{kind.__name__}\b.*" for kind in sorted(kinds, key=order_of))
    with pytest.raises(TypeError, match=rf"supported: .*{words}\b{name}\b"):
        fastopt.explain(torchs)


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=str)
@EACH
def test_samples_are_such_that_a_kernel_serves_them(name: str, dtype: torch.dtype) -> None:
    """And torch; what is compiled ahead is what a call of that kind needs."""
    if issubclass(RECORDS[name], TorchOnly):
        return
    calls = list(usual(RECORDS[name], 1 << 10, dtype))
    assert calls or dtype.itemsize == 2
    for operands in calls:
        with fastopt.use_backend("reference"):
            FUNCTIONS[name](**operands).backward()
        with fastopt.use_backend("numba"):
            (decision,) = fastopt.explain(FUNCTIONS[name], **operands)
        assert decision.backend == "numba"
        assert any(t.requires_grad for t in operands.values())
        sizes = [t.numel() for t in operands.values()]
        assert max(sizes) == 1 << 10


@pytest.mark.filterwarnings("ignore:reduction. 'mean' divides the total loss:UserWarning")
@EACH
def test_second_derivatives_by_torchs_function(name: str) -> None:
    """Where torch has to follow a backward pass, the record gives it torch's function to call."""
    if issubclass(RECORDS[name], TorchOnly):
        return
    operands = next(iter(usual(RECORDS[name], 1 << 10, torch.float64)))
    wanted = [t for t in operands.values() if t.requires_grad]

    def second(function: Any) -> tuple[torch.Tensor, ...]:
        first = torch.autograd.grad(function(**operands), wanted, create_graph=True)
        followed = sum((g * g).sum() for g in first if g.requires_grad) + 0 * wanted[0].sum()
        return torch.autograd.grad(followed, wanted, allow_unused=True, materialize_grads=True)

    theirs = getattr(torch.nn.functional, name, RECORDS[name].twin)
    try:
        expected = second(theirs)
    except RuntimeError as error:  # torch has none for this one
        with fastopt.use_backend("numba"), pytest.raises(RuntimeError, match=re.escape(str(error))):
            second(FUNCTIONS[name])
        return
    with fastopt.use_backend("numba"):
        found = second(FUNCTIONS[name])
    torch.testing.assert_close(found, expected)


def test_warmup_knows_every_operation() -> None:
    compiled = {name for name in FUNCTIONS if not issubclass(RECORDS[name], TorchOnly)}
    assert len(compiled) >= 18
    assert {name for name, _ in jobs(torch.float32)} == {*compiled, *OPTIMIZERS}


#: What the classes need to be made.
NEEDED = {
    "AdaptiveLogSoftmaxWithLoss": {"in_features": 4, "n_classes": 5, "cutoffs": [2]},
    "LinearCrossEntropyLoss": {"in_features": 4, "num_classes": 5},
}


@pytest.mark.filterwarnings("ignore:`NLLLoss2d` has been deprecated:FutureWarning")
@pytest.mark.parametrize("kind", MODULES)
def test_convert_knows_every_loss(kind: str) -> None:
    """It changes the class and nothing else, inside of a model too, and back again."""
    theirs = getattr(torch.nn, kind)
    model = torch.nn.ModuleDict(
        {"loss": theirs(**NEEDED.get(kind, {"reduction": "sum"})), "layer": torch.nn.Linear(2, 3)}
    )
    state = dict(vars(model["loss"]))
    assert fastopt.convert(model) is model
    assert type(model["loss"]) is MODULES[kind]
    assert vars(model["loss"]) == state
    assert type(model["layer"]) is torch.nn.Linear
    fastopt.convert(model, to="torch")
    assert type(model["loss"]) is theirs


class Stranger(torch.nn.modules.loss._Loss):
    """One that neither torch nor fastopt has."""


def test_convert_says_which_loss_fastopt_lacks() -> None:
    model = torch.nn.Sequential(Stranger(), torch.nn.HuberLoss())
    with pytest.warns(UserWarning, match=r"left alone: 0 \(Stranger, of which fastopt has none\)$"):
        fastopt.convert(model)
    assert type(model[1]) is MODULES["HuberLoss"]

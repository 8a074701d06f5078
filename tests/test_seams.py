"""Where others take hold of losses: torch's names for ours, tracers, numbers of other kinds."""

from __future__ import annotations

import itertools
import subprocess
import sys
import textwrap
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
import fastopt.nn.functional as ours

each_loss = pytest.mark.parametrize("name", ["cross_entropy", "l1_loss", "mse_loss"])


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(0)


def arguments(name: str, rows: int = 200) -> tuple[Tensor, Tensor]:
    """Large enough for a kernel."""
    x = torch.randn(rows, 1000)
    return x, torch.randint(1000, (rows,)) if name == "cross_entropy" else torch.randn(rows, 1000)


def outcome(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a call gives, or the type of what it raises."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return function(*args, **kwargs)
        except Exception as error:
            return type(error)


def assert_alike(found: Any, expected: Any, of: object) -> None:
    if isinstance(expected, Tensor) and isinstance(found, Tensor):
        torch.testing.assert_close(found, expected, msg=lambda text: f"{of}: {text}")
    else:
        assert found == expected, of


# -- torch's names given to ours ---------------------------------------------------------------

PATCHED = """
import itertools, resource
import torch, torch.nn.functional as F
import fastopt
resource.setrlimit(resource.RLIMIT_AS, (6 << 30,) * 2)  # a recursion through autograd has no end

class Sub(torch.Tensor):
    pass

class Mode(torch.overrides.TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))

def in_mode(x, f):
    with Mode():
        return f(x)

def grad(x, f, **options):
    x = x.detach().requires_grad_()
    return torch.autograd.grad(f(x), x, **options)[0]

def second_order(x, f):
    x = x.detach().requires_grad_()
    g, = torch.autograd.grad(f(x), x, create_graph=True)
    return torch.autograd.grad(g.square().sum(), x)[0]

uses = {
    "a call": lambda x, f: f(x),
    "a parameter": lambda x, f: f(torch.nn.Parameter(x)).detach(),
    "a gradient": grad,
    "a second derivative": second_order,
    "several grad_outputs": lambda x, f: grad(
        x, f, grad_outputs=torch.tensor([1.0, 2.0]), is_grads_batched=True),
    "vmap": lambda x, f: torch.vmap(f)(torch.stack([x, x + 1])),
    "func.grad": lambda x, f: torch.func.grad(f)(x),
    "func.jvp": lambda x, f: torch.func.jvp(f, (x,), (x,))[1],
    "a subclass": lambda x, f: f(x.as_subclass(Sub)).as_subclass(torch.Tensor),
    "a mode": in_mode,
    "compiled": lambda x, f: torch.compile(f, backend="aot_eager")(x),
    "traced": lambda x, f: torch.jit.trace(f, (x,), check_trace=False)(x),
    "autocast": lambda x, f: torch.autocast("cpu", torch.bfloat16)(f)(x),
}

def calls(rows):
    torch.manual_seed(0)
    y, labels = torch.randn(rows, 1000), torch.randint(1000, (rows,))
    return torch.randn(rows, 1000), {
        "mse": lambda x: F.mse_loss(x, y),
        "l1 sum": lambda x: F.l1_loss(x, y, reduction="sum"),
        "weighted mse": lambda x: F.mse_loss(x, y, weight=y.abs()),
        "cross-entropy": lambda x: F.cross_entropy(x, labels),
        "probabilities": lambda x: F.cross_entropy(x, y.softmax(1).requires_grad_()).sum(),
        "module": lambda x: torch.nn.CrossEntropyLoss(label_smoothing=0.1)(x, labels),
    }

def found():
    results = {}
    for rows in (3, 200):
        x, functions = calls(rows)
        for (name, f), (use, call) in itertools.product(
            functions.items(), uses.items()
        ):
            try:
                results[rows, name, use] = call(x, f).detach()
            except Exception as error:
                results[rows, name, use] = type(error).__name__
    torch.compiler.reset()
    return results

before = found()
for name in fastopt.nn._operations.FUNCTIONS:
    setattr(F, name, getattr(fastopt.nn.functional, name))
torch.nn.CrossEntropyLoss, torch.nn.MSELoss = fastopt.nn.CrossEntropyLoss, fastopt.nn.MSELoss
for where, result in found().items():
    if isinstance(result, str) or isinstance(before[where], str):
        assert result == before[where], (where, result, before[where])
    else:
        torch.testing.assert_close(result, before[where], msg=lambda text: f"{where}: {text}")
assert sum(isinstance(result, str) for result in before.values()) <= 8, before
print("fine", len(before))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="the limit of memory is POSIX's")
def test_torchs_functions_replaced_by_ours() -> None:
    """As kernels for transformers are put in place; torch's own code must not come back to us."""
    script = textwrap.dedent(PATCHED)
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    assert run.stdout.startswith("fine")


def test_torchs_classes_replaced_by_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """convert changes the classes that torch had when fastopt was imported."""
    classes = {
        kind: getattr(package, kind)
        for package in (torch.nn, torch.optim)
        for kind in ("CrossEntropyLoss", "MSELoss", "L1Loss", "SGD", "Adam", "AdamW", "RMSprop")
        if hasattr(package, kind)
    }
    for name, kind in classes.items():
        package, mine = (
            (torch.nn, fastopt.nn) if name.endswith("Loss") else (torch.optim, fastopt.optim)
        )
        monkeypatch.setattr(package, name, getattr(mine, name))
        given: dict[str, Any] = {}
        if package is torch.optim:
            given = {"params": [torch.zeros(3)], "lr": 0.1}
        for subject in (kind(**given), getattr(package, name)(**given)):
            assert type(fastopt.convert(subject)) is getattr(mine, name)
            assert type(fastopt.convert(subject, to="torch")) is kind


# -- dtypes by their place ---------------------------------------------------------------------


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.int32, torch.bool], ids=str)
@each_loss
def test_integers_where_none_belong(name: str, dtype: torch.dtype, autocast: bool) -> None:
    """Class indices may be integers, and nothing else; torch says what is wrong."""
    x, second = arguments(name)
    given = [x, second, torch.ones(1000)] if name == "cross_entropy" else [x, second]
    for place, reduction in itertools.product(range(len(given)), ("mean", "none", "sum")):
        tensors = list(given)
        tensors[place] = (tensors[place].abs() % 2).to(dtype)
        results = []
        for module in (theirs, ours):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                function = getattr(module, name)
                results.append(outcome(function, *tensors, reduction=reduction))
        assert_alike(results[1], results[0], (place, reduction))


def test_explained_by_the_dtype() -> None:
    x, labels = arguments("cross_entropy")
    (decision,) = fastopt.explain(ours.cross_entropy, x, labels, torch.ones(1000).long())
    assert decision.backend == "reference"
    assert "a weight of dtype torch.int64" in str(decision)
    with torch.autocast("cpu", torch.bfloat16):
        (decision,) = fastopt.explain(ours.cross_entropy, x, labels, torch.ones(1000).long())
    assert decision.backend == "reference"
    assert "not numba: dtypes=float32, int64 (supported:" in str(decision)
    (decision,) = fastopt.explain(ours.cross_entropy, x, labels.int())
    assert "class indices of int32 (supported: int64, uint8)" in str(decision)


# -- NumPy's numbers -----------------------------------------------------------------------------

PLAIN = (np.float16, np.float32, np.float64, np.int64, np.int32, np.uint8)


@pytest.mark.parametrize("kind", [*PLAIN, np.longdouble, np.bool_, np.complex64, bool])
def test_numbers_of_numpy(kind: Any, no_crossovers: None) -> None:
    """Taken where torch takes them, with the values that they have, and refused where it does."""
    x, labels = arguments("cross_entropy")
    for values in ({"ignore_index": 3}, {"label_smoothing": 0.1}, {"label_smoothing": 1}):
        options = {name: kind(value) for name, value in values.items()}
        for _ in range(2):  # as found out, and as remembered
            results = [
                outcome(module.cross_entropy, x, labels, **options) for module in (theirs, ours)
            ]
            assert_alike(results[1], results[0], options)
        (decision,) = fastopt.explain(ours.cross_entropy, x, labels, **options)
        if isinstance(results[0], Tensor) and issubclass(kind, PLAIN):
            assert decision.backend == "numba", decision


def test_numbers_of_numpy_in_a_module(no_crossovers: None) -> None:
    x, labels = arguments("cross_entropy")
    for options in (
        {"ignore_index": np.int64(7)},
        {"label_smoothing": np.float32(0.1)},
        {"label_smoothing": np.float64(0.1), "ignore_index": np.int32(labels[0].item())},
    ):
        mine, torchs = (m.CrossEntropyLoss(**options) for m in (fastopt.nn, torch.nn))
        torch.testing.assert_close(mine(x, labels), torchs(x, labels))
        assert fastopt.explain(mine, x, labels)[0].backend == "numba"


# -- tracers and modes ---------------------------------------------------------------------------


class Seen(TorchDispatchMode):
    """Notes the operations that it sees."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operations.append(str(func))
        return func(*args, **(kwargs or {}))


def gradient(function: Callable[..., Tensor], x: Tensor, second: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x, second) * 0.3, x)[0]


@pytest.mark.parametrize("mode", ["real", "fake", "symbolic"])
@each_loss
def test_make_fx(name: str, mode: str) -> None:
    """The loss and its backward pass as a graph of torch's operations, for other data."""
    mine, torchs = getattr(ours, name), getattr(theirs, name)
    x, second = arguments(name)
    graph = make_fx(lambda x, y: gradient(mine, x, y), tracing_mode=mode)(x, second)
    torch.testing.assert_close(graph(-x, second), gradient(torchs, -x, second))
    if mode == "symbolic":  # of other sizes
        x, second = arguments(name, 70)
        torch.testing.assert_close(graph(x, second), gradient(torchs, x, second))


@each_loss
def test_a_dispatch_mode(name: str) -> None:
    """Around the whole, or around one of the passes, it sees torch's operations."""
    x, second = arguments(name)
    for around in ({"forward"}, {"backward"}, {"forward", "backward"}):
        grads, seen = [], []
        for module in (ours, theirs):
            leaf, mode = x.clone().requires_grad_(), Seen()
            if "forward" in around:
                with mode:
                    loss = getattr(module, name)(leaf, second)
            else:
                loss = getattr(module, name)(leaf, second)
            if "backward" in around:
                with mode:
                    loss.backward()
            else:
                loss.backward()
            grads.append((loss.detach(), leaf.grad))
            seen.append(mode.operations)
        torch.testing.assert_close(grads[0], grads[1])
        assert set(seen[1]) <= set(seen[0]), around


@each_loss
def test_fake_tensors(name: str) -> None:
    """Without memory, and of sizes that are no numbers; nothing is decided about those."""
    from torch.fx.experimental.symbolic_shapes import ShapeEnv

    found = []
    for module in (ours, theirs):
        shapes = ShapeEnv()
        with FakeTensorMode(shape_env=shapes) as mode:
            rows = shapes.create_unbacked_symint()
            torch._check(rows >= 0)
            x = torch.empty(rows, 1000)
            second = torch.zeros(rows, dtype=torch.int64)
            second = second if name == "cross_entropy" else torch.empty_like(x)
        symbolic = outcome(getattr(module, name), x, second)
        found.append([getattr(symbolic, "shape", symbolic)])
        with mode:
            x = torch.empty(200, 1000, requires_grad=True)
            second = torch.zeros(200, dtype=torch.int64)
            second = second if name == "cross_entropy" else torch.empty_like(x)
            loss = getattr(module, name)(x, second)
            loss.backward()
        found[-1] += [type(loss), loss.shape, type(x.grad), x.grad.shape]
    assert found[0] == found[1]


@each_loss
def test_lazy_parameters(name: str) -> None:
    """Of a size that isn't known yet: torch's error."""
    lazy = torch.nn.UninitializedParameter()
    second = arguments(name)[1]
    kinds = []
    for module in (theirs, ours):
        with pytest.raises((ValueError, RuntimeError), match="uninitialized") as caught:
            getattr(module, name)(lazy, second)
        kinds.append(caught.type)
    assert kinds[0] is kinds[1]
    with pytest.raises(RuntimeError, match="uninitialized"):
        fastopt.explain(getattr(ours, name), lazy, second)

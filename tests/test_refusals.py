"""Calls that a backend insisted on can't serve, calls that are wrong, and fastopt.explain."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from race import NAMES
from torch import Tensor
from watching import watch_losses

import fastopt
import fastopt.nn.functional as ours
from fastopt import BackendUnavailable
from fastopt.front.call import RECORDS

X, Y, LABELS = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([0, 1, 2, 1])
OPTIMIZERS = {name: getattr(fastopt.optim, name) for name in NAMES}
BACKENDS = pytest.mark.parametrize("backend", [None, "numba"])


def insisting(backend: str | None) -> AbstractContextManager[None]:
    return nullcontext() if backend is None else fastopt.use_backend(backend)


# -- losses that the backend can't serve -----------------------------------------------


@pytest.mark.parametrize(
    ("operation", "arguments", "options", "reason"),
    [
        ("l1_loss", (X + 1j, Y + 0j), {}, "dtypes=complex64 (supp"),
        ("l1_loss", (LABELS, LABELS), {"reduction": "sum"}, "dtypes=int64 (supp"),
        ("mse_loss", (X, LABELS[:, None].expand(4, 3)), {}, "a target of dtype torch.int64"),
        ("mse_loss", (X.double(), Y.bfloat16()), {}, "float64 with float64 and float32 only"),
        ("mse_loss", (X, Y), {"weight": Y.abs().requires_grad_()}, "a gradient to the weight"),
        ("mse_loss", (X, Y), {"size_average": False}, "the deprecated size_average"),
        ("mse_loss", (X.to("meta"), Y.to("meta")), {}, "device=meta (supported: cpu)"),
        ("cross_entropy", (torch.randn(2, 5, 6, 7).mT, torch.ones(2, 7, 6).long()), {}, "strides"),
    ],
)
def test_loss_that_numba_can_not_serve(
    operation: str, arguments: tuple[Tensor, ...], options: dict[str, Any], reason: str
) -> None:
    before = [(t._version, t.detach().clone()) for t in arguments]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # torch's, for broadcasting
        expected = getattr(theirs, operation)(*arguments, **options)
        found = getattr(ours, operation)(*arguments, **options)
        with fastopt.use_backend("numba"), pytest.raises(BackendUnavailable) as caught:
            getattr(ours, operation)(*arguments, **options)
    assert reason in str(caught.value)
    assert "not triton: device=" in str(caught.value), "every backend's reasons"
    for tensor, (version, value) in zip(arguments, before, strict=True):
        assert tensor._version == version
        assert tensor.grad is None
        assert tensor.is_meta or torch.equal(tensor, value)
    assert found.is_meta if expected.is_meta else torch.equal(found, expected)


def test_transforms_that_numba_can_not_serve() -> None:
    for transform in (torch.func.grad, torch.func.vmap, torch.func.jacrev):
        with (
            fastopt.use_backend("numba"),
            pytest.raises(BackendUnavailable, match=r"a torch\.func transform"),
        ):
            transform(ours.mse_loss)(X, Y)
    with (
        fastopt.use_backend("numba"),
        pytest.raises(BackendUnavailable, match="forward-mode differentiation"),
    ):
        torch.func.jvp(ours.mse_loss, (X, Y), (X, Y))


# -- optimizers that the backend can't serve --------------------------------------------


def sparse(param: Tensor) -> Tensor:
    return torch.ones_like(param).to_sparse()


UNSERVED: dict[str, tuple[Callable[[], Tensor], Callable[[Tensor], Tensor], str]] = {
    "complex": (lambda: torch.randn(5) + 1j, torch.ones_like, "dtypes=complex64"),
    "differentiable": (lambda: torch.randn(5), torch.ones_like, "differentiable=True"),
    "gaps": (lambda: torch.randn(4, 6)[:, ::2], torch.ones_like, "gaps"),
    "transposed": (lambda: torch.randn(4, 6), lambda p: torch.ones(6, 4).t(), "another layout"),
    "sparse": (lambda: torch.randn(5), sparse, "a gradient of layout torch.sparse_coo"),
}


@pytest.mark.parametrize("stepped", [False, True], ids=["first-step", "later-step"])
@pytest.mark.parametrize("kind", UNSERVED)
@pytest.mark.parametrize("operation", OPTIMIZERS)
def test_optimizer_that_numba_can_not_serve(operation: str, kind: str, stepped: bool) -> None:
    """Not even the parameters that it could serve are touched."""
    make, gradient, reason = UNSERVED[kind]
    good, bad = torch.randn(6, requires_grad=True), make().detach().requires_grad_()
    options = {"differentiable": True} if kind == "differentiable" else {}
    groups = [{"params": [good]}, {"params": [bad], **options}]
    optimizer = getattr(fastopt.optim, operation)(groups, lr=0.1)
    good.grad, bad.grad = torch.ones(6), torch.ones_like(bad)
    if stepped and not options:  # torch's own differentiable step refuses leaves
        optimizer.step()
    bad.grad = gradient(bad.detach())
    before = copy.deepcopy(optimizer.state_dict())
    values = [t.detach().clone() for t in (good, bad)]
    versions = [t._version for t in written(optimizer, good, bad)]
    for _ in range(2):
        with fastopt.use_backend("numba"), pytest.raises(BackendUnavailable) as caught:
            optimizer.step()
        assert reason in str(caught.value)
        assert "not triton: device=cpu" in str(caught.value)
    assert [t._version for t in written(optimizer, good, bad)] == versions
    torch.testing.assert_close([good.detach(), bad.detach()], values, rtol=0, atol=0)
    assert repr(optimizer.state_dict()) == repr(before)


def written(optimizer: torch.optim.Optimizer, *params: Tensor) -> list[Tensor]:
    states = [t for state in optimizer.state.values() for t in state.values() if t is not None]
    return [*params, *states, *(p.grad for p in params if p.grad is not None)]


# -- calls that are wrong ---------------------------------------------------------------

# By what is wrong; each takes torch.nn.functional or fastopt's.
WRONG: dict[str, Callable[[Any], Any]] = {
    "size": lambda f: f.mse_loss(X, Y[:, :2]),
    "no-tensor": lambda f: f.mse_loss(X, None),
    "no-input-tensor": lambda f: f.mse_loss([1.0], X),
    "missing": lambda f: f.mse_loss(X),
    "missing-l1": lambda f: f.l1_loss(X, reduction="sum"),
    "missing-labels": lambda f: f.cross_entropy(X),
    "unknown-option": lambda f: f.mse_loss(X, Y, sum=True),
    "reduction": lambda f: f.mse_loss(X, Y, reduction="nonsense"),
    "elementwise-weight": lambda f: f.mse_loss(X, Y, weight=2.0),
    "integers": lambda f: f.mse_loss(LABELS, LABELS),
    "sparse": lambda f: f.l1_loss(X.to_sparse(), Y),
    "rows": lambda f: f.cross_entropy(X, LABELS[:3]),
    "label-axes": lambda f: f.cross_entropy(X, LABELS[:, None]),
    "label-dtype": lambda f: f.cross_entropy(X, LABELS.int()),
    "logits-dtype": lambda f: f.cross_entropy(X.long(), LABELS),
    "logits-axes": lambda f: f.cross_entropy(torch.ones(()), torch.tensor(0)),
    "label-reduction": lambda f: f.cross_entropy(X, LABELS, reduction="nonsense"),
    "smoothing": lambda f: f.cross_entropy(X, LABELS, label_smoothing=2.0),
    "smoothing-type": lambda f: f.cross_entropy(X, LABELS, label_smoothing="much"),
    "ignored-type": lambda f: f.cross_entropy(X, LABELS, ignore_index=None),
    "ignored-range": lambda f: f.cross_entropy(X, LABELS, ignore_index=1 << 63),
    "weight-size": lambda f: f.cross_entropy(X, LABELS, torch.ones(4)),
    "weight-dtype": lambda f: f.cross_entropy(X, LABELS, torch.ones(3).double()),
    "weight-type": lambda f: f.cross_entropy(X, LABELS, [1.0, 1.0, 1.0]),
    "weight-grad": lambda f: f.cross_entropy(X, LABELS, torch.ones(3, requires_grad=True)),
    "probability-size": lambda f: f.cross_entropy(X, Y[:, :2]),
    "probability-ignored": lambda f: f.cross_entropy(X, Y.softmax(1), ignore_index=1),
}


def error_of(call: Callable[[], Any]) -> Exception:
    try:
        call()
    except Exception as error:
        return error
    raise AssertionError("no error")


@BACKENDS
@pytest.mark.filterwarnings("ignore:Using a target size")  # torch warns before it raises
@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_call_raises_what_torch_raises(wrong: str, backend: str | None) -> None:
    expected = error_of(lambda: WRONG[wrong](theirs))
    with insisting(backend):
        found = error_of(lambda: WRONG[wrong](ours))
    assert type(found) is type(expected)
    assert str(found) == str(expected)


@BACKENDS
def test_wrong_class_index_is_named(backend: str | None) -> None:
    labels = torch.tensor([[0, 1], [2, 7]])
    with insisting(backend), pytest.raises(IndexError) as found:
        ours.cross_entropy(torch.randn(2, 3, 2), labels)
    for part in ("Target 7 is out of bounds", "target[1, 1]", "0 to 2", "ignore_index=-100"):
        assert part in str(found.value)


# -- kernels that fail ------------------------------------------------------------------


def boom(*args: Any, **kwargs: Any) -> Any:
    raise RuntimeError("boom")


@BACKENDS
@pytest.mark.parametrize("operation", ["mse_loss", "l1_loss", "cross_entropy"])
def test_exception_in_a_loss_kernel_is_not_swallowed(
    operation: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fall back to torch would hide the bug."""
    from fastopt.kernels import numba

    classes = 512  # rows of fewer classes have crossovers of their own
    x = torch.randn(RECORDS[operation].crossover // classes, classes, requires_grad=True)
    y = torch.ones(len(x)).long() if operation == "cross_entropy" else torch.zeros_like(x)
    with insisting(backend):
        losses = getattr(ours, operation)(x, y, reduction="none")
        watch_losses(monkeypatch, boom)
        with pytest.raises(RuntimeError, match=r"^boom$"):
            getattr(ours, operation)(x, y)
        with pytest.raises(RuntimeError, match=r"^boom$"), torch.no_grad():
            getattr(ours, operation)(x, y)
    monkeypatch.setattr(numba, "backward", boom)
    with pytest.raises(RuntimeError, match=r"^boom$"):
        losses.backward(torch.ones_like(losses))
    assert x.grad is None


@BACKENDS
@pytest.mark.parametrize("where", ["step_launcher", "threads.Launcher.__call__"])
@pytest.mark.parametrize("operation", OPTIMIZERS)
def test_exception_in_an_optimizer_kernel_is_not_swallowed(
    operation: str, where: str, backend: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And the step can be repeated once the cause is gone (Ctrl-C while it compiles)."""
    start = torch.randn(5)
    params = [start.clone().requires_grad_() for _ in range(2)]
    options = {"momentum": 0.9, "dampening": 0.5} if operation == "SGD" else {}
    mine, its = (
        getattr(module.optim, operation)([p], lr=0.1, **options)
        for module, p in zip((fastopt, torch), params, strict=True)
    )
    for param in params:
        param.grad = torch.ones(5)
    with insisting(backend), monkeypatch.context() as patch:
        patch.setattr(f"fastopt.kernels.numba.{where}", boom)
        for _ in range(2):
            with pytest.raises(RuntimeError, match=r"^boom$"):
                mine.step()
    torch.testing.assert_close(params[0].detach(), start, rtol=0, atol=0)
    for _ in range(2):
        its.step()
        with insisting(backend):
            mine.step()
    torch.testing.assert_close(params[0], params[1])

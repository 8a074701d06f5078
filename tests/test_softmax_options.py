"""z_loss and softcap of cross-entropy, of logits and of a linear layer: against long doubles."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import oracle
import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, INTERPRETED, Make, assert_as_accurate, distributed, labelled, transpose
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours
from fastopt.dispatch import load

DOUBLE, FLOAT, BFLOAT, HALF = torch.float64, torch.float32, torch.bfloat16, torch.float16
CAP, SQUARE = {"softcap": 4.0}, {"z_loss": 0.03}
BOTH, SMOOTH = CAP | SQUARE, {"label_smoothing": 0.2}
#: Classes of rows that threads, or programs, share.
LONG = 20_001 if INTERPRETED else 70_001

#: Every traversal with and without each option, in some dtype.
CASES: list[tuple[Make, torch.dtype, dict[str, Any]]] = [
    (labelled((33, 10)), FLOAT, BOTH),
    (labelled((65, 3), weight=True), BFLOAT, BOTH | SMOOTH),
    (labelled((33, 10)), HALF, CAP),
    (labelled((3, 20, 70), weight=True), DOUBLE, CAP | SMOOTH),
    (labelled((2, 300, 19)), FLOAT, SQUARE),
    (labelled((7,), ignored=None), FLOAT, BOTH),
    (labelled((5, 300)), FLOAT, BOTH),
    (labelled((5, 2500), weight=True), BFLOAT, BOTH | SMOOTH),
    (labelled((3, 17, 300), transpose), DOUBLE, SQUARE | SMOOTH),
    (distributed(5, 300, weight=True), FLOAT, BOTH | SMOOTH),
    (labelled((2, LONG), ignored=None), FLOAT, BOTH),
    (distributed(2, LONG), DOUBLE, BOTH),
]


def plain(
    input: Tensor, target: Tensor, weight: Tensor | None = None, reduction: str = "mean",
    z_loss: float = 0.0, softcap: float | None = None, **options: Any,
) -> Tensor:  # fmt: skip
    """The definition, with ignored positions out of it."""
    x = input if softcap is None else softcap * torch.tanh(input / softcap)
    losses = theirs.cross_entropy(x, target, weight, reduction="none", **options)
    squares = z_loss * x.logsumexp(min(1, x.dim() - 1)) ** 2
    used = torch.ones_like(losses)
    if not target.is_floating_point():
        counts = target != options.get("ignore_index", -100)
        squares = squares * counts
        used = counts.to(x.dtype)
        if weight is not None:
            used = used * weight[target.clamp_min(0).long()]
    losses = losses + squares
    if reduction == "none":
        return losses
    return losses.sum() / used.sum() if reduction == "mean" else losses.sum()


def tensor(numbers: Any) -> Tensor:
    """The oracle's, in float64."""
    return torch.tensor(np.asarray(numbers, np.float64))


def outcome(
    function: Callable[..., Tensor], tensors: tuple[Tensor, ...], upstream: Tensor | None,
    **options: Any,
) -> list[Tensor]:  # fmt: skip
    """The loss, and the gradients of the logits and of probabilities."""
    x, target, *weight = (t.detach() for t in tensors)
    leaves = [t.requires_grad_() for t in (x, target) if t.is_floating_point()]
    loss = function(x, target, *weight, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]


@pytest.mark.parametrize("k", range(len(CASES)))
def test_values_and_gradients(k: int, poison: None) -> None:
    make, dtype, options = CASES[k]
    tensors = make(dtype)
    wide = tuple(t.double() if t.is_floating_point() else t for t in tensors)
    for reduction in ("mean", "none", "sum")[: 3 if k < 2 else 2]:
        shape = plain(*tensors, reduction=reduction, **options).shape
        for upstream in (None, torch.randn(shape).to(dtype))[reduction == "none" :]:
            given = options | {"reduction": reduction}
            with fastopt.use_backend(BACKEND):
                mine = outcome(ours.cross_entropy, tensors, upstream, **given)
            torchs = outcome(plain, tensors, upstream, **given)
            exact = outcome(plain, wide, upstream, **given)
            one = torch.ones(shape, dtype=dtype) if upstream is None else upstream
            right = oracle.loss("cross_entropy", tensors, reduction, one, **options)
            exact[:2] = map(tensor, right)
            for each in zip(mine, torchs, exact, strict=True):
                assert_as_accurate(*each)
            # Torch's operations in fastopt's order, as where no kernel serves.
            with fastopt.use_backend("reference"):
                again = outcome(ours.cross_entropy, tensors, upstream, **given)
            for each in zip(again, torchs, exact, strict=True):
                assert_as_accurate(*each)


@pytest.mark.parametrize(
    ("options", "classes"), [(BOTH, 5), (BOTH, 200), (BOTH, LONG), (SQUARE, 5)], ids=str
)
def test_extremes(options: dict[str, Any], classes: int) -> None:
    """Infinities are capped, and have no gradient then; NaN stays, of an ignored row nothing."""
    x = torch.randn(9, classes)
    t = torch.full((9,), classes - 1)
    x[0, :2] = -torch.inf
    x[1] = -torch.inf
    x[2, 1] = torch.inf
    x[3, 2] = torch.nan
    x[4] = 1e30 if "softcap" in options else 1e6  # of 1e30 torch's p is 1, for each class
    x[5] = -x[4]
    x[6, -1] = torch.inf
    x[7, -1] = 60.0
    x[8], t[8] = torch.nan, -100
    upstream = torch.randn(9)
    with fastopt.use_backend(BACKEND):
        mine = outcome(ours.cross_entropy, (x, t), upstream, reduction="none", **options)
    exact = outcome(plain, (x.double(), t), upstream, reduction="none", **options)
    exact[0][8], exact[1][8] = 0.0, 0.0
    for m, e in zip(mine, exact, strict=True):
        torch.testing.assert_close(m, e.float(), rtol=2e-6, atol=2e-6, equal_nan=True)
    if "softcap" in options:
        assert (mine[1][0, :2] == 0).all()
        assert (mine[1][4:6] == 0).all()


def test_confident_rows() -> None:
    """What p is short of 1 has its digits, though logits are capped."""
    x = torch.randn(40, 300, dtype=DOUBLE)
    t = torch.randint(0, 300, (40,))
    x[torch.arange(40), t] = torch.linspace(10, 60, 40).double()
    tensors = (x.float(), t)
    with fastopt.use_backend(BACKEND):
        loss, grad = outcome(ours.cross_entropy, tensors, None, softcap=60.0, reduction="sum")
    right = oracle.loss("cross_entropy", tensors, "sum", torch.ones(()), softcap=60.0)
    true, slope = map(tensor, right)
    torch.testing.assert_close(loss.double(), true, rtol=1e-5, atol=1e-5)
    chosen = torch.arange(40), t
    last = 2e-7 if BACKEND == "triton" else 1e-15  # p - 1 is computed in float32, or in float64
    torch.testing.assert_close(grad[chosen].double(), slope[chosen], rtol=2e-5, atol=last)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_nothing_counts(reduction: str) -> None:
    for shape in ((6, 10), (6, 200), (0, 10)):
        x, t = torch.randn(shape), torch.full(shape[:1], -100)
        with fastopt.use_backend(BACKEND):
            loss, grad = outcome(ours.cross_entropy, (x, t), None, reduction=reduction, **BOTH)
        assert loss.isnan() if reduction == "mean" else loss == 0
        assert torch.equal(grad, torch.zeros(shape))


# -- of a linear layer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("classes", "dtype", "reduction", "soft"),
    [
        (150, FLOAT, "mean", False), (7, FLOAT, "none", False),
        (150, DOUBLE, "none", True), (150, BFLOAT, "sum", False),
    ],
    ids=str,
)  # fmt: skip
def test_linear(
    classes: int, dtype: torch.dtype, reduction: str, soft: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: Any = load(BACKEND)._loops.linear.pieces
    monkeypatch.setattr(pieces, "BYTES", 1)
    monkeypatch.setattr(pieces, "ROWS", 5)
    sizes = ((13, 11), (classes, 11), (classes,))
    x, w, b = (torch.randn(s, dtype=DOUBLE).to(dtype) for s in sizes)
    target = torch.randint(classes, (13,))
    target[::4] = -100
    if soft:
        target = torch.rand(13, classes).to(dtype)
    logits = x.double() @ w.double().T + b.double()
    upstream = torch.randn(13 if reduction == "none" else ()).to(dtype)
    doubles = (logits, target.double() if soft else target)
    right = oracle.loss("cross_entropy", doubles, reduction, upstream, **BOTH)
    true, g = map(tensor, right)
    exact = [true, g @ w.double(), g.T @ x.double(), g.sum(0)]
    for backend in (BACKEND, "reference"):
        leaves = [t.clone().requires_grad_() for t in (x, w, b)]
        with fastopt.use_backend(backend):
            loss = ours.linear_cross_entropy(
                *leaves[:2], target, linear_bias=leaves[2], reduction=reduction, **BOTH
            )
        found = [loss.detach(), *torch.autograd.grad(loss, leaves, upstream)]
        for m, e in zip(found, exact, strict=True):
            assert m.dtype == dtype
            error, size = ((t.double()).norm() for t in (m - e, e))
            # In half precision the logits themselves have few digits.
            assert error <= size * torch.finfo(dtype).eps * (2 if dtype == BFLOAT else 32)


# -- around the kernels ----------------------------------------------------------------------


def test_second_derivatives_transforms_and_compile() -> None:
    x, p, w = (torch.rand(3, 3, dtype=DOUBLE, requires_grad=True) for _ in range(3))
    t, weight = torch.tensor([0, 2, -100]), torch.rand(3, dtype=DOUBLE)
    second = torch.randn(3, 3, dtype=DOUBLE)
    for function, leaves, rest in (
        (ours.cross_entropy, (x,), (t, weight)),
        (ours.cross_entropy, (x, p), ()),
        (lambda x, w, *r: ours.linear_cross_entropy(x, w, *r, **BOTH), (x, w), (t,)),
    ):
        found = []
        options = {} if len(leaves) == 2 and rest else BOTH
        linear = lambda x, w, *r: plain(x @ w.T, *r, **BOTH)  # noqa: E731
        for call in (function, linear if not options else plain):
            with fastopt.use_backend(BACKEND):
                loss = call(*leaves, *rest, **options)
            grads = torch.autograd.grad(loss, leaves, create_graph=True)
            found += torch.autograd.grad(sum((g * second).sum() for g in grads), leaves)
        half = len(found) // 2
        torch.testing.assert_close(found[:half], found[half:])
    one = lambda x, t: ours.cross_entropy(x, t, **BOTH)  # noqa: E731
    found = torch.func.vmap(torch.func.grad(one))(x.detach(), torch.tensor([0, 1, 2]))
    for k, label in enumerate((0, 1, 2)):
        row = x[k].detach().requires_grad_()
        (g,) = torch.autograd.grad(plain(row, torch.tensor(label), **BOTH), row)
        torch.testing.assert_close(found[k], g)
    compiled = torch.compile(one, backend="aot_eager", fullgraph=True)
    for backend in (BACKEND, "reference"):
        with fastopt.use_backend(backend):
            loss = compiled(x, t)
        exact = plain(x, t, **BOTH)
        torch.testing.assert_close(loss, exact)
        found, expected = (torch.autograd.grad(of, x) for of in (loss, exact))
        torch.testing.assert_close(found, expected)


def test_autocast() -> None:
    x, t = torch.randn(40, 200).bfloat16(), torch.randint(200, (40,))
    for backend in (BACKEND, "reference"):
        with torch.autocast(x.device.type, BFLOAT), fastopt.use_backend(backend):
            loss = ours.cross_entropy(x, t, **BOTH)
        assert loss.dtype == FLOAT
        torch.testing.assert_close(loss, plain(x.float(), t, **BOTH))


BAD = [
    *[{"z_loss": v} for v in (-1e-4, float("nan"), float("inf"), None, True, "1")],
    *[{"softcap": v} for v in (0, -30.0, float("nan"), float("inf"), False, "1")],
]


@pytest.mark.parametrize("options", BAD, ids=str)
def test_bad_values(options: dict[str, Any]) -> None:
    ((name, value),) = options.items()
    said = rf"{name}={value!r} \(allowed: a finite number >"
    x, w, t = torch.randn(3, 5), torch.randn(5, 5), torch.tensor([0, 1, 2])
    for backend in (None, BACKEND, "reference"):
        with nullcontext() if backend is None else fastopt.use_backend(backend):
            for call in (
                lambda: ours.cross_entropy(x, t, **options),
                lambda: ours.linear_cross_entropy(x, w, t, **options),
                lambda: fastopt.nn.CrossEntropyLoss(**options),
                lambda: fastopt.nn.LinearCrossEntropyLoss(5, 5, **options),
                lambda: fastopt.explain(ours.cross_entropy, x, t, **options),
            ):
                with pytest.raises(ValueError, match=said):
                    call()


def test_bad_input_gets_torchs_error() -> None:
    x = torch.randn(3, 5)
    for arguments in (
        (x, torch.zeros(4).long()), (x.long(), torch.zeros(3).long()), (x, [0, 1, 2]),
        (x, torch.zeros(3).long(), torch.ones(4)), (torch.tensor(1.0), torch.tensor(0)),
    ):  # fmt: skip
        with pytest.raises(Exception) as expected:  # noqa: PT011
            theirs.cross_entropy(*arguments)
        with pytest.raises(type(expected.value)) as raised:
            ours.cross_entropy(*arguments, **BOTH)
        assert str(raised.value) == str(expected.value)
    with pytest.raises(IndexError, match=r"Target 5 is out of bounds.*allowed are 0 to 4"):
        ours.cross_entropy(x, torch.tensor([0, 5, 1]), **BOTH)
    with pytest.raises(TypeError, match=r"options are .* without z_loss and softcap"):
        ours.linear_cross_entropy(x, torch.randn(5, 5), torch.zeros(3).long(), options=1, **BOTH)


def test_modules() -> None:
    """Who gives none has what torch's class has; who gives some has them in all places."""
    x, t = torch.randn(3, 5), torch.tensor([0, 1, 2])
    usual, torchs = fastopt.nn.CrossEntropyLoss(label_smoothing=0.1), torch.nn.CrossEntropyLoss
    assert vars(usual).keys() == vars(torchs()).keys()
    assert repr(usual) == repr(torchs())
    layer = fastopt.nn.LinearCrossEntropyLoss(5, 4)
    assert not {"z_loss", "softcap"} & vars(layer).keys()
    assert "softcap" not in repr(layer)
    made = fastopt.nn.CrossEntropyLoss(**BOTH)
    assert repr(made) == "CrossEntropyLoss(z_loss=0.03, softcap=4.0)"
    linear = fastopt.nn.LinearCrossEntropyLoss(5, 4, softcap=4.0)
    assert "options=None, softcap=4.0\n" in repr(linear)
    torch.testing.assert_close(linear(x, t), plain(x @ linear.linear.weight.T, t, softcap=4.0))
    for module in (made, copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
        torch.testing.assert_close(module(x, t), plain(x, t, **BOTH))
    with fastopt.use_backend("reference"):
        (decision,) = fastopt.explain(made, x, t)
    assert "reference: the definition in torch's operations" in str(decision)
    assert "torch's function has no z_loss, softcap" in str(decision)
    with pytest.warns(UserWarning, match=r"left alone: .* whose z_loss, softcap torch's has not"):
        assert type(fastopt.convert(made, to="torch")) is fastopt.nn.CrossEntropyLoss
    assert type(fastopt.convert(usual, to="torch")) is torchs
    assert type(fastopt.convert(usual)(x, t)) is Tensor
    with pytest.raises(TypeError, match="torch's own CrossEntropyLoss, which has no z_loss"):
        torch.jit.script(made)

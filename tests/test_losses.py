"""Every loss on every row of the table, against torch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as theirs
from cases import (
    BACKEND,
    DEVICE,
    FLOATS,
    INTERPRETED,
    LOSSES,
    REDUCTIONS,
    LossCase,
    assert_as_accurate,
    level,
)
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours

COMPILED = [case for case in LOSSES if case.compiled]
Tensors = tuple[Tensor, ...]


def differentiable(tensors: Tensors, operation: str) -> Tensors:
    """Fresh leaves in the same layout, with gradients where the loss has them."""
    count = 1 if operation == "cross_entropy" else 2
    return tuple(
        t.detach().requires_grad_(k < count and t.is_floating_point())
        for k, t in enumerate(tensors)
    )


#: Every dtype and every reduction, but not all with each other: one has nothing to do with the
#: other, and what is compiled for both takes its time.
HOW = [
    (reduction, dtype)
    for reduction in REDUCTIONS
    for dtype in FLOATS
    if reduction == "mean" or dtype in (torch.float32, torch.bfloat16)
]


def in_double(tensors: Tensors) -> Tensors:
    return tuple(t.double() if t.is_floating_point() else t for t in tensors)


def loss_and_grads(
    function: Callable[..., Tensor], tensors: Tensors, upstream: Tensor | None = None
) -> Tensors:
    loss = function(*tensors)
    wanted = [t for t in tensors if t.requires_grad]
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, wanted, upstream)


def call(module: object, case: LossCase, **more: object) -> Callable[..., Tensor]:
    function = getattr(module, case.operation)
    return lambda *tensors: function(*tensors, **case.options, **more)


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.filterwarnings("ignore:.*deterministic")
@pytest.mark.parametrize(("reduction", "dtype"), HOW, ids=str)
@pytest.mark.parametrize("case", COMPILED, ids=str)
def test_values_and_gradients(
    case: LossCase, reduction: str, dtype: torch.dtype, poison: None
) -> None:
    tensors = differentiable(case.make(dtype), case.operation)
    before = [(t.detach().clone(), t._version) for t in tensors]
    shape = call(theirs, case, reduction=reduction)(*tensors).shape
    upstream = torch.randn(shape, dtype=dtype) if reduction == "none" else torch.tensor(0.37)
    for given in (None, upstream):  # a plain loss.backward(), and any other grad_output
        with fastopt.use_backend(BACKEND):
            mine = loss_and_grads(call(ours, case, reduction=reduction), tensors, given)
        torchs = loss_and_grads(call(theirs, case, reduction=reduction), tensors, given)
        doubles = differentiable(in_double(tensors), case.operation)
        if given is not None:  # as rounded for the tensors' dtype
            given = given.to(dtype)
        exact, even = (
            loss_and_grads(call(theirs, case, reduction=reduction), of, given)
            for of in (doubles, level(case.operation, doubles))
        )
        for one in zip(mine, torchs, exact, even, strict=True):
            assert_as_accurate(*one)
    for t, (values, version) in zip(tensors, before, strict=True):
        assert torch.equal(t, values)
        assert t._version == version


@pytest.mark.parametrize("case", [c for c in LOSSES if not c.compiled], ids=str)
def test_what_is_not_compiled_is_torch(case: LossCase) -> None:
    tensors = differentiable(case.make(torch.float32), case.operation)
    mine = loss_and_grads(call(ours, case), tensors)
    for m, t in zip(mine, loss_and_grads(call(theirs, case), tensors), strict=True):
        assert torch.equal(m, t)
    with fastopt.use_backend(BACKEND), pytest.raises(fastopt.BackendUnavailable):
        call(ours, case)(*tensors)


@pytest.mark.parametrize("name", ["mse_loss-3x5x7", "l1_loss-17", "cross_entropy-65x10",
                                  "cross_entropy-NLC-long", "cross_entropy-weight"])  # fmt: skip
def test_backward_twice_and_into_leaves(name: str) -> None:
    case = next(c for c in LOSSES if str(c) == name)
    tensors = differentiable(case.make(torch.float32), case.operation)
    with fastopt.use_backend(BACKEND):
        loss = call(ours, case)(*tensors)
    loss.backward(retain_graph=True)
    first = tensors[0].grad.clone()
    loss.backward()  # accumulates into .grad in place: must not write into what is saved
    torch.testing.assert_close(tensors[0].grad, 2 * first, rtol=1e-6, atol=1e-7)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_expanded_grad_output() -> None:
    x = torch.randn(300, 50, requires_grad=True)
    t = torch.randint(0, 50, (300,))
    with fastopt.use_backend(BACKEND):
        (mine,) = torch.autograd.grad(ours.cross_entropy(x, t, reduction="none").sum(), x)
        (half,) = torch.autograd.grad(ours.cross_entropy(x, t) * 0.5, x)
    (torchs,) = torch.autograd.grad(theirs.cross_entropy(x, t, reduction="sum"), x)
    torch.testing.assert_close(mine, torchs)
    torch.testing.assert_close(half, torchs / 600)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_confident_rows(dtype: torch.dtype) -> None:
    """At p near 1, p - 1 in low precision would have no digit left."""
    for classes in (10, 3000):
        x = torch.randn(64, classes, dtype=torch.float64)
        t = torch.randint(0, classes, (64,))
        x[torch.arange(64), t] = torch.linspace(4, 40, 64).double()
        x = x.to(dtype)
        outcomes = []
        for function, data in (
            (ours.cross_entropy, x), (theirs.cross_entropy, x), (theirs.cross_entropy, x.double())
        ):  # fmt: skip
            leaf = data.clone().requires_grad_()
            with fastopt.use_backend(BACKEND):
                loss = function(leaf, t, reduction="none")
            outcomes.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]))
        for mine, torchs, oracle in zip(*outcomes, strict=True):
            if dtype == torch.float64:  # the oracle rounds as we do, at logits up to 40
                torch.testing.assert_close(mine, oracle, rtol=0, atol=1e-13)
            else:
                assert_as_accurate(mine, torchs, oracle)
        picked = torch.arange(64), t
        mine, oracle = outcomes[0][1][picked].double(), outcomes[2][1][picked]
        limit = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 5e-3)
        if INTERPRETED and dtype == torch.bfloat16:  # which the interpreter cuts, not rounds
            limit = 1e-2
        seen = oracle.abs() > 1e-6  # below, float16 itself has no digits
        # float32 sums of up to 3000 terms: some ulps of 1, against which 1 - p is compared
        torch.testing.assert_close(mine[seen], oracle[seen], rtol=limit, atol=1e-6)


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("classes", [5, 200, 5000])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_extreme_logits(dtype: torch.dtype, classes: int, smoothing: float) -> None:
    """The same infinities and NaN as torch, and else its values."""
    big = 0.4 * torch.finfo(dtype).max
    if dtype == torch.float64:
        big /= classes  # the oracle adds up the classes before it divides
    x = torch.randn(14, classes).to(dtype)
    t = torch.full((14,), classes - 1)
    x[0, : classes - 2] = -INF  # whole leading blocks
    x[1, :] = -INF
    x[2, :-1] = -INF  # one finite logit: the loss is 0
    x[3, 1] = INF
    x[4, 2] = NAN
    x[5, 2] = -torch.tensor(NAN)  # the NaN of 0/0 has its sign set
    x[6] -= 200.0  # far below a running maximum that begins at 0
    x[7] += 200.0
    x[8, 0], x[8, 1] = big, -big
    x[9, :] = big
    x[10, -1] = INF
    x[11, -1] = -INF
    x[12, :] = 0.0
    x[13, :-1] = INF
    leaf = x.clone().requires_grad_()
    double = x.double().requires_grad_()
    upstream = torch.randn(14)
    with fastopt.use_backend(BACKEND):
        mine = ours.cross_entropy(leaf, t, reduction="none", label_smoothing=smoothing)
    oracle = theirs.cross_entropy(double, t, reduction="none", label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(mine, leaf, upstream.to(dtype))
    (grad_oracle,) = torch.autograd.grad(oracle, double, upstream.to(dtype).double())
    # float64 is the oracle's own, which rounds as well
    rtol = (16 if dtype == torch.float64 else 8) * torch.finfo(dtype).eps
    torch.testing.assert_close(mine, oracle.to(dtype), rtol=rtol, atol=rtol, equal_nan=True)
    torch.testing.assert_close(grad, grad_oracle.to(dtype), rtol=rtol, atol=rtol, equal_nan=True)


@pytest.mark.parametrize("shape", [(6, 10), (6, 200), (2, 10, 9)])
def test_nothing_counts(shape: tuple[int, ...]) -> None:
    """All positions ignored: the mean is NaN, the gradient exactly 0; the sum is 0."""
    x = torch.randn(shape, requires_grad=True)
    t = torch.full(shape[:1] + shape[2:], -100)
    with fastopt.use_backend(BACKEND):
        mean, total = ours.cross_entropy(x, t), ours.cross_entropy(x, t, reduction="sum")
    assert mean.isnan()
    assert total == 0
    for loss in (mean, total):
        (grad,) = torch.autograd.grad(loss, x)
        assert torch.equal(grad, torch.zeros_like(x))


def test_class_weights_of_zero() -> None:
    x = torch.randn(5, 4, requires_grad=True)
    weight = torch.tensor([0.0, 1.0, 0.0, 2.0])
    for t in (torch.tensor([0, 1, 2, 3, 0]), torch.tensor([0, 2, 0, 2, 0])):
        for smoothing in (0.0, 0.2):
            outcomes = []
            for module in (ours, theirs):
                with fastopt.use_backend(BACKEND):
                    loss = module.cross_entropy(x, t, weight, label_smoothing=smoothing)
                outcomes.append((loss.detach(), torch.autograd.grad(loss, x)[0]))
            for mine, torchs in zip(*outcomes, strict=True):
                torch.testing.assert_close(mine, torchs, equal_nan=True)


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU it fails an assert: see test_gpu.py")
@pytest.mark.parametrize("bad", [-1, 10, 2**40, -(2**40)])
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_target_out_of_range(bad: int, backend: str) -> None:
    x = torch.randn(3, 10, 7)
    t = torch.randint(0, 10, (3, 7))
    t[1, 4] = bad
    said = rf"Target {bad} is out of bounds.*target\[1, 4\].*0 to 9 \(10 classes\)"
    with fastopt.use_backend(backend), pytest.raises(IndexError, match=said):
        ours.cross_entropy(x, t)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("operation", "arguments", "options"),
    [
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(4).long()), {}),
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(3)), {}),
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(3).int()), {}),
        ("cross_entropy", (torch.randn(3, 5).long(), torch.zeros(3).long()), {}),
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(3).long(), torch.ones(4)), {}),
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(3).long(), torch.ones(5).double()), {}),
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(3).long()), {"label_smoothing": 1.5}),
        ("cross_entropy", (torch.randn(3, 5), torch.zeros(3).long()), {"reduction": "median"}),
        ("cross_entropy", (torch.randn(3, 5), torch.rand(3, 5)), {"ignore_index": 2}),
        (
            "cross_entropy",
            (torch.randn(3, 5), torch.zeros(3).to(torch.uint8), torch.ones(5)),
            {"label_smoothing": 0.1},
        ),
        ("cross_entropy", (torch.tensor(1.0), torch.tensor(0)), {}),
        ("cross_entropy", (torch.randn(3, 0), torch.zeros(3).long()), {}),
        ("cross_entropy", (torch.randn(3, 5), [0, 1, 2]), {}),
        ("mse_loss", (torch.randn(3), torch.randn(4)), {}),
        ("mse_loss", (torch.ones(3).long(), torch.ones(3).long()), {}),
        ("mse_loss", (torch.randn(3), torch.randn(3)), {"reduction": "median"}),
        ("l1_loss", (torch.randn(3), 1.0), {}),
        ("l1_loss", (torch.randn(2, 3), torch.randn(3, 2)), {}),
    ],
)
@pytest.mark.parametrize("backend", ["auto", BACKEND])
def test_bad_input_gets_torchs_error(
    operation: str, arguments: tuple[object, ...], options: dict[str, object], backend: str
) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        getattr(theirs, operation)(*arguments, **options)
    context = nullcontext() if backend == "auto" else fastopt.use_backend(backend)
    with context, pytest.raises(type(expected.value)) as raised:
        getattr(ours, operation)(*arguments, **options)
    assert str(raised.value).startswith(str(expected.value))

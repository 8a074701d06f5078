"""What surrounds a loss in torch: derivatives of any order, transforms, autocast, modules."""

from __future__ import annotations

import copy
import itertools
import pickle
import re
from collections.abc import Callable
from contextlib import nullcontext
from types import ModuleType

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, FLOATS
from hypothesis import given
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.route import RouteCache

LABELS = torch.tensor([1, 0, -100, 3])


def cross_entropy_of(module: object, **options: object) -> Callable[[Tensor], Tensor]:
    return lambda x: module.cross_entropy(x, LABELS, **options)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.2}])
def test_cross_entropy_derivatives(reduction: str, options: dict[str, float]) -> None:
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    weight = torch.rand(5, dtype=torch.float64)
    function = cross_entropy_of(ours, reduction=reduction, weight=weight, **options)
    with fastopt.use_backend(BACKEND):
        assert torch.autograd.gradcheck(function, x, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("operation", ["mse_loss", "l1_loss"])
def test_pointwise_derivatives(operation: str, reduction: str) -> None:
    x, y = (torch.randn(3, 4, dtype=torch.float64, requires_grad=True) for _ in range(2))
    with fastopt.use_backend(BACKEND):
        for check in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
            assert check(lambda *a: getattr(ours, operation)(*a, reduction=reduction), (x, y))


def test_one_tensor_as_both_arguments() -> None:
    x = torch.randn(5, dtype=torch.float64, requires_grad=True)
    with fastopt.use_backend(BACKEND):
        loss = ours.mse_loss(x, x, reduction="sum")
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        (second,) = torch.autograd.grad(grad.sum(), x, allow_unused=True)
    assert torch.equal(grad, torch.zeros(5, dtype=torch.float64))
    assert second is None or torch.equal(second, torch.zeros(5, dtype=torch.float64))


def test_gradient_to_one_argument_only() -> None:
    x, y = torch.randn(9, requires_grad=True), torch.randn(9, requires_grad=True)
    with fastopt.use_backend(BACKEND):
        ours.mse_loss(x.detach(), y).backward()
        ours.l1_loss(x, y.detach()).backward()
    torch.testing.assert_close(y.grad, 2 * (y - x).detach() / 9)
    torch.testing.assert_close(x.grad, (x - y).detach().sign() / 9)


def test_transforms_follow_torch() -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    batch = torch.randn(3, 4, 5, dtype=torch.float64)
    tangent = torch.randn_like(x)
    mine, torchs = cross_entropy_of(ours), cross_entropy_of(theirs)
    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.hessian(f)(x),
        lambda f: torch.func.vmap(f)(batch),
        lambda f: torch.func.vmap(torch.func.grad(f))(batch),
        lambda f: torch.func.jvp(f, (x,), (tangent,))[1],
        lambda f: torch.func.jacrev(f)(x),
    ):
        assert torch.equal(transform(mine), transform(torchs))


def test_forward_mode() -> None:
    x = torch.randn(4, 5)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, torch.ones_like(x))
        tangents = [
            torch.autograd.forward_ad.unpack_dual(f(dual)).tangent
            for f in (cross_entropy_of(ours), cross_entropy_of(theirs))
        ]
    assert torch.equal(*tangents)


def test_compiled_with_the_rest() -> None:
    """Inside torch.compile a loss is a node of the graph, without a break."""
    x, t = torch.randn(64, 3000, requires_grad=True), torch.randint(0, 3000, (64,))
    criterion = fastopt.nn.CrossEntropyLoss(label_smoothing=0.1)
    compiled = torch.compile(lambda x: criterion(x * 2, t), fullgraph=True, backend="aot_eager")
    loss = compiled(x)
    torch.testing.assert_close(loss, theirs.cross_entropy(x * 2, t, label_smoothing=0.1))
    loss.backward()
    assert x.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    x = torch.randn(33, 50).to(dtype).requires_grad_()
    t, weight = torch.randint(0, 50, (33,)), torch.rand(50)
    y = torch.randn(33, 50)
    for name, arguments in (
        ("cross_entropy", (x, t)),
        ("cross_entropy", (x, t, weight)),
        ("mse_loss", (x, y)),
        ("l1_loss", (x, x.detach() + 1)),
    ):
        outcomes = []
        for module in (ours, theirs):
            with torch.autocast(x.device.type, dtype=torch.bfloat16), fastopt.use_backend(BACKEND):
                loss = getattr(module, name)(*arguments)
            outcomes.append((loss, *torch.autograd.grad(loss * 3, x)))
        (mine, grad), (torchs, torch_grad) = outcomes
        assert mine.dtype == torchs.dtype == torch.float32
        assert grad.dtype == dtype
        torch.testing.assert_close(mine, torchs)
        torch.testing.assert_close(grad, torch_grad)


@pytest.mark.parametrize("dtypes", list(itertools.permutations(FLOATS, 2)), ids=str)
@pytest.mark.parametrize("operation", ["mse_loss", "l1_loss"])
def test_mixed_dtypes_promote(operation: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """The result has the dtype that torch promotes to, and that dtype's precision."""
    wide = torch.promote_types(*dtypes)
    x, y = (torch.randn(50).to(dtype).requires_grad_() for dtype in dtypes)
    served = torch.float64 not in dtypes or torch.float32 in dtypes

    def outcome(module: ModuleType, reduction: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        loss = getattr(module, operation)(*tensors, reduction=reduction)
        grads = torch.autograd.grad(loss, (x, y), torch.full_like(loss, 0.5))
        return loss.detach(), *grads

    for reduction in ("mean", "none"):
        try:
            expected = outcome(theirs, reduction, x, y)
        except RuntimeError as error:  # until torch 2.11 it could not differentiate some pairs
            if not served:
                with pytest.raises(RuntimeError, match=re.escape(str(error))):
                    outcome(ours, reduction, x, y)
                continue
            expected = outcome(theirs, reduction, x.to(wide), y.to(wide))
        with fastopt.use_backend(BACKEND) if served else nullcontext():
            found = outcome(ours, reduction, x, y)
        for mine, torchs in zip(found, expected, strict=True):
            torch.testing.assert_close(mine, torchs)


def test_broadcasting_warns_like_torch() -> None:
    x, y = torch.randn(3, 1, requires_grad=True), torch.randn(4)
    with pytest.warns(UserWarning, match="target size"):
        loss = ours.mse_loss(x, y)
    with pytest.warns(UserWarning, match="target size"):
        assert torch.equal(loss, theirs.mse_loss(x, y))


def test_elementwise_weights() -> None:
    x, y, w = torch.randn(6), torch.randn(6), torch.rand(6)
    for name in ("mse_loss", "l1_loss"):
        mine = getattr(ours, name)(x, y, weight=w)
        assert torch.equal(mine, getattr(theirs, name)(x, y, weight=w))


def test_deprecated_arguments() -> None:
    x, y = torch.randn(6), torch.randn(6)
    with pytest.warns(UserWarning, match="deprecated"):
        assert torch.equal(ours.mse_loss(x, y, size_average=False), ((x - y) ** 2).sum())


def test_inference_mode_and_no_grad() -> None:
    x, t = torch.randn(64, 100), torch.randint(0, 100, (64,))
    expected = theirs.cross_entropy(x, t)
    with fastopt.use_backend(BACKEND):
        with torch.inference_mode():
            torch.testing.assert_close(ours.cross_entropy(x, t), expected)
        with torch.no_grad():
            loss = ours.cross_entropy(x.requires_grad_(), t)
    assert not loss.requires_grad


def test_logits_changed_after_a_plain_forward() -> None:
    """The usual backward doesn't need the logits; a scaled one says that they changed.

    A GPU can't be asked which of them it is without waiting, so there both say it.
    """
    RouteCache.forget()  # what other tests' backward passes have asked for
    x, t = torch.randn(6, 200, requires_grad=True), torch.randint(0, 200, (6,))
    (expected,) = torch.autograd.grad(theirs.cross_entropy(x, t), x)
    for factor in (1.0, 0.5):
        logits = x * 1.0
        with fastopt.use_backend(BACKEND):
            loss = ours.cross_entropy(logits, t) * factor
        logits.detach().zero_()
        if factor == 1.0 and BACKEND == "numba":
            torch.testing.assert_close(torch.autograd.grad(loss, x)[0], expected)
        else:
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                torch.autograd.grad(loss, x)


@pytest.mark.parametrize("name", ["MSELoss", "L1Loss", "CrossEntropyLoss"])
def test_modules_are_torchs(name: str) -> None:
    options = {"reduction": "sum"}
    if name == "CrossEntropyLoss":
        options |= {"weight": torch.rand(4), "label_smoothing": 0.1, "ignore_index": 2}
    mine = getattr(fastopt.nn, name)(**options)
    torchs = getattr(torch.nn, name)(**options)
    assert isinstance(mine, getattr(torch.nn, name))
    assert repr(mine) == repr(torchs)
    assert mine.state_dict().keys() == torchs.state_dict().keys()
    torchs.load_state_dict(mine.state_dict())
    x = torch.randn(3, 4)
    target = torch.tensor([0, 2, 3]) if name == "CrossEntropyLoss" else torch.randn(3, 4)
    for twin in (mine, copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        torch.testing.assert_close(twin(x, target), torchs(x, target))
        with fastopt.use_backend(BACKEND):
            torch.testing.assert_close(twin(x, target), torchs(x, target))


class _Wrapped(torch.Tensor):
    """A tensor subclass, whose overrides torch has to see."""


def test_tensor_subclasses_stay() -> None:
    x = torch.randn(3, 5).as_subclass(_Wrapped)
    assert type(ours.cross_entropy(x, torch.tensor([0, 1, 2]))) is _Wrapped


@pytest.mark.parametrize("default", ["cpu", "meta"])
def test_default_device(default: str) -> None:
    """torch.set_default_device is a mode that sees nothing, and concerns new tensors only."""
    x, y = torch.randn(2, 90, 4, requires_grad=True), torch.randn(2, 90, 4)
    t, weight = torch.randint(0, 90, (2, 4)), torch.rand(90)
    for name, arguments, options in (
        ("mse_loss", (x, y), {}),
        ("cross_entropy", (x, t, weight), {"label_smoothing": 0.1}),
        ("cross_entropy", (x.transpose(1, 2), y[:, :, 0].long() % 4), {"reduction": "none"}),
        ("cross_entropy", (x[:, :, 0], t[:, 0]), {"reduction": "sum"}),
    ):
        outcomes = []
        for module in (ours, theirs):
            with torch.device(default), fastopt.use_backend(BACKEND):
                loss = getattr(module, name)(*arguments, **options)
                grads = torch.autograd.grad(loss, x, torch.ones_like(loss) * 0.5)
            outcomes.append((loss.detach(), *grads))
        for mine, torchs in zip(*outcomes, strict=True):
            torch.testing.assert_close(mine, torchs)


def test_other_modes_see_the_call() -> None:
    class Mode(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(function)
            return function(*args, **(kwargs or {}))

    seen: list[object] = []
    x = torch.randn(400, 400)
    with Mode():
        ours.mse_loss(x, x)
    assert theirs.mse_loss in seen


shapes = st.lists(st.integers(0, 9), min_size=1, max_size=3).map(tuple)


@given(
    rows=st.integers(0, 70),
    classes=st.integers(1, 200),
    spatial=st.lists(st.integers(1, 5), max_size=2).map(tuple),
    reduction=st.sampled_from(["mean", "sum", "none"]),
    smoothing=st.sampled_from([0.0, 0.1, 1.0]),
    ignored=st.sampled_from([-100, 0, 3]),
    weighted=st.booleans(),
    last=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_cross_entropy(
    rows: int, classes: int, spatial: tuple[int, ...], reduction: str, smoothing: float,
    ignored: int, weighted: bool, last: bool, seed: int,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    x = torch.randn(rows, classes, *spatial) * 5
    if last:
        x = torch.randn(rows, *spatial, classes).movedim(-1, 1)
    t = torch.randint(0, classes, (rows, *spatial))
    weight = torch.rand(classes) if weighted else None
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": ignored}
    grads = []
    for module in (ours, theirs):
        leaf = x.clone().requires_grad_()
        with fastopt.use_backend(BACKEND):
            loss = module.cross_entropy(leaf, t, weight, **options)
        upstream = torch.linspace(-1, 1, loss.numel()).view(loss.shape)
        grads.append((loss.detach(), torch.autograd.grad(loss, leaf, upstream)[0]))
    for mine, torchs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=1e-5, equal_nan=True)


@given(shape=shapes, order=st.randoms(), operation=st.sampled_from(["mse_loss", "l1_loss"]))
def test_any_dense_layout(shape: tuple[int, ...], order: object, operation: str) -> None:
    axes = list(range(len(shape)))
    order.shuffle(axes)
    x, y = (torch.randn(shape).permute(axes) for _ in range(2))
    with fastopt.use_backend(BACKEND):
        mine = getattr(ours, operation)(x, y, reduction="none")
    torch.testing.assert_close(mine, getattr(theirs, operation)(x, y, reduction="none"))

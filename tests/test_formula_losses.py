"""Losses that users write: what the losses of `fastopt.nn` have, these have."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import pickle
import warnings
import weakref
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED
from torch import Tensor

import fastopt
from fastopt import FormulaError
from fastopt import formula as m
from fastopt.front.formula_loss import FormulaLoss
from fastopt.front.route import RouteCache

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@fastopt.loss
def log_cosh(input: Any, target: Any, *, scale: float = 1.0) -> Any:
    """log(cosh(scale * (input - target)))."""
    d = m.abs(input - target) * scale
    return d + m.softplus(-2 * d) - m.log(2.0)


@fastopt.loss
def focal(input: Any, target: Any, *, gamma: float = 2.0, alpha: float = 0.25) -> Any:
    """Binary focal loss of logits."""
    p = m.sigmoid(input)
    apart = p + target - 2.0 * p * target
    share = alpha * target + (1.0 - alpha) * (1.0 - target)
    return share * apart**gamma * (m.softplus(input) - target * input)


@fastopt.loss
def charbonnier(input: Any, target: Any, *, eps: float = 1e-3) -> Any:
    d = input - target
    return m.sqrt(d * d + eps * eps)


@fastopt.loss
def quantile(input: Any, target: Any, *, q: float = 0.5) -> Any:
    """Pinball loss."""
    d = target - input
    return m.maximum(q * d, (q - 1.0) * d)


@fastopt.loss(constant=("mask",))
def tversky(
    probability: Any, mask: Any, target: Any, *, alpha: float = 0.3, hard: bool = False
) -> Any:
    """The terms whose sums Tversky's index is made of, and one that a mask leaves out."""
    missed = target * (1.0 - probability)
    found = m.where(hard, m.where(probability > 0.5, 1.0, 0.0), probability)
    value = alpha * (1.0 - target) * found + (1.0 - alpha) * missed
    return m.where(mask > 0.0, value, 0.0)


@fastopt.loss
def norm_of_one(x: Any) -> Any:
    return m.tanh(x) * x


#: A loss, options, and whether there are shares between 0 and 1 among its tensors.
CALLS: list[tuple[FormulaLoss, dict[str, Any]]] = [
    (log_cosh, {"scale": 1.5}),
    (focal, {"gamma": 1.5}),
    (charbonnier, {"eps": 0.1}),
    (quantile, {"q": 0.8}),
    (tversky, {"alpha": 0.6}),
    (tversky, {"hard": True}),
    (norm_of_one, {}),
]
IDS = [f"{loss.__name__}-{options}" for loss, options in CALLS]


def tensors_of(loss: FormulaLoss, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    """Numbers of both signs for the first tensor, else of 0 to 1; zeros and ones for masks."""
    found = []
    for name in loss.tensors:
        of = torch.randn if name in ("input", "x") else torch.rand
        numbers = of(shape, dtype=torch.float64)
        numbers = (numbers > 0.3).double() if name == "mask" else numbers
        found.append(numbers.to(dtype).to(DEVICE))
    return found


def by_definition(
    loss: FormulaLoss, tensors: list[Tensor], reduction: str, options: dict[str, Any]
) -> list[Tensor]:
    """The user's own function in float64, and torch's gradients."""
    leaves = [t.detach().double().requires_grad_() for t in tensors]
    value = loss.__wrapped__(*leaves, **options)
    value = value if reduction == "none" else getattr(value, reduction)()
    value.backward(torch.ones_like(value) * 0.5)
    return [value.detach(), *[leaves[k].grad for k in loss.followed]]  # type: ignore[list-item]


def by_kernel(
    loss: FormulaLoss, tensors: list[Tensor], reduction: str, options: dict[str, Any]
) -> list[Tensor]:
    leaves = [t.detach() for t in tensors]
    for k in loss.followed:
        leaves[k].requires_grad_()
    with fastopt.use_backend(BACKEND):
        assert fastopt.explain(loss, *leaves, **options)[0].backend == BACKEND
        value = loss(*leaves, **options, reduction=reduction)
    assert value.dtype == torch.promote_types(tensors[0].dtype, tensors[-1].dtype)
    value.backward(torch.ones_like(value) * 0.5)
    return [value.detach(), *[leaves[k].grad for k in loss.followed]]  # type: ignore[list-item]


@pytest.mark.parametrize(
    ("call", "dtype", "reduction"),
    [  # every two of these in one of them
        (call, FLOATS[(i + j) % 4], reduction)
        for i, call in enumerate(CALLS)
        for j, reduction in enumerate(("none", "mean", "sum"))
    ],
    ids=lambda v: v[0].__name__ if isinstance(v, tuple) else str(v),
)
def test_values_and_gradients(
    call: tuple[FormulaLoss, dict[str, Any]], dtype: torch.dtype, reduction: str
) -> None:
    loss, options = call
    tensors = tensors_of(loss, (37, 61), dtype)
    found = by_kernel(loss, tensors, reduction, options)
    right = by_definition(loss, tensors, reduction, options)
    for mine, its in zip(found, right, strict=True):
        scale = its.abs().max().item() or 1.0
        tolerance = torch.finfo(dtype).eps * (1 if dtype.itemsize == 2 else 8)
        torch.testing.assert_close(mine.double() / scale, its / scale, rtol=0, atol=tolerance)


def test_layouts() -> None:
    """Turned, spaced, broadcast, one number, a number of another dtype, none at all."""
    whole = torch.randn(12, 30, device=DEVICE)
    for target in (
        torch.randn(30, 12, device=DEVICE).t(),
        torch.randn(24, 60, device=DEVICE)[::2, ::2],
        torch.randn(30, device=DEVICE),
        torch.randn(12, 1, device=DEVICE),
        torch.tensor(0.5, device=DEVICE, dtype=torch.float64),
    ):
        for input in (whole, whole[:, :30].flip(0)):
            found = by_kernel_of_any_dtype(input, target)
            right = by_definition(log_cosh, [input, target], "mean", {})
            for mine, its in zip(found, right, strict=True):
                assert mine.shape == its.shape
                torch.testing.assert_close(mine.double(), its, rtol=1e-5, atol=1e-7)
    empty = torch.empty(0, 3, device=DEVICE, requires_grad=True)
    with fastopt.use_backend(BACKEND):
        assert math.isnan(log_cosh(empty, empty).item())
        total = log_cosh(empty, empty, reduction="sum")
        total.backward()
    assert total.item() == 0
    assert empty.grad is not None
    assert empty.grad.shape == (0, 3)


def by_kernel_of_any_dtype(input: Tensor, target: Tensor) -> list[Tensor]:
    leaves = [input.detach().requires_grad_(), target.detach().requires_grad_()]
    with fastopt.use_backend(BACKEND):
        value = log_cosh(*leaves)
    value.backward(torch.tensor(0.5, device=DEVICE))
    return [value.detach(), *[t.grad for t in leaves if t.grad is not None]]


def test_integers_and_masks_are_numbers() -> None:
    x = torch.randn(50, device=DEVICE, requires_grad=True)
    for y in (torch.randint(2, (50,), device=DEVICE), torch.rand(50, device=DEVICE) > 0.5):
        backends = (BACKEND, "reference") if y.dtype == torch.int64 else ("reference",)
        for backend in backends:
            with fastopt.use_backend(backend):
                value = focal(x, y)
            (grad,) = torch.autograd.grad(value, x)
            right = by_definition(focal, [x.detach(), y.double()], "mean", {})
            torch.testing.assert_close(value.double(), right[0], rtol=1e-5, atol=0)
            torch.testing.assert_close(2 * right[1], grad.double(), rtol=1e-4, atol=1e-8)


def test_any_grad_output_twice() -> None:
    x, y = (torch.randn(3, 40, dtype=torch.float64, device=DEVICE) for _ in range(2))
    x.requires_grad_()
    with fastopt.use_backend(BACKEND):
        value = charbonnier(x, y, reduction="none")
    weights = torch.randn_like(value)
    d = x.detach() - y
    for _ in range(2):
        (grad,) = torch.autograd.grad(value, x, weights, retain_graph=True)
        torch.testing.assert_close(grad, weights * d / (d * d + 1e-6).sqrt())


@pytest.mark.parametrize("call", CALLS[:3], ids=IDS[:3])
def test_second_derivatives_and_transforms(call: tuple[FormulaLoss, dict[str, Any]]) -> None:
    loss, options = call
    tensors = [t.requires_grad_() for t in tensors_of(loss, (5,), torch.float64)]
    with fastopt.use_backend("reference"):
        assert torch.autograd.gradcheck(
            lambda *given: loss(*given, **options, reduction="none"), tensors, check_forward_ad=True
        )
    assert torch.autograd.gradgradcheck(
        lambda *given: loss(*given, **options, reduction="sum"), tensors
    )
    with fastopt.use_backend(BACKEND):
        value = loss(*tensors, **options)
    (grad,) = torch.autograd.grad(value, tensors[0], create_graph=True)
    (twice,) = torch.autograd.grad(grad.sum(), tensors[0])
    plain = [t.detach() for t in tensors]
    hessian = torch.func.hessian(lambda x: loss(x, *plain[1:], **options))(plain[0])
    torch.testing.assert_close(twice, hessian.sum(0))
    each = torch.func.vmap(lambda *given: loss(*given, **options))(*plain)
    torch.testing.assert_close(each, loss(*plain, **options, reduction="none"))


def test_autocast() -> None:
    x, y = (torch.randn(9, 9, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    for backend in (BACKEND, "reference"):
        with fastopt.use_backend(backend), torch.autocast(DEVICE, dtype=torch.bfloat16):
            value = log_cosh(x, y)
        assert value.dtype == torch.float32
        right = by_definition(log_cosh, [x, y], "mean", {})[0]
        torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=0)


def test_half_precision_is_rounded_once() -> None:
    """By torch's operations, too, which one by one would round each time."""
    x, y = (torch.randn(4000, device=DEVICE).half() for _ in range(2))
    with fastopt.use_backend("reference"):
        found = log_cosh(x, y, reduction="none")
    right = by_definition(log_cosh, [x, y], "none", {})[0]
    different = (found != right.half()).double().mean()  # where float32's error crosses a middle
    assert different < 0.01


@fastopt.loss(constant=("target",))
def to_a_power(input, target, *, gamma=2.0, other=1.5):  # type: ignore[no-untyped-def]
    return (input + target) ** gamma * input**other


@pytest.mark.parametrize("gamma", [0.0, 1.0, 2.0, 3.0, 4.0, 2.5, -1.0, 5.0])
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_powers_by_options(backend: str, gamma: float) -> None:
    """A small whole number is compiled in, and means what any other does."""
    x, y = torch.rand(2, 301).add(0.1).unbind()
    wide = x.double().requires_grad_()
    right = ((wide + y.double()) ** gamma * wide**1.5).mean()
    right.backward()
    x.requires_grad_()
    with fastopt.use_backend(backend):
        loss = to_a_power(x, y, gamma=gamma)
        loss.backward()
    torch.testing.assert_close(loss.double(), right, rtol=1e-6, atol=0)
    assert wide.grad is not None
    torch.testing.assert_close(x.grad, wide.grad.float(), rtol=1e-5, atol=1e-7)


def test_given_derivatives_of_powers() -> None:
    """They are taken where an option is compiled in, too."""

    @fastopt.loss
    def power(x, *, gamma=2.0):  # type: ignore[no-untyped-def]
        return x**gamma

    @power.gradient
    def _(x, *, gamma=2.0):  # type: ignore[no-untyped-def]
        return 10.0 * x**gamma

    for gamma in (3.0, 2.5):
        x = torch.tensor([2.0, 3.0], requires_grad=True)
        with fastopt.use_backend(BACKEND):
            power(x, gamma=gamma, reduction="sum").backward()
        torch.testing.assert_close(x.grad, 10 * x.detach() ** gamma)


# Dynamo makes an instance of torch.autograd.Function by itself.
@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")
def test_compiled_graphs() -> None:
    x, y = (torch.randn(6, 8, device=DEVICE) for _ in range(2))
    x.requires_grad_()
    criterion = focal.Module(gamma=1.0)
    for call in (lambda a, b: focal(a, b, gamma=1.0), criterion):
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        value = compiled(x, y)
        (grad,) = torch.autograd.grad(value, x)
        right = by_definition(focal, [x, y], "mean", {"gamma": 1.0})
        torch.testing.assert_close(value.double(), right[0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(grad.double(), 2 * right[1], rtol=1e-4, atol=1e-6)
    told = str(fastopt.explain(focal, x, y, compiled=True))
    assert "torch.compile, where what torch has not is torch's operations" in told


def test_kernels_insisted_on_in_a_graph_are_refused() -> None:
    """Not ignored: there is no operator that would run them."""
    torch._dynamo.reset()
    compiled = torch.compile(lambda a: log_cosh(a, a), fullgraph=True, backend="eager")
    with (
        fastopt.use_backend(BACKEND),
        pytest.raises(Exception, match="a loss of your own is torch's operations"),
    ):
        compiled(torch.randn(3, device=DEVICE))


def test_traced_by_fx_as_one_node() -> None:
    class Model(torch.nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return log_cosh(a, b, scale=2.0) + 1.0

    traced = torch.fx.symbolic_trace(Model())
    a, b = torch.randn(4), torch.randn(4)
    torch.testing.assert_close(traced(a, b), log_cosh(a, b, scale=2.0) + 1.0)


# -- its gradient by hand --------------------------------------------------------------------


@fastopt.loss
def stepped(x: Any, y: Any, *, width: float = 1.0) -> Any:
    """A step, of which the gradient is that of a slope."""
    return m.where(x > y, width, 0.0) + 0.0 * x


@stepped.gradient
def stepped_slopes(x: Any, y: Any, *, width: float = 1.0) -> Any:
    near = m.where(m.abs(x - y) < width, 0.5, 0.0)
    return near, -near


def test_gradient_by_hand() -> None:
    """On all backends, and where torch differentiates, too."""
    x, y = torch.randn(2, 500, device=DEVICE).unbind(0)
    right = torch.where((x - y).abs() < 2.0, 0.5, 0.0)
    for backend in (BACKEND, "reference"):
        leaves = [x.clone().requires_grad_(), y.clone().requires_grad_()]
        with fastopt.use_backend(backend):
            value = stepped(*leaves, width=2.0, reduction="sum")
        by_x, by_y = torch.autograd.grad(value, leaves)
        assert torch.equal(by_x, right)
        assert torch.equal(by_y, -right)
    by_x = torch.func.grad(lambda a: stepped(a, y, width=2.0, reduction="sum"))(x)
    assert torch.equal(by_x, right)


def test_gradient_by_hand_has_to_fit() -> None:
    @fastopt.loss
    def square(x: Any, y: Any) -> Any:
        return (x - y) ** 2

    with pytest.raises(FormulaError, match=r"test_formula_losses.py:\d+: in g: .*return 2 values"):

        @square.gradient
        def g(x: Any, y: Any) -> Any:
            return 2.0 * (x - y)

    with pytest.raises(FormulaError, match="parameters x, z; those of square are x, y"):

        @square.gradient
        def g2(x: Any, z: Any) -> Any:
            return x, z


# -- the module ------------------------------------------------------------------------------


def test_module() -> None:
    x, y = torch.randn(7), torch.randn(7)
    criterion = log_cosh.Module(scale=3.0, reduction="sum")
    assert isinstance(criterion, torch.nn.Module)
    assert repr(criterion) == "log_cosh(scale=3.0, reduction='sum')"
    assert criterion.scale == 3.0
    assert criterion.state_dict() == {}
    right = log_cosh(x, y, scale=3.0, reduction="sum")
    for module in (criterion, pickle.loads(pickle.dumps(criterion)), copy.deepcopy(criterion)):
        assert type(module) is log_cosh.Module
        assert torch.equal(module(x, target=y), right)
    assert list(inspect.signature(log_cosh.Module).parameters) == ["scale", "reduction"]
    assert pickle.loads(pickle.dumps(log_cosh)) is log_cosh
    assert copy.deepcopy(log_cosh) is log_cosh
    decision = fastopt.explain(criterion, x, y)[0]
    assert decision.request.operation == "log_cosh"
    criterion.reduction = "mean"
    assert torch.equal(criterion(x, y), log_cosh(x, y, scale=3.0))


def test_it_looks_like_a_function() -> None:
    assert log_cosh.__name__ == "log_cosh"
    assert log_cosh.__doc__ == "log(cosh(scale * (input - target)))."
    assert list(inspect.signature(log_cosh).parameters) == [
        "input", "target", "scale", "reduction"
    ]  # fmt: skip
    assert "log_cosh(input" in repr(log_cosh)


# -- what serves it --------------------------------------------------------------------------


@pytest.mark.skipif(INTERPRETED or DEVICE != "cpu", reason="about the CPU's crossover")
def test_small_ones_are_torchs() -> None:
    small, large = torch.randn(100), torch.randn(40_000)
    assert fastopt.explain(log_cosh, small, small)[0].backend == "reference"
    assert "the formula in torch's operations" in str(fastopt.explain(log_cosh, small, small))
    assert fastopt.explain(log_cosh, large, large)[0].backend == "numba"
    right = by_definition(log_cosh, [large, large.flip(0)], "mean", {})[0]
    torch.testing.assert_close(log_cosh(large, large.flip(0)).double(), right, rtol=1e-6, atol=0)


# -- what can't be a loss --------------------------------------------------------------------


def refusal(function: Any, **options: Any) -> str:
    with pytest.raises(FormulaError) as caught:
        fastopt.loss(**options)(function)
    message = str(caught.value)
    assert f"test_formula_losses.py:{caught.value.line}: in {function.__name__}" in message
    return message


def test_refused_when_it_is_decorated() -> None:
    def branch(x: Any) -> Any:
        if x > 0:
            x = -x
        return x

    def two(x: Any, y: Any) -> Any:
        return x, y

    def flat(x: Any, y: Any, *, a: float = 1.0) -> Any:
        return a + 0.0 * y

    def many(x: Any, *, a: bool = 1 > 2, b: bool = False, c: bool = True, d: bool = True) -> Any:
        return m.where(a, m.where(b, m.where(c, m.where(d, x, 0.0), 1.0), 2.0), 3.0)

    def of_module(x: Any, *, training: float = 1.0) -> Any:
        return x * training

    def reduced(x: Any, *, reduction: float = 1.0) -> Any:
        return x * reduction

    def plain(x: Any, y: Any) -> Any:
        return x - y

    assert "a branch" in refusal(branch)
    assert "2 returned; return one value: the loss of one element" in refusal(two)
    assert "no derivative" in refusal(flat, constant=("y",))
    assert "at most 3" in refusal(many)
    assert "torch.nn.Module has this name" in refusal(of_module)
    assert "has a reduction of its own" in refusal(reduced)
    assert "none of its tensors (x, y)" in refusal(plain, constant=("z",))
    assert "all tensors are constant" in refusal(plain, constant=("x", "y"))
    with pytest.raises(TypeError, match="sequence of names"):
        fastopt.loss(constant="x")
    with pytest.raises(TypeError, match="defined by def"):
        fastopt.loss(3)  # type: ignore[call-overload]


def test_warns_of_infinite_derivatives() -> None:
    def root(x: Any, y: Any) -> Any:
        return m.sqrt(m.abs(x - y))

    with pytest.warns(RuntimeWarning, match=r"in root: the derivative by x is .* at x=-2, y=-2"):
        fastopt.loss(root)

    def smooth(x: Any, y: Any) -> Any:
        return m.sqrt((x - y) ** 2 + 1e-6) + m.where(x > 0.0, m.sqrt(x), 0.0) - m.log(y)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastopt.loss(smooth)


# -- calls that don't go together ------------------------------------------------------------

X, Y = torch.randn(3, 4), torch.randn(3, 4)


@pytest.mark.parametrize(
    ("error", "words", "call"),
    [
        (TypeError, r"lacks target \(input, target\)", lambda: log_cosh(X)),
        (TypeError, "takes 2 tensors", lambda: log_cosh(X, Y, 2.0)),
        (TypeError, "got input twice", lambda: log_cosh(X, Y, input=X)),
        (TypeError, r"no option 'sale' \(allowed: scale, red", lambda: log_cosh(X, Y, sale=1.0)),
        (TypeError, "target must be a tensor, not list", lambda: log_cosh(X, [1.0])),
        (TypeError, "scale must be a number, not str", lambda: log_cosh(X, Y, scale="2")),
        (TypeError, "scale must be a number, not Tensor", lambda: log_cosh(X, Y, scale=X[0, 0])),
        (TypeError, "hard must be True or False, not 1", lambda: tversky(X, Y, X, hard=1)),
        (TypeError, "input must be real", lambda: log_cosh(X + 0j, Y)),
        (TypeError, "at least one tensor must be floating", lambda: log_cosh(X.long(), Y.long())),
        (ValueError, "'max' is not a valid value", lambda: log_cosh(X, Y, reduction="max")),
        (ValueError, "None is not a valid value", lambda: log_cosh(X, Y, reduction=None)),
        (RuntimeError, r"input of \(3, 4\), target of \(3,\)", lambda: log_cosh(X, Y[:, 0])),
        (RuntimeError, "input on cpu, target on meta", lambda: log_cosh(X, Y.to("meta"))),
        (TypeError, "no option 'sale'", lambda: log_cosh.Module(sale=1.0)),
        (ValueError, "not a valid value", lambda: log_cosh.Module(reduction="max")),
    ],
)  # fmt: skip
def test_bad_input(error: type[Exception], words: str, call: Any) -> None:
    with pytest.raises(error, match=words):
        call()


# -- no stale code, nothing kept --------------------------------------------------------------


def made(factor: float) -> FormulaLoss:
    """A loss of one name, whatever the number."""

    @fastopt.loss
    def one(x: Any, y: Any) -> Any:
        return factor * (x - y)

    return one


def test_two_of_one_name_do_not_mix() -> None:
    x, y = torch.ones(9, device=DEVICE), torch.zeros(9, device=DEVICE)
    two, five = made(2.0), made(5.0)
    with fastopt.use_backend(BACKEND):
        assert [loss(x, y).item() for loss in (two, five, two)] == [2.0, 5.0, 2.0]
        assert made(7.0)(x, y).item() == 7.0


def test_numbers_of_outside_are_those_of_when_it_was_decorated() -> None:
    """On every backend, so that none of them has another one."""
    factor = 2.0

    @fastopt.loss
    def scaled(x: Any) -> Any:
        return factor * x

    factor = 3.0
    x = torch.ones(5, device=DEVICE)
    for backend in (BACKEND, "reference"):
        with fastopt.use_backend(backend):
            assert scaled(x).item() == 2.0


@pytest.mark.skipif(
    INTERPRETED or DEVICE != "cpu", reason="kernels serve all sizes there, and some are kept"
)
def test_redefined_ones_are_not_kept() -> None:
    x = torch.ones(9)
    records = []
    routes = len(RouteCache._all)
    for k in range(50):
        loss = made(float(k))
        assert loss(x, x).item() == 0.0
        records.append(weakref.ref(loss._record))
    del loss
    gc.collect()
    assert sum(record() is not None for record in records) <= 1
    assert len(RouteCache._all) <= routes + 1

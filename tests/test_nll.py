"""NLL: torch's own samples and errors, every layout, and what labels and weights may hold.

The compiled kernels are insisted on. Float32 and float64 agree with torch; half precision is
measured against float64, where its error is no larger than torch's.
"""

from __future__ import annotations

import functools
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import (
    BACKEND,
    DEVICE,
    FLOATS,
    INTERPRETED,
    REDUCTIONS,
    assert_as_accurate,
    channels_last,
    labelled,
    transpose,
)
from torch import Tensor
from torch.nn import functional as theirs
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastopt
import fastopt.nn.functional as ours

insisted = functools.partial(fastopt.use_backend, BACKEND)
NAN, INF = float("nan"), float("inf")
#: More than a chunk of positions, whose sums are taken apart.
MANY = 1200 if INTERPRETED else 5000


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    torch.manual_seed(13)


def outcome(
    function: Callable[..., Tensor], input: Tensor, *args: Any, upstream: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """The loss and the input's gradient."""
    leaf = input.detach().requires_grad_()
    loss = function(leaf, *args, **kwargs)
    upstream = torch.ones_like(loss) if upstream is None else upstream
    return loss.detach(), *torch.autograd.grad(loss, leaf, upstream)


def check(input: Tensor, target: Tensor, **kwargs: Any) -> None:
    """Compiled, and as torch: for any grad_output, for one of 1, and without a gradient."""
    loss = theirs.nll_loss(input, target, **kwargs)
    for upstream in (torch.randn_like(loss), torch.ones((), dtype=loss.dtype).expand(loss.shape)):
        # torch's own backward pass wants images to be contiguous, and then raises about itself
        plain = input.contiguous()
        expected = outcome(theirs.nll_loss, plain, target, upstream=upstream, **kwargs)
        with insisted():
            found = outcome(ours.nll_loss, input, target, upstream=upstream, **kwargs)
        if input.dtype in (torch.float32, torch.float64):
            # of a sum of many numbers each rounding differs
            terms = max(1.0, input.numel() ** 0.5 if loss.dim() == 0 else 1.0)
            tolerances = {"rtol": 2e-6, "atol": torch.finfo(input.dtype).eps * 8 * terms}
            assert_close(found, expected, **tolerances, equal_nan=True)
            continue
        double = {k: v.double() if isinstance(v, Tensor) else v for k, v in kwargs.items()}
        oracle = outcome(
            theirs.nll_loss, input.double(), target, upstream=upstream.double(), **double
        )
        for mine, torchs, exact in zip(found, expected, oracle, strict=True):
            assert_as_accurate(mine, torchs, exact)
    with insisted(), torch.no_grad():
        alone = ours.nll_loss(input, target, **kwargs)
    assert_close(alone, found[0], rtol=0, atol=0, equal_nan=True)


# -- torch's own samples ---------------------------------------------------------------------

(OPERATOR,) = (op for op in op_db if op.name == "nn.functional.nll_loss")
(MODULE,) = (info for info in module_db if info.module_cls is torch.nn.NLLLoss)


def thinned(samples: Any) -> Iterator[Any]:
    return itertools.islice(samples, 0, None, 7 if INTERPRETED else 1)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_samples_of_the_function(dtype: torch.dtype) -> None:
    for sample in thinned(OPERATOR.reference_inputs(DEVICE, dtype, requires_grad=False)):
        weight, target = sample.kwargs.get("weight"), sample.args[0]
        counts = target != sample.kwargs.get("ignore_index", -100)
        if weight is not None and abs(weight.double()[target[counts]].sum()) < 0.5:
            continue  # of weights that cancel each rounding differs
        check(sample.input, target, **sample.kwargs)


@pytest.mark.parametrize("kind", ["NLLLoss", "NLLLoss2d"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_samples_of_the_module(kind: str, dtype: torch.dtype) -> None:
    inputs = MODULE.module_inputs_func(MODULE, DEVICE, dtype, requires_grad=False, training=True)
    for sample in thinned(inputs):
        made, called = sample.constructor_input, sample.forward_input
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            torchs, mine = (
                getattr(nn, kind)(*made.args, **made.kwargs).to(DEVICE, dtype)
                for nn in (torch.nn, fastopt.nn)
            )
        expected = outcome(torchs, *called.args)
        with insisted():
            found = outcome(mine, *called.args)
        assert_close(found, expected, equal_nan=True)


def errors() -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """Calls that raise; torch's table of operators has none."""
    x, y = torch.randn(3, 4, device=DEVICE), torch.tensor([0, 1, 3], device=DEVICE)
    planes = torch.randn(2, 3, 4, device=DEVICE)
    yield from {
        "target-0-d": lambda f: f(x, y[0]),
        "target-too-long": lambda f: f(x[:2], y),
        "target-2-d": lambda f: f(x, x.long()),
        "target-probabilities": lambda f: f(x, x.softmax(1)),
        "target-int32": lambda f: f(x, y.int()),
        "uint8-planes": lambda f: f(planes, y.new_zeros(2, 4, dtype=torch.uint8)),
        "weight-of-another-dtype": lambda f: f(x, y, x[0].double()),
        "weight-too-long": lambda f: f(x, y, x.new_ones(5)),
        "weight-2-d": lambda f: f(x, y, x[:1]),
        "weight-with-gradient": lambda f: f(x, y, x.new_ones(4, requires_grad=True)),
        "integers": lambda f: f(x.long(), y),
        "integers-weight": lambda f: f(x.long(), y, x[0]),
        "reduction": lambda f: f(x, y, reduction="avg"),
        "ignore-index": lambda f: f(x, y, ignore_index=0.5),
        "no-dimension": lambda f: f(x[0, 0], y[0]),
    }.items()
    if DEVICE == "cpu":  # elsewhere a device-side assert ends all work
        yield from {
            "out-of-range": lambda f: f(x, y + 1),
            "negative": lambda f: f(x, y - 1, reduction="none"),
            "out-of-range-planes": lambda f: f(planes, y.new_full((2, 4), 3)),
            "no-classes": lambda f: f(x[:, :0], y),
        }.items()


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("call", [pytest.param(call, id=name) for name, call in errors()])
def test_errors_are_torchs(call: Callable[[Any], Any], backend: str) -> None:
    with pytest.raises(Exception) as expected:  # noqa: PT011
        call(theirs.nll_loss)
    with pytest.raises(type(expected.value)) as found, fastopt.use_backend(backend):
        call(ours.nll_loss)
    assert str(expected.value) in str(found.value)


@pytest.mark.parametrize("count", [3, 200_000])
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "smooth_l1_loss", "huber_loss", "kl_div"])
def test_a_loss_of_integers_alone_raises_as_torchs(name: str, backend: str, count: int) -> None:
    """Whoever chooses a backend finds no number's dtype among the tensors."""
    x = torch.ones(count, dtype=torch.int64, device=DEVICE)
    with pytest.raises(Exception) as expected:  # noqa: PT011
        getattr(theirs, name)(x, x)
    with pytest.raises(type(expected.value)) as found:
        getattr(ours, name)(x, x)
    assert str(found.value) == str(expected.value)
    with pytest.raises(type(expected.value)), fastopt.use_backend(backend):
        getattr(ours, name)(x, x)


def test_errors_of_the_module_are_torchs() -> None:
    if MODULE.module_error_inputs_func is None:
        pytest.skip("torch's table has none")
    for one in MODULE.module_error_inputs_func(MODULE, DEVICE, torch.float32, False, True):
        if one.error_on is ModuleErrorEnum.FORWARD_ERROR:
            made, called = (
                getattr(one.module_error_input, f"{n}_input") for n in ("constructor", "forward")
            )
            module = fastopt.nn.NLLLoss(*made.args, **made.kwargs)
            with pytest.raises(one.error_type, match=one.error_regex), insisted():
                module(*called.args)


# -- layouts ---------------------------------------------------------------------------------

LAYOUTS = {
    "C": labelled((5,)),
    "C-strided": labelled((10,), lambda x: x[::2]),
    "C-long": labelled((4099,)),
    "1x1": labelled((1, 1), ignored=None),
    "N1": labelled((65, 1), ignored=None),
    "65x10": labelled((65, 10)),
    "many-rows": labelled((MANY, 10)),
    "long-rows": labelled((3, 40_000)),
    "class-first": labelled((10, MANY), lambda x: x.t()),
    "classes-sliced": labelled((70, 20), lambda x: x[:, ::2]),
    "rows-sliced": labelled((140, 20), lambda x: x[::2, 5:15]),
    "rows-expanded": labelled((1, 20), lambda x: x.expand(60, 20)),
    "classes-expanded": labelled((60, 1), lambda x: x.expand(60, 20)),
    "NC1": labelled((70, 6, 1)),
    "NCL": labelled((3, 6, 70)),
    "1CL": labelled((1, 6, MANY)),
    "NC-many-L": labelled((2, 3000, 19)),
    "NCHW": labelled((2, 21, 5, 33)),
    "NCDHW": labelled((2, 3, 4, 5, 6)),
    "NLC": labelled((3, 17, 10), transpose),
    "NCHW-sliced": labelled((2, 21, 5, 66), lambda x: x[..., ::2]),
    "channels-last": labelled((2, 21, 5, 7), channels_last),
    "permuted": labelled((2, 5, 6, 7), lambda x: x.permute(0, 1, 3, 2)),
    "permuted-batch": labelled((6, 5, 2, 7), lambda x: x.permute(2, 1, 0, 3)),
    "no-rows": labelled((0, 5)),
    "no-positions": labelled((3, 5, 0)),
}


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, reduction: str, poison: None) -> None:
    for dtype in FLOATS if name in ("65x10", "NCHW") else (torch.float32,):
        for weighted in (False, True):
            input, target, *weight = labelled_of(name, dtype, weighted)
            before = input.clone(), target.clone()
            check(input, target, weight=weight[0] if weight else None, reduction=reduction)
            assert_close((input, target), before, rtol=0, atol=0)


def labelled_of(name: str, dtype: torch.dtype, weighted: bool) -> tuple[Tensor, ...]:
    input, target = LAYOUTS[name](dtype)
    classes = input.shape[min(1, input.dim() - 1)]
    return (input, target, (torch.rand(classes) + 0.1).to(dtype))[: 3 if weighted else 2]


def test_targets_and_weights_may_have_strides() -> None:
    input, target = torch.randn(40, 7), torch.randint(7, (40, 2))[:, 0]
    check(input, target, weight=torch.rand(14)[::2])
    check(input, target[:1].expand(40), weight=torch.rand(1).expand(7))
    planes, labels = torch.randn(3, 7, 4, 5), torch.randint(7, (3, 5, 4)).transpose(1, 2)
    check(planes, labels, reduction="none")


@pytest.mark.parametrize("ignore_index", [-100, 0, 7, 200, 255])
def test_uint8_labels(ignore_index: int) -> None:
    input, target = torch.randn(300, 201), torch.randint(201, (300,), dtype=torch.uint8)
    if ignore_index == 255:
        target[::3] = 255
    check(input, target, ignore_index=ignore_index)
    check(input[0], target[1], ignore_index=ignore_index)


@pytest.mark.parametrize("threads", [2, 3])
def test_any_number_of_threads_gives_the_same_bits(threads: int) -> None:
    input, target, weight = torch.randn(20_001, 12), torch.randint(12, (20_001,)), torch.rand(12)
    found, before = [], torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        with insisted():
            found.append(outcome(ours.nll_loss, input, target, weight))
    torch.set_num_threads(before)
    assert_close(found[0], found[1], rtol=0, atol=0)
    assert_close(found[0], outcome(theirs.nll_loss, input, target, weight))


# -- what labels, weights and inputs hold -----------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 4), (2, 4, 3)], ids=str)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_position_ignored(shape: tuple[int, ...], reduction: str) -> None:
    target = torch.full(shape[:1] + shape[2:], -100)
    loss, _ = outcome(theirs.nll_loss, torch.randn(shape), target, reduction=reduction)
    with insisted():
        mine = outcome(ours.nll_loss, torch.full(shape, NAN), target, reduction=reduction)
    assert_close(mine, (loss, torch.zeros(shape)), rtol=0, atol=0, equal_nan=True)
    assert loss.isnan().all() == (reduction == "mean")


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_the_weight_of_an_ignored_class_is_never_used(reduction: str) -> None:
    input, target = torch.randn(70, 5), torch.randint(5, (70,))
    weight = torch.tensor([0.5, 1.0, NAN, 2.0, 0.25])
    check(input, target, weight=weight, ignore_index=2, reduction=reduction)
    with insisted():
        found = outcome(ours.nll_loss, input, target, weight, ignore_index=2, reduction=reduction)
    assert not any(t.isnan().any() for t in found)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_extreme_numbers(reduction: str, planes: bool) -> None:
    weights = torch.tensor([1.0, 0.5, 2.0, 0.0])
    for one in (0.0, -0.0, 1e-45, -1e30, 3e38, -INF, INF, NAN):
        input, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 3, 0, -100])
        input[1, 1], input[5] = one, NAN
        if planes:
            input, target = input.t()[None].contiguous(), target[None]
        for weight in (None, weights, -weights):
            check(input, target, weight=weight, reduction=reduction)


@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_weights_that_add_up_to_nothing(planes: bool) -> None:
    """The sum is divided by 0 all the same, and so are the gradients."""
    input, target = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([0, 1])
    if planes:
        input, target = input.t()[None].contiguous(), target[None]
    for weight in ([1.0, -1.0], [-1.0, 1.0], [0.0, 0.0]):
        check(input, target, weight=torch.tensor(weight))


def test_confident_rows() -> None:
    input = (torch.eye(8).repeat(9, 1) * 60).log_softmax(1)
    for dtype in FLOATS:
        check(input.to(dtype), torch.arange(72) % 8)
        check(input.to(dtype), (torch.arange(72) + 1) % 8, reduction="none")


@pytest.mark.skipif(DEVICE != "cpu", reason="there a device-side assert ends all work")
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_a_label_out_of_range_is_seen_before_anything(reduction: str, planes: bool) -> None:
    """Wherever it stands, and also by the backward pass, whose labels others may have changed."""
    for count, place, bad in itertools.product((3, MANY), (0, -1), (4, -1, 2**40, -(2**63))):
        shape = (1, 4, count) if planes else (count, 4)
        input, target = torch.randn(shape, requires_grad=True), torch.zeros(count).long()
        labels = target.view(1, count) if planes else target
        message = f"Target {bad} is out of bounds"
        target[place] = bad
        with insisted(), pytest.raises(IndexError, match=message):
            ours.nll_loss(input, labels, reduction=reduction)
        target[place] = 0
        with insisted():
            loss = ours.nll_loss(input, labels, reduction=reduction).sum()
        target.data[place] = bad  # unnoticed by autograd
        with pytest.raises(IndexError, match=message):
            loss.backward()
        assert input.grad is None


@pytest.mark.parametrize("function", [theirs.nll_loss, ours.nll_loss])
def test_labels_overwritten_in_place_raise_as_in_torch(function: Callable[..., Tensor]) -> None:
    input, target = torch.randn(9, 4, requires_grad=True), torch.zeros(9).long()
    with insisted():
        loss = function(input, target)
    target += 1
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# -- autograd and surroundings ----------------------------------------------------------------


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(5, 4), (2, 3, 4)], ids=str)
def test_second_derivatives(shape: tuple[int, ...], reduction: str) -> None:
    """NLL is linear: what has a second derivative is something before it."""
    input, weight = torch.randn(shape).double(), torch.rand(shape[1]).double()
    target = torch.randint(shape[1], shape[:1] + shape[2:])

    def second(function: Callable[..., Tensor]) -> tuple[Tensor, ...]:
        leaf = input.clone().requires_grad_()
        loss = function(leaf.exp(), target, weight, reduction=reduction)
        upstream = torch.linspace(1, 2, loss.numel()).double().view(loss.shape).requires_grad_()
        (grad,) = torch.autograd.grad(loss, leaf, upstream, create_graph=True)
        return grad, *torch.autograd.grad(grad.square().sum(), (leaf, upstream))

    with insisted():
        found = second(ours.nll_loss)
    assert_close(found, second(theirs.nll_loss))


def test_a_second_backward_and_changing_scales() -> None:
    input, target = torch.randn(90, 7, requires_grad=True), torch.randint(7, (90,))
    losses = [theirs.nll_loss(input, target)]
    with insisted():
        losses.append(ours.nll_loss(input, target))
    for scale in (1.0, 0.25, 0.25, 65536.0, 0.0, -1.0, INF, NAN):
        expected, found = (
            torch.autograd.grad(loss, input, torch.tensor(scale), retain_graph=True)
            for loss in losses
        )
        assert_close(found, expected, equal_nan=True)


def test_autocast_computes_in_float32() -> None:
    target, weight = torch.randint(7, (90,)), torch.rand(7)
    for dtype, reduction in itertools.product(FLOATS[:1] + FLOATS[2:], REDUCTIONS):
        input = torch.randn(90, 7).to(dtype)
        with torch.autocast(DEVICE, torch.bfloat16):
            expected = outcome(theirs.nll_loss, input, target, weight, reduction=reduction)
            with insisted():
                found = outcome(ours.nll_loss, input, target, weight, reduction=reduction)
        assert_close(found, expected)


def test_the_deprecated_class_warns_when_it_is_used() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastopt.nn.NLLLoss()
    with pytest.warns(FutureWarning, match="`NLLLoss2d` has been deprecated") as expected:
        torch.nn.NLLLoss2d(ignore_index=1)
    with pytest.warns(FutureWarning, match="`NLLLoss2d` has been deprecated") as found:
        module = fastopt.nn.NLLLoss2d(ignore_index=1)
    assert [str(w.message) for w in found] == [str(w.message) for w in expected]
    assert found[0].filename == __file__
    assert isinstance(module, torch.nn.NLLLoss2d)
    with insisted():
        loss = module(torch.tensor([[[-1.0], [-2.0]]]), torch.tensor([[0]]))
    assert loss == 1

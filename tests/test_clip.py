"""Gradient clipping against torch's, in float64 where rounding counts."""

from __future__ import annotations

import math
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED
from children import run
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn import utils as theirs

import fastopt
from fastopt.errors import BackendUnavailable
from fastopt.nn import utils as ours
from fastopt.optim import _gradients

ORDERS = (2.0, 1.0, math.inf)
ON_CPU = DEVICE == "cpu" and not INTERPRETED
#: Odd sizes, one number, several blocks, and none at all.
SHAPES: tuple[tuple[int, ...], ...] = ((3, 5), (), (1,), (0,), (2, 0, 3), (4097,), (70, 201))
EPS = {dtype: torch.finfo(dtype).eps for dtype in FLOATS}
# Of a float64 sum torch's own error counts.
ROUNDED = {**EPS, torch.float64: 32 * EPS[torch.float64]}
DTYPES = pytest.mark.parametrize("dtype", FLOATS, ids=str)
NAN = math.nan


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES,
    scale: float = 1.0,
) -> list[Parameter]:  # fmt: skip
    """With gradients, and one without."""
    params = [Parameter(torch.zeros(s, dtype=dtype)) for s in shapes]
    for p in params:
        p.grad = (torch.randn(p.shape, dtype=torch.float64) * scale).to(dtype)
    return [*params, Parameter(torch.zeros(3, dtype=dtype))]


def of(*grads: Tensor | None) -> list[Parameter]:
    """Parameters with these gradients."""
    params = []
    for grad in grads:
        params.append(Parameter(torch.zeros(1 if grad is None else grad.shape)))
        if grad is not None:
            params[-1] = Parameter(torch.zeros_like(grad))
            params[-1].grad = grad
    return params


def twins(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Parameter]:
    """Copies with the same layout, of the gradients too."""
    return of(*[
        None if p.grad is None else torch.empty_like(p.grad, dtype=dtype).copy_(p.grad)
        for p in params
    ])  # fmt: skip


def grads_of(params: Sequence[Tensor]) -> list[Tensor]:
    return [p.grad for p in params if p.grad is not None]


def assert_close(mine: Sequence[Tensor], exact: Sequence[Tensor], ulps: float = 4.0) -> None:
    for m, e in zip(grads_of(mine), grads_of(exact), strict=True):
        eps = EPS[m.dtype]
        torch.testing.assert_close(m.double(), e, rtol=ulps * eps, atol=1e-7, equal_nan=True)


def served(name: str, *args: Any, **more: Any) -> Any:
    """The call, by a kernel or not at all."""
    with fastopt.use_backend(BACKEND):
        return getattr(ours, name)(*args, **more)


# -- values -------------------------------------------------------------------------------


@DTYPES
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("most", [0.5, 1e9, 0.0, -0.25])
def test_norm(dtype: torch.dtype, order: float, most: float) -> None:
    shapes = [s for s in SHAPES if 0 not in s] if math.isinf(order) else SHAPES
    params = parameters(dtype, shapes)
    exact = twins(params, torch.float64)
    versions = [p.grad._version for p in params if p.grad is not None]
    norm = served("clip_grad_norm_", params, most, order)
    expected = theirs.clip_grad_norm_(exact, most, order)
    assert (norm.dtype, norm.shape, norm.device) == (dtype, (), params[0].grad.device)
    assert not norm.requires_grad
    torch.testing.assert_close(norm.double(), expected, rtol=ROUNDED[dtype], atol=0.0)
    assert_close(params, exact)
    assert [g._version for g in grads_of(params)] == [v + 1 for v in versions]


@DTYPES
@pytest.mark.parametrize("order", ORDERS)
def test_in_two_steps(dtype: torch.dtype, order: float) -> None:
    params = parameters(dtype, [(3, 5), (5000,)])
    exact = twins(params, torch.float64)
    norm = served("get_total_norm", grads_of(params), order)
    expected = theirs.get_total_norm(grads_of(exact), order)
    torch.testing.assert_close(norm.double(), expected, rtol=ROUNDED[dtype], atol=0.0)
    for given in (norm, expected.float().cpu()):  # of any floating dtype, wherever it is
        before = twins(params), twins(params, torch.float64)
        assert served("clip_grads_with_norm_", before[0], 1.5, given) is None
        theirs.clip_grads_with_norm_(before[1], 1.5, given.double())
        assert_close(*before)


@DTYPES
@pytest.mark.parametrize("most", [0.5, 0.0, 1e4, -1.0, math.inf])
def test_value(dtype: torch.dtype, most: float) -> None:
    params = parameters(dtype)
    params[0].grad[0, :3] = torch.tensor([NAN, math.inf, -math.inf], dtype=dtype)
    expected = twins(params)
    versions = [g._version for g in grads_of(params)]
    assert served("clip_grad_value_", params, most) is None
    theirs.clip_grad_value_(expected, most)
    for g, e in zip(grads_of(params), grads_of(expected), strict=True):
        torch.testing.assert_close(g, e, rtol=0, atol=0, equal_nan=True)
    assert all(g._version > v for g, v in zip(grads_of(params), versions, strict=True))


def test_value_that_no_kernel_takes() -> None:
    params = of(torch.tensor([1.0, -2.0, NAN]))
    expected = twins(params)
    ours.clip_grad_value_(params, NAN)
    theirs.clip_grad_value_(expected, NAN)
    torch.testing.assert_close(params[0].grad, expected[0].grad, equal_nan=True)
    half = of(torch.ones(3, dtype=torch.float16))
    for module in (theirs, ours):
        with pytest.raises(RuntimeError, match="overflow"):
            module.clip_grad_value_(half, 1e6)


@pytest.mark.parametrize("values", [(math.inf, 1.0), (NAN, 1.0), (-math.inf, NAN), (0.0, 0.0)])
@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("most", [1.0, math.inf, NAN, 0.0])
@DTYPES
def test_infinities(
    values: tuple[float, float], order: float, most: float, dtype: torch.dtype
) -> None:
    """As in torch: a factor of 0 makes an infinity NaN, and NaN makes all of them that."""
    first, second = torch.full((70,), values[1]), torch.full((2,), values[1])
    first[37] = values[0]
    params = of(first.to(dtype), second.to(dtype))
    expected = twins(params, torch.float64)
    norm = served("clip_grad_norm_", params, most, order)
    their = theirs.clip_grad_norm_(expected, most, order)
    torch.testing.assert_close(norm.double(), their, equal_nan=True)
    assert_close(params, expected)


@pytest.mark.parametrize("place", [0, 1, 4095, 4096, 9999])
def test_a_nan_anywhere(place: int) -> None:
    for order in ORDERS:
        grad = torch.randn(10_000)
        grad[place] = NAN
        assert served("get_total_norm", grad, order).isnan()


def test_half_precision_does_not_overflow() -> None:
    """Torch makes zeros of 100,000 gradients of 300, whose norm no float16 can hold."""
    params = of(torch.full((100_000,), 300.0, dtype=torch.float16))
    norm = served("clip_grad_norm_", params, 1000.0)
    assert norm.dtype == torch.float16
    assert norm.isinf()
    expected = 300.0 * 1000.0 / (300.0 * math.sqrt(100_000))
    torch.testing.assert_close(
        params[0].grad, torch.full((100_000,), expected).half(), rtol=1e-3, atol=0.0
    )
    params[0].grad.fill_(300.0)
    assert served("clip_grad_norm_", params, 1.0, error_if_nonfinite=True).isinf()


@pytest.mark.skipif(not ON_CPU, reason="a GPU's kernels add up float32 in float32, as torch's")
@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_squares_neither_overflow_nor_vanish(scale: float) -> None:
    params = of(torch.full((5000,), scale))
    norm = served("clip_grad_norm_", params, 1.0)
    assert norm.item() == pytest.approx(scale * math.sqrt(5000), rel=1e-6)


def test_a_long_sum_is_exact() -> None:
    grad = torch.rand(1_000_003)
    exact = grad.double().norm().item()
    assert served("get_total_norm", [grad]).item() == pytest.approx(exact, rel=2e-7)


@pytest.mark.parametrize("order", [3.0, 0.0, -1.0, -math.inf, 0.5, "inf", "2"])
def test_other_orders(order: Any) -> None:
    params = parameters(shapes=[(3, 5), (7,)])
    expected = twins(params)
    norm = ours.clip_grad_norm_(params, 0.5, order)
    torch.testing.assert_close(norm, theirs.clip_grad_norm_(expected, 0.5, order))
    for g, e in zip(grads_of(params), grads_of(expected), strict=True):
        torch.testing.assert_close(g, e)
    if order not in ("inf", "2"):
        with pytest.raises(BackendUnavailable, match="norm_type"):
            served("clip_grad_norm_", params, 0.5, order)


# -- what is read and written ----------------------------------------------------------------


def test_nothing_is_written_where_nothing_is_clipped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even the same bits; but versions count as in torch."""
    params = parameters(shapes=[(30,)])
    if ON_CPU:
        from fastopt.kernels.numba import norm

        monkeypatch.setattr(norm, "_run_change", lambda *_: pytest.fail("a launch"))
    version = params[0].grad._version
    served("clip_grad_norm_", params, 1e3)
    assert params[0].grad._version == version + 1


def test_layouts() -> None:
    """Dense ones in any order of axes by kernels, those with gaps by torch, and both rightly."""
    dense = [
        torch.randn(7, 5).t(), torch.randn(9)[2:], torch.randn(1, 3)[:, None],
        torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.randn(4, 3, 2).permute(1, 2, 0), torch.randn(6, 2).as_strided((1, 12), (99, 1)),
    ]  # fmt: skip
    gaps = [torch.randn(9)[::2], torch.randn(4, 6)[:, :3], torch.randn(3, 8).t()[1::2]]
    around = torch.randn(20)
    for grads in (dense, gaps, [*dense, gaps[0]], [around[3:9], around[9:11]]):
        params = of(*[g.clone() if g.is_contiguous() else g for g in grads])
        exact = twins(params, torch.float64)
        if grads is dense:
            norm = served("clip_grad_norm_", params, 0.5)
        else:
            norm = ours.clip_grad_norm_(params, 0.5)
        torch.testing.assert_close(norm.double(), theirs.clip_grad_norm_(exact, 0.5))
        assert_close(params, exact)
    with pytest.raises(BackendUnavailable, match="gaps or overlaps: strides"):
        served("clip_grad_norm_", of(*gaps), 0.5)
    with pytest.raises(BackendUnavailable, match="gaps or overlaps"):
        served("get_total_norm", [torch.ones(1).expand(4)])


def test_neighbours_are_left_alone() -> None:
    whole = torch.arange(1.0, 21.0)
    before = whole.clone()
    served("clip_grad_norm_", of(whole[3:9], whole[12:13]), 0.5)
    changed = whole != before
    assert changed[3:9].all()
    assert changed[12]
    assert changed.sum() == 7


def test_shared_memory() -> None:
    """A gradient that is there twice is scaled twice, by torch's code."""
    grad = torch.randn(50)
    params = of(grad, torch.randn(3), grad)
    same = torch.empty_like(grad).copy_(grad)
    expected = of(same, params[1].grad.clone(), same)
    torch.testing.assert_close(
        ours.clip_grad_norm_(params, 0.1), theirs.clip_grad_norm_(expected, 0.1)
    )
    torch.testing.assert_close(grad, same)
    with pytest.raises(BackendUnavailable, match="share memory"):
        served("clip_grad_norm_", params, 0.1)
    with pytest.raises(BackendUnavailable, match="share memory"):
        served("clip_grad_value_", of(grad[:10], grad[5:20]), 0.1)
    norm = served("get_total_norm", [grad, grad[3:]])  # which only reads
    torch.testing.assert_close(norm, theirs.get_total_norm([grad, grad[3:]]))


@pytest.mark.skipif(not ON_CPU, reason="threads of the CPU's kernels")
@DTYPES
@pytest.mark.parametrize("order", ORDERS)
def test_threads_do_not_change_the_bits(
    dtype: torch.dtype, order: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fastopt.kernels.numba import norm, threads

    monkeypatch.setattr(norm, "GRAIN", 1)
    monkeypatch.setattr(threads, "_cores", lambda: 2)
    params = parameters(dtype, [(100_003,), (7,), (31, 41), (20_000,)])
    before, found = torch.get_num_threads(), []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            copies = twins(params)
            total = served("clip_grad_norm_", copies, 0.37, order)
            served("clip_grad_value_", copies, 1e-3)
            found.append([total, *grads_of(copies)])
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("names", [("clip_grad_norm_", 2.0), ("clip_grad_value_", 0.01)])
def test_the_same_without_compiled_questions(
    names: tuple[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where compiled code can't ask torch about tensors, Python does."""
    name, most = names
    params = parameters(shapes=SHAPES)
    expected = twins(params)
    served(name, expected, most)
    monkeypatch.setattr(_gradients, "_compiled", lambda: None)
    served(name, params, most)
    for g, e in zip(grads_of(params), grads_of(expected), strict=True):
        assert torch.equal(g, e)
    with pytest.raises(BackendUnavailable, match="share memory"):
        served(name, [params[0], params[0]], most)


def test_while_other_threads_run() -> None:
    """One that takes gradients away, and others that clip."""
    stop = threading.Event()
    params = parameters(shapes=[(5000,)] * 20)

    def replace() -> None:
        while not stop.is_set():
            for p in params[:-1]:
                p.grad.data = torch.ones(5000)

    other = threading.Thread(target=replace)
    other.start()
    try:
        for _ in range(50 if ON_CPU else 3):
            assert served("clip_grad_norm_", params, 1.0).isfinite()
    finally:
        stop.set()
        other.join()


def test_released_memory() -> None:
    params = of(torch.randn(4), torch.randn(5))
    params[1].grad.untyped_storage().resize_(0)
    for call in (ours.clip_grad_norm_, ours.clip_grad_value_):
        with pytest.raises(RuntimeError, match="has no memory"):
            call(params, 1.0)


# -- arguments -------------------------------------------------------------------------------


def test_no_gradients() -> None:
    """0 on the CPU, in the default dtype, as torch has it."""
    for params in ([], [Parameter(torch.ones(2))], iter(()), Parameter(torch.ones(1))):
        norm = ours.clip_grad_norm_(params, 1.0)
        assert torch.equal(norm, torch.tensor(0.0))
    assert torch.equal(ours.get_total_norm([]), torch.tensor(0.0))
    ours.clip_grads_with_norm_([], 1.0, torch.tensor(1.0))
    assert torch.equal(served("clip_grad_norm_", of(torch.zeros(0)), 1.0), torch.tensor(0.0))


def test_the_largest_of_nothing_is_torchs() -> None:
    params = of(torch.ones(2), torch.zeros(0))
    errors = []
    for module in (theirs, ours):
        with pytest.raises(RuntimeError) as caught:
            module.clip_grad_norm_(params, 1.0, math.inf)
        errors.append(str(caught.value))
    assert errors[0] == errors[1]


def test_one_tensor_and_generators() -> None:
    model = nn.Linear(4, 5)
    model(torch.randn(3, 4)).sum().backward()
    norm = theirs.get_total_norm([p.grad for p in model.parameters()])
    torch.testing.assert_close(served("clip_grad_norm_", model.parameters(), 100.0), norm)
    torch.testing.assert_close(served("get_total_norm", (p.grad for p in model.parameters())), norm)
    served("clip_grads_with_norm_", model.parameters(), 0.5, norm)
    torch.testing.assert_close(ours.get_total_norm(model.weight.grad), model.weight.grad.norm())
    served("clip_grad_value_", model.parameters(), 0.01)
    assert model.bias.grad.abs().max() <= 0.01
    served("clip_grad_norm_", model.weight, 1e-3)
    assert model.weight.grad.norm() < 1.1e-3
    assert model.bias.grad.norm() > 1.1e-3
    assert served("clip_grad_norm_", dict(model.named_parameters()).values(), 9.0) > 0


def test_an_empty_generator_is_warned_of() -> None:
    for module in (theirs, ours):
        with pytest.warns(UserWarning, match="is an empty generator") as caught:
            module.clip_grad_norm_((p for p in ()), 1.0)
        assert [w.filename for w in caught] == [__file__]


@pytest.mark.parametrize("order", ORDERS)
def test_error_if_nonfinite(order: float) -> None:
    """In torch's words, and with nothing written."""
    for value in (math.inf, NAN):
        messages = []
        for module in (theirs, ours):
            params = of(torch.tensor([1.0, value]), torch.ones(3))
            for call in (
                lambda m=module, p=params: m.clip_grad_norm_(
                    p, 1.0, order, error_if_nonfinite=True
                ),
                lambda m=module, p=params: m.get_total_norm(grads_of(p), order, True),
            ):
                with pytest.raises(RuntimeError) as caught:
                    call()
                messages.append(str(caught.value))
            assert torch.equal(params[1].grad, torch.ones(3))
        assert len(set(messages)) == 1
    assert ours.get_total_norm([torch.ones(4)], order, True) > 0


@pytest.mark.parametrize("foreach", [None, True, False])
def test_foreach(foreach: bool | None) -> None:
    """Kernels are another way, whichever of its own torch would take."""
    params = parameters()
    exact = twins(params, torch.float64)
    served("clip_grad_norm_", params, 0.5, 2.0, False, foreach)
    theirs.clip_grad_norm_(exact, 0.5, 2.0, False, foreach)
    assert_close(params, exact)
    served("clip_grad_value_", params, 0.01, foreach=foreach)
    served("clip_grads_with_norm_", params, 0.01, torch.tensor(1.0), foreach=foreach)
    ours.get_total_norm(grads_of(params), foreach=foreach)


WRONG: list[Callable[[Any], object]] = [
    lambda m: m.clip_grad_norm_(5, 1.0),
    lambda m: m.clip_grad_norm_(of(torch.ones(2)), "much"),
    lambda m: m.clip_grad_norm_(of(torch.ones(2)), 1.0, "no number"),
    lambda m: m.clip_grad_norm_(of(torch.ones(2)), None),
    lambda m: m.clip_grad_norm_([3.0], 1.0),
    lambda m: m.get_total_norm([3.0]),
    lambda m: m.get_total_norm(None),
    lambda m: m.get_total_norm([torch.ones(2, dtype=torch.int64)]),
    lambda m: m.clip_grad_value_(of(torch.ones(2)), None),
    lambda m: m.clip_grad_value_(7, 1.0),
    lambda m: m.clip_grad_value_([], 1.0),
    lambda m: m.clip_grads_with_norm_(of(torch.ones(2)), 1.0, 3.0),
    lambda m: m.clip_grads_with_norm_(of(torch.ones(2)), 1.0, torch.ones(1)),
    lambda m: m.clip_grads_with_norm_(of(torch.ones(2)), 1.0, torch.ones(2, 2)),
    lambda m: m.clip_grad_norm_(of(torch.ones(2)), 1.0, foreach=True, nonsense=1),
]


@pytest.mark.parametrize("call", WRONG)
def test_errors_are_torchs(call: Callable[[Any], object]) -> None:
    found: list[Any] = []
    for module in (theirs, ours):
        try:
            call(module)
            found.append(None)
        except Exception as error:
            found.append((type(error), str(error)))
    assert found[0] == found[1]


# -- what is torch's -------------------------------------------------------------------------


def _compare(mine: list[Parameter], torchs: list[Parameter], **more: Any) -> None:
    norm = ours.clip_grad_norm_(mine, 0.5, **more)
    torch.testing.assert_close(norm, theirs.clip_grad_norm_(torchs, 0.5, **more))
    for g, e in zip(grads_of(mine), grads_of(torchs), strict=True):
        torch.testing.assert_close(g, e)


def test_mixed_dtypes() -> None:
    grads = [torch.randn(5), torch.randn(6, dtype=torch.float64), torch.randn(7).bfloat16()]
    _compare(of(*grads), of(*[g.clone() for g in grads]))
    with pytest.raises(BackendUnavailable, match="several dtypes"):
        served("clip_grad_norm_", of(*grads), 0.5)


def test_complex_gradients() -> None:
    grads = [torch.randn(5, dtype=torch.complex64), torch.randn(3, dtype=torch.complex64)]
    _compare(of(*grads), of(*[g.clone() for g in grads]))


def test_sparse_gradients() -> None:
    def embedding() -> list[Tensor]:
        torch.manual_seed(3)
        words = nn.EmbeddingBag(20, 4, sparse=True)
        words(torch.tensor([[1, 2], [3, 3]])).sum().backward()
        words.weight.grad = words.weight.grad.coalesce()
        return [words.weight]

    found: list[Any] = []
    for module in (theirs, ours):
        params = embedding()
        try:
            found.append((module.clip_grad_norm_(params, 0.5), params[0].grad.to_dense()))
        except Exception as error:
            found.append((type(error), str(error)))
    assert type(found[0][0]) is type(found[1][0])
    assert found[0][0] == found[1][0]
    with pytest.raises(BackendUnavailable, match="sparse_coo"):
        served("clip_grad_norm_", embedding(), 0.5)


class Marked(Tensor):
    """A subclass."""


def test_subclasses() -> None:
    grads = [torch.randn(5), torch.randn(3).as_subclass(Marked)]
    with pytest.raises(BackendUnavailable, match="type Marked"):
        served("get_total_norm", grads)
    norm = ours.get_total_norm(grads)
    torch.testing.assert_close(torch.as_tensor(norm), theirs.get_total_norm(grads))


def test_inference_mode() -> None:
    with torch.inference_mode():
        grads = [torch.randn(5)]
        norm = ours.get_total_norm(grads)
        assert norm.is_inference()
        with pytest.raises(BackendUnavailable, match="inference mode"):
            served("get_total_norm", grads)
    with pytest.raises(BackendUnavailable, match="made in inference mode"):
        served("get_total_norm", grads)
    torch.testing.assert_close(ours.get_total_norm(grads), norm.clone())


def test_lazily_negated() -> None:
    negated = torch._neg_view(torch.randn(5))
    torch.testing.assert_close(ours.get_total_norm([negated]), negated.norm())


def test_modes_see_torchs_functions() -> None:
    from torch.overrides import TorchFunctionMode
    from torch.utils._python_dispatch import TorchDispatchMode

    seen: list[str] = []

    class Functions(TorchFunctionMode):
        def __torch_function__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(getattr(function, "__name__", ""))
            return function(*args, **(kwargs or {}))

    class Operations(TorchDispatchMode):
        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode, word in ((Functions(), "_foreach_norm"), (Operations(), "aten._foreach_norm.Scalar")):
        seen.clear()
        with mode:
            ours.get_total_norm([torch.ones(3)])
        assert word in seen


def test_under_transforms() -> None:
    """torch.func differentiates the norm no more than torch's own."""
    x = torch.randn(4, 5)
    norms = torch.func.vmap(lambda row: ours.get_total_norm([row], foreach=False))(x)
    torch.testing.assert_close(norms, x.norm(dim=1))


def test_torch_compile() -> None:
    def step(params: list[Tensor]) -> Tensor:
        norm = ours.clip_grad_norm_(params, 0.5)
        ours.clip_grad_value_(params, 0.1)
        ours.clip_grads_with_norm_(params, 0.1, ours.get_total_norm([p.grad for p in params]))
        return norm

    params = parameters(shapes=[(3, 5), (7,)])[:2]
    expected = twins(params)
    norm = torch.compile(step, backend="eager", fullgraph=True)(params)
    torch.testing.assert_close(norm, step(expected))
    for g, e in zip(grads_of(params), grads_of(expected), strict=True):
        torch.testing.assert_close(g, e)


def test_gradients_of_gradients() -> None:
    """They change in place as in torch: a graph that needs the old ones notices."""
    for module in (theirs, ours):
        x = torch.randn(5, requires_grad=True)
        (grad,) = torch.autograd.grad(x.square().exp().sum(), x, create_graph=True)
        params = [Parameter(torch.zeros(5))]
        params[0].grad = grad
        product = (grad * grad).sum()
        module.clip_grad_norm_(params, 1e-3)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            product.backward()


def test_use_backend() -> None:
    params = parameters()
    expected = twins(params)
    with fastopt.use_backend("reference"):
        norm = ours.clip_grad_norm_(params, 0.5)
    assert torch.equal(norm, theirs.clip_grad_norm_(expected, 0.5))
    assert all(map(torch.equal, grads_of(params), grads_of(expected)))
    other = "numba" if BACKEND == "triton" and DEVICE != "cpu" else "triton"
    if not INTERPRETED:
        with fastopt.use_backend(other), pytest.raises(BackendUnavailable, match="device="):
            ours.clip_grad_norm_(params, 0.5)


# -- convert -----------------------------------------------------------------------------------

CLIPPING = ("clip_grad_norm_", "clip_grad_value_", "clip_grads_with_norm_", "get_total_norm")


@pytest.fixture
def _torchs_again() -> Iterator[None]:
    yield
    fastopt.convert(theirs, to="torch")


@pytest.mark.usefixtures("_torchs_again")
def test_convert() -> None:
    before = {name: getattr(theirs, name) for name in CLIPPING}
    assert not any(before[name] is getattr(ours, name) for name in CLIPPING)
    for _ in range(2):
        assert fastopt.convert(theirs) is theirs
    for name in CLIPPING:
        assert getattr(theirs, name) is getattr(ours, name)
    assert theirs.clip_grad.clip_grad_norm_ is ours.clip_grad_norm_
    for order in (2.0, 3.0):  # torch's own code is still torch's
        params = parameters(shapes=[(5,)])
        assert theirs.clip_grad_norm_(params, 0.5, order) > 0.5
    with fastopt.use_backend("reference"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        assert theirs.clip_grad_norm(params, 0.5) > 0
    for _ in range(2):
        fastopt.convert(theirs, to="torch")
    assert {name: getattr(theirs, name) for name in CLIPPING} == before


@pytest.mark.usefixtures("_torchs_again")
def test_convert_leaves_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def counted(*args: Any) -> None:
        raise AssertionError

    with monkeypatch.context() as patch:
        patch.setattr(theirs, "get_total_norm", counted)
        with pytest.warns(UserWarning, match=r"left alone: torch\.nn\.utils\.get_total_norm"):
            fastopt.convert(theirs)
        assert theirs.get_total_norm is counted
        assert theirs.clip_grad_norm_ is ours.clip_grad_norm_
    with pytest.raises(TypeError, match=r"and torch\.nn\.utils"):
        fastopt.convert(torch.nn.functional)


def nothing_is_replaced() -> None:
    """By an import, in a process of its own."""
    before = [getattr(theirs, name).__module__ for name in CLIPPING]
    assert before == ["torch.nn.utils.clip_grad"] * 4


def test_nothing_is_replaced() -> None:
    run(nothing_is_replaced)

"""Cross-entropy of a linear layer's logits, in pieces: against torch in float64."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED, REDUCTIONS, any_size_counts
from torch import Tensor
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db

import fastopt
import fastopt.nn.functional as ours
from fastopt.dispatch import load
from fastopt.front.route import RouteCache
from fastopt.nn import linear_cross_entropy as file
from fastopt.nn._linear_cross_entropy_loss import LinearCrossEntropyLoss as OldTorchs

HAS_TORCHS = hasattr(theirs, "linear_cross_entropy")
NEEDS_TORCHS = pytest.mark.skipif(not HAS_TORCHS, reason="torch has it from 2.13 on")
PIECES: Any = load(BACKEND)._loops.linear.pieces
#: Classes of rows that are walked as they are, of ones that are turned, and of few.
SIZES = ((13, 150),) if INTERPRETED else ((75, 300), (75, 7), (5, 2))
FEATURES = 11
DTYPES = (torch.float32, torch.bfloat16) if INTERPRETED else FLOATS
#: Of many samples the interpreter takes some.
EVERY = 7 if INTERPRETED else 1


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """So that a few rows are several pieces, the last of them shorter."""
    torch.manual_seed(11)
    monkeypatch.setattr(PIECES, "BYTES", 1)
    monkeypatch.setattr(PIECES, "ROWS", 5 if INTERPRETED else 16)
    with any_size_counts():
        yield


def plain(input: Tensor, linear_weight: Tensor, target: Tensor, **options: Any) -> Tensor:
    """The definition, by torch's functions."""
    bias = options.pop("linear_bias", None)
    each, places = input.shape[:-1], linear_weight.shape[1:-1]
    if input.dim() > 2:
        input, target = input.flatten(0, -2), target.flatten(0, len(each) - 1)
    bias = None if bias is None else bias.flatten()
    logits = theirs.linear(input, linear_weight.flatten(0, -2), bias)
    logits = logits.reshape(*input.shape[:-1], len(linear_weight), *places)
    loss = theirs.cross_entropy(logits, target, **options)
    return loss.reshape(each + places) if options.get("reduction") == "none" else loss


def leaf(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_()


def gradients(loss: Tensor, leaves: list[Tensor], upstream: Tensor, **options: Any) -> Any:
    return torch.autograd.grad(loss, leaves, upstream.to(loss.dtype), **options)


def outcome(function: Any, tensors: list[Tensor | None], **options: Any) -> list[Tensor]:
    """The loss and all gradients, for a grad_output of random numbers."""
    input, linear_weight, target, linear_bias, weight = tensors
    loss = function(input, linear_weight, target, linear_bias=linear_bias, weight=weight, **options)
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    upstream = torch.randn(loss.shape, generator=torch.Generator().manual_seed(3))
    return [loss.detach(), *(gradients(loss, leaves, upstream) if leaves else ())]


def in_double(tensors: list[Tensor | None]) -> list[Tensor | None]:
    return [
        t.detach().double().requires_grad_(t.requires_grad)
        if t is not None and t.is_floating_point()
        else t
        for t in tensors
    ]


def served(*args: Any, **kwargs: Any) -> Tensor:
    with fastopt.use_backend(BACKEND):
        return ours.linear_cross_entropy(*args, **kwargs)


def check(tensors: list[Tensor | None], **options: Any) -> None:
    """No result is farther from that in float64 than torch's, but for a few last digits."""
    exact = outcome(plain, in_double(tensors), **options)
    torchs = outcome(plain, tensors, **options)
    found = outcome(served, tensors, **options)
    for mine, its, e in zip(found, torchs, exact, strict=True):
        assert mine.dtype == its.dtype
        assert mine.shape == its.shape
        few = torch.finfo(mine.dtype).eps * (256 if mine.dtype == torch.float64 else 8)
        kept = its.isfinite() & e.isfinite()  # torch's sums in float16 overflow
        assert torch.equal(mine.isnan(), e.isnan())
        assert not (mine.isinf() & kept).any()
        if kept.any():
            wrong, theirs_, size = (t.double()[kept] for t in (mine - e, its - e, e))
            for norm in (2.0, float("inf")):
                mine_, its_, all_ = (
                    torch.linalg.vector_norm(t, norm) for t in (wrong, theirs_, size)
                )
                assert mine_ <= 1.25 * its_ + few * all_


OPTIONS: dict[str, dict[str, Any]] = {
    "": {},
    "bias": {"bias": True},
    "smoothing": {"label_smoothing": 0.2},
    "ignored": {"ignore_index": 1, "bias": True},
    "weights": {"weight": True, "ignore_index": -7},
    "all": {"weight": True, "label_smoothing": 0.3, "ignore_index": 0, "bias": True},
    "soft": {"soft": True, "bias": True},
    "soft all": {"soft": True, "weight": True, "label_smoothing": 0.3},
}


def case(
    dtype: torch.dtype, rows: int, classes: int, bias: bool = False, weight: bool = False,
    soft: bool = False, ignore_index: int = -100, **options: Any,
) -> tuple[list[Tensor | None], dict[str, Any]]:  # fmt: skip
    target = torch.randint(classes, (rows,))
    target[::4] = ignore_index if ignore_index != -100 else target[::4]
    if soft:
        target = torch.rand(rows, classes, dtype=dtype).requires_grad_()
    else:
        options["ignore_index"] = ignore_index
    tensors: list[Tensor | None] = [
        leaf(rows, FEATURES, dtype=dtype), leaf(classes, FEATURES, dtype=dtype), target,
        leaf(classes, dtype=dtype) if bias else None,
        (torch.rand(classes) + 0.5).to(dtype) if weight else None,
    ]  # fmt: skip
    return tensors, options


#: All options with each dtype and with each reduction.
COMBINED = [
    (name, dtype, reduction)
    for k, name in enumerate(OPTIONS)
    for i, dtype in enumerate(DTYPES)
    for j, reduction in enumerate(REDUCTIONS)
    if (k + i + j) % 3 == 0
]


@pytest.mark.parametrize(("name", "dtype", "reduction"), COMBINED, ids=str)
def test_losses_and_gradients(name: str, dtype: torch.dtype, reduction: str) -> None:
    for rows, classes in SIZES:
        tensors, options = case(dtype, rows, classes, **OPTIONS[name])
        check(tensors, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["", "ignored", "all"])
def test_one_piece(name: str, reduction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(PIECES, "ROWS", 1 << 20)
    for dtype in DTYPES:
        tensors, options = case(dtype, *SIZES[0], **OPTIONS[name])
        check(tensors, reduction=reduction, **options)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_shapes(reduction: str) -> None:
    """A single sample, several places of each, and more dimensions than torch's own takes."""
    classes = 40
    w, b = leaf(classes, FEATURES), leaf(classes)
    check([leaf(FEATURES), w, torch.tensor(3), b, None], reduction=reduction)
    check([leaf(FEATURES), w, torch.rand(classes).double(), b, None], reduction=reduction)
    target = torch.randint(classes, (4, 5))
    target[1, 2:] = -100
    check([leaf(4, 5, FEATURES), w, target, b, None], reduction=reduction)
    soft = torch.rand(2, 2, 3, classes).double().requires_grad_()
    check([leaf(2, 2, 3, FEATURES), w, soft, b, None], reduction=reduction)
    places = torch.randint(classes, (19, 2, 3))
    places[2], places[5, 1, 1] = -100, -100
    deep = leaf(classes, 2, 3, FEATURES)
    check([leaf(19, FEATURES), deep, places, leaf(classes, 2, 3), None], reduction=reduction)
    check([leaf(19, FEATURES), leaf(classes, 1, FEATURES), places[:, :1, 0], None, None],
          reduction=reduction, label_smoothing=0.1)  # fmt: skip
    check([leaf(19, FEATURES), w, torch.randint(classes, (19,)).byte(), None, None],
          reduction=reduction)  # fmt: skip


def test_views() -> None:
    x, w = leaf(FEATURES, 40), leaf(2 * FEATURES, 30)
    target = torch.randint(30, (80,))[::2]
    check([x.t().detach().requires_grad_(), w[::2].t().detach().requires_grad_(), target, None,
           torch.rand(60).double()[::2]])  # fmt: skip


@pytest.mark.parametrize(
    "needs", [*itertools.product((False, True), repeat=3)][:: 1 if EVERY == 1 else 5]
)
def test_gradients_of_those_that_need_them(needs: tuple[bool, ...]) -> None:
    """And no more work than those are."""
    tensors, options = case(torch.float64, *SIZES[0], **OPTIONS["ignored"])
    for t, need in zip((tensors[0], tensors[1], tensors[3]), needs, strict=True):
        assert t is not None
        t.requires_grad_(need)
    overwritten: list[bool] = []
    run = PIECES.run

    def noting(self: Any, *args: Any) -> None:
        overwritten.append(args[3])
        run(self, *args)

    with mock.patch.object(PIECES, "run", noting):
        check(tensors, **options)
        assert len(overwritten) > 1
        assert set(overwritten) == {any(needs)}
        overwritten.clear()
        with torch.no_grad():
            loss = served(
                *tensors[:3], linear_bias=tensors[3], **{**options, "label_smoothing": 0.1}
            )
        assert not loss.requires_grad
        assert overwritten
        assert not any(overwritten)


@pytest.mark.skipif(BACKEND != "numba", reason="on a GPU only the device knows how many they are")
def test_rows_that_are_ignored_are_in_no_product() -> None:
    tensors, _ = case(torch.float32, 75, 300)
    assert tensors[2] is not None
    tensors[2][:60] = -100
    counted = []
    run = PIECES.run

    def noting(self: Any, logits: Tensor, *args: Any) -> None:
        counted.append(len(logits))
        run(self, logits, *args)

    with mock.patch.object(PIECES, "run", noting):
        check(tensors)
    assert sum(counted) == 15


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("name", ["ignored", "all"])
def test_all_ignored(name: str, reduction: str) -> None:
    """The mean of nothing is NaN, and its gradients are exactly 0, where torch's own has NaN."""
    for dtype in (torch.float32, torch.bfloat16):
        tensors, options = case(dtype, *SIZES[0], **OPTIONS[name])
        assert tensors[2] is not None
        tensors[2].fill_(options["ignore_index"])
        loss, *grads = outcome(served, tensors, reduction=reduction, **options)
        assert loss.isnan() if reduction == "mean" else not loss.any()
        for g in grads:
            assert not g.any()


def test_no_rows() -> None:
    x, w = leaf(0, FEATURES), leaf(30, FEATURES)
    for reduction in REDUCTIONS:
        check([x, w, torch.empty(0, dtype=torch.int64), leaf(30), None], reduction=reduction)


def test_ignored_rows_of_infinities() -> None:
    tensors, options = case(torch.float64, *SIZES[0], **OPTIONS["ignored"])
    x, _, target, *_ = tensors
    assert x is not None
    assert target is not None
    exact = outcome(plain, tensors, **options)
    x.data[target == 1] = float("nan")
    found = outcome(served, tensors, **options)
    if BACKEND == "numba":  # there such rows are not read at all
        for mine, e in zip(found, exact, strict=True):
            assert_close(mine, e)
    else:
        assert_close(found[0], exact[0])


# -- backward passes --------------------------------------------------------------------


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_any_grad_output_and_a_second_backward(reduction: str) -> None:
    """Scaled, learned, computed anew: always the gradients of torch in float64."""
    tensors, options = case(torch.float64, *SIZES[0], **OPTIONS["ignored"])
    leaves = [t for t in tensors if t is not None and t.requires_grad]
    input, linear_weight, target, linear_bias, _ = tensors
    exact_loss = plain(
        input, linear_weight, target, linear_bias=linear_bias, reduction=reduction, **options
    )  # type: ignore[arg-type]
    exact = gradients(exact_loss, leaves, torch.ones(()))
    RouteCache.forget()
    for scale in (1.0, 0.3, 0.3, 0.3, -2.0, 7.0, 0.5, 0.0, 1.0):
        loss = served(
            input, linear_weight, target, linear_bias=linear_bias, reduction=reduction, **options
        )
        first = gradients(loss, leaves, torch.tensor(scale), retain_graph=True)
        second = gradients(loss, leaves, torch.tensor(1.5), retain_graph=True)
        third = gradients(loss, leaves, torch.tensor(scale))
        for f, s, t, e in zip(first, second, third, exact, strict=True):
            assert_close(f, scale * e)
            assert_close(s, 1.5 * e)
            assert_close(t, scale * e)
            assert f.data_ptr() != t.data_ptr()


@pytest.mark.skipif(BACKEND != "numba", reason="on a GPU another number than 1 rounds anew")
def test_halves_are_rounded_once() -> None:
    """Also where another grad_output comes than was expected."""
    dtype = torch.bfloat16
    for scale in (0.7, 3.0, 4.0, 0.7):
        RouteCache.forget()
        tensors, options = case(dtype, *SIZES[0])
        x, w, target, *_ = tensors
        found = gradients(served(x, w, target, **options), [x, w], torch.tensor(scale))  # type: ignore[list-item]
        dx, dw = in_double([x, w])
        assert dx is not None
        assert dw is not None
        wide = gradients(plain(dx, dw, target), [dx, dw], torch.tensor(scale).to(dtype).double())  # type: ignore[arg-type]
        narrow = gradients(plain(x, w, target), [x, w], torch.tensor(scale))  # type: ignore[arg-type, list-item]
        for f, e, n in zip(found, wide, narrow, strict=True):
            mine = (f.double() - e).square().mean()
            its = (n.double() - e).square().mean()
            assert mine <= 1.2 * its


def test_hooks_on_saved_tensors_keep_no_gradient() -> None:
    tensors, options = case(torch.float64, *SIZES[0], **OPTIONS["ignored"])
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    leaves = [t for t in tensors if t is not None and t.requires_grad]
    arguments = {"linear_bias": tensors[3], **options}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = served(*tensors[:3], **arguments)
    assert {id(t) for t in kept} == {id(t) for t in tensors if t is not None}
    assert loss.grad_fn is not None
    assert vars(loss.grad_fn).get("grads") is None
    exact = gradients(plain(*tensors[:3], **arguments), leaves, torch.ones(()))  # type: ignore[arg-type]
    assert_close(gradients(loss, leaves, torch.ones(())), exact)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_second_derivatives_and_transforms(reduction: str) -> None:
    rows, features = (4, 2) if INTERPRETED else (6, 3)
    x, w, b = leaf(rows, features), leaf(5, features), leaf(5)
    target = torch.tensor([0, 4, 1, -100, 2, 2])[:rows]

    def call(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return served(x, w, target, linear_bias=b, reduction=reduction)

    assert torch.autograd.gradgradcheck(call, (x, w, b))

    def value(function: Any, x: Tensor) -> Tensor:
        return function(x, w.detach(), target, reduction=reduction).sum()  # type: ignore[no-any-return]

    for transform in (torch.func.grad, torch.func.jacrev, torch.func.jacfwd, torch.func.hessian):
        found = transform(lambda x: value(ours.linear_cross_entropy, x))(x.detach())
        assert_close(found, transform(lambda x: value(plain, x))(x.detach()))


# -- autocast, threads, memory ----------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_autocast(dtype: torch.dtype) -> None:
    """The layer in the lower dtype, the loss in float32, each gradient in its tensor's dtype."""
    tensors, options = case(torch.float32, *SIZES[0], bias=True)
    tensors[4] = torch.rand(SIZES[0][1]) + 0.5

    def call(function: Any) -> list[Tensor]:
        def cast(*args: Any, **kwargs: Any) -> Tensor:
            with torch.autocast(DEVICE, dtype):
                loss: Tensor = function(*args, **kwargs)
            return loss

        return outcome(cast, tensors, **options)

    for mine, its in zip(call(served), call(plain), strict=True):
        assert mine.dtype == its.dtype == torch.float32
        size = its.abs().max()
        assert (mine - its).abs().max() <= 4 * torch.finfo(dtype).eps * size


@pytest.mark.skipif(BACKEND != "numba", reason="of the CPU's threads")
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_losses_do_not_depend_on_threads(reduction: str) -> None:
    x, w = torch.eye(75), torch.randn(3000, 75)  # whose products are exact
    target = torch.randint(3000, (75,))
    before = torch.get_num_threads()
    try:
        found = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(served(x, w, target, reduction=reduction))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(*found)


def peak(call: Callable[[], object]) -> int:
    """The most bytes that were allocated at once, beyond those at the beginning."""
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    held = most = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    assert events
    return most


@pytest.mark.skipif(BACKEND != "numba", reason="counts the CPU's allocations")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_peak_of_memory(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a forward and backward pass: the gradients, a piece, and little else."""
    rows, classes, features, piece = 400, 20_000, 16, 1 << 21
    monkeypatch.setattr(PIECES, "BYTES", piece)
    x, w = leaf(rows, features, dtype=dtype), leaf(classes, features, dtype=dtype)
    target = torch.randint(classes, (rows,))

    def step(function: Any) -> None:
        x.grad = w.grad = None
        function(x, w, target).backward()

    step(served)  # compiled, and what is kept for ever is there
    fastopt.empty_cache()
    gradient = (rows + 2 * classes) * features * 4  # and the sum in float32
    logits = rows * classes * dtype.itemsize
    assert peak(lambda: step(plain)) > 2 * logits  # what is measured is what it seems
    assert peak(lambda: step(served)) < piece + gradient + (3 << 20) < logits


# -- bad input --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [300, -1, -100])
def test_a_bad_target_is_named(bad: int) -> None:
    tensors, _ = case(torch.float32, 75, 300)
    x, w, target, *_ = tensors
    assert target is not None
    target[70] = bad
    options = {"ignore_index": 5}
    with (
        mock.patch.object(PIECES, "run") as run,
        pytest.raises(
            IndexError, match=rf"Target {bad} is out of bounds. It is target\[70\]; .*300"
        ),
    ):
        served(x, w, target, **options)
    run.assert_not_called()
    with pytest.raises(IndexError, match=r"target\[1, 2\]"):
        served(torch.ones(2, 4, 3), torch.ones(5, 3), torch.tensor([[0] * 4, [0, 0, 7, 0]]))


BAD: dict[str, Callable[[Any], object]] = {
    "numbers": lambda f: f([1.0], torch.ones(2, 3), torch.zeros(1).long()),
    "scalar": lambda f: f(torch.tensor(1.0), torch.ones(2, 3), torch.zeros(1).long()),
    "weight of one dimension": lambda f: f(torch.ones(4, 3), torch.ones(3), torch.zeros(4).long()),
    "features": lambda f: f(torch.ones(4, 3), torch.ones(5, 2), torch.zeros(4).long()),
    "bias": lambda f: f(
        torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4).long(), linear_bias=torch.ones(4)
    ),
    "unbatched": lambda f: f(torch.ones(3), torch.ones(5, 2, 3), torch.zeros(2).long()),
    "ignored probabilities": lambda f: f(
        torch.ones(4, 3), torch.ones(5, 3), torch.ones(4, 5), ignore_index=2
    ),
    "sizes": lambda f: f(torch.ones(4, 3), torch.ones(5, 3), torch.zeros(3).long()),
    "dtypes": lambda f: f(torch.ones(4, 3), torch.ones(5, 3).double(), torch.zeros(4).long()),
    "integers": lambda f: f(
        torch.ones(4, 3).long(), torch.ones(5, 3).long(), torch.zeros(4).long()
    ),
    "target": lambda f: f(torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4).int()),
    "reduction": lambda f: f(
        torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4).long(), reduction="avg"
    ),
    "smoothing": lambda f: f(
        torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4).long(), label_smoothing=1.5
    ),
    "class weights": lambda f: f(
        torch.ones(4, 3), torch.ones(5, 3), torch.zeros(4).long(), weight=torch.ones(4)
    ),
}


@NEEDS_TORCHS
@pytest.mark.parametrize("name", BAD)
def test_errors_are_torchs(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Insisted on, left to the dispatcher, and where torch has no such function."""
    with pytest.raises(Exception) as expected:  # noqa: PT011
        BAD[name](theirs.linear_cross_entropy)
    kind, words = type(expected.value), str(expected.value)

    def found(function: Any) -> str:
        with pytest.raises(kind) as caught:
            BAD[name](function)
        return str(caught.value)

    assert found(ours.linear_cross_entropy) == words
    assert found(served) == words
    if name != "numbers":  # of which Python says another thing at another place
        monkeypatch.setattr(file, "_torchs", None)
        assert found(ours.linear_cross_entropy) == words


def test_more_dimensions_have_errors_of_their_own() -> None:
    x, w = torch.ones(2, 4, 3), torch.ones(5, 3)
    with pytest.raises(RuntimeError, match=r"got 3 and a target .*\(8,\).* neither \(2, 4\)"):
        served(x, w, torch.zeros(8).long())
    with pytest.raises(RuntimeError, match=r"requires batched input, \(N, 3\)"):
        served(x, torch.ones(5, 2, 3), torch.zeros(2, 2).long())
    with pytest.raises(TypeError, match="options are for inputs of one or two dimensions"):
        ours.linear_cross_entropy(x, w, torch.zeros(2, 4).long(), options=object())


# -- torch's own tables, and its own ways -----------------------------------------------

ROWS = [op for op in op_db if op.name == "nn.functional.linear_cross_entropy"]


@NEEDS_TORCHS
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("row", ROWS, ids=lambda op: op.variant_test_name or "plain")
@pytest.mark.filterwarnings("ignore:linear_cross_entropy")
def test_torchs_samples(row: Any, dtype: torch.dtype) -> None:
    """By a kernel where they have no options, else, to the bit, by torch's own code."""
    samples = list(row.sample_inputs(DEVICE, dtype, requires_grad=True))
    assert len(samples) > 5
    for sample in samples[::EVERY]:
        w, target, *rest = sample.args
        assert not rest
        kwargs = dict(sample.kwargs)
        tensors = [
            sample.input, w, target, kwargs.pop("linear_bias", None), kwargs.pop("weight", None)
        ]  # fmt: skip
        deep = target.is_floating_point() and w.dim() > 2
        given = {k: v for k, v in kwargs.items() if v is not None}
        if "options" not in given and not deep and w.shape[-1]:
            check(tensors, **given)
            continue
        with pytest.raises(fastopt.BackendUnavailable):
            outcome(served, tensors, **kwargs)
        found = outcome(ours.linear_cross_entropy, tensors, **kwargs)
        torchs = outcome(theirs.linear_cross_entropy, tensors, **kwargs)
        assert_close(found, torchs, rtol=0, atol=0, equal_nan=True)


@NEEDS_TORCHS
def test_torchs_samples_of_errors() -> None:
    for one in ROWS[0].error_inputs(DEVICE):
        args, kwargs = (one.sample_input.input, *one.sample_input.args), one.sample_input.kwargs
        for call in (ours.linear_cross_entropy, served):
            with pytest.raises(one.error_type, match=one.error_regex):
                call(*args, **kwargs)


@pytest.mark.skipif(BACKEND != "numba", reason="on a GPU there are no small calls")
def test_small_calls_and_compiled_ones_are_torchs() -> None:
    x, w, target = torch.randn(4, 3), torch.randn(5, 3), torch.tensor([0, 1, 4, 2])
    expected = plain(x, w, target)
    RouteCache.forget()
    with mock.patch.object(file.LinearCrossEntropy, "crossover", 131_072):
        (decision,) = fastopt.explain(ours.linear_cross_entropy, x, w, target)
        assert decision.backend == "reference"
        assert decision.request.numel == 20
        assert "20 elements, fewer than the 131072" in str(decision)
        assert_close(ours.linear_cross_entropy(x, w, target), expected, rtol=0, atol=0)
    compiled = torch.compile(lambda *a: ours.linear_cross_entropy(*a), backend="eager")
    assert_close(compiled(x, w, target), expected)
    deep = torch.compile(lambda *a: ours.linear_cross_entropy(*a), backend="eager", fullgraph=True)
    assert_close(deep(x.view(2, 2, 3), w, target.view(2, 2)), expected)
    RouteCache.forget()


# -- the module -------------------------------------------------------------------------


def twins(**options: Any) -> tuple[Any, Any]:
    """Ours, and one of torch's (or what stands for it) with the same parameters."""
    kinds = (
        fastopt.nn.LinearCrossEntropyLoss,
        getattr(torch.nn, "LinearCrossEntropyLoss", OldTorchs),
    )
    made = []
    for kind in kinds:
        torch.manual_seed(5)
        made.append(kind(8, 20, **options))
    return made[0], made[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "dtype": torch.float64},
        {"out_features": (2, 3), "bias": True, "ignore_index": 3},
        {"weight": torch.rand(20) + 0.5, "label_smoothing": 0.1, "reduction": "sum"},
    ],
    ids=["", "bias", "places", "options"],
)
def test_module(options: dict[str, Any]) -> None:
    mine, torchs = twins(**options)
    assert isinstance(mine, type(torchs))
    assert repr(mine) == repr(torchs)
    assert_close(mine.state_dict(), torchs.state_dict())
    x = torch.randn(13, 8, dtype=mine.linear.weight.dtype, requires_grad=True)
    target = torch.randint(20, (13, *options.get("out_features", ())))
    w = torchs.linear.weight.reshape(20, *options.get("out_features", ()), 8)
    b = torchs.linear.bias
    further = {
        k: v
        for k, v in options.items()
        if k in ("weight", "ignore_index", "label_smoothing", "reduction")
    }
    expected = plain(x, w, target, linear_bias=b, **further)
    with fastopt.use_backend(BACKEND):
        found = mine(x, target)
        (decision,) = fastopt.explain(mine, x, target=target)
    assert decision.backend == BACKEND
    assert_close(found, expected)
    found.backward()
    (grad,) = torch.autograd.grad(expected, x, retain_graph=True)
    assert_close(x.grad, grad)
    expected.backward()
    assert_close(mine.linear.weight.grad, torchs.linear.weight.grad)
    for again in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert_close(again(x, target), expected)


@NEEDS_TORCHS
def test_module_of_an_older_torch() -> None:
    """The class that stands for torch's has its arguments, words and parameters."""
    from inspect import signature

    torchs = torch.nn.LinearCrossEntropyLoss
    mine = [(p.name, p.kind, p.default) for p in signature(OldTorchs.__init__).parameters.values()]
    its = [(p.name, p.kind, p.default) for p in signature(torchs.__init__).parameters.values()]
    assert mine == its
    for options in ({}, {"bias": True, "out_features": (2,)}, {"weight": torch.ones(20)}):
        torch.manual_seed(5)
        a = OldTorchs(8, 20, **options)  # type: ignore[arg-type]
        torch.manual_seed(5)
        b = torchs(8, 20, **options)  # type: ignore[arg-type]
        assert repr(a) == repr(b)
        assert_close(dict(a.state_dict()), dict(b.state_dict()))
        ours_, theirs_ = (set(vars(m)) for m in (a, b))
        assert ours_ == theirs_
    for bad in ({"weight": torch.ones(3)}, {"label_smoothing": 2.0}):
        with pytest.raises(RuntimeError) as expected:
            torchs(8, 20, **bad)
        with pytest.raises(RuntimeError) as found:
            OldTorchs(8, 20, **bad)
        assert str(found.value) == str(expected.value)


def test_module_by_keywords_converts_and_traces() -> None:
    module, torchs = twins()
    x, target = torch.randn(6, 8), torch.randint(20, (6,))
    expected = module(x, target)
    assert_close(module(input=x, target=target), expected)

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = module

        def forward(self, x: Tensor, target: Tensor) -> Any:
            return self.loss(x, target)

    model = Model()
    assert_close(torch.fx.symbolic_trace(model)(x, target), expected)
    for to, kind in (("torch", type(torchs)), ("fastopt", type(module))):
        fastopt.convert(model, to=to)
        assert type(model.loss) is kind
        if HAS_TORCHS:
            assert_close(model(x, target), expected)
    assert_close(torch.compile(model, backend="eager")(x, target), expected)
    with pytest.raises(TypeError, match="there is nothing to explain"):
        fastopt.explain(module, [1.0], target)

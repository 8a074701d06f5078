"""Losses over rows: against torch, in every layout, at extreme values and with bad labels."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, DEVICE, INTERPRETED, assert_as_accurate
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import module_db

import fastopt
import fastopt.nn.functional as ours

LABELS = "multi_margin_loss"
DISTANCE = "triplet_margin_with_distance_loss"
#: For each function the options that it is tried with.
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "multilabel_soft_margin_loss": ({}, {"weighted": True}),
    LABELS: ({}, {"p": 2, "margin": 0.3}, {"weighted": True}, {"weighted": True, "p": 2}),
    "cosine_embedding_loss": ({}, {"margin": 0.2}),
    "triplet_margin_loss": ({}, {"p": 1, "swap": True}, {"swap": True, "eps": 0.1}, {"p": 1}),
    DISTANCE: ({}, {"swap": True, "margin": 0.5}),
}
CALLS = [(name, options) for name, all_of_it in OPTIONS.items() for options in all_of_it]
EACH_CALL = pytest.mark.parametrize(("name", "options"), CALLS, ids=str)
EACH_LOSS = pytest.mark.parametrize("name", OPTIONS)
#: One row and many, classes around the sizes of chunks and tiles.
SHAPES = ((1, 1), (7,), (1, 513), (130, 7), (3, 2049), (5, 4099 if INTERPRETED else 20_001))
WIDE = (torch.float32, torch.float64)
HALF = (torch.bfloat16, torch.float16)

Call = Callable[[Any, tuple[Tensor, ...]], Tensor]


@pytest.fixture(autouse=True)
def compiled() -> Iterator[None]:
    """No call is torch's unless a test says so; and one thread, for half as much to compile."""
    torch.manual_seed(11)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with fastopt.use_backend(BACKEND):
        yield
    torch.set_num_threads(threads)


def columns(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor, ...]:
    """What has a number for each class of each row."""
    count = 1 if name == LABELS else 3 if "triplet" in name else 2
    made = [(2 * torch.randn(shape, dtype=torch.float64)).to(dtype) for _ in range(count)]
    if name == "multilabel_soft_margin_loss":
        made[1] = torch.rand(shape, dtype=torch.float64).to(dtype)
    return tuple(t.to(DEVICE) for t in made)


def rest(
    name: str, shape: tuple[int, ...], dtype: torch.dtype, options: dict[str, Any]
) -> dict[str, Any]:
    """All other arguments."""
    found = {k: v for k, v in options.items() if k != "weighted"}
    if options.get("weighted"):
        found["weight"] = (torch.rand(shape[-1]) + 0.1).to(DEVICE, dtype)
    if name == LABELS:
        found["target"] = torch.randint(0, shape[-1], shape[:-1], device=DEVICE)
    if name == "cosine_embedding_loss":
        found["target"] = torch.randint(-1, 2, shape[:-1], device=DEVICE)
    return found


def wanted(tensors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.detach().requires_grad_() for t in tensors)


def outcome(
    module: Any, name: str, tensors: tuple[Tensor, ...], given: dict[str, Any], scaled: bool = True
) -> tuple[Tensor, ...]:
    """The value and the gradients, for a random grad_output or for the usual one."""
    loss = getattr(module, name)(*tensors, **given)
    upstream = None
    if scaled or loss.dim():
        generator = torch.Generator().manual_seed(3)
        upstream = torch.randn(loss.shape, generator=generator).to(DEVICE, loss.dtype)
    return loss, *torch.autograd.grad(loss, tensors, upstream)


def assert_same(name: str, tensors: tuple[Tensor, ...], given: dict[str, Any]) -> None:
    """As torch in the same dtype: value and gradients."""
    tensors = wanted(tensors)
    for reduction in ("mean", "sum", "none"):
        for scaled in (True, False)[: 2 if reduction == "mean" else 1]:
            arguments = (name, tensors, {**given, "reduction": reduction}, scaled)
            torch.testing.assert_close(
                outcome(ours, *arguments), outcome(theirs, *arguments), equal_nan=True
            )


# -- torch's own samples ------------------------------------------------------------------

OPS = {op.name.rpartition(".")[2]: op for op in op_db if op.name.rpartition(".")[2] in OPTIONS}
MODULES = [info for info in module_db if info.name.startswith("nn.") and info.name[3:] in (
    "MultiLabelSoftMarginLoss", "MultiMarginLoss", "CosineEmbeddingLoss", "TripletMarginLoss",
    "TripletMarginWithDistanceLoss",
)]  # fmt: skip


def test_torch_has_samples() -> None:
    assert len(OPS) == len(OPTIONS)
    assert len(MODULES) >= 3


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_samples(name: str, dtype: torch.dtype) -> None:
    served = 0
    for sample in OPS[name].sample_inputs(DEVICE, dtype, requires_grad=True):
        given = (sample.input, *sample.args)
        tensors = [t for t in (*given, *sample.kwargs.values()) if isinstance(t, Tensor)]
        tensors = [t for t in tensors if t.requires_grad]

        try:
            losses = [getattr(module, name)(*given, **sample.kwargs) for module in (ours, theirs)]
        except fastopt.BackendUnavailable:
            continue
        served += 1
        torch.testing.assert_close(*losses, equal_nan=True)
        upstream = torch.full_like(losses[0], 0.7)
        grads = [torch.autograd.grad(loss, tensors, upstream, allow_unused=True) for loss in losses]
        torch.testing.assert_close(*grads, equal_nan=True)
    assert served >= 2


@pytest.mark.parametrize("info", MODULES, ids=lambda info: info.name)
def test_modules(info: Any) -> None:
    served = 0
    for sample in info.module_inputs_func(info, DEVICE, torch.float64, True, training=True):
        made, given = sample.constructor_input, sample.forward_input
        kind = info.name[3:]
        module = getattr(fastopt.nn, kind)(*made.args, **made.kwargs).to(DEVICE, torch.float64)
        reference = getattr(torch.nn, kind)(*made.args, **made.kwargs).to(DEVICE, torch.float64)
        try:
            found = module(*given.args, **given.kwargs)
        except fastopt.BackendUnavailable:
            continue
        served += 1
        torch.testing.assert_close(found, reference(*given.args, **given.kwargs))
    assert served >= 2


# -- sizes, layouts, dtypes ---------------------------------------------------------------


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@EACH_CALL
def test_sizes(name: str, options: dict[str, Any], shape: tuple[int, ...]) -> None:
    """In float64 as torch, in float32 no further from that."""
    exact = columns(name, shape, torch.float64)
    given = rest(name, shape, torch.float64, options)
    assert_same(name, exact, given)
    assert_accurate(name, exact, given, torch.float32, "none")


def assert_accurate(
    name: str, exact: tuple[Tensor, ...], given: dict[str, Any], dtype: torch.dtype, reduction: str
) -> None:
    """No further from the exact result than torch, but for the last digits."""
    tensors = wanted(tuple(t.to(dtype) for t in exact))
    exact = wanted(tuple(t.double() for t in tensors))
    narrow, wide = (
        {k: v.to(d) if k == "weight" else v for k, v in given.items()}
        for d in (dtype, torch.float64)
    )
    how = {"reduction": reduction}
    oracle = outcome(theirs, name, exact, wide | how)
    terms: list[Tensor | None] = [None] * len(oracle)
    if "triplet" in name:  # a difference of distances
        terms[0] = theirs.pairwise_distance(exact[0], exact[1], p=given.get("p", 2))
    found = outcome(ours, name, tensors, narrow | how)
    torchs = outcome(theirs, name, tensors, narrow | how)
    for each in zip(found, torchs, oracle, terms, strict=True):
        assert_as_accurate(*each)


@pytest.mark.parametrize("name", ["multilabel_soft_margin_loss", "triplet_margin_loss", DISTANCE])
def test_many_dimensions(name: str) -> None:
    assert_same(name, columns(name, (2, 3, 4, 5), torch.float32), {})


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.t().contiguous().t(),
    "classes sliced": lambda t: t.repeat_interleave(2, 1)[:, ::2],
    "rows sliced": lambda t: torch.cat([t, t + 1, t], 1)[:, t.shape[1] : 2 * t.shape[1]] - 1,
    "a window": lambda t: torch.cat([t, t], 1)[:, : t.shape[1]],
    "rows expanded": lambda t: t[:1].expand(t.shape),
    "rows expanded, classes sliced": lambda t: t.repeat_interleave(2, 1)[:1, ::2].expand(t.shape),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@EACH_LOSS
def test_layouts(name: str, layout: str) -> None:
    given = rest(name, (9, 33), torch.float32, {})
    tensors = tuple(LAYOUTS[layout](t) for t in columns(name, (9, 33), torch.float32))
    found = outcome(ours, name, wanted(tensors), given)
    compact = tuple(t.contiguous() for t in tensors)
    torch.testing.assert_close(found, outcome(theirs, name, wanted(compact), given))
    assert [t.stride() for t in tensors] == [LAYOUTS[layout](t).stride() for t in compact]


def test_strided_weights_labels_and_signs() -> None:
    x = columns(LABELS, (9, 6), torch.float32)
    weight, target = torch.rand(12, device=DEVICE)[::2], torch.arange(18, device=DEVICE)[::2] % 6
    assert_same(LABELS, x, {"target": target, "weight": weight})
    signs = torch.tensor([1, 0, -1, 0] * 9, device=DEVICE)[::2][:9]
    pair = columns("cosine_embedding_loss", (9, 6), torch.float32)
    assert_same("cosine_embedding_loss", pair, {"target": signs})


@pytest.mark.parametrize("dtype", HALF, ids=str)
@EACH_LOSS
def test_halves(name: str, dtype: torch.dtype) -> None:
    if name == LABELS and DEVICE == "cpu":
        pytest.skip("torch has none")
    for shape in ((130, 7), (3, 600)):
        given = rest(name, shape, dtype, OPTIONS[name][1])
        for reduction in ("mean", "none"):
            assert_accurate(name, columns(name, shape, torch.float64), given, dtype, reduction)


def test_mixed_dtypes() -> None:
    a, p, n = columns("triplet_margin_loss", (5, 6), torch.float64)
    assert_same("triplet_margin_loss", (a, p.float(), n.float()), {})
    x, t = columns("multilabel_soft_margin_loss", (5, 6), torch.float32)
    weight = torch.rand(6, dtype=torch.float64, device=DEVICE)
    assert_same("multilabel_soft_margin_loss", (x, t), {"weight": weight})
    integers = {"target": (t > 0.5).long()}
    assert_same("multilabel_soft_margin_loss", (x,), integers)


@pytest.mark.skipif(DEVICE != "cpu", reason="other devices have lists of their own")
@pytest.mark.parametrize("name", [LABELS, "cosine_embedding_loss", "triplet_margin_loss"])
def test_autocast(name: str) -> None:
    """float32 results of half-precision operands, and gradients in their dtype."""
    tensors = wanted(columns(name, (5, 6), torch.bfloat16))
    given = rest(name, (5, 6), torch.float32, {})
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = getattr(ours, name)(*tensors, **given)
        expected = getattr(theirs, name)(*tensors, **given)
    torch.testing.assert_close(found, expected)
    grads = [torch.autograd.grad(loss, tensors) for loss in (found, expected)]
    torch.testing.assert_close(*grads)


@EACH_LOSS
def test_no_rows(name: str) -> None:
    """The mean is NaN (of multi_margin_loss torch's is what was in memory), the sum is 0."""
    given = rest(name, (0, 4), torch.float32, {})
    tensors = wanted(columns(name, (0, 4), torch.float32))
    values = [getattr(ours, name)(*tensors, **given, reduction=r) for r in ("mean", "sum", "none")]
    assert values[0].isnan()
    assert values[1] == 0
    assert values[2].shape == (0,)
    assert [g.shape for g in torch.autograd.grad(values[1], tensors)] == [(0, 4)] * len(tensors)


# -- derivatives --------------------------------------------------------------------------


@EACH_LOSS
def test_each_gradient_alone(name: str) -> None:
    given = rest(name, (4, 5), torch.float32, OPTIONS[name][-1])
    tensors = columns(name, (4, 5), torch.float32)
    for k in range(len(tensors)):
        some = tuple(t.clone().requires_grad_(j == k) for j, t in enumerate(tensors))
        grads = [
            torch.autograd.grad(getattr(module, name)(*some, **given), some[k])
            for module in (ours, theirs)
        ]
        torch.testing.assert_close(*grads)


@EACH_LOSS
def test_second_derivatives(name: str) -> None:
    if name == LABELS:
        pytest.skip("torch has none")
    given = rest(name, (4, 5), torch.float64, {})
    tensors = wanted(columns(name, (4, 5), torch.float64))
    found = []
    for module in (ours, theirs):
        loss = getattr(module, name)(*tensors, **given)
        grads = torch.autograd.grad(loss, tensors, create_graph=True)
        total = functools.reduce(torch.add, [(g**2).sum() for g in grads])
        found.append(torch.autograd.grad(total, tensors))
    torch.testing.assert_close(*found)


def test_a_tensor_given_twice() -> None:
    (x, _) = columns("cosine_embedding_loss", (4, 5), torch.float64)
    x.requires_grad_()
    target = -torch.ones(4, device=DEVICE)
    grads = [
        torch.autograd.grad(module.triplet_margin_loss(x, x, x), x)
        + torch.autograd.grad(module.cosine_embedding_loss(x, x, target), x)
        for module in (ours, theirs)
    ]
    torch.testing.assert_close(*grads)


@EACH_LOSS
def test_backward_twice_and_scaled(name: str) -> None:
    given = rest(name, (40, 5), torch.float32, {})
    tensors = wanted(columns(name, (40, 5), torch.float32))
    loss = getattr(ours, name)(*tensors, **given)
    first = torch.autograd.grad(loss, tensors, retain_graph=True)
    again = torch.autograd.grad(loss, tensors, torch.tensor(3.0, device=DEVICE), retain_graph=True)
    torch.testing.assert_close(tuple(3 * g for g in first), again)
    expected = torch.autograd.grad(getattr(theirs, name)(*tensors, **given), tensors)
    torch.testing.assert_close(first, expected)


@pytest.mark.skipif(BACKEND != "numba", reason="a matter of threads")
@EACH_LOSS
def test_same_bits_for_any_number_of_threads(name: str) -> None:
    given = rest(name, (5000, 33), torch.float32, {})
    tensors = wanted(columns(name, (5000, 33), torch.float32))
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        found.append(outcome(ours, name, tensors, given))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


# -- extreme values -----------------------------------------------------------------------

SPECIAL = (
    0.0,
    -0.0,
    1.0,
    -1.0,
    30.0,
    -30.0,
    90.0,
    -90.0,
    float("inf"),
    -float("inf"),
    float("nan"),
)


@pytest.mark.parametrize("dtype", WIDE, ids=str)
@EACH_CALL
def test_special_values(name: str, options: dict[str, Any], dtype: torch.dtype) -> None:
    """Every pair of them, among classes that have none."""
    first = torch.tensor(SPECIAL, dtype=dtype, device=DEVICE).repeat_interleave(len(SPECIAL))
    second = torch.tensor(SPECIAL, dtype=dtype, device=DEVICE).repeat(len(SPECIAL))
    tensors = [t.clone() for t in columns(name, (len(first), 4), dtype)]
    tensors[0][:, 1] = first
    tensors[-1][:, 1 if len(tensors) > 1 else 2] = second
    given = rest(name, (len(first), 4), dtype, options)
    close = {}
    if name == "triplet_margin_loss" and dtype == torch.float32:
        # what is left of a difference of sums as large as the values, each rounded several times
        close = {"rtol": 1.3e-6, "atol": 8 * 90 * torch.finfo(dtype).eps}
    for reduction in ("none", "mean"):
        arguments = (name, wanted(tuple(tensors)), {**given, "reduction": reduction})
        torch.testing.assert_close(
            outcome(ours, *arguments), outcome(theirs, *arguments), equal_nan=True, **close
        )


@EACH_CALL
def test_equal_vectors(name: str, options: dict[str, Any]) -> None:
    """Distances of 0, equal distances, angles of 0, and vectors of zeros."""
    x = torch.randn(6, 5, device=DEVICE)
    zeros = torch.zeros_like(x)
    given = rest(name, (6, 5), torch.float32, options)
    if name == "triplet_margin_loss":
        given["eps"] = 0.0
    for first, second in ((x, x), (x, zeros), (zeros, x), (zeros, zeros), (x, -x), (x, x + 1.0)):
        many = len(columns(name, (1, 1), torch.float32))
        assert_same(name, (first, second, second)[:many], given)
        assert_same(name, (first, second, first)[:many], given)


def test_hinges_at_their_corner() -> None:
    """A value of exactly 0 passes its gradient, as torch's clamp does."""
    a = torch.zeros(2, 4, device=DEVICE)
    n = torch.full((2, 4), 0.5, device=DEVICE)
    assert_same("triplet_margin_loss", (a, a, n), {"margin": 1.0, "eps": 0.0})
    assert_same("triplet_margin_loss", (a, a, n), {"margin": 2.0, "eps": 0.0, "p": 1})
    one = torch.tensor([[3.0, 0.0], [3.0, 4.0]], device=DEVICE)
    other = torch.tensor([[0.0, 4.0], [3.0, 4.0]], device=DEVICE)
    signs = torch.tensor([-1, -1], device=DEVICE)
    assert_same("cosine_embedding_loss", (one, other), {"target": signs, "margin": 1.0})
    scores = torch.tensor([[1.0, 0.0, 0.5]], device=DEVICE)
    assert_same(LABELS, (scores,), {"target": torch.tensor([0], device=DEVICE)})


def test_signs_that_are_none() -> None:
    """Where the target is neither 1 nor -1 the loss is 0, and so is the gradient."""
    pair = columns("cosine_embedding_loss", (6, 5), torch.float64)
    for target in ([0, 2, -2, 1, -1, 3], [0.5, float("nan"), 1.0, -1.0, 1e-3, float("inf")]):
        signs = torch.tensor(target, device=DEVICE)
        signs = signs.double() if signs.is_floating_point() else signs
        assert_same("cosine_embedding_loss", pair, {"target": signs})


def test_confident_rows() -> None:
    """Gradients far below the last digit of 1 are there, to the digit."""
    for dtype, scale in ((torch.float32, 80.0), (torch.float64, 600.0)):
        x = torch.tensor([[scale, -scale, scale / 2, -scale / 2]] * 2, dtype=dtype, device=DEVICE)
        t = torch.tensor([[1, 0, 1, 0], [0, 1, 0, 1]], dtype=dtype, device=DEVICE)
        x.requires_grad_()
        (found,) = torch.autograd.grad(ours.multilabel_soft_margin_loss(x, t), x)
        expected = (torch.sigmoid(-x[0]) * -t[0] + torch.sigmoid(x[0]) * (1 - t[0])) / 8
        torch.testing.assert_close(found[0], expected, rtol=1e-5, atol=0)
        assert (found[0] != 0).all()


# -- what torch has to say ----------------------------------------------------------------


@pytest.mark.skipif(DEVICE != "cpu", reason="an assert of the device")
@pytest.mark.parametrize("bad", [-1, 5, 2**40, -(2**40)])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_labels_out_of_bounds(bad: int, reduction: str) -> None:
    torch.set_num_threads(2)
    x = torch.randn(70_000 if BACKEND == "numba" else 300, 5, requires_grad=True)
    target = torch.zeros(len(x), dtype=torch.int64)
    target[-1] = bad
    messages = []
    for module in (ours, theirs):
        with pytest.raises(RuntimeError) as caught:
            module.multi_margin_loss(x, target, reduction=reduction)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]
    target[-1] = 0
    assert_same(LABELS, (x,), {"target": target})


REFUSED: dict[str, tuple[Callable[[Any], Tensor], str]] = {
    "p": (lambda f: f.triplet_margin_loss(*[torch.rand(3, 4)] * 3, p=3), "p=3"),
    "p inf": (lambda f: f.triplet_margin_loss(*[torch.rand(3, 4)] * 3, p=float("inf")), "p=inf"),
    "broadcast": (
        lambda f: f.triplet_margin_loss(torch.rand(3, 4), torch.rand(3, 4), torch.rand(1, 4)),
        "a negative of size (1, 4) for (3, 4)",
    ),
    "one label": (
        lambda f: f.multi_margin_loss(torch.rand(4), torch.tensor([1])),
        "a target of size (1,) for (4,)",
    ),
    "one sign": (
        lambda f: f.cosine_embedding_loss(torch.rand(3, 4), torch.rand(3, 4), torch.ones(1)),
        "a target of size (1,)",
    ),
    "double signs": (
        lambda f: f.cosine_embedding_loss(
            torch.rand(3, 4), torch.rand(3, 4), torch.ones(3, dtype=torch.float64)
        ),
        "a target of dtype torch.float64",
    ),
    "bytes": (
        lambda f: f.multilabel_soft_margin_loss(
            torch.rand(3, 4), torch.ones(3, 4, dtype=torch.uint8)
        ),
        "a target of dtype torch.uint8",
    ),
    "weights of rows": (
        lambda f: f.multilabel_soft_margin_loss(
            torch.rand(3, 4), torch.rand(3, 4), torch.rand(3, 1)
        ),
        "a weight of size (3, 1)",
    ),
    "no classes": (
        lambda f: f.triplet_margin_loss(*[torch.rand(3, 0)] * 3),
        "an anchor of size (3, 0)",
    ),
    "a distance": (
        lambda f: f.triplet_margin_with_distance_loss(
            *[torch.rand(3, 4)] * 3, distance_function=torch.nn.CosineSimilarity()
        ),
        "distance_function=CosineSimilarity()",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_left_to_torch(case: str) -> None:
    call, reason = REFUSED[case]
    torch.manual_seed(1)
    with pytest.raises(fastopt.BackendUnavailable, match=r"(?s).*") as caught:
        call(ours)
    assert reason in str(caught.value)
    torch.manual_seed(1)
    expected = call(theirs)
    torch.manual_seed(1)
    with fastopt.use_backend("reference"):
        torch.testing.assert_close(call(ours), expected, rtol=0, atol=0, equal_nan=True)


WRONG: dict[str, Callable[[Any], Tensor]] = {
    "a margin of 0": lambda f: f.triplet_margin_loss(*[torch.rand(3, 4)] * 3, margin=0),
    "p": lambda f: f.multi_margin_loss(torch.rand(3, 4), torch.tensor([0, 1, 2]), p=3),
    "int32 labels": lambda f: f.multi_margin_loss(torch.rand(3, 4), torch.ones(3).int()),
    "double weights": lambda f: f.multi_margin_loss(
        torch.rand(3, 4), torch.tensor([0, 1, 2]), weight=torch.ones(4).double()
    ),
    "too few weights": lambda f: f.multi_margin_loss(
        torch.rand(3, 4), torch.tensor([0, 1, 2]), weight=torch.ones(3)
    ),
    "a gradient to weights": lambda f: f.multi_margin_loss(
        torch.rand(3, 4), torch.tensor([0, 1, 2]), weight=torch.ones(4, requires_grad=True)
    ),
    "three dimensions": lambda f: f.multi_margin_loss(torch.rand(2, 3, 4), torch.ones(2, 3).long()),
    "halves": lambda f: f.multi_margin_loss(torch.rand(3, 4).half(), torch.tensor([0, 1, 2])),
    "two dimensions of signs": lambda f: f.cosine_embedding_loss(
        torch.rand(2, 3, 4), torch.rand(2, 3, 4), torch.ones(2, 3)
    ),
    "logical signs of labels": lambda f: f.multilabel_soft_margin_loss(
        torch.rand(3, 4), torch.ones(3, 4) > 0
    ),
    "no target": lambda f: f.multilabel_soft_margin_loss(torch.rand(3, 4), None),
    "sizes": lambda f: f.multilabel_soft_margin_loss(torch.rand(3, 4), torch.rand(3, 5)),
    "dimensions": lambda f: f.triplet_margin_loss(
        torch.rand(3, 4), torch.rand(3, 4), torch.rand(4)
    ),
    "a reduction": lambda f: f.cosine_embedding_loss(
        torch.rand(3, 4), torch.rand(3, 4), torch.ones(3), reduction="batchmean"
    ),
}


@pytest.mark.skipif(DEVICE != "cpu", reason="torch's errors on the CPU")
@pytest.mark.parametrize("case", WRONG)
def test_errors_are_torchs(case: str) -> None:
    errors = []
    for module in (theirs, ours):
        with pytest.raises(Exception, match=r"(?s).*") as caught:
            WRONG[case](module)
        errors.append((type(caught.value), str(caught.value)))
    assert errors[0] == errors[1]


@pytest.mark.skipif(DEVICE != "cpu", reason="other devices have lists of their own")
@pytest.mark.parametrize("name", ["multilabel_soft_margin_loss", DISTANCE])
def test_autocast_that_leaves_parts_alone(name: str) -> None:
    tensors = columns(name, (5, 6), torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16), fastopt.use_backend("reference"):
        torch.testing.assert_close(
            getattr(ours, name)(*tensors), getattr(theirs, name)(*tensors), rtol=0, atol=0
        )
        assert "autocast" in str(fastopt.explain(getattr(ours, name), *tensors))


# -- distances ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "distance",
    [None, torch.nn.PairwiseDistance(), theirs.pairwise_distance],
    ids=["none", "module", "function"],
)
def test_default_distance(distance: Any) -> None:
    assert_same(DISTANCE, columns(DISTANCE, (5, 6), torch.float32), {"distance_function": distance})
    criterion = fastopt.nn.TripletMarginWithDistanceLoss(distance_function=distance)
    explained = str(fastopt.explain(criterion, *columns(DISTANCE, (5, 6), torch.float32)))
    assert f": {BACKEND}" in explained


def hooked() -> torch.nn.Module:
    distance = torch.nn.PairwiseDistance()
    distance.register_forward_hook(lambda module, args, result: 2 * result)
    return distance


def patched() -> torch.nn.Module:
    distance = torch.nn.PairwiseDistance()
    distance.forward = lambda x, y: (x - y).abs().sum(-1)  # type: ignore[method-assign]
    return distance


class Farther(torch.nn.PairwiseDistance):
    def forward(self, x1: Tensor, x2: Tensor) -> Tensor:
        return 3 * super().forward(x1, x2)


@pytest.mark.parametrize(
    "make",
    [
        hooked, patched, Farther, lambda: torch.nn.PairwiseDistance(eps=1.0),
        lambda: torch.nn.PairwiseDistance(1.0), lambda: lambda x, y: (x - y).abs().amax(-1),
    ],
)  # fmt: skip
def test_other_distances(make: Callable[[], Any]) -> None:
    tensors, distance = columns(DISTANCE, (5, 6), torch.float64), make()
    expected = torch.nn.TripletMarginWithDistanceLoss(distance_function=distance)(*tensors)
    with fastopt.use_backend("reference"):
        found = fastopt.nn.TripletMarginWithDistanceLoss(distance_function=distance)(*tensors)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    with pytest.raises(fastopt.BackendUnavailable, match="distance_function="):
        fastopt.nn.TripletMarginWithDistanceLoss(distance_function=distance)(*tensors)

"""Random calls of losses, element by element against torch.

The longer run is `HYPOTHESIS_PROFILE=fuzz`. What is right is defined once, in fuzzing.py.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import hypothesis.strategies as st
import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, FLOATS, LOSSES, REDUCTIONS
from fuzzing import (
    SIZES,
    assert_right,
    compute_dtype,
    fuzzed,
    identical,
    layouts,
    shaken,
    values,
)
from hypothesis import assume, given
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours

FLOAT64_AND_HALF = "float64 with float64 and float32 only"
POINTWISE = sorted({case.operation for case in LOSSES} - {"cross_entropy"})


class Outcome(NamedTuple):
    loss: Tensor
    grads: tuple[Tensor, ...] = ()
    grad_output: Tensor | None = None


Loss = Callable[..., Tensor]


def outcome(
    function: Loss, tensors: Sequence[Tensor], needs: Sequence[bool], upstream: Any
) -> Outcome:
    leaves = [t.detach().requires_grad_(n) for t, n in zip(tensors, needs, strict=True)]
    loss = function(*leaves)
    wanted = [t for t in leaves if t.requires_grad]
    if not wanted:
        return Outcome(loss)
    assert loss.requires_grad
    given = upstream(loss)
    return Outcome(loss.detach(), torch.autograd.grad(loss, wanted, given), given)


@st.composite
def upstreams(draw: st.DrawFn, reduction: str) -> Callable[[Tensor], Tensor]:
    """Makes a grad_output for a loss; for the oracle, of the same values."""
    kind = draw(st.sampled_from(("one", "number", "each", "expanded")))
    number = draw(st.sampled_from((0.37, 0.0, -2.0, 1024.0, 1.0)))
    given_values = draw(values(scales=(1.0,)))
    dtype: list[torch.dtype] = []

    def make(loss: Tensor) -> Tensor:
        dtype.append(loss.dtype)  # the first one to ask is the call under test
        if kind == "one":
            return torch.ones_like(loss)
        if kind == "each" and reduction == "none":
            generator = torch.Generator().manual_seed(given_values.seed)
            made = torch.randn(loss.shape, generator=generator, dtype=torch.float64).to(dtype[0])
            return made.to(loss.dtype)
        one = torch.tensor(number, dtype=torch.float64).to(dtype[0]).to(loss.dtype)
        return one.expand(loss.shape) if kind == "expanded" else one.expand(loss.shape).clone()

    return make


def converted(tensors: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    return [t.to(dtype) if t.is_floating_point() else t for t in tensors]


def differences(
    function: Loss,
    tensors: Sequence[Tensor],
    upstream: Callable[[Tensor], Tensor],
    compute: torch.dtype,
) -> Tensor:
    """Of what size the two numbers are whose difference each logit's gradient is.

    They are d and p sum(d), with d the gradient of the log-probabilities. It does not depend on
    the logits: beside a class that has all of the probability the others' gradients are d.
    A p that is no normal number in the dtype computed in has no digits to count on.
    """
    x, target, *weight = tensors
    dim = min(1, x.dim() - 1)
    one = torch.zeros_like(x.narrow(dim, 0, 1))
    if target.is_floating_point():
        target = torch.cat((target, one), dim)
    certain = torch.cat((torch.zeros_like(x), one + 1e4), dim)
    weight = [torch.cat((w, w.new_ones(1))) for w in weight]
    needs = [True, False] + [False] * len(weight)
    (grad,) = outcome(function, [certain, target, *weight], needs, upstream).grads
    d = grad.narrow(dim, 0, x.shape[dim]).nan_to_num(0, 0, 0).abs()
    limits = torch.finfo(compute)
    p = x.softmax(dim).nan_to_num(0).clamp_min(limits.smallest_normal / limits.eps)
    return d + p * d.sum(dim, keepdim=True)


def check_loss(
    operation: str,
    options: dict[str, Any],
    tensors: Sequence[Tensor],
    needs: Sequence[bool],
    upstream: Callable[[Tensor], Tensor],
    refused: Sequence[str] | None,
    shake: bool,
    softmax: bool = False,
    ignored: Tensor | None = None,
) -> None:
    """Compare a call with torch's.

    refused: why the backend can't serve it, parts of its reasons; None if it may or may not.
    softmax: the first tensor holds logits, whose gradient is a difference that may cancel.
    ignored: positions of the logits whose gradient is 0 by definition, even where those are NaN.
    """

    def mine(*t: Tensor) -> Tensor:
        return getattr(ours, operation)(*t, **options)

    def torchs(*t: Tensor) -> Tensor:
        return getattr(theirs, operation)(*t, **options)

    before = [(t.clone(), t._version) for t in tensors]
    if refused or refused is None:
        if refused:
            with fastopt.use_backend(BACKEND), pytest.raises(fastopt.BackendUnavailable) as error:
                mine(*tensors)
            assert all(reason in str(error.value) for reason in refused)
        found = outcome(mine, tensors, needs, upstream)
        right = outcome(torchs, tensors, needs, upstream)
        for a, b in zip((found.loss, *found.grads), (right.loss, *right.grads), strict=True):
            assert identical(a, b)
        return
    with fastopt.use_backend(BACKEND):
        found = outcome(mine, tensors, needs, upstream)
    for t, (values_before, version) in zip(tensors, before, strict=True):
        assert identical(t, values_before)
        assert t._version == version
    compute = compute_dtype(*tensors)
    right = outcome(torchs, tensors, needs, upstream)
    wide = outcome(torchs, converted(tensors, compute), needs, upstream)
    oracle = outcome(torchs, converted(tensors, torch.float64), needs, upstream)
    eps = torch.finfo(compute).eps
    nearby = [
        outcome(torchs, [shaken(t, eps, pattern) for t in tensors], needs, upstream)
        for pattern in range(4 if shake else 0)
    ]
    losses = (right.loss, wide.loss)
    assert_right("loss", found.loss, losses, oracle.loss, [n.loss for n in nearby], compute)
    size: float | Tensor = 0.0
    if softmax and found.grads:
        size = differences(torchs, converted(tensors, torch.float64), upstream, compute)
    for k, (m, *t, o) in enumerate(
        zip(found.grads, right.grads, wide.grads, oracle.grads, strict=True)
    ):
        if ignored is not None:
            assert (m[ignored] == 0).all()
            t, o = [g.masked_fill(ignored, 0) for g in t], o.masked_fill(ignored, 0)
        others = [n.grads[k] for n in nearby]
        assert_right(f"gradient {k}", m, t, o, others, compute, size)


@pytest.mark.parametrize("operation", POINTWISE)
@fuzzed
@given(data=st.data())
def test_pointwise(operation: str, data: st.DataObject) -> None:
    draw = data.draw
    shape = draw(st.lists(SIZES, max_size=4).filter(lambda s: math.prod(s) < 20_000), "shape")
    dtypes = draw(
        st.one_of(
            st.sampled_from(FLOATS).map(lambda d: (d, d)),
            st.sampled_from(list(itertools.permutations(FLOATS, 2))),
        ),
        "dtypes",
    )
    layout = draw(layouts(len(shape)), "layout")
    other = draw(st.one_of(st.just(layout), layouts(len(shape))), "target's layout")
    tensors = []
    for dtype, where in zip(dtypes, (layout, other), strict=True):
        tensors.append(where.place(draw(values(), "values").make(shape, dtype)))
    if draw(st.booleans(), "equal elements") and tensors[0].numel():
        same = tensors[0].flatten()[:3].to(dtypes[1])
        if other.expanded is None:
            tensors[1][(0,) * len(shape)] = same[0]
    reduction = draw(st.sampled_from(REDUCTIONS), "reduction")
    options = draw(st.sampled_from([c.options for c in LOSSES if c.operation == operation]))
    needs = draw(st.sampled_from(((True, False), (False, True), (True, True), (False, False))))
    refused = []
    if torch.float64 in dtypes and {torch.bfloat16, torch.float16} & set(dtypes):
        refused.append(FLOAT64_AND_HALF)
    check_loss(
        operation, {**options, "reduction": reduction}, tensors, needs,
        draw(upstreams(reduction), "grad_output"), refused, shake=False,
    )  # fmt: skip


def is_one_stride(x: Tensor) -> bool:
    """Whether all dimensions but the first two can be seen as one."""
    try:
        x.movedim(1, -1).view(x.shape[0], -1, x.shape[1])
    except RuntimeError:
        return False
    return True


@fuzzed
@given(data=st.data())
def test_cross_entropy(data: st.DataObject) -> None:
    draw = data.draw
    dtype = draw(st.sampled_from(FLOATS), "dtype")
    classes = draw(st.one_of(st.integers(1, 12), st.sampled_from((64, 79, 80, 81, 300))), "classes")
    around = draw(st.lists(SIZES, max_size=3).filter(lambda s: math.prod(s) < 200), "positions")
    shape = [classes, *around][:1] if not around else [around[0], classes, *around[1:]]
    layout = draw(layouts(len(shape)), "layout")
    x = layout.place(draw(values(), "logits").make(shape, dtype))
    reduction = draw(st.sampled_from(REDUCTIONS), "reduction")
    smoothing = draw(st.sampled_from((0.0, 0.0, 0.1, 0.999, 1.0, 0, 1)), "label_smoothing")
    index = draw(st.sampled_from((-100, -1, 0, classes - 1, 255)), "ignore_index")
    weight = None
    if draw(st.booleans(), "weighted"):
        weight = draw(values((1.0,), tame=True), "weight").make((classes,), dtype)
        if not draw(st.booleans(), "weights of any sign"):
            weight = weight.abs()
        weight = draw(layouts(1), "weight's layout").place(weight)
    options = {"reduction": reduction, "label_smoothing": smoothing, "ignore_index": index}
    needs = [draw(st.sampled_from((True, True, False)), "differentiate"), False]
    refused: list[str] | None = []
    ignored = None
    if len(shape) > 2 and not is_one_stride(x):
        refused.append(f"input of size {tuple(shape)}")
    if draw(st.integers(0, 3), "probabilities") == 0:
        kind = draw(st.sampled_from((dtype, dtype, torch.float32)), "target's dtype")
        target = draw(values((1.0,), tame=True), "target").make(shape, kind)
        target = draw(layouts(len(shape)), "target's layout").place(target)
        options["ignore_index"] = -100
        if not refused and kind != dtype:
            refused.append("probabilities of dtype")
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**20), "target"))
        positions = [*shape[:1], *shape[2:]] if len(shape) > 1 else []
        labels = draw(st.sampled_from((torch.int64, torch.int64, torch.uint8)), "labels")
        target = torch.randint(0, classes, positions, generator=generator)
        legal = labels == torch.int64 or 0 <= index < 256
        if legal and draw(st.booleans(), "some ignored"):
            target[torch.rand(positions, generator=generator) < 0.5] = index
        if labels == torch.uint8:  # else torch refuses it
            assume(len(shape) < 3 and classes <= 256 and not (weight is not None and smoothing))
        target = draw(layouts(len(positions)), "target's layout").place(target.to(labels))
        if target.numel() or x.dim() == 1:
            rows = target == index
            ignored = (rows.unsqueeze(1) if x.dim() > 1 else rows).expand(x.shape)
    tensors = [x, target]
    if weight is not None:
        tensors.append(weight)
        needs.append(False)
    if x.numel() == 0:
        refused = None
    check_loss(
        "cross_entropy", options, tensors, needs, draw(upstreams(reduction), "grad_output"),
        refused, shake=True, softmax=True, ignored=ignored,
    )  # fmt: skip


@pytest.mark.parametrize("shape", [(2, 3, 4), (2, 3, 4, 5)])
@pytest.mark.parametrize("backend", [None, BACKEND])
def test_bytes_as_labels_of_planes(shape: tuple[int, ...], backend: str | None) -> None:
    """Torch takes uint8 class indices of rows only."""
    x, t = torch.randn(shape), torch.zeros(shape[:1] + shape[2:], dtype=torch.uint8)
    with pytest.raises(RuntimeError) as expected:
        theirs.cross_entropy(x, t)
    with (
        fastopt.use_backend(backend) if backend else nullcontext(),
        pytest.raises(RuntimeError) as found,
    ):
        ours.cross_entropy(x, t)
    assert str(found.value) == str(expected.value)

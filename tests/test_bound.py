"""Calls of one kind, for which a loop is bound once: the same bits, the same errors, no tensor."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED, LOSSES, LossCase
from torch import Tensor

import fastopt
from fastopt.front.call import RECORDS
from fastopt.front.route import RouteCache
from fastopt.front.samples import usual
from fastopt.kernels.operation import Elementwise, Rowwise
from fastopt.nn import functional as ours

if INTERPRETED or DEVICE != "cpu":
    pytest.skip("loops for CPUs are bound", allow_module_level=True)

backend: Any = fastopt.dispatch.load(BACKEND)
BIND = backend.bind


pytestmark = [
    pytest.mark.usefixtures("no_crossovers"),
    pytest.mark.filterwarnings("ignore:reduction. .mean. divides"),
]


@pytest.fixture
def served(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each loss: whether what was bound gave it."""
    found: list[bool] = []

    def noted(*arguments: Any) -> Any:
        bound = BIND(*arguments)
        if bound is not None:
            compute = bound._forward

            def forward(*arguments: Any) -> Any:
                result = compute(*arguments)
                found.append(result is not None)
                return result

            bound._forward = forward
        return bound

    monkeypatch.setattr(backend, "bind", noted)
    return found


def outcome(call: Callable[[], Tensor], leaves: list[Tensor]) -> list[Tensor]:
    for leaf in leaves:
        leaf.grad = None
    loss = call()
    loss.backward()
    return [loss.detach(), *[leaf.grad for leaf in leaves if leaf.grad is not None]]


def assert_same_bits(
    call: Callable[..., Tensor], arguments: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two calls in a row, the second one with other numbers."""
    leaves = [t for t in arguments if isinstance(t, Tensor) and t.requires_grad]
    whole = [t for t in leaves if 0 not in t.stride()]  # an expanded one can't be written to
    results = []
    for bind in (BIND, lambda *arguments: None):
        monkeypatch.setattr(backend, "bind", bind)
        RouteCache.forget()
        first = outcome(lambda: call(*arguments), leaves)
        with torch.no_grad():
            for leaf in whole:
                leaf.mul_(0.5)
        again = outcome(lambda: call(*arguments), leaves)
        with torch.no_grad():
            for leaf in whole:
                leaf.mul_(2.0)
        results.append([*first, *again])
    for bound, usual_ in zip(*results, strict=True):
        assert bound.stride() == usual_.stride()
        torch.testing.assert_close(bound, usual_, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", [c for c in LOSSES if c.compiled], ids=str)
def test_same_bits(
    case: LossCase, dtype: torch.dtype, reduction: str, poison: None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    input, *others = case.make(dtype)
    function = getattr(ours, case.operation)
    assert_same_bits(
        lambda *given: function(*given, reduction=reduction, **case.options),
        [input.detach().requires_grad_(), *others],
        monkeypatch,
    )


@pytest.mark.parametrize(
    "name", [n for n, r in RECORDS.items() if issubclass(r, Elementwise | Rowwise)]
)
def test_every_loss(name: str, served: list[bool], monkeypatch: pytest.MonkeyPatch) -> None:
    operation: Any = RECORDS[name]
    for given in usual(operation, 70_016, torch.float32):
        served.clear()
        followed = set(operation.followed)
        arguments = [t.detach().requires_grad_(n in followed) for n, t in given.items()]

        def call(*values: Tensor, given: Any = given) -> Tensor:
            loss: Tensor = getattr(ours, name)(**dict(zip(given, values, strict=True)))
            return loss

        with monkeypatch.context() as patch:
            call(*arguments).backward()
            assert served == [True]
            assert_same_bits(call, arguments, patch)
        RouteCache.forget()


SERVED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": ours.cross_entropy,
    "sum": lambda x, t: ours.cross_entropy(x, t, reduction="sum"),
    "weight": lambda x, t: ours.cross_entropy(x, t, torch.arange(1.0, 71.0)),
    "z loss": lambda x, t: ours.cross_entropy(x, t, z_loss=0.1),
    "softcap": lambda x, t: ours.cross_entropy(x, t, softcap=5.0),
    "half": lambda x, t: ours.cross_entropy(x.half(), t),
    "planes": lambda x, t: ours.cross_entropy(x.view(3, 70, 11), t.view(3, 11)),
}


@pytest.mark.parametrize("which", SERVED)
def test_cross_entropies_served(which: str, served: list[bool]) -> None:
    x, t = torch.randn(33, 70, requires_grad=True), torch.randint(70, (33,))
    for _ in range(2):
        SERVED[which](x, t).backward()
    assert served == [True, True]


def test_what_is_not_bound(served: list[bool]) -> None:
    """Nothing is, or what is leaves it to the backend."""
    x, t = torch.randn(33, 70, requires_grad=True), torch.randint(70, (33,))
    ours.cross_entropy(x, t, label_smoothing=0.1).backward()
    ours.cross_entropy(x, t.repeat_interleave(2)[::2]).backward()
    ours.cross_entropy(x, t, reduction="none").sum().backward()
    ours.cross_entropy(x, torch.rand(33, 70)).backward()
    ours.mse_loss(x, torch.randn(70, 33).t()).backward()
    with torch.no_grad():
        ours.cross_entropy(x, t)
    assert not served
    expected = torch.nn.functional.cross_entropy(x, t)
    for hooks in (False, True):  # under which nothing is computed ahead
        packing = torch.autograd.graph.saved_tensors_hooks(lambda k: k, lambda k: k)
        with packing if hooks else nullcontext():
            torch.testing.assert_close(ours.cross_entropy(x, t), expected)
    assert served == [True]


def test_another_number_of_threads(served: list[bool]) -> None:
    x, t = torch.randn(300, 1000, requires_grad=True), torch.randint(1000, (300,))
    threads, losses = torch.get_num_threads(), []
    try:
        for number in (2, 1, 3, 2):
            torch.set_num_threads(number)
            losses.append(ours.cross_entropy(x, t))
            losses.append(ours.mse_loss(x, x.detach() + 1))
    finally:
        torch.set_num_threads(threads)
    assert served == [True, True, False, False, False, False, True, True]
    for loss in losses[2:]:
        assert any(torch.equal(loss, first) for first in losses[:2])


def test_wrong_labels_later() -> None:
    """After calls that were right, and before a gradient is there."""
    x, t = torch.randn(33, 70, requires_grad=True), torch.randint(70, (33,))
    for _ in range(3):
        ours.cross_entropy(x, t).backward()
    x.grad = None
    t[20] = 70
    with pytest.raises(IndexError, match="Target 70 is out of bounds"):
        ours.cross_entropy(x, t)
    assert x.grad is None


def test_a_wrong_row_label_later() -> None:
    x, t = torch.randn(33, 70, requires_grad=True), torch.randint(70, (33,))
    for _ in range(3):
        ours.multi_margin_loss(x, t).backward()
    x.grad = None
    t[20] = -1
    with pytest.raises(RuntimeError, match="target out of range"):
        ours.multi_margin_loss(x, t)
    assert x.grad is None


@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_other_scales(scale: float, served: list[bool]) -> None:
    """What backward passes ask for goes on being learnt."""
    x, t = torch.randn(33, 70, requires_grad=True), torch.randint(70, (33,))
    expected = torch.autograd.grad(torch.nn.functional.cross_entropy(x, t) * scale, x)
    for _ in range(4):
        found = torch.autograd.grad(ours.cross_entropy(x, t) * scale, x)
        torch.testing.assert_close(found, expected)
    # of another scale than 1 the second call computes no gradient ahead
    assert served == [True] * (4 if scale == 1 else 3)


@pytest.mark.parametrize("name", ["cross_entropy", "mse_loss"])
def test_no_tensor_is_kept(name: str, served: list[bool]) -> None:
    x = torch.randn(33, 70, requires_grad=True)
    second = torch.randint(70, (33,)) if name == "cross_entropy" else torch.randn(33, 70)
    for _ in range(2):
        getattr(ours, name)(x, second).backward()
    assert served == [True, True]
    alive = [weakref.ref(t) for t in (x, second, x.grad)]
    del x, second
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3

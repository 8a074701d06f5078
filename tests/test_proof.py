"""The proof that tensors are what and where they were: by compiled code, and in Python."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

import fastopt
from fastopt.optim import _metadata
from fastopt.optim._kinds import Spans


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(_metadata, "_compiled", lambda: None)
    else:
        assert _metadata._compiled() is not None, "not in this torch, or it answers otherwise"
    return str(request.param)


class Sub(Tensor):
    pass


def some() -> list[Tensor]:
    return [
        Parameter(torch.randn(3, 4)),
        torch.randn(4, 3, dtype=torch.float64).t(),
        torch.randn(()),
        torch.randn(2, 0, 3),
        torch.randn(40)[3:30:2],
        torch.randn(2, 3, 5, 7).to(memory_format=torch.channels_last),
        torch.randint(9, (5,), dtype=torch.uint8),
        torch.randn(6).half(),
    ]


def prove(written: list[Tensor], grads: list[Tensor]) -> tuple[_metadata.Proof, np.ndarray]:
    addresses = np.zeros(len(grads), np.int64)
    return _metadata.prove(written, grads, addresses, Spans(written)), addresses


def test_it_holds_and_finds_others() -> None:
    written, first = some(), some()
    proof, found = prove(written, first)
    for _ in range(3):
        for grads in (first, some(), some()):
            assert proof.holds(written, grads)
            assert found.tolist() == [t.data_ptr() for t in grads]
        for t in (*written, *first):
            if t.is_floating_point():
                t.detach().add_(1)  # values are not what it is about


def test_gradients_among_what_is_written() -> None:
    memory = torch.zeros(100)
    written = [memory[10:20], memory[40:50], torch.zeros(10)]
    proof, found = prove(written, [torch.zeros(10) for _ in range(3)])
    apart = [memory[:10], memory[20:30], memory[30:40]]
    assert proof.holds(written, apart)
    assert found.tolist() == [t.data_ptr() for t in apart]
    for first, inside in ((1, True), (10, True), (11, True), (19, True), (31, True), (49, True),
                          (50, False), (90, False)):  # fmt: skip
        for place in range(3):
            grads = list(apart)
            grads[place] = memory[first : first + 10]
            assert proof.holds(written, grads) is not inside


def by_data(change: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Any]:
    def edit(t: Tensor) -> None:
        t.data = change(t.data)

    return edit


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "moved": by_data(Tensor.clone),
    "dtype": by_data(lambda t: t.view(torch.int32)),
    "transposed": by_data(Tensor.t),
    "transposed in place": Tensor.t_,
    "reshaped": by_data(lambda t: t.view(2, 8)),
    "fewer": by_data(lambda t: t[:2]),
    "one dimension more": by_data(lambda t: t[None]),
    "strides": by_data(lambda t: t.as_strided((4, 4), (1, 4))),
    "sizes": by_data(lambda t: t.as_strided((4, 2), (4, 1))),
    "negated": by_data(torch._neg_view),
    "offset": by_data(lambda t: torch.cat((t[:1], t))[1:]),
    "resized": lambda t: t.resize_(5, 4),
    "released": lambda t: t.untyped_storage().resize_(0),
    "class": lambda t: setattr(t, "__class__", Sub),
    "swapped": lambda t: torch.utils.swap_tensors(t, torch.randn(4, 4)),
    "meta": lambda t: torch.utils.swap_tensors(t, torch.empty(4, 4, device="meta")),
    "sparse": lambda t: torch.utils.swap_tensors(t, torch.eye(4).to_sparse()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_change_is_noticed(edit: Callable[[Tensor], Any], place: int) -> None:
    tensors = [torch.randn(4, 4) for _ in range(3)]
    grads = [torch.randn(4, 4) for _ in range(3)]
    proof, _ = prove(tensors, grads)
    assert proof.holds(tensors, grads)
    edit(tensors[place])
    assert not proof.holds(tensors, grads)
    assert not proof.holds(tensors, grads)


def release(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


OTHERS: dict[str, Callable[[], Any]] = {
    "none": lambda: None,
    "a number": lambda: 3.0,
    "a subclass": lambda: torch.randn(4, 4).as_subclass(Sub),
    "a parameter": lambda: Parameter(torch.randn(4, 4)),
    "dtype": lambda: torch.randn(4, 4).double(),
    "size": lambda: torch.randn(4, 5),
    "dimensions": lambda: torch.randn(4, 4, 1),
    "strides": lambda: torch.randn(4, 4).t(),
    "sparse": lambda: torch.eye(4).to_sparse(),
    "compressed": lambda: torch.eye(4).to_sparse_csr(),
    "device": lambda: torch.empty(4, 4, device="meta"),
    "negated": lambda: torch._neg_view(torch.randn(4, 4)),
    "complex": lambda: torch.randn(4, 4, dtype=torch.complex64),
    "released": lambda: release(torch.randn(4, 4)),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_what_is_not_alike(
    make: Callable[[], Any], place: int, capfd: pytest.CaptureFixture[str]
) -> None:
    written = [torch.randn(4, 4) for _ in range(3)]
    others: list[Any] = [torch.randn(4, 4) for _ in range(3)]
    proof, _ = prove(written, others)
    assert proof.holds(written, others)
    others[place] = make()
    assert not proof.holds(written, others)
    assert not capfd.readouterr().err, "torch wrote down an error of ours"


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("which", ["parameter", "gradient"])
def test_released_memory_is_an_error(which: str, later: bool) -> None:
    """In torch it ends the process."""
    p, other = Parameter(torch.randn(100)), Parameter(torch.randn(3))
    optimizer = fastopt.optim.SGD([other, p], lr=0.1)
    for t in (p, other):
        t.grad = torch.randn_like(t)
    if later:
        optimizer.step()
        optimizer.step()
    before = other.detach().clone()
    tensor = p if which == "parameter" else p.grad
    assert tensor is not None
    tensor.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match=rf"a {which} of size \(100,\) has no memory"):
        optimizer.step()
    assert torch.equal(other, before)


def test_it_keeps_nothing_alive() -> None:
    tensors = [torch.randn(4, 4), torch.randn(4, 4)]
    proof, _ = prove(tensors[:1], tensors[1:])
    gone = list(map(weakref.ref, tensors))
    tensors.clear()
    gc.collect()
    assert [t() for t in gone] == [None, None]
    del proof


def test_versions() -> None:
    tensors = [torch.randn(3), Parameter(torch.randn(3)), torch.randn(3)[1:]]
    versions = _metadata.Versions(tensors)
    for k in range(3):
        before = [t._version for t in tensors]
        versions.increment()
        assert [t._version for t in tensors] == [v + 1 for v in before], k
    saved = tensors[1] * tensors[1]
    versions.increment()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_versions_of_inference_mode() -> None:
    """Its tensors have none. Torch passes over them; asked for the version it raises."""
    with torch.inference_mode():
        unversioned, other = torch.randn(3), torch.randn(3)
    plain = torch.randn(3)
    mixed = _metadata.Versions([plain, unversioned])
    for k in range(3):
        with torch.inference_mode(k == 0):
            mixed.increment()
    assert plain._version == 3
    tensors = [torch.randn(3), torch.randn(3)]
    versions = _metadata.Versions(tensors)
    versions.increment()
    versions.increment()
    torch.utils.swap_tensors(tensors[1], other)  # the process would end here
    versions.increment()
    assert tensors[0]._version == 3

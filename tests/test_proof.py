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
from fastopt.kernels.tables import DIFFERENT, EMPTY
from fastopt.optim import _proof


@pytest.fixture(params=["compiled", "python"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(_proof, "_compiled", lambda: None)
    else:
        assert _proof._compiled() is not None, "not in this torch, or it answers otherwise"
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


class Proved:
    """A proof, and the addresses that it writes down."""

    def __init__(self, written: list[Tensor], grads: list[Tensor]) -> None:
        self._cells = [np.zeros(len(ts), np.int64) for ts in (written, grads)]
        cells = [c.ctypes.data + 8 * np.arange(len(c)) for c in self._cells]
        owners = [k % len(grads) for k in range(len(written))]
        self._proof = _proof.Proof(written, owners, [(g, None) for g in grads], *cells)

    def holds(self, written: list[Tensor], grads: list[Any]) -> bool:
        return self._proof.look(written, grads) != DIFFERENT

    @property
    def written(self) -> list[int]:
        return self._cells[0].tolist()

    @property
    def grads(self) -> list[int]:
        return self._cells[1].tolist()


def addresses(tensors: list[Any]) -> list[int]:
    return [0 if t is None else t.data_ptr() if t.numel() else EMPTY for t in tensors]


def test_it_holds_and_finds_others() -> None:
    written, first = some(), some()
    proof = Proved(written, first)
    for _ in range(3):
        for grads in (first, some(), some()):
            assert proof.holds(written, grads)
            assert (proof.written, proof.grads) == (addresses(written), addresses(grads))
        for t in (*written, *first):
            if t.is_floating_point():
                t.detach().add_(1)  # values are not what it is about


def test_gradients_among_what_is_written() -> None:
    memory = torch.zeros(100)
    written = [memory[10:20], memory[40:50], torch.zeros(10)]
    proof = Proved(written, [torch.zeros(10) for _ in range(3)])
    apart = [memory[:10], memory[20:30], memory[30:40]]
    assert proof.holds(written, apart)
    assert proof.grads == addresses(apart)
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


def by_inference(t: Tensor) -> None:
    with torch.inference_mode():
        torch.utils.swap_tensors(t, torch.randn(4, 4))


def release(t: Tensor) -> Tensor:
    t.untyped_storage().resize_(0)
    return t


MOVES: dict[str, Callable[[Tensor], Any]] = {
    "moved": by_data(Tensor.clone),
    "offset": by_data(lambda t: torch.cat((t[:1], t))[1:]),
    "swapped": lambda t: torch.utils.swap_tensors(t, torch.randn(4, 4)),
}


@pytest.mark.parametrize("edit", MOVES.values(), ids=MOVES)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_new_memory_is_written_down(edit: Callable[[Tensor], Any], place: int) -> None:
    tensors = [torch.randn(4, 4) for _ in range(3)]
    grads = [torch.randn(4, 4) for _ in range(3)]
    proof = Proved(tensors, grads)
    assert proof.holds(tensors, grads)
    before = proof.written
    edit(tensors[place])
    assert proof.holds(tensors, grads)
    assert proof.written == addresses(tensors)
    assert [a != b for a, b in zip(before, proof.written, strict=True)] == [
        k == place for k in range(3)
    ]


def test_other_objects_of_the_same_kind() -> None:
    proof = Proved(some(), some())
    for _ in range(3):
        tensors, grads = some(), some()
        assert proof.holds(tensors, grads)
        assert (proof.written, proof.grads) == (addresses(tensors), addresses(grads))


@pytest.mark.parametrize("count", [3, 50, 400])
def test_moved_memory_that_overlaps(count: int) -> None:
    """In any order; next to each other is apart."""
    torch.manual_seed(count)
    memory, grads = torch.zeros(10 * count + 10), [torch.zeros(10) for _ in range(count)]
    tensors = [torch.zeros(10) for _ in range(count)]
    proof = Proved(tensors, grads)
    assert proof.holds(tensors, grads)
    for _ in range(5):
        order = torch.randperm(count).tolist()
        for t, place in zip(tensors, order, strict=True):
            t.data = memory[10 * place : 10 * place + 10]
        assert proof.holds(tensors, grads)
        assert proof.written == addresses(tensors)
        victim = tensors[order[0]]
        where = (victim.data_ptr() - memory.data_ptr()) // 4
        victim.data = memory[where + 1 : where + 11]
        others = [t for t in tensors if t is not victim]
        overlaps = any(abs(t.data_ptr() - victim.data_ptr()) < 40 for t in others)
        assert proof.holds(tensors, grads) is not overlaps
        victim.data = memory[-10:]
        assert proof.holds(tensors, [memory[-5:].repeat(2), *grads[1:]])
        inside = [torch.zeros(10).as_strided((10,), (1,)), *grads[1:]]
        inside[count // 2] = memory[-10:]
        assert not proof.holds(tensors, inside)


def test_what_has_no_gradient_is_left_alone() -> None:
    """It has no address, may be anything meanwhile, and its memory may be another's."""
    params, states = [torch.zeros(4, 4) for _ in range(3)], [torch.zeros(4, 4) for _ in range(3)]
    grads: list[Any] = [torch.zeros(4, 4) for _ in range(3)]
    proof = Proved(params + states, grads)
    for there in ((1, 1, 1), (0, 1, 0), (0, 0, 0), (1, 0, 1), (1, 1, 1)):
        some = [g if is_there else None for g, is_there in zip(grads, there, strict=True)]
        assert proof.holds(params + states, some)
        masked = [t if there[k % 3] else None for k, t in enumerate(params + states)]
        assert (proof.written, proof.grads) == (addresses(masked), addresses(some))
    some = [grads[0], None, grads[2]]
    for stranger in (params[0].detach(), release(torch.zeros(5, 4)[1:]), torch.zeros(3), None):
        assert proof.holds([params[0], stranger, *params[2:], *states], some)
        assert not proof.holds([params[0], stranger, *params[2:], *states], grads)
    assert proof.holds([*params, *states], [grads[0], None, params[1]])
    assert not proof.holds([*params, *states], [grads[0], grads[1], params[1]])


def test_strides_of_single_elements_mean_nothing() -> None:
    tensors, grads = [torch.zeros(3, 1, 4)], [torch.zeros(3, 1, 4)]
    proof = Proved(tensors, grads)
    assert proof.holds(tensors, [torch.zeros(12).as_strided((3, 1, 4), (4, 99, 1))])
    assert not proof.holds(tensors, [torch.zeros(12).as_strided((3, 1, 4), (1, 4, 3))])


EDITS: dict[str, Callable[[Tensor], Any]] = {
    "dtype": by_data(lambda t: t.view(torch.int32)),
    "transposed": by_data(Tensor.t),
    "transposed in place": Tensor.t_,
    "reshaped": by_data(lambda t: t.view(2, 8)),
    "fewer": by_data(lambda t: t[:2]),
    "one dimension more": by_data(lambda t: t[None]),
    "strides": by_data(lambda t: t.as_strided((4, 4), (1, 4))),
    "sizes": by_data(lambda t: t.as_strided((4, 2), (4, 1))),
    "negated": by_data(torch._neg_view),
    "resized": lambda t: t.resize_(5, 4),
    "released": lambda t: t.untyped_storage().resize_(0),
    "released with an offset": lambda t: by_data(lambda t: release(torch.zeros(5, 4)[1:]))(t),
    "inference": by_inference,
    "class": lambda t: setattr(t, "__class__", Sub),
    "meta": lambda t: torch.utils.swap_tensors(t, torch.empty(4, 4, device="meta")),
    "sparse": lambda t: torch.utils.swap_tensors(t, torch.eye(4).to_sparse()),
}


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_change_is_noticed(edit: Callable[[Tensor], Any], place: int) -> None:
    tensors = [torch.randn(4, 4) for _ in range(3)]
    grads = [torch.randn(4, 4) for _ in range(3)]
    proof = Proved(tensors, grads)
    assert proof.holds(tensors, grads)
    edit(tensors[place])
    assert not proof.holds(tensors, grads)
    assert not proof.holds(tensors, grads)


OTHERS: dict[str, Callable[[], Any]] = {
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
    "released with an offset": lambda: release(torch.randn(5, 4)[1:]),
}


@pytest.mark.parametrize("make", OTHERS.values(), ids=OTHERS)
@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_what_is_not_alike(
    make: Callable[[], Any], place: int, capfd: pytest.CaptureFixture[str]
) -> None:
    written = [torch.randn(4, 4) for _ in range(3)]
    others: list[Any] = [torch.randn(4, 4) for _ in range(3)]
    proof = Proved(written, others)
    assert proof.holds(written, others)
    others[place] = make()
    assert not proof.holds(written, others)
    assert not capfd.readouterr().err, "torch wrote down an error of ours"


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("offset", [0, 1, 7])
@pytest.mark.parametrize("which", ["parameter", "gradient", "state"])
def test_released_memory_is_an_error(which: str, offset: int, later: bool) -> None:
    """In torch it ends the process."""
    p, other = Parameter(torch.randn(100 + offset)[offset:]), Parameter(torch.randn(3))
    optimizer = fastopt.optim.SGD([other, p], lr=0.1, momentum=0.5)
    for t in (p, other):
        t.grad = torch.randn(len(t) + offset)[offset:]
    if which == "state":
        optimizer.step()
        optimizer.state[p]["momentum_buffer"] = torch.randn(100 + offset)[offset:]
    if later:
        optimizer.step()
        optimizer.step()
    before = other.detach().clone()
    tensors = {"parameter": p, "gradient": p.grad, **optimizer.state[p]}
    release(tensors["momentum_buffer" if which == "state" else which])
    with pytest.raises(RuntimeError, match=rf"a {which}.* of size \(100,\) has no memory"):
        optimizer.step()
    assert torch.equal(other, before)


def test_it_keeps_nothing_alive() -> None:
    tensors = [torch.randn(4, 4), torch.randn(4, 4)]
    proof = Proved(tensors[:1], tensors[1:])
    gone = list(map(weakref.ref, tensors))
    tensors.clear()
    gc.collect()
    assert [t() for t in gone] == [None, None]
    del proof


def test_versions() -> None:
    tensors = [torch.randn(3), Parameter(torch.randn(3)), torch.randn(3)[1:]]
    for k in range(3):
        before = [t._version for t in tensors]
        _proof.increment_versions(tensors)
        assert [t._version for t in tensors] == [v + 1 for v in before], k
    saved = tensors[1] * tensors[1]
    _proof.increment_versions(tensors)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        saved.sum().backward()


def test_versions_of_inference_mode() -> None:
    """Its tensors have none. Torch passes over them; asked for the version it raises."""
    with torch.inference_mode():
        unversioned, other = torch.randn(3), torch.randn(3)
    plain = torch.randn(3)
    with torch.inference_mode():
        _proof.increment_versions([plain, unversioned])
    assert plain._version == 1
    tensors = [torch.randn(3), torch.randn(3)]
    _proof.increment_versions(tensors)
    torch.utils.swap_tensors(tensors[1], other)  # the process would end here
    with torch.inference_mode():
        _proof.increment_versions(tensors)
    assert tensors[0]._version == 2
    sub = torch.randn(3).as_subclass(Sub)
    _proof.increment_versions([sub])
    assert sub._version == 1


def test_what_is_fetched_may_be_nobodys(way: str) -> None:
    """Addresses of the last step's tensors are read no more, only hinted at."""
    if way == "compiled":
        lines = np.array([0, -1, 1, 1 << 46, 1 << 62, -(1 << 62)] * 20, np.int64)
        _proof._compiled()._compiled().fetch(lines.ctypes.data, len(lines))
    written, grads = ([torch.randn(3) for _ in range(40)] for _ in range(2))
    proof = Proved(written, grads)
    assert proof.holds(written, grads)
    others = [torch.randn(3) for _ in range(40)]
    del written[:], grads[:]
    gc.collect()
    proof._proof.fetch()
    assert proof.holds(others[:20] * 2, others[20:] * 2) is False  # one is written to twice

"""SparseAdam: gradients of some rows alone."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import pytest
import torch
from cases import DEVICE, FLOATS, assert_as_accurate
from race import SPARSE, options_of, outcome
from torch import Tensor
from torch.nn import Parameter

import fastopt
from fastopt import BackendUnavailable
from fastopt.optim import SparseAdam

pytestmark = [
    pytest.mark.skipif(DEVICE != "cpu", reason="kernels for CPUs alone"),
    pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled"),
]
(INFO,) = SPARSE
OPTIONS = options_of(INFO)
DOUBLE = torch.float64
#: With the number of sparse dimensions; the last ones elementwise.
SHAPES = (((50, 8), 1), ((300, 70), 1), ((20, 4, 5), 1), ((20, 4, 5), 2), ((40,), 1), ((5, 6), 2))


@pytest.fixture(autouse=True)
def checked() -> Iterator[None]:
    with torch.sparse.check_sparse_tensor_invariants():
        yield


def made(dtype: torch.dtype) -> list[Parameter]:
    return [Parameter(torch.randn(shape, dtype=dtype)) for shape, _ in SHAPES]


def grad_of(param: Tensor, sparse: int, entries: int) -> Tensor:
    """A gradient of some entries, some of them of one place."""
    indices = torch.stack([torch.randint(n, (entries,)) for n in param.shape[:sparse]])
    values = torch.randn(entries, *param.shape[sparse:], dtype=param.dtype)
    return torch.sparse_coo_tensor(indices, values, param.shape)


def give(*replicas: Sequence[Parameter], entries: int = 30, missing: Sequence[int] = ()) -> None:
    for k, twins in enumerate(zip(*replicas, strict=True)):
        grad = grad_of(twins[0], SHAPES[k][1], entries)
        for p in twins:
            p.grad = None if k in missing else grad.to(p.dtype)


class Race:
    """One training by fastopt, by torch, and by torch in double precision."""

    def __init__(self, dtype: torch.dtype, options: dict[str, Any]) -> None:
        params = made(dtype)
        copies = [[Parameter(p.detach().to(d, copy=True)) for p in params] for d in (dtype, DOUBLE)]
        self.params = [params, *copies]
        modules = fastopt.optim, torch.optim, torch.optim
        self.optimizers: list[Any] = [
            module.SparseAdam(p, **copy.deepcopy(options))
            for module, p in zip(modules, self.params, strict=True)
        ]

    def step(self, **how: Any) -> None:
        give(*self.params, **how)
        with fastopt.use_backend("numba"):
            self.optimizers[0].step()
        for optimizer in self.optimizers[1:]:
            optimizer.step()

    def check(self) -> None:
        for mine, its, exact in zip(*self.params, strict=True):
            states = [
                {"param": p, **o.state.get(p, {})}
                for o, p in zip(self.optimizers, (mine, its, exact), strict=True)
            ]
            assert list(states[0]) == list(states[1])
            assert type(states[0].pop("step", 0)) is int
            assert self.optimizers[0].state.get(mine, {}).get("step") == states[1].get("step")
            for name, value in states[0].items():
                assert value.stride() == states[1][name].stride()
                expected, oracle = states[1][name].detach(), states[2][name].detach()
                assert_as_accurate(value.detach(), expected, oracle)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")
def test_inputs(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Torch's table of them."""
    race = Race(dtype, options)
    for entries, missing in ((30, (1,)), (5, ()), (0, ()), (200, (0, 3))):
        race.step(entries=entries, missing=missing)
    race.check()
    assert [d.backend for d in fastopt.explain(race.optimizers[0])] == ["numba"]


@pytest.mark.parametrize(
    "options",
    [
        {"betas": (0.0, 0.0)}, {"betas": (0.5, 0.6), "eps": 1.0}, {"maximize": True, "lr": 1.0},
        {"lr": torch.tensor(0.1, dtype=DOUBLE)}, {"lr": torch.tensor([0.1], dtype=DOUBLE)},
    ],
    ids=str,
)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    race = Race(DOUBLE, options)
    for entries in (1, 40, 3):
        race.step(entries=entries)
    torch.testing.assert_close(race.params[0], race.params[1], rtol=1e-12, atol=1e-12)
    race.check()


def test_what_has_no_entry_stays() -> None:
    """To the bit, in averages too; what has one of 0 doesn't."""
    p = Parameter(torch.randn(6, 3))
    optimizer = SparseAdam([p], lr=0.5)
    p.grad = torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), p.shape)
    optimizer.step()
    before = p.detach().clone()
    p.grad = torch.sparse_coo_tensor([[4]], torch.zeros(1, 3), p.shape)
    optimizer.step()
    kept = [0, 1, 2, 3, 5]
    assert torch.equal(p[kept], before[kept])
    assert (p[4] != before[4]).all()
    assert not optimizer.state[p]["exp_avg"][[0, 2, 3, 5]].any()


def test_threads_and_versions() -> None:
    """As many rows as threads share; autograd hears of each change and no other."""
    params = [Parameter(torch.randn(5000, 64)) for _ in range(3)]
    copies = [Parameter(p.detach().clone()) for p in params]
    optimizers = SparseAdam(params), torch.optim.SparseAdam(copies)
    for entries in (20_000, 0, 3000):
        for p, c in zip(params[:2], copies[:2], strict=True):
            p.grad = c.grad = grad_of(p, 1, entries)
        before = [p._version for p in params]
        for optimizer in optimizers:
            optimizer.step()
        changed = [p._version > v for p, v in zip(params, before, strict=True)]
        assert changed == [bool(entries)] * 2 + [False]
    torch.testing.assert_close(params, copies)


@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_infinities_and_nan(value: float) -> None:
    race = Race(DOUBLE, {})
    for _ in range(2):
        give(*race.params)
        for params in race.params:
            params[1].grad._values()[3, 5] = value
        for optimizer in race.optimizers:
            optimizer.step()
    torch.testing.assert_close(*race.params[:2], rtol=1e-12, atol=1e-12, equal_nan=True)
    assert 1 <= race.params[0][1].isnan().sum() <= 2


def embedded(module: Any, params: dict[str, Tensor]) -> list[Tensor]:
    words = torch.nn.EmbeddingBag(40, 6, sparse=True)
    words.load_state_dict(params)
    optimizer = module.SparseAdam(words.parameters(), lr=0.1)
    for k in range(3):
        optimizer.zero_grad()
        words(torch.arange(12).view(3, 4) * (k + 1) % 40).sin().sum().backward()
        optimizer.step()
    return [*words.parameters()]


def test_an_embedding() -> None:
    params = torch.nn.EmbeddingBag(40, 6).state_dict()
    torch.testing.assert_close(*(embedded(m, params) for m in (fastopt.optim, torch.optim)))


def unusual() -> Iterator[tuple[str, Any]]:
    """Parameters with gradients that torch's own code has to update, or refuses."""
    sparse = torch.sparse_coo_tensor
    transposed = Parameter(torch.randn(3, 5).t())
    transposed.grad = sparse([[1, 4]], torch.ones(2, 3), (5, 3))
    yield "isn't contiguous", transposed
    dense = Parameter(torch.randn(5, 3))
    dense.grad = torch.ones(5, 3)
    yield "a gradient of layout torch.strided", dense
    scalar = Parameter(torch.randn(()))
    scalar.grad = torch.tensor(2.0).to_sparse()
    yield "without dimensions", scalar


@pytest.mark.parametrize("place", range(3))
def test_what_torch_serves(place: int) -> None:
    words, param = [*unusual()][place]
    twin = Parameter(param.detach().clone())
    twin.grad = param.grad
    ours, theirs = SparseAdam([param]), torch.optim.SparseAdam([twin])
    assert words in str(fastopt.explain(ours))
    with fastopt.use_backend("numba"), pytest.raises(BackendUnavailable, match=words):
        ours.step()
    assert not ours.state
    assert [outcome(ours.step) for _ in range(2)] == [outcome(theirs.step) for _ in range(2)]
    assert torch.equal(param, twin)
    assert repr(ours.state_dict()) == repr(theirs.state_dict())


def test_shared_memory() -> None:
    results = []
    start = torch.randn(6, 4)
    for module in (fastopt.optim, torch.optim):
        whole = start.clone()
        params = [Parameter(whole), Parameter(whole[2:5])]
        optimizer = module.SparseAdam(params, lr=0.1)
        for p in params:
            p.grad = torch.sparse_coo_tensor([[2, 1]], torch.ones(2, 4), p.shape)
        if module is fastopt.optim:
            assert "share memory" in str(fastopt.explain(optimizer))
        optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))


def test_entries_outside() -> None:
    """Torch refuses them; nothing is written where they would be."""
    with torch.sparse.check_sparse_tensor_invariants(False):
        p = Parameter(torch.randn(4, 3))
        grad = torch.sparse_coo_tensor([[0, 3]], torch.ones(2, 3), p.shape)
        grad._indices()[0, 1] = 10_000
        p.grad = grad._coalesced_(True)
        optimizer = SparseAdam([p])
        with fastopt.use_backend("numba"), pytest.raises(BackendUnavailable, match="outside"):
            optimizer.step()
        assert not optimizer.state


def test_errors() -> None:
    """All that torch lists."""
    for row in INFO.optim_error_inputs_func(DEVICE, torch.float32):
        given = row.optimizer_error_input
        results = []
        for module in (fastopt.optim, torch.optim):
            params = copy.deepcopy(given.params) or [Parameter(torch.ones(2, 3))]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = outcome(partial(made_of, module, params, given.kwargs))
            results.append((result, [str(w.message) for w in caught]))
        assert results[0] == results[1], given.desc


def made_of(module: Any, params: Any, options: dict[str, Any]) -> str:
    return repr(module.SparseAdam(params, **options))


VALUES = [
    ("lr", 0.5), ("lr", "0.5"), ("lr", float("nan")), ("lr", None), ("betas", (0.1, 0.2)),
    ("betas", (0.1,)), ("betas", (1.0, 0.5)), ("betas", None), ("eps", 0.0), ("eps", None),
    ("maximize", True), ("maximize", None),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), VALUES, ids=str)
def test_changed_hyperparameter(key: str, value: Any) -> None:
    """The same numbers or, each time, the same error; after which the old value is good again."""
    race = Race(DOUBLE, {})
    results: list[Any] = []
    old = [o.param_groups[0][key] for o in race.optimizers]
    for turn in range(6):
        give(*race.params)
        for optimizer, before in zip(race.optimizers, old, strict=True):
            if turn in (2, 4):
                optimizer.param_groups[0][key] = copy.deepcopy(value) if turn == 2 else before
        results.append([outcome(optimizer.step) for optimizer in race.optimizers[:2]])
    for mine, its in results:
        assert mine == its
    torch.testing.assert_close(*race.params[:2], rtol=1e-12, atol=1e-12, equal_nan=True)


def test_checkpoints_copies_and_conversion() -> None:
    race = Race(torch.float32, {"lr": 0.1})
    race.step()
    mine, its = (copy.deepcopy(o.state_dict()) for o in race.optimizers[:2])
    race.optimizers[0].load_state_dict(its)
    race.optimizers[1].load_state_dict(mine)
    race.step()
    race.check()
    ours = race.optimizers[0]
    for copied in (pickle.loads(pickle.dumps(ours)), copy.deepcopy(ours)):
        assert type(copied) is SparseAdam
        assert repr(copied.state_dict()) == repr(ours.state_dict())
    assert type(fastopt.convert(ours, to="torch")) is torch.optim.SparseAdam
    give(*race.params)
    for optimizer in race.optimizers:
        optimizer.step()
    assert type(fastopt.convert(ours)) is SparseAdam
    race.step()
    race.check()


@pytest.mark.parametrize("most", [0.0, 0.3, 1e3])
def test_max_grad_norm(most: float) -> None:
    """As torch: where it has no norm of sparse gradients, its error."""
    race = Race(DOUBLE, {})
    race.optimizers[0].max_grad_norm = most
    give(*race.params)
    expected = outcome(partial(torch.nn.utils.clip_grad_norm_, race.params[1], most))
    if expected[0] != "returned":
        assert outcome(race.optimizers[0].step) == expected
        assert not race.optimizers[0].state
        return
    for optimizer in race.optimizers:
        optimizer.step()
    torch.testing.assert_close(race.optimizers[0].grad_norm, expected[1])
    torch.testing.assert_close(*race.params[:2], rtol=1e-10, atol=1e-10)


def test_a_grad_scaler() -> None:
    """Torch's scaler unscales sparse gradients, and leaves out a step."""
    results = []
    start = torch.nn.Embedding(9, 4).state_dict()
    for module in (fastopt.optim, torch.optim):
        words = torch.nn.Embedding(9, 4, sparse=True)
        words.load_state_dict(start)
        optimizer = module.SparseAdam(words.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, math.inf, 3.0):
            optimizer.zero_grad()
            scaler.scale(factor * words(torch.tensor([1, 5, 1])).sin().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[words.weight]["step"] == 2
        results.append(words.weight)
    torch.testing.assert_close(*results)


def test_hooks_closures_and_the_compiler() -> None:
    p = Parameter(torch.randn(5, 2))
    optimizer, calls = SparseAdam([p]), []
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))

    def closure() -> Tensor:
        p.grad = torch.sparse_coo_tensor([[3]], torch.ones(1, 2), p.shape)
        return torch.tensor(7.0)

    assert optimizer.step(closure) == 7
    assert calls == ["post"]
    assert optimizer.state[p]["step"] == 1


def test_triton_is_refused() -> None:
    p = Parameter(torch.ones(3, 4))
    p.grad = torch.sparse_coo_tensor([[1]], torch.ones(1, 4), p.shape)
    optimizer = SparseAdam([p])
    with fastopt.use_backend("triton"), pytest.raises(BackendUnavailable, match="wait for"):
        optimizer.step()
    assert not optimizer.state

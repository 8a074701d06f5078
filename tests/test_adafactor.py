"""Adafactor: means of rows and columns, so that it takes no parameter without elements."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED
from race import FILLED, Race, give_grads, layout, options_of, outcome, parameters, replica
from torch.nn import Parameter

import fastopt
from fastopt.optim import Adafactor

(INFO,) = FILLED
OPTIONS = options_of(INFO)
#: Vectors, single tiles and several in either direction, stacks, edges of tiles, rows of one.
SHAPES = (
    (), (1,), (7,), (4099,), (1, 1), (3, 5), (1, 9), (9, 1), (64, 1024), (65, 1025), (130, 2100),
    (2, 3, 3), (3, 2, 70, 5), (2, 1, 1, 1030),
)  # fmt: skip
if INTERPRETED:  # which takes milliseconds for a program
    OPTIONS = OPTIONS[::2]
    SHAPES = (
        (), (7,), (1030,), (1, 9), (9, 1), (2, 3, 3), (2, 40, 5), (300, 40), (2, 4100), (520, 2),
    )  # fmt: skip
DOUBLE = torch.float64


def filled(*dtypes: torch.dtype) -> list[Parameter]:
    return parameters(*dtypes, shapes=SHAPES)


@pytest.mark.parametrize("foreach", [None] if INTERPRETED else [None, True])
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        (options, dtype)
        for i, options in enumerate(OPTIONS)
        for j, dtype in enumerate(FLOATS)
        if not INTERPRETED or (i + j) % 2 == 0
    ],
    ids=lambda given: ",".join(given) or "default" if isinstance(given, dict) else str(given),
)
def test_inputs(options: dict[str, Any], foreach: bool | None, dtype: torch.dtype) -> None:
    """Torch's table of them."""
    race = Race("Adafactor", filled(dtype), {**options, "foreach": foreach})
    for missing in ((1, 5), (), (0, len(SHAPES) - 4), ()):
        race.step(missing)
    race.check()
    assert [d.backend for d in fastopt.explain(race.ours)] == [BACKEND, BACKEND]


@pytest.mark.parametrize(
    "options",
    [
        {"eps": (1e-3, 1e-3)}, {"eps": (0.5, 10.0)}, {"eps": [1e-8, 0.0]}, {"lr": 10.0},
        {"lr": torch.tensor(0.1, dtype=DOUBLE)}, {"d": 1.5},
        {"lr": torch.tensor([0.1], dtype=DOUBLE), "weight_decay": 0.2},
        {"beta2_decay": -0.1}, {"beta2_decay": 0.0}, {"lr": 0.0, "weight_decay": 0.3},
    ][:: 3 if INTERPRETED else 1],
    ids=str,
)  # fmt: skip
def test_options(options: dict[str, Any]) -> None:
    """In double precision the numbers are torch's, however large the gradients are."""
    race = Race("Adafactor", filled(DOUBLE), options)
    for scale in (1.0, 1e-3, 1e3, 1e-9):
        give_grads(*race.params)
        for params in race.params:
            for p in params:
                p.grad *= scale
        with fastopt.use_backend(BACKEND):
            race.ours.step()
        for optimizer in race.optimizers[1:]:
            optimizer.step()
        torch.testing.assert_close(race.params[0], race.params[1], rtol=1e-11, atol=1e-11)
    race.check()


@pytest.mark.skipif(BACKEND != "numba", reason="threads of a CPU")
def test_same_bits_for_any_number_of_threads() -> None:
    before, results = torch.get_num_threads(), []
    start = [torch.randn(s) for s in (*SHAPES, (700, 900), (300_000,))]
    grads = [torch.randn_like(p) for p in start]
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            params = [Parameter(p.clone()) for p in start]
            optimizer = Adafactor(params, lr=0.1, weight_decay=0.1)
            for _ in range(2):
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad
                optimizer.step()
            states = [v for p in params for v in optimizer.state[p].values()]
            results.append([*params, *states])
    finally:
        torch.set_num_threads(before)
    for found in results[1:]:
        assert all(map(torch.equal, found, results[0]))


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_infinities_and_nan(value: float) -> None:
    """Where torch has them, in states and parameters, and nowhere else."""
    for place in ("grad", "param"):
        race = Race("Adafactor", parameters(DOUBLE, shapes=[(4, 6), (2, 3, 5), (9,), (3, 3)]), {})
        for _ in range(2):
            give_grads(*race.params)
            for params in race.params:
                for p in params[:3]:
                    (p.grad if place == "grad" else p.data).view(-1)[4] = value
            for optimizer in race.optimizers[:2]:
                optimizer.step()
        close = partial(torch.testing.assert_close, rtol=1e-11, atol=1e-11, equal_nan=True)
        close(race.params[0], race.params[1])
        for mine, its in zip(*race.params[:2], strict=True):
            close(race.ours.state[mine], race.optimizers[1].state[its])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_extreme_gradients(dtype: torch.dtype) -> None:
    """Sums of squares that the dtype has no number for, though it has one for their mean."""
    size = (torch.finfo(dtype).max * 0.6) ** 0.5
    params = parameters(dtype, shapes=[(5, 7), (80, 3)])
    copies = replica(params, wide=True)
    ours, theirs = Adafactor(params), torch.optim.Adafactor(copies, eps=(1e-7, 1e-3))
    give_grads(params)
    for p, c in zip(params, copies, strict=True):
        p.grad = p.grad.sign() * size
        c.grad = p.grad.double()
    for optimizer in (ours, theirs):
        optimizer.step()
    for p, c in zip(params, copies, strict=True):
        assert p.isfinite().all()
        close = 1e-5 if dtype == torch.float32 else 4e-3
        torch.testing.assert_close(p.double(), c, rtol=close, atol=close)


@pytest.mark.parametrize("shape", [(1 << 30, 2), (2, 1 << 30), (1 << 31,)], ids=str)
def test_sizes_too_large_for_a_gpu(shape: tuple[int, ...]) -> None:
    """Rows and columns are counted in 32 bits there, the elements of a vector are not."""
    optimizer = Adafactor([Parameter(torch.empty(shape, device="meta"))])
    refused = "2**30 rows or columns" in str(fastopt.explain(optimizer))
    assert refused == (len(shape) > 1)


def test_zero_gradients() -> None:
    race = Race("Adafactor", filled(torch.float32), {})
    for _ in range(2):
        for params in race.params:
            for p in params:
                p.grad = torch.zeros_like(p)
        for optimizer in race.optimizers:
            optimizer.step()
    race.check()


def test_mixed_parameters() -> None:
    """All dtypes, and what only torch can update, in groups of other options."""
    params = [*filled(torch.float32), Parameter(torch.randn(6, 8)[:, ::2])]
    params += [Parameter(torch.randn(6, 4).t()), *filled(DOUBLE), *filled(torch.bfloat16)]
    race = Race(
        "Adafactor", params, {},
        lambda p: [
            {"params": p[: len(SHAPES) + 2], "lr": 0.1, "weight_decay": 0.2},
            {"params": p[len(SHAPES) + 2 :: 2], "eps": (1e-6, 1e-2), "maximize": True},
            {"params": p[len(SHAPES) + 3 :: 2], "eps": (1e-6, 1e-2), "d": 1.2},
        ],
    )  # fmt: skip
    for _ in range(3):
        race.step(insist=False)
    race.check()
    explained = fastopt.explain(race.ours)
    backends = sorted([BACKEND] * 6 + ["reference"] * 2)
    assert sorted(d.backend for d in explained) == backends
    kernels = [str(d) for d in explained if d.backend == BACKEND]
    assert all("launches" in words for words in kernels) == (BACKEND == "triton")
    for words in ("a parameter with gaps", "that isn't contiguous"):
        assert words in str(explained)


@pytest.mark.parametrize("order", [0, 1], ids=["single-first", "double-first"])
def test_an_epsilon_of_several_dtypes(order: int) -> None:
    """The first parameter's with a gradient is everyone's: torch's own numbers, to the bit."""
    params = parameters(torch.float32, DOUBLE, shapes=[(3, 4)])
    params = params[::-1] if order else params
    copies = replica(params)
    optimizers = Adafactor(params), torch.optim.Adafactor(copies)
    for missing in ((), (0,)):
        give_grads(params, copies, missing=missing)
        for p in (*params, *copies):
            if p.grad is not None:
                p.grad *= 1e-5
        for optimizer in optimizers:
            optimizer.step()
    assert all(map(torch.equal, params, copies))
    assert "eps1=None, which is then the first parameter's" in str(fastopt.explain(optimizers[0]))


@pytest.mark.parametrize("shape", [(0,), (2, 0), (0, 3)], ids=str)
def test_parameters_without_elements(shape: tuple[int, ...]) -> None:
    """Torch divides by their number."""
    results = []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.empty(shape))
        p.grad = torch.empty(shape)
        optimizer = module.Adafactor([p])
        results.append((outcome(optimizer.step), layout(optimizer)))
    assert results[0] == results[1]
    assert results[0][0][0] is ZeroDivisionError


def test_errors() -> None:
    """All that torch lists."""
    for row in INFO.optim_error_inputs_func(DEVICE, torch.float32):
        given = row.optimizer_error_input
        results = []
        for module in (fastopt.optim, torch.optim):
            params = copy.deepcopy(given.params) or [Parameter(torch.ones(2, 3))]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                made = outcome(partial(made_of, module, params, given.kwargs))
            results.append((made, [str(w.message) for w in caught]))
        assert results[0] == results[1], given.desc


def made_of(module: Any, params: Any, options: dict[str, Any]) -> str:
    return repr(module.Adafactor(params, **options))


def test_what_torch_refuses_in_a_step() -> None:
    for grad, p in (
        (torch.ones(3, dtype=torch.complex64), torch.ones(3, dtype=torch.complex64)),
        (torch.ones(3, 2).to_sparse(), torch.ones(3, 2)),
    ):
        results = []
        for module in (fastopt.optim, torch.optim):
            param = Parameter(p.clone())
            param.grad = grad.clone()
            results.append(outcome(module.Adafactor([param]).step))
        assert results[0] == results[1]
        assert results[0][0] is RuntimeError


@pytest.mark.parametrize("name", ["grad_scale", "found_inf"])
def test_a_scale_left_to_the_step(name: str) -> None:
    """Torch's steps without fused=True overlook it, but for this one."""
    results = []
    for module in (fastopt.optim, torch.optim):
        (param,) = parameters(torch.float32, shapes=((3, 2),))
        before = param.detach().clone()
        param.grad = torch.ones_like(param)
        optimizer = module.Adafactor([param])
        setattr(optimizer, name, torch.ones(()))
        results.append(outcome(optimizer.step))
        assert torch.equal(param, before)
    assert results[0] == results[1]
    assert results[0][0] is AssertionError


VALUES = [
    ("lr", 0.5), ("lr", torch.tensor(0.5, dtype=DOUBLE)), ("lr", "0.5"), ("lr", float("nan")),
    ("lr", None),
    ("beta2_decay", -0.1), ("beta2_decay", 0.3), ("beta2_decay", None), ("eps", (0.1, 0.2)),
    ("eps", (None, None)), ("eps", (0.1, None)), ("eps", (0.1,)), ("eps", 0.1), ("d", 2.0),
    ("d", 0.0), ("d", -1.0), ("d", None), ("weight_decay", 1), ("weight_decay", None),
    ("maximize", True), ("maximize", None), ("foreach", True),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), VALUES, ids=str)
def test_changed_hyperparameter(key: str, value: Any) -> None:
    """The same numbers or, each time, the same error; after which the old value is good again."""
    race = Race("Adafactor", parameters(DOUBLE, shapes=[(3, 5)]), {})
    results: list[Any] = []
    old = [group[key] for group in race.groups(0)]
    for turn in range(6):
        give_grads(*race.params)
        for group, before in zip(race.groups(0), old, strict=True):
            if turn in (2, 4):
                group[key] = copy.deepcopy(value) if turn == 2 else before
        results.append([outcome(optimizer.step) for optimizer in race.optimizers[:2]])
    for mine, its in results:
        assert mine == its
    torch.testing.assert_close(*race.params[:2], rtol=1e-10, atol=1e-10, equal_nan=True)


def test_other_shapes_in_the_same_memory() -> None:
    """What a matrix is counts at each step, not at the first."""
    race = Race("Adafactor", parameters(DOUBLE, shapes=[(4, 6), (4, 6)]), {})
    race.step()
    for some, optimizer in zip(race.params, race.optimizers, strict=True):
        del optimizer.state[some[0]]
        some[0].grad = None
        some[0].data = some[0].detach().reshape(8, 3)
    race.step()
    race.check()


def test_checkpoints_and_copies_go_both_ways() -> None:
    race = Race("Adafactor", filled(torch.float32), OPTIONS[-1])
    race.step()
    mine, its = (copy.deepcopy(o.state_dict()) for o in race.optimizers[:2])
    race.optimizers[0].load_state_dict(its)
    race.optimizers[1].load_state_dict(mine)
    race.step()
    race.check()
    for copied in (pickle.loads(pickle.dumps(race.ours)), copy.deepcopy(race.ours)):
        assert type(copied) is Adafactor
        assert repr(copied.state_dict()) == repr(race.ours.state_dict())


def test_conversion() -> None:
    params = filled(torch.float32)
    copies = replica(params)
    ours, theirs = torch.optim.Adafactor(params), torch.optim.Adafactor(copies)
    for to in ("fastopt", "torch", "fastopt"):
        fastopt.convert(ours, to=to)
        give_grads(params, copies)
        ours.step()
        theirs.step()
    assert type(ours) is Adafactor
    torch.testing.assert_close(params, copies)


@pytest.mark.parametrize("most", [0.0, 0.3, 1e3, math.inf])
def test_max_grad_norm(most: float) -> None:
    params = filled(DOUBLE)
    copies = replica(params)
    ours, theirs = Adafactor(params, max_grad_norm=most), torch.optim.Adafactor(copies)
    for missing in ((), (3,)):
        give_grads(params, copies, missing=missing)
        expected = torch.nn.utils.clip_grad_norm_(copies, most)
        theirs.step()
        with fastopt.use_backend(BACKEND):
            ours.step()
        torch.testing.assert_close(ours.grad_norm, expected, rtol=1e-12, atol=0)
    torch.testing.assert_close(params, copies, rtol=1e-9, atol=1e-9)


def test_a_grad_scaler() -> None:
    """Divides the gradients and leaves out a step, as around torch's."""
    results = []
    start = [torch.randn(3, 5), torch.randn(4)]
    for module in (fastopt.optim, torch.optim):
        params = [Parameter(p.clone()) for p in start]
        optimizer = module.Adafactor(params, lr=0.1)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
        for factor in (1.0, math.inf, 3.0):
            optimizer.zero_grad()
            scaler.scale(factor * sum(p.sin().sum() for p in params)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.state[params[0]]["step"] == 2
        results.append(params)
    torch.testing.assert_close(*results)


def test_states_that_dont_fit() -> None:
    """Are torch's to refuse."""
    results = []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.ones(3, 4))
        p.grad = torch.ones(3, 4)
        optimizer = module.Adafactor([p])
        optimizer.step()
        optimizer.state[p]["row_var"] = torch.ones(4, 1)
        results.append(outcome(optimizer.step))
        del optimizer.state[p]["row_var"]
        results.append(outcome(optimizer.step))
    assert results[:2] == results[2:]
    assert results[0][0] is RuntimeError
    assert results[1][0] is AssertionError

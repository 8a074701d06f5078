"""Muon: torch's own products between two launches, so that it takes matrices and nothing else."""

from __future__ import annotations

import copy
import warnings
from functools import partial
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED, assert_as_accurate
from race import (
    MATRICES,
    Race,
    give_grads,
    layout,
    options_of,
    outcome,
    parameters,
    replica,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import _muon as torchs

import fastopt
from fastopt.optim import Muon

(INFO,) = MATRICES
OPTIONS = options_of(INFO)
#: Some alone, some of one shape, wide, tall and empty ones.
SHAPES = ((6, 6), (6, 6), (16, 5), (5, 16), (5, 16), (16, 5), (1, 9), (9, 1), (0, 3), (33, 70))


def matrices(*dtypes: torch.dtype) -> list[Parameter]:
    found = parameters(*dtypes, shapes=SHAPES)
    found += [Parameter(torch.randn(6, 4, dtype=d).t()) for d in (*dtypes, *dtypes)]
    return found


def check(race: Race) -> None:
    """States are as accurate as torch's; parameters are torch's but for roundings of bfloat16.

    Where a momentum is on the edge between two of its numbers, all of the matrix may differ.
    """
    assert layout(race.ours) == layout(race.optimizers[1])
    for mine, its, exact in zip(*race.params, strict=True):
        states = [
            o.state.get(p, {}) for o, p in zip(race.optimizers, (mine, its, exact), strict=True)
        ]
        assert states[0].keys() == states[1].keys()
        for name in states[0]:
            assert_as_accurate(*(s[name] for s in states))
        eps = torch.finfo(mine.dtype).eps
        off = (mine - its).detach().double().abs()
        # Triton's interpreter cuts bfloat16 off where a compiler rounds.
        most, mean = (1e-2, max(2e-3, 4 * eps)) if INTERPRETED else (2e-3, max(2e-5, eps))
        assert not off.numel() or (off.max() <= max(most, 32 * eps) and off.mean() <= mean)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")
def test_inputs(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Torch's table of them."""
    race = Race("Muon", matrices(dtype), options)
    for missing in ((1, 4), (), (0, 9)):
        race.step(missing)
    check(race)
    assert {d.backend for d in fastopt.explain(race.ours)} == {BACKEND}


@pytest.mark.parametrize("momentum", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum(momentum: float, nesterov: bool) -> None:
    race = Race("Muon", matrices(torch.float64), {"momentum": momentum, "nesterov": nesterov})
    for _ in range(3):
        race.step()
    check(race)


def test_mixed_parameters() -> None:
    """All dtypes, and what only torch can update, in two groups of other options."""
    params = [*matrices(*FLOATS), Parameter(torch.randn(6, 8)[:, ::2])]
    race = Race(
        "Muon", params, {},
        lambda p: [{"params": p[::2]}, {"params": p[1::2], "lr": 0.1, "ns_steps": 3, "eps": 1e-3}],
    )  # fmt: skip
    for _ in range(2):
        race.step(insist=False)
    check(race)
    assert {d.backend for d in fastopt.explain(race.ours)} == {BACKEND, "reference"}


def test_infinities_and_nan() -> None:
    """Spoil their matrix and no other, though they are one batch."""
    params = [Parameter(torch.randn(4, 6)) for _ in range(3)]
    race = Race("Muon", params, {})
    for value in (float("inf"), float("nan")):
        give_grads(*race.params)
        for some in race.params:
            some[1].grad[2, 3] = value
        for optimizer in race.optimizers:
            optimizer.step()
    assert params[1].isnan().all()
    for k in (0, 2):
        torch.testing.assert_close(params[k], race.params[1][k], rtol=0, atol=1e-2)


def made(module: Any, params: Any, options: dict[str, Any]) -> str:
    return repr(module.Muon(params, **options))


def test_errors() -> None:
    """All that torch lists."""
    for row in INFO.optim_error_inputs_func(DEVICE, torch.float32):
        given = row.optimizer_error_input
        results = []
        for module in (fastopt.optim, torch.optim):
            params = copy.deepcopy(given.params) or [Parameter(torch.ones(2, 3))]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                result = outcome(partial(made, module, params, given.kwargs))
            results.append((result, [str(w.message) for w in caught]))
        assert results[0] == results[1], given.desc


VALUES = [
    ("ns_steps", 100), ("ns_steps", 0), ("ns_steps", 2.0), ("ns_steps", "5"), ("ns_steps", True),
    ("ns_coefficients", (1.0, 2.0)), ("ns_coefficients", [3.0, -4.0, 2.0]),
    ("ns_coefficients", None),
    ("adjust_lr_fn", "match_rms_adamw"), ("adjust_lr_fn", "of its own"), ("adjust_lr_fn", 5),
    ("lr", 0.5), ("lr", torch.tensor(0.5)), ("lr", torch.tensor([0.25])), ("lr", torch.ones(2)),
    ("lr", "0.5"), ("lr", float("nan")), ("momentum", -0.5), ("momentum", None), ("eps", 0.0),
    ("eps", 10.0), ("weight_decay", 3), ("nesterov", None), ("nesterov", "yes"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), VALUES, ids=str)
def test_changed_hyperparameter(key: str, value: Any) -> None:
    """The same numbers or, each time, the same error; after which the old value is good again."""
    race = Race("Muon", [Parameter(torch.randn(s, dtype=torch.float64)) for s in SHAPES], {})
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
    torch.testing.assert_close(race.params[0], race.params[1], rtol=1e-6, atol=2e-3, equal_nan=True)


@pytest.mark.parametrize("shape", [(), (5,), (2, 3, 4)], ids=str)
def test_parameters_that_are_no_matrices(shape: tuple[int, ...]) -> None:
    """Torch refuses them at first; those of a later group it meets in the step."""
    results = []
    grad = torch.randn(shape)
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.ones(shape))
        refused = outcome(partial(module.Muon, [p]))
        optimizer = module.Muon([Parameter(torch.ones(2, 2))])
        optimizer.add_param_group({"params": [p]})
        p.grad = grad.clone()
        results.append((refused, outcome(optimizer.step)))
    assert results[0] == results[1]
    assert results[0][0][0] is results[0][1][0] is ValueError or len(shape) < 2


def test_other_shapes_in_the_same_memory() -> None:
    """What a matrix is counts at each step, not at the first."""
    race = Race("Muon", [Parameter(torch.randn(4, 6)), Parameter(torch.randn(4, 6))], {})
    race.step()
    for some, optimizer in zip(race.params, race.optimizers, strict=True):
        state = optimizer.state[some[0]]
        state["momentum_buffer"] = state["momentum_buffer"].reshape(8, 3)
        some[0].grad = None
        some[0].data = some[0].detach().reshape(8, 3)
    race.step()
    check(race)


def test_other_products_than_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever replaces them replaces them here."""
    seen: list[Any] = []

    def doubled(grad: Tensor, coefficients: Any, steps: int, eps: float) -> Tensor:
        seen.append((grad.shape, coefficients, steps, eps))
        return 2 * grad.bfloat16()

    monkeypatch.setattr(torchs, "_zeropower_via_newtonschulz", doubled)
    race = Race("Muon", [Parameter(torch.randn(4, 6)), Parameter(torch.randn(4, 6))], {})
    race.step()
    check(race)
    assert seen[:2] == seen[2:4] == seen[4:]


def test_checkpoints_go_both_ways() -> None:
    race = Race("Muon", matrices(torch.float32), OPTIONS[-1])
    race.step()
    mine, its = (copy.deepcopy(o.state_dict()) for o in race.optimizers[:2])
    race.optimizers[0].load_state_dict(its)
    race.optimizers[1].load_state_dict(mine)
    race.step()
    check(race)


def test_max_grad_norm() -> None:
    params = matrices(torch.float64)
    copies = replica(params)
    ours, theirs = Muon(params, max_grad_norm=0.5), torch.optim.Muon(copies)
    for _ in range(3):
        give_grads(params, copies)
        torch.nn.utils.clip_grad_norm_(copies, 0.5)
        theirs.step()
        with fastopt.use_backend(BACKEND):
            ours.step()
    torch.testing.assert_close(params, copies, rtol=1e-6, atol=2e-3)
    for p, c in zip(params, copies, strict=True):
        states = (o.state[k]["momentum_buffer"] for o, k in ((ours, p), (theirs, c)))
        torch.testing.assert_close(*states, rtol=1e-9, atol=1e-12)


def test_a_step_without_gradients() -> None:
    params = matrices(torch.float32)
    optimizer = Muon(params)
    give_grads(params)
    optimizer.step()
    before = [p.detach().clone() for p in params]
    optimizer.zero_grad()
    optimizer.step()
    assert all(map(torch.equal, params, before))

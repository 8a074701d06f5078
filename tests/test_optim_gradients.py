"""Gradients that are sparse, shared, zero or missing, and groups that differ."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BACKEND, FLOATS
from race import (
    EACH,
    FLAGGED,
    FLAGGED_IDS,
    INFOS,
    Race,
    accepted,
    every_input,
    flags_of,
    options_of,
    outcome,
    parameters,
    replica,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.testing._internal.common_optimizers import OptimizerInfo

import fastopt

# -- sparse gradients ------------------------------------------------------------------


def sparse(size: int, *shape: int) -> Tensor:
    """Uncoalesced: one index comes twice."""
    index = torch.tensor([[0, size - 1, 0]])
    return torch.sparse_coo_tensor(
        index, torch.randn(3, *shape), (size, *shape), check_invariants=True
    )


@pytest.mark.parametrize(("info", "flag"), FLAGGED, ids=FLAGGED_IDS)
@pytest.mark.parametrize("place", [0, 1, -2, -1])
def test_sparse_gradients(
    info: OptimizerInfo, flag: str | None, place: int, request: pytest.FixtureRequest
) -> None:
    """Beside dense ones, in turn with dense ones: torch's numbers or errors."""
    with warnings.catch_warnings():  # torch warns once of what Adagrad makes, whoever comes first
        warnings.simplefilter("ignore")
        torch.sparse_coo_tensor(torch.zeros(1, 1, dtype=torch.int64), torch.ones(1), (2,))
    options = {**options_of(info)[place], **({flag: True} if flag else {})}
    params = parameters(torch.float32, shapes=[(4, 3), (6,), (5, 2)])
    both = [params, replica(params)]
    optimizers = [
        getattr(m, info.name)(p, **copy.deepcopy(options))
        for m, p in zip((fastopt.optim, torch.optim), both, strict=True)
    ]
    results = []
    for places in ((0,), (2, 0), (), (0,)):
        grads = [sparse(*p.shape) if k in places else torch.randn(p.shape)
                 for k, p in enumerate(params)]  # fmt: skip
        for copies in both:
            for p, g in zip(copies, grads, strict=True):
                p.grad = g.clone()
        results.append([outcome(optimizer.step) for optimizer in optimizers])
        if places:
            words = [s for d in fastopt.explain(optimizers[0]) for s in d.request.special]
            assert "a gradient of layout torch.sparse_coo" in words
    for ours, theirs in results:
        assert ours == theirs
    if all(theirs[0] == "returned" for _, theirs in results):
        torch.testing.assert_close(both[0], both[1], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("info", [i for i in INFOS if i.supports_sparse], ids=lambda i: i.name)
def test_sparse_like_dense(info: OptimizerInfo) -> None:
    """Torch's own settings for sparse gradients and schedulers, against dense ones compiled."""
    options, schedulers = info.metadata_for_sparse
    params = parameters(torch.float32, shapes=[(6, 2)])
    both = [params, replica(params)]
    optimizers = [getattr(fastopt.optim, info.name)(p, **options) for p in both]
    attached = [[make(optimizer) for make in schedulers] for optimizer in optimizers]
    for _ in range(10):
        both[0][0].grad = sparse(6, 2)
        both[1][0].grad = both[0][0].grad.to_dense()
        optimizers[0].step()
        with fastopt.use_backend(BACKEND):
            optimizers[1].step()
        for scheduler in (s for several in attached for s in several):
            scheduler.step(*([1.0] if isinstance(scheduler, ReduceLROnPlateau) else []))
    torch.testing.assert_close(both[0], both[1])


# -- gradients that are something else, too --------------------------------------------

Params = list[Parameter]
ALIASES: dict[str, tuple[Callable[[Params, Optimizer, Tensor], list[Tensor]], bool]] = {
    "one-for-two": (lambda params, optimizer, g: [g, g, g], True),
    "parts-of-one": (lambda params, optimizer, g: list(g.repeat(2).unfold(0, 30, 7)[:3]), True),
    "the-parameter": (lambda params, optimizer, g: [params[0].detach(), g, g], False),
    "another-parameter": (lambda params, optimizer, g: [params[2].detach(), g, g], False),
    "its-state": (
        lambda params, optimizer, g: [
            next((v for v in optimizer.state[params[0]].values() if v.dim()), g), g, g
        ], False,
    ),
}  # fmt: skip


@pytest.mark.parametrize("alias", ALIASES)
@every_input(0, -1)
def test_aliased_gradients(info: OptimizerInfo, place: int, alias: str) -> None:
    grads_of, served = ALIASES[alias]
    params = parameters(torch.float64, shapes=[(30,)] * 3)
    both = [params, replica(params)]
    optimizers = [
        getattr(m, info.name)(p, **copy.deepcopy(options_of(info)[place]))
        for m, p in zip((fastopt.optim, torch.optim), both, strict=True)
    ]
    for _ in range(4):
        grad = torch.randn(30, dtype=torch.float64)
        for copies, optimizer in zip(both, optimizers, strict=True):
            for p, g in zip(copies, grads_of(copies, optimizer, grad.clone()), strict=True):
                p.grad = g
        with fastopt.use_backend(BACKEND) if served else nullcontext():
            optimizers[0].step()
        optimizers[1].step()
    torch.testing.assert_close(both[0], both[1], rtol=1e-9, atol=1e-9)


# -- groups ----------------------------------------------------------------------------


@EACH
def test_groups_with_settings_of_their_own(info: OptimizerInfo) -> None:
    """Each with another of torch's inputs and another flag; empty ones; one that comes late."""
    settings = options_of(info)
    count = len(settings)
    params = parameters(torch.float32, torch.bfloat16, shapes=[(9,), (3, 4), (1,)] * 3)

    def grouped(copies: list[Parameter]) -> list[Any]:
        groups = [{"params": copies[k::count], **copy.deepcopy(s)} for k, s in enumerate(settings)]
        return [groups[0], {"params": []}, *groups[1:]]

    race = Race(info.name, params, {}, grouped)
    for flag, group in zip((*flags_of(info)[:2], None), race.ours.param_groups[2:], strict=False):
        if flag in ("foreach", "fused") and not isinstance(group["lr"], Tensor):
            group[flag] = True
    race.step(missing=(1,))
    # For Adagrad they come too late: its constructor makes the states.
    shapes = [] if race.ours._made_early else [(5,), ()]
    late = parameters(torch.float32, shapes=shapes)
    for copies, optimizer, more in zip(
        race.params, race.optimizers, (late, replica(late), replica(late, wide=True)), strict=True
    ):
        copies += more
        optimizer.add_param_group({"params": more, **copy.deepcopy(settings[-1])})
        optimizer.add_param_group({"params": []})
    for missing in ((), (0,), ()):
        race.step(missing)
    race.check()


# -- steps that do nothing -------------------------------------------------------------


@every_input()
def test_without_gradients(info: OptimizerInfo, place: int) -> None:
    """Frozen or not: nothing changes, no state begins."""
    params = parameters(torch.float32)
    params[0].requires_grad_(False)
    start = replica(params)
    optimizer = getattr(fastopt.optim, info.name)(params, **options_of(info)[place])
    made = len(optimizer.state)
    with fastopt.use_backend(BACKEND):
        assert optimizer.step() is None
    assert all(map(torch.equal, params, start))
    assert len(optimizer.state) == made
    assert all(p._version == 0 for p in params)


@EACH
def test_zero_gradients(info: OptimizerInfo) -> None:
    """And no weight decay: no change."""
    params = parameters(*FLOATS)
    start = replica(params)
    still = accepted(info.name, weight_decay=0, lambd=0)
    optimizer = getattr(fastopt.optim, info.name)(params, **still)
    for _ in range(3):
        for p in params:
            p.grad = torch.zeros_like(p)
        with fastopt.use_backend(BACKEND):
            optimizer.step()
    assert all(map(torch.equal, params, start))

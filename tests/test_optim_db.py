"""Inputs, flags, errors and hyperparameters of torch's own table of optimizers."""

from __future__ import annotations

import copy
import math
import warnings
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED, assert_as_accurate
from race import (
    COMPLEX,
    EACH,
    FILLED,
    FLAGGED,
    FLAGGED_IDS,
    INFOS,
    MATRICES,
    SPARSE,
    Race,
    every_input,
    flags_of,
    give_grads,
    layout,
    options_of,
    outcome,
    parameters,
    replica,
)
from torch import Tensor
from torch.nn import Parameter
from torch.testing._internal.common_optimizers import OptimizerErrorEnum, OptimizerInfo

import fastopt
from fastopt import BackendUnavailable
from fastopt.optim._operations import OPTIMIZERS, TORCHS

# Both torch's own code, whose ways round differently: ASGD's eta in the middle, for one.
ROUNDED = {("Adadelta", "foreach"), ("ASGD", "foreach")}


def close_enough(race: Race, rounded: bool) -> None:
    if not rounded:
        race.check()
        return
    for mine, its, exact in zip(*race.params, strict=True):
        if mine.is_complex():
            torch.testing.assert_close(mine, its)
        else:
            assert_as_accurate(mine.detach(), its.detach(), exact.detach())


def test_torch_tests_each_of_them() -> None:
    names = [info.name for info in (*INFOS, *MATRICES, *FILLED, *SPARSE)]
    assert sorted(names) == sorted(TORCHS.keys() & OPTIMIZERS.keys())


@pytest.mark.parametrize("dtype", [*FLOATS, *COMPLEX], ids=str)
@pytest.mark.parametrize(("info", "flag"), FLAGGED, ids=FLAGGED_IDS)
def test_inputs(info: OptimizerInfo, flag: str | None, dtype: torch.dtype) -> None:
    """Torch's error, or the for-loop's numbers and the state that torch has with this flag."""
    reason = "dtypes=complex" if dtype in COMPLEX else None
    if flag == "differentiable" or (flag == "capturable" and DEVICE == "cpu"):
        reason = f"{flag}=True"
    every = options_of(info, dtype)
    for options in every[:: len(every) - 1] if INTERPRETED and flag else every:
        given = {**options, **({flag: True} if flag else {})}
        race = Race(info.name, parameters(dtype), given)
        made = layout(race.ours)  # Adagrad's constructor makes states
        like = replica(race.params[0])
        theirs = getattr(torch.optim, info.name)(like, **copy.deepcopy(given))
        give_grads(*race.params, like, missing=(1, 4))
        if reason:
            with fastopt.use_backend(BACKEND), pytest.raises(BackendUnavailable, match=reason):
                race.ours.step()
            assert layout(race.ours) == made
        expected = outcome(theirs.step)
        with nullcontext() if reason else fastopt.use_backend(BACKEND):
            assert outcome(race.ours.step) == expected
        assert layout(race.ours) == layout(theirs)
        if expected[0] != "returned":
            assert all(map(torch.equal, race.params[0], race.params[1]))
            continue
        for optimizer in race.optimizers[1:]:
            optimizer.step()
        assert (race.params[0][4] in race.ours.state) == (like[4] in theirs.state)
        for missing in ((), (0, 6), (3,)):
            race.step(missing, insist=not reason)
        close_enough(race, dtype in COMPLEX and (info.name, flag) in ROUNDED)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64], ids=str)
@every_input()
def test_differentiable(info: OptimizerInfo, place: int, dtype: torch.dtype) -> None:
    """A step within autograd: a parameter that isn't a leaf, and what flows back through it."""
    start, grad = torch.randn(2, 5, dtype=dtype).unbind()
    results = []
    for module in (fastopt.optim, torch.optim):
        leaf, moving = start.clone().requires_grad_(), grad.clone().requires_grad_()
        p = leaf * 2
        p.retain_grad()  # or else torch takes no such parameter
        options = {**copy.deepcopy(options_of(info)[place]), "differentiable": True}
        optimizer = getattr(module, info.name)([p], **options)
        p.grad = moving * 3
        optimizer.step()
        value = torch.view_as_real(p) if p.is_complex() else p
        results.append(
            (
                value.tolist(),
                [
                    g.tolist()
                    for g in torch.autograd.grad(
                        value.sin().sum(), (leaf, moving), materialize_grads=True
                    )
                ],
            )
        )
    assert results[0] == results[1]


@every_input(0, -1)
def test_complex_is_two_reals(info: OptimizerInfo, place: int) -> None:
    """Torch's own steps on complex numbers against ours on their halves."""
    whole = [Parameter(torch.randn(40, dtype=torch.complex64))]
    halves = [Parameter(torch.view_as_real(whole[0].detach()).clone())]
    optimizers = [
        getattr(fastopt.optim, info.name)(p, **copy.deepcopy(options_of(info)[place]))
        for p in (whole, halves)
    ]
    for _ in range(3):
        give_grads(whole)
        halves[0].grad = torch.view_as_real(whole[0].grad).clone()
        optimizers[0].step()
        with fastopt.use_backend(BACKEND):
            optimizers[1].step()
    torch.testing.assert_close(torch.view_as_real(whole[0]), halves[0], rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("flag", [None, "foreach"])
@every_input(0, -1)
def test_mixed_parameters(info: OptimizerInfo, place: int, flag: str | None) -> None:
    """All dtypes in turn, parts of one storage, gaps, other layouts, in one group."""
    flat = torch.randn(90)
    params = [
        *(p for s in ((7,), (3, 4)) for p in parameters(*FLOATS, *COMPLEX, shapes=[s])),
        Parameter(flat[:40]),
        Parameter(flat[40:].view(5, 10)),
        Parameter(torch.randn(6, 8)[:, ::2]),
        Parameter(torch.randn(6, 8).t()),
        *parameters(*reversed(FLOATS), shapes=[(0,), (5,)]),
    ]
    # Torch in float16 divides by an eps of 1e-8, which is 0 there: not what this is about.
    options = {**options_of(info, torch.float16)[place], **({flag: True} if flag else {})}
    race = Race(info.name, params, options)
    for missing in ((2, 9), (), (4,)):
        race.step(missing, insist=False)
    close_enough(race, (info.name, flag) == ("ASGD", "foreach"))
    served = {d.backend: d for d in fastopt.explain(race.ours)}
    assert served.keys() == {BACKEND, "reference"}


@EACH
def test_order_of_states(info: OptimizerInfo) -> None:
    """In a checkpoint: that of the parameters, whoever updates them."""
    params = parameters(*FLOATS, torch.complex64, *FLOATS, shapes=[(3,)])
    race = Race(info.name, params, options_of(info)[-1])
    race.step(insist=False)
    orders = [list(optimizer.state_dict()["state"]) for optimizer in race.optimizers[:2]]
    assert orders[0] == orders[1] == list(range(9))


@EACH
def test_parameters_without_memory(info: OptimizerInfo) -> None:
    """Those on the meta device, which are all at address 0, take nothing from the others."""
    if info.name == "ASGD":
        pytest.skip("torch's ASGD reads numbers on the parameters' device, which meta has none of")
    params = [Parameter(torch.ones(5, device=d)) for d in ("meta", "meta", DEVICE)]
    race = Race(info.name, params, options_of(info)[-1])
    for _ in range(2):
        race.step(insist=False)
    race.check()
    assert {d.request.device: d.backend for d in fastopt.explain(race.ours)} == {
        "meta": "reference",
        DEVICE: BACKEND,
    }


def one_step(make: Any, params: Any, options: dict[str, Any]) -> list[Any]:
    optimizer = make(params, **copy.deepcopy(options))
    for group in optimizer.param_groups:
        for p in group["params"]:
            p.grad = torch.ones_like(p)
    optimizer.step()
    return [p.tolist() for g in optimizer.param_groups for p in g["params"]]


@EACH
def test_errors(info: OptimizerInfo) -> None:
    """All that torch lists; what is a warning there is given once, and then the step goes on."""
    for row in info.optim_error_inputs_func(DEVICE, torch.float32):
        given = row.optimizer_error_input
        results = []
        for module in (fastopt.optim, torch.optim):
            params = copy.deepcopy(given.params)
            if params is None:
                params = [Parameter(torch.ones(2, 3))]
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")

                result = outcome(
                    partial(one_step, getattr(module, info.name), params, given.kwargs)
                )
            results.append((result, [(w.category, str(w.message)) for w in caught]))
        assert results[0] == results[1], given.desc
        (kind, *_), warned = results[0]
        assert issubclass(row.error_type, Warning) == bool(warned)
        assert issubclass(row.error_type, Warning) or kind is row.error_type
        assert row.error_on in OptimizerErrorEnum


MISSING = object()


def values_like(default: Any) -> list[Any]:
    """What a hyperparameter may become in mid-flight, sensible or not."""
    if default is None or isinstance(default, bool):
        return [not default, None, "yes", MISSING]
    if isinstance(default, tuple):
        many = len(default)
        return [
            *((x,) * many for x in (0.0, 0.5, 1.0, 1.5, -0.5, None, "0.5")),
            [0.5] * many,
            (torch.tensor(0.5, dtype=torch.float64),) * many,
            *(default[1:], (*default, 0.5), None, 0.5, MISSING),
        ]
    plain = [0, 1, True, 0.5, -10.0, math.nan, math.inf]
    tensors = [torch.full(shape, 0.5, dtype=torch.float64) for shape in ((), (1,))]
    return [*plain, *tensors, torch.ones(2), None, "0.5", [0.5], 1j, MISSING]


CHANGES = [
    pytest.param(
        info, place, key, value,
        id=f"{info.name}-{place}-{key}-{'missing' if value is MISSING else repr(value)}",
    )
    for info in INFOS
    for key, default in getattr(torch.optim, info.name)([torch.zeros(1)]).defaults.items()
    for value in values_like(default)[:: 3 if INTERPRETED else 1]
    for place in ((-1,) if INTERPRETED else (0, -1))
    # With alpha at 0 a variance is 0 but for rounding, which is all that would be compared.
    if not (key == "alpha" and type(value) is int and value == 0)
]  # fmt: skip


@pytest.mark.parametrize(("info", "place", "key", "value"), CHANGES)
def test_changed_hyperparameter(info: OptimizerInfo, place: int, key: str, value: Any) -> None:
    """The same numbers or, each time, the same error; after which the old value is good again."""
    params = parameters(torch.float64, shapes=[(5,), (2, 3)])  # so that rounding doesn't matter
    both = [params, replica(params)]
    results: list[list[Any]] = []
    warnings.filterwarnings("ignore", "Casting complex")  # which torch says once a process
    options = {"fused": False} if "fused" in flags_of(info) else {}
    optimizers = [
        getattr(m, info.name)(p, **copy.deepcopy(options_of(info)[place]), **options)
        for m, p in zip((fastopt.optim, torch.optim), both, strict=True)
    ]
    grads = torch.randn(5, 11, dtype=torch.float64)
    for optimizer, copies in zip(optimizers, both, strict=True):
        group = optimizer.param_groups[0]
        old, results_here = group[key], []
        for turn, grad in enumerate(grads):
            copies[0].grad, copies[1].grad = grad[:5].clone(), grad[5:].clone().view(2, 3)
            if turn == 2:
                group[key] = copy.deepcopy(value)
                if value is MISSING:
                    del group[key]
            elif turn == 4:
                group[key] = old
            results_here.append(outcome(optimizer.step))
        results.append(results_here)
    assert results[0] == results[1]
    assert layout(optimizers[0]) == layout(optimizers[1])
    for ours, theirs in zip(*both, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("shape", [(), (1,), (1, 1, 1)], ids=str)
@every_input(0, -1)
def test_hyperparameters_in_tensors(
    info: OptimizerInfo, place: int, shape: tuple[int, ...], dtype: torch.dtype
) -> None:
    """Those that torch takes as tensors; the learning rate changes in place."""
    options = dict(options_of(info)[place])
    for key, value in getattr(torch.optim, info.name)([torch.zeros(1)], **options).defaults.items():
        if key != "lr" and not getattr(fastopt.optim, info.name)._takes_tensors:
            continue
        if isinstance(value, tuple):  # in double precision, or else torch's powers are inexact
            options[key] = tuple(torch.full(shape, v, dtype=torch.float64) for v in value)
        elif isinstance(value, (float, Tensor)):  # torch takes one axis or more for lr only
            options[key] = torch.full(shape if key == "lr" else (), float(value), dtype=dtype)
    race = Race(info.name, parameters(torch.float32), options)
    for lr in (None, 0.5, 0.125):
        for group in race.groups(0):
            if lr is not None:
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(lr)
                else:
                    group["lr"] = lr
        race.step()
    race.check()
    assert race.ours.param_groups[0]["lr"].shape == shape


@EACH
def test_a_parameter_as_learning_rate(info: OptimizerInfo) -> None:
    """Learned itself: those before it in the group step with its old value."""
    first, rate, last = parameters(torch.float64, shapes=[(4,), (), (4,)])
    rate.data.fill_(0.1)
    both = [[first, rate, last], replica([first, rate, last])]
    optimizers = [
        getattr(m, info.name)(p, lr=p[1])
        for m, p in zip((fastopt.optim, torch.optim), both, strict=True)
    ]
    for _ in range(3):
        give_grads(*both)
        ours, theirs = [outcome(optimizer.step) for optimizer in optimizers]
        assert ours == theirs
    torch.testing.assert_close(both[0], both[1])


@EACH
def test_foreach_meets_a_tensor(info: OptimizerInfo) -> None:
    """As a learning rate, in mid-flight: some of torch's refuse it."""
    params = parameters(torch.float64, shapes=[(4,)])
    both = [params, replica(params)]
    results = []
    for module, copies in zip((fastopt.optim, torch.optim), both, strict=True):
        optimizer = getattr(module, info.name)(copies, foreach=True)
        for turn in range(3):
            copies[0].grad = torch.ones_like(copies[0])
            if turn == 1:
                optimizer.param_groups[0]["lr"] = torch.tensor(0.1, dtype=torch.float64)
            results.append(outcome(optimizer.step))
    assert results[:3] == results[3:]
    torch.testing.assert_close(*both)

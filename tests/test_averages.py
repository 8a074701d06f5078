"""AveragedModel: every average against torch's."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from averages import (
    EACH_RULE,
    EMA,
    RULES,
    Parts,
    assert_same,
    averages,
    backends,
    change,
    own_ema,
    state,
)
from cases import BACKEND, DEVICE, FLOATS, assert_as_accurate
from torch import Tensor, nn
from torch.optim import swa_utils as theirs

import fastopt
from fastopt.optim import _averaging
from fastopt.optim import swa_utils as ours


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EACH_RULE
def test_step_by_step(rule: str, dtype: torch.dtype, use_buffers: bool) -> None:
    model = Parts().to(dtype)
    if rule == "swa" and use_buffers:  # torch's function refuses integers
        del model.norm.num_batches_tracked
        model.norm.num_batches_tracked = None
    mine, its = averages(rule, model, use_buffers=use_buffers)
    moments: list[dict[str, Tensor]] = []
    for k in range(5):
        change(model)
        moments.append(state(model))
        before = [t._version for t in (*mine.parameters(), *mine.buffers())]
        their_before = [t._version for t in (*its.parameters(), *its.buffers())]
        mine.update_parameters(model)
        its.update_parameters(model)
        after = [t._version for t in (*mine.parameters(), *mine.buffers())]
        their_after = [t._version for t in (*its.parameters(), *its.buffers())]
        assert [a > b for a, b in zip(after, before, strict=True)] == [
            a > b for a, b in zip(their_after, their_before, strict=True)
        ]
        assert mine.n_averaged == its.n_averaged == k + 1
    assert BACKEND in backends(mine, model)
    for name, tensor in state(mine).items():
        torchs = its.state_dict()[name]
        if not tensor.is_floating_point():
            assert torch.equal(tensor, torchs)
            continue
        key = name.removeprefix("module.")
        numbers = [moment[key].double() for moment in moments]
        averaged = use_buffers or name in dict(mine.named_parameters(remove_duplicate=False))
        oracle = expected(rule, numbers) if averaged else numbers[-1]
        if not averaged:
            assert torch.equal(tensor, torchs)
        elif rule == "swa" and dtype == torch.float64:  # torch's weight is float32
            torch.testing.assert_close(tensor, torchs, rtol=1e-14, atol=1e-14)
        else:
            assert_as_accurate(tensor, torchs, oracle)


def expected(rule: str, numbers: list[Tensor]) -> Tensor:
    """In float64."""
    if "swa" in rule or rule == "default":
        return torch.stack(numbers).mean(0)
    decay = {"ema 0.3": 0.3, "ema 1": 1.0}.get(rule, 0.9)
    average = numbers[0]
    for number in numbers[1:]:
        average = decay * average + (1 - decay) * number
    return average


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@EACH_RULE
def test_float32_averages(rule: str, dtype: torch.dtype, torchs_calls: list[str]) -> None:
    """Of a model of another dtype, which torch's functions of lists refuse."""
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40)).to(dtype)
    average = ours.AveragedModel(model, **RULES[rule]())
    average.module.float()
    moments = []
    for _ in range(6):
        change(model)
        moments.append(state(model))
        average.update_parameters(model)
    assert backends(average, model) == {BACKEND}
    assert not torchs_calls
    for name, tensor in average.module.named_parameters():
        assert tensor.dtype == torch.float32
        right = expected(rule, [moment[name].double() for moment in moments])
        torch.testing.assert_close(tensor.double(), right, rtol=2e-6, atol=2e-6)
    running = average.module[1].running_mean
    assert torch.equal(running, model[1].running_mean.float())


def test_small_steps_of_halves_need_float32() -> None:
    """A bfloat16 average stays where it is, as torch's does; a float32 one moves."""
    model = nn.Linear(8, 8).bfloat16()
    rounded, exact = (ours.AveragedModel(model, **RULES[EMA]()) for _ in range(2))
    exact.module.float()
    nn.init.ones_(model.weight)
    for average in (rounded, exact):
        average.update_parameters(model)
    nn.init.constant_(model.weight, 1.0078125)  # the next number
    for _ in range(50):
        for average in (rounded, exact):
            average.update_parameters(model)
    assert (rounded.module.weight == 1.0).all()
    assert (exact.module.weight > 1.007).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EACH_RULE
def test_infinities_and_nan(rule: str, dtype: torch.dtype) -> None:
    """And the largest numbers, whose difference overflows. The first update copies whatever is."""
    largest = torch.finfo(dtype).max
    inf = float("inf")
    numbers = torch.tensor([0.0, 1.0, largest, -largest, inf, -inf, float("nan")], dtype=dtype)
    before, after = (t.flatten() for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    model = nn.ParameterList([torch.full((49,), float("nan"), dtype=dtype)])
    mine, its = averages(rule, model)
    for numbers in (before, after):
        with torch.no_grad():
            model[0].copy_(numbers)
        for average in (mine, its):
            average.update_parameters(model)
        found, right = mine.module[0].detach(), its.module[0].detach()
        overflow = right.isinf() & ~found.isinf() & before.isfinite() & after.isfinite()
        if dtype in (torch.bfloat16, torch.float16):  # computed in float32
            found = found.where(~overflow, right)
        torch.testing.assert_close(
            found, right, rtol=4 * torch.finfo(dtype).eps, atol=0.0, equal_nan=True
        )


# -- which functions are torch's --------------------------------------------------------------


def test_a_function_of_its_own(torchs_calls: list[str]) -> None:
    """With any other function torch's own code is run: it may do anything."""

    def traced(function: Any) -> Any:
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    decay = torch.tensor(0.9)
    for k, given in enumerate((
        {"multi_avg_fn": own_ema},
        {"avg_fn": lambda a, p, n: 0.5 * a + 0.5 * p},
        {"multi_avg_fn": traced(theirs.get_ema_multi_avg_fn(0.9))},
        {"avg_fn": theirs.get_ema_avg_fn(decay)},
    )):  # fmt: skip
        model = Parts()
        mine, its = (m.AveragedModel(model, **given) for m in (ours, theirs))
        for _ in range(3):
            change(model)
            mine.update_parameters(model)
            its.update_parameters(model)
        assert_same(mine, its, 0)
        assert torchs_calls.count("all") == 6 * (k + 1)
        assert "averaging function of its own" in str(fastopt.explain(mine, model))


def test_a_function_in_the_other_place() -> None:
    """Torch calls it with one tensor, or with lists, and has the error."""
    model = nn.Linear(2, 2)
    for given in (
        {"avg_fn": theirs.get_ema_multi_avg_fn(0.9)},
        {"multi_avg_fn": theirs.get_ema_avg_fn(0.9)},
    ):
        average = ours.AveragedModel(model, **given)
        average.update_parameters(model)
        with pytest.raises((TypeError, IndexError, AttributeError)):
            average.update_parameters(model)


def test_a_torch_whose_functions_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is known, and none is run by kernels."""

    def other(self: Any, averaged: Tensor) -> Any:
        return (1.0, *(0.25 for _ in self.record.numbers[1:-1]), averaged == 0)

    known = {multi: dict(_averaging._known(multi)) for multi in (False, True)}
    assert [len(found) for found in known.values()] == [2, 2]
    monkeypatch.setattr(_averaging.Rule, "row", other)
    for multi in known:
        assert not _averaging._known.__wrapped__(multi)


def test_a_default_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    monkeypatch.setattr(theirs, "get_swa_avg_fn", lambda: lambda a, p, n: torch.full_like(a, 7.0))
    average.update_parameters(model)
    if DEVICE == "cpu":
        assert (average.module.weight == 7.0).all()


def test_functions_by_fastopts_names() -> None:
    assert ours.get_ema_multi_avg_fn is theirs.get_ema_multi_avg_fn
    assert ours.update_bn is theirs.update_bn
    assert fastopt.optim.swa_utils is ours


def test_an_assigned_function_counts() -> None:
    """From the next update on."""
    model = Parts()
    mine, its = averages(EMA, model)
    for rule in (*RULES, *RULES):
        for average in (mine, its):
            given = {"avg_fn": None, "multi_avg_fn": None, **RULES[rule]()}
            for name, value in given.items():
                setattr(average, name, value)
        change(model)
        mine.update_parameters(model)
        its.update_parameters(model)
        assert_same(mine, its, 8)

"""Averages that an optimizer's steps take along: the numbers of a step and an update after it."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from averages import EMA, RULES, Parts, own_ema, rebind, state
from cases import BACKEND
from race import NAMES, give_grads
from torch import nn
from torch.nn import Parameter
from torch.optim import swa_utils as theirs

import fastopt
from fastopt.optim import _averages, _plan
from fastopt.optim import swa_utils as ours

SMALL = (64, 70, 5)


class Training:
    """A model, an optimizer of it, and its average, updated in the step or, if apart, after it."""

    def __init__(
        self, name: str, model: nn.Module, rule: str, apart: bool, dtype: torch.dtype | None = None,
        more: dict[str, Any] | None = None, **options: Any,
    ) -> None:  # fmt: skip
        self.model, self.apart = model, apart
        self.optimizer = getattr(fastopt.optim, name)(model.parameters(), lr=0.05, **options)
        joined = {} if apart else {"optimizer": self.optimizer}
        self.average = ours.AveragedModel(model, **RULES[rule](), **(more or {}), **joined)
        self.average.module.to(dtype)

    def step(self, backend: str | None = BACKEND) -> None:
        if backend is None:
            self._step()
        else:
            with fastopt.use_backend(backend):
                self._step()

    def _step(self) -> None:
        self.optimizer.step()
        if self.apart:
            self.average.update_parameters(self.model)


def both(name: str, make: Callable[[], nn.Module], rule: str = EMA, **more: Any) -> list[Training]:
    """In the step, and apart from it."""
    model = make()
    return [Training(name, copy.deepcopy(model), rule, apart, **more) for apart in (False, True)]


def assert_equal(trainings: list[Training]) -> None:
    """Parameters, averages, buffers, counts and optimizer states, bit by bit."""
    for a, b in zip(*([t.model, t.average] for t in trainings), strict=True):
        found, expected = state(a), state(b)
        assert found.keys() == expected.keys()
        for key, value in found.items():
            assert torch.equal(value, expected[key]), key


def layers(dtype: torch.dtype = torch.float32) -> Callable[[], nn.Module]:
    return lambda: nn.ParameterList([torch.randn(n, dtype=dtype) for n in SMALL])


def taken_along(training: Training) -> int:
    """How many averages the last step's launches had."""
    plan = training.optimizer._planner.plan
    return sum(len(bucket.places) for bucket in plan._buckets if bucket.averages)


PAIRS = [
    (torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.float16, torch.float16),
    (torch.float64, torch.float64), (torch.float32, torch.bfloat16),
]  # fmt: skip


#: Each optimizer with half of the dtypes, AdamW with all.
COMBINED = [
    (name, dtypes)
    for i, name in enumerate(NAMES)
    for j, dtypes in enumerate(PAIRS)
    if name == "AdamW" or (i + j) % 2 == 0
]


@pytest.mark.parametrize(("name", "dtypes"), COMBINED, ids=str)
def test_the_same_bits(name: str, dtypes: tuple[torch.dtype, torch.dtype]) -> None:
    """Of each optimizer with an average of each kind."""
    rules = list(RULES) if name == "AdamW" else [list(RULES)[len(name) % len(RULES)]]
    for rule in rules:
        trainings = both(name, layers(dtypes[0]), rule, dtype=dtypes[1])
        for k in range(3):
            give_grads(*(list(t.model) for t in trainings))
            before = [a._version for a in trainings[0].average.parameters()]
            for training in trainings:
                training.step()
            assert all(
                a._version > v
                for a, v in zip(trainings[0].average.parameters(), before, strict=True)
            )
            assert trainings[0].average.n_averaged == k + 1
            assert_equal(trainings)
        assert taken_along(trainings[0]) == len(SMALL)


def test_one_launch() -> None:
    """The update that is left has nothing to do, and no plan is made anew."""
    training = Training("AdamW", layers()(), EMA, apart=False)
    launches = []

    def seen(self: Any, *args: Any) -> None:
        launches.append(int(self._tables.offsets[-1]))

    with mock.patch.object(_averages.Bucket, "run", seen):
        for _ in range(2):
            give_grads(list(training.model))
            training.step()
        with (
            mock.patch.object(_plan.StepPlan, "__init__", side_effect=AssertionError),
            mock.patch.object(_averages.Plan, "__init__", side_effect=AssertionError),
        ):
            for missing in ((), (1,), (0, 2)):
                give_grads(list(training.model), missing=missing)
                training.step()
    assert launches == [0, 0, 0, 70, 69]


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("rule", ["default", EMA])
def test_what_has_no_gradient(rule: str, use_buffers: bool) -> None:
    """Parameters without one, frozen ones, buffers, ties, gaps, and what the optimizer hasn't."""

    def make() -> nn.Module:
        model = Parts()
        del model.norm.num_batches_tracked
        model.norm.num_batches_tracked = None
        model.gaps.weight = Parameter(torch.randn(6, 10)[:, ::2])
        return model

    trainings = both("Adam", make, rule, more={"use_buffers": use_buffers})
    for training in trainings:
        training.model.gaps.bias.requires_grad_(False)
        training.model.late = nn.Linear(1, 1)
        del training.model.late
    for missing in ((), (1, 3), (0, 1, 2, 3, 4, 5, 6, 7, 9), (4,)):
        give_grads(*(list(t.model.parameters()) for t in trainings), missing=missing)
        for training in trainings:
            training.model.scalar.add_(1.0)
            training.model.norm.running_mean.add_(0.5)
            training.step(backend=None)
        assert_equal(trainings)


def test_float64_averages_are_updated_after_the_step() -> None:
    """A launch computes in float32, if the parameter is."""
    trainings = both("SGD", layers(), dtype=torch.float64)
    for _ in range(3):
        give_grads(*(list(t.model) for t in trainings))
        for training in trainings:
            training.step()
    assert_equal(trainings)
    assert taken_along(trainings[0]) == 0


@pytest.mark.parametrize("fused", [False, True])
def test_skipped_steps(fused: bool) -> None:
    """A GradScaler's verdict counts for averages, too; so it does for what is updated apart."""
    model = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
    model[0].frozen = Parameter(torch.randn(3))
    optimizer = fastopt.optim.Adam(
        [model[0].weight, model[0].bias, *model[1].parameters()], fused=fused
    )
    average = ours.AveragedModel(model, **RULES[EMA](), optimizer=optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    counts = []
    for overflow in (False, True, False, True):
        optimizer.zero_grad()
        scaler.scale(model(torch.randn(7, 5)).square().sum()).backward()
        if overflow:
            model[0].bias.grad[1] = float("nan")
        before = state(average)
        with torch.no_grad():
            model[0].frozen.add_(1.0)
        scaler.step(optimizer)
        scaler.update()
        after = state(average)
        same = all(torch.equal(before[key], after[key]) for key in before)
        assert same == overflow
        counts.append(int(average.n_averaged))
    assert counts == [1, 1, 2, 2]


def test_steps_that_are_none() -> None:
    """Without gradients, and where a closure raises."""
    training = Training("SGD", layers()(), "default", apart=False)
    before = state(training.average)
    training.step()
    with pytest.raises(ZeroDivisionError):
        training.optimizer.step(lambda: 1 / 0)
    after = state(training.average)
    assert all(torch.equal(before[key], after[key]) for key in before)
    give_grads(list(training.model))
    assert training.optimizer.step(lambda: 7.0) == 7.0
    assert training.average.n_averaged == 1
    assert all(map(torch.equal, training.average.module, training.model))


@pytest.mark.parametrize("case", ["own function", "reference", "Muon", "hooked", "inference"])
def test_what_no_launch_takes_along(case: str) -> None:
    """It is updated after the step, by whoever would do that otherwise."""
    name = "Muon" if case == "Muon" else "AdamW"
    trainings = both(name, lambda: nn.ParameterList([torch.randn(4, 6), torch.randn(3, 5)]))
    for training in trainings:
        if case == "own function":
            training.average.multi_avg_fn = own_ema
        elif case == "hooked":  # torch's whole step
            training.optimizer._init_group = training.optimizer._init_group
    for _ in range(3):
        give_grads(*(list(t.model) for t in trainings))
        for training in trainings:
            if case == "inference":
                with torch.inference_mode():
                    training.step(backend=None)
            else:
                training.step(backend="reference" if case == "reference" else None)
    assert_equal(trainings)
    assert trainings[0].average.n_averaged == 3


def test_changes_between_steps() -> None:
    """Of memory, dtypes, rules and parameters; each step is as one and an update after it."""

    def drop(training: Training) -> None:
        del training.model.norm, training.average.module.norm

    def retie(training: Training) -> None:
        training.model.tied.weight = training.model.linear.weight

    changes: list[Callable[[Training], Any]] = [
        lambda t: rebind(t.model),
        lambda t: t.average.module.linear.weight.data.copy_(torch.ones(7, 7)),
        lambda t: rebind(t.average.module),
        lambda t: setattr(t.average, "multi_avg_fn", theirs.get_swa_multi_avg_fn()),
        lambda t: t.average.module.double(),
        lambda t: t.average.module.float(),
        drop,
        retie,
        lambda t: setattr(t.average, "n_averaged", torch.tensor(0)),
        lambda t: t.optimizer.load_state_dict(copy.deepcopy(t.optimizer.state_dict())),
    ]
    trainings = both("Adam", Parts)
    for change in (lambda t: None, *changes):
        seed = int(torch.randint(1 << 30, ()))
        for training in trainings:
            torch.manual_seed(seed)
            change(training)
        give_grads(*(list(t.model.parameters()) for t in trainings))
        for training in trainings:
            training.step(backend=None)
        assert_equal(trainings)
    assert taken_along(trainings[0]) > 5


@pytest.mark.parametrize("frozen", [False, True])
def test_shared_memory(frozen: bool) -> None:
    """An average that is its own parameter; two that are one, of parameters that don't change."""
    trainings = both("SGD", layers())
    for training in trainings:
        average = training.average.module
        if frozen:
            training.model[0].requires_grad_(False)
            training.optimizer.param_groups[0]["params"] = list(training.model)[1:]
            average[0].data = average[1].data[:64]
        else:
            average[0].data = training.model[0].data
    for _ in range(3):
        give_grads(*(list(t.model) for t in trainings))
        for training in trainings:
            training.step(backend=None)
    assert_equal(trainings)


def test_two_averages() -> None:
    model = layers()()
    optimizer = fastopt.optim.SGD(model.parameters(), lr=0.1)
    first, second = (
        ours.AveragedModel(model, **RULES[rule](), optimizer=optimizer) for rule in (EMA, "swa")
    )
    others = [theirs.AveragedModel(model, **RULES[rule]()) for rule in (EMA, "swa")]
    for _ in range(3):
        give_grads(list(model))
        optimizer.step()
        for other in others:
            other.update_parameters(model)
    for mine, its in zip((first, second), others, strict=True):
        assert mine.n_averaged == 3
        torch.testing.assert_close(list(mine.parameters()), list(its.parameters()))


def test_clipping_and_averaging() -> None:
    trainings = both("AdamW", layers(), max_grad_norm=0.1)
    for _ in range(3):
        give_grads(*(list(t.model) for t in trainings))
        for training in trainings:
            training.step()
    assert_equal(trainings)
    assert taken_along(trainings[0]) == len(SMALL)


def test_who_keeps_whom() -> None:
    """An average that nobody has any more is followed no longer; copies follow nobody."""
    training = Training("SGD", layers()(), EMA, apart=False)
    give_grads(list(training.model))
    training.step()
    for optimizer in (
        copy.deepcopy(training.optimizer), pickle.loads(pickle.dumps(training.optimizer)),
    ):  # fmt: skip
        assert not optimizer._followers
    copied = copy.deepcopy(training.average)
    training.step()
    assert (training.average.n_averaged, copied.n_averaged) == (2, 1)
    held = weakref.ref(training.average)
    del training.average
    gc.collect()
    assert held() is None
    training.step()
    assert taken_along(training) == 0


def test_convert() -> None:
    training = Training("SGD", layers()(), EMA, apart=False)
    with pytest.raises(ValueError, match="whose steps update an AveragedModel"):
        fastopt.convert(training.optimizer, to="torch")
    fastopt.convert(training.average, to="torch")
    give_grads(list(training.model))
    training.step(backend=None)
    assert training.average.n_averaged == 1
    fastopt.convert(training.average)
    training.step()
    assert training.average.n_averaged == 2
    assert taken_along(training) == len(SMALL)


def test_other_optimizers() -> None:
    model = nn.Linear(2, 2)
    for optimizer in (torch.optim.Adam(model.parameters()), 3):
        with pytest.raises(TypeError, match=r"supported: those of fastopt\.optim"):
            ours.AveragedModel(model, optimizer=optimizer)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Profiler record function")
@pytest.mark.parametrize("limit", [None, 0.1])
@pytest.mark.parametrize("backend", ["reference", BACKEND])
def test_compiled(backend: str, limit: float | None) -> None:
    """Inside torch.compile a step with an average is torch's, one without it may be a kernel's."""
    torch.compiler.reset()
    trainings = both("SGD", layers(), max_grad_norm=limit)
    steps = [torch.compile(t._step, backend="eager") for t in trainings]
    for _ in range(3):
        give_grads(*(list(t.model) for t in trainings))
        steps[0]()
        with fastopt.use_backend(backend):
            steps[1]()
    if backend == "triton":  # which has other last digits
        torch.testing.assert_close(*(state(t.average) for t in trainings))
        return
    assert_equal(trainings)
    assert trainings[0].average.n_averaged == 3

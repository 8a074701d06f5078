"""fastopt.convert: optimizers and losses change sides in place, and back."""

from __future__ import annotations

import copy
import pickle
import weakref
from typing import Any

import pytest
import torch
from children import OPTIMIZERS
from torch import Tensor, nn
from torch.optim import Optimizer

import fastopt
from fastopt.front.call import LossModule
from fastopt.optim._planned import PlannedStep

NAMES = pytest.mark.parametrize("name", OPTIMIZERS)


def make(name: str) -> tuple[nn.Module, Optimizer]:
    model = nn.Sequential(nn.Linear(7, 33), nn.Tanh(), nn.Linear(33, 5)).double()
    groups = [{"params": model[0].parameters(), "lr": 0.02}, {"params": model[2].parameters()}]
    return model, getattr(torch.optim, name)(groups, **{"lr": 0.01, **OPTIMIZERS[name]})


def train(model: nn.Module, optimizer: Optimizer, batches: list[Tensor], *more: Any) -> None:
    """more: schedulers."""
    for x in batches:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        for scheduler in more:
            scheduler.step()


def schedulers(optimizer: Optimizer) -> list[Any]:
    lr_scheduler = torch.optim.lr_scheduler
    return [lr_scheduler.ExponentialLR(optimizer, 0.9), lr_scheduler.StepLR(optimizer, 2, 0.5)]


def batches() -> list[Tensor]:
    return [torch.randn(4, 7, dtype=torch.float64) for _ in range(3)]


def assert_same(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-13)


# -- optimizers ---------------------------------------------------------------------------


@NAMES
def test_there_and_back_in_mid_training(name: str) -> None:
    model, optimizer = make(name)
    other, torchs = make(name)
    other.load_state_dict(model.state_dict())
    schedule, their_schedule = schedulers(optimizer), schedulers(torchs)
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(type(optimizer)))
    groups, states = optimizer.param_groups, optimizer.state
    for module in (fastopt, torch, fastopt):
        data = batches()
        train(model, optimizer, data, *schedule)
        train(other, torchs, data, *their_schedule)
        assert fastopt.convert(optimizer, to=module.__name__) is optimizer
        assert type(optimizer) is getattr(module.optim, name)
        assert optimizer.param_groups is groups
        assert optimizer.state is states
        assert schedule[0].optimizer is optimizer
    data = batches()
    train(model, optimizer, data, *schedule)
    train(other, torchs, data, *their_schedule)
    assert {d.backend for d in fastopt.explain(optimizer)} == {"numba"}
    assert optimizer._planner.plan.reference == []
    assert [kind.__module__.partition(".")[0] for kind in calls] == [
        *["torch"] * 3, *["fastopt"] * 3, *["torch"] * 3, *["fastopt"] * 3,
    ]  # fmt: skip
    assert_same([*model.parameters()], [*other.parameters()])
    assert_same(optimizer.state_dict(), torchs.state_dict())
    assert repr(optimizer) == repr(torchs)


@NAMES
def test_copies_and_pickles_of_a_converted_one(name: str) -> None:
    model, optimizer = make(name)
    train(model, optimizer, batches())
    fastopt.convert(optimizer)
    both = model, optimizer
    for copied in (copy.deepcopy(both), pickle.loads(pickle.dumps(both))):
        assert type(copied[1]) is getattr(fastopt.optim, name)
        data = batches()
        mine = copy.deepcopy(both)
        train(*mine, data)
        train(*copied, data)
        assert_same([*copied[0].parameters()], [*mine[0].parameters()])


@NAMES
def test_twice_is_once(name: str) -> None:
    _, optimizer = make(name)
    assert fastopt.convert(optimizer, to="torch") is optimizer
    fastopt.convert(fastopt.convert(optimizer))
    assert isinstance(optimizer, PlannedStep)


def test_a_grad_scaler_keeps_what_it_knows() -> None:
    results = []
    x = torch.randn(4, 7)
    model = nn.Linear(7, 5)
    for converted in (True, False):
        copied = copy.deepcopy(model)
        optimizer = torch.optim.SGD(copied.parameters(), lr=0.1, momentum=0.9)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=2)
        for step in range(6):
            if step == 2 and converted:
                fastopt.convert(optimizer)
            optimizer.zero_grad()
            scaler.scale(copied(x).mean() * (float("inf") if step == 3 else 1)).backward()
            scaler.unscale_(optimizer)
            scaler.step(optimizer)
            scaler.update()
        results.append([*copied.parameters(), torch.tensor(scaler.get_scale())])
    torch.testing.assert_close(results[0], results[1])


def test_a_scheduler_made_before_sees_the_steps() -> None:
    """It warns if its own step comes first, which it notices through the optimizer's."""
    model, optimizer = make("Adam")
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    fastopt.convert(optimizer)
    train(model, optimizer, batches(), scheduler)  # warnings are errors here
    late = torch.optim.lr_scheduler.ExponentialLR(fastopt.convert(make("Adam")[1]), 0.9)
    with pytest.warns(UserWarning, match="before `optimizer.step"):
        late.step()


def test_no_cycle_keeps_a_converted_optimizer_alive() -> None:
    model, optimizer = make("Adam")
    torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    train(model, fastopt.convert(optimizer), batches())
    held = weakref.ref(optimizer)
    del optimizer
    assert held() is None


class Own(torch.optim.Adam):
    def step(self, closure: Any = None) -> Any:
        raise AssertionError


def test_what_is_no_optimizer_of_torchs_own() -> None:
    params = [nn.Parameter(torch.zeros(2))]
    optimizer = Own(params)
    with pytest.raises(TypeError, match=r"Own \(supported: torch\.optim\."):
        fastopt.convert(optimizer)
    assert type(optimizer) is Own

    class Wrapper(Optimizer):
        def __init__(self) -> None:
            self.optimizer = torch.optim.SGD(params)

    for function in (fastopt.convert, fastopt.explain):
        with pytest.raises(TypeError, match=r"; it wraps another: take its \.optimizer$"):
            function(Wrapper())


class OwnOfOurs(fastopt.optim.Adam):
    pass


def test_what_is_ours_already() -> None:
    optimizer = OwnOfOurs([nn.Parameter(torch.zeros(2))])
    assert fastopt.convert(optimizer) is optimizer
    assert type(optimizer) is OwnOfOurs
    with pytest.raises(TypeError, match="no subclasses"):
        fastopt.convert(optimizer, to="torch")


@NAMES
def test_a_step_held_from_before(name: str) -> None:
    (model, optimizer), (other, torchs) = make(name), make(name)
    other.load_state_dict(model.state_dict())
    calls = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    held = fastopt.convert(optimizer).step
    fastopt.convert(optimizer, to="torch")
    for x in batches():
        for trained, step in ((model, held), (other, torchs.step)):
            trained.zero_grad()
            trained(x).square().mean().backward()
            step()
    assert_same([*model.parameters()], [*other.parameters()])
    assert len(calls) == 3


def test_a_replaced_step_is_not_gone_around() -> None:
    _, optimizer = make("SGD")
    optimizer.step = lambda: None
    with pytest.raises(TypeError, match="whose step has been replaced by <function"):
        fastopt.convert(optimizer)
    assert type(optimizer) is torch.optim.SGD


@pytest.mark.parametrize("subject", [torch.optim.Adam, [1.0], None])
def test_neither_optimizer_nor_module(subject: Any) -> None:
    with pytest.raises(
        TypeError, match=r"cannot convert an object of builtins\.\w+ \(supported: opt"
    ):
        fastopt.convert(subject)
    with pytest.raises(ValueError, match=r"to='numba' \(supported: 'fastopt', 'torch'\)"):
        fastopt.convert(nn.MSELoss(), to="numba")


# -- modules ------------------------------------------------------------------------------


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(16, 500)
        self.losses = nn.ModuleDict(
            {
                "classes": nn.CrossEntropyLoss(torch.rand(500), label_smoothing=0.1),
                "square": nn.MSELoss(reduction="sum"),
                "absolute": nn.L1Loss(),
            }
        )

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        out = self.head(x)
        losses = self.losses
        return (
            losses["classes"](out, y)
            + losses["square"](out, out.detach() * 2) * 1e-4
            + (losses["absolute"](out, torch.zeros_like(out)))
        )


def value_and_grads(model: Model, x: Tensor, y: Tensor) -> list[Tensor]:
    loss = model(x, y)
    return [loss.detach(), *torch.autograd.grad(loss, [*model.parameters()])]


def test_losses_inside_a_model() -> None:
    model = Model()
    x, y = torch.randn(600, 16), torch.randint(500, (600,))
    expected, described = value_and_grads(model, x, y), repr(model)
    parts, states = [*model.modules()], model.state_dict()
    calls = []
    model.losses["classes"].register_forward_hook(lambda *_: calls.append(1))
    assert fastopt.convert(model) is model
    assert [*model.modules()] == parts
    assert all(isinstance(m, LossModule) for m in model.losses.values())
    assert fastopt.explain(model.losses["classes"], torch.randn(600, 500), y)[0].backend == "numba"
    torch.testing.assert_close(value_and_grads(model, x, y), expected)
    assert repr(model) == described
    assert len(calls) == 1
    torch.testing.assert_close(model.state_dict(), states)
    fastopt.convert(model, to="torch")
    assert [type(m) for m in model.losses.values()] == [nn.CrossEntropyLoss, nn.MSELoss, nn.L1Loss]
    assert torch.equal(value_and_grads(model, x, y)[0], expected[0])


def test_a_loss_by_itself() -> None:
    loss = nn.L1Loss()
    assert type(fastopt.convert(loss)) is fastopt.nn.L1Loss
    assert type(fastopt.convert(loss)) is fastopt.nn.L1Loss
    assert type(fastopt.convert(loss, to="torch")) is nn.L1Loss


class Focal(nn.CrossEntropyLoss):
    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        return super().forward(input, target) ** 2


class Stranger(nn.modules.loss._Loss):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_is_left_alone_is_named() -> None:
    replaced = nn.MSELoss()
    replaced.forward = lambda input, target: input.sum()
    model = nn.ModuleDict(
        {
            "own": Stranger(),
            "focal": Focal(),
            "replaced": replaced,
            "scripted": torch.jit.script(nn.L1Loss()),
            "plain": nn.MSELoss(),
        }
    )
    before = {name: type(module) for name, module in model.items()}
    with pytest.warns(UserWarning, match="^fastopt.convert left alone: ") as caught:
        fastopt.convert(model)
    assert caught[0].filename == __file__
    assert str(caught[0].message) == (
        "fastopt.convert left alone: own (Stranger, of which fastopt has none), "
        "focal (Focal, a subclass of CrossEntropyLoss, whose own ways could be lost), "
        "replaced (MSELoss, whose forward has been replaced), "
        "scripted (L1Loss, compiled by torch.jit)"
    )
    after = {name: type(module) for name, module in model.items()}
    assert after == {**before, "plain": fastopt.nn.MSELoss}


class FocalOfOurs(fastopt.nn.CrossEntropyLoss):
    pass


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_what_is_on_that_side_is_not_named() -> None:
    """Warnings are errors here."""
    ours = nn.ModuleList([FocalOfOurs(), fastopt.nn.MSELoss()])
    fastopt.convert(ours)
    theirs = nn.ModuleList([Focal(), nn.BCELoss(), torch.jit.script(nn.L1Loss())])
    fastopt.convert(theirs, to="torch")
    with pytest.warns(UserWarning, match=r"alone: 0 \(FocalOfOurs, a subclass of CrossEntropyLoss"):
        fastopt.convert(ours, to="torch")


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_a_compiled_model(compiler: str) -> None:
    model = Model()
    x, y = torch.randn(3, 16), torch.randint(500, (3,))
    compiled = torch.compile(model, backend=compiler)
    expected = compiled(x, y)
    fastopt.convert(compiled)
    assert all(isinstance(m, LossModule) for m in model.losses.values())
    torch.testing.assert_close(compiled(x, y), expected)

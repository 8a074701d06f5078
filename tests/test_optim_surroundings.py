"""What steps with an optimizer: hooks, closures, schedulers, averages, scalers."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from race import (
    EACH,
    Make,
    Outcome,
    every_input,
    flags_of,
    give_grads,
    given,
    loss_of,
    options_of,
    outcome,
    parameters,
    perceptron,
    same,
    values,
)
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.optim import optimizer as hooks
from torch.profiler import profile
from torch.testing._internal.common_optimizers import OptimizerInfo

# -- hooks, closures, the profiler -----------------------------------------------------


@EACH
def test_step_hooks(info: OptimizerInfo) -> None:
    """All kinds, in order, once a step; one brings a closure in, others raise."""

    def scenario(make: Make) -> Outcome:
        (p,) = params = parameters(torch.float64, shapes=[(4,)])
        optimizer, log = make(params, lr=0.1), []
        give_grads(params)

        def note(name: str, one: Optimizer, args: Any, kwargs: Any) -> None:
            log.append((name, one is optimizer, len(args), sorted(kwargs), len(one.state)))

        def bring_closure(one: Optimizer, args: Any, kwargs: Any) -> Any:
            return args, {"closure": lambda: log.append("closure") or 5.0}

        def fail(*args: Any) -> None:
            raise KeyError("hook")

        def misbehave(*args: Any) -> Any:
            return 7

        handles = [
            hooks.register_optimizer_step_pre_hook(partial(note, "every pre")),
            hooks.register_optimizer_step_post_hook(partial(note, "every post")),
            optimizer.register_step_pre_hook(partial(note, "pre")),
            optimizer.register_step_post_hook(partial(note, "post")),
        ]
        try:
            log.append(optimizer.step())
            with optimizer.register_step_pre_hook(bring_closure):
                log.append(optimizer.step())
            for register, hook in (
                (optimizer.register_step_pre_hook, fail),
                (optimizer.register_step_pre_hook, misbehave),
                (optimizer.register_step_post_hook, fail),
            ):
                with register(hook):
                    log.append(outcome(optimizer.step)[0])
        finally:
            for handle in handles:
                handle.remove()
        log.append(optimizer.step())
        return log, [p]

    same(info, scenario, insist=True)


@pytest.mark.parametrize("set_to_none", [True, False])
@every_input(0, -1)
def test_closures(info: OptimizerInfo, place: int, set_to_none: bool) -> None:
    """By position and name, with grad mode off around them, of any result, raising."""

    def scenario(make: Make) -> Outcome:
        model, log = perceptron(), []
        optimizer = make(model.parameters(), **options_of(info)[place])

        def closure() -> Tensor:
            before = [p.grad for p in model.parameters()]
            optimizer.zero_grad(set_to_none=set_to_none)
            loss = loss_of(model)
            loss.backward()
            log.append(all(p.grad is g for p, g in zip(model.parameters(), before, strict=True)))
            return loss

        def fail() -> Tensor:
            closure()
            raise ArithmeticError("closure")

        losses = [optimizer.step(closure), optimizer.step(closure=closure)]
        with torch.no_grad():
            losses.append(optimizer.step(closure))
        log += [torch.is_grad_enabled(), losses[2].requires_grad]
        log += [outcome(partial(optimizer.step, c))[0] for c in (fail, lambda: 1 / 0)]
        log += [optimizer.step(lambda: "word"), optimizer.step(lambda: None), optimizer.step(None)]
        log.append(outcome(lambda: optimizer.step(1, 2))[0])
        return log, [torch.stack(losses), *values(model)]

    same(info, scenario, insist=True)


@EACH
def test_profiler(info: OptimizerInfo) -> None:
    """One range a step and one for zero_grad, under torch's names."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(4,)])
        optimizer = make(params)
        give_grads(params)
        with profile() as recorded:
            optimizer.step()
            optimizer.step()
            optimizer.zero_grad()
        names = [e.name for e in recorded.events() if e.name.startswith("Optimizer.")]
        assert names.count(f"Optimizer.step#{info.name}.step") == 2
        return names, list(params)

    same(info, scenario)


@EACH
def test_named_parameters(info: OptimizerInfo) -> None:
    """Their names are part of the groups and of a checkpoint."""

    def scenario(make: Make) -> Outcome:
        model = perceptron()
        optimizer = make(model.named_parameters())
        for _ in range(2):
            loss_of(model).backward()
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
        names = optimizer.state_dict()["param_groups"][0]["param_names"]
        assert names == [name for name, _ in model.named_parameters()]
        return given(optimizer), values(model)

    same(info, scenario, insist=True)


# -- schedulers ------------------------------------------------------------------------

SCHEDULERS: dict[str, Callable[[Optimizer], Any]] = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.9**epoch),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.8),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2, 0.5),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.2, total_iters=3),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.7),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 9), lr_scheduler.ExponentialLR(o, 0.5)], [2]
    ),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.StepLR(o, 2), lr_scheduler.LinearLR(o)], o
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=0.5),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, 2, cycle_momentum=bool({"betas", "momentum"} & o.defaults.keys())
    ),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 2),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(
        o, 0.1, total_steps=6, cycle_momentum=bool({"betas", "momentum"} & o.defaults.keys())
    ),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 4, 2.0),
    "SWALR": lambda o: swa_utils.SWALR(o, 0.05, 3),
}


def test_no_scheduler_is_forgotten() -> None:
    assert SCHEDULERS.keys() - {"SWALR"} == set(lr_scheduler.__all__) - {"LRScheduler"}


@pytest.mark.parametrize("tensor", [False, True], ids=["number", "tensor"])
@pytest.mark.parametrize("name", SCHEDULERS)
@EACH
def test_scheduler(info: OptimizerInfo, name: str, tensor: bool) -> None:
    """Rates, momenta and numbers as with torch, also after both are loaded anew."""

    def scenario(make: Make) -> Outcome:
        model, log = perceptron(), []
        lr = torch.tensor(0.2, dtype=torch.float64) if tensor else 0.2
        groups = [{"params": [p], "lr": copy.deepcopy(lr)} for p in model.parameters()]
        optimizer = make(groups, **({"momentum": 0.8} if "momentum" in options_keys(info) else {}))
        scheduler = SCHEDULERS[name](optimizer)
        for turn in range(6):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
            scheduler.step(*([loss.detach()] if name == "ReduceLROnPlateau" else []))
            log.append([(repr(g["lr"]), g.get("momentum"), g.get("betas"))
                        for g in optimizer.param_groups])  # fmt: skip
            if turn == 2 and name != "LambdaLR":
                scheduler.load_state_dict(copy.deepcopy(scheduler.state_dict()))
                optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        return log, values(model)

    same(info, scenario, insist=True)


def options_keys(info: OptimizerInfo) -> set[str]:
    return set(getattr(torch.optim, info.name)([torch.zeros(1)]).defaults)


@EACH
def test_torchs_schedulers_for_it(info: OptimizerInfo) -> None:
    """Those that its row lists, together on one optimizer."""
    for makers in info.scheduler_inputs:

        def scenario(make: Make, makers: Any = makers) -> Outcome:
            model = perceptron()
            optimizer = make(model.parameters(), lr=0.1)
            attached = [maker(optimizer) for maker in makers]
            for _ in range(12):
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
                for one in attached:
                    plateau = isinstance(one, lr_scheduler.ReduceLROnPlateau)
                    one.step(*([loss.detach()] if plateau else []))
            return [repr(optimizer.param_groups[0]["lr"])], values(model)

        same(info, scenario, insist=True)


@pytest.mark.parametrize("order", ["right", "wrong", "never", "loaded", "replaced"])
@EACH
def test_warning_of_a_scheduler_that_steps_first(info: OptimizerInfo, order: str) -> None:
    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(4,)])
        optimizer = make(params)
        give_grads(params)
        scheduler = lr_scheduler.StepLR(optimizer, 2)
        if order == "loaded":
            optimizer = pickle.loads(pickle.dumps(optimizer))
            scheduler.optimizer = optimizer
        elif order == "replaced":
            vars(optimizer)["step"] = partial(type(optimizer).step, optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for _ in range(2):
                if order == "wrong":
                    scheduler.step()
                if order != "never":
                    optimizer.step()
                if order != "wrong":
                    scheduler.step()
        found = [str(w.message).partition(".")[0] for w in caught]
        assert bool(found) == (order != "right")
        return found, list(params)

    same(info, scenario, insist=True)


# -- what else steps with it -----------------------------------------------------------


@pytest.mark.parametrize("average", ["mean", "exponential"])
@EACH
def test_averaged_models(info: OptimizerInfo, average: str) -> None:
    def scenario(make: Make) -> Outcome:
        model = perceptron()
        multi = swa_utils.get_ema_multi_avg_fn(0.9) if average == "exponential" else None
        mean = swa_utils.AveragedModel(model, multi_avg_fn=multi)
        optimizer = make(model.parameters(), lr=0.1)
        scheduler = swa_utils.SWALR(optimizer, 0.01, 2)
        for _ in range(5):
            optimizer.zero_grad()
            loss_of(model).backward()
            optimizer.step()
            mean.update_parameters(model)
            scheduler.step()
        swa_utils.update_bn([torch.randn(6, 4, dtype=torch.float64) for _ in range(2)], mean)
        return [int(mean.n_averaged)], [*values(model), *values(mean)]

    same(info, scenario, insist=True)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
@EACH
def test_grad_scaler(info: OptimizerInfo, unscale: bool, fused: bool) -> None:
    """Skipped steps (not the first: torch's fused SGD has no momentum after it), two optimizers."""
    flag = {"fused": True} if fused and "fused" in flags_of(info) else {}

    def scenario(make: Make) -> Outcome:
        models = perceptron(), perceptron()
        maker = make.func if flag and isinstance(make, partial) else make  # not foreach=False
        optimizers = [maker(m.parameters(), **options_of(info)[-1], **flag) for m in models]
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
        log = []
        for turn in range(6):
            for optimizer in optimizers:
                optimizer.zero_grad()
            scaler.scale(loss_of(models[0]) + loss_of(models[1])).backward()
            if turn in (1, 4):
                next(models[turn % 2].parameters()).grad[0, 0] = float("inf")
            for model, optimizer in zip(models, optimizers, strict=True):
                if unscale:
                    scaler.unscale_(optimizer)
                    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                    log.append(norm.isfinite().item())
                log.append(scaler.step(optimizer))
            scaler.update()
            log.append(scaler.get_scale())
            log.append([hasattr(o, n) for o in optimizers for n in ("grad_scale", "found_inf")])
        return log, [v for m in models for v in values(m)]

    same(info, scenario, insist=True)


@EACH
def test_clipped_by_value(info: OptimizerInfo) -> None:
    def scenario(make: Make) -> Outcome:
        model = perceptron()
        optimizer = make(model.parameters(), lr=0.1)
        for _ in range(3):
            loss_of(model).backward()
            torch.nn.utils.clip_grad_value_(model.parameters(), 0.01)
            optimizer.step()
        return [], values(model)

    same(info, scenario, insist=True)


@EACH
def test_steps_within_backward(info: OptimizerInfo) -> None:
    """An optimizer for each parameter, which steps as soon as its gradient is there."""

    def scenario(make: Make) -> Outcome:
        model = perceptron()
        each = {p: make([p], **options_of(info)[-1]) for p in model.parameters()}

        def step(p: Tensor) -> None:
            each[p].step()  # type: ignore[index]
            each[p].zero_grad()  # type: ignore[index]

        for p in model.parameters():
            p.register_post_accumulate_grad_hook(step)
        for _ in range(3):
            loss_of(model).backward()
        return [p.grad is None for p in model.parameters()], values(model)

    same(info, scenario)

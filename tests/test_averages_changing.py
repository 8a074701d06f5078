"""AveragedModel: models that change between updates, and that are walked in ways of their own."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from averages import (
    EMA,
    RULES,
    Parts,
    assert_same,
    averages,
    change,
    rebind,
)
from torch import nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations
from torch.optim import swa_utils as theirs

from fastopt.optim import swa_utils as ours


def new_parameter(model: Any) -> None:
    model.gaps.weight = Parameter(torch.randn(6, 5))


def untie(model: Any) -> None:
    model.tied.weight = Parameter(torch.randn(7, 7))


def no_bias(model: Any) -> None:
    model.gaps.bias = None


def add_layer(model: Any) -> None:
    model.more = nn.Linear(3, 3)


def add_buffer(model: Any) -> None:
    model.register_buffer("more", torch.randn(5))


def replace_layer(model: Any) -> None:
    model.gaps = nn.Linear(5, 6)


def share_layer(model: Any) -> None:
    model.tied = model.linear


def other_layout(model: Any) -> None:
    model.linear.weight.data = torch.randn(7, 7).t()


def with_gaps(model: Any) -> None:
    model.linear.weight.data = torch.randn(7, 14)[:, ::2]


def other_order(model: Any) -> None:
    model._modules["linear"] = model._modules.pop("linear")


def other_dict(model: Any) -> None:
    model.gaps._parameters = {
        "weight": Parameter(torch.randn(6, 5)), "bias": Parameter(torch.randn(6)),
    }  # fmt: skip


def no_grad(model: Any) -> None:
    model.requires_grad_(False)


def parametrize(model: Any) -> None:
    parametrizations.weight_norm(model.gaps)


CHANGES = [
    rebind, new_parameter, untie, no_bias, add_layer, add_buffer, replace_layer, share_layer,
    other_layout, with_gaps, other_order, other_dict, no_grad, parametrize,
]  # fmt: skip


@pytest.mark.parametrize("side", ["model", "average", "both"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_model_changes(how: Callable[[Any], None], side: str) -> None:
    """Between two updates, without announcement: values and errors are torch's."""
    outcomes = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        model = Parts()
        average = module.AveragedModel(model, **RULES[EMA](), use_buffers=side == "both")
        error = None
        try:
            for k in range(4):
                change(model)
                average.update_parameters(model)
                if k == 1:
                    for subject in ([model] if side != "average" else []) + (
                        [average.module] if side != "model" else []
                    ):
                        how(subject)
        except (RuntimeError, ValueError) as caught:
            error = str(caught)
        outcomes.append((average, error))
    (mine, my_error), (its, their_error) = outcomes
    assert my_error == their_error
    if my_error is None:  # an error of torch's leaves what kernels average as it was
        assert_same(mine, its, 8)


def test_a_wrapped_model() -> None:
    """As by torch.compile or DataParallel: its parameters are the model's."""
    model = Parts()
    mine, its = averages(EMA, model)
    for wrapper in (model, nn.Sequential(model), nn.DataParallel(model), model):
        change(model)
        mine.update_parameters(wrapper)
        its.update_parameters(wrapper)
        assert_same(mine, its)


class Few(nn.Linear):
    """A module that says itself what its parameters are."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield "weight", self.weight


class Hidden(nn.Linear):
    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return iter(())


@pytest.mark.parametrize(("kind", "inside"), [(Few, False), (Few, True), (Hidden, True)])
def test_a_model_that_is_walked_otherwise(kind: type, inside: bool) -> None:
    model = nn.Sequential(kind(3, 3), nn.Linear(2, 2)) if inside else kind(3, 3)
    mine, its = averages(EMA, model)
    for _ in range(3):
        change(nn.ParameterList([*(model[0] if inside else model)._parameters.values()]))
        mine.update_parameters(model)
        its.update_parameters(model)
        assert_same(mine, its)


def test_a_parameter_of_its_own() -> None:
    """A subclass's parameter is averaged too, in torch: with whatever comes at its place."""

    def make(module: ModuleType) -> Any:
        class Scaled(module.AveragedModel):  # type: ignore[name-defined, misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.scale = Parameter(torch.ones(2))

        return Scaled

    model = nn.ParameterList([torch.randn(2), torch.randn(2)])
    mine, its = (make(module)(model, **RULES[EMA]()) for module in (ours, theirs))
    for _ in range(3):
        change(model)
        mine.update_parameters(model)
        its.update_parameters(model)
    assert_same(mine, its)


def test_scripted() -> None:
    model = torch.jit.script(nn.Linear(3, 3))
    mine, its = averages(EMA, model)
    for _ in range(3):
        change(model)
        mine.update_parameters(model)
        its.update_parameters(model)
    assert_same(mine, its)

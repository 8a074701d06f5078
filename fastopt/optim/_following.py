"""Averages that follow an optimizer's steps, and are taken along by its launches."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor
from torch.nn import Module

from ._plan import all_params

if TYPE_CHECKING:
    from ._averages import Averager
    from ._planned import PlannedStep
    from ._planner import Planner

__all__ = ["Follower", "average_after", "step_and_average"]


class Follower(NamedTuple):
    """An AveragedModel, for as long as somebody else has it, and the model that it averages."""

    average: weakref.ref[Any]
    model: Module


def average_after(optimizer: PlannedStep, found_inf: Tensor | None) -> None:
    """Have every average updated, after a step that no launch of ours has taken."""
    if _happens(optimizer):
        _update(_alive(optimizer), found_inf)


def _update(followers: list[tuple[Any, Module]], found_inf: Tensor | None) -> None:
    if followers and not (found_inf is not None and found_inf.item()):
        for average, model in followers:
            average.update_parameters(model)


def step_and_average(
    optimizer: PlannedStep,
    planner: Planner,
    by_reference: Callable[[list[Tensor]], None],
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Take a step, and the first of the averages along; the others are updated after it.

    So are those of parameters without a gradient, and of what the optimizer hasn't.
    """
    followers = _alive(optimizer)
    if not followers or not _happens(optimizer):
        planner.step(optimizer, by_reference, grad_scale, found_inf)
        return
    average, model = followers[0]
    # None, if `fastopt.convert` has made it torch's
    averager: Averager | None = average._averages() if hasattr(average, "_averages") else None
    turns = nullcontext() if averager is None else averager.turns(average, model)
    with turns as turn:
        done = planner.step(optimizer, by_reference, grad_scale, found_inf, turn)
        if averager is not None and turn is not None:
            if averager.finish(average, turn, done, found_inf):
                del followers[0]
            elif done:
                raise RuntimeError("averages keep changing while a step takes them along")
    _update(followers, found_inf)


def _alive(optimizer: PlannedStep) -> list[tuple[Any, Module]]:
    found = [(average(), model) for average, model in optimizer._followers]
    return [(average, model) for average, model in found if average is not None]


def _happens(optimizer: PlannedStep) -> bool:
    """Whether there is something to follow: a step without any gradient is none."""
    return bool(optimizer._followers) and any(p.grad is not None for p in all_params(optimizer))

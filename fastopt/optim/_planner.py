"""An optimizer's plan, made, proved and followed by one thread at a time."""

from __future__ import annotations

import os
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from torch import Tensor

from ._plan import Found, StepPlan, all_params

if TYPE_CHECKING:
    from ._pairs import Turn
    from ._planned import PlannedStep

_ATTEMPTS = 1000
_Plan = TypeVar("_Plan")


class Keeper(Generic[_Plan]):
    """Keeps a plan. Copies and pickles of it are as new: a plan is about this process's memory.

    A launch reads a table that the next one writes to, so two threads that follow one plan
    take turns. A step within a step of the same thread goes on.

    Attributes:
        plan: the last step's, None before the first.
    """

    def __init__(self) -> None:
        self.renew()
        _all.add(self)

    def __reduce__(self) -> tuple[type[Keeper[_Plan]], tuple[()]]:
        return type(self), ()

    def renew(self) -> None:
        """Begin anew, in a forked child: the thread that has the lock may not exist there."""
        self.plan: _Plan | None = None
        self._lock = threading.RLock()


class Planner(Keeper[StepPlan]):
    """An optimizer's."""

    def step(
        self,
        optimizer: PlannedStep,
        by_reference: Callable[[list[Tensor]], None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        turn: Turn | None = None,
    ) -> set[int]:
        """Take a step; arguments as those of StepPlan.run.

        Returns:
            The ids of the parameters whose averages the step has taken along.
        """
        with self._lock:
            plan, found = self._plan_of(optimizer, turn)
            plan.run(optimizer, found, by_reference, grad_scale, found_inf, turn)
            return set() if turn is None else plan.averaged(found)

    def _plan_of(self, optimizer: PlannedStep, turn: Turn | None) -> tuple[StepPlan, Found]:
        plan = self.plan
        found = None if plan is None else plan.look(optimizer, turn)
        if plan is not None and found is not None:
            return plan, found
        known = {} if plan is None else plan.kinds
        self.plan = None  # stays so if a line below raises
        for _ in range(_ATTEMPTS):
            plan = StepPlan(optimizer, known, turn)
            found = plan.look(optimizer, turn, first=True)
            if found is not None:
                self.plan = plan
                return plan, found
            # Another thread has changed something.
            plan.forget_states(optimizer, all_params(optimizer))
        raise RuntimeError("parameters, gradients or states keep changing while a step is planned")


_all: weakref.WeakSet[Keeper[Any]] = weakref.WeakSet()


def _renew_all() -> None:
    for keeper in _all:
        keeper.renew()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_renew_all)

"""The step plan: everything about an optimizer's step that stays true from step to step.

Parameters are sorted into buckets that one launch can serve, and a bucket holds the
address of each of its tensors in one table. Addresses go stale in many ways
(``p.data = …``, ``load_state_dict``, a gradient that is None), so each step first proves
every line of the table, at some 0.15 µs a parameter, and a plan that doesn't hold is made
anew. A plan keeps the tensors whose addresses it keeps.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..kernels.tables import Tables, Traced
from ._kinds import Share, Spans, shares
from ._metadata import Versions, prove
from ._shards import Shards, local

if TYPE_CHECKING:
    from ._planned import PlannedStep

_data_ptr = Tensor.data_ptr
_grad, _params = attrgetter("grad"), itemgetter("params")
_CPU = torch.device("cpu")


def _same(a: Any, b: Any) -> bool:
    """Whether two sized iterables hold the same objects in the same order."""
    return len(a) == len(b) and all(map(is_, a, b))


def _values(optimizer: PlannedStep) -> list[Any]:
    """All that the groups hold: hyperparameters, lists of parameters, what the user adds."""
    return list(chain.from_iterable(map(dict.values, optimizer.param_groups)))


def _are_fixed(optimizer: PlannedStep, values: list[Any]) -> bool:
    """Whether none of the hyperparameters can change in place, as a tensor can.

    The lists of parameters and of their names can, and are proved apart.
    """
    kinds = list(map(type, values))
    lists = sum(1 + ("param_names" in group) for group in optimizer.param_groups)
    if kinds.count(list) != lists or not _FIXED.issuperset(set(kinds) - {list, tuple}):
        return False
    return all(type(n) in _FIXED for value in values if type(value) is tuple for n in value)


_FIXED = {float, int, bool, str, type(None)}


class StepPlan:
    """How to step an optimizer. Creates the states that its compiled updates need.

    Attributes:
        reference: the parameters that torch's own step has to update.
    """

    def __init__(self, optimizer: PlannedStep) -> None:
        self._insisted = dispatch.insisted()
        planned = shares(optimizer)  # may raise; nothing has been changed before
        self._params = list(chain.from_iterable(map(_params, optimizer.param_groups)))
        self._sizes = list(map(len, map(_params, optimizer.param_groups)))
        self._absent = [p for p in self._params if p.grad is None]
        self.reference: list[Tensor] = []
        compiled: list[tuple[Share, Any]] = []
        for share in planned:
            if share.decision.backend == "reference":
                self.reference += [m.param for m in share.members]
            else:
                kind, backend = share.kind, dispatch.load(share.decision.backend)
                slots = (kind.param, *kind.slots)
                launcher = backend.step_launcher(optimizer._record, slots, kind.grad, kind.step)
                compiled.append((share, launcher))
        # Only now, when nothing can fail any more, states begin.
        begun = _create_states(optimizer, planned) if compiled else set()
        self._buckets = [Bucket(optimizer, share, begun, launch) for share, launch in compiled]
        spans = Spans(list(chain.from_iterable(b.written for b in self._buckets)))
        for bucket in self._buckets:
            bucket.prove(spans)
        # All but the step counters, which no graph can have saved.
        updated = list(chain.from_iterable(b.updated for b in self._buckets))
        self._versions = Versions(updated) if updated else None
        self._once = any(bucket.fresh for bucket in self._buckets)
        self._states = list(optimizer.state.values())
        self._flags = list(map(optimizer._flags, optimizer.param_groups))
        self._set_hypers(optimizer)

    def holds(self, optimizer: PlannedStep) -> bool:
        """Prove that the plan is still true, and take in new gradients and hyperparameters."""
        params = list(chain.from_iterable(map(_params, optimizer.param_groups)))
        if (
            self._once
            or self._insisted != dispatch.insisted()
            or not _same(params, self._params)
            or list(map(len, map(_params, optimizer.param_groups))) != self._sizes
            or not all(p.grad is None for p in self._absent)
            or any(p.grad is None for p in self.reference)
        ):
            return False
        if self.reference:  # torch creates states in its own time
            same_states = all(bucket.has_states_of(optimizer) for bucket in self._buckets)
        else:
            same_states = _same(optimizer.state.values(), self._states)
        if not same_states or not all(bucket.holds() for bucket in self._buckets):
            return False
        if self._fixed and _same(_values(optimizer), self._values):
            return True
        if list(map(optimizer._flags, optimizer.param_groups)) != self._flags:
            return False
        self._set_hypers(optimizer)
        return True

    def _set_hypers(self, optimizer: PlannedStep) -> None:
        self._fixed = False  # stays so if one of them can't be read
        for bucket in self._buckets:
            bucket.set_hypers(optimizer)
        self._values = _values(optimizer)
        self._fixed = _are_fixed(optimizer, self._values)

    def run(
        self,
        by_reference: Callable[[list[Tensor]], None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        """Take the step.

        Args:
            by_reference: updates those parameters that no bucket has.
            grad_scale: what the gradients are to be divided by.
            found_inf: not 0 if the step is to be skipped.
        """
        done = 0
        try:
            if self.reference and (found_inf is None or not found_inf.item()):
                by_reference(self.reference)
            for bucket in self._buckets:
                bucket.run(grad_scale, found_inf)
                done += 1
        except BaseException:  # torch's refusal, or an interruption while something compiles
            for idle in self._buckets[done:]:
                idle.forget_states()
            raise
        if self._versions is not None:
            self._versions.increment()


def _create_states(optimizer: PlannedStep, planned: list[Share]) -> set[int]:
    """Add missing states, in the parameters' order, as torch does.

    Returns:
        The ids of the parameters whose states have a rule of their own at their first step.
    """
    share_of = {id(m.param): share for share in planned for m in share.members}
    begun = set()
    for group in optimizer.param_groups:
        for param in group["params"]:
            share = share_of.get(id(param))
            if share is None:
                continue
            if share.decision.backend != "reference":
                if optimizer._create_state(param, group, _active(optimizer, share)):
                    begun.add(id(param))
            elif optimizer._counts_steps or _active(optimizer, share):
                optimizer.state[param]  # an empty dict in its place, for torch to fill
    return begun


def _active(optimizer: PlannedStep, share: Share) -> list[str]:
    slots = zip(optimizer._slots, share.kind.slots, strict=True)
    return [name for name, dtype in slots if dtype is not None]


class Bucket:
    """The parameters of one kind, updated by one launch.

    Attributes:
        updated: the parameters and the states made of elements, of DTensors the shards too.
        written: every tensor that the launch writes to, step counters included.
        fresh: whether some states begin at this step, and with it a rule of their own.
    """

    def __init__(
        self, optimizer: PlannedStep, share: Share, begun: set[int], launcher: Any
    ) -> None:
        kind, _, members = share
        self._params = params = [m.param for m in members]
        names = _active(optimizer, share)
        groups = optimizer.param_groups
        begins = [id(m.param) in begun for m in members]
        self.fresh = any(begins)
        self._begun = [m.param for m, begin in zip(members, begins, strict=True) if begin]
        self._optimizer_state = optimizer.state
        keys = [(m.group, begin) for m, begin in zip(members, begins, strict=True)]
        self._rows = sorted(set(keys))
        # A step that a GradScaler skips must not count as a first one that has its own rule.
        self._begins_differently = any(
            begin and optimizer._hyper(groups[g], True) != optimizer._hyper(groups[g], False)
            for g, begin in self._rows
        )

        if kind.step is not None:
            names.append("step")
        self._state_dicts = [optimizer.state[p] for p in params] if names else []
        self._lines = []  # (how to find a state, its tensors)
        addresses = np.zeros((len(optimizer._slots) + 3, len(params)), np.int64)
        for name in names:
            tensors = [state[name] for state in self._state_dicts]
            line = -1 if name == "step" else optimizer._slots.index(name) + 1
            addresses[line] = [_data_ptr(local(t)) for t in tensors]
            self._lines.append((itemgetter(name), tensors))
        tensors = params + list(chain.from_iterable(line[1] for line in self._lines))
        counters = len(params) if kind.step is not None else 0
        self.updated = tensors[: len(tensors) - counters]
        self._shards = Shards(params, self.updated[len(params) :]) if kind.sharded else None
        self.written = list(map(local, tensors)) if kind.sharded else tensors
        if kind.sharded:
            self.updated = self.updated + self.written[: len(self.updated)]
        addresses[0] = list(map(_data_ptr, self.written[: len(params)]))

        offsets = np.zeros(len(params) + 1, np.int64)
        np.cumsum(list(map(Tensor.numel, self.written[: len(params)])), out=offsets[1:])
        self._tables = Tables(
            device=kind.device,
            hypers=np.zeros((len(self._rows), len(optimizer._record._fields))),
            traced=[],
            row_of=np.array([self._rows.index(key) for key in keys], np.int64),
            offsets=offsets,
            addresses=addresses,
            counted_on_device=kind.counted_on_device,
        )
        self._launch = launcher(self._tables)

    def set_hypers(self, optimizer: PlannedStep) -> None:
        """Write the groups' hyperparameters into the launch's table."""
        table, traced, device = self._tables.hypers, self._tables.traced, self._tables.device
        traced.clear()
        for row, (group, begins) in enumerate(self._rows):
            values = optimizer._hyper(optimizer.param_groups[group], begins)
            for field, value in enumerate(values):
                if isinstance(value, Tensor) and value.device == device != _CPU:
                    traced.append(Traced(row, field, value))  # to read it would make the host wait
                    value = float("nan")  # so that a number that comes later is one that's new
                table[row, field] = value.item() if isinstance(value, Tensor) else value

    def forget_states(self) -> None:
        """Undo the beginning of states whose first step, with its own rule, didn't happen."""
        for param in self._begun:
            self._optimizer_state.pop(param, None)

    def has_states_of(self, optimizer: PlannedStep) -> bool:
        """Whether the optimizer still has the same dicts of states for these parameters."""
        states = optimizer.state
        return all(states.get(p) is d for p, d in zip(self._params, self._state_dicts))  # noqa: B905

    def prove(self, spans: Spans) -> None:
        """Begin to prove, now that it is known what memory all of the step writes to."""
        grads = [local(grad) for grad in map(_grad, self._params)]
        self._proof = prove(self.written, grads, self._tables.addresses[-2], spans)

    def holds(self) -> bool:
        """Prove all that the tables say, and take in new gradients."""
        try:
            for find, tensors in self._lines:
                if not all(map(is_, map(find, self._state_dicts), tensors)):
                    return False
        except (KeyError, TypeError):  # a state removed
            return False
        found = list(map(_grad, self._params))
        grads = found if self._shards is None else self._shards.of(found)
        return grads is not None and self._proof.holds(self.written, grads)

    def run(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Launch."""
        if self._begins_differently and found_inf is not None and found_inf.item():
            self.forget_states()
        else:
            self._launch(grad_scale, found_inf)

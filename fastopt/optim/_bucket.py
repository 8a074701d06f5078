"""The parameters of one kind, updated by one launch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain, islice
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ..kernels.tables import Tables, Traced
from ._kinds import Kind
from ._proof import increment_versions
from ._rounding import draws, stream
from ._shards import cuts, local, locals_of, shard_of
from ._sort import Share

if TYPE_CHECKING:
    from ._planned import PlannedStep

_CPU = torch.device("cpu")


def picker(places: Sequence[int], count: int) -> Callable[[list[Any]], list[Any]]:
    """A function that takes the items at some places out of a list of so many."""
    if list(places) == list(range(count)):
        return lambda items: items
    if not places:
        return lambda items: []
    if len(places) == 1:
        (place,) = places
        return lambda items: [items[place]]
    pick = itemgetter(*places)
    return lambda items: list(pick(items))


def param_at(optimizer: PlannedStep, place: int) -> Tensor:
    """The parameter at a place among those of all groups."""
    params: Iterator[Tensor] = chain.from_iterable(g["params"] for g in optimizer.param_groups)
    return next(islice(params, place, None))


def active(optimizer: PlannedStep, kind: Kind) -> list[str]:
    """The states made of elements that a kind of parameters has."""
    slots = zip(optimizer._state_names, kind.slots, strict=False)
    return [name for name, dtype in slots if dtype is not None]


class Bucket:
    """See the module. Between two steps it keeps no tensor, but knows where to find each.

    Attributes:
        places: of its parameters among all of the optimizer's.
        averages: whether a launch takes the parameters' averages along.
        names: of their states, those that are one number last, and the step counters behind them.
        fresh: whether some states begin at this step, and with it a rule of their own.
        written_cells, grad_cells: addresses of the entries that a launch takes addresses from.
    """

    def __init__(
        self, optimizer: PlannedStep, share: Share, begun: set[int],
        launcher: Callable[[Tables], Callable[..., None]],
    ) -> None:  # fmt: skip
        self._kind, _, members = share
        self.places = [m.place for m in members]
        params = [local(m.param) for m in members]
        self.names = active(optimizer, self._kind)
        self.averages = self._kind.average is not None
        self._averaged = ["average"] if self.averages else []
        self._counted = [*optimizer._scalars, "step"] if self._kind.step is not None else []
        self.names += self._counted
        begins = [id(m.param) in begun for m in members]
        self._begun = [m.place for m, begin in zip(members, begins, strict=True) if begin]
        self.fresh = any(begins)
        groups = optimizer.param_groups
        # Where torch rounds what depends on the step, each parameter has numbers of its own.
        alone = [optimizer._rounds(group) for group in groups]
        keys = [
            (m.group, begin, m.place if alone[m.group] else -1)
            for m, begin in zip(members, begins, strict=True)
        ]
        self._rows = sorted(set(keys))
        # A step that a GradScaler skips must not count as a first one that has its own rule.
        self._begins_differently = any(
            begin
            and optimizer._hyper(groups[g], True).row != optimizer._hyper(groups[g], False).row
            for g, begin, _ in self._rows
        )
        self._finders = list(map(itemgetter, self.names))
        self._cuts: list[Any] | None = None
        count = len(params)
        # Lines of addresses, behind the parameters'.
        names = optimizer._state_names[: len(self._kind.slots)]
        order = [*names, *self._averaged, *optimizer._scalars, "grad", "step"]
        self._sizes = np.array(list(map(Tensor.numel, params)), np.int64)
        self._tables = Tables(
            device=self._kind.device,
            hypers=np.zeros((len(self._rows), len(optimizer._record.numbers))),
            traced=[],
            row_of=np.array([self._rows.index(key) for key in keys], np.int64),
            offsets=np.zeros(count + 1, np.int64),
            addresses=np.zeros((len(order) + 1, count), np.int64),
            counted_on_device=self._kind.counted_on_device,
            rule=[] if self._averaged else None,
            streams=np.zeros(count, np.int64) if draws(optimizer, self._kind) else None,
        )
        self._seeds: list[int] = []
        self._groups = [m.group for m in members]
        self._shards = [shard_of(m.param) for m in members]
        lines = [0, *(order.index(name) + 1 for name in (*self._averaged, *self.names))]
        entries = np.arange(self._tables.addresses.size).reshape(self._tables.addresses.shape)
        cells = self._tables.addresses.ctypes.data + 8 * entries
        self.written_cells, self.grad_cells = cells[lines].ravel(), cells[-2]
        self._some = self._all = True  # of the gradients are there
        self._launch: Callable[..., None] | None = None
        self._launcher = launcher

    def written(self, params: list[Tensor], states: list[Any], averages: list[Tensor]) -> list[Any]:
        """All that a launch writes to.

        Args:
            params, states: its parameters, and the dicts of their states, as they are now.
            averages: of the parameters, if the launch has them.

        Raises:
            KeyError, TypeError: a state isn't there.
        """
        found = chain.from_iterable([list(map(f, states)) for f in self._finders])
        return [*params, *averages, *found]

    def shards(self, written: list[Any], grads: list[Any]) -> tuple[list[Any], list[Any]] | None:
        """What this process holds of DTensors; None if one is cut otherwise than at first.

        Of other tensors: themselves.
        """
        if not self._kind.sharded:
            return written, grads
        count = len(self.places)
        whole = len(written) - count * len(self._counted)
        try:
            found = cuts(written[:whole])
            if self._cuts is None:
                self._cuts = found
            if found != self._cuts or any(
                g is not None and cuts([g]) != found[k : k + 1] for k, g in enumerate(grads)
            ):
                return None
        except AttributeError:  # what is no DTensor has no such thing
            return None
        return locals_of(written[:whole]) + written[whole:], [
            None if g is None else local(g) for g in grads
        ]

    def count_elements(self) -> None:
        """Write down how many elements each parameter has in this step: none without a gradient."""
        there = self._tables.addresses[-2] != 0
        self._some, self._all = bool(there.any()), bool(there.all())
        np.cumsum(np.where(there, self._sizes, 0), out=self._tables.offsets[1:])

    def set_hypers(self, optimizer: PlannedStep) -> None:
        """Write the groups' hyperparameters into the launch's table."""
        if self._tables.streams is not None:
            self._set_streams([optimizer.param_groups[g]["seed"] for g in self._groups])
        table, traced, device = self._tables.hypers, self._tables.traced, self._tables.device
        traced.clear()
        for row, (place, begins, owner) in enumerate(self._rows):
            group = optimizer.param_groups[place]
            if owner < 0:
                record = optimizer._hyper(group, begins)
            else:
                step = optimizer.state[param_at(optimizer, owner)]["step"].item() + 1
                record = optimizer._rounded_hyper(group, step)
            for field, value in enumerate(record.row):
                if isinstance(value, Tensor) and value.device == device != _CPU:
                    traced.append(Traced(row, field, value))  # to read it would make the host wait
                    value = float("nan")  # so that a number that comes later is one that's new
                table[row, field] = value.item() if isinstance(value, Tensor) else value

    def _set_streams(self, seeds: list[int]) -> None:
        """Write down what the parameters' random numbers are drawn by."""
        if seeds != self._seeds:
            self._tables.streams[:] = [  # type: ignore[index]
                stream(*where) for where in zip(seeds, self.places, self._shards, strict=True)
            ]
            self._seeds = seeds

    def forget_states(self, optimizer: PlannedStep, params: list[Tensor]) -> None:
        """Undo the beginning of states whose first step, with its own rule, didn't happen."""
        for place in self._begun:
            optimizer.state.pop(params[place], None)

    def run(
        self, optimizer: PlannedStep, params: list[Tensor], grad_scale: Tensor | None,
        found_inf: Tensor | None, rule: Sequence[float | Tensor],
    ) -> None:  # fmt: skip
        """Launch. params: all of the optimizer's; rule: the numbers that averages go by."""
        if self._tables.rule is not None:
            self._tables.rule[:] = rule
        if self._begins_differently and found_inf is not None and found_inf.item():
            self.forget_states(optimizer, params)
        elif self._some:
            if self._launch is None:
                self._launch = self._launcher(self._tables)
            if optimizer._sees_params:
                self._launch([params[place] for place in self.places], grad_scale, found_inf)
            else:
                self._launch(grad_scale, found_inf)
        self._tables.traced.clear()
        if self._tables.rule is not None:
            self._tables.rule.clear()

    def increment_versions(self, written: list[Any], held: list[Any], grads: list[Any]) -> None:
        """Tell autograd of what has been written, but for states of one number.

        They are no part of any graph.

        Args:
            written: DTensors or tensors; held: what this process holds of them.
            grads: those whose parameters have been left alone are None.
        """
        count = len(self.places)
        names = 1 + len(self._averaged) + len(self.names) - len(self._counted)
        changed = written[: names * count]
        if self._kind.sharded:
            changed = changed + held[: names * count]
        if not self._all:
            there = [g is not None for g in grads] * (len(changed) // count)
            changed = [t for t, is_there in zip(changed, there, strict=True) if is_there]
        increment_versions(changed)

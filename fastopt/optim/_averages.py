"""How the parameters and buffers of a model go into their averages, in one launch of a kind."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.optim.swa_utils import AveragedModel as TorchsAveragedModel

from .. import dispatch
from ..dispatch import Decision
from ..kernels.tables import DIFFERENT, OTHERS, SAME, Launch, Tables, Traced
from ._averaging import Rule, rule_of
from ._bucket import picker
from ._members import Members, is_walked_as_usual
from ._memory import hold_storages, others_may_run
from ._pairs import PLAIN, Pairs, Share, Turn, kind_of, sort
from ._planner import Keeper
from ._proof import Proof, increment_versions
from ._seams import around

__all__ = ["Averager"]

_CPU = torch.device("cpu")


class Bucket:
    """The pairs of one kind: their table, and its launch."""

    def __init__(self, share: Share, pairs: Pairs, rule: Rule) -> None:
        self._device, places = share.kind.device, share.places
        count, fields = len(places), len(rule.record.numbers)
        self.places = places
        self._sizes = np.array([pairs.averages[place].numel() for place in places], np.int64)
        self._tables = Tables(
            device=self._device,
            hypers=np.ones((2, fields)),  # the second row is that of what is copied
            traced=[],
            row_of=np.array([int(place >= pairs.averaged) for place in places], np.int64),
            offsets=np.zeros(count + 1, np.int64),
            addresses=np.zeros((3, count), np.int64),
            counted_on_device=False,
        )
        start = self._tables.addresses.ctypes.data
        self.written_cells, self.read_cells = (
            start + 8 * (line * count + np.arange(count)) for line in (0, 1)
        )
        backend = dispatch.load(share.decision.backend)
        self._launcher: Callable[[Tables], Launch] = backend.step_launcher(
            rule.record, (share.kind.average,), (), share.kind.value, None
        )
        self._launch: Launch | None = None

    def count_elements(self) -> None:
        """Write down how many elements each pair has in this update: none if it is done."""
        there = self._tables.addresses[1] != 0
        np.cumsum(np.where(there, self._sizes, 0), out=self._tables.offsets[1:])

    def run(self, row: Sequence[float | Tensor], found_inf: Tensor | None) -> None:
        """Launch, with these fields for what is averaged."""
        if not self._tables.offsets[-1]:
            return
        table, traced = self._tables.hypers, self._tables.traced
        for field, value in enumerate(row):
            if isinstance(value, Tensor):
                if value.device == self._device != _CPU:
                    traced.append(Traced(0, field, value))
                    table[0, field] = float("nan")  # so that a number that comes later is new
                    continue
                value = value.item()
            table[0, field] = value
        try:
            if self._launch is None:
                self._launch = self._launcher(self._tables)
            self._launch(None, found_inf)
        finally:
            traced.clear()


class Found(NamedTuple):
    """An update's tensors: of all buckets together what is written and what is read.

    read: None for what is done.
    rest: the places of the pairs that torch's code is to average.
    storages: their memory, where others may take it away.
    """

    written: list[Tensor]
    read: list[Tensor | None]
    rest: list[int]
    storages: list[Any]


class Plan:
    """What stays true from update to update. It keeps no tensor."""

    def __init__(self, operation: str, pairs: Pairs, rule: Rule) -> None:
        shares = sort(operation, pairs, ())
        count = len(pairs.averages)
        self._about = self.about(pairs, rule)
        self._buckets = [
            Bucket(share, pairs, rule) for share in shares if share.decision.backend != "reference"
        ]
        torchs = [
            (place, share.kind)
            for share in shares
            if share.decision.backend == "reference"
            for place in share.places
        ]
        self._rest = [(place, kind) for place, kind in torchs if place < pairs.averaged]
        self._copied = picker([p for p, _ in torchs if p >= pairs.averaged], count)
        self._pick = picker([k for bucket in self._buckets for k in bucket.places], count)
        self._proof: Proof | None = None
        if self._buckets:
            written, read = self._pick(pairs.averages), self._pick(pairs.values)
            self._proof = Proof(
                written, range(len(written)), [(t, None) for t in read],
                np.concatenate([bucket.written_cells for bucket in self._buckets]),
                np.concatenate([bucket.read_cells for bucket in self._buckets]),
            )  # fmt: skip

    @staticmethod
    def about(pairs: Pairs, rule: Rule) -> tuple[Any, ...]:
        """What a plan is for, but for the tensors themselves."""
        return rule.record, dispatch.insisted(), pairs.averaged, len(pairs.averages)

    def look(self, pairs: Pairs, rule: Rule, done: Collection[int]) -> Found | None:
        """Prove that the plan is still true, and take in new addresses; None if it isn't.

        done: ids of the parameters that have been averaged.
        """
        if self.about(pairs, rule) != self._about:
            return None
        for place, kind in self._rest:  # torch's no longer than the reason holds
            if kind_of(pairs.averages[place], pairs.values[place], ()) != kind:
                return None
        rest = [place for place, _ in self._rest if id(pairs.values[place]) not in done]
        written, storages = self._pick(pairs.averages), []
        read: list[Tensor | None] = [
            None if id(value) in done else value for value in self._pick(pairs.values)
        ]
        if self._proof is not None:
            answer = self._proof.look(written, read)
            if answer == DIFFERENT:
                return None
            if answer == OTHERS:
                for bucket in self._buckets:
                    bucket.count_elements()
            if others_may_run():
                storages = hold_storages(written + read, self._proof.addresses())
                if self._proof.look(written, read) != SAME:
                    return None
        return Found(written, read, rest, storages)

    def run(self, model: Any, turn: Turn, found: Found, found_inf: Tensor | None) -> None:
        """Average, or copy if nothing has been averaged yet; found_inf: not 0 to do nothing."""
        averaged: Tensor = model._buffers["n_averaged"]
        averages, values = self._copied(turn.pairs.averages), self._copied(turn.pairs.values)
        if (found.rest or averages) and found_inf is not None and found_inf.item():
            return
        if found.rest:
            _by_torch(model, averaged, turn.pairs, found.rest)
        for bucket in self._buckets:
            bucket.run(turn.row, found_inf)
        written = zip(found.written, found.read, strict=True)
        increment_versions([average for average, value in written if value is not None])
        _copy(averages, values)
        averaged.add_(1 if found_inf is None else (found_inf == 0).to(averaged.device))


def _copy(averages: list[Tensor], values: list[Tensor]) -> None:
    """By torch, as counters of batches and the like are."""
    if not averages:
        return
    if PLAIN.issuperset(map(type, chain(averages, values))):
        with torch.no_grad():
            torch._foreach_copy_(averages, values)
        return
    for average, value in zip(averages, values, strict=True):
        average.detach().copy_(value.detach().to(average.device))


class _Some:
    """What torch's code sees of a module: some parameters, and no buffers."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self._tensors = tensors

    def parameters(self) -> list[Tensor]:
        return self._tensors

    def buffers(self) -> list[Tensor]:
        return []


def _by_torch(model: Any, averaged: Tensor, pairs: Pairs, places: list[int]) -> None:
    """Have torch's own code average some of the pairs."""
    averages, values = (_Some([tensors[k] for k in places]) for tensors in pairs[:2])
    part: Any = SimpleNamespace(
        module=averages, use_buffers=True, n_averaged=averaged.clone(), avg_fn=model.avg_fn,
        multi_avg_fn=model.multi_avg_fn,
    )  # fmt: skip
    TorchsAveragedModel.update_parameters(part, values)  # type: ignore[arg-type]


class Averager(Keeper[Plan]):
    """Updates an AveragedModel, by one thread at a time."""

    def __init__(self) -> None:
        super().__init__()
        self._ours, self._theirs = Members(), Members()

    def renew(self) -> None:
        super().renew()
        self._ours, self._theirs = Members(), Members()

    def update(self, model: Any, source: Module) -> bool:
        """Take in the parameters of another model; False, and nothing done, if torch has to.

        Raises:
            BackendUnavailable: the backend insisted on can't serve every parameter.
        """
        with self.turns(model, source) as turn:
            return turn is not None and self.finish(model, turn)

    @contextmanager
    def turns(self, model: Any, source: Module) -> Iterator[Turn | None]:
        """This thread's turn at an update; None if torch has to do all of it."""
        if dispatch.insisted() == "reference":
            yield None
            return
        with self._lock:
            rule, pairs, special = self._ask(model, source)
            if special or rule is None:
                if dispatch.insisted() is not None:
                    sort(model._operation, pairs, special)  # raises
                yield None
                return
            if self.plan is None:
                self.plan = Plan(model._operation, pairs, rule)
            yield Turn(rule, rule.row(model._buffers["n_averaged"]), pairs)

    def finish(
        self, model: Any, turn: Turn, done: Collection[int] = (), found_inf: Tensor | None = None
    ) -> bool:
        """Update all averages, but for those of the parameters with the ids in done.

        found_inf: not 0 if none of it is to happen, as it hasn't for the others.
        """
        _, _, pairs = turn
        found = None if self.plan is None else self.plan.look(pairs, turn.rule, done)
        if found is None:
            self.plan = None  # stays so if the next line raises
            plan = Plan(model._operation, pairs, turn.rule)
            found = plan.look(pairs, turn.rule, done)
            if found is None:  # all share memory, or another thread has changed something
                return False
            self.plan = plan
        assert self.plan is not None
        self.plan.run(model, turn, found, found_inf)
        return True

    def decisions(self, model: Any, source: Module) -> tuple[Decision, ...]:
        """Who serves what is averaged."""
        with self._lock:
            _, pairs, special = self._ask(model, source, explained=True)
            return tuple(
                dispatch.describe(
                    share.decision, "describe_step", share.kind.average,
                    [pairs.averages[place].numel() for place in share.places],
                )
                for share in sort(model._operation, pairs, special)
                if share.places[0] < pairs.averaged
            )  # fmt: skip

    def _ask(
        self, model: Any, source: Module, explained: bool = False
    ) -> tuple[Rule | None, Pairs, list[str]]:
        """How to average what, and why only torch can do it."""
        special = around()
        if torch.is_inference_mode_enabled():
            special.append("inference mode")
        averaged, module = model._buffers.get("n_averaged"), model._modules.get("module")
        if type(averaged) is not Tensor or averaged.dtype != torch.int64 or averaged.dim():
            special.append("a number of averaged models of its own")
        if model._parameters or len(model._modules) != 1 or not is_walked_as_usual(model):
            special.append("parameters of its own")
        if special and (dispatch.insisted() is None or module is None) and not explained:
            return None, Pairs([], [], 0), special
        averages, buffers = self._ours.find(module)
        values, other_buffers = self._theirs.find(source)
        pairs = Pairs(averages + buffers, values + other_buffers, len(averages))
        if model.use_buffers:
            pairs = pairs._replace(averaged=len(pairs.averages))
        if len(averages) != len(values) or len(buffers) != len(other_buffers):
            special.append("another number of parameters or buffers than the model averaged has")
        if not pairs.averages:
            special.append("nothing to average")
        kind = pairs.averages[0].device.type if pairs.averages else "cpu"
        rule = None if special else rule_of(model.multi_avg_fn, model.avg_fn, kind)
        if rule is None and not special:
            special.append("an averaging function of its own")
        return rule, pairs, special

"""How the parameters and buffers of a model go into their averages, in one launch of a kind."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import Module
from torch.nn.parameter import is_lazy
from torch.optim.swa_utils import AveragedModel as TorchsAveragedModel

from .. import dispatch
from ..dispatch import Decision, Request
from ..errors import BackendUnavailable
from ..kernels.layout import is_dense, is_released, released_error, same_layout
from ..kernels.tables import DIFFERENT, SAME, Launch, Tables, Traced
from ._averaging import Rule, rule_of
from ._bucket import picker
from ._members import Members, is_walked_as_usual
from ._memory import Place, find_sharing, hold_storages, others_may_run
from ._planner import Keeper
from ._proof import Proof, increment_versions
from ._seams import around

__all__ = ["Averager"]

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_CPU = torch.device("cpu")


class Pairs(NamedTuple):
    """The averages, and what goes into each of them.

    Attributes:
        averaged: how many of the pairs, the first ones, are averaged; the others are copied.
    """

    averages: list[Tensor]
    values: list[Tensor]
    averaged: int


class Kind(NamedTuple):
    """What the pairs of one launch have in common: device, dtypes, and why only torch serves it."""

    device: torch.device
    average: torch.dtype
    value: torch.dtype
    special: tuple[str, ...]


class Share(NamedTuple):
    """The places of the pairs of one kind, and who serves them."""

    kind: Kind
    decision: Decision
    places: list[int]


def _kind_of(average: Tensor, value: Tensor, special: Sequence[str]) -> Kind:
    if is_lazy(average) or is_lazy(value):
        words = (*special, "a parameter whose size isn't known yet")
        return Kind(_CPU, torch.float32, torch.float32, words)
    words = (*special, *([] if special else _specials(average, value)))
    return Kind(average.device, average.dtype, value.dtype, words)


def _specials(average: Tensor, value: Tensor) -> list[str]:
    """Why only torch can serve a pair."""
    for name, tensor in (("average", average), ("parameter or buffer", value)):
        if type(tensor) not in _PLAIN:
            return [f"a {name} of type {type(tensor).__name__}"]
        if tensor.layout is not torch.strided:
            return [f"a {name} of layout {tensor.layout}"]
        if is_released(tensor):
            raise released_error(f"a {name}", tensor)
        if tensor.is_neg() or tensor.is_conj():
            return [f"a lazily negated or conjugated {name}"]
    if value.device != average.device:
        return [f"a parameter or buffer on {value.device} for an average on {average.device}"]
    if average.is_inference():
        return ["an average made in inference mode"]
    if not is_dense(average) or not same_layout(average, value):
        return [
            "parameters of other layouts than their averages', or with gaps: strides "
            f"{tuple(value.stride())} for {tuple(average.stride())}"
        ]
    return []


def _placed(tensors: list[Tensor]) -> list[tuple[Place, Tensor]]:
    return [(Place(k, ""), t) for k, t in enumerate(tensors) if type(t) in _PLAIN]


def sort(operation: str, pairs: Pairs, special: Sequence[str]) -> list[Share]:
    """The pairs sorted by kind, and who serves each. special: what is so of all of them.

    Raises:
        BackendUnavailable: the backend insisted on can't serve what is to be averaged.
    """
    if not special and find_sharing(_placed(pairs.averages), _placed(pairs.values)):
        special = ["averages and parameters that share memory"]  # so that their order counts
    places: dict[Kind, list[int]] = {}
    for place, (average, value) in enumerate(zip(pairs.averages, pairs.values, strict=False)):
        places.setdefault(_kind_of(average, value, special), []).append(place)
    shares = []
    for kind, members in places.items():
        device, is_cuda = kind.device, kind.device.type == "cuda"
        request = Request(
            operation, device.type, (kind.average, kind.value),
            sum(0 if is_lazy(t) else t.numel() for t in map(pairs.averages.__getitem__, members)),
            kind.special, torch.cuda.get_device_capability(device) if is_cuda else None,
            dispatch.insisted(),
        )  # fmt: skip
        try:
            decision = dispatch.choose(request)
        except BackendUnavailable:
            if members[0] < pairs.averaged:
                raise
            decision = dispatch.choose(request._replace(insisted="reference"))  # only copied
        shares.append(Share(kind, decision, members))
    return shares


class Bucket:
    """The pairs of one kind: their table, and its launch."""

    def __init__(self, share: Share, pairs: Pairs, rule: Rule) -> None:
        self._device, places = share.kind.device, share.places
        count, fields = len(places), len(rule.record.numbers)
        self.places = places
        sizes = [pairs.averages[place].numel() for place in places]
        self._tables = Tables(
            device=self._device,
            hypers=np.ones((2, fields)),  # the second row is that of what is copied
            traced=[],
            row_of=np.array([int(place >= pairs.averaged) for place in places], np.int64),
            offsets=np.array([0, *np.cumsum(sizes)], np.int64),
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

    def run(self, row: Sequence[float | Tensor]) -> None:
        """Launch, with these fields for what is averaged."""
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
            self._launch(None, None)
        finally:
            traced.clear()


class Found(NamedTuple):
    """An update's tensors: of all buckets together what is written and what is read.

    storages: their memory, where others may take it away.
    """

    written: list[Tensor]
    read: list[Tensor]
    storages: list[Any]


class Plan:
    """What stays true from update to update. It keeps no tensor."""

    def __init__(self, operation: str, pairs: Pairs, rule: Rule, special: Sequence[str]) -> None:
        shares = sort(operation, pairs, special)
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

    def look(self, pairs: Pairs, rule: Rule) -> Found | None:
        """Prove that the plan is still true, and take in new addresses; None if it isn't."""
        if self.about(pairs, rule) != self._about:
            return None
        for place, kind in self._rest:  # torch's no longer than the reason holds
            if _kind_of(pairs.averages[place], pairs.values[place], ()) != kind:
                return None
        written, read, storages = self._pick(pairs.averages), self._pick(pairs.values), []
        if self._proof is not None:
            if self._proof.look(written, read) == DIFFERENT:
                return None
            if others_may_run():
                storages = hold_storages(written + read, self._proof.addresses())
                if self._proof.look(written, read) != SAME:
                    return None
        return Found(written, read, storages)

    def run(self, model: Any, pairs: Pairs, rule: Rule, found: Found) -> None:
        """Average, or copy if nothing has been averaged yet."""
        averaged: Tensor = model._buffers["n_averaged"]
        row = rule.row(averaged)
        if self._rest:
            _by_torch(model, averaged, pairs, [place for place, _ in self._rest])
        for bucket in self._buckets:
            bucket.run(row)
        increment_versions(found.written)
        _copy(self._copied(pairs.averages), self._copied(pairs.values))
        averaged.add_(1)


def _copy(averages: list[Tensor], values: list[Tensor]) -> None:
    """By torch, as counters of batches and the like are."""
    if not averages:
        return
    if _PLAIN.issuperset(map(type, chain(averages, values))):
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
        if dispatch.insisted() == "reference":
            return False
        with self._lock:
            rule, pairs, special = self._ask(model, source)
            if special or rule is None:
                if dispatch.insisted() is not None:
                    sort(model._operation, pairs, special)  # raises
                return False
            found = None if self.plan is None else self.plan.look(pairs, rule)
            if found is None:
                self.plan = None  # stays so if the next line raises
                plan = Plan(model._operation, pairs, rule, special)
                found = plan.look(pairs, rule)
                if found is None:  # all share memory, or another thread has changed something
                    return False
                self.plan = plan
            assert self.plan is not None
            self.plan.run(model, pairs, rule, found)
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

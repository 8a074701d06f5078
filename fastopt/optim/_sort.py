"""Parameters sorted by what a launch has to know of them, and who serves each kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .. import dispatch
from ..dispatch import Decision, Request
from ..errors import BackendUnavailable
from ._kinds import Kind, group_specials, kind_of
from ._memory import Place, Sharing, find_sharing
from ._seams import circumstances
from ._shards import local

if TYPE_CHECKING:
    from ._planned import PlannedStep


class Member(NamedTuple):
    """A parameter, the place of its group, and its own among the parameters of all groups."""

    param: Tensor
    group: int
    place: int


class Share(NamedTuple):
    """The members of one kind, and who serves them."""

    kind: Kind
    decision: Decision
    members: list[Member]


class Sorting(NamedTuple):
    """All parameters of an optimizer, sorted.

    Attributes:
        shares: of the parameters that have a gradient, and of those without one that kernels
            will serve when they have one.
        idle: those without a gradient that torch's code will update when they have one.
        waiting: those without a gradient of which more is known only then.
        kinds: by its place, of each parameter that isn't waiting.
        sharing: what shares memory, so that all are torch's; None if nothing does.
    """

    shares: list[Share]
    idle: list[Member]
    waiting: list[Member]
    kinds: dict[int, Kind]
    sharing: Sharing | None


def sort(
    optimizer: PlannedStep,
    known: Mapping[int, Kind] | None = None,
    without_grads: bool = False,
    averages: Mapping[int, Tensor] | None = None,
) -> Sorting:
    """Sort parameters by kind, and decide for each kind.

    Args:
        optimizer: nothing of it is changed.
        known: kinds in the plan before, by the parameters' ids; they say no more than what to
            expect of a gradient that isn't there.
        without_grads: count parameters without a gradient as if they had one of their own
            dtype and layout.
        averages: those that a launch may take along, by the parameters' ids.

    Raises:
        BackendUnavailable: the backend insisted on can't serve a parameter with a gradient.
    """
    known, averages = known or {}, averages or {}
    if averages and find_sharing(*_memory(optimizer, without_grads, averages)):
        averages = {}  # they are updated after the step, whose memory is looked at below
    around = circumstances(optimizer)
    specials = [group_specials(optimizer, group) for group in optimizer.param_groups]
    present: dict[Kind, list[Member]] = {}
    absent: dict[Kind, list[Member]] = {}
    kinds: dict[int, Kind] = {}
    idle: list[Member] = []
    waiting: list[Member] = []
    for member in _members(optimizer):
        param, group = member.param, optimizer.param_groups[member.group]
        last = known.get(id(param))
        if param.grad is not None or without_grads:
            kind = kind_of(optimizer, group, around, specials[member.group], param)
            kind = _with_average(kind, averages.get(id(param)))
            present.setdefault(kind, []).append(member)
        elif last is not None and last.special:
            kind = last
            idle.append(member)
        else:
            dtype = None if last is None else last.grad
            kind = kind_of(optimizer, group, around, specials[member.group], param, dtype)
            kind = _with_average(kind, averages.get(id(param)))
            if kind.special:
                idle.append(member)
            elif has_states(optimizer, group, param):
                absent.setdefault(kind, []).append(member)
            else:
                waiting.append(member)
                continue
        kinds[member.place] = kind
    sharing = None if around else find_sharing(*_memory(optimizer, without_grads))
    if sharing is not None:
        present = _merge(present, "parameters, states or gradients that share memory")
        idle += [member for members in absent.values() for member in members]
        absent.clear()
    shares = []
    for kind, members in present.items():
        members = sorted(members + absent.pop(kind, []), key=lambda m: m.place)
        shares.append(Share(kind, dispatch.choose(_request(optimizer, kind, members)), members))
    for kind, members in absent.items():
        if not any(id(m.param) in known or optimizer.state.get(m.param) for m in members):
            waiting += members  # no backend need be loaded yet
            continue
        try:
            decision = dispatch.choose(_request(optimizer, kind, members))
        except BackendUnavailable:  # to be raised when there is something to update
            waiting += members
            continue
        if decision.backend == "reference":
            idle += members
        else:
            shares.append(Share(kind, decision, members))
    if dispatch.insisted() not in (None, "reference"):
        waiting, idle = waiting + idle, []
    return Sorting(shares, idle, waiting, kinds, sharing)


def _members(optimizer: PlannedStep) -> Iterator[Member]:
    """All parameters, in order."""
    place = 0
    for group_place, group in enumerate(optimizer.param_groups):
        for param in group["params"]:
            yield Member(param, group_place, place)
            place += 1


def _with_average(kind: Kind, average: Tensor | None) -> Kind:
    if average is None or kind.special or kind.sharded:
        return kind
    return kind._replace(average=average.dtype)


def _merge(by_kind: dict[Kind, list[Member]], reason: str) -> dict[Kind, list[Member]]:
    merged: dict[Kind, list[Member]] = {}
    for kind, members in by_kind.items():
        kind = kind._replace(special=(*kind.special, reason), average=None)
        merged.setdefault(kind, []).extend(members)
    return merged


def has_states(optimizer: PlannedStep, group: dict[str, Any], param: Tensor) -> bool:
    """Whether all states of a parameter exist that its group's configuration uses."""
    names = [*optimizer._active_of(group, param), *optimizer._scalars]
    names += ["step"] if optimizer._counts else []
    state = optimizer.state.get(param, {}) if names else {}
    return all(state.get(name) is not None for name in names)


def size_of(param: Tensor) -> int:
    """How many elements this process holds; none of a lazy module's, which isn't known yet."""
    return 0 if is_lazy(param) else local(param).numel()


def _request(optimizer: PlannedStep, kind: Kind, members: list[Member]) -> Request:
    device = kind.device
    return Request(
        optimizer._operation,
        device.type,
        (kind.param, kind.grad, *(d for d in kind.slots if d is not None)),
        sum(size_of(m.param) for m in members),
        kind.special,
        torch.cuda.get_device_capability(device) if device.type == "cuda" else None,
        dispatch.insisted(),
    )


_Placed = list[tuple[Place, Tensor]]


def _memory(
    optimizer: PlannedStep, without_grads: bool, averages: Mapping[int, Tensor] | None = None
) -> tuple[_Placed, _Placed]:
    """What a step writes to, and what it reads beside that."""
    written: _Placed = []
    read: _Placed = []
    for place, group in enumerate(optimizer.param_groups):
        read += [(Place(-1 - place, name), t) for name, t in group.items() if isinstance(t, Tensor)]
    for param, _, place in _members(optimizer):
        if param.grad is not None:
            read.append((Place(place, ".grad"), local(param.grad)))
        elif not without_grads:
            continue
        written.append((Place(place, ""), local(param)))
        if averages and id(param) in averages:
            written.append((Place(place, ".average"), averages[id(param)]))
        for name, t in optimizer.state.get(param, {}).items():
            if isinstance(t, Tensor):
                written.append((Place(place, name), local(t)))
    return written, read

"""The step plan: everything about an optimizer's step that stays true from step to step.

Parameters are sorted into buckets that one launch can serve, and a bucket has a table of the
addresses of its tensors. A plan keeps no tensor: in each step it finds parameters, gradients and
states where the optimizer has them, proves by one call of compiled code that all are of the kind
that they were planned for, and writes addresses that have changed (``p.data = …``, a new gradient,
a replaced state) into the table. A parameter without a gradient counts no elements. What is of
another kind makes a new plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import chain
from operator import attrgetter, is_, itemgetter
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import dispatch
from ..kernels.tables import DIFFERENT, OTHERS, SAME, Averaged
from ._bucket import Bucket, active, picker
from ._kinds import Kind, group_specials, kind_of
from ._memory import hold_storages, others_may_run, overlap, span
from ._proof import Proof, items_of
from ._shards import local
from ._sort import Share, Sorting, sort

if TYPE_CHECKING:
    from ._pairs import Turn
    from ._planned import PlannedStep

_grad, _params = attrgetter("grad"), itemgetter("params")
#: Types of hyperparameters that can't change in place.
_FIXED = {float, int, bool, str, type(None), np.float64, np.float32, np.int64, np.int32}


class Found(NamedTuple):
    """A step's tensors. Whoever has this keeps them, and the memory that a launch reads.

    Attributes:
        params, grads: of all groups; None for a gradient that isn't there.
        buckets: of each bucket what it writes to, what this process holds of that, and gradients.
        storages: the memory of what the launches read, where others may take it away.
    """

    params: list[Tensor]
    grads: list[Tensor | None]
    buckets: list[tuple[list[Any], list[Any], list[Any]]]
    storages: list[Any]


class StepPlan:
    """How to step an optimizer. Creates the states that its compiled updates need.

    Attributes:
        reference: places of the parameters that torch's own step has to update.
        kinds: of the parameters, by their ids.
    """

    def __init__(
        self, optimizer: PlannedStep, known: Mapping[int, Kind], turn: Turn | None
    ) -> None:
        """known: kinds of the plan before; turn: averages that the step may take along."""
        self._mode = _mode()
        self._rule = None if turn is None else turn.rule.record
        self._averaged = items_of([] if turn is None else turn.pairs.values)
        averages = {} if turn is None or optimizer._sees_params else turn.joinable()
        # May raise; nothing has been changed before.
        sorting = sort(optimizer, known, averages=averages)
        params = all_params(optimizer)
        self._params = items_of(params)
        self._sizes = list(map(len, map(_params, optimizer.param_groups)))
        self._waiting = [m.place for m in sorting.waiting]
        self.kinds = {id(params[place]): kind for place, kind in sorting.kinds.items()}
        compiled = self._set_reference(optimizer, sorting)
        # Only now, when nothing can fail any more, states begin.
        begun = _create_states(optimizer, sorting.shares) if compiled else set()
        self._buckets = [Bucket(optimizer, share, begun, launch) for share, launch in compiled]
        self._fresh = any(bucket.fresh for bucket in self._buckets)
        self._find_states = any(bucket.names for bucket in self._buckets)
        keys = list(optimizer.state)
        self._keys = items_of(keys)
        place_of = {id(key): place for place, key in enumerate(keys)}
        self._pickers = []
        for bucket in self._buckets:
            states = [place_of[id(params[k])] for k in bucket.places] if bucket.names else []
            joined = []
            if turn is not None and bucket.averages:
                place = {id(value): k for k, value in enumerate(turn.pairs.values)}
                joined = [place[id(params[k])] for k in bucket.places]
            pick_joined = picker(joined, 0 if turn is None else len(turn.pairs.averages))
            self._pickers.append(
                (picker(bucket.places, len(params)), picker(states, len(keys)), pick_joined)
            )
        self._proof = self._begin_proof(optimizer, params, [s.kind for s, _ in compiled], turn)
        self._options = itemgetter(
            *optimizer._defaults_of(optimizer._twin)[0], *(["seed"] if optimizer._draws else [])
        )
        self._flags = list(map(optimizer._flags, optimizer.param_groups))
        self._set_hypers(optimizer)

    def _set_reference(self, optimizer: PlannedStep, sorting: Sorting) -> list[tuple[Share, Any]]:
        """Note what is torch's; the other shares, with their launchers."""
        compiled, members = [], list(sorting.idle)
        for share in sorting.shares:
            if share.decision.backend == "reference":
                members += share.members
            else:
                backend = dispatch.load(share.decision.backend)
                average = share.kind.average
                averaged = None if average is None else Averaged(self._rule, average)
                compiled.append((share, optimizer._launcher(backend, share.kind, averaged)))
        self.reference = [m.place for m in members]
        self._sharing = sorting.sharing
        fits = [not group_specials(optimizer, group) for group in optimizer.param_groups]
        # Those of other groups are torch's as long as their group's options are these.
        self._examined = [
            (m.group, m.place, sorting.kinds[m.place]) for m in members if fits[m.group]
        ]
        return compiled

    def _begin_proof(
        self, optimizer: PlannedStep, params: list[Tensor], kinds: list[Kind], turn: Turn | None
    ) -> Proof | None:
        if not self._buckets:
            return None
        grads = list(map(_grad, params))
        found = self._find(optimizer, params, grads, turn)
        assert found is not None, "states that have just been created"
        owners: list[int] = []
        expected: list[tuple[Tensor, torch.dtype | None]] = []
        for (_, held, shards), kind in zip(found, kinds, strict=True):
            count = len(shards)
            owners += [len(expected) + k % count for k in range(len(held))]
            expected += [
                (held[k], kind.grad) if grad is None else (grad, None)
                for k, grad in enumerate(shards)
            ]
        return Proof(
            [t for _, held, _ in found for t in held],
            owners,
            expected,
            np.concatenate([bucket.written_cells for bucket in self._buckets]),
            np.concatenate([bucket.grad_cells for bucket in self._buckets]),
            list(optimizer.state.values()),
        )

    def _find(
        self, optimizer: PlannedStep, params: list[Tensor], grads: list[Tensor | None],
        turn: Turn | None,
    ) -> list[tuple[list[Any], list[Any], list[Any]]] | None:  # fmt: skip
        """The buckets' tensors as `Found` has them; None if some are no longer there."""
        states: list[Any] = []
        if self._find_states:
            if not self._keys.are(list(optimizer.state)):
                return None
            states = list(optimizer.state.values())
        averages = [] if turn is None else turn.pairs.averages
        found = []
        for bucket, (pick, pick_states, join) in zip(self._buckets, self._pickers, strict=True):
            try:
                written = bucket.written(pick(params), pick_states(states), join(averages))
            except (KeyError, TypeError):  # a state removed
                return None
            shards = bucket.shards(written, pick(grads))
            if shards is None:
                return None
            found.append((written, *shards))
        return found

    def look(self, optimizer: PlannedStep, turn: Turn | None, first: bool = False) -> Found | None:
        """Prove that the plan is still true, and take in new addresses and hyperparameters.

        Args:
            turn: averages that the step may take along.
            first: whether this is the plan's first step.

        Returns:
            What the step is about; None if another plan is needed.
        """
        if (self._fresh and not first) or self._mode != _mode():
            return None
        if self._rule is not (None if turn is None else turn.rule.record):
            return None
        if turn is not None and not self._averaged.are(turn.pairs.values):
            return None
        if self._proof is not None:
            self._proof.fetch()
        params = all_params(optimizer)
        if not self._params.are(params) or not self._has_these_groups(optimizer.param_groups):
            return None
        grads = list(map(_grad, params))
        if self._waiting and any(grads[place] is not None for place in self._waiting):
            return None
        if self.reference and not self._is_still_torchs(optimizer, params, grads):
            return None
        buckets = self._find(optimizer, params, grads, turn) if self._proof else []
        if buckets is None:
            return None
        storages: list[Any] = []
        if self._proof:
            if len(buckets) == 1:
                ((_, written, present),) = buckets
            else:
                written = list(chain.from_iterable(b[1] for b in buckets))
                present = list(chain.from_iterable(b[2] for b in buckets))
            answer = self._proof.look(written, present)
            if answer == DIFFERENT or (answer != SAME and self._overlaps_options(optimizer)):
                return None
            if first or answer == OTHERS:
                for bucket in self._buckets:
                    bucket.count_elements()
            if self.reference or others_may_run():
                storages = hold_storages(written + present, self._proof.addresses())
                # What is at these addresses still is what is held: no other can be there now.
                if self._proof.look(written, present) != SAME:
                    return None
        if not self._has_these_options(optimizer):
            return None
        return Found(params, grads, buckets, storages)

    def _has_these_groups(self, groups: list[dict[str, Any]]) -> bool:
        """Whether the same parameters are in groups of the same sizes."""
        if len(groups) == len(self._sizes) == 1:
            return True
        return list(map(len, map(_params, groups))) == self._sizes

    def _is_still_torchs(
        self, optimizer: PlannedStep, params: list[Tensor], grads: list[Tensor | None]
    ) -> bool:
        """Whether those that torch's code is to update are so for the reason that they were."""
        if self._sharing is not None:
            a, b = (span(local(place.find(optimizer))) for place in self._sharing)
            return overlap(a, b)
        return all(
            grads[place] is None
            or kind_of(optimizer, optimizer.param_groups[group], (), (), params[place]) == kind
            for group, place, kind in self._examined
        )

    def _overlaps_options(self, optimizer: PlannedStep) -> bool:
        """Whether a hyperparameter lies in memory that the step writes to."""
        if self._fixed or self._proof is None:
            return False
        values = chain.from_iterable(map(dict.values, optimizer.param_groups))
        return self._proof.overlaps([s for v in values if (s := span(v)) is not None])

    def _has_these_options(self, optimizer: PlannedStep) -> bool:
        """Whether the groups' options ask for the same plan; new numbers are taken in."""
        if self._fixed:
            try:
                values = list(chain.from_iterable(map(self._options, optimizer.param_groups)))
            except KeyError:  # one has been removed
                return False
            if all(map(is_, values, self._values)):
                return True
        if list(map(optimizer._flags, optimizer.param_groups)) != self._flags:
            return False
        self._set_hypers(optimizer)
        return True

    def _set_hypers(self, optimizer: PlannedStep) -> None:
        self._fixed, self._values = False, []  # stays so if one of them can't be read
        for bucket in self._buckets:
            bucket.set_hypers(optimizer)
        try:
            values = list(chain.from_iterable(map(self._options, optimizer.param_groups)))
        except KeyError:  # as in a checkpoint of an older torch
            return
        numbers = list(chain.from_iterable(v if type(v) is tuple else (v,) for v in values))
        if _FIXED.issuperset(map(type, numbers)):
            self._fixed, self._values = True, values

    def run(
        self,
        optimizer: PlannedStep,
        found: Found,
        by_reference: Callable[[list[Tensor]], None],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        turn: Turn | None,
    ) -> None:
        """Take the step.

        Args:
            found: what `look` has found.
            by_reference: updates those parameters that no bucket has.
            grad_scale: what the gradients are to be divided by.
            found_inf: not 0 if the step is to be skipped.
            turn: averages that the step takes along where its buckets have them.
        """
        done, rule = 0, () if turn is None else turn.row
        try:
            torchs = [place for place in self.reference if found.grads[place] is not None]
            if torchs and (found_inf is None or not found_inf.item()):
                by_reference([found.params[place] for place in torchs])
            for bucket in self._buckets:
                bucket.run(optimizer, found.params, grad_scale, found_inf, rule)
                done += 1
        except BaseException:  # torch's refusal, or an interruption while something compiles
            self.forget_states(optimizer, found.params, done)
            raise
        for bucket, tensors in zip(self._buckets, found.buckets, strict=True):
            bucket.increment_versions(*tensors)

    def averaged(self, found: Found) -> set[int]:
        """The ids of the parameters whose averages the step has taken along."""
        return {
            id(param)
            for bucket, (written, _, grads) in zip(self._buckets, found.buckets, strict=True)
            if bucket.averages
            for param, grad in zip(written, grads, strict=False)
            if grad is not None
        }

    def forget_states(self, optimizer: PlannedStep, params: list[Tensor], done: int = 0) -> None:
        """Undo the beginning of states whose first step didn't happen; done: buckets that ran."""
        for bucket in self._buckets[done:]:
            bucket.forget_states(optimizer, params)


def _mode() -> tuple[str | None, bool]:
    return dispatch.insisted(), torch.is_inference_mode_enabled()


def all_params(optimizer: PlannedStep) -> list[Tensor]:
    """Those of all groups, in their order."""
    return list(chain.from_iterable(map(_params, optimizer.param_groups)))


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
                if optimizer._create_state(param, group, active(optimizer, share.kind)):
                    begun.add(id(param))
            elif optimizer._counts or active(optimizer, share.kind):
                optimizer.state[param]  # an empty dict in its place, for torch to fill
    return begun

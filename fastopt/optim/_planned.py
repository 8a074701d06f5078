"""What every fastopt optimizer adds to its torch twin: a step that follows a plan."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import dispatch
from ..dispatch import Decision
from ..kernels.layout import same_layout
from ..kernels.operation import Update
from ..kernels.tables import Averaged, Tables
from ._clipping import check_limit, divisor, norm_of, with_limit
from ._following import Follower, average_after, step_and_average
from ._hooks import with_hooks
from ._kinds import Kind, default_counter, defaults_of, fits_torchs_fused, group_specials
from ._plan import all_params
from ._planner import Planner
from ._rounded_step import rounded_step
from ._rounding import HALVES, Rounded, slot_rounding, with_rounding
from ._seams import circumstances, torchs_parts
from ._shards import is_dtensor
from ._sort import size_of, sort

Group = dict[str, Any]

# Counting on the host inside a CUDA graph would count once for all replays. Torch says so, in a
# method that older versions have under another name.
_check_capture: Callable[[Optimizer], None] = (
    getattr(Optimizer, "_accelerator_graph_capture_health_check", None)
    or Optimizer._cuda_graph_capture_health_check
)


class PlannedStep(Rounded):
    """Mixin in front of a torch optimizer class; overrides `step`, and what `Rounded` has.

    A subclass says how its hyperparameters become a record, and which states it has.
    Groups, state layout, checkpoints, validation and `repr` stay torch's. The plan is no
    part of the state: pickling and copying drop it, and the next step makes a new one. Where
    a subclass, a mode or a patch has a say in a step of torch's, that is the one to be taken.
    """

    _operation: ClassVar[str]
    #: the class whose step is the reference: torch's, or a plain definition of what torch lacks
    _twin: ClassVar[Any]
    #: the hyperparameters and the formulas
    _record: ClassVar[type[Update]]
    #: keys of all states that the update may use, in the formula's order
    _slots: ClassVar[tuple[str, ...]]
    #: keys of the states that are one number each, beside "step"
    _scalars: ClassVar[tuple[str, ...]]
    #: whether each element is updated by itself, so that it may be stored in other ways
    _elementwise: ClassVar[bool] = True
    #: whether torch counts on the parameters' device, whatever the options
    _counts_there: ClassVar[bool] = False
    #: hyperparameters that the kernels take from [0, 1) only
    _rates: ClassVar[tuple[str, ...]] = ()
    #: hyperparameters, or pairs with one, that may be None
    _optional: ClassVar[tuple[str, ...]] = ()
    #: whether a launch has to see the parameters, as they are in each step
    _sees_params: ClassVar[bool] = False
    #: the backend's function that says in words how a step runs
    _described_by: ClassVar[str] = "describe_step"
    #: whether the constructor makes the states, so that torch refuses a parameter without them
    _made_early: ClassVar[bool] = False
    #: whether kernels follow what torch does with NumPy's half precision as a hyperparameter
    _takes_halves: ClassVar[bool] = False
    #: whether torch takes tensors as any hyperparameter, not as lr alone
    _takes_tensors: ClassVar[bool] = True
    #: whether torch takes tensors as hyperparameters with foreach=True and without capturable
    _foreach_takes_tensors: ClassVar[bool] = True

    #: a function of the twin: its groups' `Defaults`
    _defaults_of: ClassVar[Any] = staticmethod(defaults_of)

    #: what torch says where a GradScaler leaves the division to this optimizer, if it minds
    _unscaled_only: ClassVar[str | None] = None

    #: the norm that the gradients of a step are scaled down to, all alike; None if they aren't.
    max_grad_norm: float | None = None
    #: their norm before that, in the last step that had a max_grad_norm: a 0-d tensor
    grad_norm: Tensor | None = None
    #: the averages that follow the steps
    _followers: tuple[Follower, ...] = ()
    #: what graphs of torch.compile have of it, and by which name; None before the first
    _in_graph: Any = None
    _name_in_graphs: str | None = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_operation" in vars(cls):
            cls._slots, cls._scalars = cls._record.slots, cls._record.scalars
            cls.__init__ = with_limit(cls.__init__)  # type: ignore[method-assign]
            if cls._elementwise:
                cls.__init__ = with_rounding(cls.__init__)  # type: ignore[method-assign]
            _, cls._twin = cls.__bases__
            torchs_parts(cls._twin)  # now, before anyone can have replaced some

    def _active(self, group: Group) -> tuple[str, ...]:
        """The slots that this group's configuration uses: all, where a subclass says nothing."""
        return self._slots

    def _active_of(self, group: Group, param: Tensor) -> tuple[str, ...]:
        """Of these, those that a parameter has: all, where a subclass says nothing."""
        if self.rounding == "kahan" and param.dtype in HALVES:
            return (*self._active(group), "compensation")
        return self._active(group)

    def _hyper(self, group: Group, begins: bool) -> Update:
        """A group's hyperparameters as a record; begins: at the first step of a state.

        Where a subclass says nothing they are the options that have the names of its fields.
        """
        sign, *names = self._record.numbers
        scale = -1.0 if group["maximize"] else 1.0
        return self._record(**{sign: scale, **{name: group[name] for name in names}})

    def _rounds(self, group: Group) -> bool:
        """Whether torch computes a step's numbers with NumPy's half precision."""
        return False

    def _rounded_hyper(self, group: Group, step: float) -> Update:
        """For such a group the record of one parameter, whose step it is."""
        raise NotImplementedError

    def _flags(self, group: Group) -> tuple[Any, ...]:
        """What decides how a group's parameters are sorted into buckets."""
        special = group_specials(self, group)
        if special:
            return special
        flags = group.get("capturable"), group.get("fused"), self._rounds(group)
        return (*self._active(group), *flags)

    def _create_state(self, param: Tensor, group: Group, names: Iterable[str]) -> bool:
        """Add missing states to a parameter, as torch lays them out; whether any was missing."""
        if not names and not self._counts:
            return False
        state = self.state[param]
        if self._counts and "step" not in state:
            dtype, device = default_counter(self, param, group)
            state["step"] = torch.zeros((), dtype=dtype, device=device)
            for name in self._scalars:
                number = self._first_number(name, group)
                state[name] = torch.full((), number, dtype=dtype, device=device)
        missing = [name for name in names if state.get(name) is None]
        for name in missing:
            state[name] = self._begin(name, param, group).to(self._dtype_of(name, param))
        return any(n in self._slots for n in missing) and not self._counts_steps

    def _refuse(self, group: Group) -> str | None:
        """Which of a group's numbers only torch's code takes."""
        return None

    def _refuse_param(self, param: Tensor) -> str | None:
        """Why only torch's code takes a parameter that kernels else take."""
        return None

    def _launcher(
        self, backend: Any, kind: Kind, averaged: Averaged | None
    ) -> Callable[[Tables], Any]:
        """What launches an update of parameters of one kind, once it is given their tables.

        averaged: the averages that it takes along, if any.
        """
        slots = kind.param, *kind.slots
        launcher: Callable[[Tables], Any] = backend.step_launcher(
            self._record, slots, kind.scalars, kind.grad, kind.step, averaged,
            slot_rounding(self, kind.param, kind.slots),
        )  # fmt: skip
        return launcher

    def _begin(self, name: str, param: Tensor, group: Group) -> Tensor:
        """A state at its beginning."""
        return torch.zeros_like(param, memory_format=torch.preserve_format)

    def _fits(self, name: str, param: Tensor, state: Tensor) -> bool:
        """Whether a state lies in memory as a launch takes it for granted: as the parameter."""
        return same_layout(param, state)

    def _first_number(self, name: str, group: Group) -> float:
        """A state that is one number, at its beginning."""
        return 1.0

    @classmethod
    def _usual(cls, size: int, dtype: torch.dtype) -> list[torch.nn.Parameter]:
        """Parameters of so many elements, with gradients, that need all that is compiled."""
        param = torch.nn.Parameter(torch.zeros(64, size // 64, dtype=dtype))
        param.grad = torch.zeros_like(param)
        return [param]

    # What torch wraps a class's `step` in.
    profile_hook_step = staticmethod(with_hooks)  # type: ignore[assignment]

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient.

        Inside ``torch.compile`` it is one operator of the graph, or torch's own step where no
        kernel serves; `explain` says which.

        Args:
            closure: computes the loss anew and returns it; called first, with gradients
                enabled.

        Returns:
            The closure's loss, or None.

        Raises:
            BackendUnavailable: inside ``use_backend``, that backend can't serve every
                parameter; nothing has been changed.
        """
        if not isinstance(self, PlannedStep):  # held since before `fastopt.convert` made it torch's
            step: Any = type(self).step
            return step.__wrapped__(self, closure)
        if self._counts_steps and "capturable" in self.defaults:
            _check_capture(self)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if torch.compiler.is_compiling():
            if self._is_rounded:
                raise RuntimeError(
                    f"state_dtype={self.state_dtype}, rounding={self.rounding!r} inside "
                    "torch.compile (supported: a step outside of what is compiled)"
                )
            if torch.compiler.is_dynamo_compiling():
                from ._in_graph import step_in_graph  # which brings torch's compiler

                if step_in_graph(self):
                    return loss
            if self.max_grad_norm is not None:
                limit = self.max_grad_norm
                self.grad_norm = torch.nn.utils.clip_grad_norm_(all_params(self), limit)
            self._torch_step()
            average_after(self, None)
            return loss
        is_torchs = dispatch.insisted() in (None, "reference") and circumstances(self)
        if is_torchs and self.max_grad_norm is None and not self._is_rounded:
            self._torch_step()
            average_after(self, getattr(self, "found_inf", None))
            return loss
        # Left here by a GradScaler, if fused=True.
        grad_scale, found_inf = getattr(self, "grad_scale", None), getattr(self, "found_inf", None)
        if grad_scale is not None or found_inf is not None:
            if self._unscaled_only is not None:
                raise AssertionError(self._unscaled_only)
            if "fused" not in self.defaults:  # such a one of torch's doesn't look
                grad_scale = found_inf = None
            elif not all(group.get("fused") for group in self.param_groups):
                raise AssertionError("Expected grad_scale and found_inf to be None")  # as torch's
        if self.max_grad_norm is not None:
            grad_scale = self._clip(grad_scale)

        def by_reference(params: list[Tensor]) -> None:
            with self._unscaled(params, grad_scale):
                self._torch_step(params)

        if is_torchs:
            if found_inf is None or not found_inf.item():
                by_reference(all_params(self))
            average_after(self, found_inf)
            return loss
        self._take_step(by_reference, grad_scale, found_inf)
        return loss

    def _take_step(
        self, by_reference: Callable[[list[Tensor]], None], grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:  # fmt: skip
        """Update all parameters; arguments as those of StepPlan.run."""
        planner: Planner | None = self.__dict__.get("_planner")
        if planner is None:
            planner = self.__dict__.setdefault("_planner", Planner())
        if self._followers:
            step_and_average(self, planner, by_reference, grad_scale, found_inf)
        else:
            planner.step(self, by_reference, grad_scale, found_inf)

    def _clip(self, grad_scale: Tensor | None) -> Tensor | None:
        """Note the gradients' norm; what is to divide them, a GradScaler's scale included."""
        most = self.max_grad_norm
        check_limit(most)
        if any(group.get("differentiable") for group in self.param_groups):
            raise ValueError(
                f"max_grad_norm={most} with differentiable=True, through which nothing would flow "
                "back (supported: clip_grad_norm_ before the step)"
            )
        grads = [p.grad for p in all_params(self) if p.grad is not None]
        if most is None or not grads:
            return grad_scale
        self.grad_norm = norm_of(grads, grad_scale)
        return divisor(self.grad_norm, most, grad_scale)

    def __getstate__(self) -> dict[str, Any]:
        limit = {} if self.max_grad_norm is None else {"max_grad_norm": self.max_grad_norm}
        return {**super().__getstate__(), **limit}

    @contextmanager
    def _unscaled(self, params: list[Tensor], grad_scale: Tensor | None) -> Iterator[None]:
        """Gradients divided by a number, the tensors themselves left as they are.

        Torch's step does so itself only where it is the fused one; any other refuses.
        """
        names = ("grad_scale", "found_inf")
        left = {name: self.__dict__.pop(name) for name in names if name in self.__dict__}
        scaled = [] if grad_scale is None else [(p, p.grad) for p in params]
        try:
            for p, grad in scaled:
                p.grad = None if grad is None else grad / grad_scale.to(grad.device)  # type: ignore[union-attr]
            yield
        finally:
            self.__dict__.update(left)
            for p, grad in scaled:
                p.grad = grad

    def _torch_step(self, params: list[Tensor] | None = None) -> None:
        """Torch's own step, for some parameters or for all.

        For parameters with gaps it is not the fused one, which takes all for contiguous and
        would write what lies between.
        """
        if self._is_rounded:
            rounded_step(self, params)
            return
        step = super().step.__func__  # type: ignore[attr-defined]
        if getattr(step, "hooked", False):  # its hooks run around our own step already
            step = step.__wrapped__
        if params is None:
            step(self)
            return
        chosen = set(map(id, params))
        groups = self.param_groups
        self.param_groups = [
            {**group, "params": [p for p in group["params"] if id(p) in chosen]} for group in groups
        ]
        for group in self.param_groups:
            if group.get("fused") and not all(map(fits_torchs_fused, group["params"])):
                group["fused"] = False
        try:
            step(self)
        finally:
            self.param_groups = groups

    def _facts_for_graph(self, backend: str | None) -> Any:
        """See `_in_graph.facts_of`: torch.compile runs this, and takes the result for constant."""
        from ._in_graph import facts_of

        return facts_of(self, backend)

    def _decisions(self, compiled: bool = False) -> tuple[Decision, ...]:
        """Who serves each kind of parameters.

        Args:
            compiled: inside torch.compile.

        Raises:
            BackendUnavailable: the backend insisted on can't serve every parameter.
        """
        # In a graph one without a gradient is refused, if at all, by a step in which it has one.
        shares = sort(self, without_grads=not compiled or dispatch.insisted() is None).shares
        reasons = self._refuse_graph() if compiled else ()
        decisions = [share.decision for share in shares]
        if reasons:
            requests = [decision.request for decision in decisions]
            special = [(*request.special, *reasons) for request in requests]
            decisions = [
                dispatch.choose(r._replace(special=s))
                for r, s in zip(requests, special, strict=True)
            ]
        return tuple(
            dispatch.describe(
                decision, self._described_by, kind.param, [size_of(m.param) for m in members]
            )
            for decision, (kind, _, members) in zip(decisions, shares, strict=True)
        )

    def _refuse_graph(self) -> tuple[str, ...]:
        """Why a step inside torch.compile is torch's own, in words; most often nothing."""
        if self._followers:
            return ("averages that follow its steps, inside torch.compile",)
        if any(map(is_dtensor, all_params(self))):
            return ("DTensors inside torch.compile",)
        return ()

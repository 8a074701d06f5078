"""States and parameters of 16 bits that keep small changes: options, seeds, checkpoints."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..kernels.rounding import COMPENSATION, NEAREST, STOCHASTIC, stream_of

if TYPE_CHECKING:
    from ._kinds import Kind
    from ._planned import PlannedStep

__all__ = [
    "HALVES", "Rounded", "check_seed", "draws", "slot_rounding", "stream", "with_rounding",
]  # fmt: skip

HALVES = (torch.bfloat16, torch.float16)
_ROUNDINGS = ("stochastic", "kahan")
_MOST = 2**63 - 1


class _Option(NamedTuple):
    name: str
    annotation: Any


_OPTIONS = (
    _Option("state_dtype", torch.dtype | None),
    _Option("rounding", str | None),
    _Option("seed", int | None),
)


# -- what the constructor is given ----------------------------------------------------------


def with_rounding(init: Callable[..., None]) -> Callable[..., None]:
    """A constructor that takes what this one takes, and state_dtype, rounding and seed."""

    @functools.wraps(init)
    def __init__(
        self: Any,
        *args: Any,
        state_dtype: torch.dtype | None = None,
        rounding: str | None = None,
        seed: int | None = None,
        **kwargs: Any,
    ) -> None:
        _check(state_dtype, rounding, seed)
        init(self, *args, **kwargs)
        if state_dtype is not None or rounding is not None:
            _begin(self, state_dtype, rounding, 0 if seed is None else seed)

    signature = inspect.signature(init)
    added = [
        inspect.Parameter(o.name, inspect.Parameter.KEYWORD_ONLY, default=None,
                          annotation=o.annotation)
        for o in _OPTIONS
    ]  # fmt: skip
    parameters = [*signature.parameters.values(), *added]
    __init__.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
    __init__.__annotations__ = {**init.__annotations__, **{o.name: o.annotation for o in _OPTIONS}}
    return __init__


def _check(state_dtype: Any, rounding: Any, seed: Any) -> None:
    """Raise for options that there aren't, or that don't go together."""
    if state_dtype not in (None, torch.bfloat16):
        raise ValueError(f"state_dtype={state_dtype!r} (supported: None, torch.bfloat16)")
    if rounding is not None and rounding not in _ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} (supported: None, 'stochastic', 'kahan')")
    if seed is None:
        return
    check_seed(seed)
    if state_dtype is None and rounding != "stochastic":
        raise ValueError(
            f"seed={seed!r} with state_dtype=None and rounding={rounding!r}, which draw no random "
            "numbers (supported with: state_dtype=torch.bfloat16, rounding='stochastic')"
        )


def check_seed(seed: Any) -> None:
    """Raise a ValueError for what is no seed."""
    if not isinstance(seed, int) or isinstance(seed, bool) or not 0 <= seed <= _MOST:
        raise ValueError(f"seed={seed!r} (supported: integers from 0 to 2**63 - 1)")


def _begin(
    optimizer: PlannedStep, state_dtype: torch.dtype | None, rounding: str | None, seed: int
) -> None:
    """Take the options in, or raise a ValueError for what they don't go with."""
    groups = optimizer.param_groups
    if state_dtype is not None and not any(map(optimizer._active, groups)):
        raise ValueError(
            f"state_dtype={state_dtype} for {optimizer._operation} without states "
            "(supported: options with which a parameter has some)"
        )
    optimizer.state_dtype, optimizer.rounding = state_dtype, rounding
    if optimizer._draws:
        optimizer.defaults["seed"] = seed
        for group in groups:
            group.setdefault("seed", seed)
    for place in range(len(groups)):
        _check_group(optimizer, place)
    for param, state in optimizer.state.items():  # of those that the constructor makes
        for name in optimizer._slots:
            if name in state:
                state[name] = state[name].to(optimizer._dtype_of(name, param))


def _check_group(optimizer: PlannedStep, place: int) -> None:
    """Raise a ValueError for a group that the optimizer's options don't go with."""
    group, rounding = optimizer.param_groups[place], optimizer.rounding
    given = f"state_dtype={optimizer.state_dtype}, rounding={rounding!r}"
    dtypes = list(dict.fromkeys(p.dtype for p in group["params"]))
    if group.get("differentiable"):
        raise ValueError(f"differentiable=True with {given} (supported: differentiable=False)")
    if any(dtype.is_complex for dtype in dtypes):
        raise ValueError(f"complex parameters in group {place} with {given} (supported: real ones)")
    if optimizer._draws:
        check_seed(group["seed"])
    if rounding is not None and dtypes and not set(HALVES) & set(dtypes):
        names = ", ".join(map(str, dtypes))
        raise ValueError(
            f"rounding={rounding!r} with parameters of {names} alone in group {place} "
            "(supported: groups that have some of torch.bfloat16 or torch.float16)"
        )


class Rounded(Optimizer):
    """What an optimizer is asked about how its states and parameters are stored."""

    _slots: ClassVar[tuple[str, ...]]
    #: whether torch's class counts steps
    _counts_steps: ClassVar[bool] = True

    #: the dtype of the states, rounded at random; None for the parameters' own. Not to be changed.
    state_dtype: torch.dtype | None = None
    #: how parameters of 16 bits are stored: None, "stochastic" or "kahan". Not to be changed.
    rounding: str | None = None

    @property
    def _is_rounded(self) -> bool:
        """Whether states or parameters are stored otherwise than torch's code would."""
        return self.state_dtype is not None or self.rounding is not None

    @property
    def _draws(self) -> bool:
        """Whether random numbers are drawn, by the steps' counters."""
        return self.state_dtype is not None or self.rounding == "stochastic"

    @property
    def _counts(self) -> bool:
        """Whether there are counters of steps: torch's, or those that random numbers need."""
        return self._counts_steps or self._draws

    @property
    def _state_names(self) -> tuple[str, ...]:
        """Keys of all states that a launch may have, in their order."""
        return (*self._slots, "compensation") if self.rounding == "kahan" else self._slots

    def _dtype_of(self, name: str, param: Tensor) -> torch.dtype:
        """The dtype of a state that begins."""
        if self.state_dtype is None or name == "compensation":
            return param.dtype
        return self.state_dtype

    def __getstate__(self) -> dict[str, Any]:
        options = {"state_dtype": self.state_dtype, "rounding": self.rounding}
        given = {name: value for name, value in options.items() if value is not None}
        return {**super().__getstate__(), **given}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of parameters, as torch does; one that the options don't go with is refused.

        Raises:
            ValueError: rounding is given and the group has no parameter of 16 bits, or a seed that
                is none; the group isn't added.
        """
        super().add_param_group(param_group)
        if self._is_rounded:
            try:
                _check_group(self, len(self.param_groups) - 1)  # type: ignore[arg-type]
            except ValueError:
                self.param_groups.pop()
                raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a checkpoint, as torch does. States are then of the dtype that they have here.

        state_dtype and rounding are this optimizer's own; the seed is the checkpoint's, if it has
        one.
        """
        _load_states(self, functools.partial(super().load_state_dict, state_dict))  # type: ignore[arg-type]


# -- how a launch stores what it computes ---------------------------------------------------


def slot_rounding(
    optimizer: PlannedStep, param: torch.dtype, states: Sequence[torch.dtype | None]
) -> tuple[str, ...] | None:
    """How the slots are stored of a parameter of a dtype, with states of such; None: to nearest."""
    stored = [NEAREST]
    if optimizer.rounding == "stochastic" and param in HALVES:
        stored = [STOCHASTIC]
    count = len(optimizer._slots)
    for dtype in states[:count]:
        random = optimizer.state_dtype is not None and dtype in HALVES
        stored.append(STOCHASTIC if random else NEAREST)
    stored += [COMPENSATION] * (len(states) - count)
    return None if set(stored) == {NEAREST} else tuple(stored)


def draws(optimizer: PlannedStep, kind: Kind) -> bool:
    """Whether an update of parameters of a kind draws random numbers."""
    return STOCHASTIC in (slot_rounding(optimizer, kind.param, kind.slots) or ())


def stream(seed: int, place: int, shard: int) -> int:
    """What the random numbers of a parameter are drawn by, both words in the bits of an int64."""
    first, second = stream_of(seed, place, shard)
    word = second << 32 | first
    return word - (1 << 64) if word >> 63 else word


# -- checkpoints ----------------------------------------------------------------------------


def _load_states(optimizer: PlannedStep, load: Callable[[], None]) -> None:
    """Load a checkpoint by torch's code, then have states as this optimizer keeps them.

    Torch brings each state to its parameter's dtype. Here they are taken from the checkpoint once
    more: a state of bfloat16 may be beyond what a parameter of float16 can hold.

    load: calls torch's ``load_state_dict``.
    """
    known = ["seed" in group for group in optimizer.param_groups]
    captured: list[dict[str, Any]] = []
    handle = optimizer.register_load_state_dict_pre_hook(lambda _, given: captured.append(given))
    try:
        load()
    finally:
        handle.remove()
    for group, had in zip(optimizer.param_groups, known, strict=True):
        if optimizer._draws:
            group.setdefault("seed", optimizer.defaults["seed"])
        elif not had:
            group.pop("seed", None)
    if not captured:
        return
    saved = captured[-1]
    places = [place for group in saved["param_groups"] for place in group["params"]]
    params = [param for group in optimizer.param_groups for param in group["params"]]
    for place, param in zip(places, params, strict=True):
        if param in optimizer.state:
            _adapt(optimizer, param, optimizer.state[param], saved["state"].get(place, {}))


def _adapt(
    optimizer: PlannedStep, param: Tensor, state: dict[str, Any], saved: dict[str, Any]
) -> None:
    """Bring the states of one parameter, as torch has loaded them, to what they are here."""
    names = optimizer._slots
    if not optimizer._counts and "step" not in names:
        state.pop("step", None)
    if optimizer.rounding != "kahan" and "compensation" not in names:
        state.pop("compensation", None)
    for name in names if optimizer.state_dtype is not None else ():
        if isinstance(value := saved.get(name), Tensor):
            state[name] = value.to(device=param.device, dtype=optimizer._dtype_of(name, param))
    for name in optimizer._scalars if optimizer._is_rounded else ():
        if isinstance(value := saved.get(name), Tensor):
            state[name] = value.to(device=state[name].device)

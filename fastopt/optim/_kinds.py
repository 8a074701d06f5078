"""What decides which parameters can share a launch, and what only torch can serve."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..kernels.layout import is_dense, is_released, released_error, same_layout
from ._rounding import check_seed
from ._shards import is_dtensor, local
from ._shards import specials as shard_specials

if TYPE_CHECKING:
    from ._planned import PlannedStep

_PLAIN = (Tensor, torch.nn.Parameter)
_COUNTERS = (torch.float32, torch.float64)
_FLOATS = (*_COUNTERS, torch.bfloat16, torch.float16)
_CPU = torch.device("cpu")


class Kind(NamedTuple):
    """What the parameters of one launch have in common.

    Attributes:
        device: their device.
        sharded: whether they are DTensors, of which this process updates its shards.
        param, grad: dtypes.
        slots: dtype of each state in the order of the optimizer's slots, None if not in use; and
            of their compensation, if they have one.
        step: dtype of the step counters, None if the optimizer has none.
        scalars: dtypes of the states that are one number.
        counted_on_device: whether the counters are the device's.
        special: why only torch can serve them, in words.
        average: dtype of the averages that a launch has of them, None if it has none.
    """

    device: torch.device
    sharded: bool
    param: torch.dtype
    grad: torch.dtype
    slots: tuple[torch.dtype | None, ...]
    step: torch.dtype | None
    scalars: tuple[torch.dtype, ...]
    counted_on_device: bool
    special: tuple[str, ...]
    average: torch.dtype | None = None


# -- what only torch can serve, or has to refuse ------------------------------------------


#: A group's options, by name, as they are by default; of those that are numbers, how many, 0 for
#: one alone.
Defaults = tuple[dict[str, Any], tuple[tuple[str, int], ...]]


@functools.cache
def defaults_of(twin: Any) -> Defaults:
    """A class's own defaults."""
    defaults: dict[str, Any] = twin([torch.zeros(1, 1)]).defaults
    return defaults, numbers_of(defaults)


def numbers_of(defaults: dict[str, Any]) -> tuple[tuple[str, int], ...]:
    """Which of some defaults are numbers."""
    return tuple(
        (name, len(value) if isinstance(value, tuple) else 0)
        for name, value in defaults.items()
        if not (value is None or isinstance(value, bool))  # a flag, of which its truth counts
    )


def group_specials(optimizer: PlannedStep, group: dict[str, Any]) -> tuple[str, ...]:
    """Why only torch can update a group's parameters, or say what is wrong with it."""
    defaults, numbers = optimizer._defaults_of(optimizer._twin)
    if not defaults.keys() <= group.keys():
        return tuple(f"no {name!r} in its group" for name in defaults if name not in group)
    special = ["differentiable=True"] if group.get("differentiable") else []
    if optimizer._draws:
        check_seed(group.get("seed"))
    for name, count in numbers:
        value = group[name]
        if not count:
            served = _is_served(optimizer, group, name, value)
        else:
            served = isinstance(value, (tuple, list)) and len(value) == count
            for number in value if served else ():
                served = served and _is_served(optimizer, group, name, number)
        if not served:
            among = " in [0, 1)" if name in optimizer._rates else ""
            special.append(f"{name}={value!r} where kernels take finite numbers{among}")
    if not special and (refused := optimizer._refuse(group)):
        special.append(refused)
    return tuple(special)


_TENSORS = ("lr", "betas")
_LARGEST = float(np.finfo(np.float64).max)


def _is_served(optimizer: PlannedStep, group: dict[str, Any], name: str, number: Any) -> bool:
    """Whether the kernels take a hyperparameter, of which torch takes more and refuses others."""
    if number is None:
        return name in optimizer._optional
    if isinstance(number, (np.floating, np.integer)):
        if type(number) is np.float16 and (
            name == "betas" or group.get("capturable") or not optimizer._takes_halves
        ):
            return False  # torch computes in half precision with it
        number = number.item()
    if isinstance(number, (float, int)):
        if name in optimizer._rates:
            return 0 <= number < 1 and not isinstance(number, bool)
        return -_LARGEST <= number <= _LARGEST and not isinstance(number, bool)
    if not isinstance(number, Tensor) or not number.is_floating_point():
        return False
    if name != "lr" and not optimizer._takes_tensors:
        return False
    if group.get("foreach") and not (optimizer._foreach_takes_tensors or group.get("capturable")):
        return False
    return number.dim() == 0 or (name in _TENSORS and number.numel() == 1)


def fits_torchs_fused(param: Tensor) -> bool:
    """Whether torch's fused step may have a parameter: it never looks at strides."""
    grad = param.grad
    if grad is None or param.layout is not torch.strided or grad.layout is not torch.strided:
        return True
    return is_dense(param) and same_layout(param, grad)


def kind_of(
    optimizer: PlannedStep,
    group: dict[str, Any],
    around: tuple[str, ...],
    group_special: tuple[str, ...],
    param: Tensor,
    expected: torch.dtype | None = None,
) -> Kind:
    """What kind of a parameter it is.

    Args:
        around: why torch's own step has to be taken.
        group_special: why only torch can update its group.
        expected: the dtype of a gradient that isn't there; the parameter's if None.

    Raises:
        RuntimeError: a parameter with a gradient, that or a state has no memory.
    """
    special = [*around, *group_special]
    if is_lazy(param):  # of which torch lets nothing be asked
        special.append(f"a parameter of type {type(param).__name__}, whose size isn't known yet")
        slots = (None,) * len(optimizer._slots)
        return Kind(_CPU, False, param.dtype, param.dtype, slots, None, (), False, tuple(special))
    state = optimizer.state.get(param, {})
    there, grad = param.grad is not None, param if param.grad is None else param.grad
    if group.get("capturable") and param.device.type == "cpu":
        special.append("capturable=True on the CPU")
    if torch.is_inference_mode_enabled() or param.is_inference():
        special.append("inference mode")  # whose tensors torch keeps from changing outside of it
    special += shard_specials("gradient", grad, param)
    whole, param, grad = param, local(param), local(grad)
    if not around:  # a transform's tensors have no address
        special += _layout_specials(param, grad, there)
        if not special and (refused := optimizer._refuse_param(whole)):
            special.append(refused)
    active = () if group_special else optimizer._active_of(group, param)
    own = [name for name in active if name not in optimizer._slots]  # which torch has not
    # Torch creates all states or none, or has created them.
    if (state or optimizer._made_early) and optimizer._counts_steps:
        names = (*(n for n in active if n not in own), *optimizer._scalars, "step")
        special += [f"no state {name!r}, which torch has" for name in names if name not in state]
    dtypes: list[torch.dtype | None] = []
    for name in (*optimizer._slots, *own):
        value, dtype = state.get(name), None
        if name not in active:
            pass
        elif value is None and not (name in state and optimizer._counts_steps):
            dtype = optimizer._dtype_of(name, param)
        elif not isinstance(value, Tensor) or type(local(value)) is not Tensor:
            special.append(f"state {name!r} of type {type(value).__name__}")
        elif value.is_inference():
            special.append(f"state {name!r} made in inference mode")
        elif value.device != param.device:
            special.append(f"state {name!r} of another device than the parameter's")
        elif unlike := shard_specials(f"state {name!r}", value, whole):
            special += unlike
        elif not special and not optimizer._fits(name, param, local(value)):
            special.append(f"state {name!r} of another layout than the parameter's")
        elif there and not special and is_released(local(value)):
            raise released_error(f"a state {name!r}", local(value))
        else:
            dtype = value.dtype
        dtypes.append(dtype)
    step, on_device = None, False
    scalars: list[torch.dtype] = []
    if optimizer._counts:
        step, where = default_counter(optimizer, param, group)
        counter = state.get("step")
        if counter is not None:
            if type(counter) is Tensor and counter.numel() == 1 and counter.dtype in _COUNTERS:
                step, where = counter.dtype, counter.device
                if there and not around and is_released(counter):
                    raise released_error("a state 'step'", counter)
            else:
                special.append("state 'step' that is no one number")
        if where not in (param.device, _CPU):
            special.append(f"state 'step' on {where}")
        on_device = where == param.device and (where != _CPU or _keeps_counter(optimizer, group))
        for name in optimizer._scalars:
            number = state.get(name)
            if number is None:
                scalars.append(step)
            elif not (type(number) is Tensor and number.numel() == 1 and number.dtype in _FLOATS):
                special.append(f"state {name!r} that is no one number")
            elif number.device != where:
                special.append(f"state {name!r} of another device than 'step'")
            elif there and not around and is_released(number):
                raise released_error(f"a state {name!r}", number)
            else:
                scalars.append(number.dtype)
    dtype = grad.dtype if there or expected is None else expected
    return Kind(
        param.device, is_dtensor(whole), param.dtype, dtype, tuple(dtypes), step,
        tuple(scalars), on_device, tuple(special),
    )  # fmt: skip


def _keeps_counter(optimizer: PlannedStep, group: dict[str, Any]) -> bool:
    """Whether torch keeps a parameter's step counter on the parameter's device."""
    if not optimizer._counts_steps:  # where its own has none, one that the host need not wait for
        return True
    return bool(optimizer._counts_there or group.get("fused") or group.get("capturable"))


def default_counter(
    optimizer: PlannedStep, param: Tensor, group: dict[str, Any]
) -> tuple[torch.dtype, torch.device]:
    """The dtype and device that torch gives a new step counter."""
    double = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    there = _keeps_counter(optimizer, group)
    device = param.device if there else torch.get_default_device()
    return torch.float64 if double else torch.float32, device


def _layout_specials(param: Tensor, grad: Tensor, has_grad: bool) -> list[str]:
    for name, tensor in (("parameter", param), ("gradient", grad)):
        if type(tensor) not in _PLAIN:
            return [f"a {name} of type {type(tensor).__name__}"]
        if tensor.layout is not torch.strided:
            return [f"a {name} of layout {tensor.layout}"]
        if has_grad and is_released(tensor):
            raise released_error(f"a {name}", tensor)
        if tensor.is_neg() or tensor.is_conj():
            return [f"a lazily negated or conjugated {name}"]
    if grad.device != param.device:
        return [f"a gradient on {grad.device} for a parameter on {param.device}"]
    if not is_dense(param):
        return [f"a parameter with gaps or overlaps: strides {tuple(param.stride())}"]
    if not same_layout(param, grad):
        return [
            f"a gradient of another layout: strides {tuple(grad.stride())} "
            f"for {tuple(param.stride())}"
        ]
    return []

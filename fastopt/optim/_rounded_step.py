"""A step with states or parameters of 16 bits in torch's operations: what kernels are held to.

It is taken where no kernel serves, as torch's own step is without these options.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..kernels.layout import is_dense
from ..kernels.reference.rounding import (
    compensated,
    element_bits,
    places_in_memory,
    stochastic,
)
from ..kernels.rounding import STOCHASTIC, half_of, key_of, stream_of
from ._rounding import slot_rounding
from ._shards import local, shard_of
from ._shards import specials as shard_specials

if TYPE_CHECKING:
    from ._planned import PlannedStep

__all__ = ["rounded_step"]


@torch.no_grad()
def rounded_step(optimizer: PlannedStep, chosen: Sequence[Tensor] | None = None) -> None:
    """Update parameters by the optimizer's formula, as its options have them stored.

    Args:
        chosen: the parameters, those without a gradient are left alone; None for all.

    Raises:
        RuntimeError: a gradient is sparse, or a DTensor of another cut than its parameter.
    """
    ids = None if chosen is None else set(map(id, chosen))
    place = 0
    updates = []
    for group in optimizer.param_groups:
        for param in group["params"]:
            if param.grad is not None and (ids is None or id(param) in ids):
                _check(optimizer, param)
                updates.append((param, group, place))
            place += 1
    for param, group, place in updates:
        _update(optimizer, param, group, place)


def _check(optimizer: PlannedStep, param: Tensor) -> None:
    grad: Any = param.grad
    given = f"state_dtype={optimizer.state_dtype}, rounding={optimizer.rounding!r}"
    if grad.is_sparse or grad.layout is not torch.strided:
        raise RuntimeError(f"a gradient of layout {grad.layout} with {given} (supported: strided)")
    for unlike in shard_specials("gradient", grad, param):
        raise RuntimeError(f"{unlike} with {given} (supported: one cut as the parameter)")


def _update(optimizer: PlannedStep, param: Tensor, group: dict[str, Any], place: int) -> None:
    names = [n for n in optimizer._state_names if n in optimizer._active_of(group, param)]
    begins = optimizer._create_state(param, group, names)
    state, whole = optimizer.state[param] if names or optimizer._counts else {}, param
    param, grad = local(whole), local(whole.grad)  # type: ignore[arg-type]
    slots = [local(state[n]) if n in names else None for n in optimizer._slots]
    compensation = local(state["compensation"]) if "compensation" in names else None
    compute = torch.float64 if param.dtype == torch.float64 else torch.float32
    step, hyper = _numbers(optimizer, group, state, begins, compute, param.device)

    kept = slots if compensation is None else [*slots, compensation]
    dtypes = [None if t is None else t.dtype for t in kept]
    stored = slot_rounding(optimizer, param.dtype, dtypes) or ()
    values = [None if t is None else t.to(compute) for t in slots]
    before = param.to(compute)
    if compensation is not None:
        before = before + compensation.to(compute)
    new = optimizer._record.update(hyper, before, grad.to(compute), *values)

    if STOCHASTIC in stored:
        first, second = stream_of(group["seed"], place, shard_of(whole))
        key, places = key_of(first, second, step), places_in_memory(param, is_dense(param))
    for k, (target, value) in enumerate(zip([param, *slots], new, strict=True)):
        if target is None:
            continue
        if stored and stored[k] == STOCHASTIC:
            bits = element_bits(places, key, half_of(k, len(slots)))
            value = stochastic(value, bits, target.dtype)
        elif k == 0 and compensation is not None:
            value, lost = compensated(value, target.dtype)
            compensation.copy_(lost)
        target.copy_(value)


def _numbers(
    optimizer: PlannedStep, group: dict[str, Any], state: dict[str, Any], begins: bool,
    compute: torch.dtype, device: torch.device,
) -> tuple[int, Any]:  # fmt: skip
    """The number of this step, and what the formula's `h` is in it; counters go on."""
    record: Any = optimizer._record
    row = optimizer._hyper(group, begins).row
    numbers = [torch.as_tensor(n, dtype=torch.float64).to(device).reshape(()) for n in row]
    hyper = SimpleNamespace(**dict(zip(record.numbers, numbers, strict=True)))
    step, scalars = torch.zeros((), dtype=torch.float64, device=device), []
    if optimizer._counts:
        counter = state["step"]
        counter += 1
        step = counter.to(device).double().reshape(())
        old = [state[name].to(device).reshape(()) for name in record.scalars]
        wide = [n.float() if n.itemsize == 2 else n for n in old]
        after = record.next_numbers(hyper, counter.to(device).reshape(()), *wide)
        new = [n.to(o.dtype) for n, o in zip(after, old, strict=True)]
        for name, number in zip(record.scalars, new, strict=True):
            state[name].copy_(number.reshape(state[name].shape))
        scalars = [n.double() for n in (*old, *new)]
    derived = record.at_step(hyper, step, *scalars)
    found = dict(zip((*record.numbers, *record.derived), (*numbers, *derived), strict=True))
    found = {name: torch.as_tensor(n, dtype=compute, device=device) for name, n in found.items()}
    return int(step), SimpleNamespace(**found)

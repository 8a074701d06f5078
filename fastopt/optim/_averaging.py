"""Rules of averaging: their formulas, and which of them a function of torch's is.

In a formula `param` is the average and `grad` the number that goes into it, which a launch that
`copies` takes as it is.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.optim import swa_utils as _torchs

from .. import formula as m
from ..kernels.operation import Update

__all__ = ["RECORDS", "Lerp", "Mean", "Rule", "Weighted", "rule_of"]


class Lerp(Update):
    """What `torch.lerp` computes, with its two ways for small and for large weights."""

    weight: float
    copies: float

    def update(h: Any, param: Any, grad: Any) -> Any:
        way = grad - param
        near = param + h.weight * way
        far = grad - way * (1.0 - h.weight)
        return (m.where(h.copies != 0.0, grad, m.where(h.weight < 0.5, near, far)),)


class Weighted(Update):
    decay: float
    weight: float
    copies: float

    def update(h: Any, param: Any, grad: Any) -> Any:
        return (m.where(h.copies != 0.0, grad, h.decay * param + h.weight * grad),)


class Mean(Update):
    """The mean of `count` numbers, of which `param` is that of all but the last."""

    count: float
    copies: float

    def update(h: Any, param: Any, grad: Any) -> Any:
        return (m.where(h.copies != 0.0, grad, param + m.divide(grad - param, h.count)),)


RECORDS = (Lerp, Weighted, Mean)


class Rule(NamedTuple):
    """How to average.

    Attributes:
        record: the formula's.
        decay: that of an exponential average; None for the mean of all.
    """

    record: type[Update]
    decay: float | None

    def row(self, averaged: Tensor) -> tuple[float | Tensor, ...]:
        """The fields of the record after so many models, a tensor of one number, as torch has them.

        What depends on the number is a tensor where that is.
        """
        if self.record is Mean:
            numbers: tuple[float | Tensor, ...] = (averaged + 1,)
        elif self.decay is None:
            numbers = (1 / (averaged + 1),)  # of torch's default dtype, whatever the parameters'
        elif self.record is Lerp:
            numbers = (1 - self.decay,)
        else:
            numbers = (self.decay, 1 - self.decay)
        return (1.0, *numbers, averaged == 0)


#: Torch's makers of functions: of lists, and of one tensor.
_MULTI: tuple[tuple[Any, type[Update]], ...] = (
    (_torchs.get_ema_multi_avg_fn, Lerp),
    (_torchs.get_swa_multi_avg_fn, Lerp),
)
_SINGLE: tuple[tuple[Any, type[Update]], ...] = (
    (_torchs.get_ema_avg_fn, Weighted),
    (_torchs.get_swa_avg_fn, Mean),
)
_DEFAULTS = {"get_swa_multi_avg_fn": _MULTI[1][0], "get_swa_avg_fn": _SINGLE[1][0]}


def rule_of(multi_avg_fn: Any, avg_fn: Any, device: str) -> Rule | None:
    """The rule of an AveragedModel's functions on a type of device; None if they aren't torch's.

    A function is known by its code, and that by what it computes: in a torch whose functions
    compute something else none is.
    """
    if multi_avg_fn is not None:
        return _rule(multi_avg_fn, True)
    if avg_fn is not None:
        return _rule(avg_fn, False)
    if any(getattr(_torchs, name, None) is not maker for name, maker in _DEFAULTS.items()):
        return None  # replaced
    return _default(device == "cpu")


@functools.cache
def _default(on_cpu: bool) -> Rule | None:
    """Torch has functions of lists only where it has kernels for them."""
    multi = not on_cpu
    return _rule(_DEFAULTS["get_swa_multi_avg_fn" if multi else "get_swa_avg_fn"](), multi)


def _rule(function: Any, multi: bool) -> Rule | None:
    code = _codes(function)
    record = None if code is None else _known(multi).get(code)
    if record is None:
        return None
    cells = function.__wrapped__.__closure__
    if not cells:
        return Rule(record, None)
    decay = cells[0].cell_contents
    return Rule(record, decay) if type(decay) in (float, int) else None


def _codes(function: Any) -> Any:
    """What tells one of torch's functions: its code, and that of the decorator around it."""
    try:
        return function.__code__, function.__wrapped__.__code__
    except AttributeError:
        return None


@functools.cache
def _known(multi: bool) -> dict[Any, type[Update]]:
    """The codes of torch's functions that compute what their records do."""
    known = {}
    for maker, record in _MULTI if multi else _SINGLE:
        decays = (0.2, 0.9) if maker.__name__.startswith("get_ema") else (None,)
        functions = [maker() if decay is None else maker(decay) for decay in decays]
        code, closures = _codes(functions[0]), [_decay(f) for f in functions]
        if code is None or closures != list(decays):
            continue
        rules = [Rule(record, decay) for decay in decays]
        if all(_agree(f, multi, rule) for f, rule in zip(functions, rules, strict=True)):
            known[code] = record
    return known


def _decay(function: Any) -> Any:
    inner = function.__wrapped__
    if inner.__code__.co_freevars != ("decay",):
        return None if not inner.__code__.co_freevars else "unknown"
    return inner.__closure__[0].cell_contents


def _agree(function: Callable[..., Any], multi: bool, rule: Rule) -> bool:
    """Whether they compute the same of some numbers, infinities and very large ones among them."""
    numbers = [0.0, 1.0, -3.7, 1e308, -1e308, float("inf"), 1e-300]
    average, value = (
        t.flatten()
        for t in torch.meshgrid(*[torch.tensor(numbers, dtype=torch.float64, device="cpu")] * 2,
                                indexing="ij")
    )  # fmt: skip
    for count in (1, 4):
        averaged = torch.tensor(count, device="cpu")
        h = SimpleNamespace(**dict(zip(rule.record.numbers, rule.row(averaged), strict=True)))
        expected = average.clone()
        if multi:
            function([expected], [value], averaged)
        else:
            expected.copy_(function(expected, value, averaged))
        (found,) = rule.record.update(h, average, value)  # type: ignore[arg-type]
        if not torch.allclose(found, expected, rtol=1e-12, atol=0.0, equal_nan=True):
            return False
    return True

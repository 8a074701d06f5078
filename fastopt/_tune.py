"""python -m fastopt tune: measure from how many elements on kernels pay on this machine."""

from __future__ import annotations

import datetime
import statistics
import time
import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch

from ._warmup import OPERATIONS
from .dispatch import use_backend
from .front import measured
from .front.crossover import NEVER
from .front.measured import Limits
from .front.samples import usual
from .kernels.operation import LinearSoftmax, Operation
from .nn._operations import FUNCTIONS

#: The losses that there is something to measure of, by their functions' names.
NAMES = tuple(name for name, kind in OPERATIONS.items() if not issubclass(kind, LinearSoftmax))

# A kernel pays if it takes at most this much of torch's time.
MARGIN = 0.97
# Calls of each of the two, by whose medians they are compared.
CALLS = 9
# Sizes are powers of two: from one of 4,096 elements to one of 8 million, or none.
SMALLEST, NONE = 12, 24
_WIDTH = 128
_DTYPES = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}


def tune(only: Collection[str] = NAMES) -> None:
    """Measure, print and keep crossovers."""
    begin = time.perf_counter()
    limits = dict(measured.read().limits)
    disturb = disturbance()
    widest = max(map(len, only))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's, about usual calls
        for name in [n for n in NAMES if n in only]:
            limits[name] = _limits(name, f"{name:{widest}s}", disturb)
    path = measured.write(limits, f"{datetime.date.today():%Y-%m-%d}")
    print(f"{time.perf_counter() - begin:.0f} s in all; kept in {path}, for new processes")


def _limits(name: str, label: str, disturb: Callable[[], None]) -> Limits:
    """Measure those of a loss, and say so under a label."""
    kind, longest = OPERATIONS[name], 0
    rows: dict[int, tuple[tuple[int, int], ...]] = {}
    for size, steps in kind.row_crossover.items():
        found, above = [], 0
        for classes, before in steps:
            limit = _measure(name, _DTYPES[size], (above + classes) // 2 + 1, disturb)
            _say(label, before, limit, f"rows of up to {classes} classes of {size} bytes")
            found.append((classes, limit))
            above = classes
        rows[size], longest = tuple(found), max(longest, above)
    limit = _measure(name, torch.float32, 8 * longest or _WIDTH, disturb)
    _say(label, kind.crossover, limit, "")
    return Limits(limit, rows)


def _say(name: str, before: int, limit: int, what: str) -> None:
    found = "never" if limit == NEVER else f"from {limit:,}"
    used = "never" if before == NEVER else f"from {before:,}"
    print(f"{name} {found} elements (was {used}) {what}".rstrip(), flush=True)


def disturbance() -> Callable[[], None]:
    """What a training step does between two losses, as far as caches and cores go.

    That is a matrix product, whose threads and code take the cores, and a pass over 96 MB, which
    empties the caches.
    """
    factor, passed = torch.ones(512, 512), torch.zeros(24 << 20)

    def disturb() -> None:
        torch.mm(factor, factor)
        passed.add_(1.0)

    return disturb


def _measure(name: str, dtype: torch.dtype, width: int, disturb: Callable[[], None]) -> int:
    """From how many elements on a loss's kernel pays, forward and backward, in rows of a width."""

    def pays(exponent: int) -> bool:
        (tensors,) = usual(OPERATIONS[name], 1 << exponent, dtype, (width,))
        return _pays(name, OPERATIONS[name], tensors, disturb)

    exponent = first_that(pays, SMALLEST, NONE)
    return NEVER if exponent == NONE else 1 << exponent


def first_that(pays: Callable[[int], bool], lowest: int, end: int) -> int:
    """The first number that pays, if all above it do; `end` if none does.

    It is asked for twice: by bisection, then upwards from what that has found, since one answer may
    be wrong.
    """
    low, high = lowest, end
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle + 1, high)
    while high < end and not pays(high):
        high += 1
    return high


def _pays(
    name: str, kind: type[Operation], tensors: dict[str, torch.Tensor], disturb: Callable[[], None]
) -> bool:
    """Whether the kernel takes less time than torch, by turns, in context."""
    contenders: tuple[Any, Any] = FUNCTIONS[name], kind.twin
    times: tuple[list[float], list[float]] = [], []
    followed = [t for t in tensors.values() if t.requires_grad]
    with use_backend("numba"):  # which torch's own function knows nothing of
        for turn in range(-1, CALLS):  # the first one compiles
            for k in (0, 1) if turn % 2 else (1, 0):
                for t in followed:
                    t.grad = None
                disturb()
                begin = time.perf_counter()
                contenders[k](**tensors).backward()
                if turn >= 0:
                    times[k].append(time.perf_counter() - begin)
    ours, theirs = map(statistics.median, times)
    return ours <= MARGIN * theirs

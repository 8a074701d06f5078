"""Interleaved timing: contenders take turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Seconds = float
#: Makes so many calls and says how long they took.
Timed = Callable[[int], Seconds]


def timed(call: Callable[[], object]) -> Timed:
    """The timing of a call in this process."""

    def run(count: int) -> Seconds:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start

    return run


def interleaved(
    contenders: Mapping[str, Timed], seconds: Seconds = 1.0, rounds: int = 9
) -> dict[str, list[Seconds]]:
    """Time per call of each contender, one number a round.

    Args:
        contenders: what to time, by name.
        seconds: how long all rounds together should take, about.
        rounds: how often each contender gets its turn.
    """
    for run in contenders.values():  # compile, fill caches, map memory
        run(2)
    share = seconds / (rounds * len(contenders))
    calls = {name: max(1, int(share / max(run(1), 1e-7))) for name, run in contenders.items()}
    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, run in contenders.items():
            times[name].append(run(calls[name]) / calls[name])
    return times


def median(times: list[Seconds]) -> Seconds:
    return statistics.median(times)


def spread(times: list[Seconds]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle

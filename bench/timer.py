"""Interleaved timing: contenders take turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

from fastopt._tune import disturbance

Seconds = float
#: Makes so many calls and says how long they took.
Timed = Callable[[int], Seconds]
#: The fewest and the most calls of a contender in context.
FEWEST, MOST = 15, 401


def timed(call: Callable[[], object]) -> Timed:
    """The timing of a call in this process, one after the other."""

    def run(count: int) -> Seconds:
        start = time.perf_counter()
        for _ in range(count):
            call()
        return time.perf_counter() - start

    return run


def in_context(call: Callable[[], object]) -> Timed:
    """The same, with what a training step does between two calls before each of them, untimed."""
    disturb = disturbance()

    def run(count: int) -> Seconds:
        total = 0.0
        for _ in range(count):
            disturb()
            start = time.perf_counter()
            call()
            total += time.perf_counter() - start
        return total

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


def one_by_one(contenders: Mapping[str, Timed], seconds: Seconds) -> dict[str, list[Seconds]]:
    """The same, a call a turn, for contenders `in_context`."""
    for run in contenders.values():
        run(2)
    start = time.perf_counter()
    times = {name: [run(1)] for name, run in contenders.items()}
    spent = time.perf_counter() - start
    for _ in range(min(max(int(seconds / spent), FEWEST), MOST) - 1):
        for name, run in contenders.items():
            times[name].append(run(1))
    return times


def median(times: list[Seconds]) -> Seconds:
    return statistics.median(times)


def spread(times: list[Seconds]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle

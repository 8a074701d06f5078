"""Interleaved timing: contenders take turns, so that a noisy machine is noisy for all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

Seconds = float


def interleaved(
    contenders: Mapping[str, Callable[[], object]], seconds: Seconds = 1.0, rounds: int = 9
) -> dict[str, list[Seconds]]:
    """Time per call of each contender, one number a round.

    Args:
        contenders: what to call, by name.
        seconds: how long all rounds together should take, about.
        rounds: how often each contender gets its turn.
    """
    for call in contenders.values():  # compile, fill caches, map memory
        call()
        call()
    calls = {
        name: max(1, int(seconds / (rounds * len(contenders) * max(_once(call), 1e-7))))
        for name, call in contenders.items()
    }
    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for _ in range(rounds):
        for name, call in contenders.items():
            count = calls[name]
            start = time.perf_counter()
            for _ in range(count):
                call()
            times[name].append((time.perf_counter() - start) / count)
    return times


def _once(call: Callable[[], object]) -> Seconds:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def median(times: list[Seconds]) -> Seconds:
    return statistics.median(times)


def spread(times: list[Seconds]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle

"""Time on a GPU, by its own clock; on a CPU, to try the rest, by the host's."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

Calls = Mapping[str, Callable[[], Any]]
Seconds = float


class _HostEvent:
    """As much of torch.cuda.Event as is needed here."""

    def record(self) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, end: _HostEvent) -> float:
        return (end.time - self.time) * 1e3


class Clock:
    """Times calls that take turns, so that whatever disturbs one disturbs all.

    Attributes:
        device: "cuda" or "cpu".
        large: bytes that no cache holds.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._gpu = device != "cpu"
        cache = torch.cuda.get_device_properties(0).L2_cache_size if self._gpu else 1 << 12
        self.large = max(32 * cache, 2 << 30) if self._gpu else 1 << 16
        self._flush = torch.empty(4 * cache, dtype=torch.uint8, device=device)

    def _event(self) -> Any:
        return torch.cuda.Event(enable_timing=True) if self._gpu else _HostEvent()

    def synchronize(self) -> None:
        if self._gpu:
            torch.cuda.synchronize()

    def tidy(self) -> None:
        """Give memory back, so that no case finds the last one's."""
        gc.collect()
        if self._gpu:
            torch.cuda.empty_cache()

    def interleaved(self, calls: Calls, repeats: int) -> dict[str, list[Seconds]]:
        """Times of each call on the GPU, from a cold cache; who begins a round, changes.

        Where the host is slower than the GPU, it is the host's time that is seen.
        """
        for call in calls.values():  # compile, fill the allocator's cache
            call()
            call()
        times: dict[str, list[Seconds]] = {name: [] for name in calls}
        names = list(calls)
        for turn in range(repeats):
            first = turn % len(names)
            marks = []
            for name in names[first:] + names[:first]:
                self._flush.zero_()
                start, end = self._event(), self._event()
                start.record()
                calls[name]()
                end.record()
                marks.append((name, start, end))
            self.synchronize()
            for name, start, end in marks:
                times[name].append(start.elapsed_time(end) * 1e-3)
        return times

    def host(self, calls: Calls, batches: int = 20, batch: int = 10) -> dict[str, Seconds]:
        """What the host spends on a call, the median over batches.

        A batch is short enough for the GPU's queue, and the clock stops before the host waits.
        """
        if not self._gpu:
            batches = batch = 2
        times: dict[str, list[Seconds]] = {name: [] for name in calls}
        for _ in range(batches):
            for name, call in calls.items():
                self.synchronize()
                start = time.perf_counter()
                for _ in range(batch):
                    call()
                times[name].append((time.perf_counter() - start) / batch)
        self.synchronize()
        return {name: statistics.median(t) for name, t in times.items()}

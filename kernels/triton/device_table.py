"""A host array's copy on the device, uploaded when the array has changed.

An upload goes through pinned memory, so that the host does not wait, and into new memory, so
that no launch still under way sees it change.

While a CUDA graph is captured nothing runs: an upload happens at each replay, from and into
the very same memory, so that must never be freed or written again. And pinned memory can't be
had during a capture, so some is laid by.
"""

from __future__ import annotations

import numpy as np
import torch

_kept_for_graphs: dict[int, torch.Tensor] = {}


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> object:
    """That on which work for the device is queued now."""
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).current_stream(device)


def keep_for_graph(tensor: torch.Tensor) -> torch.Tensor:
    """Never free this: a captured graph has its address."""
    _kept_for_graphs[id(tensor)] = tensor
    return tensor


class DeviceTable:
    """See the module.

    Attributes:
        host: the array; write to it in place.
        uploads: how many times it has been copied, captured copies not counted.
    """

    def __init__(self, host: np.ndarray, device: torch.device, captures: int = 0) -> None:
        """captures: how many uploads may be captured in a row."""
        self.host = host
        self.uploads = 0
        self._device = device
        self._captures = captures
        self._floats = host.dtype.kind == "f"
        self._seen: np.ndarray | None = None
        self._current = torch.empty(0, device=device)
        self._lay_by()

    def _lay_by(self) -> None:
        self._laid_by = [self._room() for _ in range(self._captures)]

    def _room(self) -> tuple[torch.Tensor, torch.Tensor]:
        pinned: torch.Tensor = torch.from_numpy(np.empty_like(self.host))
        if self._device.type != "cpu":
            pinned = pinned.pin_memory()
        return pinned, torch.empty_like(pinned, device=self._device)

    def current(self) -> torch.Tensor:
        """The copy on the device, up to date for all that is launched from now on."""
        seen = self._seen
        changed = seen is None or not np.array_equal(seen, self.host, equal_nan=self._floats)
        if capturing(self._device):
            return self._captured_copy() if changed else keep_for_graph(self._current)
        if changed:
            pinned, self._current = self._room()
            self._copy(pinned, self._current)
            self._seen = self.host.copy()
            self.uploads += 1
        if len(self._laid_by) < self._captures:
            self._lay_by()
        return self._current

    def _captured_copy(self) -> torch.Tensor:
        if not self._laid_by:
            raise RuntimeError(
                f"more than {self._captures} steps captured in CUDA graphs without one that isn't"
            )
        pinned, there = self._laid_by.pop()
        self._copy(pinned, there)
        keep_for_graph(pinned)
        return keep_for_graph(there)

    def _copy(self, pinned: torch.Tensor, there: torch.Tensor) -> None:
        pinned.numpy()[...] = self.host
        there.copy_(pinned, non_blocking=True)

"""A host array's copy on the device, uploaded when the array has changed.

An upload goes through pinned memory, so that the host does not wait, and into new memory, so
that no launch still under way sees it change. A CUDA graph that is being captured replays its
uploads from, and into, the very same memory: what it touches is kept for as long as the process
lives, and never written again. Pinned memory can't be had during a capture, so some is ready.
"""

from __future__ import annotations

import numpy as np
import torch

_kept_for_graphs: list[torch.Tensor] = []


def capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current_stream(device: torch.device) -> object:
    """That on which work for the device is queued now."""
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).current_stream(device)


def keep_for_graph(*tensors: torch.Tensor) -> None:
    """Never free these: a captured graph has their addresses."""
    _kept_for_graphs.extend(tensors)


class DeviceTable:
    """See the module.

    Attributes:
        host: the array; write to it in place.
        uploads: how many times it has been copied.
    """

    def __init__(self, host: np.ndarray, device: torch.device) -> None:
        self.host = host
        self.uploads = 0
        self._device = device
        self._seen: np.ndarray | None = None
        self._spare: tuple[torch.Tensor, torch.Tensor] | None = self._room()

    def _room(self) -> tuple[torch.Tensor, torch.Tensor]:
        pinned = torch.from_numpy(np.empty_like(self.host))
        if self._device.type != "cpu":
            pinned = pinned.pin_memory()
        return pinned, torch.empty_like(pinned, device=self._device)

    def current(self) -> torch.Tensor:
        """The copy on the device, up to date for all that is launched from now on."""
        in_capture = capturing(self._device)
        if self._seen is None or not np.array_equal(self._seen, self.host):
            if in_capture and self._spare is None:
                raise RuntimeError(
                    "a second step inside one CUDA graph capture finds other tensors or "
                    "hyperparameters than the first (supported: the same ones)"
                )
            pinned, self._current = self._spare or self._room()
            self._spare = None if in_capture else self._room()
            pinned.numpy()[...] = self.host
            self._current.copy_(pinned, non_blocking=True)
            self._seen = self.host.copy()
            self.uploads += 1
            if in_capture:
                keep_for_graph(pinned)
        if in_capture:
            keep_for_graph(self._current)
        return self._current

"""Optimizers whose step torch's own code takes: named, converted and explained, by no kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.optim import Optimizer

from .. import dispatch
from ..dispatch import Decision, Request
from ._sort import size_of

__all__ = ["TorchsStep"]


class TorchsStep(Optimizer):
    """Mixin in front of a torch optimizer class, whose step stays what is run."""

    _operation: ClassVar[str]
    #: why no kernel takes it, in words for `explain`
    _reason: ClassVar[str]

    def _decisions(self, compiled: bool = False) -> tuple[Decision, ...]:
        """The decision about the parameters of each device and dtype."""
        alike: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for group in self.param_groups:
            for param in group["params"]:
                alike.setdefault((param.device, param.dtype), []).append(param)
        requests = [
            Request(self._operation, device.type, (dtype,), sum(map(size_of, params)))
            for (device, dtype), params in alike.items()
        ]
        special, insisted = (self._reason,), dispatch.insisted()
        return tuple(
            dispatch.choose(r._replace(special=special, insisted=insisted)) for r in requests
        )

    def _take_step(self, step: Callable[..., Any], closure: Any) -> Any:
        """Torch's step of this class, unless another backend is insisted on."""
        compiling = torch.compiler.is_compiling()
        if not compiling and dispatch.insisted() not in (None, "reference"):
            TorchsStep._decisions(self)  # raises
        if getattr(step, "hooked", False):  # its hooks run around our own step already
            step = step.__wrapped__  # type: ignore[attr-defined]
        return step(self, closure)

"""Losses that torch's own code computes: they are named and explained, and no kernel has them."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.compiler import is_compiling

from .. import dispatch
from ..dispatch import Decision
from ..errors import BackendUnavailable
from ..kernels.operation import Operation
from .analysis import Call, prepare
from .call import REDUCTIONS, LossModule, tracer_of

__all__ = ["TorchOnly", "TorchOnlyModule", "analyse"]


class TorchOnly(Operation):
    """The record of a loss that no kernel has.

    Attributes:
        reason: why, in words for `explain`.
    """

    _abstract = True
    crossover = 0
    reason: ClassVar[str]


def analyse(operation: type[TorchOnly], function: str, arguments: dict[str, Any]) -> Call | None:
    """Summarise a call that only torch serves; None if torch has to say what is wrong with it."""
    operands = [arguments[name] for name in operation.operands]
    if not isinstance(operands[0], Tensor):
        return None
    tensors = tuple(t if isinstance(t, Tensor) else None for t in operands)  # or lists of lengths
    reduction = arguments.get("reduction", "mean")
    return prepare(
        function, operation(), tuple(REDUCTIONS), reduction, operands[0].dtype, tensors,
        [operation.reason],
    )  # fmt: skip


class TorchOnlyModule(LossModule):
    """Mixin in front of a torch module with a forward of its own, which stays what is run."""

    _operation: ClassVar[type[TorchOnly]]
    _torchs: ClassVar[Any]

    def __init_subclass__(cls, operation: type[TorchOnly] | None = None) -> None:
        super().__init_subclass__()
        if operation is not None:
            cls._operation = operation
            cls._torchs = next(c for c in cls.__mro__ if c.__module__.startswith("torch.nn."))

    def serve(self, *args: Any, **kwargs: Any) -> Any:
        """What `forward` calls with its arguments: torch's own, unless another is insisted on."""
        if (tracer := tracer_of(*args, *kwargs.values())) is not None:
            path = tracer.path_of_module(self)  # to torch.fx torch's modules are one node, too
            return tracer.create_proxy("call_module", path, args, kwargs)
        if not is_compiling() and dispatch.insisted() not in (None, "reference"):
            try:
                self.decide(*args, **kwargs)
            except BackendUnavailable:
                self._torchs.forward(self, *args, **kwargs)  # of bad input first torch's own error
                raise
        return self._torchs.forward(self, *args, **kwargs)

    def decide(self, *args: Any, **kwargs: Any) -> Decision:
        """The decision about a call.

        Raises:
            BackendUnavailable: another backend than torch is insisted on.
        """
        operation = self._operation
        arguments = {**dict(zip(operation.operands, args, strict=False)), **kwargs}
        with torch._C.DisableTorchFunction():
            call = analyse(operation, self._torchs.__name__, arguments)
        if call is None:
            raise TypeError("there is nothing to explain: arguments must be tensors")
        return dispatch.choose(call.request)

    def __prepare_scriptable__(self) -> Any:
        """For torch.jit.script: torch's own module."""
        kind: Any = type(self)
        if not kind.forward.__module__.startswith("fastopt.nn."):
            return self  # a subclass with a forward of its own
        module = self._torchs.__new__(self._torchs)
        module.__dict__.update(self.__dict__)
        return module

"""The exceptions that fastopt raises by itself.

    RuntimeError
    └── BackendUnavailable      a backend that was insisted on cannot serve the call

Everything else a caller can get wrong raises what torch raises for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from .dispatch import Decision

__all__ = ["BackendUnavailable"]


class BackendUnavailable(RuntimeError):
    """The backend named in :func:`fastopt.use_backend` cannot serve a call.

    Attributes:
        decision: the :class:`fastopt.dispatch.Decision` with every reason.
    """

    def __init__(self, decision: Decision) -> None:
        self.decision = decision
        reasons = "; ".join(decision.refusals[decision.insisted or ""])
        super().__init__(
            f"backend {decision.insisted!r} was asked for but cannot serve this call: {reasons}\n"
            f"{decision}"
        )

    def __reduce__(self) -> tuple[type[BackendUnavailable], tuple[Decision]]:
        return type(self), (self.decision,)  # pickling would pass the message


def wrapper_hint(subject: Any) -> str:
    """What to do about an optimizer of a framework that wraps another."""
    for name in ("optimizer", "optim"):
        if isinstance(getattr(subject, name, None), Optimizer):
            return f"; it wraps another: take its .{name}"
    return ""

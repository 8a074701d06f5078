"""The exceptions that fastopt raises by itself.

    RuntimeError
    └── BackendUnavailable      a backend that was insisted on cannot serve the call
    ValueError
    └── FormulaError            a function that a user wrote says what a formula can't

Everything else a caller can get wrong raises what torch raises for it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

if TYPE_CHECKING:
    from .dispatch import Decision

__all__ = ["BackendUnavailable", "FormulaError"]


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


class FormulaError(ValueError):
    """What a user's function says is nothing that a formula can say.

    Its message has the file, the line, the expression and what to write instead.

    Attributes:
        file: the name of the file that the function is in.
        line: the number of the line there, from 1 on.
    """

    def __init__(self, message: str, file: str, line: int) -> None:
        self.message, self.file, self.line = message, file, line
        super().__init__(message)

    def __reduce__(self) -> tuple[type[FormulaError], tuple[str, str, int]]:
        return type(self), (self.message, self.file, self.line)


def wrapper_hint(subject: Any) -> str:
    """What to do about an optimizer of a framework that wraps another."""
    for name in ("optimizer", "optim"):
        if isinstance(getattr(subject, name, None), Optimizer):
            return f"; it wraps another: take its .{name}"
    return ""

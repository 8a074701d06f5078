"""fastopt.explain: which backend runs a call, and why not each other one."""

from __future__ import annotations

from typing import Any

import torch

from .dispatch import Decision
from .optim._planned import PlannedStep

__all__ = ["Explanation", "explain"]


class Explanation(tuple[Decision, ...]):
    """The decisions behind one call: one for a loss, one a bucket for an optimizer."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no parameters to update"


def explain(target: Any, *args: Any, **kwargs: Any) -> Explanation:
    """Say which backend runs a call and, for every other one, each reason why it doesn't.

    Nothing is computed or changed.

    Args:
        target: a fastopt loss module or function, followed by the arguments of its call; or
            a fastopt optimizer. Parameters that have no gradient yet count as if they had
            one of their own dtype and layout.

    Returns:
        A tuple of :class:`fastopt.dispatch.Decision` that prints as the explanation.

    Raises:
        TypeError: target is none of these.
        BackendUnavailable: inside ``use_backend``, that backend can't serve the call.

    Example:
        >>> print(fastopt.explain(fastopt.nn.MSELoss(), x, y))
        >>> print(fastopt.explain(optimizer))
    """
    if isinstance(target, PlannedStep):
        return Explanation(target._decisions())
    if isinstance(target, torch.nn.Module) and hasattr(target, "_function"):
        function, options = getattr(target, "_function"), getattr(target, "_options")  # noqa: B009
        return Explanation((function.decide(*args, **options(), **kwargs),))
    if hasattr(target, "decide"):
        return Explanation((target.decide(*args, **kwargs),))
    raise TypeError(
        f"cannot explain a {type(target).__module__}.{type(target).__name__} (supported: the "
        "classes of fastopt.nn and fastopt.optim and the functions of fastopt.nn.functional)"
    )

"""fastopt.explain: which backend runs a call, and why not each other one."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

from .dispatch import Decision
from .errors import wrapper_hint
from .front.call import LossModule
from .front.circumstances import traced
from .nn._operations import FUNCTIONS, MODULES
from .optim._operations import CLASSES
from .optim._planned import PlannedStep
from .optim._torchs_step import TorchsStep
from .optim.swa_utils import AveragedModel

__all__ = ["Explanation", "explain"]


class Explanation(tuple[Decision, ...]):
    """The decisions behind one call: one for a loss, one a bucket for an optimizer."""

    __slots__ = ()

    def __str__(self) -> str:
        return "\n".join(map(str, self)) or "no parameters to update"


def explain(subject: Any, /, *args: Any, compiled: bool = False, **kwargs: Any) -> Explanation:
    """Say which backend runs a call and, for every other one, each reason why it doesn't.

    Nothing is computed or changed.

    Args:
        subject: a fastopt loss module or function, followed by the arguments of its call; or
            a fastopt optimizer. Parameters that have no gradient yet count as if they had
            one of their own dtype and layout. Or a fastopt AveragedModel, followed by the model
            that ``update_parameters`` is given.
        compiled: of a loss or a step, how it would run inside of what torch.compile compiles.

    Returns:
        A tuple of :class:`fastopt.dispatch.Decision` that prints as the explanation.

    Raises:
        TypeError: subject is none of these; or `compiled` with averages.
        BackendUnavailable: inside ``use_backend``, that backend can't serve the call.

    Example:
        >>> print(fastopt.explain(fastopt.nn.MSELoss(), x, y))
        >>> print(fastopt.explain(optimizer))
    """
    if compiled and isinstance(subject, AveragedModel):
        raise TypeError(
            "compiled=True is for losses and optimizers, not for an object of "
            f"{type(subject).__name__}: inside torch.compile averages are torch's own code"
        )
    if isinstance(subject, (PlannedStep, TorchsStep)):
        if args or kwargs:
            raise TypeError("an optimizer is explained by itself, without further arguments")
        return Explanation(subject._decisions(compiled=compiled))
    if isinstance(subject, AveragedModel):
        return Explanation(subject._decisions(*args, **kwargs))
    if isinstance(subject, LossModule) and not hasattr(subject, "decide"):
        kwargs, subject = {**subject._options(), **kwargs}, type(subject)._function
    if hasattr(subject, "decide"):
        with traced() if compiled else nullcontext():
            return Explanation((subject.decide(*args, **kwargs),))
    known = {
        "fastopt.nn": MODULES, "fastopt.nn.functional": FUNCTIONS, "fastopt.optim": CLASSES,
        "fastopt.optim.swa_utils": ["AveragedModel"],
    }  # fmt: skip
    supported = "; ".join(f"{', '.join(names)} of {module}" for module, names in known.items())
    raise TypeError(
        f"cannot explain an object of {type(subject).__module__}.{type(subject).__name__} "
        f"(supported: {supported})"
        f"{wrapper_hint(subject)}"
    )

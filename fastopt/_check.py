"""fastopt.check: whether what a user wrote computes what it says, on every backend there is."""

from __future__ import annotations

from typing import Any, NamedTuple

from ._check_loss import check_loss
from ._check_optimizer import check_optimizer
from .front.formula_loss import FormulaLoss, FormulaModule
from .optim._rule import Rule

__all__ = ["CheckReport", "Finding", "check"]


class Finding(NamedTuple):
    """One comparison.

    Attributes:
        backend: which computed.
        what: was compared.
        error: the largest one found.
        allowed: the largest one that is right.
        words: where and what, if it is wrong.
    """

    backend: str
    what: str
    error: float
    allowed: float
    words: str = ""

    def __bool__(self) -> bool:
        return self.error <= self.allowed


class CheckReport(tuple[Finding, ...]):
    """All findings: false if one of them is wrong, and printed as a table."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return len(self) > 0 and all(self)

    def __str__(self) -> str:
        wide = max((len(f.what) for f in self), default=0)
        return "\n".join(
            f"{'right' if f else 'WRONG'}  {f.backend:9s} {f.what:{wide}s}  "
            f"error {f.error:.1e}, allowed {f.allowed:.1e}" + (f"  {f.words}" if not f else "")
            for f in self
        )


def check(subject: Any, /, *samples: Any, **options: Any) -> CheckReport:
    """Compare a loss or an optimizer that a user wrote with its formula in torch's operations.

    A loss on the derivatives that it has, numerically in float64; and on each backend that is
    there, in values and gradients: numbers of all dtypes, sizes that fill no vectors, strides,
    broadcasting and nothing at all, and what is hard: infinities, NaN, 0, subnormal and largest
    numbers. Where torch's autograd gives NaN for a side of `where` that isn't chosen, any number is
    right.

    An optimizer on the parameters and the states after each of some steps, on each backend that is
    there: of usual gradients, in all dtypes and in sizes that fill no vectors, and of hard ones.

    The table of findings is printed.

    Args:
        subject: a loss that :func:`fastopt.loss` has made, or one of its modules; or a class that
            :func:`fastopt.optimizer` has made.
        samples: of a loss, tensors of usual numbers, one for each of the loss's tensors, from
            whose elements numbers are drawn; standard normal ones are drawn otherwise, and numbers
            between 0 and 1 where the formula isn't defined elsewhere.
        options: of the loss, or of the optimizer's constructor.

    Returns:
        The findings, as a tuple that is false if one of them is wrong.

    Raises:
        TypeError: the subject is no such loss, or there are samples for some tensors alone.
        ValueError: the loss of the samples isn't finite.

    Example:
        >>> from fastopt import formula as m
        >>> @fastopt.loss
        ... def charbonnier(input, target, *, eps=1e-3):
        ...     return m.sqrt((input - target) ** 2 + eps**2)
        >>> assert fastopt.check(charbonnier, eps=0.1)
    """
    if isinstance(subject, type) and issubclass(subject, Rule):
        if samples:
            raise TypeError(
                "samples are for losses, not for an optimizer, whose gradients are drawn"
            )
        report = CheckReport(Finding(*found) for found in check_optimizer(subject, options))
        print(report)
        return report
    if isinstance(subject, FormulaModule):
        subject, options = type(subject)._function, {**subject._options(), **options}
        options.pop("reduction")
    if not isinstance(subject, FormulaLoss):
        raise TypeError(
            f"cannot check an object of {type(subject).__module__}.{type(subject).__name__} "
            "(supported: losses made by fastopt.loss, their modules, and optimizers made by "
            "fastopt.optimizer)"
        )
    report = CheckReport(Finding(*found) for found in check_loss(subject, samples, options))
    print(report)
    return report

"""Divergences between the softmaxes of two tensors of logits, as every backend gives them."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple

import torch

from .operation import Operation

__all__ = ["KEPT", "Divergence", "Divergences"]

#: Numbers of a row that the backward pass wants: the largest logit and the sum of exponentials of
#: the student and of the teacher, and what `finish` gives beside the value.
KEPT = 5


@dataclasses.dataclass(frozen=True)
class Divergence(Operation):
    """A divergence between p = softmax(student / T) and q = softmax(teacher / T) of a row.

    Its formulas, of numbers; gap is log q - log p, NaN where both p and q are 0:

    - `fold(h, p, q, gap)`: what is to be summed over the classes, a tuple;
    - `finish(h, *sums)`: the value, and a number for `slopes`;
    - `slopes(h, known, p, q, gap)`: the derivative by the student's logit, but for 1/T.

    Attributes:
        temperature: T.
        sums: how many numbers `fold` gives.
    """

    _abstract = True
    operands = ("student_logits", "teacher_logits")
    formulas = ("fold", "finish", "slopes")
    sums: ClassVar[int] = 1
    temperature: float = 1.0

    def fold(self, p: Any, q: Any, gap: Any) -> Any:
        raise NotImplementedError

    def finish(self, *sums: Any) -> Any:
        raise NotImplementedError

    def slopes(self, known: Any, p: Any, q: Any, gap: Any) -> Any:
        raise NotImplementedError


class Divergences(NamedTuple):
    """Of rows of a student's and a teacher's logits.

    A backend has `divergences(record, student, teacher)`, which gives this, and
    `divergence_gradient(record, student, teacher, kept, grads)`, the gradient of the student's
    logits, where grads are those of the values.

    The logits are (N, C) with their classes side by side, of one dtype; grads is contiguous.

    Attributes:
        values: (N,), in float32 at least.
        kept: what `divergence_gradient` wants to see again.
    """

    values: torch.Tensor
    kept: torch.Tensor

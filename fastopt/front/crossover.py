"""From how many elements on a loss is worth compiled code on a CPU.

From a crossover on the compiled path is at least as fast as torch's own, forward and backward, as
measured on 2 cores, most of them over a grid of sizes in a loop of calls; the benchmark checks it.
Below, what a call costs before any kernel runs decides, and torch's C++ has less of that than
Python. Optimizers count tensors' fixed costs too, so theirs pays off from the first element.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..kernels.operation import LinearSoftmax, Operation

__all__ = ["crossover", "quick_test", "usual_crossover"]


def usual_crossover(function: str) -> int:
    """That of a loss that names none: one kernel of torch's is harder to beat than several."""
    return 98_304 if hasattr(torch._C._nn, function) else 32_768


def crossover(operation: type[Operation], itemsize: int, row: int) -> int:
    """That of a call.

    Args:
        operation: the record's class.
        itemsize: bytes of one of input's numbers.
        row: of a softmax, its classes if they lie side by side in memory, else 0.
    """
    for longest, count in operation.row_crossover.get(itemsize, ()):
        if 0 < row <= longest:
            return count
    return operation.crossover


def quick_test(operation: type[Operation]) -> tuple[Callable[[Tensor], bool], int]:
    """A quick test of an input: sure to be below the crossover if it says so.

    Also the number of elements below which it need not be asked.
    """
    if issubclass(operation, LinearSoftmax):  # what counts are logits, of which input says little
        return lambda input: False, 0
    least = operation.crossover
    rows = [row for rows in operation.row_crossover.values() for row in rows]
    longest = max((classes for classes, count in rows if count < least), default=0)

    def test(input: Tensor) -> bool:
        shape = input.shape  # of (batch, classes, length) the classes may be side by side
        return (input.numel() < least and shape[-1] > longest) and (
            len(shape) < 3 or shape[1] > longest or (input.stride(1) != 1 and shape[1] > 1)
        )

    return test, min([least, *(count for _, count in rows)])

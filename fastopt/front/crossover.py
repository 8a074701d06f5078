"""From how many elements on a loss is worth compiled code.

From a crossover on the compiled path is at least as fast as torch's own, forward and backward. A
CPU's are measured, on 2 cores, most of them over a grid of sizes in a loop of calls; the benchmark
checks them, and ``python -m fastopt tune`` measures those of a machine. A GPU's are derived.
Below, what a call costs before any kernel runs decides, and torch's C++ has less of that than
Python. Optimizers count tensors' fixed costs too, so theirs pays off from the first element.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..kernels.operation import NEVER, Gather, LinearSoftmax, Operation, Rowwise, Softmax

__all__ = ["NEVER", "crossover", "gpu_crossover", "quick_test", "usual_crossover"]

# What a GPU's crossovers are derived from: seconds that a call of fastopt's, its backward pass
# included, keeps the host busy beyond torch's, before launches (140 to 220 µs in context, as
# measured on 2 cores of an AMD EPYC); those that a launch by Triton takes, and one by torch (not
# measured); and bytes a second, the most that any GPU has, where one doesn't say how many.
HOST, LAUNCH, TORCHS_LAUNCH = 200e-6, 25e-6, 5e-6
BANDWIDTH = 8e12


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
        shape = input.shape
        if rows and len(shape) == 2:
            row = shape[1] if input.stride(1) == 1 else 0
            return input.numel() < crossover(operation, input.itemsize, row)
        # Of (batch, classes, length) the classes may be side by side.
        return (input.numel() < least and shape[-1] > longest) and (
            len(shape) < 3 or shape[1] > longest or (input.stride(1) != 1 and shape[1] > 1)
        )

    return test, min([least, *(count for _, count in rows)])


def gpu_crossover(operation: type[Operation], itemsize: int, device: torch.device) -> int:
    """That of a call on a GPU: where the bytes that are not moved make up for the host's time.

    It is derived from counted launches and bytes, not measured, and on the safe side: as if the
    host were what a training step waits for, and none of its time hidden behind the GPU's.

    Args:
        operation: the record's class.
        itemsize: bytes of one of input's numbers.
        device: the GPU.
    """
    if issubclass(operation, LinearSoftmax) or not hasattr(operation, "twin"):
        return 0  # it is there for its memory, or torch has nothing like it
    if issubclass(operation, Gather):  # which moves as many bytes as torch does
        return NEVER
    # Passes over the elements that are spared, launches of fastopt's, and of torch's.
    if issubclass(operation, Softmax):  # torch fills the gradient with zeros, and reads all again
        passes, launches, torchs = 3, 5, 5
    elif not hasattr(torch._C._nn, operation.twin.__name__):  # composed, of four steps at least
        passes, launches, torchs = 8, 3, 10
    elif issubclass(operation, Rowwise):  # a backward pass that reads again
        passes, launches, torchs = 1, 3, 3
    else:  # besides, the terms of a sum are written and read
        passes, launches, torchs = 4, 3, 3
    spent = HOST + launches * LAUNCH - torchs * TORCHS_LAUNCH
    return int(spent * _bandwidth(device) / (passes * itemsize))


@functools.cache
def _bandwidth(device: torch.device) -> float:
    """Bytes a second that a GPU's memory moves, at most."""
    if device.type != "cuda" or torch.version.hip:
        return BANDWIDTH
    properties: Any = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "memory_clock_rate", 0)  # kHz, of which each moves two bits a line
    width = getattr(properties, "memory_bus_width", 0)
    return float(2e3 * clock * width / 8) or BANDWIDTH

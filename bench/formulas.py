"""Losses that users write, against torch's operations, eager and compiled.

    python bench/formulas.py [--only TEXT] [--seconds SECONDS]

How it measures: see ways.py. It draws results/formulas.png if it measured all.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as theirs
from torch import Tensor
from ways import FASTOPT, Row, report

import fastopt
from fastopt import formula as m

ELEMENTS = 4_000_000


@fastopt.loss
def log_cosh(input: Any, target: Any, *, scale: float = 1.0) -> Any:
    d = m.abs(input - target) * scale
    return d + m.softplus(-2 * d) - m.log(2.0)


@fastopt.loss
def weighted_log_cosh(input: Any, target: Any, weight: Any) -> Any:
    d = m.abs(input - target)
    return weight * (d + m.softplus(-2 * d) - m.log(2.0))


@fastopt.loss
def focal(input: Any, target: Any, *, gamma: float = 2.0, alpha: float = 0.25) -> Any:
    p = m.sigmoid(input)
    apart = p + target - 2.0 * p * target
    share = alpha * target + (1.0 - alpha) * (1.0 - target)
    return share * apart**gamma * (m.softplus(input) - target * input)


@fastopt.loss
def charbonnier(input: Any, target: Any, *, eps: float = 1e-3) -> Any:
    return m.sqrt((input - target) ** 2 + eps**2)


@fastopt.loss
def quantile(input: Any, target: Any, *, q: float = 0.9) -> Any:
    d = target - input
    return m.maximum(q * d, (q - 1.0) * d)


@fastopt.loss(constant=("target",))
def missed(probability: Any, target: Any, *, alpha: float = 0.3) -> Any:
    return alpha * (1.0 - target) * probability + (1.0 - alpha) * target * (1.0 - probability)


# As one writes them in torch.


def log_cosh_of_tensors(input: Tensor, target: Tensor) -> Tensor:
    d = (input - target).abs()
    return (d + theirs.softplus(-2 * d) - 0.6931471805599453).mean()


def weighted_log_cosh_of_tensors(input: Tensor, target: Tensor, weight: Tensor) -> Tensor:
    d = (input - target).abs()
    return (weight * (d + theirs.softplus(-2 * d) - 0.6931471805599453)).mean()


def focal_of_tensors(input: Tensor, target: Tensor) -> Tensor:
    p = input.sigmoid()
    error = theirs.binary_cross_entropy_with_logits(input, target, reduction="none")
    right = p * target + (1 - p) * (1 - target)
    share = 0.25 * target + 0.75 * (1 - target)
    return (share * (1 - right) ** 2 * error).mean()


def charbonnier_of_tensors(input: Tensor, target: Tensor) -> Tensor:
    return ((input - target) ** 2 + 1e-6).sqrt().mean()


def quantile_of_tensors(input: Tensor, target: Tensor) -> Tensor:
    d = target - input
    return torch.maximum(0.9 * d, -0.1 * d).mean()


def missed_of_tensors(probability: Tensor, target: Tensor) -> Tensor:
    return (0.3 * (1 - target) * probability + 0.7 * target * (1 - probability)).mean()


#: Of each loss: torch's operations, the operands, and of how many there is a gradient.
LOSSES = {
    log_cosh: (log_cosh_of_tensors, 2, False),
    weighted_log_cosh: (weighted_log_cosh_of_tensors, 3, False),
    focal: (focal_of_tensors, 2, True),
    charbonnier: (charbonnier_of_tensors, 2, False),
    quantile: (quantile_of_tensors, 2, False),
    missed: (missed_of_tensors, 2, True),
}


def row(loss: Any, torchs: Any, operands: int, labels: bool) -> Row:
    """labels: whether the target has none of the gradients, as it is 0 or 1."""
    tensors = [torch.randn(ELEMENTS) for _ in range(operands)]
    if labels:
        tensors[1] = (tensors[1] > 0).float()
    given = tuple(tensors)
    ways = {FASTOPT: loss, "eager torch": torchs, "torch.compile": torch.compile(torchs)}
    return Row(f"{loss.__name__} {ELEMENTS:,}", given, ways, (1,) if labels else ())


def rows() -> Iterator[partial[Row]]:
    for loss, (torchs, operands, labels) in LOSSES.items():
        yield partial(row, loss, torchs, operands, labels)


if __name__ == "__main__":
    found = report(__doc__.splitlines()[0], rows())
    if len(found) == len(LOSSES):
        import plots

        plots.draw_ways(found, Path(__file__).parent / "results" / "formulas.png")

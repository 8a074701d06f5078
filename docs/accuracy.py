"""python docs/accuracy.py: writes accuracy.md, by measuring every operation in every dtype.

tests/test_accuracy.py asserts what the page shows, with fresh random numbers in every run.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from accuracy import BY_TORCH, OPERATIONS, measure  # noqa: E402
from cases import FLOATS  # noqa: E402

PAGE = Path(__file__).with_suffix(".md")
HEAD = """\
# Accuracy

<!-- Written by docs/accuracy.py (make docs) from a measurement: do not edit. -->

The error of fastopt's result and that of eager torch's, both against the same formula in 80-bit
long doubles: the root mean square of the errors over that of the exact values, in units of the
dtype's eps (rounding an exact result to the dtype costs 0.2 to 0.3). Each number is over all rows
of the test table ([cases.py](../tests/cases.py)) that have at least 600 elements, with random
numbers; for an optimizer over one step from a state that torch's steps have made. Of the losses
from `binary_cross_entropy` on, torch's own results in float64 are taken for exact. Measured with
torch {torch} on {machine}.

No root mean square is larger than torch's; `make test` measures it anew. A single element may well
be further from the exact one than torch's, as both round. Half precision is computed in float32
and rounded once, sums are added with their rounding errors kept.
"""

TAIL = """\
## Determinism

A call that the CPU's kernels serve gives the same bits in every run on one machine: on any number
of threads, torch's or Python's, and in a forked child (`tests/test_processes.py`). What a
sum's order depends on is its length alone. What is torch's own code (small losses, see
[Dispatch](dispatch.md#sizes-from-which-kernels-serve)) is as torch is, whose sums depend on the
number of threads: `fastopt.use_backend("numba")` is the way round. Another kind of processor may
give other last digits. On a GPU no reduction uses atomics; none has run on one yet.
"""


def tables() -> list[str]:
    """One for each set of quantities: losses have other ones than optimizers."""
    found: dict[tuple[str, ...], list[str]] = {}
    exactly = [(operation, dtype) for operation in OPERATIONS for dtype in FLOATS]
    for operation, dtype in (*exactly, *BY_TORCH):
        errors = measure(operation, dtype, enough=1000)
        cells = [f"{errors[q].roots()[k]:.2f}" for q in sorted(errors) for k in (0, 1)]
        row = [operation, str(dtype).removeprefix("torch."), *cells]
        found.setdefault(tuple(sorted(errors)), []).append(f"| {' | '.join(row)} |")
        print(found[tuple(sorted(errors))][-1])
    return ["\n".join([*heading(quantities), *lines]) for quantities, lines in found.items()]


def heading(quantities: tuple[str, ...]) -> list[str]:
    words = [f"{quantity}: fastopt | torch" for quantity in quantities]
    return [f"| | | {' | '.join(words)} |", "| --- | --- |" + " ---: | ---: |" * len(quantities)]


def page() -> str:
    head = HEAD.format(torch=torch.__version__, machine=platform.machine())
    return "\n\n".join([head.rstrip(), *tables(), TAIL])


if __name__ == "__main__":
    PAGE.write_text(page())

"""fastopt against torch, case by case: correctness first, then time, as a ratio.

    python bench/run.py [--only TEXT] [--seconds 1.0] [--json FILE]

Every contender of a case runs interleaved in one process; a ratio compares medians. On
a shared machine the absolute times mean little. "best torch" is the fastest of what
torch offers for the same work in eager mode: for an optimizer its default, foreach and
fused implementations.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as theirs
from cases import LOSSES, OPTIMIZERS, LossRow, OptimizerRow
from timer import interleaved, median, spread
from torch.nn import Parameter
from tqdm import tqdm

import fastopt
import fastopt.nn.functional as ours

Call = Callable[[], object]


def loss_contenders(row: LossRow) -> dict[str, Call]:
    """Forward and backward by each side, checked against each other."""
    input, *rest = row.make()
    leaf = input.requires_grad_()

    def call(module: Any) -> Call:
        function = getattr(module, row.operation)

        def forward_and_backward() -> None:
            leaf.grad = None
            function(leaf, *rest).backward()

        return forward_and_backward

    contenders = {"fastopt": call(ours), "torch": call(theirs)}
    grads = []
    for run in contenders.values():
        run()
        grads.append(leaf.grad)
    limit = torch.finfo(input.dtype).eps * 8
    torch.testing.assert_close(
        *grads, rtol=limit, atol=limit * float(grads[1].abs().max()), msg=row.name
    )
    leaf.grad = None
    return contenders


def optimizer_contenders(row: OptimizerRow) -> dict[str, Call]:
    """A step by each side, checked against each other."""

    def build(module: Any, **how: Any) -> tuple[Call, list[Parameter]]:
        torch.manual_seed(0)
        params = [Parameter(torch.randn(s)) for s in row.shapes]
        for p in params:
            p.grad = torch.randn_like(p)
        groups = [{"params": params[k :: row.groups]} for k in range(row.groups)]
        return getattr(module, row.operation)(groups, **row.options, **how).step, params

    sides = {"fastopt": build(fastopt.optim), "torch": build(torch.optim)}
    sides["torch foreach"] = build(torch.optim, foreach=True)
    if row.operation != "RMSprop":
        sides["torch fused"] = build(torch.optim, fused=True)
    for step, _ in sides.values():
        step()
        step()
    expected = sides["torch"][1]
    for _, params in sides.values():
        torch.testing.assert_close(params, expected, rtol=1e-5, atol=1e-5, msg=row.name)
    return {name: step for name, (step, _) in sides.items()}


def measure(row: LossRow | OptimizerRow, seconds: float) -> dict[str, Any]:
    """One line of the result."""
    make = loss_contenders if isinstance(row, LossRow) else optimizer_contenders
    times = interleaved(make(row), seconds)  # type: ignore[arg-type]
    medians = {name: median(t) for name, t in times.items()}
    best = min(value for name, value in medians.items() if name != "fastopt")
    return {
        "case": row.name,
        "microseconds": {name: value * 1e6 for name, value in medians.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "vs_torch": medians["torch"] / medians["fastopt"],
        "vs_best_torch": best / medians["fastopt"],
    }


def commit() -> str:
    """The commit measured, marked if files have been changed since."""
    run = ("git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty")
    try:
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def main() -> int:
    """Run, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seconds", type=float, default=1.0, help="time for each case, about")
    parser.add_argument("--json", type=Path, help="file for the results")
    arguments = parser.parse_args()
    rows = [row for row in (*LOSSES, *OPTIMIZERS) if arguments.only in row.name]
    if not rows:
        parser.error(f"no case has {arguments.only!r} in its name")
    results = [measure(row, arguments.seconds) for row in tqdm(rows, unit="case", leave=False)]
    print(f"{'case':45s} {'fastopt us':>12s} {'torch us':>12s} {'vs torch':>9s} {'vs best':>8s}")
    for r in results:
        us = r["microseconds"]
        print(
            f"{r['case']:45s} {us['fastopt']:12.1f} {us['torch']:12.1f} "
            f"{r['vs_torch']:8.2f}x {r['vs_best_torch']:7.2f}x"
        )
    if arguments.json:
        machine = {
            "torch": torch.__version__,
            "fastopt": fastopt.__version__,
            "threads": torch.get_num_threads(),
            "capability": torch.backends.cpu.get_cpu_capability(),
            "processor": platform.machine(),
            "numba": importlib.metadata.version("numba"),
            "commit": commit(),
        }
        arguments.json.write_text(json.dumps({"machine": machine, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

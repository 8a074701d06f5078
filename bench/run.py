"""fastopt against torch, case by case: correctness first, then time, as a ratio.

    python bench/run.py [--full] [--loop] [--only TEXT] [--json FILE] [--plots FOLDER]
        [--compare OLD.json]

Contenders take turns; a ratio compares medians, and on a shared machine the absolute times mean
little. Calls are timed one by one, in context: before each come a matrix product and a pass that
empties the caches, as in a training step. With --loop a turn is a loop of calls instead, with
warm caches. "best torch" is the fastest of torch's own ways:
its default, for optimizers foreach and fused, for large losses torch with huge pages (a setting
that counts from a process's start, so that one runs beside this process), and with --full
torch.compile. For large cases a copy of as many bytes as have to be moved takes its turn, too.
Then come whole training steps, as `steps.py` has them.
"""

from __future__ import annotations

import argparse
import gc
import importlib.metadata
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from cases import ROWS, LossRow, Row
from contenders import FASTOPT, HUGE_PAGES, TORCH, Elsewhere, check, expect, make, names
from steps import STEPS
from steps import measure as measure_step
from timer import Timed, in_context, interleaved, median, one_by_one, spread, timed
from tqdm import tqdm
from training import peak_memory

import fastopt

COPY = "a copy"
CPU = torch.device("cpu")


def copy_of(size: int) -> Callable[[], object]:
    """Torch's own copy, which moves so many bytes, half of them read."""
    source, target = (torch.ones(size // 2, dtype=torch.uint8) for _ in range(2))
    return lambda: target.copy_(source)


def measure(row: Row, seconds: float, full: bool, loop: bool) -> dict[str, Any]:
    """One line of the result."""
    clock = timed if loop else in_context
    contenders: dict[str, Timed] = {}
    failed: dict[str, str] = {}
    for name in names(row, full):
        if name == HUGE_PAGES:
            contenders[name] = Elsewhere(row, name, loop)
            continue
        contender = make(row, name)
        try:
            contender.call()
        except Exception as error:  # a compiler is missing: not what is measured here
            if name in (FASTOPT, TORCH):
                raise
            failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
            continue
        if name == FASTOPT:
            check(row, contender, expect(row))
        contenders[name] = clock(contender.call)
    if row.size >= report.LARGE:
        contenders[COPY] = clock(copy_of(row.floor))
    times = (interleaved if loop else one_by_one)(contenders, seconds)
    here = {n: r for n, r in contenders.items() if not isinstance(r, Elsewhere) and n != COPY}
    memory = {name: peak_memory(CPU, lambda run=run: run(1)) for name, run in here.items()}
    for run in contenders.values():
        if isinstance(run, Elsewhere):
            run.close()
    medians = {name: median(t) for name, t in times.items()}
    copy, mine = medians.pop(COPY, None), medians[FASTOPT]
    return {
        "case": row.name,
        "operation": row.operation,
        "size": row.size,
        "microseconds": {name: value * 1e6 for name, value in medians.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "peak_bytes": memory,
        "failed": failed,
        "vs_torch": medians[TORCH] / mine,
        "vs_best_torch": min(v for name, v in medians.items() if name != FASTOPT) / mine,
        "gigabytes_per_second": row.floor / mine / 1e9,
        "times_copy": copy and mine / copy,
        **(
            {}
            if isinstance(row, LossRow)
            else {"microseconds_per_tensor": mine * 1e6 / len(row.shapes)}
        ),
    }


def commit() -> str:
    """The commit measured, marked if files other than results have been changed since."""

    def git(*words: str) -> str:
        run = ("git", "-C", str(Path(__file__).parent), *words)
        return subprocess.run(run, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!results")
        return git("rev-parse", "--short", "HEAD") + "-dirty" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def machine() -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "fastopt": fastopt.__version__,
        "numba": importlib.metadata.version("numba"),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "processor": platform.machine(),
        "model": model(),
        "system": platform.system(),
        "python": platform.python_version(),
        "commit": commit(),
    }


def model() -> str:
    """The processor's name, which Python itself knows on some systems only."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(": ")[2] for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main() -> int:
    """Measure, print a table; 1 if something is slower than torch, or than in --compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--full", action="store_true", help="all cases, torch.compile as well")
    parser.add_argument("--loop", action="store_true", help="calls in a loop, with warm caches")
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seconds", type=float, help="for each case (quick: 1.5, full: 4)")
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--plots", type=Path, help="folder for pictures of them")
    parser.add_argument("--compare", type=Path, help="results of an earlier run")
    arguments = parser.parse_args()
    rows = [
        row
        for row in ROWS.values()
        if (arguments.full or arguments.only or row.quick) and arguments.only in row.name
    ]
    steps = [step for step in STEPS if arguments.only in step.name]
    if not rows and not steps:
        parser.error(f"no case has {arguments.only!r} in its name")
    seconds = arguments.seconds or (4.0 if arguments.full else 1.5)
    old = report.read(arguments.compare) if arguments.compare else None
    found: dict[str, Any] = {"loop": arguments.loop, "machine": machine()}
    found |= {"results": [], "steps": []}

    def add(kind: str, result: dict[str, Any]) -> None:
        found[kind].append(result)
        if arguments.json:  # a full run takes long, and what it has found so far is worth keeping
            report.write(found, arguments.json)

    # First, as in a process that trains: what the kernels' cases leave behind in the allocator
    # spares torch page faults.
    for step in tqdm(steps, unit="step", leave=False):
        add("steps", measure_step(step, seconds))
    for row in tqdm(rows, unit="case", leave=False):
        add("results", measure(row, seconds, arguments.full, arguments.loop))
        gc.collect()
        torch.compiler.reset()
    print(report.table(found))
    if arguments.plots:
        import plots

        plots.draw(found, arguments.plots)
    failed = bool(report.slower(found))
    if old is not None:
        changes, slower = report.compare(old, found)
        print(changes)
        failed |= slower
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())

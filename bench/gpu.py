"""fastopt on a GPU, against torch and whatever else is installed: correctness, then time.

    python bench/gpu.py [--only TEXT] [--seconds 190] [--json FILE]

A case's contenders take turns in one run, timed by the GPU's own clock, with its cache flushed
before each repeat; a ratio compares medians. What the host spends on a call is measured where
it is what counts. Bandwidth counts the bytes that an operation has to move, and is compared
with that of a copy in the same run. "best torch" is the fastest of torch's default, fused
optimizers and torch.compile. The file is written after each case.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib
import inspect
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as theirs
from gpu_cases import BF16, F32, LOSSES, SMALL, UPDATES, Loss, Update, miniature
from gpu_timer import Clock
from torch import Tensor
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours

Call = Callable[[], Any]
Row = dict[str, Any]
#: How wrong a loss of others may be, relative to the largest number: torch rounds the softmax
#: of bfloat16 logits on the way, so that its gradients have one digit.
ROUGH = 0.1
#: Limits for parameters after two steps: ours, others'. In bfloat16 they and the states are
#: rounded twice.
STEPS = {
    F32: ({"rtol": 1e-5, "atol": 1e-6}, {"rtol": 1e-4, "atol": 1e-5}),
    BF16: ({"rtol": 2**-6, "atol": 2e-3}, {"rtol": 2**-5, "atol": 8e-3}),
}


def wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == F32 else F32


def check(found: Tensor, expected: Tensor, dtype: torch.dtype, what: str) -> None:
    """Right to a few digits of dtype, element by element.

    Most of a softmax's gradient is tiny beside the targets': only what has become small by
    cancellation, beside the average, is let off.
    """
    digits = 4 * torch.finfo(dtype).eps if dtype == BF16 else 1e-5
    cancelled = 1e-6 * expected.abs().mean().item()
    torch.testing.assert_close(
        found.to(expected.dtype), expected, rtol=digits, atol=cancelled, msg=lambda m: what + m
    )


def check_roughly(found: Tensor, expected: Tensor, what: str) -> None:
    """Whether it is the same operation at all."""
    error = (found.to(expected.dtype) - expected).abs().max().item()
    if not error <= ROUGH * expected.abs().max().item():
        raise AssertionError(f"{what}: largest error {error:.3g}")


def others(names: Iterable[tuple[str, str, str]]) -> dict[str, Any]:
    """What is installed of (contender, module, attribute)."""
    found = {}
    for name, module, attribute in names:
        try:
            found[name] = getattr(importlib.import_module(module), attribute)
        except Exception:  # not installed, or not for this machine: whatever it raises
            continue
    return found


def loss_contenders(case: Loss, device: str, notes: dict[str, str]) -> dict[str, Call]:
    """A call by each side, checked against torch in a wider dtype."""
    input = torch.randn(case.shape, device=device).to(case.dtype)
    if case.last:
        input = input.movedim(-1, 1)
    if case.operation == "cross_entropy":
        positions = (input.shape[0], *input.shape[2:])
        rest = torch.randint(0, input.shape[1], positions, device=device)
    else:
        rest = torch.randn(case.shape, device=device).to(case.dtype)
    leaf = input.requires_grad_(case.backward)

    def call(function: Callable[..., Tensor], x: Tensor = leaf) -> Call:
        def run() -> tuple[Tensor, Tensor | None]:
            if not case.backward:
                with torch.no_grad():
                    return function(x, rest), None
            x.grad = None
            loss = function(x, rest)
            (loss * case.factor if case.factor != 1 else loss).backward()
            return loss.detach(), x.grad

        return run

    function, options = getattr(theirs, case.operation), case.options

    def torchs(x: Tensor, y: Tensor) -> Tensor:
        return function(x, y, **options)  # type: ignore[no-any-return]

    target = rest if rest.dtype == torch.int64 else rest.to(wide(case.dtype))
    double = leaf.detach().to(wide(case.dtype)).requires_grad_(case.backward)
    expected = torchs(double, target)
    slope = None
    if case.backward:
        (slope,) = torch.autograd.grad(expected * case.factor, double)
    expected = expected.detach()
    del double, target

    contenders = {
        "fastopt": call(functools.partial(getattr(ours, case.operation), **options)),
        "torch": call(torchs),
    }
    if case.compiled:
        torch._dynamo.reset()  # or it gives up after some recompilations, and says nothing
        contenders["torch compile"] = call(torch.compile(torchs, dynamic=False))
    if case.operation == "cross_entropy" and len(case.shape) == 2:
        known = others(
            [
                ("liger", "liger_kernel.transformers.cross_entropy", "LigerCrossEntropyLoss"),
                ("quack", "quack.cross_entropy", "cross_entropy"),
            ]
        )
        if "liger" in known:  # it writes the gradient over the logits, so it gets its own
            x = leaf.detach().clone().requires_grad_(case.backward)
            contenders["liger"] = call(known["liger"](**case.options), x)
        if "quack" in known and not case.options:
            contenders["quack"] = call(known["quack"])

    def verify(name: str, run: Call) -> None:
        loss, grad = run()
        pairs = [(loss, expected, "loss")]
        if slope is not None:
            pairs.append((grad, slope, "gradient"))
        for found, right, what in pairs:
            if name == "fastopt":
                check(found, right, case.dtype, f"{case.name}, {what}: ")
            else:
                check_roughly(found, right, f"{case.name}, {what} by {name}")

    return verified(contenders, verify, notes)


def update_contenders(case: Update, device: str, notes: dict[str, str]) -> dict[str, Call]:
    """A step by each side, checked after two against torch in a wider dtype."""

    def build(optimizer: Any, dtype: torch.dtype, **how: Any) -> tuple[Call, list[Parameter]]:
        torch.manual_seed(0)
        params = []
        for shape in case.shapes:
            value, grad = torch.randn(2, *shape, device=device).to(case.dtype).to(dtype)
            params.append(Parameter(value.clone()))
            params[-1].grad = grad.clone()
        groups = [{"params": params[k :: case.groups]} for k in range(case.groups)]
        return optimizer(groups, **case.options, **how).step, params

    torchs = getattr(torch.optim, case.operation)
    step, right = build(torchs, wide(case.dtype))
    step()
    step()
    del step
    sides = {
        "fastopt": build(getattr(fastopt.optim, case.operation), case.dtype),
        "torch": build(torchs, case.dtype),
    }
    if "fused" in inspect.signature(torchs).parameters:
        sides["torch fused"] = build(torchs, case.dtype, fused=True)
    known = others([("optimi", "optimi", case.operation)])
    if "optimi" in known:
        how: dict[str, Any] = {"kahan_sum": False}
        if case.operation != "SGD":
            how |= {"betas": (0.9, 0.999), "eps": 1e-8}
        try:
            sides["optimi"] = build(known["optimi"], case.dtype, **how)
        except (TypeError, ValueError) as error:
            notes["optimi"] = str(error)

    def verify(name: str, run: Call) -> None:
        run()
        run()
        limits = STEPS[case.dtype][name != "fastopt"]
        for p, q in zip(sides[name][1], right, strict=True):
            torch.testing.assert_close(
                p.detach().to(q.dtype), q.detach(), **limits, msg=lambda m: f"{case.name}: {m}"
            )

    return verified({name: side[0] for name, side in sides.items()}, verify, notes)


def verified(
    contenders: dict[str, Call], verify: Callable[[str, Call], None], notes: dict[str, str]
) -> dict[str, Call]:
    """Those that are right; fastopt and torch have to be."""
    for name in list(contenders):
        try:
            verify(name, contenders[name])
        except Exception as error:
            if name in ("fastopt", "torch"):
                raise
            notes[name] = f"{type(error).__name__}: {error}"[:300]
            del contenders[name]
    return contenders


def measure(case: Loss | Update, clock: Clock, copy_rate: float, repeats: int) -> Row:
    """One line of the result."""
    notes: dict[str, str] = {}
    make = loss_contenders if isinstance(case, Loss) else update_contenders
    contenders = make(case, clock.device, notes)  # type: ignore[arg-type]
    times = clock.interleaved(contenders, repeats)
    medians = {name: statistics.median(t) for name, t in times.items()}
    best = min((n for n in medians if n.startswith("torch")), key=medians.__getitem__)
    moved = case.moved * case.elements * case.dtype.itemsize
    row: Row = {
        "case": case.name,
        "microseconds": {name: t * 1e6 for name, t in medians.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "vs_torch": medians["torch"] / medians["fastopt"],
        "best_torch": best,
        "vs_best_torch": medians[best] / medians["fastopt"],
        "bytes": moved,
        "gigabytes_per_second": moved / medians["fastopt"] / 1e9,
        "share_of_copy": moved / medians["fastopt"] / copy_rate,
    }
    if isinstance(case, Update) or case.elements < SMALL:
        host = clock.host(contenders)
        row["host_microseconds"] = {name: t * 1e6 for name, t in host.items()}
    if notes:
        row["notes"] = notes
    return row


def spread(times: list[float]) -> float:
    """Half the distance between the quartiles, as a share of the median."""
    low, middle, high = statistics.quantiles(times, n=4)
    return (high - low) / 2 / middle


def copy_rate(clock: Clock, repeats: int) -> float:
    """Bytes a second, read and written, of cloning a large tensor."""
    source = torch.ones(clock.large, dtype=torch.uint8, device=clock.device)
    times = clock.interleaved({"copy": source.clone}, repeats)["copy"]
    return 2 * source.numel() / statistics.median(times)


def table(rows: list[Row]) -> str:
    """The results, for people."""
    head = (
        f"{'case':52s}{'fastopt us':>11s}{'torch us':>11s}{'ratio':>8s}  {'best torch':14s}"
        f"{'ratio':>7s}{'GB/s':>7s}{'copy':>6s}{'host us':>9s}{'torch':>8s}  others' us"
    )
    lines = [head]
    for row in rows:
        if "microseconds" not in row:
            lines.append(f"{row['case']:52s} {row.get('failed') or row.get('skipped')}")
            continue
        us, host = row["microseconds"], row.get("host_microseconds", {})
        rest = [f"{n} {t:.1f}" for n, t in us.items() if not n.startswith(("fastopt", "torch"))]
        hosts = (f"{host['fastopt']:9.1f}{host['torch']:8.1f}") if host else " " * 17
        lines.append(
            f"{row['case']:52s}{us['fastopt']:11.1f}{us['torch']:11.1f}{row['vs_torch']:7.2f}x"
            f"  {row['best_torch']:14s}{row['vs_best_torch']:6.2f}x"
            f"{row['gigabytes_per_second']:7.0f}{row['share_of_copy']:6.0%}{hosts}"
            f"  {', '.join(rest)}"
        )  # fmt: skip
    return "\n".join(lines)


def progress(cases: list[Any]) -> Iterable[Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return cases
    return tqdm(cases, unit="case", leave=False)  # type: ignore[no-any-return]


def main() -> int:
    """Run, print a table, write JSON; 1 if a result was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="cases whose name holds this text")
    parser.add_argument("--seconds", type=float, default=190, help="begin no case after this time")
    parser.add_argument("--repeats", type=int, default=21)
    parser.add_argument("--json", type=Path, help="file for the results")
    parser.add_argument("--dry-run", action="store_true", help="tiny cases on the CPU")
    arguments = parser.parse_args()
    cases: list[Any] = [c for c in (*LOSSES, *UPDATES) if arguments.only in c.name]
    if not cases:
        parser.error(f"no case has {arguments.only!r} in its name")
    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("torch sees no GPU (try --dry-run)")
    begin = time.monotonic()
    clock = Clock("cpu" if arguments.dry_run else "cuda")
    if arguments.dry_run:
        cases = [miniature(case) for case in cases]
    rate = copy_rate(clock, arguments.repeats)
    rows: list[Row] = []
    with fastopt.use_backend("triton"):
        for case in progress(cases):
            spent = (time.monotonic() - begin) / arguments.seconds
            if spent > 0.5 and isinstance(case, Loss):
                case = dataclasses.replace(case, compiled=False)
            try:
                if spent > 1:
                    rows.append({"case": case.name, "skipped": "out of time"})
                else:
                    rows.append(measure(case, clock, rate, arguments.repeats))
            except torch.OutOfMemoryError:
                rows.append({"case": case.name, "skipped": "out of memory"})
            except Exception as error:  # a wrong result, a kernel that fails: the next case may not
                message = f"{type(error).__name__}: {error}"[:500]
                rows.append({"case": case.name, "failed": message})
            clock.tidy()
            if arguments.json:
                result = {"copy_gigabytes_per_second": rate / 1e9, "rows": rows}
                arguments.json.write_text(json.dumps(result, indent=1))
    print(f"copy: {rate / 1e9:.0f} GB/s\n{table(rows)}\n{time.monotonic() - begin:.0f} s")
    return int(any("failed" in row for row in rows))


if __name__ == "__main__":
    sys.exit(main())

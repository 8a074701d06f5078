"""Results as a table, as a file, and against those of an earlier run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

Results = dict[str, Any]

#: A ratio that moves by less than this says nothing on a shared machine.
NOISE = 0.1
#: Elements from which a case is about memory.
LARGE = 1 << 20


def noise(result: Results) -> float:
    """How far a case's ratio may move by chance: both sides' quartiles, and no less than NOISE."""
    spread = result["spread"]
    return max(NOISE, 3 * (spread["fastopt"] + spread["torch"]))


def slower(found: Results) -> list[str]:
    """The cases and steps that torch's default does faster, beyond the noise."""
    everything = [*found["results"], *found["steps"]]
    return [r["case"] for r in everything if r["vs_torch"] < 1 - noise(r)]


def table(found: Results) -> str:
    """A line a case, another a training step, and whether any of them is slower than torch."""
    blocks = [
        *_kernels(found["results"]),
        *_steps(found["steps"]),
        f"slower than torch beyond noise: {', '.join(slower(found)) or 'none'}",
    ]
    return "\n".join(blocks)


def _kernels(results: list[Results]) -> list[str]:
    if not results:
        return []
    lines = [f"{_header('case')} {'GB/s':>6s} {'x copy':>7s} {'us/tensor':>9s} {'peak MB':>8s}"]
    for r in results:
        peak = r["peak_bytes"]["fastopt"]
        copy = "-" if r["times_copy"] is None else f"{r['times_copy']:.2f}"
        each = f"{r['microseconds_per_tensor']:.2f}" if "microseconds_per_tensor" in r else "-"
        lines.append(
            f"{_times(r)} {r['gigabytes_per_second']:6.1f} {copy:>7s} {each:>9s} "
            f"{'?' if peak is None else f'{peak / 1e6:.0f}':>8s}"
        )
    return lines


def _steps(results: list[Results]) -> list[str]:
    """As the kernels', and what loss and optimizer take of a step, torch's and fastopt's."""
    if not results:
        return []
    lines = [f"{_header('training step')} {'loss us':>20s} {'optimizer us':>20s}"]
    for r in results:
        changes = ["", ""]
        if r["parts"]:
            its, mine = r["parts"]["torch"], r["parts"]["fastopt"]
            changes = [f"{its[part]:.0f} -> {mine[part]:.0f}" for part in ("loss", "optimizer")]
        lines.append(f"{_times(r)} {changes[0]:>20s} {changes[1]:>20s}")
    return lines


def _header(what: str) -> str:
    return (
        f"{what:38s} {'fastopt us':>11s} {'±':>4s} {'torch us':>11s} {'vs torch':>9s} "
        f"{'vs best':>8s}  {'best torch':17s}"
    )


def _times(r: Results) -> str:
    us = r["microseconds"]
    best = min((name for name in us if name != "fastopt"), key=us.__getitem__)
    return (
        f"{r['case']:38s} {us['fastopt']:11.1f} {r['spread']['fastopt']:4.0%} "
        f"{us['torch']:11.1f} {r['vs_torch']:8.2f}x {r['vs_best_torch']:7.2f}x  {best:17s}"
    )


def compare(old: Results, new: Results) -> tuple[str, bool]:
    """What has changed beyond the noise, as text; whether anything has become slower."""
    if old.get("loop", True) != new["loop"]:
        return "results in context say nothing about those in a loop", True
    # Files of earlier versions have no steps.
    before = {r["case"]: r for r in (*old["results"], *old.get("steps", ()))}
    lines, worse = [f"against {old['machine']['commit']}:"], False
    for r in (*new["results"], *new["steps"]):
        if r["case"] not in before:
            continue
        was = before[r["case"]]
        change = r["vs_torch"] / was["vs_torch"] - 1
        if abs(change) > max(noise(r), noise(was)):
            worse |= change < 0
            lines.append(
                f"  {r['case']:38s} {was['vs_torch']:.2f}x -> {r['vs_torch']:.2f}x ({change:+.0%})"
            )
    return "\n".join(lines if len(lines) > 1 else [*lines, "  no change beyond the noise"]), worse


def write(found: Results, path: Path) -> None:
    path.write_text(json.dumps(found, indent=1) + "\n")


def read(path: Path) -> Results:
    result: Results = json.loads(path.read_text())
    return result

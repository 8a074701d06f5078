"""Pictures of a benchmark: speed-up against size, and distance to the floor of bandwidth."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
from matplotlib import pyplot as plt


def draw(found: dict[str, Any], folder: Path) -> None:
    """Write speedup.png and floor.png."""
    folder.mkdir(parents=True, exist_ok=True)
    _speedup(found["results"], folder / "speedup.png")
    _floor(found["results"], folder / "floor.png")


def _speedup(results: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    families: dict[str, list[tuple[int, float]]] = defaultdict(list)
    for r in results:
        families[_family(r)].append((r["size"], r["vs_torch"]))
    for family, points in families.items():
        axes.plot(*zip(*points, strict=True), "o", label=family, alpha=0.7)
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(
        xscale="log", yscale="log", xlabel="elements", ylabel="times as fast as torch's default"
    )
    axes.grid(which="both", alpha=0.2)
    axes.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _family(result: dict[str, Any]) -> str:
    """There are too many operations for a colour each."""
    if "microseconds_per_tensor" in result:
        return "optimizers, clipping, averages"
    return "cross-entropy" if result["operation"] == "cross_entropy" else "other losses"


def _floor(results: list[dict[str, Any]], path: Path) -> None:
    rows = [r for r in results if r["times_copy"] is not None][::-1]
    figure, axes = plt.subplots(figsize=(8, 0.3 * len(rows) + 1), layout="constrained")
    shares = [1 / r["times_copy"] for r in rows]
    torchs = [s / r["vs_torch"] for s, r in zip(shares, rows, strict=True)]
    axes.barh([r["case"] for r in rows], shares, label="fastopt")
    axes.barh([r["case"] for r in rows], torchs, height=0.3, label="torch")
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("share of the bandwidth of a copy beside it")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_ways(found: dict[str, dict[str, float]], path: Path) -> None:
    """How many times as long as fastopt's the other ways of each row take."""
    figure, axes = plt.subplots(figsize=(8, 0.6 * len(found) + 1), layout="constrained")
    others = list(next(iter(found.values())))[1:]
    height = 0.8 / len(others)
    for k, way in enumerate(others):
        places = [i - k * height for i in range(len(found))][::-1]
        bars = axes.barh(places, [row[way] for row in found.values()], height, label=way)
        axes.bar_label(bars, fmt="%.1f", padding=2)
    axes.set_yticks([i - height / 2 for i in range(len(found))][::-1], list(found))
    axes.axvline(1.0, color="black", linewidth=1)
    axes.set_xlabel("fastopt is so many times as fast (forward and backward)")
    axes.legend(loc="lower right")
    figure.savefig(path, dpi=120)
    plt.close(figure)

"""Train a small language model with torch's loss and optimizer, and with fastopt's: its
cross-entropy, and its linear cross-entropy in the place of head and loss.

All runs start from the same weights and see the same batches. They take turns step by
step, so that whatever else the machine does slows all, and the median step counts.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from text import VOCABULARY, batches, read_corpus
from tqdm import tqdm  # type: ignore[import-untyped]
from training import (
    BATCH,
    CONTEXT,
    LAST,
    LAYERS,
    LEARNING_RATES,
    WIDTH,
    LanguageModel,
    Run,
    StepTime,
)

import fastopt

EARLY = 20  # steps for which rounding has hardly had time to add up


def main() -> None:
    """Train, report, draw."""
    arguments = parse_arguments()
    corpus = read_corpus()
    print(f"text: {corpus}")
    data = batches(corpus.ids.to(arguments.device), BATCH, CONTEXT, arguments.seed)

    torch.manual_seed(arguments.seed)
    model = LanguageModel().to(arguments.device)
    weights = sum(p.numel() for p in model.parameters())
    print(f"model: transformer, {LAYERS} layers of width {WIDTH}, {weights:,} weights")

    backend: Callable[[], AbstractContextManager[None]] = nullcontext
    if arguments.backend != "auto":
        backend = functools.partial(fastopt.use_backend, arguments.backend)
    ours = Run(fastopt, arguments.optimizer, copy.deepcopy(model), backend)
    linear = Run(fastopt, arguments.optimizer, copy.deepcopy(model), backend, linear=True)
    runs = [Run(torch, arguments.optimizer, model), ours, linear]
    try:
        batch = next(data)
        explanation = "\n".join(run.explain(*batch) for run in (ours, linear))
        progress = tqdm(range(arguments.steps), desc="training all", unit="step", mininterval=0.5)
        for step in progress:
            batch = next(data)
            # Taking turns at going first: the others find the batch in the cache.
            first = step % len(runs)
            for run in runs[first:] + runs[:first]:
                run.step(*batch)
            progress.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in runs})
        peaks = [run.memory(*batch) for run in runs]
    except fastopt.BackendUnavailable as error:
        sys.exit(f"{Path(__file__).name}: {error}")

    print(f"\n{explanation}\n")
    report(runs, peaks)
    picture = arguments.out / "loss_and_time.png"
    draw(runs, arguments.optimizer, picture)
    print(f"machine: {describe_machine(arguments.device)}")
    print(f"picture: {picture}")


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=LEARNING_RATES, default="AdamW", help="with its default options")
    add("--steps", type=whole_number(EARLY), default=300, help="of each of the three runs")
    add(
        "--backend",
        choices=("auto", *fastopt.dispatch.BACKENDS),
        default="auto",
        help="that fastopt is to insist on",
    )
    add("--device", type=device, default="cpu", help="cpu, cuda or cuda:N")
    add("--seed", type=whole_number(0), default=0, help="of the weights and the batches")
    add("--out", type=folder, default="demo", help="folder for the picture")
    return parser.parse_args()


def whole_number(least: int) -> Callable[[str], int]:
    """An argument type: an integer that is not below `least` and fits 63 bits."""

    def convert(text: str) -> int:
        try:
            number = int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
        if not least <= number < 2**63:
            raise argparse.ArgumentTypeError(f"{number} is not in {least} … 2**63 - 1")
        return number

    return convert


def device(text: str) -> torch.device:
    """An argument type: a device that this machine has."""
    try:
        chosen = torch.device(text)
    except RuntimeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a device") from None
    if chosen.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"{text!r} is neither cpu nor cuda")
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"torch finds no {text!r} here")
    return chosen


def folder(text: str) -> Path:
    """An argument type: a folder to write to, made if it isn't there."""
    path = Path(text)
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} is not writable")
    return path


def report(runs: list[Run], peaks: list[int | None]) -> None:
    """Print times and memory, and how far the losses agree."""
    first = sum(run.times[0].loss + run.times[0].optimizer for run in runs[1:])
    print(f"compile: {first:.1f} s (first losses and optimizer steps, short if compiled before)\n")

    print_row("median ms of", [run.name for run in runs])
    medians = [run.medians() for run in runs]
    for part in medians[0]:
        print_row(part, [milliseconds(m[part]) for m in medians])
    print_row("peak memory, MB", ["-" if p is None else f"{p / 1e6:.0f}" for p in peaks])
    print(
        "linear: by linear_cross_entropy, whose time is that of head and loss\n"
        "peak memory: of head and loss, forward and backward, with the gradients that they give"
    )

    theirs, *others = runs
    print()
    for run in runs:
        start, end = run.losses[0], run.final_loss()
        print(
            f"loss with {run.name:15} {start:.4f} at the start, "
            f"{end:.4f} over the last {LAST} steps"
        )
    for run in others:
        apart = [abs(b - a) / a for a, b in zip(theirs.losses, run.losses, strict=True)]
        print(
            f"largest relative difference with {run.name}: {max(apart[:EARLY]):.1e} over "
            f"the first {EARLY} steps, {max(apart):.1e} over all {len(apart)}"
        )
    for run in others:
        print(f"whole step: {speed_up(theirs, run):.2f} times as fast with {run.name}")
    print()


def print_row(name: str, cells: list[str]) -> None:
    """A row of the table."""
    print(f"{name:15}" + "".join(f"{cell:>17}" for cell in cells))


def milliseconds(median: float) -> str:
    """A time, or that there is no such part."""
    return f"{median:.1f}" if median else "-"


def speed_up(theirs: Run, ours: Run) -> float:
    """How many of our steps take as long as one of theirs."""
    return theirs.medians()["whole step"] / ours.medians()["whole step"]


def describe_machine(chosen: torch.device) -> str:
    """What the timings were taken on."""
    words = f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    if chosen.type == "cuda":
        words = f"{torch.cuda.get_device_name(chosen)}, {words}"
    return words


def draw(runs: list[Run], optimizer: str, path: Path) -> None:
    """Save the picture: loss curves on the left, step times on the right."""
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    figure, (left, right) = plt.subplots(
        1, 2, figsize=(12, 5.5), width_ratios=(3, 2), layout="constrained"
    )
    figure.suptitle(
        f"Language model, vocabulary {VOCABULARY:,}: torch's and fastopt's "
        f"cross-entropy and {optimizer}",
        fontsize=15,
    )
    draw_losses(left, runs)
    draw_times(right, runs)
    figure.savefig(path, dpi=120)


def draw_losses(axes: Axes, runs: list[Run]) -> None:
    """The loss curves, each visible underneath the next one."""
    styles = (("#56B4E9", 8), ("#E69F00", 4), ("#000000", 1))
    for run, (color, width) in zip(runs, styles, strict=True):
        axes.plot(run.losses, color=color, alpha=0.8, linewidth=width, label=run.name)
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_times(axes: Axes, runs: list[Run]) -> None:
    """A stacked bar for each run."""
    names, medians = [run.name for run in runs], [run.medians() for run in runs]
    bottoms = [0.0] * len(runs)
    colors = ("#999999", "#CC79A7", "#0072B2", "#E69F00")
    for part, color in zip(StepTime._fields, colors, strict=True):
        heights = [m[part] for m in medians]
        label = f"{part}: {' → '.join(map(milliseconds, heights))} ms"
        bars = axes.bar(names, heights, 0.6, bottoms, color=color, label=label)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    totals = [f"{m['whole step']:.0f} ms" for m in medians]
    for k, run in enumerate(runs[1:], 1):
        totals[k] += f"\n{speed_up(runs[0], run):.2f} times\nas fast"
    axes.bar_label(bars, totals, padding=4, fontweight="bold")
    axes.margins(x=0.2, y=0.2)
    axes.set(title="Time", ylabel="median time of a step (ms)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), reverse=True)


if __name__ == "__main__":
    main()

"""Train a small language model twice, with torch's loss and optimizer and with fastopt's.

Both runs start from the same weights and see the same batches. They take turns step by
step, so that whatever else the machine does slows both, and the median step counts.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")

import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from text import VOCABULARY, batches, read_corpus
from torch import Tensor, nn
from tqdm import tqdm  # type: ignore[import-untyped]

import fastopt

BATCH, CONTEXT = 8, 64
WIDTH, HEADS, LAYERS = 128, 4, 2
WARM_UP = 5  # steps that the timings leave out
LAST = 10  # steps over which the final loss is averaged
EARLY = 20  # steps for which rounding has hardly had time to add up
LEARNING_RATES = {"SGD": 0.3, "Adam": 1e-3, "AdamW": 1e-3, "RMSprop": 5e-4}


class LanguageModel(nn.Module):
    """A causal transformer: tokens (batch, context) to logits (batch * context, vocabulary)."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits for the token after each one."""
        hidden = self.tokens(tokens) + self.places.weight
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        logits: Tensor = self.head(self.norm(hidden)).flatten(0, 1)
        return logits


class StepTime(NamedTuple):
    """Seconds that the parts of one step took."""

    model: float
    loss: float
    optimizer: float


class Stopwatch:
    """Seconds since the last look, with the device's work done."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._last = 0.0
        self.lap()

    def lap(self) -> float:
        """Seconds since the last call, or since creation."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        last, self._last = self._last, time.perf_counter()
        return self._last - last


class Run:
    """One of the two trainings.

    Args:
        library: torch or fastopt, where the loss and the optimizer come from.
        optimizer: name of the optimizer's class.
        model: trained in place.
        backend: makes the context that the library's calls run in.
    """

    def __init__(
        self,
        library: ModuleType,
        optimizer: str,
        model: nn.Module,
        backend: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.name = library.__name__
        self.model = model
        self.backend = backend
        self.criterion = library.nn.CrossEntropyLoss()
        make = getattr(library.optim, optimizer)
        self.optimizer: torch.optim.Optimizer = make(
            model.parameters(), lr=LEARNING_RATES[optimizer]
        )
        self.losses: list[float] = []
        self.times: list[StepTime] = []

    def step(self, tokens: Tensor, targets: Tensor) -> None:
        """Train on one batch and note the loss and the times."""
        watch = Stopwatch(tokens.device)
        logits = self.model(tokens)
        model = watch.lap()
        with self.backend():
            loss = self.criterion(logits, targets)
        (gradient,) = torch.autograd.grad(loss, logits)
        loss_time = watch.lap()
        logits.backward(gradient)
        model += watch.lap()
        # Freeing tensors of 64 MB takes milliseconds. Each counts where it was allocated.
        del gradient
        loss_time += watch.lap()
        del logits
        model += watch.lap()
        with self.backend():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(StepTime(model, loss_time, watch.lap()))
        self.losses.append(loss.item())

    def explain(self, tokens: Tensor, targets: Tensor) -> str:
        """What fastopt says about this run's loss call and optimizer."""
        with torch.no_grad(), self.backend():
            loss = fastopt.explain(self.criterion, self.model(tokens), targets)
            return f"{loss}\n{fastopt.explain(self.optimizer)}"

    def medians(self) -> dict[str, float]:
        """Median milliseconds of each part and of the whole step, after the warm-up."""
        counted = self.times[WARM_UP:]
        rows = {part: [getattr(t, part) for t in counted] for part in StepTime._fields}
        rows["whole step"] = [sum(t) for t in counted]
        return {name: 1e3 * statistics.median(seconds) for name, seconds in rows.items()}

    def final_loss(self) -> float:
        """Mean loss of the last steps."""
        return statistics.fmean(self.losses[-LAST:])


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
    theirs = Run(torch, arguments.optimizer, model)
    try:
        explanation = ours.explain(*next(data))
        progress = tqdm(range(arguments.steps), desc="training both", unit="step", mininterval=0.5)
        for step in progress:
            batch = next(data)
            # Taking turns at going first: the second finds the batch in the cache.
            for run in (theirs, ours) if step % 2 else (ours, theirs):
                run.step(*batch)
            progress.set_postfix({run.name: f"{run.losses[-1]:.3f}" for run in (theirs, ours)})
    except fastopt.BackendUnavailable as error:
        sys.exit(f"{Path(__file__).name}: {error}")

    print(f"\n{explanation}\n")
    report(theirs, ours)
    picture = arguments.out / "loss_and_time.png"
    draw(theirs, ours, arguments.optimizer, picture)
    print(f"machine: {describe_machine(arguments.device)}")
    print(f"picture: {picture}")


def parse_arguments() -> argparse.Namespace:
    """The command line, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--optimizer", choices=LEARNING_RATES, default="AdamW", help="with its default options")
    add("--steps", type=whole_number(EARLY), default=350, help="of each of the two runs")
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


def report(theirs: Run, ours: Run) -> None:
    """Print the times and how far the losses agree."""
    compiling = ours.times[0].loss + ours.times[0].optimizer
    print(f"compile: {compiling:.1f} s (first loss and optimizer step, short if compiled before)")

    print(f"\n{'median of':12}{'torch ms':>12}{'fastopt ms':>12}{'ratio':>8}")
    mine = ours.medians()
    for part, milliseconds in theirs.medians().items():
        ratio = milliseconds / mine[part]
        print(f"{part:12}{milliseconds:12.1f}{mine[part]:12.1f}{ratio:8.2f}")

    print()
    for run in (theirs, ours):
        start, end = run.losses[0], run.final_loss()
        print(
            f"loss with {run.name:8} {start:.4f} at the start, {end:.4f} over the last {LAST} steps"
        )
    differences = [abs(b - a) / a for a, b in zip(theirs.losses, ours.losses, strict=True)]
    print(
        f"largest relative difference: {max(differences[:EARLY]):.1e} over the first {EARLY} "
        f"steps, {max(differences):.1e} over all {len(differences)}"
    )
    print(f"whole step: {speed_up(theirs, ours):.2f} times as fast with fastopt\n")


def speed_up(theirs: Run, ours: Run) -> float:
    """How many of our steps take as long as one of theirs."""
    return theirs.medians()["whole step"] / ours.medians()["whole step"]


def describe_machine(chosen: torch.device) -> str:
    """What the timings were taken on."""
    words = f"{torch.get_num_threads()} CPU threads, torch {torch.__version__}"
    if chosen.type == "cuda":
        words = f"{torch.cuda.get_device_name(chosen)}, {words}"
    return words


def draw(theirs: Run, ours: Run, optimizer: str, path: Path) -> None:
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
    draw_losses(left, theirs, ours)
    draw_times(right, theirs, ours)
    figure.savefig(path, dpi=120)


def draw_losses(axes: Axes, theirs: Run, ours: Run) -> None:
    """Both loss curves, one visible underneath the other."""
    axes.plot(theirs.losses, color="#56B4E9", alpha=0.6, linewidth=6, label=theirs.name)
    axes.plot(ours.losses, color="#000000", linewidth=1, label=ours.name)
    axes.set(title="Loss", xlabel="step", ylabel="cross-entropy (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)


def draw_times(axes: Axes, theirs: Run, ours: Run) -> None:
    """A stacked bar for each library."""
    names = [theirs.name, ours.name]
    medians = [theirs.medians(), ours.medians()]
    bottoms = [0.0, 0.0]
    for part, color in zip(StepTime._fields, ("#999999", "#0072B2", "#E69F00"), strict=True):
        heights = [m[part] for m in medians]
        label = f"{part}: {heights[0]:.1f} → {heights[1]:.1f} ms"
        bars = axes.bar(names, heights, 0.6, bottoms, color=color, label=label)
        bottoms = [b + h for b, h in zip(bottoms, heights, strict=True)]
    totals = [f"{m['whole step']:.0f} ms" for m in medians]
    totals[1] += f"\n{speed_up(theirs, ours):.2f} times as fast"
    axes.bar_label(bars, totals, padding=4, fontweight="bold")
    axes.margins(x=0.2, y=0.15)
    axes.set(title="Time", ylabel="median time of a step (ms)")
    axes.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.08), reverse=True)


if __name__ == "__main__":
    main()

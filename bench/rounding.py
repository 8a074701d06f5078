"""What training loses with states and weights of 16 bits: final losses, from several seeds each.

Two tasks: the demo's language model on its text, with fewer words, by AdamW; and a classifier of
points that another network has labelled, by SGD with momentum. Learning rates fall to 0, as they do
in practice, so that the last updates are small ones. The model computes in float32 with what its
weights are, so that only how weights and states are stored makes a difference. All ways start from
the same weights, rounded, and see the same batches.

Losses don't depend on how fast the machine is; it takes some minutes.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib

matplotlib.use("agg")
import torch
from matplotlib import pyplot as plt
from text import batches, read_corpus
from torch import Tensor, nn
from torch.func import functional_call
from training import CONTEXT, LanguageModel

from fastopt import optim
from fastopt.nn.functional import cross_entropy

WORDS = 1024  # the most frequent; all others are one
EXCERPTS = 2
POINTS, FEATURES, CLASSES = 4096, 32, 10
LAST = 20  # steps over which the final loss is averaged


class Way(NamedTuple):
    """How weights and states are stored.

    Attributes:
        name: in the table.
        weights: their dtype.
        options: the optimizer's.
    """

    name: str
    weights: torch.dtype
    options: dict[str, Any]


_STATES = {"state_dtype": torch.bfloat16}
WAYS = (
    Way("float32", torch.float32, {}),
    Way("float32, states bfloat16", torch.float32, _STATES),
    Way("bfloat16, kahan", torch.bfloat16, {"rounding": "kahan", **_STATES}),
    Way("bfloat16, stochastic", torch.bfloat16, {"rounding": "stochastic", **_STATES}),
    Way("bfloat16, plain", torch.bfloat16, {}),
)


class Task(NamedTuple):
    """A model, its optimizer and its data.

    Attributes:
        model: from a seeded generator.
        optimizer: class and arguments.
        data: batches without end; whatever the model takes, and classes.
    """

    model: nn.Module
    optimizer: tuple[Any, dict[str, Any]]
    data: Iterator[tuple[Tensor, Tensor]]


class WithHead(nn.Module):
    """The demo's language model, from tokens to logits."""

    def __init__(self) -> None:
        super().__init__()
        self.body = LanguageModel(WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.body.head(self.body(tokens))
        return logits


def language(seed: int, ids: Tensor) -> Task:
    """The demo's task, of its most frequent words."""
    torch.manual_seed(seed)
    model = WithHead()
    return Task(model, (optim.AdamW, {"lr": 5e-4}), batches(ids, EXCERPTS, CONTEXT, seed))


def classifier(seed: int, ids: Tensor) -> Task:
    """Points of a normal distribution, in the classes that a network gives them."""
    torch.manual_seed(seed)

    def network(width: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Linear(FEATURES, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
            nn.Linear(width, CLASSES),
        )  # fmt: skip

    points, teacher = torch.randn(POINTS, FEATURES), network(64)
    with torch.no_grad():
        outputs = teacher(points)
        classes = ((outputs - outputs.mean(0)) / outputs.std(0)).argmax(1)

    def data() -> Iterator[tuple[Tensor, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        while True:
            chosen = torch.randint(POINTS, (128,), generator=generator)
            yield points[chosen], classes[chosen]

    return Task(network(128), (optim.SGD, {"lr": 0.1, "momentum": 0.9}), data())


#: By name: what makes it, and how many times as many steps as the language model's it takes.
TASKS = {"language model": (language, 1), "classifier": (classifier, 5)}


def train(task: Task, way: Way, steps: int) -> list[float]:
    """The losses of a training."""
    weights = {
        name: nn.Parameter(p.detach().to(way.weights)) for name, p in task.model.named_parameters()
    }
    kind, arguments = task.optimizer
    optimizer = kind(weights.values(), **arguments, **way.options)
    peak = arguments["lr"]
    losses = []
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = peak * (1 + math.cos(math.pi * step / steps)) / 2
        inputs, classes = next(task.data)
        wide = {name: w.float() for name, w in weights.items()}
        loss = cross_entropy(functional_call(task.model, wide, (inputs,)), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train all, print a table, draw a picture."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=200, help="of the language model")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default="bench/results/rounding.png")
    arguments = parser.parse_args()
    torch.set_num_threads(1)  # small models; and sums are then the same on any number of cores
    ids = read_corpus().ids
    ids = torch.where(ids < WORDS, ids, 0)
    found: dict[str, dict[str, list[list[float]]]] = {}
    for name, (make, times) in TASKS.items():
        found[name] = {
            way.name: [
                train(make(seed, ids), way, times * arguments.steps)
                for seed in range(arguments.seeds)
            ]
            for way in WAYS
        }
    report(found)
    draw(found, arguments.out)


def report(found: dict[str, dict[str, list[list[float]]]]) -> None:
    """Print final losses: mean and standard deviation over the seeds, and mean difference from
    float32's of the same seed."""
    for task, runs in found.items():
        print(f"\n| {task} | final loss | above float32 |")
        print("| --- | ---: | ---: |")
        ends = {way: [statistics.fmean(run[-LAST:]) for run in of] for way, of in runs.items()}
        for way in WAYS:
            values, base = ends[way.name], ends[WAYS[0].name]
            above = [v - b for v, b in zip(values, base, strict=True)]
            spread = statistics.stdev(values) if len(values) > 1 else 0.0
            print(
                f"| {way.name} | {statistics.fmean(values):.3f} ± {spread:.3f} | "
                f"{statistics.fmean(above):+.3f} |"
            )


def draw(found: dict[str, dict[str, list[list[float]]]], path: Path) -> None:
    """The losses against steps, means over the seeds, smoothed."""
    figure, all_axes = plt.subplots(1, len(found), figsize=(10, 4), layout="constrained")
    for axes, (task, runs) in zip(all_axes, found.items(), strict=True):
        for way, of in runs.items():
            mean = torch.tensor(of).mean(0)
            smooth = mean.unfold(0, LAST, 1).mean(1)
            axes.plot(range(LAST, len(mean) + 1), smooth, label=way)
        axes.set(title=task, xlabel="steps", ylabel="loss", yscale="log")
        axes.grid(which="both", alpha=0.2)
    all_axes[0].legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()

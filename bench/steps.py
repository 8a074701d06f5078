"""Whole training steps: zero_grad, forward, loss, backward and optimizer, fastopt's and torch's.

All start from the same weights, see the same batch and have to arrive at the same losses and
weights before anything is timed. What torch offers for the optimizer beside its default
(foreach, fused) takes its turn, too; its allocator with huge pages, which would speed up both
sides' models, doesn't.
"""

from __future__ import annotations

import gc
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from types import ModuleType
from typing import Any

import torch
from contenders import FASTOPT, TORCH
from text import VOCABULARY
from timer import Seconds, interleaved, median, spread, timed
from torch import Tensor, nn
from training import BATCH, CONTEXT, LEARNING_RATES, LanguageModel, Stopwatch

import fastopt

Loss = Callable[[Tensor, Tensor], Tensor]
Made = tuple[nn.Module, Tensor, Tensor]

#: Who trains: a library, and how its optimizer is told to step.
TRAINERS: dict[str, tuple[ModuleType, dict[str, bool]]] = {
    TORCH: (torch, {}),
    "torch foreach": (torch, {"foreach": True}),
    "torch fused": (torch, {"fused": True}),
    FASTOPT: (fastopt, {}),
}
ROUNDS = 5
#: Label of a position that doesn't count.
IGNORED = -100

#: Steps that have to agree: the first creates states, the second is the first to use them.
CHECKED = 3
#: How far losses may differ, relatively: sums of millions of float32 in another order.
SAME_LOSS = 1e-5
#: How far from torch's a tensor of weights may end up, relative to the way that it went (both as
#: norms). One left as it was is at 1, one that went the wrong way at 2; rounding is below 1e-5.
SAME_WEIGHTS = 1e-4
#: The same for a transformer under Adam, which divides a gradient by its own magnitude: so what
#: is rounding alone moves weights as well. The bias of attention's keys has no other gradient,
#: as softmax ignores it; torch's fused step ends 0.02 from its default there, fastopt's 0.03.
SAME_WEIGHTS_OF_TRANSFORMER = 0.1


@dataclass(frozen=True)
class Step:
    """A training of which one step is measured.

    Attributes:
        name: of the case, unique.
        make: the model, its input and its target.
        loss: makes the function of output and target, from torch.nn or fastopt.nn.
        optimizer: the class's name.
        options: of the optimizer.
        same: limit for the distance between weights.
        compiled: whether model and loss are one function of torch.compile.
    """

    name: str
    make: Callable[[], Made]
    loss: Callable[[Any], Loss]
    optimizer: str
    options: dict[str, Any] = field(default_factory=dict)
    same: float = SAME_WEIGHTS
    compiled: bool = False


class Training:
    """A step's model, loss and optimizer, on weights and data that are the same for each."""

    def __init__(self, case: Step, library: ModuleType, **how: Any) -> None:
        torch.manual_seed(0)
        self.model, self._input, self._target = case.make()
        loss = case.loss(library.nn)

        def forward(input: Tensor, target: Tensor) -> Tensor:
            return loss(self.model(input), target)

        self._forward = torch.compile(forward) if case.compiled else forward
        make = getattr(library.optim, case.optimizer)
        self._optimizer = make(self.model.parameters(), **case.options, **how)

    def step(self) -> Tensor:
        self._optimizer.zero_grad()
        loss = self._forward(self._input, self._target)
        loss.backward()
        self._optimizer.step()
        return loss

    def parts(self) -> dict[str, Seconds]:
        """How long a step's loss (both ways), its optimizer and the rest take.

        Hooks tell where a part ends. They cost a small model's step a tenth, so it is only for
        this that they are there.
        """
        times: dict[str, Seconds] = defaultdict(float)
        watch = Stopwatch(self._input.device)

        def end(part: str) -> None:
            times[part] += watch.lap()

        def begin_loss(model: nn.Module, inputs: Any, output: Tensor) -> None:
            output.register_hook(lambda gradient: end("loss"))
            end("rest")

        hooks = [
            self.model.register_forward_hook(begin_loss),
            self._optimizer.register_step_pre_hook(lambda *_: end("rest")),
            self._optimizer.register_step_post_hook(lambda *_: end("optimizer")),
        ]
        self.step()
        for hook in hooks:
            hook.remove()
        return times

    def weights(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.model.parameters()]


def perceptron(*sizes: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def convolutions() -> nn.Sequential:
    """The network of PyTorch's tutorial on CIFAR-10."""
    return nn.Sequential(
        nn.Conv2d(3, 6, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), *perceptron(16 * 5 * 5, 120, 84, 10),
    )  # fmt: skip


def with_head() -> nn.Module:
    """The demo's model, logits and all."""
    model = LanguageModel()
    return nn.Sequential(model, model.head)


def language_model() -> Made:
    """Each token's label is the one after it, all in one row."""
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT + 1))
    return with_head(), tokens[:, :-1], tokens[:, 1:].flatten()


def prompted() -> Made:
    """Each token's label is the token itself, but for prompts of random length: it is ignored."""
    tokens = torch.randint(VOCABULARY, (BATCH, CONTEXT))
    prompt = torch.arange(CONTEXT) < torch.randint(CONTEXT // 2, (BATCH, 1))
    return with_head(), tokens, tokens.masked_fill(prompt, IGNORED)


def shifted_logits(module: Any) -> Loss:
    """A causal language model's loss as Hugging Face wrote it first, with a copy of the logits."""

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        logits = output.unflatten(0, labels.shape).float()
        logits = logits[..., :-1, :].contiguous().view(-1, VOCABULARY)
        labels = labels[..., 1:].contiguous().view(-1)
        result: Tensor = module.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        return result

    return loss


def shifted_labels(module: Any) -> Loss:
    """The same as written later: the last position is ignored, and nothing large is copied."""

    def loss(output: Tensor, labels: Tensor) -> Tensor:
        logits = output.unflatten(0, labels.shape).float().view(-1, VOCABULARY)
        labels = nn.functional.pad(labels, (0, 1), value=IGNORED)[..., 1:].contiguous().view(-1)
        result: Tensor = module.functional.cross_entropy(logits, labels, ignore_index=IGNORED)
        return result

    return loss


def squares(module: Any) -> Loss:
    criterion: Loss = module.MSELoss()
    return criterion


def classes(module: Any) -> Loss:
    criterion: Loss = module.CrossEntropyLoss()
    return criterion


def regression() -> Made:
    return perceptron(10, 20, 1), torch.randn(100, 10), torch.randn(100, 1)


def images() -> Made:
    return convolutions(), torch.randn(128, 3, 32, 32), torch.randint(10, (128,))


def digits() -> Made:
    return perceptron(784, 512, 512, 10), torch.rand(64, 784), torch.randint(10, (64,))


_MOMENTUM = {"lr": 0.01, "momentum": 0.9}
_SGD, _ADAMW = ("SGD", _MOMENTUM), ("AdamW", {"lr": LEARNING_RATES["AdamW"]})
_TRANSFORMER = SAME_WEIGHTS_OF_TRANSFORMER
STEPS = [
    Step("step MLP 10-20-1 SGD", regression, squares, *_SGD),
    Step("step MLP 10-20-1 Adam", regression, squares, "Adam"),
    Step("step CIFAR-10 CNN SGD", images, classes, "SGD", {**_MOMENTUM, "weight_decay": 5e-4}),
    Step("step MLP 784-512-512-10 SGD", digits, classes, "SGD", {"lr": 1e-3}),
    Step("step language model AdamW", language_model, classes, *_ADAMW, _TRANSFORMER),
    Step(
        "step language model AdamW, compiled", language_model, classes, *_ADAMW, _TRANSFORMER, True
    ),
    Step("step causal LM, logits shifted AdamW", prompted, shifted_logits, *_ADAMW, _TRANSFORMER),
    Step("step causal LM, labels shifted AdamW", prompted, shifted_labels, *_ADAMW, _TRANSFORMER),
]


def check(case: Step, trainings: dict[str, Training]) -> None:
    """The same steps by all, or an AssertionError."""
    start = trainings[TORCH].weights()
    losses = {n: [t.step().item() for _ in range(CHECKED)] for n, t in trainings.items()}
    expected = trainings[TORCH].weights()
    for name, training in trainings.items():
        words = f"{case.name}, {name}"
        torch.testing.assert_close(
            torch.tensor(losses[name]), torch.tensor(losses[TORCH]), rtol=SAME_LOSS, atol=0.0,
            msg=f"{words}: losses {losses[name]} instead of {losses[TORCH]}",
        )  # fmt: skip
        for mine, its, before in zip(training.weights(), expected, start, strict=True):
            apart, moved = float((mine - its).norm()), float((its - before).norm())
            assert apart <= case.same * moved, f"{words}: weights {apart} apart, {moved} moved"


def measure(case: Step, seconds: Seconds) -> dict[str, Any]:
    """One line of the result."""
    gc.collect()
    trainings = {n: Training(case, library, **how) for n, (library, how) in TRAINERS.items()}
    check(case, trainings)
    times = interleaved({n: timed(t.step) for n, t in trainings.items()}, seconds, ROUNDS)
    medians = {name: median(t) for name, t in times.items()}
    mine = medians[FASTOPT]
    turns = min(max(3, int(seconds / 10 / mine)), 100)
    # Hooks would change what is compiled.
    parted = () if case.compiled else (TORCH, FASTOPT)
    laps = [{n: trainings[n].parts() for n in parted} for _ in range(turns)]
    return {
        "case": case.name,
        "microseconds": {name: value * 1e6 for name, value in medians.items()},
        "spread": {name: spread(t) for name, t in times.items()},
        "parts": {
            name: {part: median([lap[name][part] for lap in laps]) * 1e6 for part in laps[0][name]}
            for name in parted
        },
        "vs_torch": medians[TORCH] / mine,
        "vs_best_torch": min(v for name, v in medians.items() if name != FASTOPT) / mine,
    }

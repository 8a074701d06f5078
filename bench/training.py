"""What the demo trains, and one training of it by one library."""

from __future__ import annotations

import ctypes
import gc
import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from text import VOCABULARY
from torch import Tensor, nn

import fastopt
from fastopt.nn.functional import linear_cross_entropy

BATCH, CONTEXT = 8, 64
WIDTH, HEADS, LAYERS = 128, 4, 2
WARM_UP = 5  # steps that the timings leave out
LAST = 10  # steps over which the final loss is averaged
LEARNING_RATES = {"SGD": 0.3, "Adam": 1e-3, "AdamW": 1e-3, "RMSprop": 5e-4}


class LanguageModel(nn.Module):
    """A causal transformer: tokens (batch, context) to hidden states (batch * context, width).

    Its head makes logits of them.
    """

    def __init__(self, vocabulary: int = VOCABULARY) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, WIDTH)
        self.places = nn.Embedding(CONTEXT, WIDTH)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(
                WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, vocabulary, bias=False)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(CONTEXT))
        for embedding in (self.tokens, self.places):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """What the head is to tell the token after each one by."""
        hidden = self.tokens(tokens) + self.places.weight
        for layer in self.layers:
            hidden = layer(hidden, src_mask=self.mask, is_causal=True)
        normal: Tensor = self.norm(hidden).flatten(0, 1)
        return normal


class StepTime(NamedTuple):
    """Seconds that the parts of one step took."""

    model: float
    head: float
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
    """One of the trainings.

    Args:
        library: torch or fastopt, where the loss and the optimizer come from.
        optimizer: name of the optimizer's class.
        model: trained in place.
        backend: makes the context that the library's calls run in.
        linear: whether head and loss are one call, fastopt's linear cross-entropy.
    """

    def __init__(
        self,
        library: ModuleType,
        optimizer: str,
        model: LanguageModel,
        backend: Callable[[], AbstractContextManager[None]] = nullcontext,
        linear: bool = False,
    ) -> None:
        self.name = f"{library.__name__}, linear" if linear else library.__name__
        self.model = model
        self.backend = backend
        self.linear = linear
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
        hidden = self.model(tokens)
        model = watch.lap()
        loss, gradient, head, loss_time = self._head_and_loss(hidden, targets, watch)
        hidden.backward(gradient)
        model += watch.lap()
        with self.backend():
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.times.append(StepTime(model, head, loss_time, watch.lap()))
        self.losses.append(loss.item())

    def _head_and_loss(
        self, hidden: Tensor, targets: Tensor, watch: Stopwatch
    ) -> tuple[Tensor, Tensor, float, float]:
        """Forward and backward: the loss, the hidden states' gradient, the seconds of each."""
        head = self.model.head
        if self.linear:
            with self.backend():
                loss = linear_cross_entropy(hidden, head.weight, targets)
            gradient, head.weight.grad = torch.autograd.grad(loss, (hidden, head.weight))
            return loss, gradient, 0.0, watch.lap()
        logits = head(hidden)
        head_time = watch.lap()
        with self.backend():
            loss = self.criterion(logits, targets)
        (logits_grad,) = torch.autograd.grad(loss, logits)
        loss_time = watch.lap()
        gradient, head.weight.grad = torch.autograd.grad(logits, (hidden, head.weight), logits_grad)
        head_time += watch.lap()
        # Freeing tensors of 64 MB takes milliseconds. Each counts where it was allocated.
        del logits_grad
        loss_time += watch.lap()
        del logits
        head_time += watch.lap()
        return loss, gradient, head_time, loss_time

    def memory(self, tokens: Tensor, targets: Tensor) -> int | None:
        """Bytes that head and loss of a batch have at most, gradients included."""
        with torch.no_grad():
            hidden = self.model(tokens)
        hidden.requires_grad_()
        watch = Stopwatch(tokens.device)
        peak = peak_memory(tokens.device, lambda: self._head_and_loss(hidden, targets, watch))
        self.optimizer.zero_grad()
        return peak

    def explain(self, tokens: Tensor, targets: Tensor) -> str:
        """What fastopt says about this run's loss call and optimizer."""
        with torch.no_grad(), self.backend():
            hidden, head = self.model(tokens), self.model.head
            if self.linear:
                return str(fastopt.explain(linear_cross_entropy, hidden, head.weight, targets))
            loss = fastopt.explain(self.criterion, head(hidden), targets)
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


def peak_memory(device: torch.device, call: Callable[[], object]) -> int | None:
    """How many bytes more there are at most during a call; None where nobody counts them.

    On a CPU it is what Linux says of the process, after all that waits for reuse is given back.
    """
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    fastopt.empty_cache()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # of glibc
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what there is
    except (OSError, AttributeError, TypeError):
        return None
    before = _kilobytes("VmRSS")
    call()
    return 1024 * (_kilobytes("VmHWM") - before)


def _kilobytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))

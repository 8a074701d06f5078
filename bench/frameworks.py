"""Training steps in Hugging Face's Trainer and in Lightning: torch's loss and optimizer, fastopt's.

Whole trainings take turns, each of a few steps from the same weights on the same data, and have
to arrive at the same losses. The Trainer's own default is torch's fused AdamW and the loss inside
of the model. Needs the packages of the extra `clients`.
"""

from __future__ import annotations

import copy
import logging
import tempfile
import time
import warnings
from collections.abc import Callable
from types import ModuleType
from typing import Any

import lightning
import torch
import transformers
from timer import Seconds, median, spread
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastopt

VOCABULARY, LENGTH, BATCH = 32_000, 128, 4
STEPS, WARM_UP, ROUNDS = 8, 3, 6
#: How far losses may be apart, relatively.
SAME_LOSS = 1e-4

#: The losses and the seconds of a training's steps.
Training = tuple[list[float], list[Seconds]]


def tokens() -> Tensor:
    return torch.randint(VOCABULARY, (STEPS * BATCH, LENGTH))


# -- Hugging Face -------------------------------------------------------------------------


class Clock(transformers.TrainerCallback):
    def __init__(self) -> None:
        self.times: list[Seconds] = []

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start = time.perf_counter()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.times.append(time.perf_counter() - self.start)


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    following = nn.functional.pad(labels[:, 1:], (0, 1), value=-100).flatten()
    logits = outputs.logits.flatten(0, 1)
    total = fastopt.nn.functional.cross_entropy(logits, following, reduction="sum")
    return total / num_items_in_batch


def trainer(model: nn.Module, rows: Tensor, library: ModuleType) -> Training:
    model, clock = copy.deepcopy(model), Clock()
    own: dict[str, Any] = {}
    if library is fastopt:
        own = {
            "compute_loss_func": loss_of,
            "optimizer_cls_and_kwargs": (fastopt.optim.AdamW, {"lr": 5e-5}),
        }
    with tempfile.TemporaryDirectory() as folder:
        made = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder, max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True,
                report_to="none", save_strategy="no", logging_steps=1, disable_tqdm=True,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in rows],
            callbacks=[clock],
            **own,
        )  # fmt: skip
        made.remove_callback(transformers.PrinterCallback)
        made.train()
    losses = [entry["loss"] for entry in made.state.log_history if "loss" in entry]
    return losses, clock.times


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=128, n_layer=2, n_head=4,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


# -- Lightning ----------------------------------------------------------------------------


class Words(lightning.LightningModule):
    """A model of the next word, with the loss and the optimizer of a library."""

    def __init__(self) -> None:
        super().__init__()
        self.model = nn.Sequential(nn.Embedding(VOCABULARY, 128), nn.Linear(128, VOCABULARY))
        self.losses: list[float] = []
        self.times: list[Seconds] = []
        self.library = "torch"

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, *args: Any) -> None:
        self.times.append(time.perf_counter() - self.start)

    def training_step(self, batch: Any, index: int) -> Tensor:
        (rows,) = batch
        criterion = {"torch": torch, "fastopt": fastopt}[self.library].nn.CrossEntropyLoss()
        loss = criterion(self.model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss

    def configure_optimizers(self) -> Any:
        library = {"torch": torch, "fastopt": fastopt}[self.library]
        return library.optim.AdamW(self.parameters(), lr=1e-3)


def fit(model: nn.Module, rows: Tensor, library: ModuleType) -> Training:
    model = copy.deepcopy(model)
    model.library = library.__name__
    lightning.Trainer(
        accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    ).fit(model, DataLoader(TensorDataset(rows), batch_size=BATCH))  # fmt: skip
    return model.losses, model.times


# -- turns --------------------------------------------------------------------------------

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[..., Training]]] = {
    f"Hugging Face Trainer, GPT-2 of two layers, {BATCH} x {LENGTH} tokens": (gpt2, trainer),
    f"Lightning, a model of the next word, {BATCH} x {LENGTH} tokens": (Words, fit),
}


def main() -> None:
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    transformers.logging.set_verbosity_error()
    for name, (make, run) in CASES.items():
        model, rows = make(), tokens()
        times: dict[ModuleType, list[Seconds]] = {torch: [], fastopt: []}
        for _ in range(ROUNDS):
            curves = []
            for library in (torch, fastopt):
                losses, taken = run(model, rows, library)
                curves.append(torch.tensor(losses))
                times[library] += taken[WARM_UP:]
            torch.testing.assert_close(*curves, rtol=SAME_LOSS, atol=0)
        theirs, ours = (median(times[library]) for library in (torch, fastopt))
        print(
            f"{name}: {theirs / ours:.2f}x a step "
            f"({theirs * 1e3:.0f} ms ± {spread(times[torch]):.0%} by torch, "
            f"{ours * 1e3:.0f} ms ± {spread(times[fastopt]):.0%} by fastopt)"
        )


if __name__ == "__main__":
    main()

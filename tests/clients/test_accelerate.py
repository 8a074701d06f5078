"""A hand-written loop with Hugging Face's Accelerator: the same with torch and with fastopt."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from clients.language_model import (
    BATCH,
    BFLOAT16,
    FLOAT32,
    RESUMED,
    VOCABULARY,
    Training,
    assert_compiled,
    assert_same,
    count_losses,
    excerpts,
    next_words,
    padded,
)
from torch import nn
from torch.nn.utils import parameters_to_vector
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

import fastopt

accelerate = pytest.importorskip("accelerate", reason="needs the package accelerate")
state = accelerate.state

STEPS, ACCUMULATED, WIDTH, CLIPPED = 8, 2, 64, 0.25
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9},
    "Adam": {"lr": 3e-3},
    "AdamW": {"lr": 3e-3, "weight_decay": 0.1},
    "RMSprop": {"lr": 3e-4},  # whose first steps are ten times as long
}
APART = {"no": FLOAT32, "bf16": BFLOAT16}


@pytest.fixture(autouse=True)
def fresh_state() -> Iterator[None]:
    """An Accelerator's settings belong to the process; the next test has others."""
    yield
    state.AcceleratorState._reset_state(reset_partial_state=True)
    state.GradientState._reset_state()


def language_model() -> nn.Module:
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH),
        nn.Linear(WIDTH, WIDTH),
        nn.LayerNorm(WIDTH),
        nn.GELU(),
        nn.Linear(WIDTH, VOCABULARY),
    )


def train(
    kind: ModuleType,
    model: nn.Module,
    rows: list[Any],
    folder: Path,
    *,
    name: str = "AdamW",
    precision: str = "no",
    begin: int = 0,
    end: int = STEPS,
) -> Training:
    """Steps begin to end of a training by torch or by fastopt.

    It begins with what the folder has of an earlier one, unless at 0, and leaves its end there.
    """
    accelerator = accelerate.Accelerator(
        cpu=True, mixed_precision=precision, gradient_accumulation_steps=ACCUMULATED
    )
    model, criterion = copy.deepcopy(model), kind.nn.CrossEntropyLoss()
    options = OPTIMIZERS[name]
    optimizer = getattr(kind.optim, name)(model.parameters(), **options)
    schedule = OneCycleLR(optimizer, max_lr=options["lr"], total_steps=STEPS + 1)
    loader = DataLoader(rows, BATCH, collate_fn=padded)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)
    if begin:
        accelerator.load_state(folder)
    start = parameters_to_vector(model.parameters()).detach()

    losses, norms = [], []
    first, last = begin * ACCUMULATED, end * ACCUMULATED
    for number, batch in enumerate(accelerator.skip_first_batches(loader, first), first):
        with accelerator.accumulate(model):
            logits = model(batch["input_ids"]).flatten(0, 1)
            loss = criterion(logits, next_words(batch["labels"]))
            accelerator.backward(loss)
            losses.append(loss.item())
            if accelerator.sync_gradients:
                norms.append(accelerator.clip_grad_norm_(model.parameters(), CLIPPED).item())
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        if number + 1 == last:
            break
    accelerator.save_state(folder)
    state.AcceleratorState._reset_state(reset_partial_state=True)
    weights = parameters_to_vector(model.parameters()).detach()
    return Training(losses, norms, start, weights, optimizer.optimizer)


@pytest.mark.parametrize("precision", APART)
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training(
    name: str, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every loss, every step's gradient norm, which is clipped, and the weights in the end."""
    model, rows = language_model(), excerpts(STEPS * ACCUMULATED * BATCH)
    run = partial(train, model=model, rows=rows, folder=tmp_path, name=name, precision=precision)
    expected = run(torch)
    served = count_losses(monkeypatch)
    actual = run(fastopt)
    assert_same(actual, expected, APART[precision])
    assert (len(actual.norms), len(served)) == (STEPS, STEPS * ACCUMULATED)
    assert min(actual.norms) > CLIPPED
    assert_compiled(actual.optimizer)


@RESUMED
def test_resumed(first: ModuleType, second: ModuleType, tmp_path: Path) -> None:
    """From the state that one has saved to where torch ends without a break."""
    model, rows = language_model(), excerpts(STEPS * ACCUMULATED * BATCH)
    expected = train(torch, model, rows, tmp_path / "whole")
    half = STEPS // 2
    begun = train(first, model, rows, tmp_path / "halves", end=half)
    # Other weights, so that those of the saved state have to come.
    ended = train(second, language_model(), rows, tmp_path / "halves", begin=half)
    joined = ended._replace(losses=begun.losses + ended.losses, norms=begun.norms + ended.norms)
    assert_same(joined, expected)
    assert_compiled((begun if second is torch else ended).optimizer)

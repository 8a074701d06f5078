"""Hugging Face's Trainer: the same training with fastopt's loss and optimizer as with its own."""

from __future__ import annotations

import copy
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from clients.language_model import (
    BATCH,
    BFLOAT16,
    FLOAT32,
    LONGEST,
    RESUMED,
    VOCABULARY,
    Apart,
    Training,
    assert_compiled,
    assert_same,
    count_losses,
    excerpts,
    next_words,
    padded,
)
from torch import Tensor
from torch.nn.utils import parameters_to_vector

import fastopt
from fastopt.nn import functional
from fastopt.nn.linear_cross_entropy import LinearCrossEntropy

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

STEPS, ACCUMULATED, CLIPPED = 8, 2, 0.5
# With eps=1e-8, rounding errors alone make steps of a key's bias, whose gradient is zero.
ADAMW = {"lr": 1e-3, "weight_decay": 0.1, "eps": 1e-6}
CASES: dict[str, tuple[dict[str, Any], Apart]] = {
    "plain": ({}, FLOAT32),
    "accumulation": ({"gradient_accumulation_steps": ACCUMULATED}, FLOAT32),
    "clipping": ({"max_grad_norm": CLIPPED}, FLOAT32),
    "warmup": ({"lr_scheduler_type": "linear", "warmup_steps": 3}, FLOAT32),
    "bfloat16": ({"bf16": True}, BFLOAT16),
}
#: Of models that are converted; label smoothing is the Trainer's own, of the logits.
CONVERTED: dict[str, tuple[dict[str, Any], Apart]] = {
    "accumulation": CASES["accumulation"],
    "bfloat16": CASES["bfloat16"],
    "checkpointing": ({"gradient_checkpointing": True}, FLOAT32),
    "smoothing": ({"label_smoothing_factor": 0.1}, FLOAT32),
}


def language_model() -> Any:
    """A small GPT-2 with random weights; its dropout is on, as by default."""
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_positions=LONGEST, n_embd=64, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return transformers.GPT2LMHeadModel(config)


def loss_of(outputs: Any, labels: Tensor, num_items_in_batch: Tensor) -> Tensor:
    """The Trainer's own loss of a causal language model, by fastopt's cross-entropy."""
    logits, target = outputs.logits.flatten(0, 1), next_words(labels)
    return functional.cross_entropy(logits, target, reduction="sum") / num_items_in_batch


def trainer_of(
    kind: ModuleType,
    model: Any,
    rows: list[Tensor],
    folder: Path,
    by_class: bool = False,
    **options: Any,
) -> Any:
    """A Trainer of a copy of the model, by torch with the loss that the model itself has.

    It gets an optimizer, or the class to make one of.
    """
    arguments = {
        "max_steps": STEPS, "per_device_train_batch_size": BATCH, "logging_steps": 1,
        "max_grad_norm": 1e9, "lr_scheduler_type": "constant", "save_strategy": "no",
        "seed": torch.initial_seed() % 2**31, "use_cpu": True, "report_to": "none",
        "disable_tqdm": True,
    }  # fmt: skip
    model = copy.deepcopy(model)
    if by_class:
        how = {"optimizer_cls_and_kwargs": (kind.optim.AdamW, ADAMW)}
    else:
        how = {"optimizers": (kind.optim.AdamW(model.parameters(), **ADAMW), None)}
    return transformers.Trainer(
        model,
        transformers.TrainingArguments(folder, **arguments | options),
        data_collator=padded,
        train_dataset=rows,
        compute_loss_func=loss_of if kind is fastopt else None,
        **how,
    )


def run(trainer: Any, checkpoint: Path | None = None) -> Training:
    start = parameters_to_vector(trainer.model.parameters()).detach()
    trainer.train(resume_from_checkpoint=checkpoint)
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    losses, norms = ([entry[name] for entry in steps] for name in ("loss", "grad_norm"))
    end = parameters_to_vector(trainer.model.parameters()).detach()
    return Training(losses, norms, start, end, trainer.optimizer.optimizer)


@pytest.mark.parametrize("case", CASES)
def test_training(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every step's loss, gradient norm and learning rate, and the weights in the end."""
    options, apart = CASES[case]
    model, rows = language_model(), excerpts(STEPS * BATCH)
    theirs = trainer_of(torch, model, rows, tmp_path, **options)
    expected = run(theirs)
    served = count_losses(monkeypatch)
    ours = trainer_of(fastopt, model, rows, tmp_path, **options)  # seeds the dropout, so only now
    actual = run(ours)

    assert_same(actual, expected, apart)
    rates = [[entry.get("learning_rate") for entry in t.state.log_history] for t in (ours, theirs)]
    assert rates[0] == rates[1]
    assert len(actual.losses) == STEPS
    assert len(served) == STEPS * options.get("gradient_accumulation_steps", 1)
    assert type(actual.optimizer) is fastopt.optim.AdamW
    assert_compiled(actual.optimizer)
    if case == "clipping":
        assert min(actual.norms) > CLIPPED


def accuracy(predicted: Any) -> dict[str, float]:
    right = predicted.predictions[:, :-1].argmax(-1) == predicted.label_ids[:, 1:]
    return {"accuracy": right.mean().item()}


@pytest.mark.parametrize("case", CONVERTED)
def test_converted_model(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, no_crossovers: None
) -> None:
    """The Trainer's own training and evaluation, of a model whose loss is fastopt's."""
    options, apart = CONVERTED[case]
    model, rows = language_model(), excerpts(STEPS * BATCH)
    results, metrics, served = [], [], count_losses(monkeypatch)
    for _ in range(2):
        trainer = trainer_of(torch, model, rows, tmp_path, **options)
        results.append(run(trainer))
        trainer.compute_metrics = accuracy
        metrics.append(trainer.evaluate(rows[:BATCH]))
        fastopt.convert(model)

    assert_same(results[1], results[0], apart)
    close = {"rtol": apart.losses, "atol": apart.losses}
    for name in ("eval_loss", "eval_accuracy"):
        torch.testing.assert_close(metrics[1][name], metrics[0][name], **close)
    count = 0 if case == "smoothing" else STEPS * options.get("gradient_accumulation_steps", 1)
    assert [type(call.record) for call in served] == [LinearCrossEntropy] * count


def test_optimizer_by_class(tmp_path: Path) -> None:
    """The Trainer makes the optimizer, with groups for what decays and what doesn't."""
    model, rows = language_model(), excerpts(STEPS * BATCH)
    expected, actual = (
        run(trainer_of(kind, model, rows, tmp_path, by_class=True, weight_decay=0.1))
        for kind in (torch, fastopt)
    )
    assert [group["weight_decay"] for group in actual.optimizer.param_groups] == [0.1, 0.0]
    assert_same(actual, expected)
    assert_compiled(actual.optimizer)


@RESUMED
def test_resumed(first: ModuleType, second: ModuleType, tmp_path: Path) -> None:
    """From the checkpoint of one to where torch ends without a break."""
    model, rows = language_model(), excerpts(STEPS * BATCH)
    half = STEPS // 2
    options = {"lr_scheduler_type": "linear", "save_strategy": "steps", "save_steps": half}
    expected = run(trainer_of(torch, model, rows, tmp_path / "torch", **options))
    if first is not torch:
        run(trainer_of(first, model, rows, tmp_path / first.__name__, **options))
    # Other weights, so that those of the checkpoint have to come.
    resumed = trainer_of(second, language_model(), rows, tmp_path / "resumed", **options)
    actual = run(resumed, tmp_path / first.__name__ / f"checkpoint-{half}")

    assert_same(actual, expected)  # the Trainer brings back the first half's losses and norms
    if second is fastopt:
        assert_compiled(actual.optimizer)

"""Lightning's Trainer and Fabric: the same training with torch's classes and with fastopt's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.optim import Optimizer, lr_scheduler
from torch.utils.data import DataLoader, TensorDataset

import fastopt

lightning = pytest.importorskip("lightning", reason="Lightning is no dependency of fastopt")
callbacks = lightning.pytorch.callbacks

# Large enough for the kernels to be chosen: 281,600 logits, 16,384 numbers of hidden states.
WORDS, WIDTH, CLASSES, BATCH, BATCHES, EPOCHS = 300, 64, 1_100, 256, 6, 2


class Words(lightning.LightningModule):
    """A word's successor from the word; notes every loss, and which backends compute.

    The library is an attribute of the class, as callbacks copy the model, and a module of
    Python can't be copied.
    """

    library: ClassVar[ModuleType] = torch

    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case
        self.automatic_optimization = not case.manual
        self.embedding = torch.nn.Embedding(WORDS, WIDTH)
        self.head = torch.nn.Linear(WIDTH, CLASSES)
        self.cross_entropy = self.library.nn.CrossEntropyLoss(label_smoothing=0.1)
        self.hinge = self.library.nn.HingeEmbeddingLoss()
        self.losses: list[Tensor] = []
        self.backends: set[str] = set()

    def configure_optimizers(self) -> Any:
        return self.case.configure(self, self.library.optim)

    def note(self, subject: Any, *args: Any) -> None:
        """Which backends serve a loss or an optimizer, at the moment when it is used."""
        if self.library is fastopt:
            self.backends |= {decision.backend for decision in fastopt.explain(subject, *args)}

    def measure(self, criterion: torch.nn.Module, input: Tensor, target: Tensor) -> Tensor:
        self.note(criterion, input, target)
        loss: Tensor = criterion(input, target)
        self.losses.append(loss.detach())
        return loss

    def forward(self, words: Tensor) -> Any:
        return self.head(self.embedding(words))

    def loss_of(self, batch: list[Tensor]) -> Tensor:
        return self.measure(self.cross_entropy, self(batch[0]), batch[1])

    def training_step(self, batch: list[Tensor], index: int) -> Tensor | None:
        return self.loss_of(batch) if self.automatic_optimization else self.take_turns(batch)

    def take_turns(self, batch: list[Tensor]) -> None:
        """Manual optimisation: one optimizer pushes words to a margin, one learns, by a closure."""
        first, second = self.optimizers()
        self.note(first), self.note(second)  # in Lightning's wrapping
        with first.toggle_model():
            first.zero_grad()
            hidden = self.embedding(batch[0])
            self.manual_backward(self.measure(self.hinge, hidden, -torch.ones_like(hidden)))
            first.step()

        def closure() -> None:
            second.zero_grad()
            self.manual_backward(self.loss_of(batch))
            self.clip_gradients(second, 0.1, "norm")

        with second.toggle_model():
            second.step(closure=closure)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        self.log("validation", self.loss_of(batch))

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.note(optimizer)


class FastWords(Words):
    library = fastopt


# -- the table of trainings ------------------------------------------------------------


def adamw(model: Words, optim: ModuleType) -> Any:
    decayed = {"params": model.head.parameters(), "weight_decay": 0.1}
    return optim.AdamW([decayed, {"params": model.embedding.parameters()}], lr=3e-3)


def sgd(model: Words, optim: ModuleType) -> Any:
    return optim.SGD(model.parameters(), lr=0.5, momentum=0.9, nesterov=True)


def rmsprop(model: Words, optim: ModuleType) -> Any:
    return optim.RMSprop(model.parameters(), lr=1e-3, momentum=0.5)


def two(model: Words, optim: ModuleType) -> list[Optimizer]:
    first = optim.AdamW(model.embedding.parameters(), lr=3e-3, fused=True)
    return [first, optim.SGD(model.parameters(), lr=0.5, momentum=0.9)]


def by_step(model: Words, optim: ModuleType) -> dict[str, Any]:
    optimizer = adamw(model, optim)
    rates = lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=BATCHES * EPOCHS)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def by_epoch(model: Words, optim: ModuleType) -> tuple[list[Optimizer], list[Any]]:
    optimizer = sgd(model, optim)
    return [optimizer], [lr_scheduler.CosineAnnealingLR(optimizer, EPOCHS)]


def on_plateau(model: Words, optim: ModuleType) -> dict[str, Any]:
    optimizer = optim.Adam(model.parameters(), lr=torch.tensor(0.01), amsgrad=True)
    rates = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, threshold=10.0)
    return {"optimizer": optimizer, "lr_scheduler": rates, "monitor": "validation"}


class Case(NamedTuple):
    """A training.

    Attributes:
        configure: makes the optimizers.
        options: of the Trainer.
        tolerance: how far apart the weights may end, relative to the way that they went.
        manual: whether the model steps by itself.
        callback: makes the Trainer's callback.
    """

    configure: Callable[[Words, ModuleType], Any]
    options: dict[str, Any]
    tolerance: float = 2e-4
    manual: bool = False
    callback: Callable[[], Any] | None = None


CASES = {
    "AdamW": Case(adamw, {}),
    "SGD": Case(sgd, {}),
    "RMSprop": Case(rmsprop, {}),
    "manual": Case(two, {}, manual=True),
    "clipped by norm": Case(sgd, {"gradient_clip_val": 0.05}),
    "clipped by value": Case(sgd, {"gradient_clip_val": 1e-4, "gradient_clip_algorithm": "value"}),
    "scheduler by step": Case(by_step, {}),
    "scheduler by epoch": Case(by_epoch, {}),
    "accumulated": Case(adamw, {"accumulate_grad_batches": 2}),
    # A gradient that is rounded to bfloat16 may be rounded the other way.
    "bf16-mixed": Case(sgd, {"precision": "bf16-mixed"}, tolerance=2e-3),
    "64-true": Case(adamw, {"precision": "64-true"}, tolerance=1e-12),
    "validated": Case(on_plateau, {"limit_val_batches": 2}),
    "mean of weights": Case(
        sgd, {}, callback=lambda: callbacks.StochasticWeightAveraging(0.05, swa_epoch_start=1)
    ),
    "average of weights": Case(adamw, {}, callback=lambda: callbacks.EMAWeightAveraging(decay=0.8)),
}


def data() -> DataLoader[Any]:
    """Random words, each followed by its own successor most of the time."""
    words, chance = torch.randint(WORDS, (BATCH * BATCHES,)), torch.rand(BATCH * BATCHES)
    others = torch.randint(CLASSES, words.shape)
    successors = torch.where(chance < 0.8, torch.randperm(CLASSES)[words], others)
    return DataLoader(TensorDataset(words, successors), batch_size=BATCH)


def twins(case: Case) -> tuple[Words, Words, list[Tensor]]:
    """Torch's model and fastopt's, of the same weights, and the weights."""
    theirs, ours = Words(case), FastWords(case)
    ours.load_state_dict(theirs.state_dict())
    return theirs, ours, [p.detach().clone() for p in theirs.parameters()]


def fit(model: Words, batches: DataLoader[Any], resume: Path | None = None, **more: Any) -> None:
    """Train a model on the CPU as its case says."""
    unwanted = "logger", "enable_progress_bar", "enable_model_summary", "enable_checkpointing"
    options = dict.fromkeys(unwanted, False) | {"limit_val_batches": 0} | model.case.options
    if model.case.callback:
        options["callbacks"] = model.case.callback()
    options |= more
    trainer = lightning.Trainer(accelerator="cpu", devices=1, max_epochs=EPOCHS, **options)
    trainer.fit(model, batches, batches, ckpt_path=resume)


def assert_same(start: list[Tensor], ours: Words, theirs: Words, since: int = 0) -> None:
    """Each loss from a step on; the weights in the end, as parts of the way that they went."""
    tolerance, expected = theirs.case.tolerance, torch.stack(theirs.losses[since:])
    torch.testing.assert_close(torch.stack(ours.losses), expected, rtol=tolerance / 20, atol=0.0)
    for begin, our, their in zip(start, ours.parameters(), theirs.parameters(), strict=True):
        way = (their.detach().double() - begin).norm()
        apart = (our.detach().double() - their.detach()).norm()
        assert way > 0
        assert apart <= tolerance * way


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_training(case: Case) -> None:
    theirs, ours, start = twins(case)
    batches = data()
    fastopt.empty_cache()  # as in a new process, whose first losses may be the validation's
    for model in (theirs, ours):
        fit(model, batches)
    assert ours.backends == {"numba"}
    assert_same(start, ours, theirs)


@pytest.mark.parametrize(
    ("writer", "reader"), [(0, 1), (1, 0)], ids=["torch to fastopt", "fastopt to torch"]
)
def test_resumed(writer: int, reader: int, tmp_path: Path) -> None:
    """From the other's checkpoint of the first epoch, to the weights of all epochs at once."""
    case = CASES["scheduler by step"]
    *both, start = twins(case)
    batches = data()
    for model in both:
        kept = callbacks.ModelCheckpoint(
            tmp_path / type(model).__name__, "{step}", every_n_train_steps=BATCHES, save_top_k=-1
        )
        fit(model, batches, callbacks=kept, enable_checkpointing=True)
    resumed = type(both[reader])(case)  # of weights of its own
    checkpoint = tmp_path / type(both[writer]).__name__ / f"step={BATCHES}.ckpt"
    fit(resumed, batches, resume=checkpoint)
    assert both[1].backends == {"numba"}
    assert resumed.backends == both[reader].backends  # torch's notes none
    assert_same(start, resumed, both[0], since=BATCHES)


def test_fabric(tmp_path: Path) -> None:
    """Its wrapping of model and optimizer, clipping, saving and loading."""
    theirs, ours, start = twins(Case(adamw, {}))
    batches = data()
    for model in (theirs, ours):
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        wrapped, optimizer = fabric.setup(model, model.configure_optimizers())
        for turn, (words, successors) in enumerate(fabric.setup_dataloaders(batches)):
            optimizer.zero_grad()
            fabric.backward(model.measure(model.cross_entropy, wrapped(words), successors))
            fabric.clip_gradients(wrapped, optimizer, max_norm=0.05)
            optimizer.step()
            model.note(optimizer)
            if turn == 2:
                state = {"model": wrapped, "optimizer": optimizer}
                fabric.save(tmp_path / "state.ckpt", state)
                optimizer.param_groups[0]["lr"] = 99.0
                optimizer.step()
                fabric.load(tmp_path / "state.ckpt", state)
    assert ours.backends == {"numba"}
    assert_same(start, ours, theirs)

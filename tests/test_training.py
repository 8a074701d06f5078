"""Loops that combine a loss and an optimizer with what torch offers around them.

Each feature is a short training. It runs once with torch's loss and optimizer and once with
fastopt's, from the same weights on the same data; losses, gradients of every step, final weights
and all states must agree. Logits are so many that kernels serve the loss, not torch.
"""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from cases import BACKEND, DEVICE
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value
from torch.nn.utils import clip_grad_norm_, clip_grad_value_
from torch.optim import Optimizer, lr_scheduler, swa_utils
from torch.utils._pytree import keystr, tree_leaves_with_path
from torch.utils.checkpoint import checkpoint

import fastopt

pytestmark = [
    # torch's own, while it compiles, and where it looks for NaN
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Anomaly Detection has been enabled"),
]

TURNS, ROWS, WIDTH, CLASSES, IGNORED = 5, 128, 32, 1000, 3
# With a larger eps than by default a gradient that is rounding and no more moves nothing.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "nesterov": True},
    "Adam": {"lr": 0.01, "eps": 1e-4, "amsgrad": True},
    "AdamW": {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.001, "eps": 1e-4, "momentum": 0.5, "centered": True},
}


class Training:
    """One training: makes losses and optimizers of a library, keeps all that can be compared.

    Attributes:
        library: torch or fastopt; may change from step to step.
        loss_by, step_by: the backends that fastopt.explain names.
    """

    def __init__(self, library: Any, kind: str) -> None:
        self.home = self.library = library
        self.kind = kind
        self.loss_by: set[str] = set()
        self.step_by: set[str] = set()
        self.seen: list[tuple[str, Tensor | None]] = []

    def begin(self, model: Any = None, **flags: Any) -> tuple[Any, Optimizer]:
        model = model or perceptron()
        return model, self.optimizer(model.parameters(), **flags)

    def optimizer(self, params: Any, **flags: Any) -> Optimizer:
        make = getattr(self.library.optim, self.kind)
        optimizer: Optimizer = make(params, **OPTIONS[self.kind], **flags)
        return optimizer

    @property
    def criterion(self) -> Any:
        return self.library.nn.CrossEntropyLoss(label_smoothing=0.1, ignore_index=IGNORED)

    def loss(self, input: Tensor, target: Tensor, criterion: Any = None) -> Tensor:
        criterion = criterion or self.criterion
        if self.library is fastopt:
            self.loss_by |= {d.backend for d in fastopt.explain(criterion, input, target)}
        value: Tensor = criterion(input, target)
        return value

    def note(self, name: str, value: Tensor | None) -> None:
        """Keep a value; of an overflow no more than that it is one."""
        finite = value is not None and bool(value.isfinite().all())
        self.seen.append((name, value.detach().double().clone() if finite else None))

    def backward(self, loss: Tensor, **options: Any) -> None:
        self.note("loss", loss)
        loss.backward(**options)

    def inspect(self, optimizer: Optimizer) -> None:
        if self.library is fastopt:
            self.step_by |= {d.backend for d in fastopt.explain(optimizer)}
        for group in optimizer.param_groups:
            for p in group["params"]:
                self.note("gradient", p.grad)

    def step(self, optimizer: Optimizer) -> None:
        self.inspect(optimizer)
        optimizer.step()

    def run(
        self,
        model: nn.Module,
        optimizer: Optimizer,
        loss_of: Callable[[Tensor, Tensor], Tensor] | None = None,
        data: Iterable[tuple[Tensor, Tensor]] | None = None,
        before: Callable[[], Any] = lambda: None,
        after: Callable[[], Any] = lambda: None,
        set_to_none: bool = True,
    ) -> None:
        """The usual loop, with a loss of a batch, and what comes before and after a step."""
        for x, y in batches() if data is None else data:
            loss = loss_of(x, y) if loss_of else self.loss(model(x), y)
            optimizer.zero_grad(set_to_none)
            self.backward(loss)
            before()
            self.step(optimizer)
            after()
        self.keep(model, optimizer)

    def keep(self, *parts: Any) -> None:
        """Keep the numbers in the states of models, optimizers, schedulers, scalers."""
        for path, leaf in tree_leaves_with_path([part.state_dict() for part in parts]):
            if isinstance(leaf, (Tensor, int, float)):
                self.note(keystr(path), torch.as_tensor(leaf))


def perceptron(norm: type[nn.Module] = nn.LayerNorm) -> nn.Sequential:
    """Smooth: a ReLU's kink would make a difference of rounding."""
    body = nn.Linear(WIDTH, 64, bias=False), norm(64), nn.GELU(), nn.Dropout(0.1)
    return nn.Sequential(*body, nn.Linear(64, CLASSES))


def batches(turns: int = TURNS) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and classes, one in eight of them to be ignored."""
    for _ in range(turns):
        y = torch.randint(CLASSES, (ROWS,))
        y[::8] = IGNORED
        yield torch.randn(ROWS, WIDTH), y


# -- what decides about the step -------------------------------------------------------


def scheduled(chained: bool, t: Training) -> None:
    """Warmup, then a cosine; or both at once."""
    model, optimizer = t.begin()
    both = [
        lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
        lr_scheduler.CosineAnnealingLR(optimizer, 3),
    ]
    scheduler: Any = lr_scheduler.ChainedScheduler(both, optimizer)
    if not chained:
        scheduler = lr_scheduler.SequentialLR(optimizer, both, [2])  # type: ignore[arg-type]
    t.run(model, optimizer, after=lambda: (scheduler.step(), t.keep(optimizer)))


def scaled(overflows: Sequence[int], clip: bool, fused: bool, t: Training) -> None:
    """Half precision; at some turns the scale is too large, and the step is skipped."""
    model, optimizer = t.begin(**({"fused": True} if fused else {}))
    scaler = torch.amp.GradScaler(DEVICE, init_scale=2.0**40 if 0 in overflows else 2.0**10)
    scaler.set_backoff_factor(2.0**-30)
    for turn, (x, y) in enumerate(batches()):
        if turn and turn in overflows:
            scaler.update(2.0**40)
        optimizer.zero_grad()
        with torch.autocast(DEVICE, torch.float16):
            loss = t.loss(model(x), y)
        before = scaler.get_scale()
        t.backward(scaler.scale(loss))
        if clip:
            scaler.unscale_(optimizer)
            clip_grad_norm_(model.parameters(), 0.05)
        t.inspect(optimizer)
        scaler.step(optimizer)
        scaler.update()
        assert (scaler.get_scale() < before) == (turn in overflows)
    t.keep(model, optimizer, scaler)


def clipped(clip: Callable[[Any], Any], t: Training) -> None:
    model, optimizer = t.begin()
    t.run(model, optimizer, before=lambda: clip(model.parameters()))


def closure(t: Training) -> None:
    model, optimizer = t.begin()
    for x, y in batches():

        def evaluate(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = t.loss(model(x), y)
            t.backward(loss)
            t.inspect(optimizer)
            return loss

        t.note("returned", optimizer.step(evaluate))  # type: ignore[arg-type]
    t.keep(model, optimizer)


def step_within_backward(t: Training) -> None:
    """An optimizer for each parameter, whose gradient doesn't outlive its own step."""
    model = perceptron()
    each = {p: t.optimizer([p]) for p in model.parameters()}

    def step(p: Tensor) -> None:
        t.step(each[p])  # type: ignore[index]
        p.grad = None

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    for x, y in batches():
        t.backward(t.loss(model(x), y))
        assert all(p.grad is None for p in model.parameters())
    t.keep(model, *each.values())


# -- which gradients there are ---------------------------------------------------------


def accumulated(t: Training) -> None:
    """Of two heads a step uses the first, both, or the second; the other's gradient is None."""
    body, optimizer = t.begin(nn.Linear(WIDTH, 64))
    heads = nn.ModuleList(nn.Linear(64, CLASSES) for _ in range(2))
    optimizer.add_param_group({"params": list(heads.parameters()), "lr": 0.02})
    for used in ([0, 0, 0], [0, 1, 0], [1, 1, 1], [0, 1, 1]):
        optimizer.zero_grad()
        for head, (x, y) in zip(used, batches(3), strict=True):
            t.backward(t.loss(heads[head](body(x).tanh()), y) / 3)
        t.step(optimizer)
    t.keep(body, heads, optimizer)


def zeroed_in_place(t: Training) -> None:
    t.run(*t.begin(), set_to_none=False)


def frozen(t: Training) -> None:
    """First the head alone, then all, then the body alone, then all and a group more."""
    model, optimizer = t.begin()
    for body, head in ((False, True), (True, True), (True, False), (True, True)):
        model[:4].requires_grad_(body)
        model[4].requires_grad_(head)
        t.run(model, optimizer, data=batches(2))
    model.append(nn.Linear(CLASSES, CLASSES, bias=False))
    optimizer.add_param_group({"params": list(model[5].parameters()), "lr": 0.001})
    t.run(model, optimizer, data=batches(2))


def tied(t: Training) -> None:
    """The embedding is the head's weight, with the gradients of both."""
    model = nn.Sequential(nn.Embedding(CLASSES, 64), nn.LayerNorm(64), nn.Linear(64, CLASSES))
    model[0].weight = model[2].weight
    t.run(*t.begin(model), data=((y.flip(0), y) for _, y in batches()))


def losses_added(t: Training) -> None:
    """Of the same logits, which stay away from the kink of the mean absolute error."""
    model, optimizer = t.begin()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        logits, teacher = model(x), 5 * torch.randn(ROWS, CLASSES).sign()
        squares = t.loss(logits, teacher, t.library.nn.MSELoss())
        return t.loss(logits, y) + squares / 50 + t.loss(logits, teacher, t.library.nn.L1Loss())

    t.run(model, optimizer, loss_of)


def two_backwards(t: Training) -> None:
    """Of one loss, plain and scaled, and of another one of the same logits."""
    model, optimizer = t.begin()
    for x, y in batches():
        optimizer.zero_grad()
        logits = model(x)
        loss = t.loss(logits, y)
        t.backward(loss, retain_graph=True)
        t.backward(0.5 * loss, retain_graph=True)
        t.backward(t.loss(logits, torch.zeros_like(logits), t.library.nn.MSELoss()))
        t.step(optimizer)
    t.keep(model, optimizer)


def gradient_penalty(t: Training) -> None:
    model, optimizer = t.begin()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        loss = t.loss(model(x.requires_grad_()), y)
        (grad,) = torch.autograd.grad(loss, x, create_graph=True)
        return loss + 1000 * grad.square().sum()

    t.run(model, optimizer, loss_of)


# -- how the model is evaluated --------------------------------------------------------


def within(context: Callable[[], AbstractContextManager[Any]], t: Training) -> None:
    """A forward pass inside a context."""
    model, optimizer = t.begin()

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        with context():
            return t.loss(model(x), y)

    t.run(model, optimizer, loss_of)


def checkpointed(reentrant: bool, with_loss: bool, t: Training) -> None:
    """Backward evaluates the layers anew, dropout among them; or the head and the loss."""
    model, optimizer = t.begin()
    split = 4 if with_loss else 0

    def rest(x: Tensor, y: Tensor) -> Tensor:
        logits: Tensor = model[split:](x)
        return t.loss(logits, y) if with_loss else logits

    def loss_of(x: Tensor, y: Tensor) -> Tensor:
        hidden = model[:split](x.requires_grad_())
        out: Tensor = checkpoint(rest, hidden, y, use_reentrant=reentrant)
        return out if with_loss else t.loss(out, y)

    t.run(model, optimizer, loss_of)


def compiled(compiler: str, with_loss: bool, t: Training) -> None:
    if compiler == "inductor" and DEVICE == "cpu" and not shutil.which("g++"):
        pytest.skip("inductor needs a C++ compiler (g++) for the CPU")
    torch._dynamo.reset()
    model, optimizer = t.begin()
    criterion = t.criterion

    def forward(x: Tensor, y: Tensor) -> Tensor:
        return criterion(model(x), y) if with_loss else model(x)

    fast = torch.compile(forward, backend=compiler, fullgraph=True)
    t.run(model, optimizer, fast if with_loss else lambda x, y: t.loss(fast(x, y), y))
    torch._dynamo.reset()


def functional(t: Training) -> None:
    model, optimizer = t.begin()
    params = dict(model.named_parameters())

    def loss_of(params: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return t.loss(functional_call(model, params, (x,)), y)

    for x, y in batches():
        grads, loss = grad_and_value(loss_of)(params, x, y)
        t.note("loss", loss)
        for name, p in params.items():
            p.grad = grads[name]
        t.step(optimizer)
    t.keep(model, optimizer)


def channels_last(t: Training) -> None:
    """Weights, images and logits of a segmentation."""
    layers = nn.Conv2d(3, 8, 3, padding=1), nn.GELU(), nn.Conv2d(8, 21, 3, padding=1)
    model = nn.Sequential(*layers).to(memory_format=torch.channels_last)
    images = torch.randn(TURNS, 4, 48, 48, 3).permute(0, 1, 4, 2, 3)
    assert model(images[0]).is_contiguous(memory_format=torch.channels_last)
    t.run(*t.begin(model), data=zip(images, torch.randint(21, (TURNS, 4, 48, 48)), strict=True))


# -- what lives on after a step --------------------------------------------------------


def averaged(t: Training) -> None:
    """An exponential average and a mean, and a rate that settles for them."""
    model, optimizer = t.begin(perceptron(nn.BatchNorm1d))
    multi = swa_utils.get_ema_multi_avg_fn(0.9)
    averages = swa_utils.AveragedModel(model, multi_avg_fn=multi), swa_utils.AveragedModel(model)
    scheduler = swa_utils.SWALR(optimizer, 0.005, 2)

    def after() -> None:
        scheduler.step()
        for average in averages:
            average.update_parameters(model)

    t.run(model, optimizer, after=after)
    for average in averages:
        swa_utils.update_bn(list(batches(2)), average)
        for x, y in batches(1):
            t.note("loss of the average", t.loss(average.eval()(x), y))
    t.keep(scheduler, *averages)


def saved(whole: bool, t: Training) -> None:
    """Saved and loaded after each step: the objects; or states, which torch goes on with."""
    model, optimizer = t.begin()
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, TURNS)
    for turn in range(TURNS):
        t.run(model, optimizer, data=batches(1), after=scheduler.step)
        parts, file = [model, optimizer, scheduler], io.BytesIO()
        torch.save(parts if whole else [part.state_dict() for part in parts], file)
        file.seek(0)
        if whole:
            model, optimizer, scheduler = torch.load(file, weights_only=False)
            continue
        t.library = t.home if turn % 2 else torch
        model, optimizer = t.begin()
        scheduler = lr_scheduler.CosineAnnealingLR(optimizer, TURNS)
        for part, state in zip([model, optimizer, scheduler], torch.load(file), strict=True):
            part.load_state_dict(state)


class Feature(NamedTuple):
    """A training and what to expect of it.

    Attributes:
        tolerance: relative to the largest number of a tensor. In half precision a difference of
            rounding in a weight decides how what is computed from it is rounded.
        loss_by: who serves fastopt's losses; nobody is asked inside torch.compile.
        kinds: the optimizers to train with.
    """

    train: Callable[[Training], None]
    tolerance: float = 3e-4
    loss_by: Sequence[str] = (BACKEND,)
    kinds: Sequence[str] = tuple(OPTIONS)


clip_norm = partial(clip_grad_norm_, max_norm=0.1)
FEATURES: dict[str, Feature] = {
    "sequential-schedulers": Feature(partial(scheduled, False)),
    "chained-schedulers": Feature(partial(scheduled, True)),
    "scaler": Feature(partial(scaled, (0, 3), False, False), 2e-2),
    "scaler-clip": Feature(partial(scaled, (0, 3), True, False), 2e-2),
    # not the first step: torch's fused SGD has no momentum after it
    "scaler-fused": Feature(
        partial(scaled, (3,), False, True), 2e-2, kinds=("SGD", "Adam", "AdamW")
    ),
    "clip-norm": Feature(partial(clipped, partial(clip_norm, foreach=False))),
    "clip-norm-foreach": Feature(partial(clipped, partial(clip_norm, foreach=True))),
    "clip-value": Feature(partial(clipped, partial(clip_grad_value_, clip_value=1e-3))),
    "closure": Feature(closure),
    "step-within-backward": Feature(step_within_backward),
    "accumulated": Feature(accumulated),
    "zeroed-in-place": Feature(zeroed_in_place),
    "frozen": Feature(frozen),
    "tied": Feature(tied),
    "losses-added": Feature(losses_added),
    "two-backwards": Feature(two_backwards),
    "gradient-penalty": Feature(gradient_penalty),
    "autocast": Feature(partial(within, partial(torch.autocast, DEVICE, torch.bfloat16)), 5e-2),
    "anomalies": Feature(partial(within, torch.autograd.detect_anomaly)),
    "offloaded": Feature(partial(within, torch.autograd.graph.save_on_cpu)),
    "checkpoint": Feature(partial(checkpointed, False, False)),
    "checkpoint-loss": Feature(partial(checkpointed, False, True)),
    "checkpoint-reentrant": Feature(partial(checkpointed, True, False)),
    "checkpoint-reentrant-loss": Feature(partial(checkpointed, True, True)),
    "aot_eager": Feature(partial(compiled, "aot_eager", False)),
    "aot_eager-loss": Feature(partial(compiled, "aot_eager", True), loss_by=()),
    "inductor": Feature(partial(compiled, "inductor", False), kinds=("AdamW",)),
    "functional": Feature(functional, loss_by=("reference",)),
    "channels-last": Feature(channels_last),
    "averaged": Feature(averaged),
    "saved-whole": Feature(partial(saved, True)),
    "saved-states": Feature(partial(saved, False)),
}


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, row in FEATURES.items() for kind in row.kinds]
)
def test_training(name: str, kind: str, seed: int, no_crossovers: None) -> None:
    """Everything seen is what torch sees, and kernels served."""
    feature = FEATURES[name]
    ours, theirs = Training(fastopt, kind), Training(torch, kind)
    for training in (theirs, ours):
        torch.manual_seed(seed)
        feature.train(training)
    assert ours.loss_by == set(feature.loss_by)
    assert ours.step_by == {BACKEND}
    for (what, found), (same, expected) in zip(ours.seen, theirs.seen, strict=True):
        assert what == same
        assert (found is None) == (expected is None), what
        if expected is not None:
            atol = feature.tolerance * expected.abs().max().item()
            torch.testing.assert_close(
                found, expected, rtol=0, atol=atol, msg=lambda text, what=what: f"{what}: {text}"
            )

"""What only a real GPU can show: waiting, graphs, streams, size, determinism, recompilation.

Run with FASTOPT_TEST_DEVICE=cuda; skipped anywhere else.
"""

from __future__ import annotations

import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, DEVICE, LOSSES, LossCase, OptimizerCase, labelled, pair
from test_losses import differentiable
from test_optimizers import assert_same, assert_same_state, build, parameters, set_grads, twins
from torch import Tensor
from torch.nn import Linear, Parameter, Sequential, Tanh

import fastopt
import fastopt.nn.functional as ours

if torch.device(DEVICE).type != "cuda" or not torch.cuda.is_available():
    pytest.skip("needs FASTOPT_TEST_DEVICE=cuda and a GPU that torch sees", allow_module_level=True)

pytestmark = [
    # Not all steps of a capturable optimizer are captured here.
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable"),
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),
]

_NAMES = {
    "mse_loss-70001", "l1_loss-transposed", "cross_entropy-19x4099", "cross_entropy-uint8",
    "cross_entropy-smooth-weight-long", "cross_entropy-ignore-0", "cross_entropy-NCHW-weight",
    "cross_entropy-NLC-long", "cross_entropy-probabilities-weight",
}  # fmt: skip
CASES = [
    *(case for case in LOSSES if str(case) in _NAMES),
    LossCase("split-rows", "cross_entropy", labelled((2, 70_000)), {"label_smoothing": 0.1}),
    LossCase("many-blocks", "mse_loss", pair(3_000_001)),
]
SGD = OptimizerCase("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})
RMSPROP = OptimizerCase("RMSprop", {"lr": 0.01, "momentum": 0.5, "eps": 1e-3})
ADAM = OptimizerCase("Adam", {"lr": 0.01, "eps": 1e-3, "amsgrad": True})
ADAMW = OptimizerCase("AdamW", {"lr": 0.01, "eps": 1e-3})
OPTIMIZERS = [SGD, RMSPROP, ADAM, ADAMW]


def sleep() -> None:
    """Keep the current stream busy for a while, so that what is queued elsewhere overtakes it."""
    torch.cuda._sleep(50_000_000)


# -- the host never waits ------------------------------------------------------------


@contextmanager
def no_waiting() -> Iterator[None]:
    """Whatever makes the host wait for the GPU raises."""
    torch.cuda.synchronize()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls the mode a prototype
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_waiting_would_be_noticed() -> None:
    x = torch.ones(1)
    with no_waiting(), pytest.raises(RuntimeError, match="synchronizing"):
        x.item()


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_do_not_wait(
    case: LossCase, reduction: str, dtype: torch.dtype, factor: float
) -> None:
    tensors = differentiable(case.make(dtype), case.operation)
    wanted = [t for t in tensors if t.requires_grad]

    def run() -> None:
        with fastopt.use_backend(BACKEND):
            loss = getattr(ours, case.operation)(*tensors, **case.options, reduction=reduction)
        torch.autograd.grad((loss * factor if factor != 1 else loss).sum(), wanted)

    run()
    with no_waiting():
        run()


@pytest.mark.parametrize("how", ["plain", "capturable", "lr tensor"])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_steps_do_not_wait(case: OptimizerCase, how: str) -> None:
    """New gradients and learning rates at each step, in the first after the warm-up, too."""
    mine = parameters()
    torchs = twins(mine)
    more: dict[str, Any] = {}
    if how == "capturable":
        if case is SGD:
            pytest.skip("SGD has no such option")
        more["capturable"] = True
    optimizer = build(fastopt.optim, case, mine, **more)
    theirs_ = build(torch.optim, case, torchs)
    group = optimizer.param_groups[0]
    if how == "lr tensor":
        group["lr"] = torch.tensor(case.options["lr"])
    rates = (0.1, 0.02, 0.02, 0.3)
    grads = [[torch.randn_like(p) for p in mine] for _ in rates]

    def step(rate: float, new: list[Tensor]) -> None:
        for p, g in zip(mine, new, strict=True):
            p.grad = g
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate
        with fastopt.use_backend(BACKEND):
            optimizer.step()

    step(rates[0], grads[0])
    with no_waiting():
        for rate, new in zip(rates[1:], grads[1:], strict=True):
            step(rate, new)
    for rate, new in zip(rates, grads, strict=True):
        for p, g in zip(torchs, new, strict=True):
            p.grad = g
        theirs_.param_groups[0]["lr"] = rate
        theirs_.step()
    assert_same(mine, torchs)


@pytest.mark.parametrize("case", [SGD, ADAM, ADAMW], ids=str)
def test_scaled_steps_do_not_wait(case: OptimizerCase) -> None:
    mine = parameters()
    optimizer = build(fastopt.optim, case, mine, fused=True)
    scaler = torch.amp.GradScaler("cuda", init_scale=4.0, growth_interval=2)

    def step() -> None:
        loss = scaler.scale(sum((p * p).sum() for p in mine))
        optimizer.zero_grad()
        loss.backward()
        scaler.step(optimizer)
        scaler.update()

    with fastopt.use_backend(BACKEND):
        step()
        before = [p.detach().clone() for p in mine]
        with no_waiting():
            for _ in range(3):
                step()
    assert all(not torch.equal(p, b) for p, b in zip(mine, before, strict=True) if p.numel())


# -- GradScaler ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [SGD, ADAM, ADAMW], ids=str)
def test_grad_scaler(case: OptimizerCase, dtype: torch.dtype) -> None:
    """A skipped first step leaves no trace; the kernel divides, and gradients stay as they are."""
    mine = parameters(dtype)
    torchs = twins(mine, torch.float32)
    optimizer = build(fastopt.optim, case, mine, fused=True)
    twin = build(torch.optim, case, torchs)
    scaler = torch.amp.GradScaler("cuda", init_scale=1024.0, growth_interval=2)
    scaler.scale(torch.zeros(()))  # which makes it choose its device
    for turn in range(6):
        skipped = turn in (0, 3)
        set_grads(mine, torchs)
        for p in mine:
            p.grad.mul_(scaler.get_scale())  # a power of two
        if skipped:
            mine[1].grad[3] = float("inf")
        before = [p.detach().clone() for p in mine]
        grads = [p.grad.clone() for p in mine]
        with fastopt.use_backend(BACKEND):
            scaler.step(optimizer)
        scaler.update()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, grads, strict=True))
        if skipped:
            assert all(torch.equal(p, b) for p, b in zip(mine, before, strict=True))
        else:
            twin.step()
        if turn == 0:
            for state in optimizer.state.values():
                assert not any(value.any() for value in state.values() if value is not None)
        if dtype == torch.float32:
            assert_same(mine, torchs)
    if dtype == torch.float32 and case is not SGD:
        assert {float(s["step"]) for s in optimizer.state.values()} == {4.0}
    for p, q in zip(mine, torchs, strict=True):  # in bfloat16 four steps of rounding
        torch.testing.assert_close(p.float(), q, rtol=2e-2, atol=2e-2)


# -- CUDA graphs ---------------------------------------------------------------------


class Training:
    """A small model with its loss and optimizer, on a batch that stays in its place."""

    def __init__(self, optimizer: Callable[..., Any], loss: Callable[..., Tensor], seed: int):
        torch.manual_seed(seed)
        self.model = Sequential(Linear(16, 64), Tanh(), Linear(64, 300))
        self.x, self.y = torch.randn(32, 16), torch.randint(0, 300, (32,))
        self.optimizer = optimizer(self.model.parameters())
        self._loss = loss
        self.last = torch.zeros(())

    def load(self, seed: int) -> None:
        torch.manual_seed(seed)
        self.x.copy_(torch.randn(32, 16))
        self.y.copy_(torch.randint(0, 300, (32,)))

    def set_lr(self, rate: float) -> None:
        group = self.optimizer.param_groups[0]
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate

    def step(self, set_to_none: bool = True) -> None:
        self.optimizer.zero_grad(set_to_none=set_to_none)
        self.forward_backward_step()

    def forward_backward_step(self) -> None:
        loss = self._loss(self.model(self.x), self.y)
        loss.backward()
        self.optimizer.step()
        self.last = loss.detach()

    def warm_up(self, stream: torch.cuda.Stream | None = None) -> None:
        side = stream or torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)

    def capture(self, stream: torch.cuda.Stream | None = None) -> Captured:
        graph = torch.cuda.CUDAGraph()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph, stream=stream):
            self.forward_backward_step()
        return Captured(graph, self.last)


class Captured:
    """A step in a graph, and where its loss appears."""

    def __init__(self, graph: torch.cuda.CUDAGraph, loss: Tensor) -> None:
        self._graph, self._loss = graph, loss

    def replay(self) -> Tensor:
        self._graph.replay()
        return self._loss


def trainings(case: OptimizerCase, seed: int, lr_tensor: bool = True) -> tuple[Training, Training]:
    """Ours, which can be captured, and torch's, which never is."""

    def mine(params: Any) -> torch.optim.Optimizer:
        options = dict(case.options)
        if case is not SGD:
            options["capturable"] = True
        if lr_tensor:
            options["lr"] = torch.tensor(options["lr"])
        return getattr(fastopt.optim, case.operation)(params, **options)

    return (
        Training(mine, ours.cross_entropy, seed),
        Training(lambda params: build(torch.optim, case, params), theirs.cross_entropy, seed),
    )


def assert_alike(mine: Training, torchs: Training, loss: Tensor | None = None) -> None:
    close = {"rtol": 1e-4, "atol": 1e-5}
    if loss is not None:
        torch.testing.assert_close(loss, torchs.last, **close)
    for p, q in zip(mine.model.parameters(), torchs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, **close)


@contextmanager
def one_stream(wanted: bool) -> Iterator[torch.cuda.Stream | None]:
    """Everything on one stream, warm-up and capture too; or on those that torch takes."""
    if not wanted:
        yield None
        return
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        yield stream
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("same_stream", [False, True])
@pytest.mark.parametrize("plan", ["rrrr", "rerer", "eerr", "re"])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_captured_steps(case: OptimizerCase, plan: str, same_stream: bool, seed: int) -> None:
    """Replays (r) and eager steps (e) in any order, with new data and learning rates."""
    mine, torchs = trainings(case, seed)
    with one_stream(same_stream) as stream:
        mine.warm_up(stream)
        torchs.warm_up()
        captured = mine.capture(stream)
        for turn, what in enumerate(plan):
            for training in (mine, torchs):
                training.load(seed + turn)
                training.set_lr((0.01, 0.05, 0.002, 0.03, 0.01)[turn])
            if what == "r":
                loss = captured.replay()
            else:
                mine.step()
                loss = mine.last
            torchs.step()
            assert_alike(mine, torchs, loss)


@pytest.mark.parametrize("same_stream", [False, True])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_eager_step_before_the_first_replay(
    case: OptimizerCase, same_stream: bool, seed: int
) -> None:
    """A capture runs nothing: what it would have uploaded isn't there, the gradients' places are.

    A changed weight_decay makes the captured step one that uploads its hyperparameters.
    """
    mine, torchs = trainings(case, seed)
    with one_stream(same_stream) as stream:
        mine.warm_up(stream)
        torchs.warm_up()
        for training in (mine, torchs):
            training.optimizer.param_groups[0]["weight_decay"] = 0.3
        captured = mine.capture(stream)
        for p in mine.model.parameters():
            p.grad.zero_()
        mine.step(set_to_none=False)
        torchs.step()
        assert_alike(mine, torchs, mine.last)
        loss = captured.replay()
        torchs.step()
        assert_alike(mine, torchs, loss)


@pytest.mark.parametrize("same_stream", [False, True])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_replays_keep_the_numbers_of_the_capture(
    case: OptimizerCase, same_stream: bool, seed: int
) -> None:
    """A learning rate that is a number is the captured one, whatever eager steps use since."""
    mine, torchs = trainings(case, seed, lr_tensor=False)
    with one_stream(same_stream) as stream:
        mine.warm_up(stream)
        torchs.warm_up()
        captured = mine.capture(stream)
        for turn, what in enumerate("rere"):
            rate = case.options["lr"] if what == "r" else 0.1 * case.options["lr"]
            torchs.set_lr(rate)
            for training in (mine, torchs):
                training.load(seed + turn)
            if what == "r":
                loss = captured.replay()
            else:
                mine.set_lr(rate)
                mine.step()
                loss = mine.last
            torchs.step()
            assert_alike(mine, torchs, loss)


@pytest.mark.parametrize("between", ["nothing", "warm-up"])
@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_two_captures(case: OptimizerCase, between: str, seed: int) -> None:
    """Of one optimizer, with gradients at different places."""
    mine, torchs = trainings(case, seed)
    for training in (mine, torchs):
        training.warm_up()
    graphs = [mine.capture()]
    if between == "warm-up":
        for training in (mine, torchs):
            training.warm_up()
    graphs.append(mine.capture())
    for turn, which in enumerate((0, 1, 1, 0, 1)):
        for training in (mine, torchs):
            training.load(seed + turn)
            training.set_lr(0.01 * (turn + 1))
        loss = graphs[which].replay()
        torchs.step()
        assert_alike(mine, torchs, loss)


@pytest.mark.parametrize("case", [RMSPROP, ADAM, ADAMW], ids=str)
def test_capture_without_capturable_gets_torchs_error(case: OptimizerCase, seed: int) -> None:
    mine = Training(lambda p: build(fastopt.optim, case, p), ours.cross_entropy, seed)
    mine.warm_up()
    with pytest.raises(RuntimeError, match="capturable is False"):
        mine.capture()


# -- streams and devices -------------------------------------------------------------


@pytest.mark.parametrize("factor", [1.0, 0.5])
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_on_a_side_stream(case: LossCase, factor: float) -> None:
    """The inputs are written there, late; a kernel on another stream would read the old ones."""
    tensors = case.make(torch.float32)
    stale = tuple(torch.zeros_like(t) for t in tensors)
    stream = torch.cuda.Stream()
    outcomes = []
    for module in (ours, theirs):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sleep()
            copies = tuple(s.copy_(t) for s, t in zip(stale, tensors, strict=True))
            leaves = differentiable(copies, case.operation)
            with fastopt.use_backend(BACKEND):
                loss = getattr(module, case.operation)(*leaves, **case.options)
            wanted = [t for t in leaves if t.requires_grad]
            outcomes.append((loss.detach(), *torch.autograd.grad(loss * factor, wanted)))
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        for s in stale:
            s.zero_()
    for mine, torchs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=1e-6)


@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_steps_on_alternating_streams(case: OptimizerCase) -> None:
    mine = parameters()
    torchs = twins(mine)
    optimizer, twin = build(fastopt.optim, case, mine), build(torch.optim, case, torchs)
    streams = [torch.cuda.Stream(), torch.cuda.Stream()]
    set_grads(mine, torchs)
    for turn in range(6):
        new = [torch.randn_like(p) for p in mine]
        stream, other = streams[turn % 2], streams[1 - turn % 2]
        stream.wait_stream(other)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            sleep()
            for p, g in zip(mine, new, strict=True):
                p.grad.copy_(g)
                g.record_stream(stream)
            for group in optimizer.param_groups:
                group["lr"] = 0.01 * (turn + 1)
            with fastopt.use_backend(BACKEND):
                optimizer.step()
        for p, g in zip(torchs, new, strict=True):
            p.grad.copy_(g)
        twin.param_groups[0]["lr"] = 0.01 * (turn + 1)
        twin.step()
    for stream in streams:
        torch.cuda.current_stream().wait_stream(stream)
    assert_same(mine, torchs)
    assert_same_state(optimizer, twin)


def test_tensors_on_another_device_than_the_current() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    with torch.cuda.device(0), torch.device("cuda:1"):
        for case in CASES:
            tensors = differentiable(case.make(torch.float32), case.operation)
            outcomes = []
            for module in (ours, theirs):
                loss = getattr(module, case.operation)(*tensors, **case.options)
                wanted = [t for t in tensors if t.requires_grad]
                outcomes.append((loss, *torch.autograd.grad(loss * 0.5, wanted)))
            for mine, torchs in zip(*outcomes, strict=True):
                torch.testing.assert_close(mine, torchs, rtol=2e-5, atol=1e-6)
        for optimizer_case in OPTIMIZERS:
            params = parameters()
            copies = twins(params)
            pairs = [
                build(m, optimizer_case, p)
                for m, p in ((fastopt.optim, params), (torch.optim, copies))
            ]
            for _ in range(2):
                set_grads(params, copies)
                for optimizer in pairs:
                    optimizer.step()
            assert_same(params, copies)


# -- more elements than 32 bits count ------------------------------------------------


@pytest.fixture
def room() -> Iterator[Callable[[int], None]]:
    """Skip a test that needs more memory than there is; give it back afterwards."""

    def need(amount: int) -> None:
        torch.cuda.empty_cache()
        free = torch.cuda.mem_get_info()[0]
        if free < amount:
            pytest.skip(f"needs {amount >> 30} GiB of GPU memory, {free >> 30} are free")

    yield need
    torch.cuda.empty_cache()


HUGE = 2**31 + 5000
#: Where to look: both ends, and the element that a 32-bit index would miss.
WINDOWS = [slice(0, 3000), slice(2**31 - 3000, 2**31 + 3000), slice(HUGE - 3000, HUGE)]


@pytest.mark.parametrize(
    ("shape", "windows"),
    [
        ((17_000, 128_256), [slice(0, 3), slice(16_742, 16_746), slice(16_997, 17_000)]),
        # positions side by side: a window of them, and the last classes lie beyond 2**31
        ((1, 500, 4_400_000), [slice(0, 50), slice(4_399_950, 4_400_000)]),
        ((1 << 28, 9), [slice(0, 99), slice(238_609_200, 238_609_400), slice(-99, None)]),
    ],
    ids=["rows", "positions", "short-rows"],
)
def test_huge_cross_entropy(
    shape: tuple[int, ...], windows: list[slice], room: Callable[[int], None]
) -> None:
    room(30 << 30)
    x = torch.empty(shape, dtype=torch.bfloat16).normal_().requires_grad_()
    assert x.numel() > 2**31
    t = torch.randint(0, shape[1], (*shape[:1], *shape[2:]))
    with fastopt.use_backend(BACKEND):
        losses = ours.cross_entropy(x, t, reduction="none")
        mean = ours.cross_entropy(x, t)
    (grad,) = torch.autograd.grad(losses.sum(), x)
    (mean_grad,) = torch.autograd.grad(mean * 3, x)
    torch.testing.assert_close(mean.float(), losses.mean(dtype=torch.float32), rtol=1e-2, atol=0)
    count = t.numel() / 3
    for window in windows:
        place = (window,) if len(shape) == 2 else (slice(None), slice(None), window)
        leaf = x.detach()[place].float().requires_grad_()
        target = t[window] if len(shape) == 2 else t[:, window]
        expected = theirs.cross_entropy(leaf, target, reduction="none")
        (slope,) = torch.autograd.grad(expected.sum(), leaf)
        found = losses[window] if len(shape) == 2 else losses[:, window]
        torch.testing.assert_close(found.float(), expected.detach(), rtol=1e-2, atol=1e-2)
        torch.testing.assert_close(grad[place].float(), slope, rtol=1e-2, atol=1e-6)
        scaled = slope / count  # near bfloat16's smallest numbers a relative error still holds
        torch.testing.assert_close(mean_grad[place].float(), scaled, rtol=1e-2, atol=1e-6 / count)


def test_huge_mse(room: Callable[[int], None]) -> None:
    room(24 << 30)
    x = torch.empty(HUGE, dtype=torch.bfloat16).normal_().requires_grad_()
    y = torch.empty(HUGE, dtype=torch.bfloat16).normal_()
    with fastopt.use_backend(BACKEND):
        total = ours.mse_loss(x, y, reduction="sum")
        mean = ours.mse_loss(x, y)
    (grad,) = torch.autograd.grad(total, x)
    (tripled,) = torch.autograd.grad(mean * 3, x)
    expected = 0.0
    for a, b in zip(x.detach().split(1 << 27), y.split(1 << 27), strict=True):
        expected += (a.float() - b.float()).square().sum(dtype=torch.float64).item()
    assert total.item() == pytest.approx(expected, rel=1e-2)
    assert mean.item() == pytest.approx(expected / HUGE, rel=1e-2)
    for window in WINDOWS:
        slope = 2 * (x.detach()[window].float() - y[window].float())
        torch.testing.assert_close(grad[window].float(), slope, rtol=1e-2, atol=0)
        scaled = slope * (3 / HUGE)
        torch.testing.assert_close(tripled[window].float(), scaled, rtol=1e-2, atol=0)


def test_huge_sgd(room: Callable[[int], None]) -> None:
    room(16 << 30)
    p = Parameter(torch.empty(HUGE, dtype=torch.bfloat16).normal_())
    p.grad = torch.empty_like(p).normal_()
    before = [p.detach()[window].float() for window in WINDOWS]
    with fastopt.use_backend(BACKEND):
        fastopt.optim.SGD([p], lr=0.5).step()
    for window, old in zip(WINDOWS, before, strict=True):
        expected = (old - 0.5 * p.grad[window].float()).bfloat16()
        torch.testing.assert_close(p.detach()[window], expected)


# -- errors --------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [10, -1, 2**40])
def test_target_out_of_range_stops_as_in_torch(bad: int) -> None:
    """In a process of its own, whose CUDA context does not survive it."""
    code = f"""
import torch, fastopt
x = torch.randn(64, 10, device={DEVICE!r})
target = torch.arange(64, device={DEVICE!r}) % 10
with fastopt.use_backend("triton"):
    target[3] = -100
    fastopt.nn.functional.cross_entropy(x, target)
    torch.cuda.synchronize()
    print("valid targets pass", flush=True)
    target[5] = {bad}
    try:
        fastopt.nn.functional.cross_entropy(x, target)
        torch.cuda.synchronize()
    except RuntimeError as error:
        print("stopped by", error, flush=True)
"""
    child = subprocess.run(
        [sys.executable, "-c", code],
        cwd=Path(fastopt.__file__).resolve().parent.parent,
        capture_output=True,
        text=True,
    )
    said = child.stdout
    assert "valid targets pass" in said, child.stderr
    assert "stopped by" in said, child.stderr
    assert "device-side assert" in said.split("stopped by")[1]
    assert "Target is out of bounds" in child.stdout + child.stderr


# -- torch.compile -------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("operation", ["cross_entropy", "mse_loss"])
def test_compiled_loss(operation: str) -> None:
    x = torch.randn(64, 300, requires_grad=True)
    t = torch.randint(0, 300, (64,)) if operation == "cross_entropy" else torch.randn(64, 300)
    outcomes = []
    for module in (ours, theirs):
        function = getattr(module, operation)

        def call(x: Tensor, function: Any = function) -> Tensor:
            return function(x * 2, t)

        loss = (torch.compile(call, fullgraph=True) if module is ours else call)(x)
        outcomes.append((loss.detach(), *torch.autograd.grad(loss * 0.5, x)))
    for mine, torchs in zip(*outcomes, strict=True):
        torch.testing.assert_close(mine, torchs, rtol=1e-5, atol=1e-7)


@pytest.mark.filterwarnings("ignore")
def test_compiled_model_with_our_step(seed: int) -> None:
    mine = Training(lambda p: build(fastopt.optim, ADAM, p), ours.cross_entropy, seed)
    torchs = Training(lambda p: build(torch.optim, ADAM, p), theirs.cross_entropy, seed)
    params = list(mine.model.parameters())
    mine.model = torch.compile(mine.model)
    with fastopt.use_backend(BACKEND):
        for turn in range(4):
            mine.load(seed + turn)
            mine.step()
    for turn in range(4):
        torchs.load(seed + turn)
        torchs.step()
    for p, q in zip(params, torchs.model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


# -- the same bits, and the same kernels ---------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_losses_are_the_same_bits(case: LossCase, dtype: torch.dtype) -> None:
    tensors = differentiable(case.make(dtype), case.operation)
    wanted = [t for t in tensors if t.requires_grad]
    first: list[Tensor] = []
    for _ in range(10):
        found = []
        for reduction in ("mean", "none"):
            with fastopt.use_backend(BACKEND):
                loss = getattr(ours, case.operation)(*tensors, **case.options, reduction=reduction)
            slope = torch.full_like(loss, 0.3)
            found += [loss.detach(), *torch.autograd.grad(loss, wanted, slope)]
        first = first or found
        assert all(map(torch.equal, found, first))


@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_updates_are_the_same_bits(case: OptimizerCase) -> None:
    start = parameters(shapes=[(17,), (300, 70), (1_000_003,)])
    grads = [[torch.randn_like(p) for p in start] for _ in range(3)]
    first: Sequence[Tensor] = ()
    for _ in range(10):
        params = twins(start)
        optimizer = build(fastopt.optim, case, params)
        for new in grads:
            for p, g in zip(params, new, strict=True):
                p.grad = g
            with fastopt.use_backend(BACKEND):
                optimizer.step()
        first = first or params
        assert all(map(torch.equal, params, first))


def variants() -> dict[str, int]:
    """How many compiled forms each of our kernels has in this process."""
    from triton.runtime.jit import JITFunction

    modules = [m for n, m in sys.modules.items() if n.startswith("fastopt.kernels.triton")]
    kernels = {
        f"{f.__module__}.{f.__name__}": f
        for module in modules
        for f in vars(module).values()
        if isinstance(f, JITFunction)
    }
    return {
        name: sum(len(caches[0]) for caches in kernel.device_caches.values())
        for name, kernel in kernels.items()
    }


def loss_call(rows: int, smoothing: float = 0.1) -> None:
    x = torch.randn(rows, 1000, requires_grad=True)
    t = torch.randint(0, 1000, (rows,))
    with fastopt.use_backend(BACKEND):
        ours.cross_entropy(x, t, label_smoothing=smoothing).backward()


def test_values_compile_nothing() -> None:
    loss_call(512, 0.1)
    before = variants()
    assert sum(before.values()) > 0
    for smoothing in (0.2, 0.5, 0.999, 1.0):
        loss_call(512, smoothing)
    assert variants() == before


def test_row_counts_compile_few() -> None:
    """Batches of any size: a handful of forms, and from then on none."""
    start = variants()
    for rows in range(3000, 3500, 7):  # every remainder by 64
        loss_call(rows)
    middle = variants()
    grown = {name: middle[name] - start.get(name, 0) for name in middle}
    assert sum(grown.values()) > 0
    assert max(grown.values()) <= 10, grown  # forward and backward, each with few alignments
    for rows in range(3001, 3500, 11):
        loss_call(rows)
    assert variants() == middle


@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_steps_compile_nothing(case: OptimizerCase) -> None:
    params = parameters()
    optimizer = build(fastopt.optim, case, params)

    def step() -> None:
        set_grads(params)
        with fastopt.use_backend(BACKEND):
            optimizer.step()

    step()
    step()
    before = variants()
    assert sum(before.values()) > 0
    group = optimizer.param_groups[0]
    for rate in (0.3, 1, 0, 16, 1e-5):  # integers, too
        group["lr"] = rate
        if "betas" in group:
            group["betas"] = (0.5, 1 - rate / 100)
        if "momentum" in group:
            group["momentum"] = 0.25 + rate / 100
        group["weight_decay"] = rate / 10
        step()
    assert variants() == before


# -- who runs it ---------------------------------------------------------------------


def test_explain_names_triton() -> None:
    """Whatever the size, and although a default device is set, as the tests have it."""
    for case in CASES:
        tensors = case.make(torch.float32)
        (decision,) = fastopt.explain(getattr(ours, case.operation), *tensors, **case.options)
        assert decision.backend == "triton", str(decision)
        assert "triton" in str(decision)
    for case in OPTIMIZERS:
        explanation = fastopt.explain(build(fastopt.optim, case, parameters()))
        assert [d.backend for d in explanation] == ["triton"], str(explanation)

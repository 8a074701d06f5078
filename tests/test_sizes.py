"""Sizes beyond a handful: SIMD widths and tails, switch points of the kernels, millions.

And parameters that share memory, where only the order of torch's own loop is right.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import (
    BACKEND,
    DEVICE,
    FLOATS,
    INTERPRETED,
    LOSSES,
    OPTIMIZERS,
    LossCase,
    OptimizerCase,
    assert_as_accurate,
    labelled,
    level,
    pair,
    viewed,
)
from test_losses import call, differentiable, in_double, loss_and_grads
from test_optimizers import assert_same, build, set_grads, twins
from torch import Tensor
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours

POINTWISE = sorted({case.operation for case in LOSSES} - {"cross_entropy"})
# In the interpreter a size is slow, and there is no SIMD: a few on each side of a block.
EVERY = (1, 2, 3, 16, 31, 64, 65) if INTERPRETED else tuple(range(1, 71))
SOME_DTYPES = FLOATS[::2] if INTERPRETED else FLOATS
compiled_cpu = pytest.mark.skipif(
    INTERPRETED or DEVICE != "cpu", reason="millions of elements: for compiled code on a CPU"
)
dtypes = pytest.mark.parametrize("dtype", FLOATS, ids=str)


def check(case: LossCase, dtype: torch.dtype, **options: Any) -> None:
    """Value and gradients, for a grad_output of 1 and for another number."""
    tensors = differentiable(case.make(dtype), case.operation)
    doubles = differentiable(in_double(tensors), case.operation)
    for given in (None, torch.tensor(0.37)):
        with fastopt.use_backend(BACKEND):
            mine = loss_and_grads(call(ours, case, **options), tensors, given)
        torchs = loss_and_grads(call(theirs, case, **options), tensors, given)
        if given is not None:
            given = given.to(dtype)
        oracle = loss_and_grads(call(theirs, case, **options), doubles, given)
        even = loss_and_grads(call(theirs, case, **options), level(case.operation, doubles), given)
        for m, t, o, terms in zip(mine, torchs, oracle, even, strict=True):
            try:
                assert_as_accurate(m, t, o, terms)
            except AssertionError as error:
                raise AssertionError(f"{case} {tuple(tensors[0].shape)}: {error}") from error


# -- losses -------------------------------------------------------------------------------


@dtypes
@pytest.mark.parametrize("operation", POINTWISE)
def test_every_size_of_a_pointwise_loss(operation: str, dtype: torch.dtype) -> None:
    for size in (*EVERY, 2047, 2048, 2049, 4099):
        check(LossCase(f"{size}", operation, pair(size)), dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "channels-last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "permuted": lambda x: x.permute(3, 0, 2, 1),
    "offset": lambda x: torch.cat((x.new_zeros(3), x.flatten()))[3:].view(x.shape),
    "one-row": lambda x: x[:1],
    "empty-in-the-middle": lambda x: x[:, :0],
}


@dtypes
@pytest.mark.parametrize("operation", POINTWISE)
def test_layouts_of_a_pointwise_loss(operation: str, dtype: torch.dtype) -> None:
    for name, view in LAYOUTS.items():
        check(LossCase(name, operation, viewed(pair(3, 5, 7, 9), view)), dtype)
    volume = viewed(
        pair(2, 3, 4, 5, 6), lambda x: x.contiguous(memory_format=torch.channels_last_3d)
    )
    check(LossCase("channels-last-3d", operation, volume), dtype)


def extremes(make: Callable[[torch.dtype], tuple[Tensor, ...]]) -> Any:
    """The same logits; the first target is the first class, the last one the last class."""

    def made(dtype: torch.dtype) -> tuple[Tensor, ...]:
        logits, target, *rest = make(dtype)
        flat = target.view(-1)
        if len(flat):
            flat[0], flat[-1] = 0, logits.shape[min(1, logits.dim() - 1)] - 1
        return (logits, target, *rest)

    return made


def cross_entropy(name: str, *args: Any, **options: Any) -> LossCase:
    return LossCase(name, "cross_entropy", extremes(labelled(*args, **options)))


@pytest.mark.parametrize("rows", [1, 2, 3, 31, 33, 130 if INTERPRETED else 1000])
@pytest.mark.parametrize("columns", [1, 2, 3, 16, 100, 255, 256, 257, 600])
def test_a_number_for_each_column(rows: int, columns: int) -> None:
    """Rows shorter than a vector, of which several make a block, and the last block is shorter."""
    input = torch.randn(rows, columns, device=DEVICE, requires_grad=True)
    target = torch.rand(rows, columns, device=DEVICE)
    weights = torch.rand(columns, device=DEVICE) + 0.5
    for given in (
        {"pos_weight": weights},
        {"pos_weight": weights.expand(rows, columns)},
        {"pos_weight": weights[:1], "weight": weights[None]},
        {"weight": torch.rand(rows, 1, device=DEVICE), "pos_weight": weights},
    ):
        for reduction in ("mean", "none"):
            found = []
            for module, wide in ((ours, False), (theirs, True)):
                tensors = [t.detach().double() if wide else t.detach() for t in (input, target)]
                more = {name: t.double() if wide else t for name, t in given.items()}
                leaf = tensors[0].requires_grad_()
                with fastopt.use_backend(BACKEND):
                    loss = module.binary_cross_entropy_with_logits(
                        leaf, tensors[1], **more, reduction=reduction
                    )
                loss.sum().backward()
                found.append((loss.detach().double(), leaf.grad.double()))
            torch.testing.assert_close(*found, rtol=2e-6, atol=1e-6)


@dtypes
def test_every_number_of_classes(dtype: torch.dtype) -> None:
    """A few of them, up to where a row fills vectors; in rows, columns and in between."""
    for classes in (*EVERY, 79, 80, 81, 127, 128, 129):
        rows = classes % 11 + 1
        check(cross_entropy("rows", (rows, classes), weight=True), dtype)
        check(cross_entropy("columns", (classes, rows), lambda x: x.t()), dtype)
        check(cross_entropy("inner", (2, classes, rows)), dtype, label_smoothing=0.1)


@dtypes
def test_every_number_of_positions(dtype: torch.dtype) -> None:
    """Of short rows, long rows and planes, and rows that are turned in square blocks."""
    for positions in EVERY:
        check(cross_entropy("short", (positions, 3)), dtype)
        check(cross_entropy("turned", (positions, 8 + positions % 13)), dtype)
        check(cross_entropy("long", (positions, 131)), dtype)
        check(cross_entropy("plane", (2, 3, positions), weight=True), dtype)


# Around the blocks, tiles and splits of kernels/*/cross_entropy.py and softmax_*.py: classes.
SWITCHES = (
    (255, 256, 257, 4097) if INTERPRETED
    else (127, 128, 129, 255, 256, 257, 2047, 2048, 2049, 4095, 4096, 4097, 16_385)
)  # fmt: skip


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
def test_class_counts_around_switches(dtype: torch.dtype) -> None:
    for classes in SWITCHES:
        check(cross_entropy("rows", (3, classes)), dtype)
        check(cross_entropy("weighted", (2, classes), weight=True), dtype, label_smoothing=0.1)
        check(cross_entropy("columns", (classes, 2), lambda x: x.t()), dtype)


@pytest.mark.parametrize("positions", [1, 15, 16, 17, 63, 64, 65])
def test_tiles_of_many_classes(positions: int) -> None:
    """A tile is narrower from 2048 classes on."""
    for classes in (100,) if INTERPRETED else (2047, 2048, 2049):
        check(cross_entropy("plane", (2, classes, positions)), torch.float32)


@pytest.mark.parametrize("layout", ["rows", "columns", "plane"])
def test_more_classes_than_anyone_has(layout: str) -> None:
    classes = 2**14 + 3 if INTERPRETED else 2**17 + 3
    case = {
        "rows": cross_entropy("rows", (3, classes)),
        "columns": cross_entropy("columns", (classes, 2), lambda x: x.t()),
        "plane": cross_entropy("plane", (1, classes, 3)),
    }[layout]
    check(case, torch.float32)
    check(case, torch.bfloat16)


@pytest.mark.parametrize("rows", range(1, 10))
def test_few_rows_for_several_threads(rows: int) -> None:
    """Enough work for threads, and rows that don't divide among them."""
    classes = 999 if INTERPRETED else 33_333
    check(cross_entropy("rows", (rows, classes)), torch.float32)
    check(cross_entropy("short", (rows * 4099 // (9 if INTERPRETED else 1), 9)), torch.float32)


@pytest.mark.parametrize("shape", [(0, 5), (5, 3, 0), (0, 3, 4), (2, 3, 0, 4), (0, 100)])
def test_no_positions(shape: tuple[int, ...]) -> None:
    """The mean of nothing is NaN, the sum 0; in every order of memory."""
    for order in itertools.permutations(range(len(shape))):
        sizes = tuple(shape[d] for d in order)
        inverse = [order.index(d) for d in range(len(shape))]
        case = cross_entropy("empty", sizes, lambda x, i=inverse: x.permute(i))
        for reduction in ("mean", "sum", "none"):
            tensors = differentiable(case.make(torch.float32), "cross_entropy")
            mine = loss_and_grads(call(ours, case, reduction=reduction), tensors)
            torchs = loss_and_grads(call(theirs, case, reduction=reduction), tensors)
            for m, t in zip(mine, torchs, strict=True):
                torch.testing.assert_close(m, t, rtol=0, atol=0, equal_nan=True)


def test_layouts_of_cross_entropy() -> None:
    volume = torch.channels_last_3d
    for case in (
        cross_entropy("3d", (2, 5, 3, 4, 7), lambda x: x.contiguous(memory_format=volume)),
        cross_entropy("3d-long", (2, 100, 3, 2, 3), lambda x: x.contiguous(memory_format=volume)),
        cross_entropy("offset", (33, 10), lambda x: x[1:]),
        cross_entropy("from-the-end", (40, 10), lambda x: x[5::7, 3:9]),
        cross_entropy("batch-expanded", (1, 7, 33), lambda x: x.expand(3, 7, 33)),
        cross_entropy("positions-expanded", (3, 7, 1), lambda x: x.expand(3, 7, 33)),
        cross_entropy("one-logit", (1, 1, 1), lambda x: x.expand(3, 7, 33)),
        cross_entropy("windows", (500,), lambda x: x.as_strided((40, 90), (5, 1))),
    ):
        check(case, torch.float32)
        check(case, torch.bfloat16)


@compiled_cpu
@pytest.mark.parametrize("operation", POINTWISE)
def test_millions_of_elements(operation: str) -> None:
    check(LossCase("millions", operation, pair(3_000_017)), torch.float32)


@compiled_cpu
@pytest.mark.parametrize("shape", [(300_007, 10), (37, 81_083), (3, 10, 100_003), (2, 150, 9_001)])
def test_millions_of_logits(shape: tuple[int, ...]) -> None:
    check(cross_entropy("millions", shape), torch.float32)


# -- optimizers -----------------------------------------------------------------------------

one_of_each = pytest.mark.parametrize(
    "case", {case.operation: case for case in OPTIMIZERS}.values(), ids=str
)
cases = pytest.mark.parametrize("case", OPTIMIZERS, ids=str)


def compare(
    case: OptimizerCase, values: Sequence[Tensor], steps: int = 3, each_its_group: bool = False
) -> None:
    """Steps of ours, of torch's and of torch's in float64, over parameters of these values."""
    mine = [Parameter(v) for v in values]
    torchs, doubles = twins(mine), twins(mine, torch.float64)
    optimizers = []
    for module, params in ((fastopt.optim, mine), (torch.optim, torchs), (torch.optim, doubles)):
        groups: Any = params
        if each_its_group:
            groups = [{"params": [p], "lr": 0.01 * (k % 7)} for k, p in enumerate(params)]
        optimizers.append(build(module, case, groups))
    for _ in range(steps):
        set_grads(mine, torchs, doubles)
        with fastopt.use_backend(BACKEND):
            optimizers[0].step()
        for optimizer in optimizers[1:]:
            optimizer.step()
    everything = [
        torch.cat([p.detach().flatten() for p in params]) for params in (mine, torchs, doubles)
    ]
    assert_as_accurate(*everything)


@pytest.mark.parametrize("dtype", SOME_DTYPES, ids=str)
@cases
def test_every_size_of_a_parameter(case: OptimizerCase, dtype: torch.dtype) -> None:
    """All in one optimizer, and again with empty ones before, between and behind."""
    values = [torch.randn(n).to(dtype) for n in (*EVERY, 4099)]
    compare(case, values)
    empty = torch.randn(0, 3).to(dtype)
    compare(case, [empty, values[4], empty, empty, values[0], empty])


@one_of_each
def test_nothing_but_empty_parameters(case: OptimizerCase) -> None:
    for shapes in ([(0,)], [(0,), (3, 0), (0, 2)]):
        values = [torch.randn(shape) for shape in shapes]
        params = [Parameter(v) for v in values]
        optimizer = build(fastopt.optim, case, params)
        for _ in range(3):
            set_grads(params)
            with fastopt.use_backend(BACKEND):
                optimizer.step()
        assert all("step" not in s or s["step"] == 3 for s in optimizer.state.values())


@dtypes
@one_of_each
def test_layouts_of_a_parameter(case: OptimizerCase, dtype: torch.dtype) -> None:
    image, volume = torch.randn(3, 5, 7, 9).to(dtype), torch.randn(2, 3, 4, 5, 6).to(dtype)
    views = [view(image) for view in LAYOUTS.values()]
    volumes = [
        volume.contiguous(memory_format=torch.channels_last_3d), volume.permute(4, 2, 0, 3, 1)
    ]  # fmt: skip
    # Views of one tensor share its memory, and would be torch's.
    compare(case, [v.clone(memory_format=torch.preserve_format) for v in (*views, *volumes)])


@one_of_each
def test_a_group_for_each_parameter(case: OptimizerCase) -> None:
    compare(case, [torch.randn(n) for n in EVERY], each_its_group=True)


@compiled_cpu
@pytest.mark.parametrize("case", [OPTIMIZERS[0], OPTIMIZERS[-1]], ids=str)
def test_more_tensors_than_a_short_can_count(case: OptimizerCase) -> None:
    compare(case, list(torch.randn(40_000, 1).unbind()), steps=2)


@compiled_cpu
@one_of_each
def test_millions_of_parameters(case: OptimizerCase) -> None:
    compare(case, [torch.randn(5), torch.randn(3_000_017), torch.randn(70)], steps=2)


# -- parameters that share memory -------------------------------------------------------------

Shared = tuple[list[Tensor], list[Callable[[list[Tensor]], Tensor]]]


def _ones(k: int) -> Callable[[list[Tensor]], Tensor]:
    return lambda params: torch.linspace(-1, 1, params[k].numel()).view(params[k].shape)


# How parameters lie, and what the gradient of each is. (Torch's for-loop goes one by one.)
SHARING: dict[str, Callable[[], Shared]] = {
    "same-storage": lambda: ((lambda b: [b[:30], b[30:]])(torch.randn(60)), [_ones(0), _ones(1)]),
    "same-memory": lambda: ((lambda b: [b, b.view(30)])(torch.randn(30)), [_ones(0), _ones(1)]),
    "overlapping": lambda: ((lambda b: [b[:40], b[20:]])(torch.randn(60)), [_ones(0), _ones(1)]),
    "interleaved": lambda: ((lambda b: [b[::2], b[1::2]])(torch.randn(60)), [_ones(0), _ones(1)]),
    "transposed-twin": lambda: (
        (lambda b: [b, b.t()])(torch.randn(6, 6)), [_ones(0), _ones(1)]
    ),
    "one-gradient": lambda: (
        [torch.randn(30), torch.randn(30)], [_ones(0), lambda params: params[0].grad]
    ),
    "part-of-a-gradient": lambda: (
        [torch.randn(30), torch.randn(10)], [_ones(0), lambda params: params[0].grad[5:15]]
    ),
    "gradient-is-the-parameter": lambda: (
        [torch.randn(30), torch.randn(9)], [lambda params: params[0].detach(), _ones(1)]
    ),
    "gradient-is-another-parameter": lambda: (
        [torch.randn(30), torch.randn(30)],
        [lambda params: params[1].detach(), lambda params: params[0].detach()],
    ),
}  # fmt: skip


def together(tensors: Sequence[Tensor]) -> list[Parameter]:
    """Copies that share memory as the originals do."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().clone() for t in tensors}
    copies = []
    for t in tensors:
        storage = storages[t.untyped_storage().data_ptr()]
        copy = torch.empty(0).set_(storage, t.storage_offset(), t.shape, t.stride())
        copies.append(Parameter(copy))
    return copies


@pytest.mark.parametrize("sharing", SHARING)
@cases
def test_shared_memory(case: OptimizerCase, sharing: str) -> None:
    start, gradients = SHARING[sharing]()
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        params = together(start)
        optimizer = build(module, case, params)
        for _ in range(3):
            for p, gradient in zip(params, gradients, strict=True):
                p.grad = gradient(params)
            optimizer.step()
        outcomes.append(params)
    assert_same(*outcomes)


@cases
def test_one_parameter_that_overlaps_itself(case: OptimizerCase) -> None:
    """Torch's in-place operations refuse it, or some do: so do we, or we do the same."""
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.linspace(-1, 1, 30).as_strided((5, 10), (5, 1)))
        p.grad = torch.linspace(-2, 2, 50).view(5, 10)
        optimizer = build(module, case, [p])
        try:
            optimizer.step()
            outcomes.append(p.tolist())
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


@cases
def test_the_same_parameter_twice(case: OptimizerCase) -> None:
    """Under two names, in one group and in two (torch itself refuses only to begin so)."""
    for again in ("one-group", "two-groups"):
        outcomes = []
        for module in (fastopt.optim, torch.optim):
            torch.manual_seed(7)
            p, q = Parameter(torch.randn(30)), Parameter(torch.randn(7))
            optimizer = build(module, case, [{"params": [p]}, {"params": [q], "lr": 0.05}])
            optimizer.param_groups[again == "two-groups"]["params"].append(p)
            for _ in range(3):
                for param in (p, q):
                    param.grad = torch.randn(param.shape)
                optimizer.step()
            outcomes.append((p, q))
        assert_same(*outcomes)


@one_of_each
def test_tied_weights(case: OptimizerCase) -> None:
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        torch.manual_seed(7)
        embedding, head = torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20, bias=False)
        head.weight = embedding.weight
        model = torch.nn.Sequential(embedding, torch.nn.Linear(8, 8), head)
        optimizer = build(module, case, model.parameters())
        for _ in range(3):
            optimizer.zero_grad()
            logits = model(torch.arange(20))
            theirs.cross_entropy(logits, torch.arange(20).flip(0)).backward()
            optimizer.step()
        assert head.weight is embedding.weight
        outcomes.append(list(model.parameters()))
    assert_same(*outcomes)

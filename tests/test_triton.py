"""What only the Triton backend has: its tables, its variants, values that stay on the device.

The kernels' numbers are tested with everyone else's, in the tests that run on any backend.
"""

from __future__ import annotations

import pytest
import torch
from cases import BACKEND, DEVICE
from test_optimizers import assert_same, set_grads, twins
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours

if BACKEND != "triton":
    pytest.skip("needs TRITON_INTERPRET=1 or a GPU", allow_module_level=True)

import numpy as np

from fastopt.kernels.layout import ClassAxis
from fastopt.kernels.operation import Options
from fastopt.kernels.tables import Tables, Traced
from fastopt.kernels.triton import device_table, multi_tensor
from fastopt.kernels.triton.compiler import Hardware
from fastopt.kernels.triton.cross_entropy import tiling
from fastopt.kernels.triton.device_table import DeviceTable
from fastopt.nn.cross_entropy import CrossEntropy
from fastopt.optim.sgd import SGDUpdate

H100 = Hardware(132, 32, 50 << 20)


def uploads(optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """How often each table of the (only) bucket has been uploaded."""
    (bucket,) = optimizer._planner.plan._buckets
    update = vars(bucket._launch)
    return {name: table.uploads for name, table in update.items() if isinstance(table, DeviceTable)}


def test_tables_are_uploaded_when_they_change() -> None:
    params = [Parameter(torch.randn(n)) for n in (5, 70, 3000)]
    optimizer = fastopt.optim.Adam(params, lr=0.1)
    set_grads(params)
    on_host = int(DEVICE == "cpu")  # where step counters are, as in torch with a default device
    for _ in range(4):
        optimizer.step()
    assert uploads(optimizer) == {
        "_table": 1, "_tensor_of": 1, "_row_of": 1, "_hypers": 1, "_behind": on_host,
        "_numbers": 0, "_rules": 0,
    }  # fmt: skip
    optimizer.param_groups[0]["lr"] = 0.2
    optimizer.step()
    assert uploads(optimizer)["_hypers"] == 2
    old = [p.grad for p in params]  # or the new ones might get the same memory
    set_grads(params)
    optimizer.step()
    assert uploads(optimizer) == {
        "_table": 2, "_tensor_of": 1, "_row_of": 1, "_hypers": 2, "_behind": on_host,
        "_numbers": 0, "_rules": 0,
    }  # fmt: skip
    del old


@pytest.mark.skipif(DEVICE != "cpu", reason="test_gpu.py captures real graphs")
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_captured_steps_have_tables_of_their_own(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a capture records happens at its replays: no other step may count on it."""
    mine = [Parameter(torch.randn(n)) for n in (5, 3000)]
    torchs = twins(mine)
    optimizer = getattr(fastopt.optim, name)(mine, lr=0.1, fused=True)
    twin = getattr(torch.optim, name)(torchs, lr=0.1)

    alive = []  # all gradients, or later ones might lie where those of an earlier step did

    def step(lr: float) -> None:
        set_grads(mine, torchs)
        alive.extend(p.grad for p in mine)
        for each in (optimizer, twin):
            each.param_groups[0]["lr"] = lr
            each.step()
        assert_same(mine, torchs)

    step(0.1)
    before = uploads(optimizer)
    constants = optimizer._planner.plan._buckets[0]._launch._constants
    kept = constants.clone()
    with monkeypatch.context() as patch:
        for module in (device_table, multi_tensor):
            patch.setattr(module, "capturing", lambda device: True)
        for _ in range(multi_tensor.CAPTURES):
            step(0.2)
        assert uploads(optimizer) == before
        assert torch.equal(constants, kept)
        with pytest.raises(RuntimeError, match="more than 8 steps captured"):
            step(0.3)
    step(0.1)  # as before the captures, but for the gradients
    changed = {k: n - before[k] for k, n in uploads(optimizer).items() if n != before[k]}
    assert changed == {"_table": 1}


@pytest.mark.parametrize("name", ["Adam", "RMSprop"])
def test_steps_that_differ(name: str) -> None:
    """Parameters of one bucket may be at different steps."""
    mine = [Parameter(torch.randn(n)) for n in (9, 1500, 4)]
    torchs = twins(mine)
    optimizers = [getattr(m, name)(p) for m, p in ((fastopt.optim, mine), (torch.optim, torchs))]
    for turn in range(5):
        set_grads(mine, torchs)
        if turn < 2:
            mine[1].grad = torchs[1].grad = None
        for optimizer in optimizers:
            optimizer.step()
        assert_same(mine, torchs)
    steps = [[optimizer.state[p]["step"].item() for p in params]
             for optimizer, params in zip(optimizers, (mine, torchs), strict=True)]  # fmt: skip
    assert steps[0] == steps[1] == [5, 3, 5]


def test_unaligned_memory() -> None:
    """Views into one block, as flat parameters are: some begin on 16 bytes and some don't."""
    blocks = [torch.randn(9000) for _ in range(2)]
    cuts = [(0, 4096), (4097, 4100), (4101, 8200), (8204, 9000)]
    mine, torchs = ([Parameter(block[a:b]) for a, b in cuts] for block in (*blocks[:1], blocks[1]))
    blocks[1].copy_(blocks[0])
    ours_, theirs = fastopt.optim.Adam(mine, lr=0.1), torch.optim.Adam(torchs, lr=0.1)
    for _ in range(3):
        flat = torch.randn(9000)
        for params in (mine, torchs):
            for p, (a, b) in zip(params, cuts, strict=True):
                p.grad = flat[a:b]
        ours_.step()
        theirs.step()
    assert_same(blocks[:1], blocks[1:])


def test_hyperparameters_on_the_device() -> None:
    """A learning rate that only the device knows is looked up there, at every step."""
    param, grad = torch.randn(40), torch.randn(40)
    lr = torch.tensor([0.5])
    expected = param.clone()
    hypers = np.zeros((2, len(SGDUpdate.numbers)))
    hypers[1] = SGDUpdate(
        grad_scale=1, lr=0, momentum=0, grad_share=1, weight_decay=0, nesterov=0
    ).row
    tables = Tables(
        device=param.device,
        hypers=hypers,
        traced=[Traced(1, SGDUpdate.numbers.index("lr"), lr)],
        row_of=np.array([1]),
        offsets=np.array([0, 40]),
        addresses=np.array([[param.data_ptr()], [0], [grad.data_ptr()], [0]]),
        counted_on_device=False,
    )
    slots = (torch.float32, None)
    update = multi_tensor.launcher(SGDUpdate, slots, (), torch.float32, None)(tables)
    place = (1, SGDUpdate.numbers.index("lr"))
    known = tables.traced.copy()
    for rate in (0.5, 0.25, None, 0.125, None):
        if rate is None:  # a number again, each time the same
            tables.traced.clear()
            tables.hypers[place] = 2.0
        else:
            tables.traced[:] = known
            tables.hypers[place] = np.nan
            lr.fill_(rate)
        update(None, None)
        expected -= (rate or 2.0) * grad
    torch.testing.assert_close(param, expected)


def test_explain_names_the_variant() -> None:
    x = torch.randn(64, 50_000, requires_grad=True)
    t = torch.randint(0, 50_000, (64,))
    half = x.detach().half().requires_grad_()
    with fastopt.use_backend("triton"):
        long = str(fastopt.explain(ours.cross_entropy, x, t))
        scaled = str(fastopt.explain(ours.cross_entropy, half, t))
        short = str(fastopt.explain(ours.cross_entropy, x.detach()[:, :10].contiguous(), t % 10))
        pointwise = str(fastopt.explain(ours.mse_loss, x, x))
        step = str(fastopt.explain(fastopt.optim.Adam([Parameter(torch.ones(3000))] * 1)))
    assert "triton: softmax" in long
    assert "gradient in the forward pass" in long
    assert "gradient recomputed in backward" in scaled
    assert "whole rows a program, read once" in short
    assert "triton: flat, 1,563 programs of 2048 elements" in pointwise
    assert "1 tensors in one launch of 3 programs" in step


@pytest.mark.skipif(DEVICE != "cpu", reason="on a GPU the assert ends the process")
@pytest.mark.parametrize("bad", [-1, 10])
def test_target_out_of_range_without_an_assert(bad: int) -> None:
    """Where device asserts are not compiled: NaN, and nothing out of bounds is touched."""
    from fastopt.kernels.triton import cross_entropy

    x, t = torch.randn(3, 10), torch.tensor([1, bad, 2])
    call = cross_entropy.prepare(
        Options(CrossEntropy(), "none", torch.float32), (x, t.clamp(0, 9), None)
    )._replace(target=t)
    losses = torch.zeros(3)
    cut = tiling(call.axis, 4, H100)
    cross_entropy.run(call, cut, None, False, losses=losses)
    assert losses.isnan().tolist() == [False, True, False]


class TestTiling:
    """The rules for block sizes, on an H100."""

    @staticmethod
    def cut(positions: int, classes: int, itemsize: int = 2, twice: bool = True) -> tuple[int, ...]:
        axis = ClassAxis(classes, 1, positions, 0, classes, 1)
        return tiling(axis, itemsize, H100, twice)

    def test_short_rows_share_a_program(self) -> None:
        assert self.cut(1_000_000, 10)[:2] == (128, 16)
        assert self.cut(20, 10)[:2] == (1, 16), "few rows: a program each"

    def test_a_row_that_fits_is_read_once(self) -> None:
        for classes in (1000, 4096, 16_384):
            assert self.cut(8192, classes).single

    def test_long_rows_under_way_fit_the_cache(self) -> None:
        assert self.cut(8192, 32_000).threads == 256
        assert self.cut(8192, 128_256).threads == 1024

    def test_few_long_rows_are_split(self) -> None:
        cut = self.cut(8, 128_256)
        assert cut.splits * 8 >= 132
        assert cut.span * cut.splits >= 128_256
        assert cut.span % cut.columns == 0

    def test_positions_side_by_side(self) -> None:
        axis = ClassAxis(21, 8, 512 * 512, 21 * 512 * 512, 1, 512 * 512)
        cut = tiling(axis, 4, H100)
        assert cut.rows >= 64
        assert cut.single

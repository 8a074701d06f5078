"""Every optimizer on every row of the table, against torch's for-loop."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from cases import (
    BACKEND,
    FLOATS,
    LARGE,
    OPTIMIZERS,
    SHAPES,
    OptimizerCase,
    assert_as_accurate,
)
from race import accepted
from torch import Tensor
from torch.nn import Parameter

import fastopt


def build(module: Any, case: OptimizerCase, params: Any, **more: Any) -> torch.optim.Optimizer:
    if module is torch.optim:
        more |= {"foreach": False}
    return getattr(module, case.operation)(params, **case.options, **more)


def parameters(
    dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES
) -> list[Parameter]:
    return [Parameter(torch.randn(s, dtype=torch.float64).to(dtype)) for s in shapes]


def twins(params: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Parameter]:
    """Copies with the same layout, gradients included."""
    copies = []
    for p in params:
        copy = Parameter(torch.empty_like(p, dtype=dtype).copy_(p.detach()))
        if p.grad is not None:
            copy.grad = torch.empty_like(p.grad, dtype=dtype).copy_(p.grad)
        copies.append(copy)
    return copies


def set_grads(*replicas: Sequence[Tensor]) -> None:
    """The same random gradients for all replicas, new tensors each time."""
    for copies in zip(*replicas, strict=True):
        grad = torch.randn(copies[0].shape, dtype=torch.float64)
        if copies[0].dtype != torch.float64:
            grad = grad.to(copies[0].dtype)
        for p in copies:
            p.grad = torch.empty_like(p).copy_(grad)


def assert_same(mine: Sequence[Tensor], torchs: Sequence[Tensor]) -> None:
    for m, t in zip(mine, torchs, strict=True):
        torch.testing.assert_close(m, t, rtol=2e-5, atol=2e-6)


def assert_same_state(mine: torch.optim.Optimizer, torchs: torch.optim.Optimizer) -> None:
    m, t = mine.state_dict(), torchs.state_dict()
    assert m["state"].keys() == t["state"].keys()
    for key, expected in t["state"].items():
        assert m["state"][key].keys() == expected.keys()
        for name, value in expected.items():
            got = m["state"][key][name]
            assert (got.dtype, got.shape, got.stride()) == (
                value.dtype,
                value.shape,
                value.stride(),
            )
            largest = value.abs().max().item() if value.numel() else 0.0
            torch.testing.assert_close(got, value, rtol=2e-5, atol=2e-6 * max(1.0, largest))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_updates(case: OptimizerCase, dtype: torch.dtype) -> None:
    mine = parameters(dtype)
    torchs, oracle = twins(mine), twins(mine, torch.float64)
    optimizers = [
        build(m, case, p)
        for m, p in ((fastopt.optim, mine), (torch.optim, torchs), (torch.optim, oracle))
    ]
    for _ in range(4):
        set_grads(mine, torchs, oracle)
        grads = [p.grad.clone() for p in mine]
        versions = [p._version for p in mine]
        with fastopt.use_backend(BACKEND):
            optimizers[0].step()
        for optimizer in optimizers[1:]:
            optimizer.step()
        assert all(torch.equal(p.grad, g) for p, g in zip(mine, grads, strict=True))
        assert all(p._version > v for p, v in zip(mine, versions, strict=True))
    # Over all elements: in a tensor of one, whose last digits fall better is a matter of luck.
    everything = [
        torch.cat([p.detach().flatten() for p in params]) for params in (mine, torchs, oracle)
    ]
    assert_as_accurate(*everything)
    if dtype in (torch.float32, torch.float64):
        assert_same_state(optimizers[0], optimizers[1])


@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_checkpoints_go_both_ways(case: OptimizerCase) -> None:
    mine = parameters()
    torchs = twins(mine)
    ours, theirs = build(fastopt.optim, case, mine), build(torch.optim, case, torchs)
    for _ in range(3):
        set_grads(mine, torchs)
        ours.step()
        theirs.step()
        saved_ours, saved_theirs = ours.state_dict(), theirs.state_dict()
        assert saved_ours["param_groups"][0].keys() == saved_theirs["param_groups"][0].keys()
        ours, theirs = build(fastopt.optim, case, mine), build(torch.optim, case, torchs)
        ours.load_state_dict(saved_theirs)
        theirs.load_state_dict(saved_ours)
    set_grads(mine, torchs)
    ours.step()
    theirs.step()
    assert_same(mine, torchs)
    assert_same_state(ours, theirs)


def views() -> dict[str, Tensor]:
    base = torch.randn(60, 80)
    return {
        "contiguous": torch.randn(6, 8),
        "transposed": torch.randn(6, 8).t(),
        "channels-last": torch.randn(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        "columns-sliced": base[:20, ::2],
        "rows-sliced": base[20:40:3],
        "inner": base[41:50, 3:40],
        "expanded": torch.randn(5, 1)[:, 0],
    }


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("case", OPTIMIZERS[::3], ids=str)
@pytest.mark.parametrize("name", views())
def test_every_layout(case: OptimizerCase, name: str, fused: bool) -> None:
    """Parameters with gaps: right, and nothing is written between.

    Torch's own fused step on the CPU does write there: it takes them for contiguous.
    """
    more: dict[str, Any] = {"fused": True} if fused else {}
    if fused and not accepted(case.operation, fused=True):
        pytest.skip("it has no such option")
    view = views()[name]
    surroundings = view._base if view._base is not None else view
    mine, torchs = [Parameter(view)], [Parameter(view.clone(memory_format=torch.preserve_format))]
    before = surroundings.clone()
    inside = torch.zeros_like(surroundings, dtype=torch.bool)
    inside.as_strided(view.shape, view.stride(), view.storage_offset()).fill_(True)
    ours, theirs = build(fastopt.optim, case, mine, **more), build(torch.optim, case, torchs)
    for _ in range(3):
        set_grads(mine, torchs)
        ours.step()
        theirs.step()
    assert_same(mine, torchs)
    assert torch.equal(surroundings[~inside], before[~inside])


@pytest.mark.parametrize("case", OPTIMIZERS[::4], ids=str)
def test_gradients_of_other_layouts(case: OptimizerCase) -> None:
    mine = parameters(shapes=[(6, 8), (6, 8), (8, 8)])
    torchs = twins(mine)
    ours, theirs = build(fastopt.optim, case, mine), build(torch.optim, case, torchs)
    for _ in range(3):
        grads = [torch.randn(8, 6).t(), torch.randn(1, 8).expand(6, 8), torch.randn(8, 8).t()]
        for copies in (mine, torchs):
            for p, g in zip(copies, grads, strict=True):
                p.grad = g
        ours.step()
        theirs.step()
    assert_same(mine, torchs)


ADAM = OptimizerCase("Adam", {"weight_decay": 0.1})
SGD = OptimizerCase("SGD", {"lr": 0.1, "momentum": 0.9, "dampening": 0.5})
RMSPROP = OptimizerCase("RMSprop", {"momentum": 0.5})


class Pair:
    """A fastopt and a torch optimizer over equal parameters, stepped together."""

    def __init__(self, case: OptimizerCase, groups: int = 1, **options: Any) -> None:
        self.mine = parameters()
        self.torchs = twins(self.mine)
        self.ours = build(fastopt.optim, case, self._groups(self.mine, groups), **options)
        self.theirs = build(torch.optim, case, self._groups(self.torchs, groups), **options)

    @staticmethod
    def _groups(params: list[Parameter], count: int) -> list[dict[str, Any]]:
        return [{"params": params[k::count], "lr": 0.01 * (k + 1)} for k in range(count)]

    def both(self) -> tuple[tuple[Any, list[Parameter]], tuple[Any, list[Parameter]]]:
        return (self.ours, self.mine), (self.theirs, self.torchs)

    def step(self, times: int = 1) -> None:
        for _ in range(times):
            set_grads(self.mine, self.torchs)
            self.only_step()

    def only_step(self) -> None:
        self.ours.step()
        self.theirs.step()
        assert_same(self.mine, self.torchs)


@pytest.mark.parametrize("case", [ADAM, SGD, RMSPROP], ids=str)
class TestWhatChangesBetweenSteps:
    def test_missing_gradients(self, case: OptimizerCase) -> None:
        pair = Pair(case, groups=2)
        for missing in ((1, 5), (), (0, 1, 2), range(9), (3,)):
            set_grads(pair.mine, pair.torchs)
            for k in missing:
                pair.mine[k].grad = pair.torchs[k].grad = None
            pair.only_step()
        assert_same_state(pair.ours, pair.theirs)

    def test_late_group(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        pair.step(2)
        late = parameters(shapes=[(7,), (300,)])
        late_twins = twins(late)
        pair.ours.add_param_group({"params": late, "lr": 0.5})
        pair.theirs.add_param_group({"params": late_twins, "lr": 0.5})
        pair.mine += late
        pair.torchs += late_twins
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)

    def test_gradients_kept_and_zeroed(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        pair.step()
        for copies in (pair.mine, pair.torchs):
            for p in copies:
                p.grad.mul_(2)
        pair.only_step()
        for optimizer, _ in pair.both():
            optimizer.zero_grad(set_to_none=False)
        pair.only_step()

    def test_learning_rates(self, case: OptimizerCase) -> None:
        pair = Pair(case, groups=3)
        for lr in (0.1, 0.0, 0.3):
            for optimizer, _ in pair.both():
                optimizer.param_groups[1]["lr"] = lr
            pair.step()

    def test_lists_changed_in_place(self, case: OptimizerCase) -> None:
        if "betas" not in Pair(case).ours.defaults:
            pytest.skip("this optimizer has no hyperparameter that may be a list")
        pair = Pair(case)
        for optimizer, _ in pair.both():
            optimizer.param_groups[0]["betas"] = [0.9, 0.99]
        pair.step(2)
        for optimizer, _ in pair.both():
            optimizer.param_groups[0]["betas"][0] = 0.1
        pair.step(2)

    def test_options(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        pair.step(2)
        for change in ({"maximize": True}, {"weight_decay": 0.7}, {"momentum": 0.2}):
            for optimizer, _ in pair.both():
                group = optimizer.param_groups[0]
                group.update({k: v for k, v in change.items() if k in group})
            pair.step(2)

    def test_rebound_data(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        pair.step(2)
        for turn in range(3):
            for _, copies in pair.both():
                for p in copies:
                    p.data = p.data.clone()
                if turn == 1:  # the same address, other strides
                    p = copies[4] if copies[4].dim() == 2 else copies[3]
                    p.data = p.data.transpose(0, 1)
                    p.data = p.data.transpose(0, 1)
            pair.step()

    def test_transposed_in_place(self, case: OptimizerCase) -> None:
        """The same address and size, another layout: the cached plan must not be believed."""
        mine = [Parameter(torch.randn(8, 8))]
        torchs = twins(mine)
        ours, theirs = build(fastopt.optim, case, mine), build(torch.optim, case, torchs)
        for k in range(4):
            if k == 2:
                for p in (*mine, *torchs):
                    p.data = p.data.t()
            set_grads(mine, torchs)
            ours.step()
            theirs.step()
            assert_same(mine, torchs)

    def test_replaced_states(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        pair.step(2)
        for optimizer, copies in pair.both():
            for k, p in enumerate(copies):
                state = optimizer.state[p]
                for name, value in state.items():
                    if k % 3 == 0:
                        state[name] = value * 0.5
                    elif k % 3 == 1:
                        value.data = value.data.clone() + 1
                if k == 5:
                    optimizer.state[p] = {n: v.clone() for n, v in state.items()}
                if k == 7:
                    del optimizer.state[p]
        pair.step(2)
        assert_same_state(pair.ours, pair.theirs)

    def test_replaced_parameter(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        pair.step()
        new = Parameter(torch.randn(12))
        for (optimizer, copies), p in zip(pair.both(), (new, *twins([new])), strict=True):
            copies[2] = optimizer.param_groups[0]["params"][2] = p
        pair.step(2)

    def test_shared_gradient(self, case: OptimizerCase) -> None:
        pair = Pair(case)
        set_grads(pair.mine, pair.torchs)
        for _, copies in pair.both():
            copies[7].grad = torch.ones(LARGE)
            copies[5].grad = copies[7].grad[:4099]
        pair.only_step()
        pair.only_step()

    @pytest.mark.parametrize("alias", ["gradient", "parameters", "shifted"])
    def test_shared_memory(self, case: OptimizerCase, alias: str) -> None:
        """What is written and what is read overlap: only torch's order of operations is right."""
        pairs = []
        for module in (fastopt.optim, torch.optim):
            torch.manual_seed(5)
            base = torch.randn(50)
            p = Parameter(base[:30])
            other = Parameter(base[20:50] if alias == "parameters" else torch.randn(30))
            optimizer = build(module, case, [p, other])
            for _ in range(3):
                other.grad = torch.ones(30)
                p.grad = torch.ones(30)
                if alias == "gradient":
                    p.grad = p.detach()
                elif alias == "shifted":
                    p.grad = base[15:45]
                optimizer.step()
            pairs.append((p, other))
        assert_same(*pairs)

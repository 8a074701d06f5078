"""AveragedModel: what has to stay torch's, and copies, devices, graphs and threads."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from averages import (
    EMA,
    RULES,
    Parts,
    assert_same,
    averages,
    backends,
    change,
    own_ema,
    rebind,
    state,
)
from cases import BACKEND, DEVICE, INTERPRETED
from torch import nn
from torch.nn import Parameter
from torch.optim import swa_utils as theirs

import fastopt
from fastopt.optim import _averages
from fastopt.optim import swa_utils as ours


def test_integers_are_torchs(torchs_calls: list[str]) -> None:
    """With use_buffers counters of batches are averaged as torch does, all else in one launch."""
    model = Parts()
    mine, its = averages(EMA, model, use_buffers=True)
    for _ in range(3):
        change(model)
        mine.update_parameters(model)
    assert torchs_calls == ["part"] * 3
    assert backends(mine, model) == {BACKEND, "reference"}
    for _ in range(3):
        its.update_parameters(model)
    copied = ours.AveragedModel(model, **RULES[EMA]())
    torchs_calls.clear()
    for _ in range(3):
        change(model)
        copied.update_parameters(model)
    assert not torchs_calls
    assert copied.module.norm.num_batches_tracked == model.norm.num_batches_tracked
    assert backends(copied, model) == {BACKEND}


def test_integers_that_torch_refuses() -> None:
    """Its error, at the same update."""
    model = nn.BatchNorm1d(3)
    for average in averages("swa", model, use_buffers=True):
        average.update_parameters(model)
        with pytest.raises(RuntimeError, match="Integer division"):
            average.update_parameters(model)
        assert average.n_averaged == 1


def test_kinds_that_only_torch_averages(torchs_calls: list[str]) -> None:
    model = nn.ParameterDict(
        {
            "complex": Parameter(torch.randn(3, dtype=torch.complex64)),
            "plain": Parameter(torch.randn(5)),
            "gaps": Parameter(torch.randn(4, 6)[:, ::2]),
            "wide": Parameter(torch.randn(7).double()),
        }
    )
    mine, its = averages("ema of one", model)
    for average in (mine, its):  # from float64: torch has to do it
        average.module["wide"].data = average.module["wide"].data.half()
        average.module["gaps"].data = torch.randn(4, 6)[:, ::2]
    for _ in range(3):
        change(nn.ParameterList([p for k, p in model.items() if k != "complex"]))
        mine.update_parameters(model)
        assert torchs_calls.pop() == "part"
        its.update_parameters(model)
        assert_same(mine, its)
    text = str(fastopt.explain(mine, model))
    for words in ("complex64", "with gaps", "float64 with float64 and float32 only"):
        assert words in text


def test_shared_memory(torchs_calls: list[str]) -> None:
    """An average inside of the model's memory: the order counts, and is torch's."""
    outcomes = []
    for module in (ours, theirs):
        torch.manual_seed(1)
        model = nn.ParameterList([torch.randn(8), torch.randn(8)])
        average = module.AveragedModel(model, **RULES[EMA]())
        average.update_parameters(model)
        average.module[0].data = model[1].data
        for _ in range(2):
            change(model)
            average.update_parameters(model)
        outcomes.append(average)
    assert_same(*outcomes)
    assert torchs_calls[1:3] == ["all", "all"] or torchs_calls.count("all") >= 2


def test_modes_are_torchs(torchs_calls: list[str]) -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            self.calls += 1
            return func(*args, **(kwargs or {}))

    model = Parts()
    mine, its = averages(EMA, model)
    for around in (Seen, torch.inference_mode, Seen):
        for average in (mine, its):
            with around():
                average.update_parameters(model)
        with torch.no_grad():
            for p in model.parameters():
                p.add_(0.5)
    assert torchs_calls == ["all"] * 6
    assert_same(mine, its)


def test_averages_made_in_inference_mode() -> None:
    model = Parts()
    with torch.inference_mode():
        mine, its = averages(EMA, model)
        for _ in range(3):
            mine.update_parameters(model)
            its.update_parameters(model)
    assert_same(mine, its)


def test_compiled_by_torch() -> None:
    model = nn.Linear(4, 4)
    mine, its = averages(EMA, model)
    update = torch.compile(mine.update_parameters, backend="eager")
    for _ in range(3):
        change(model)
        update(model)
        its.update_parameters(model)
    assert_same(mine, its)


def test_insisting(torchs_calls: list[str]) -> None:
    model = Parts()
    average = ours.AveragedModel(model, **RULES[EMA](), use_buffers=True)
    with fastopt.use_backend("reference"):
        average.update_parameters(model)
    assert torchs_calls == ["all"]
    with fastopt.use_backend(BACKEND):
        with pytest.raises(fastopt.BackendUnavailable, match="int64"):
            average.update_parameters(model)
        assert average.n_averaged == 1
        average.use_buffers = False
        average.update_parameters(model)
        own = ours.AveragedModel(model, multi_avg_fn=own_ema)
        with pytest.raises(fastopt.BackendUnavailable, match="averaging function of its own"):
            own.update_parameters(model)
        with torch.inference_mode(), pytest.raises(fastopt.BackendUnavailable, match="inference"):
            average.update_parameters(model)
    assert torchs_calls == ["all"]


def test_lazy_parameters() -> None:
    model = nn.LazyLinear(3)
    with pytest.raises(ValueError, match="uninitialized"):
        theirs.AveragedModel(model).update_parameters(model)
    with pytest.raises(ValueError, match="uninitialized"):
        ours.AveragedModel(model).update_parameters(model)


def test_released_memory() -> None:
    model = nn.Linear(30, 30)
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    model.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="has no memory"):
        average.update_parameters(model)


# -- what an AveragedModel is ---------------------------------------------------------------


def test_it_is_torchs_but_for_its_update() -> None:
    model = nn.Linear(2, 3)
    mine, its = averages(EMA, model)
    assert isinstance(mine, theirs.AveragedModel)
    assert repr(mine) == repr(its)
    found, torchs = (
        [
            (p.name, p.kind, p.default)
            for p in inspect.signature(m.AveragedModel).parameters.values()
        ]
        for m in (ours, theirs)
    )
    assert found == [*torchs, ("optimizer", inspect.Parameter.KEYWORD_ONLY, None)]
    x = torch.randn(4, 2)
    assert torch.equal(mine(x), its(x))
    with pytest.raises(AssertionError, match="Only one of avg_fn and multi_avg_fn"):
        ours.AveragedModel(model, avg_fn=own_ema, multi_avg_fn=own_ema)
    assert mine.n_averaged.dtype == torch.int64
    mine.update_parameters(model)
    assert repr(mine) == repr(its)
    assert set(mine.state_dict()) == set(its.state_dict())


def test_state_dicts_go_both_ways() -> None:
    model = Parts()
    mine, its = averages(EMA, model)
    others = averages(EMA, Parts())
    for average in (mine, its):
        for _ in range(3):
            average.update_parameters(model)
    others[0].load_state_dict(its.state_dict())
    others[1].load_state_dict(mine.state_dict())
    for average in others:
        assert average.n_averaged == 3
        change(model)
    for average in (mine, *others):
        average.update_parameters(model)
    assert_same(others[0], others[1])
    assert_same(mine, others[0])
    its.n_averaged.zero_()
    mine.load_state_dict(its.state_dict())  # a new beginning: copies
    mine.update_parameters(model)
    assert torch.equal(mine.module.linear.weight, model.linear.weight)


def through_pickle(value: Any) -> Any:
    return pickle.loads(pickle.dumps(value))


def through_file(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", [copy.deepcopy, through_pickle, through_file])
def test_copies(how: Callable[[Any], Any]) -> None:
    """They go on by themselves. (Torch's functions, which are local, no pickle takes.)"""
    model = Parts()
    mine, its = averages("default", model)
    for average in (mine, its):
        for _ in range(2):
            average.update_parameters(model)
    copied = how(mine)
    assert type(copied) is ours.AveragedModel
    change(model)
    before = state(mine)
    copied.update_parameters(model)
    its.update_parameters(model)
    assert_same(copied, its)
    assert all(torch.equal(t, before[name]) for name, t in state(mine).items())
    for average in (mine, copied):
        average.update_parameters(model)
    assert copied.n_averaged == 4
    assert mine.n_averaged == 3


def test_batch_norm_afterwards() -> None:
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6))
    mine, its = averages("default", model)
    loader = [torch.randn(8, 4) for _ in range(3)]
    for average in (mine, its):
        for _ in range(3):
            average.update_parameters(model)
        ours.update_bn(loader, average)
    assert_same(mine, its)


def test_device() -> None:
    """Of the averages and of their number; another one's are torch's, moves included."""
    model = nn.Linear(3, 3)
    mine = ours.AveragedModel(model, device=torch.device(DEVICE))
    assert mine.n_averaged.device.type == torch.device(DEVICE).type
    elsewhere = ours.AveragedModel(model, device=torch.device("meta"))
    decisions = fastopt.explain(elsewhere, model)
    assert {decision.backend for decision in decisions} == {"reference"}
    moved = ours.AveragedModel(model, **RULES[EMA]())
    moved.update_parameters(model)
    moved.module.to("meta")
    moved.update_parameters(model)
    assert moved.n_averaged == 2


def test_gradients_and_graphs() -> None:
    """A graph that has saved an average knows that it has changed."""
    model = nn.Linear(3, 3)
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    x = torch.randn(2, 3, requires_grad=True)
    loss = average(x).square().sum()
    average.update_parameters(model)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    assert all(p.requires_grad and p.grad is None for p in average.parameters())


def test_convert_there_and_back() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.MSELoss())
    average = theirs.AveragedModel(model, **RULES[EMA]())
    twin = copy.deepcopy(average)
    for to, kind in (("fastopt", ours.AveragedModel), ("torch", theirs.AveragedModel)):
        assert fastopt.convert(average, to=to) is average
        assert type(average) is kind
        assert isinstance(average.module[1], fastopt.nn.MSELoss) == (to == "fastopt")
        for _ in range(2):
            change(model)
            average.update_parameters(model)
            twin.update_parameters(model)
        assert_same(average, twin)
    assert "_averager" not in vars(average)

    class Other(theirs.AveragedModel):
        pass

    other = Other(nn.Linear(2, 2))
    assert type(fastopt.convert(other)) is Other


# -- memory and threads ---------------------------------------------------------------------


def test_nothing_is_kept_alive() -> None:
    """Neither the model, nor what it or the average has dropped."""
    model = Parts()
    average = ours.AveragedModel(model, **RULES[EMA]())
    for _ in range(2):
        average.update_parameters(model)
    gone = [weakref.ref(model.gaps), weakref.ref(model.gaps.weight), weakref.ref(average.module)]
    model.gaps = nn.Linear(5, 6)
    average.module = copy.deepcopy(model)
    gc.collect()
    assert [reference() for reference in gone] == [None] * 3
    average.update_parameters(model)
    whole = weakref.ref(model)
    del model
    gc.collect()
    assert whole() is None


@pytest.mark.skipif(INTERPRETED, reason="NumPy's own threads take long there")
def test_threads() -> None:
    """Updates of one average take turns; weights are replaced meanwhile by another thread."""
    model = nn.ParameterList([torch.ones(2000) for _ in range(30)])
    average = ours.AveragedModel(model, **RULES[EMA]())
    average.update_parameters(model)
    done, errors = threading.Event(), []

    def disturb() -> None:
        while not done.is_set():
            for p in model:
                p.data = torch.ones(2000)

    def update() -> None:
        try:
            for _ in range(100):
                average.update_parameters(model)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=update) for _ in range(2)]
    other = threading.Thread(target=disturb)
    for thread in (other, *threads):
        thread.start()
    for thread in threads:
        thread.join()
    done.set()
    other.join()
    assert not errors
    assert average.n_averaged == 201
    assert all((p == 1.0).all() for p in average.module)


def test_one_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    """For all parameters, and for buffers that are copied."""
    launches = []
    run = _averages.Bucket.run

    def counted(self: Any, *args: Any) -> None:
        launches.append(len(self.places))
        run(self, *args)

    monkeypatch.setattr(_averages.Bucket, "run", counted)
    plans = []
    begin = _averages.Plan.__init__

    def planned(self: Any, *args: Any) -> None:
        plans.append(self)
        begin(self, *args)

    monkeypatch.setattr(_averages.Plan, "__init__", planned)
    model = Parts()
    average = ours.AveragedModel(model)
    for _ in range(4):
        change(model)
        rebind(model)
        average.update_parameters(model)
    count = len(list(model.parameters())) + 3  # two of the norm's buffers, and the scalar
    assert launches == [count] * 4
    assert len(plans) == 1

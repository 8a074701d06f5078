"""AveragedModel: every average against torch's, and what has to stay torch's."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import pickle
import threading
import weakref
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED, LARGE, assert_as_accurate
from torch import Tensor, nn
from torch.nn import Parameter
from torch.nn.utils import parametrizations
from torch.optim import swa_utils as theirs

import fastopt
from fastopt.optim import _averages, _averaging
from fastopt.optim import swa_utils as ours

#: Functions of torch's that are known, by the arguments of AveragedModel.
RULES: dict[str, Callable[[], dict[str, Any]]] = {
    "default": dict,
    "ema 0.9": lambda: {"multi_avg_fn": theirs.get_ema_multi_avg_fn(0.9)},
    "ema 0.3": lambda: {"multi_avg_fn": theirs.get_ema_multi_avg_fn(0.3)},
    "ema 1": lambda: {"multi_avg_fn": theirs.get_ema_multi_avg_fn(1)},
    "swa": lambda: {"multi_avg_fn": theirs.get_swa_multi_avg_fn()},
    "ema of one": lambda: {"avg_fn": theirs.get_ema_avg_fn(0.9)},
    "swa of one": lambda: {"avg_fn": theirs.get_swa_avg_fn()},
}
EACH_RULE = pytest.mark.parametrize("rule", RULES)
EMA = "ema 0.9"


class Parts(nn.Module):
    """Parameters and buffers of odd sizes and layouts, empty ones, tied ones, and None."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes = nn.ParameterList([torch.randn(n) for n in (1, 0, 64, 70, LARGE)])
        self.linear, self.tied = nn.Linear(7, 7), nn.Linear(7, 7, bias=False)
        self.tied.weight = self.linear.weight
        self.transposed = Parameter(torch.randn(5, 9).t())
        self.gaps = nn.Linear(5, 6)
        self.norm = nn.BatchNorm1d(7)
        self.register_parameter("none", None)
        self.register_buffer("nothing", None)
        self.register_buffer("scalar", torch.randn(()))


def averages(
    rule: str, model: nn.Module, **more: Any
) -> tuple[ours.AveragedModel, theirs.AveragedModel]:
    both = [m.AveragedModel(model, **RULES[rule](), **more) for m in (ours, theirs)]
    assert isinstance(both[0], ours.AveragedModel)
    return both[0], both[1]


def change(model: nn.Module) -> None:
    """As a step does, and a batch."""
    with torch.no_grad():
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.add_(torch.randn_like(tensor))
            else:
                tensor.add_(1)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in model.state_dict().items()}


def assert_same(mine: nn.Module, its: nn.Module, digits: int = 4) -> None:
    found, expected = state(mine), state(its)
    assert list(found) == list(expected)
    for name, tensor in found.items():
        torchs = expected[name]
        assert (tensor.dtype, tensor.device) == (torchs.dtype, torchs.device)
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0
        torch.testing.assert_close(
            tensor, torchs, rtol=digits * eps, atol=digits * eps, equal_nan=True
        )


@pytest.fixture
def torchs_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's own code has been asked to average: all of a model, or a part."""
    calls: list[str] = []
    theirs_own = theirs.AveragedModel.update_parameters

    def update(self: Any, model: Any) -> None:
        calls.append("all" if isinstance(self, nn.Module) else "part")
        theirs_own(self, model)

    monkeypatch.setattr(theirs.AveragedModel, "update_parameters", update)
    return calls


def backends(average: ours.AveragedModel, model: nn.Module) -> set[str]:
    return {decision.backend for decision in fastopt.explain(average, model)}


# -- values -------------------------------------------------------------------------------


@pytest.mark.parametrize("use_buffers", [False, True])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EACH_RULE
def test_step_by_step(rule: str, dtype: torch.dtype, use_buffers: bool) -> None:
    model = Parts().to(dtype)
    if rule == "swa" and use_buffers:  # torch's function refuses integers
        del model.norm.num_batches_tracked
        model.norm.num_batches_tracked = None
    mine, its = averages(rule, model, use_buffers=use_buffers)
    moments: list[dict[str, Tensor]] = []
    for k in range(5):
        change(model)
        moments.append(state(model))
        before = [t._version for t in (*mine.parameters(), *mine.buffers())]
        their_before = [t._version for t in (*its.parameters(), *its.buffers())]
        mine.update_parameters(model)
        its.update_parameters(model)
        after = [t._version for t in (*mine.parameters(), *mine.buffers())]
        their_after = [t._version for t in (*its.parameters(), *its.buffers())]
        assert [a > b for a, b in zip(after, before, strict=True)] == [
            a > b for a, b in zip(their_after, their_before, strict=True)
        ]
        assert mine.n_averaged == its.n_averaged == k + 1
    assert BACKEND in backends(mine, model)
    for name, tensor in state(mine).items():
        torchs = its.state_dict()[name]
        if not tensor.is_floating_point():
            assert torch.equal(tensor, torchs)
            continue
        key = name.removeprefix("module.")
        numbers = [moment[key].double() for moment in moments]
        averaged = use_buffers or name in dict(mine.named_parameters(remove_duplicate=False))
        oracle = expected(rule, numbers) if averaged else numbers[-1]
        if not averaged:
            assert torch.equal(tensor, torchs)
        elif rule == "swa" and dtype == torch.float64:  # torch's weight is float32
            torch.testing.assert_close(tensor, torchs, rtol=1e-14, atol=1e-14)
        else:
            assert_as_accurate(tensor, torchs, oracle)


def expected(rule: str, numbers: list[Tensor]) -> Tensor:
    """In float64."""
    if "swa" in rule or rule == "default":
        return torch.stack(numbers).mean(0)
    decay = {"ema 0.3": 0.3, "ema 1": 1.0}.get(rule, 0.9)
    average = numbers[0]
    for number in numbers[1:]:
        average = decay * average + (1 - decay) * number
    return average


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@EACH_RULE
def test_float32_averages(rule: str, dtype: torch.dtype, torchs_calls: list[str]) -> None:
    """Of a model of another dtype, which torch's functions of lists refuse."""
    model = nn.Sequential(nn.Linear(30, 40), nn.BatchNorm1d(40)).to(dtype)
    average = ours.AveragedModel(model, **RULES[rule]())
    average.module.float()
    moments = []
    for _ in range(6):
        change(model)
        moments.append(state(model))
        average.update_parameters(model)
    assert backends(average, model) == {BACKEND}
    assert not torchs_calls
    for name, tensor in average.module.named_parameters():
        assert tensor.dtype == torch.float32
        right = expected(rule, [moment[name].double() for moment in moments])
        torch.testing.assert_close(tensor.double(), right, rtol=2e-6, atol=2e-6)
    running = average.module[1].running_mean
    assert torch.equal(running, model[1].running_mean.float())


def test_small_steps_of_halves_need_float32() -> None:
    """A bfloat16 average stays where it is, as torch's does; a float32 one moves."""
    model = nn.Linear(8, 8).bfloat16()
    rounded, exact = (ours.AveragedModel(model, **RULES[EMA]()) for _ in range(2))
    exact.module.float()
    nn.init.ones_(model.weight)
    for average in (rounded, exact):
        average.update_parameters(model)
    nn.init.constant_(model.weight, 1.0078125)  # the next number
    for _ in range(50):
        for average in (rounded, exact):
            average.update_parameters(model)
    assert (rounded.module.weight == 1.0).all()
    assert (exact.module.weight > 1.007).all()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EACH_RULE
def test_infinities_and_nan(rule: str, dtype: torch.dtype) -> None:
    """And the largest numbers, whose difference overflows. The first update copies whatever is."""
    largest = torch.finfo(dtype).max
    inf = float("inf")
    numbers = torch.tensor([0.0, 1.0, largest, -largest, inf, -inf, float("nan")], dtype=dtype)
    before, after = (t.flatten() for t in torch.meshgrid(numbers, numbers, indexing="ij"))
    model = nn.ParameterList([torch.full((49,), float("nan"), dtype=dtype)])
    mine, its = averages(rule, model)
    for numbers in (before, after):
        with torch.no_grad():
            model[0].copy_(numbers)
        for average in (mine, its):
            average.update_parameters(model)
        found, right = mine.module[0].detach(), its.module[0].detach()
        overflow = right.isinf() & ~found.isinf() & before.isfinite() & after.isfinite()
        if dtype in (torch.bfloat16, torch.float16):  # computed in float32
            found = found.where(~overflow, right)
        torch.testing.assert_close(
            found, right, rtol=4 * torch.finfo(dtype).eps, atol=0.0, equal_nan=True
        )


# -- which functions are torch's --------------------------------------------------------------


def own_ema(averages: Any, values: Any, count: Any) -> None:
    torch._foreach_lerp_(averages, values, 0.5)


def test_a_function_of_its_own(torchs_calls: list[str]) -> None:
    """With any other function torch's own code is run: it may do anything."""

    def traced(function: Any) -> Any:
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    decay = torch.tensor(0.9)
    for k, given in enumerate((
        {"multi_avg_fn": own_ema},
        {"avg_fn": lambda a, p, n: 0.5 * a + 0.5 * p},
        {"multi_avg_fn": traced(theirs.get_ema_multi_avg_fn(0.9))},
        {"avg_fn": theirs.get_ema_avg_fn(decay)},
    )):  # fmt: skip
        model = Parts()
        mine, its = (m.AveragedModel(model, **given) for m in (ours, theirs))
        for _ in range(3):
            change(model)
            mine.update_parameters(model)
            its.update_parameters(model)
        assert_same(mine, its, 0)
        assert torchs_calls.count("all") == 6 * (k + 1)
        assert "averaging function of its own" in str(fastopt.explain(mine, model))


def test_a_function_in_the_other_place() -> None:
    """Torch calls it with one tensor, or with lists, and has the error."""
    model = nn.Linear(2, 2)
    for given in (
        {"avg_fn": theirs.get_ema_multi_avg_fn(0.9)},
        {"multi_avg_fn": theirs.get_ema_avg_fn(0.9)},
    ):
        average = ours.AveragedModel(model, **given)
        average.update_parameters(model)
        with pytest.raises((TypeError, IndexError, AttributeError)):
            average.update_parameters(model)


def test_a_torch_whose_functions_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of them is known, and none is run by kernels."""

    def other(self: Any, averaged: Tensor) -> Any:
        return (1.0, *(0.25 for _ in self.record.numbers[1:-1]), averaged == 0)

    known = {multi: dict(_averaging._known(multi)) for multi in (False, True)}
    assert [len(found) for found in known.values()] == [2, 2]
    monkeypatch.setattr(_averaging.Rule, "row", other)
    for multi in known:
        assert not _averaging._known.__wrapped__(multi)


def test_a_default_that_was_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Linear(3, 3)
    average = ours.AveragedModel(model)
    average.update_parameters(model)
    monkeypatch.setattr(theirs, "get_swa_avg_fn", lambda: lambda a, p, n: torch.full_like(a, 7.0))
    average.update_parameters(model)
    if DEVICE == "cpu":
        assert (average.module.weight == 7.0).all()


def test_functions_by_fastopts_names() -> None:
    assert ours.get_ema_multi_avg_fn is theirs.get_ema_multi_avg_fn
    assert ours.update_bn is theirs.update_bn
    assert fastopt.optim.swa_utils is ours


def test_an_assigned_function_counts() -> None:
    """From the next update on."""
    model = Parts()
    mine, its = averages(EMA, model)
    for rule in (*RULES, *RULES):
        for average in (mine, its):
            given = {"avg_fn": None, "multi_avg_fn": None, **RULES[rule]()}
            for name, value in given.items():
                setattr(average, name, value)
        change(model)
        mine.update_parameters(model)
        its.update_parameters(model)
        assert_same(mine, its, 8)


# -- models that change -----------------------------------------------------------------------


def rebind(model: Any) -> None:
    model.linear.weight.data = torch.randn(7, 7)


def new_parameter(model: Any) -> None:
    model.gaps.weight = Parameter(torch.randn(6, 5))


def untie(model: Any) -> None:
    model.tied.weight = Parameter(torch.randn(7, 7))


def no_bias(model: Any) -> None:
    model.gaps.bias = None


def add_layer(model: Any) -> None:
    model.more = nn.Linear(3, 3)


def add_buffer(model: Any) -> None:
    model.register_buffer("more", torch.randn(5))


def replace_layer(model: Any) -> None:
    model.gaps = nn.Linear(5, 6)


def share_layer(model: Any) -> None:
    model.tied = model.linear


def other_layout(model: Any) -> None:
    model.linear.weight.data = torch.randn(7, 7).t()


def with_gaps(model: Any) -> None:
    model.linear.weight.data = torch.randn(7, 14)[:, ::2]


def other_order(model: Any) -> None:
    model._modules["linear"] = model._modules.pop("linear")


def other_dict(model: Any) -> None:
    model.gaps._parameters = {
        "weight": Parameter(torch.randn(6, 5)), "bias": Parameter(torch.randn(6)),
    }  # fmt: skip


def no_grad(model: Any) -> None:
    model.requires_grad_(False)


def parametrize(model: Any) -> None:
    parametrizations.weight_norm(model.gaps)


CHANGES = [
    rebind, new_parameter, untie, no_bias, add_layer, add_buffer, replace_layer, share_layer,
    other_layout, with_gaps, other_order, other_dict, no_grad, parametrize,
]  # fmt: skip


@pytest.mark.parametrize("side", ["model", "average", "both"])
@pytest.mark.parametrize("how", CHANGES)
def test_a_model_changes(how: Callable[[Any], None], side: str) -> None:
    """Between two updates, without announcement: values and errors are torch's."""
    outcomes = []
    for module in (ours, theirs):
        torch.manual_seed(5)
        model = Parts()
        average = module.AveragedModel(model, **RULES[EMA](), use_buffers=side == "both")
        error = None
        try:
            for k in range(4):
                change(model)
                average.update_parameters(model)
                if k == 1:
                    for subject in ([model] if side != "average" else []) + (
                        [average.module] if side != "model" else []
                    ):
                        how(subject)
        except (RuntimeError, ValueError) as caught:
            error = str(caught)
        outcomes.append((average, error))
    (mine, my_error), (its, their_error) = outcomes
    assert my_error == their_error
    if my_error is None:  # an error of torch's leaves what kernels average as it was
        assert_same(mine, its, 8)


def test_a_wrapped_model() -> None:
    """As by torch.compile or DataParallel: its parameters are the model's."""
    model = Parts()
    mine, its = averages(EMA, model)
    for wrapper in (model, nn.Sequential(model), nn.DataParallel(model), model):
        change(model)
        mine.update_parameters(wrapper)
        its.update_parameters(wrapper)
        assert_same(mine, its)


class Few(nn.Linear):
    """A module that says itself what its parameters are."""

    def named_parameters(self, *args: Any, **kwargs: Any) -> Any:
        yield "weight", self.weight


class Hidden(nn.Linear):
    def named_modules(self, *args: Any, **kwargs: Any) -> Any:
        return iter(())


@pytest.mark.parametrize(("kind", "inside"), [(Few, False), (Few, True), (Hidden, True)])
def test_a_model_that_is_walked_otherwise(kind: type, inside: bool) -> None:
    model = nn.Sequential(kind(3, 3), nn.Linear(2, 2)) if inside else kind(3, 3)
    mine, its = averages(EMA, model)
    for _ in range(3):
        change(nn.ParameterList([*(model[0] if inside else model)._parameters.values()]))
        mine.update_parameters(model)
        its.update_parameters(model)
        assert_same(mine, its)


def test_a_parameter_of_its_own() -> None:
    """A subclass's parameter is averaged too, in torch: with whatever comes at its place."""

    def make(module: ModuleType) -> Any:
        class Scaled(module.AveragedModel):  # type: ignore[name-defined, misc]
            def __init__(self, *args: Any, **kwargs: Any) -> None:
                super().__init__(*args, **kwargs)
                self.scale = Parameter(torch.ones(2))

        return Scaled

    model = nn.ParameterList([torch.randn(2), torch.randn(2)])
    mine, its = (make(module)(model, **RULES[EMA]()) for module in (ours, theirs))
    for _ in range(3):
        change(model)
        mine.update_parameters(model)
        its.update_parameters(model)
    assert_same(mine, its)


def test_scripted() -> None:
    model = torch.jit.script(nn.Linear(3, 3))
    mine, its = averages(EMA, model)
    for _ in range(3):
        change(model)
        mine.update_parameters(model)
        its.update_parameters(model)
    assert_same(mine, its)


# -- what torch's own code averages -----------------------------------------------------------


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
    assert inspect.signature(ours.AveragedModel) == inspect.signature(theirs.AveragedModel)
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

    def counted(self: Any, row: Any) -> None:
        launches.append(len(self.places))
        run(self, row)

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

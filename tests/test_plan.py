"""What makes a new plan of an optimizer's steps, what doesn't, and what a plan keeps."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import threading
import weakref
from collections.abc import Callable
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
from cases import BACKEND, INTERPRETED
from race import EACH, Race, give_grads, options_of, outcome, parameters
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerInfo

import fastopt
from fastopt.optim import _planner, _proof
from fastopt.optim._bucket import Bucket

COMMON: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    "Adam": {"lr": 0.1, "amsgrad": True},
    "AdamW": {"lr": 0.1},
    "RMSprop": {"lr": 0.1, "momentum": 0.5, "centered": True},
}
#: Enough that a kernel runs for a while; the interpreter needs no more than a few for that.
MANY, STEPS = (300, 5) if INTERPRETED else (60_000, 60)
EVERY = pytest.mark.parametrize("name", COMMON)


@pytest.fixture(autouse=True)
def fixed() -> None:
    torch.manual_seed(7)


@pytest.fixture(params=["compiled", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(_proof, "_compiled", lambda: None)
    return str(request.param)


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """All plans that are made, in order."""
    made: list[Any] = []

    class Noted(_planner.StepPlan):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            made.append(weakref.ref(self))

    monkeypatch.setattr(_planner, "StepPlan", Noted)
    return made


# -- other sets of gradients ------------------------------------------------------------


@pytest.mark.usefixtures("way")
@EVERY
def test_another_set_of_gradients_in_each_step(name: str, plans: list[Any]) -> None:
    """As of a mixture of experts: states begin with the first gradient, counters stand still."""
    race = Race(name, parameters(torch.float32, shapes=[(7,), (40, 3), (0,), ()]), COMMON[name])
    sets = [(0,), (1, 2, 3), (0, 1), (3,), (0, 1, 2, 3), (), (2,), (1,)]
    for missing in (*sets, *sets):
        race.step(missing)
        race.check()
    count = len(plans)
    for missing in (*sets, *reversed(sets)):
        race.step(missing)
        race.check()
    assert len(plans) == count


@pytest.mark.usefixtures("way")
def test_a_plan_for_each_first_gradient_only(plans: list[Any]) -> None:
    race = Race("Adam", parameters(torch.float32, shapes=[(5,)] * 4), {"lr": 0.1})
    for k in range(12):
        race.step(missing=[p for p in range(4) if p != k % 4])
        race.check()
    assert len(plans) == 4


@pytest.mark.usefixtures("way")
def test_sets_of_gradients_where_some_are_torchs(plans: list[Any]) -> None:
    """Gradients of another dtype and layout, and parameters with gaps, now and then without."""
    params = [
        Parameter(torch.randn(4, 6)), Parameter(torch.randn(9)), Parameter(torch.randn(10)[::2]),
        Parameter(torch.randn(6, 4)), Parameter(torch.randn(8, dtype=torch.float64)),
    ]  # fmt: skip
    twins = [Parameter(p.detach().clone()) for p in params]
    optimizers = [
        module.SGD(ps, lr=0.1, momentum=0.9)
        for module, ps in ((fastopt.optim, params), (torch.optim, twins))
    ]

    def step(missing: tuple[int, ...]) -> None:
        for k, (p, q) in enumerate(zip(params, twins, strict=True)):
            grad = None if k in missing else torch.randn(p.shape, dtype=p.dtype)
            if k == 3 and grad is not None:
                grad = torch.randn(4, 6).t()
            p.grad, q.grad = grad, None if grad is None else grad.clone()
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(params, twins, strict=True):
            torch.testing.assert_close(p, q)

    sets = [(), (2,), (3,), (2, 3), (0, 1, 4), (0, 3), (1, 2)]
    for missing in sets:
        step(missing)
    count = len(plans)
    for missing in (*sets, *sets):
        step(missing)
    assert len(plans) == count


def test_sparse_gradients_now_and_then(plans: list[Any]) -> None:
    tables = [torch.nn.EmbeddingBag(20, 4, sparse=True) for _ in range(2)]
    twins = copy.deepcopy(tables)
    optimizers = [
        module.SGD([t.weight for t in ts], lr=0.1)
        for module, ts in ((fastopt.optim, tables), (torch.optim, twins))
    ]
    for k in range(10):
        words = torch.randint(20, (3, 5))
        for ts, optimizer in zip((tables, twins), optimizers, strict=True):
            optimizer.zero_grad()
            ts[k % 2](words).sum().backward()
            optimizer.step()
        for t, twin in zip(tables, twins, strict=True):
            torch.testing.assert_close(t.weight, twin.weight)
    assert len(plans) <= 3


def test_no_gradient_needs_no_backend() -> None:
    """Who insists on a kernel isn't refused for what there is nothing to do with."""
    served, odd = Parameter(torch.zeros(3)), Parameter(torch.zeros(3, dtype=torch.complex64))
    optimizer = fastopt.optim.SGD([served, odd], lr=1.0)
    with fastopt.use_backend(BACKEND):
        served.grad = torch.ones(3)
        optimizer.step()
        assert served.tolist() == [-1.0] * 3
        odd.grad = torch.ones(3, dtype=torch.complex64)
        with pytest.raises(fastopt.BackendUnavailable, match="complex64"):
            optimizer.step()
        odd.grad = None
        optimizer.step()
    assert served.tolist() == [-2.0] * 3


# -- other memory -----------------------------------------------------------------------


@pytest.mark.usefixtures("way")
@EVERY
def test_new_memory_in_each_step(name: str, plans: list[Any]) -> None:
    """Of parameters, of gradients, and of states; then all states replaced by others."""
    race = Race(name, parameters(torch.float32, shapes=[(7,), (40, 3), (0,), ()]), COMMON[name])
    race.step()
    race.step()
    count = len(plans)
    for k in range(9):
        for p in race.params[0]:
            if k % 3 != 1:
                p.data = torch.cat((p.data.flatten(), torch.zeros(k)))[: p.numel()].view(p.shape)
            for key, state in race.ours.state[p].items():
                if k % 3 == 1:
                    state.data = state.data.clone()
                elif k % 3 == 2:
                    race.ours.state[p][key] = state.clone()
        race.step()
        race.check()
    assert len(plans) == count


@pytest.mark.usefixtures("way")
def test_moved_onto_each_other() -> None:
    """Parameters that come to share memory in a later step are updated in torch's order."""
    params, twins = ([Parameter(torch.ones(6)) for _ in range(3)] for _ in range(2))
    optimizers = [fastopt.optim.SGD(params, lr=0.5), torch.optim.SGD(twins, lr=0.5)]
    for k in range(6):
        for ps in (params, twins):
            memory = torch.arange(20.0)
            if k % 2:
                ps[0].data, ps[2].data = memory[2:8], memory[7:13]
            else:
                ps[0].data, ps[2].data = memory[2:8], memory[8:14]
            for j, p in enumerate(ps):
                p.grad = p.detach() if k == 4 and j == 1 else torch.full((6,), float(j + k))
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(params, twins, strict=True):
            assert torch.equal(p, q)
        said = {d.backend for d in fastopt.explain(optimizers[0])}
        assert said == {"reference" if k % 2 or k == 4 else BACKEND}


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("offset", [0, 3])
def test_released_while_there_is_no_gradient(offset: int, plans: list[Any]) -> None:
    """As torch, a step lets alone what has no gradient, whatever became of its memory."""
    params = [Parameter(torch.ones(5 + offset)[offset:]) for _ in range(2)]
    optimizer = fastopt.optim.Adam(params, lr=0.1)
    for _ in range(2):
        give_grads(params)
        optimizer.step()
    count = len(plans)
    kept = params[0].detach().clone()
    params[0].untyped_storage().resize_(0)
    params[0].grad = None
    params[1].grad = torch.ones(5)
    optimizer.step()
    params[0].data = kept
    give_grads(params)
    optimizer.step()
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 4]
    assert len(plans) == count


# -- torch's own code, for a time -------------------------------------------------------


def odd_layout(p: Parameter, o: Optimizer) -> None:
    p.grad = torch.ones(3, 4)
    o.step()  # or momentum would begin with the layout of a gradient
    p.grad = torch.ones(4, 3).t()
    o.step()


def shares_memory(p: Parameter, o: Optimizer) -> None:
    p.grad = p.detach()
    o.step()


def negated(p: Parameter, o: Optimizer) -> None:
    p.grad = torch._neg_view(torch.ones(3, 4))
    o.step()


def odd_number(p: Parameter, o: Optimizer) -> None:
    p.grad = torch.ones(3, 4)
    o.param_groups[0]["weight_decay"] = float("inf")
    o.step()
    o.param_groups[0]["weight_decay"] = 0


def inference(p: Parameter, o: Optimizer) -> None:
    p.grad = torch.ones(3, 4)
    o.step()  # or states would be of this mode
    with torch.inference_mode():
        o.step()


def odd_state(p: Parameter, o: Optimizer) -> None:
    p.grad = torch.ones(3, 4)
    o.step()
    name = next(n for n in o.state[p] if n != "step")
    o.state[p][name] = torch.ones(4, 3).t()
    o.step()
    o.state[p][name] = torch.ones(3, 4)


def in_a_mode(p: Parameter, o: Optimizer) -> None:
    p.grad = torch.ones(3, 4)
    with torch.overrides.BaseTorchFunctionMode():
        o.step()


@pytest.mark.parametrize(
    "odd", [odd_layout, shares_memory, negated, odd_number, inference, odd_state, in_a_mode]
)
@EVERY
def test_an_odd_step_passes(name: str, odd: Callable[[Parameter, Optimizer], None]) -> None:
    """What explain says after it is what runs."""
    p = Parameter(torch.zeros(3, 4))
    optimizer = getattr(fastopt.optim, name)([p], **COMMON[name])
    odd(p, optimizer)
    for _ in range(2):
        p.grad = torch.ones(3, 4)
        optimizer.step()
    assert {d.backend for d in fastopt.explain(optimizer)} == {BACKEND}
    assert optimizer._planner.plan.reference == []


# -- what a plan keeps --------------------------------------------------------------------


def kept(module: Any, name: str, change: Callable[[Any, list[Any]], None]) -> list[bool]:
    """Of parameters, gradients and states, whether each is alive after a change."""
    params = [Parameter(torch.ones(10)) for _ in range(3)]
    groups = [{"params": params[:1]}, {"params": params[1:], "lr": torch.tensor(0.5)}]
    optimizer = getattr(module, name)(groups, **COMMON[name] | {"lr": 0.25})
    for _ in range(2):
        give_grads(params)
        optimizer.step()
    tensors = [t for p in params for t in (p, p.grad, *optimizer.state[p].values())]
    refs = [weakref.ref(t) for t in (*tensors, groups[1]["lr"])]
    del tensors, groups
    change(optimizer, params)
    params.clear()
    gc.collect()
    return [ref() is not None for ref in refs]


def replace_states(optimizer: Any, params: list[Any]) -> None:
    for p in params:
        for key, value in optimizer.state[p].items():
            optimizer.state[p][key] = value.clone()


def drop_group(optimizer: Any, params: list[Any]) -> None:
    group = optimizer.param_groups.pop()
    for p in group["params"]:
        del optimizer.state[p]
    optimizer.__dict__["left"] = params[0]


def clear_states(optimizer: Any, params: list[Any]) -> None:
    optimizer.state.clear()


def new_state(optimizer: Any, params: list[Any]) -> None:
    optimizer.state = type(optimizer.state)(dict)


def drop_gradients(optimizer: Any, params: list[Any]) -> None:
    optimizer.zero_grad()


def replace_parameters(optimizer: Any, params: list[Any]) -> None:
    for group in optimizer.param_groups:
        group["params"] = [Parameter(p.detach().clone()) for p in group["params"]]
    optimizer.state.clear()


CHANGES = [replace_states, drop_group, clear_states, new_state, drop_gradients, replace_parameters]


@pytest.mark.usefixtures("way")
@pytest.mark.parametrize("change", CHANGES)
@EVERY
def test_a_plan_keeps_what_torch_keeps(name: str, change: Callable[..., None]) -> None:
    with torch.random.fork_rng():
        expected = kept(torch.optim, name, change)
    assert kept(fastopt.optim, name, change) == expected
    assert not all(expected)


@pytest.mark.usefixtures("way")
@EVERY
def test_others_in_the_place_of_what_is_gone(name: str) -> None:
    """An object may get the address of one that is gone; its memory is another."""
    params: list[list[Any]] = [[Parameter(torch.ones(12)) for _ in range(3)] for _ in range(2)]
    optimizers = [
        getattr(module, name)(ps, **COMMON[name])
        for module, ps in zip((fastopt.optim, torch.optim), params, strict=True)
    ]
    for k in range(20):
        if k % 2:
            place = k % 3
            for ps, optimizer in zip(params, optimizers, strict=True):
                optimizer.state.pop(ps[place], None)
                optimizer.param_groups[0]["params"][place] = None
                ps[place] = None
                ps[place] = Parameter(torch.full((12,), float(k)))
                optimizer.param_groups[0]["params"][place] = ps[place]
        give_grads(*params)
        for optimizer in optimizers:
            optimizer.step()
        for p, q in zip(*params, strict=True):
            torch.testing.assert_close(p, q)
            torch.testing.assert_close(dict(optimizers[0].state[p]), dict(optimizers[1].state[q]))


# -- threads and processes ------------------------------------------------------------------


def together(*works: Callable[[], None]) -> None:
    """Run the first in this thread, and the others over and over until it is done."""
    done, errors = threading.Event(), []

    def repeat(work: Callable[[], None]) -> None:
        try:
            while not done.is_set():
                work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=repeat, args=(work,)) for work in works[1:]]
    for thread in threads:
        thread.start()
    try:
        works[0]()
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not errors, errors


@EVERY
def test_two_threads_step_one_optimizer(name: str) -> None:
    """Each step is a whole one: as many as were taken, whoever took them."""
    params = [Parameter(torch.zeros(n)) for n in (MANY, 3)]
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer = getattr(fastopt.optim, name)(params, **COMMON[name] | {"lr": 2.0**-7})
    counts = [0, 0]

    def steps(k: int) -> Callable[[], None]:
        def work() -> None:
            for _ in range(STEPS // 2):
                optimizer.step()
                counts[k] += 1

        return work

    together(steps(0), steps(1))
    twin = Parameter(torch.zeros(3))
    twin.grad = torch.ones(3)
    expected = getattr(torch.optim, name)([twin], **COMMON[name] | {"lr": 2.0**-7})
    for _ in range(sum(counts)):
        expected.step()
    for p in params:
        torch.testing.assert_close(p[:3], twin, rtol=1e-4, atol=1e-4)
        if "step" in optimizer.state[p]:
            assert optimizer.state[p]["step"].item() == sum(counts)


@EVERY
def test_what_a_launch_reads_is_held(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All that another thread can take away meanwhile: the objects, and the memory inside."""
    params = [Parameter(torch.zeros(50)) for _ in range(3)]
    optimizer = getattr(fastopt.optim, name)(params, **COMMON[name])
    give_grads(params)
    optimizer.step()
    launch, held = Bucket.run, []

    def run(*args: Any) -> None:
        tensors = [t for p in params for t in (p, p.grad, *optimizer.state[p].values())]
        memory = [StorageWeakRef(t.untyped_storage()) for t in tensors]
        assert not any(m.expired() for m in memory)
        del tensors
        for p in params:
            p.grad.data = torch.zeros(50)
            p.grad = None
            p.data = torch.zeros(50)
            for key in optimizer.state[p]:
                optimizer.state[p][key].data = optimizer.state[p][key].clone()
            optimizer.state[p].clear()
        gc.collect()
        held.extend(not m.expired() for m in memory)
        launch(*args)
        held.extend(not m.expired() for m in memory)

    monkeypatch.setattr(Bucket, "run", run)
    thread = threading.Thread(target=optimizer.step)  # not the only one, so another may run
    thread.start()
    thread.join()
    assert held
    assert all(held)
    assert all(torch.equal(p, torch.zeros(50)) for p in params)


@EVERY
def test_memory_taken_away_while_a_step_runs(name: str) -> None:
    """Gradients and states replaced and parameters rebound by another thread, over and over."""
    params = [Parameter(torch.zeros(MANY)) for _ in range(4)]
    optimizer = getattr(fastopt.optim, name)(params, **COMMON[name] | {"lr": 1e-3})
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    turns = cycle(range(4))

    def disturb() -> None:
        p = params[next(turns)]
        p.grad = torch.ones(MANY)  # not by way of None: torch can't bear p.grad read meanwhile
        p.data = p.data.clone()
        state = optimizer.state[p]
        for key in list(state):
            state[key] = state[key].clone()
        torch.full((MANY,), float("nan"))  # in memory that has just become free

    def work() -> None:
        for _ in range(STEPS):
            optimizer.step()

    together(work, disturb)
    for p in params:
        assert p.isfinite().all()


def test_a_step_within_a_step() -> None:
    p = Parameter(torch.zeros(3))
    optimizer = fastopt.optim.SGD([p], lr=1.0)

    left = [0, 1]

    def closure() -> float:
        p.grad = torch.ones(3)
        while left:
            left.pop()
            optimizer.step(closure)
        return 0.0

    optimizer.step(closure)
    assert p.tolist() == [-3.0] * 3


def test_copies_have_plans_of_their_own() -> None:
    p = Parameter(torch.zeros(3))
    optimizer = fastopt.optim.Adam([p])
    p.grad = torch.ones(3)
    optimizer.step()
    for copied in (
        copy.deepcopy(optimizer), copy.copy(optimizer), pickle.loads(pickle.dumps(optimizer)),
        pickle.loads(pickle.dumps(vars(optimizer)["_planner"])),
        copy.deepcopy(vars(optimizer)["_planner"]),
    ):  # fmt: skip
        planner = copied if isinstance(copied, _planner.Planner) else vars(copied).get("_planner")
        assert planner is None or planner.plan is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_forked_while_another_thread_steps() -> None:
    """The lock that the other thread has doesn't stop the child."""
    p = Parameter(torch.zeros(10))
    p.grad = torch.ones(10)
    optimizer = fastopt.optim.SGD([p], lr=1.0)
    optimizer.step()
    inside, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with optimizer._planner._lock:
            inside.set()
            leave.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait()
    child = os.fork()
    if child == 0:
        optimizer.step()
        os._exit(int(p[0] != -2))
    leave.set()
    thread.join()
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


# -- numbers of NumPy's ------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, np.int64, np.int32])
@EACH
def test_numpy_numbers(info: OptimizerInfo, kind: Any) -> None:
    """They count as torch counts them: in half precision what torch computes so."""
    for options in options_of(info):
        numbers = {k: kind(v) for k, v in options.items() if isinstance(v, float) and kind(v) == v}
        options = options | {"lr": kind(0.125) or kind(1)} | numbers
        options = {k: v for k, v in options.items() if not isinstance(v, Tensor)}
        params, twins = ([Parameter(torch.linspace(-1, 1, 50))] for _ in range(2))
        ours = getattr(fastopt.optim, info.name)(params, **options)
        theirs = getattr(torch.optim, info.name)(twins, **options)
        for k in range(5):
            give_grads(params, twins)
            for optimizer in (ours, theirs):
                optimizer.param_groups[0]["lr"] = kind(1) if k == 3 else options["lr"]
                optimizer.step()
            torch.testing.assert_close(params[0], twins[0], rtol=1e-5, atol=1e-5)
        served = ours._takes_halves or kind is not np.float16
        assert {d.backend for d in fastopt.explain(ours)} == {BACKEND if served else "reference"}


@EACH
def test_an_array_as_the_rate_is_torchs(info: OptimizerInfo) -> None:
    params, twins = ([Parameter(torch.linspace(-1, 1, 5))] for _ in range(2))
    outcomes = []
    for module, ps in ((fastopt.optim, params), (torch.optim, twins)):
        optimizer = getattr(module, info.name)(ps, lr=np.array(0.25))
        ps[0].grad = torch.ones(5)
        outcomes.append(outcome(optimizer.step))  # some can't take one, others warn
    assert outcomes[0] == outcomes[1]
    assert torch.equal(params[0], twins[0])

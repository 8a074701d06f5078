"""An optimizer's step inside torch.compile: one operator that changes parameters and states."""

from __future__ import annotations

import copy
import gc
import shutil
import weakref
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE
from race import NAMES
from torch import Tensor
from torch._dynamo.backends.debugging import aot_eager
from torch._dynamo.utils import counters
from torch.nn import Parameter

import fastopt
from fastopt import optim

pytestmark = [
    # torch's own, while it traces or compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:Profiler record function"),
]

EVERY = (*NAMES, "Lion", "Muon", "Adafactor")
#: By their names, what makes states or averages of an optimizer that it has not by default.
OPTIONS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True}, "Adam": {"amsgrad": True},
    "RMSprop": {"momentum": 0.5, "centered": True}, "AdamW": {"max_grad_norm": 0.05},
}  # fmt: skip


class Graphs:
    """A backend of torch.compile that copies what an operator changes, and counts operators."""

    def __init__(self) -> None:
        self.steps = self.compiled = 0

    def backend(self, module: torch.fx.GraphModule, inputs: Any, **kwargs: Any) -> Any:
        self.compiled += 1
        operator = torch.ops.fastopt.optimizer_step.default
        self.steps += sum(node.target is operator for node in module.graph.nodes)
        return aot_eager(module, inputs, **kwargs)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    yield Graphs()
    torch._dynamo.reset()


class Race:
    """The same parameters with an optimizer in a compiled function and an eager one."""

    def __init__(self, name: str, options: dict[str, Any] | None = None, **kwargs: Any) -> None:
        shapes = ((3, 5), (7, 2)) if name == "Muon" else ((3, 5), (7,), ())
        given = kwargs.pop("dtype", torch.float32)
        self.params = [Parameter(torch.randn(shape, dtype=given)) for shape in shapes]
        self.twins = copy.deepcopy(self.params)
        kwargs = {"lr": 0.05, **(OPTIONS.get(name, {}) if options is None else options), **kwargs}
        make = getattr(optim, name)
        self.compiled, self.eager = (make(p, **kwargs) for p in (self.params, self.twins))

    def grads(self, *missing: int) -> None:
        for k, (param, twin) in enumerate(zip(self.params, self.twins, strict=True)):
            param.grad = None if k in missing else torch.randn_like(param)
            twin.grad = None if k in missing else param.grad.clone()

    def check(self) -> None:
        """All the same to the last bit, names and order of states included."""
        for p, twin in zip(self.params, self.twins, strict=True):
            assert torch.equal(p, twin)
        mine, theirs = (o.state_dict()["state"] for o in (self.compiled, self.eager))
        assert list(mine) == list(theirs)
        for place, state in theirs.items():
            assert list(mine[place]) == list(state)
            for name, value in state.items():
                found = mine[place][name]
                assert (value is found is None) or (
                    torch.equal(found, value) and found.dtype == value.dtype
                ), name
        norms = [o.grad_norm for o in (self.compiled, self.eager) if o.grad_norm is not None]
        assert len({float(norm) for norm in norms}) <= 1


@pytest.mark.parametrize("name", EVERY)
def test_one_operator(name: str, graphs: Graphs) -> None:
    """A graph that states begin in, one for all steps with them, whatever the learning rate."""
    race = Race(name)
    step = torch.compile(race.compiled.step, fullgraph=True, backend=graphs.backend)
    for k in range(5):
        race.grads()
        for optimizer in (race.compiled, race.eager):
            optimizer.param_groups[0]["lr"] *= 0.7
        with torch._dynamo.config.patch(error_on_recompile=k >= 2):
            race.compiled.step() if k == 3 else step()
        race.eager.step()
        race.check()
    assert graphs.steps == graphs.compiled <= 2


INDUCTOR = pytest.mark.skipif(
    DEVICE == "cpu" and not shutil.which("g++"),
    reason="inductor needs a C++ compiler (g++) for the CPU",
)


@INDUCTOR
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_inductor(name: str, graphs: Graphs) -> None:
    """Torch's usual compiler has the operator write to the parameters themselves."""
    race = Race(name)
    step = torch.compile(race.compiled.step, fullgraph=True)
    for k in range(4):
        race.grads()
        before = [p._version for p in race.params]
        with torch._dynamo.config.patch(error_on_recompile=k >= 2):
            step()
        race.eager.step()
        race.check()
        assert all(p._version > b for p, b in zip(race.params, before, strict=True))


def trained(race: Race, graphs: Graphs, make: Callable[[Any, list[Parameter]], Any]) -> None:
    """Three steps by a function of an optimizer and its parameters, compiled and not."""
    mine, theirs = make(race.compiled, race.params), make(race.eager, race.twins)
    mine = torch.compile(mine, backend=graphs.backend)
    for _ in range(3):
        race.grads()
        found, expected = mine(), theirs()
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=0, atol=0)
        race.check()


def twice(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    def step() -> Tensor:
        optimizer.step()
        optimizer.step()
        return 3 * params[0].detach()

    return step


def by_a_tensor(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    lr = optimizer.param_groups[0]["lr"]

    def step() -> None:
        lr.mul_(0.5)
        optimizer.step()
        lr.mul_(0.5)
        optimizer.step()

    return step


def with_grads_made_inside(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    def step() -> None:
        for param in params:
            param.grad = 2 * param.grad  # type: ignore[operator]
        optimizer.step()

    return step


def with_the_norm(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    def step() -> Any:
        optimizer.step()
        return 2 * optimizer.grad_norm.double()

    return step


def with_a_closure(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    def step() -> Any:
        return optimizer.step(lambda: params[0].detach().sum())

    return step


@pytest.mark.parametrize(
    ("make", "kwargs"),
    [(twice, {}), (by_a_tensor, {"lr": 0.1}), (with_grads_made_inside, {}),
     (with_the_norm, {"max_grad_norm": 0.1}), (with_a_closure, {})],
    ids=lambda value: getattr(value, "__name__", ""),
)  # fmt: skip
def test_what_a_graph_does_around_a_step(make: Any, kwargs: Any, graphs: Graphs) -> None:
    """It reads what was written before, and others read what it has written."""
    race = Race("Adam", **kwargs)
    if make is by_a_tensor:
        for optimizer in (race.compiled, race.eager):
            optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    trained(race, graphs, make)
    assert graphs.steps >= graphs.compiled > 0


def changed_options(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    options = vars(optimizer)["param_groups"][0]  # not by torch's way to them, see below

    def step() -> None:
        optimizer.step()
        options["lr"] *= 0.5
        optimizer.step()

    return step


def changed_states(optimizer: Any, params: list[Parameter]) -> Callable[[], Any]:
    def step() -> None:
        state = optimizer.state.get(params[0])
        if state is not None:
            state["exp_avg"] = 0.5 * state["exp_avg"]
        optimizer.step()

    return step


@pytest.mark.parametrize("make", [changed_options, changed_states])
def test_changes_before_a_step(make: Any, graphs: Graphs) -> None:
    """What is changed in Python's objects is changed after a graph, so that has to end first."""
    counters.clear()
    trained(Race("Adam"), graphs, make)
    assert "options or states change before its step" in str(counters["graph_break"])
    assert graphs.steps


def test_options_changed_by_torchs_way(graphs: Graphs) -> None:
    """To Dynamo an optimizer whose groups are read has capturable=True: then torch's code steps."""
    race = Race("SGD", {})

    def make(optimizer: Any, params: list[Parameter]) -> Callable[[], None]:
        def step() -> None:
            for group in optimizer.param_groups:
                group["lr"] *= 0.5
            optimizer.step()

        return step

    mine = torch.compile(make(race.compiled, race.params), backend="eager")
    theirs = make(race.eager, race.twins)
    for _ in range(3):
        race.grads()
        mine()
        theirs()
    torch.testing.assert_close(race.params, race.twins)


def test_assigned_attributes(graphs: Graphs) -> None:
    """Torch loses them, or refuses: never is a step one without the limit that has been set."""
    race = Race("Adam")

    def step() -> None:
        race.compiled.max_grad_norm = 0.01
        race.compiled.step()

    race.grads()
    before = copy.deepcopy(race.params)
    with pytest.raises(
        Exception, match=r"max_grad_norm of an optimizer assigned|AttributeMutation"
    ):
        torch.compile(step, backend="eager")()
    for param, old in zip(race.params, before, strict=True):
        assert torch.equal(param, old)


def test_what_comes_later(graphs: Graphs) -> None:
    """A limit, averages, another optimizer or group, a loaded state: each is a graph of its own."""
    race, other = Race("SGD"), Race("SGD")
    step = torch.compile(lambda optimizer: optimizer.step(), backend=graphs.backend)

    def both(race: Race) -> None:
        race.grads()
        step(race.compiled)
        race.eager.step()
        race.check()

    both(race)
    both(other)
    both(race)
    for optimizer in (race.compiled, race.eager):
        optimizer.max_grad_norm = 0.1
    both(race)
    extra = Parameter(torch.ones(4))
    for params, optimizer in ((race.params, race.compiled), (race.twins, race.eager)):
        params.append(copy.deepcopy(extra))
        optimizer.add_param_group({"params": [params[-1]], "lr": 0.5, "momentum": 0.3})
    both(race)
    both(race)
    saved = copy.deepcopy(race.compiled.state_dict())
    both(race)
    for optimizer in (race.compiled, race.eager):
        optimizer.load_state_dict(copy.deepcopy(saved))
    both(race)
    both(other)


@pytest.mark.parametrize("limit", [None, 0.1])
def test_averages_that_come_later(limit: float | None, graphs: Graphs) -> None:
    """They make the step torch's own."""
    models = [torch.nn.Linear(4, 3) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    optimizers = [optim.SGD(m.parameters(), lr=0.1, max_grad_norm=limit) for m in models]
    steps = [torch.compile(optimizers[0].step, backend="eager"), optimizers[1].step]

    def step_both() -> None:
        for parts in zip(*(m.parameters() for m in models), strict=True):
            parts[0].grad = torch.randn_like(parts[0])
            parts[1].grad = parts[0].grad.clone()
        for step in steps:
            step()

    step_both()
    averages = [
        optim.swa_utils.AveragedModel(m, optimizer=o)
        for m, o in zip(models, optimizers, strict=True)
    ]
    for _ in range(2):
        step_both()
    for mine, theirs in zip(*(a.parameters() for a in averages), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert [int(a.n_averaged) for a in averages] == [2, 2]
    assert "averages that follow" in str(fastopt.explain(optimizers[0], compiled=True))


def test_missing_gradients(graphs: Graphs) -> None:
    """Parameters without one stay as they are, and get no states."""
    race = Race("Adam")
    step = torch.compile(race.compiled.step, fullgraph=True, backend=graphs.backend)
    for missing in ((1,), (1,), (0, 2), (), (0, 1, 2), (1,)):
        race.grads(*missing)
        step()
        race.eager.step()
        race.check()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_layouts(dtype: torch.dtype, graphs: Graphs) -> None:
    """Transposed parameters, and a gradient of another layout, for which torch's code steps in."""
    race = Race("SGD", dtype=dtype)
    for params in (race.params, race.twins):
        params[0].data = params[0].detach().t()
    step = torch.compile(race.compiled.step, fullgraph=True, backend=graphs.backend)
    for expanded in (False, True, False):
        race.grads()
        for params in (race.params, race.twins):
            if expanded:
                params[0].grad = torch.ones((), dtype=dtype).expand(5, 3)
        step()
        race.eager.step()
        race.check()


@pytest.mark.parametrize("fused", [False, True])
def test_grad_scaler(fused: bool, graphs: Graphs) -> None:
    """It divides the gradients, or leaves that to the step, and has a step skipped."""
    race = Race("AdamW", {}, fused=fused)
    scalers = [torch.amp.GradScaler(DEVICE, init_scale=64.0) for _ in range(2)]
    race.compiled.step = torch.compile(race.compiled.step, backend=graphs.backend)
    for k in range(4):
        race.grads()
        for params, scaler, optimizer in (
            (race.params, scalers[0], race.compiled), (race.twins, scalers[1], race.eager)
        ):  # fmt: skip
            scaler.scale(torch.ones(()))
            if k == 2:
                params[1].grad[3] = float("inf")  # type: ignore[index]
            scaler.step(optimizer)
            scaler.update()
        race.check()
    assert scalers[0].get_scale() == scalers[1].get_scale() == 32.0
    assert graphs.steps


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "trace_autograd_ops"),
    reason="this torch traces no backward pass of a compiled function",
)
def test_a_whole_training_step(graphs: Graphs) -> None:
    """Forward, backward and step in one graph, whose numbers are the eager step's."""
    nets = [torch.nn.Sequential(torch.nn.Linear(6, 9), torch.nn.Tanh(), torch.nn.Linear(9, 4))]
    nets.append(copy.deepcopy(nets[0]))
    optimizers = [optim.AdamW(net.parameters(), lr=0.01) for net in nets]

    def make(net: torch.nn.Module, optimizer: Any) -> Callable[[Tensor, Tensor], Tensor]:
        def step(x: Tensor, target: Tensor) -> Tensor:
            loss = fastopt.nn.functional.cross_entropy(net(x), target)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    compiled, eager = map(make, nets, optimizers)
    compiled = torch.compile(compiled, fullgraph=True, backend=graphs.backend)
    with torch._dynamo.config.patch(trace_autograd_ops=True):
        for k in range(4):
            x, target = torch.randn(8, 6), torch.randint(4, (8,))
            for net, optimizer in zip(nets, optimizers, strict=True):
                net.zero_grad()
                optimizer.param_groups[0]["lr"] = 0.01 / (k + 1)
            with torch._dynamo.config.patch(error_on_recompile=k >= 2):
                torch.testing.assert_close(compiled(x, target), eager(x, target))
    for mine, theirs in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert graphs.steps == graphs.compiled == 2


def test_what_kernels_do_not_serve(graphs: Graphs) -> None:
    """A step of which no kernel has a part is torch's own, or an error of who insists on them."""
    race = Race("Adam", {})
    for params in (race.params, race.twins):
        for param in params:
            param.data = torch.stack([param.detach()] * 2, -1)[..., 0]  # with gaps
    del race.compiled.param_groups[0]["params"][2], race.eager.param_groups[0]["params"][2]
    explained = fastopt.explain(race.compiled, compiled=True)
    assert {decision.backend for decision in explained} == {"reference"}
    step = torch.compile(race.compiled.step, backend=graphs.backend)
    race.grads()
    with fastopt.use_backend(BACKEND), pytest.raises(Exception, match="gaps or overlaps"):
        step()
    step()
    race.eager.step()
    torch.testing.assert_close(race.params, race.twins)
    assert not graphs.steps


@pytest.mark.parametrize("insisted", [None, "reference", BACKEND])
def test_insisting(insisted: str | None, graphs: Graphs) -> None:
    """Outside of the compiled function and inside of it."""
    race = Race("SGD")

    def inside() -> None:
        with fastopt.use_backend(insisted or BACKEND):
            race.compiled.step()

    expected = "reference" if insisted == "reference" else BACKEND
    outside = torch.compile(race.compiled.step, backend=graphs.backend)
    for step in (outside, torch.compile(inside, backend=graphs.backend)):
        graphs.steps = 0
        for _ in range(2):
            race.grads()
            with nullcontext() if insisted is None else fastopt.use_backend(insisted):
                step()
                explained = fastopt.explain(race.compiled, compiled=True)
                assert {decision.backend for decision in explained} == {expected}
            race.eager.step()
        assert bool(graphs.steps) == (expected == BACKEND)
    torch.testing.assert_close(race.params, race.twins)


def test_nothing_is_kept(graphs: Graphs) -> None:
    """Neither gradients nor the memory of parameters, nor the optimizer."""
    race = Race("Adam")
    step = torch.compile(race.compiled.step, backend="eager")
    for _ in range(2):
        race.grads()
        step()
    kept = [weakref.ref(p.grad.untyped_storage()) for p in race.params]
    kept += [weakref.ref(p.untyped_storage()) for p in race.params]
    for p in race.params:
        p.grad, p.data = None, p.detach().clone()
    gc.collect()
    assert [ref() for ref in kept] == [None] * len(kept)
    name = race.compiled._name_in_graphs
    given = (
        [p.detach() for p in race.params],
        list(race.params),
        [0, 1, 2],
        [],
        [],
        [],
        False,
        None,
    )
    del step, race
    torch._dynamo.reset()
    gc.collect()
    with pytest.raises(RuntimeError, match="no longer there"):
        torch.ops.fastopt.optimizer_step(name, *given)


def test_copies_are_others(graphs: Graphs) -> None:
    """A copy of an optimizer has no part in the graphs of the first."""
    race = Race("Adam")
    step = torch.compile(lambda optimizer: optimizer.step(), backend="eager")
    race.grads()
    step(race.compiled)
    twin = copy.deepcopy(race.compiled)
    before = copy.deepcopy(race.params)
    for param in twin.param_groups[0]["params"]:
        param.grad = torch.ones_like(param)
    step(twin)
    assert twin._name_in_graphs not in (None, race.compiled._name_in_graphs)
    for param, old in zip(race.params, before, strict=True):
        assert torch.equal(param, old)


def test_a_number_that_becomes_a_tensor(graphs: Graphs) -> None:
    """No guard sees it, so the step says so before anything is written."""
    race = Race("SGD")
    step = torch.compile(race.compiled.step, backend="aot_eager")
    for _ in range(2):
        race.grads()
        step()
    race.compiled.param_groups[0]["lr"] = torch.tensor(0.5)
    before = copy.deepcopy(race.params)
    with pytest.raises(RuntimeError, match=r"1 of the groups' options are tensors, and 0 were"):
        step()
    for param, old in zip(race.params, before, strict=True):
        assert torch.equal(param, old)
    torch.compiler.reset()
    step()
    assert not torch.equal(race.params[0], before[0])


def test_a_graph_from_before_a_step(graphs: Graphs) -> None:
    """Its backward pass is refused: what it has saved has been changed."""
    race = Race("SGD")
    step = torch.compile(race.compiled.step, backend="aot_eager")
    race.grads()
    loss = race.params[0].square().sum()
    step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_the_operator_tells_the_truth(graphs: Graphs) -> None:
    """Torch's own check of its schema and of what it says of its result."""
    race = Race("AdamW")
    for _ in range(2):
        race.grads()
        torch.compile(race.compiled.step, backend="eager")()
    states = [s for state in race.compiled.state.values() for s in state.values()]
    names = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq", "step")
    cells = [4 * k + names.index(n) for k, s in enumerate(race.compiled.state.values()) for n in s]
    operator = torch.ops.fastopt.optimizer_step.default
    given = (
        race.compiled._name_in_graphs, [p.detach() for p in race.params],
        [p.grad for p in race.params], [0, 1, 2], states, cells, [], True, None,
    )  # fmt: skip
    torch.library.opcheck(operator, given, test_utils=("test_schema", "test_faketensor"))
    assert torch.Tag.cudagraph_unsafe in operator.tags


def test_sparse_gradients(graphs: Graphs) -> None:
    """They are torch's, as what has no kernel for a graph."""
    weight = Parameter(torch.randn(5, 3))
    optimizer = optim.SparseAdam([weight], lr=0.1)
    (decision,) = fastopt.explain(optimizer, compiled=True)
    assert "sparse gradients inside torch.compile" in str(decision)
    lbfgs = optim.LBFGS([weight])
    assert fastopt.explain(lbfgs, compiled=True)[0].backend == "reference"

"""Losses inside torch.compile and torch.export: the graph has fastopt's operators."""

from __future__ import annotations

import inspect
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, DEVICE, INTERPRETED, assert_as_accurate
from children import run_code
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch._inductor.utils import fresh_cache
from torch.testing._internal.common_methods_invocations import op_db

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.analysis import expected_size
from fastopt.front.call import RECORDS
from fastopt.front.circumstances import traced
from fastopt.front.torch_only import TorchOnly

pytestmark = [
    # torch's own, while it traces or compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore:reduction. .mean. divides"),
]

OPS: dict[str, Any] = {}
for _op in op_db:
    OPS.setdefault(_op.name.removeprefix("nn.functional."), _op)
#: Torch has samples of each but of one whose default distance makes it triplet_margin_loss.
COMPILED = [
    name
    for name, record in RECORDS.items()
    if not issubclass(record, TorchOnly) and name != "triplet_margin_with_distance_loss"
]


class Graphs:
    """A backend of torch.compile that runs what it is given, and counts the operators in it."""

    def __init__(self) -> None:
        self.operators: Counter[str] = Counter()
        self.compiled = 0
        self.backend = aot_autograd(fw_compiler=self._note, bw_compiler=self._note)

    def _note(self, module: torch.fx.GraphModule, example: Any) -> Any:
        self.compiled += 1
        for node in module.graph.nodes:
            if getattr(node.target, "namespace", "") == "fastopt":
                self.operators[node.target._opname] += 1
        return make_boxed_func(module.forward)


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    # Buffers that a backward pass may overwrite are of no use to a second one, as torch says.
    with torch._functorch.config.patch(donated_buffer=False):
        yield Graphs()
    torch._dynamo.reset()


def samples(operation: str, dtype: torch.dtype) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
    """Torch's, evenly thinned: tensors and options, by their names."""
    names = list(inspect.signature(getattr(theirs, operation)).parameters)
    found = []
    for s in OPS[operation].sample_inputs(DEVICE, dtype, requires_grad=False):
        given = {**dict(zip(names, (s.input, *s.args), strict=False)), **s.kwargs}
        tensors = {name: v for name, v in given.items() if isinstance(v, Tensor)}
        options = {name: v for name, v in given.items() if name not in tensors}
        with fastopt.use_backend(BACKEND):
            try:
                fastopt.explain(getattr(ours, operation), **tensors, **options)
            except (fastopt.BackendUnavailable, TypeError, RuntimeError):
                continue  # torch's own, see test_opinfo.py
        found.append((tensors, options))
    return found[:: max(1, len(found) // 3)][:3]


def outcome(
    call: Callable[..., Tensor], tensors: dict[str, Tensor], record: Any, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    """The loss and its gradients, for a grad_output that isn't 1."""
    wanted = getattr(record, "followed", record.operands[:1])
    given = {
        name: t.detach().to(dtype if t.is_floating_point() else t.dtype).requires_grad_(
            name in wanted and t.is_floating_point()
        )
        for name, t in tensors.items()
    }  # fmt: skip
    loss = call(**given)
    upstream = torch.linspace(-1.5, 2.0, loss.numel()).view(loss.shape).to(loss.dtype)
    grads = torch.autograd.grad(loss, [t for t in given.values() if t.requires_grad], upstream)
    return loss.detach(), *grads


@pytest.mark.parametrize("operation", COMPILED)
def test_samples_by_kernels(operation: str, graphs: Graphs) -> None:
    """Torch's samples in one graph, of which each pass is one operator, as accurate as torch."""
    dtype, name = torch.float32, operation
    found = samples(operation, dtype)
    assert found
    for number, (tensors, options) in enumerate(found):

        def call(options: Any = options, **tensors: Tensor) -> Tensor:
            return getattr(ours, name)(**tensors, **options)

        torch._dynamo.reset()
        graphs.operators.clear()
        compiled = torch.compile(call, fullgraph=True, backend=graphs.backend)
        record = RECORDS[operation]
        with fastopt.use_backend(BACKEND):
            mine = outcome(compiled, tensors, record, dtype)
        assert graphs.operators == {f"{name}_forward": 1, f"{name}_backward": 1}, number
        torchs, exact = (
            outcome(lambda **t: getattr(theirs, name)(**t, **options), tensors, record, d)  # noqa: B023
            for d in (dtype, torch.float64)
        )
        for one in zip(mine, torchs, exact, strict=True):
            assert_as_accurate(*one)


def of(operation: str, rows: int = 64, columns: int = 300) -> tuple[Tensor, ...]:
    x = torch.randn(rows, columns)
    if operation == "linear_cross_entropy":
        return x, torch.randn(50, columns), torch.randint(0, 50, (rows,))
    if operation == "cross_entropy":
        return x, torch.randint(0, columns, (rows,))
    return x, torch.randn(rows, columns)


THREE = pytest.mark.parametrize("operation", ["mse_loss", "cross_entropy", "linear_cross_entropy"])


def check(function: Callable[..., Tensor], twin: Callable[..., Tensor], *given: Tensor) -> None:
    """Both alike, the gradients to the first two tensors too."""
    found = []
    for f in (function, twin):
        inputs = [t.detach().requires_grad_(t.is_floating_point()) for t in given]
        loss = f(*inputs)
        loss.sum().backward(retain_graph=True)
        loss.sum().backward()
        found.append((loss, *(t.grad for t in inputs)))
    for m, t in zip(*found, strict=True):
        assert (m is None) == (t is None)
        if m is not None:  # of sums that cancel, of numbers as large as the largest
            size = max(1.0, t.abs().max().item())
            torch.testing.assert_close(m, t, rtol=1.3e-6, atol=1e-5 * size)


@THREE
def test_one_graph_for_all_batches(operation: str, graphs: Graphs) -> None:
    """A second size makes sizes symbols, of which the kernels are told the numbers."""
    compiled = torch.compile(
        lambda *t: getattr(ours, operation)(*t), fullgraph=True, backend=graphs.backend
    )
    for rows in (64, 65, 66, 131):
        with fastopt.use_backend(BACKEND):
            check(compiled, getattr(theirs, operation), *of(operation, rows))
    assert graphs.compiled == 4  # forward and backward, of the first size and of any


@THREE
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_layouts_and_what_is_around(operation: str, reduction: str, graphs: Graphs) -> None:
    """Transposed and expanded inputs, producers and consumers in the graph, autocast."""

    def function(library: Any) -> Callable[..., Tensor]:
        def call(x: Tensor, *rest: Tensor) -> Tensor:
            # (the interpreter rounds bfloat16 as no device does)
            with torch.autocast(DEVICE, dtype=torch.bfloat16, enabled=not INTERPRETED):
                return 3 * getattr(library, operation)(2 * x, *rest, reduction=reduction) + x.sum()

        return call

    compiled = torch.compile(function(ours), fullgraph=True, backend=graphs.backend)
    x, *rest = of(operation, 300, 64) if operation != "cross_entropy" else of(operation, 64, 64)
    for seen in (x, x.t().contiguous().t(), x[:1].expand(len(x), -1)):
        with fastopt.use_backend(BACKEND):
            check(compiled, function(theirs), seen, *rest)
    assert graphs.operators[f"{operation}_forward"] == graphs.compiled // 2 > 0


AUTOMATIC = pytest.mark.skipif(INTERPRETED, reason="the tests let the interpreter serve any size")


@AUTOMATIC
def test_by_size(graphs: Graphs, monkeypatch: pytest.MonkeyPatch) -> None:
    """Below the crossover the loss is part of the compiled code, and use_backend compiles anew."""
    monkeypatch.setattr(RECORDS["cross_entropy"], "compiled_crossover", 10_000)
    compiled = torch.compile(
        lambda *t: ours.cross_entropy(*t), fullgraph=True, backend=graphs.backend, dynamic=False
    )
    check(compiled, theirs.cross_entropy, *of("cross_entropy", 33))
    assert not graphs.operators
    check(compiled, theirs.cross_entropy, *of("cross_entropy", 34))
    assert graphs.operators["cross_entropy_forward"] == 1
    graphs.operators.clear()
    with fastopt.use_backend(BACKEND):
        check(compiled, theirs.cross_entropy, *of("cross_entropy", 33))
    assert graphs.operators["cross_entropy_forward"] == 1
    graphs.operators.clear()
    with fastopt.use_backend("reference"):
        check(compiled, theirs.cross_entropy, *of("cross_entropy", 34))
    assert not graphs.operators


@AUTOMATIC
def test_insisting_inside(graphs: Graphs) -> None:
    """A block of use_backend is traced, too."""

    def function(x: Tensor, y: Tensor) -> Tensor:
        with fastopt.use_backend(BACKEND):
            loss = ours.mse_loss(x, y)
        return loss + ours.l1_loss(x, y)

    def twin(x: Tensor, y: Tensor) -> Tensor:
        return theirs.mse_loss(x, y) + theirs.l1_loss(x, y)

    compiled = torch.compile(function, fullgraph=True, backend=graphs.backend)
    check(compiled, twin, *of("mse_loss"))
    assert graphs.operators == {"mse_loss_forward": 1, "mse_loss_backward": 1}
    assert fastopt.dispatch.insisted_while_tracing() is None


INDUCTOR = pytest.mark.skipif(
    DEVICE == "cpu" and not shutil.which("g++"),
    reason="inductor needs a C++ compiler (g++) for the CPU",
)


@INDUCTOR
@pytest.mark.parametrize("mode", ["default", "reduce-overhead", "max-autotune-no-cudagraphs"])
def test_inductor(mode: str) -> None:
    """With torch's usual compiler, and a model around the loss."""
    torch._dynamo.reset()
    net = torch.nn.Linear(40, 300)

    def step(criterion: Any, x: Tensor, target: Tensor) -> Tensor:
        loss: Tensor = criterion(net(x), target)
        return loss

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    for rows in (64, 64, 65):
        x, target = torch.randn(rows, 40), torch.randint(0, 300, (rows,))
        grads = []
        for call, library in ((compiled, fastopt), (step, torch)):
            net.zero_grad()
            with fastopt.use_backend(BACKEND):
                loss = call(library.nn.CrossEntropyLoss(label_smoothing=0.1), x, target)
            loss.backward()
            grads.append((loss.detach(), *(p.grad.clone() for p in net.parameters())))
        for mine, torchs in zip(*grads, strict=True):
            torch.testing.assert_close(mine, torchs)


@INDUCTOR
def test_graphs_are_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    """By torch, on disk, kernels and all; one that another fastopt has made is another one."""
    x, target = of("cross_entropy")
    operators = inspect.getclosurevars(ours.cross_entropy).nonlocals["operators"]
    with fresh_cache(), fastopt.use_backend(BACKEND):
        for hits, maker in ((0, operators.made_by), (1, operators.made_by), (0, "another")):
            monkeypatch.setattr(operators, "made_by", maker)
            torch._dynamo.reset()
            counters.clear()
            compiled = torch.compile(lambda *t: ours.cross_entropy(*t), fullgraph=True)
            check(compiled, theirs.cross_entropy, x, target)
            assert counters["aot_autograd"]["autograd_cache_hit"] == hits
            assert counters["aot_autograd"]["autograd_cache_miss"] == 1 - hits


@THREE
def test_errors(operation: str, graphs: Graphs) -> None:
    """What is wrong with a call is said as in an eager one, by the run if only that can see it."""
    compiled = torch.compile(
        lambda *t: getattr(ours, operation)(*t), fullgraph=True, backend=graphs.backend
    )
    *tensors, target = of(operation)
    with fastopt.use_backend(BACKEND), pytest.raises(Exception, match=r"size|shape|batch"):
        compiled(*tensors, target[:-1].reshape(-1)[:5])
    if operation == "mse_loss":
        return
    target[3] = 999
    with fastopt.use_backend(BACKEND), pytest.raises(IndexError, match=r"Target 999.*target\[3\]"):
        compiled(*tensors, target)


@pytest.mark.parametrize(
    "given",
    [((), {"reduction": None}), ((None, None, "mean", None, 0), {}), ((), {"weight": 3}),
     ((), {"label_smoothing": 2.0}), ((), {"z_loss": None})],
    ids=str,
)  # fmt: skip
def test_bad_arguments(given: tuple[Any, Any], graphs: Graphs) -> None:
    """They are errors here, too, or what torch makes of them."""
    (x, target), (more, named) = of("cross_entropy"), given

    def call(*tensors: Tensor) -> Tensor:
        return ours.cross_entropy(*tensors, *more, **named)

    compiled = torch.compile(call, fullgraph=True, backend=graphs.backend)
    with pytest.raises(Exception, match=r".") as eager:
        call(x, target)
    with pytest.raises(Exception, match=r".") as traced:
        compiled(x, target)
    assert str(eager.value).splitlines()[0].split("'")[0] in str(traced.value)


def test_warning(graphs: Graphs) -> None:
    """Torch's, of sizes, while the graph is traced."""
    compiled = torch.compile(lambda *t: ours.mse_loss(*t), fullgraph=True, backend=graphs.backend)
    x, y = of("mse_loss")
    warned = pytest.warns(UserWarning, match="Using a target size")
    with fastopt.use_backend(BACKEND), warned:
        found = compiled(x, y[:1])
    torch.testing.assert_close(found, (x - y[:1]).square().mean())
    assert graphs.operators == {"mse_loss_forward": 1}


@pytest.mark.skipif(BACKEND != "numba", reason="refused for want of a GPU or the interpreter")
def test_refusal(graphs: Graphs) -> None:
    """A backend that is insisted on and can't serve a call is an error here as well."""
    compiled = torch.compile(lambda *t: ours.mse_loss(*t), fullgraph=True, backend=graphs.backend)
    with fastopt.use_backend("triton"), pytest.raises(Exception, match="triton"):
        compiled(*of("mse_loss"))


@pytest.mark.parametrize(("operation", "compiled"), [("mse_loss", False), ("cross_entropy", True)])
def test_a_size_that_nobody_knows(operation: str, compiled: bool) -> None:
    """It is large, but a kernel that never pays doesn't pay."""
    nobody_knows = SimpleNamespace(node=SimpleNamespace(hint=None))
    with traced():
        assert (expected_size(nobody_knows) >= RECORDS[operation].compiled_crossover) == compiled


@AUTOMATIC
def test_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(RECORDS["cross_entropy"], "compiled_crossover", 10_000)
    explained = [
        fastopt.explain(ours.cross_entropy, *of("cross_entropy", rows), compiled=True)[0].backend
        for rows in (33, 34)
    ]
    assert explained == ["reference", "numba" if DEVICE == "cpu" else "triton"]
    (decision,) = fastopt.explain(fastopt.nn.MSELoss(), *of("mse_loss"), compiled=True)
    assert "torch's own code is at least as fast at any size" in str(decision)
    with fastopt.use_backend(BACKEND):
        (decision,) = fastopt.explain(fastopt.nn.MSELoss(), *of("mse_loss"), compiled=True)
    assert decision.backend == BACKEND
    average = fastopt.optim.swa_utils.AveragedModel(torch.nn.Linear(2, 2))
    with pytest.raises(TypeError, match="compiled=True is for losses and optimizers"):
        fastopt.explain(average, average.module, compiled=True)


def test_create_graph() -> None:
    """The operator is differentiable in second order where it is run by itself."""
    x, y = of("mse_loss")
    x.requires_grad_()
    found = []
    for function in (torch.ops.fastopt.mse_loss, theirs.mse_loss):
        (grad,) = torch.autograd.grad(function(x, y), x, create_graph=True)
        found.append(torch.autograd.grad(grad.square().sum(), x)[0])
    torch.testing.assert_close(*found)


@THREE
def test_vmap(operation: str, graphs: Graphs) -> None:
    def per_sample(library: Any) -> Callable[..., Tensor]:
        def of_one(*one: Tensor) -> Tensor:
            return getattr(library, operation)(*one)

        if operation == "linear_cross_entropy":
            return lambda x, w, t: torch.func.vmap(of_one, (0, None, 0))(x, w, t)
        return torch.func.vmap(of_one)

    compiled = torch.compile(per_sample(ours), fullgraph=True, backend=graphs.backend)
    given = of(operation)
    torch.testing.assert_close(compiled(*given), per_sample(theirs)(*given))


@THREE
def test_operators_tell_the_truth(operation: str) -> None:
    """Torch's own check of schemas, mutation, and what operators say of sizes and strides."""
    operators = torch.ops.fastopt
    x, *rest = of(operation)
    kind: Any = RECORDS[operation]
    record = kind()
    values = [getattr(record, name) for name in record.__dataclass_fields__]
    for seen in (x, x.t().contiguous().t()):
        tensors = (seen, *rest, *[None] * (len(kind.operands) - 1 - len(rest)))
        needs = [True] + [False] * (len(kind.operands) - 1)
        for reduction in ("mean", "none"):
            call = (*tensors, *values, reduction, torch.float32, BACKEND, needs)
            forward = getattr(operators, f"{operation}_forward").default
            backward = getattr(operators, f"{operation}_backward").default
            tests = ("test_schema", "test_faketensor")
            torch.library.opcheck(forward, call, test_utils=tests)
            loss, grads = forward(*call)
            torch.library.opcheck(backward, (torch.ones_like(loss), grads, *call), test_utils=tests)


def test_a_module_is_loaded_again() -> None:
    """As in a notebook: what has been defined is defined anew."""
    run_code(f"""
import importlib, torch, fastopt
from fastopt.nn import soft_margin
x = torch.randn(64, 300)
expected = torch.nn.functional.soft_margin_loss(x, x.sign())
for _ in range(2):
    function = importlib.reload(soft_margin).soft_margin_loss
    with fastopt.use_backend({BACKEND!r}):
        for call in (function, torch.ops.fastopt.soft_margin_loss):
            torch.testing.assert_close(call(x, x.sign()), expected)
""")


@pytest.mark.parametrize("operation", ["mse_loss", "linear_cross_entropy"])
def test_no_grad(operation: str, graphs: Graphs) -> None:
    """Then no gradient is computed, neither early nor late."""
    compiled = torch.compile(
        lambda *t: getattr(ours, operation)(*t), fullgraph=True, backend=graphs.backend
    )
    given = [t.requires_grad_(t.is_floating_point()) for t in of(operation)]
    module = fastopt.dispatch.load(BACKEND)
    with (
        torch.no_grad(),
        fastopt.use_backend(BACKEND),
        mock.patch.object(module, "forward", wraps=module.forward) as forward,
    ):
        torch.testing.assert_close(compiled(*given), getattr(theirs, operation)(*given))
    assert [any(call.args[2]) for call in forward.call_args_list] == [False]


def test_exported_program_in_another_process(tmp_path: Path) -> None:
    """It has the operator: a process with fastopt runs it, one without says what it lacks."""

    class Loss(torch.nn.Module):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return fastopt.nn.functional.cross_entropy(input, target)

    given = of("cross_entropy", 1024, 600)
    path = tmp_path / "loss.pt2"
    torch.export.save(torch.export.export(Loss(), given), path)
    torch.save(given, tmp_path / "given.pt")
    program = f"""
import torch
{{}}
program = torch.export.load({str(path)!r})
given = torch.load({str(tmp_path / "given.pt")!r})
print(program.module()(*given).item())
"""
    outputs = [
        subprocess.run([sys.executable, "-c", program.format(line)], capture_output=True, text=True)
        for line in ("import fastopt", "")
    ]
    assert float(outputs[0].stdout) == pytest.approx(theirs.cross_entropy(*given).item())
    assert outputs[1].returncode != 0
    assert "fastopt" in outputs[1].stderr

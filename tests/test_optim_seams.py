"""Whoever has a say in a step of torch's has it here: modes, transforms, overrides, patches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from race import EACH, INFOS, accepted, outcome
from torch import Tensor
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.testing._internal.common_optimizers import OptimizerInfo
from torch.utils._python_dispatch import TorchDispatchMode

import fastopt
from fastopt.optim._seams import torchs_parts


def one_step(module: Any, info: OptimizerInfo, around: Callable[[], Any] | None = None) -> Tensor:
    """A parameter after two steps, the second one inside of something."""
    p = Parameter(torch.linspace(-1, 1, 6))
    optimizer = getattr(module, info.name)([p], lr=0.5)
    p.grad = torch.ones(6)
    optimizer.step()
    if around is None:
        optimizer.step()
    else:
        with around():
            optimizer.step()
            if module is fastopt.optim:
                (decision,) = fastopt.explain(optimizer)
                assert decision.backend == "reference"
                with fastopt.use_backend("numba"), pytest.raises(fastopt.BackendUnavailable):
                    optimizer.step()
    return p.detach()


@EACH
def test_what_a_dispatch_mode_sees(info: OptimizerInfo) -> None:
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            names.append(f._schema.name)
            return f(*args, **(kwargs or {}))

    found = []
    for module in (torch.optim, fastopt.optim):
        names: list[str] = []
        found.append((one_step(module, info, Seen), [n for n in names if n.endswith("_")]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] != []


@EACH
def test_what_a_function_mode_sees(info: OptimizerInfo) -> None:
    class Seen(TorchFunctionMode):
        def __torch_function__(self, f: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if not getattr(f, "__name__", "__").startswith("__"):
                names.append(f.__name__)
            return f(*args, **(kwargs or {}))

    found = []
    for module in (torch.optim, fastopt.optim):
        names: list[str] = []
        found.append((one_step(module, info, Seen), [n for n in names if n.endswith("_")]))
    torch.testing.assert_close(found[0][0], found[1][0])
    assert found[0][1] == found[1][1] != []


@EACH
def test_a_default_device_is_no_reason(info: OptimizerInfo) -> None:
    p = Parameter(torch.zeros(6))
    optimizer = getattr(fastopt.optim, info.name)([p], lr=0.5)
    with torch.device("cpu"):
        p.grad = torch.ones(6)
        optimizer.step()
        assert {d.backend for d in fastopt.explain(optimizer)} != {"reference"}


@EACH
def test_a_traced_step(info: OptimizerInfo) -> None:
    """The graph of a step does what the step does."""

    def replayed(module: Any) -> list[Any]:
        p = Parameter(torch.zeros(6))
        optimizer = getattr(module, info.name)([p], lr=0.5)
        p.grad = torch.ones(6)
        optimizer.step()  # states have to be there before

        def step(grad: Tensor) -> Tensor:
            p.grad = grad
            optimizer.step()
            return p.detach() * 1

        try:
            graph = make_fx(step)(torch.full((6,), 2.0))
        except RuntimeError as error:  # torch's step reads a number in it
            return [str(error)]
        with torch.no_grad():
            p.fill_(1.0)
            first = graph(torch.full((6,), 3.0))
        p.grad = torch.full((6,), 4.0)  # and steps go on
        optimizer.step()
        return [first, p.detach()]

    ours, theirs = map(replayed, (fastopt.optim, torch.optim))
    reads = ("Adam", "Adagrad", "RAdam", "NAdam", "ASGD")
    assert info.name.startswith(reads) or len(ours) == 2
    if isinstance(theirs[0], str):
        assert ours == theirs
    else:
        torch.testing.assert_close(ours, theirs)


@EACH
def test_a_step_within_a_transform(info: OptimizerInfo) -> None:
    """A step of plain tensors while a function is transformed: torch refuses it."""

    def stepped(module: Any) -> tuple[Any, ...]:
        p = Parameter(torch.zeros(6))
        optimizer = getattr(module, info.name)([p], lr=0.5)

        def function(x: Tensor) -> Tensor:
            p.grad = torch.ones(6)
            optimizer.step()
            return (x * x).sum()

        error = outcome(lambda: torch.func.grad(function)(torch.ones(3)).tolist())
        return (*error, p.tolist())

    assert stepped(fastopt.optim) == stepped(torch.optim)


@pytest.mark.parametrize("where", ["subclass", "instance", "class assigned"])
@EACH
def test_an_overridden_part(info: OptimizerInfo, where: str) -> None:
    """A subclass that drops or changes gradients as they are collected."""

    def stepped(module: Any) -> Tensor:
        base = getattr(module, info.name)

        def doubled(self: Any, group: Any, params: Any, grads: Any, *rest: Any) -> Any:
            result = base._init_group(self, group, params, grads, *rest)
            grads[:] = [2 * g for g in grads]
            return result

        kind = type(info.name, (base,), {"_init_group": doubled})
        p = Parameter(torch.linspace(-1, 1, 6))
        optimizer = (kind if where == "subclass" else base)(
            [p], lr=0.5, **accepted(info.name, weight_decay=0.1)
        )
        p.grad = torch.ones(6)
        optimizer.step()
        if where == "instance":
            optimizer._init_group = doubled.__get__(optimizer)
        elif where == "class assigned":
            optimizer.__class__ = kind
        for _ in range(2):
            optimizer.step()
        if module is fastopt.optim:
            assert "a _init_group of its own" in str(fastopt.explain(optimizer))
            if where == "instance":
                del optimizer._init_group
                optimizer.step()
                assert optimizer._planner.plan.reference == []
                return p.detach()
        elif where == "instance":
            del optimizer._init_group
            optimizer.step()
        return p.detach()

    torch.testing.assert_close(stepped(fastopt.optim), stepped(torch.optim))


@EACH
def test_a_patched_part(info: OptimizerInfo, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own function, replaced by who wants to see or change its arguments."""
    parts = torchs_parts(getattr(torch.optim, info.name))
    name = next(n for n, _ in parts.functions if info.name.lower().startswith(n))
    function = dict(parts.functions)[name]
    seen = []

    def patched(params: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(len(params))
        return function(params, *args, **kwargs)

    p = Parameter(torch.zeros(6))
    optimizer = getattr(fastopt.optim, info.name)([p], lr=0.5)
    p.grad = torch.ones(6)
    optimizer.step()
    with monkeypatch.context() as patch:
        patch.setitem(parts.module, name, patched)
        optimizer.step()
        assert f"another {name} in" in str(fastopt.explain(optimizer))
    assert seen == [1]
    optimizer.step()
    assert seen == [1]


@pytest.mark.parametrize(
    "info",
    [i for i in INFOS if not getattr(fastopt.optim, i.name)._made_early],
    ids=lambda i: i.name,
)
def test_lazy_parameters(info: OptimizerInfo) -> None:
    """Before a lazy module knows its sizes there is nothing to update, and explain says why."""

    def trained(module: Any) -> list[Tensor]:
        torch.manual_seed(3)
        model = torch.nn.Sequential(torch.nn.LazyLinear(4), torch.nn.Tanh(), torch.nn.LazyLinear(2))
        optimizer = getattr(module, info.name)(model.parameters(), lr=0.1)
        for _ in range(2):
            optimizer.step()
        if module is fastopt.optim:
            said = str(fastopt.explain(optimizer))
            assert "a parameter of type UninitializedParameter, whose size isn't known yet" in said
        for _ in range(3):
            optimizer.zero_grad()
            model(torch.ones(5, 3)).square().mean().backward()
            optimizer.step()
        if module is fastopt.optim:
            assert optimizer._planner.plan.reference == []
        return [p.detach() for p in model.parameters()]

    for ours, theirs in zip(trained(fastopt.optim), trained(torch.optim), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)

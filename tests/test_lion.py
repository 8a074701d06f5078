"""Lion: torch has none, so its plain definition in torch's operations stands for torch's."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import BACKEND, FLOATS, SHAPES
from race import accepted, give_grads, layout, outcome, parameters, replica
from torch import Tensor
from torch.nn import Parameter

import fastopt
from fastopt.optim import Lion
from fastopt.optim.lion import PlainLion

OPTIONS: list[dict[str, Any]] = [
    {},
    {"lr": 0.1, "betas": (0.5, 0.75), "weight_decay": 0.2},
    {"lr": 0.01, "betas": (0.0, 0.9), "maximize": True},
    {"lr": torch.tensor(0.01), "betas": (0.9, torch.tensor(0.8)), "weight_decay": 0.1},
]
EACH = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: ",".join(o) or "default")


def pair(params: list[Parameter], **options: Any) -> tuple[Lion, PlainLion, list[Parameter]]:
    copies = replica(params)
    return Lion(params, **options), PlainLion(copies, **options), copies


def rule(options: dict[str, Any], p: Tensor, m: Tensor, g: Tensor) -> tuple[Tensor, ...]:
    """Parameter and momentum after a step, and what the sign is of, in float64."""
    lr, decay = float(options.get("lr", 1e-4)), options.get("weight_decay", 0.0)
    beta1, beta2 = map(float, options.get("betas", (0.9, 0.99)))
    g = -g if options.get("maximize") else g
    c = beta1 * m + (1 - beta1) * g
    return p - lr * (c.sign() + decay * p), beta2 * m + (1 - beta2) * g, c


def exp_avg(optimizer: Lion, p: Tensor) -> Tensor:
    """In float64; zeros before the first step."""
    state = optimizer.state.get(p, {})
    return state.get("exp_avg", torch.zeros_like(p)).double().clone()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EACH
def test_updates(options: dict[str, Any], dtype: torch.dtype) -> None:
    """Each step against the rule, from where the step began.

    Where both terms of a sign's argument all but cancel, rounding decides; in no other place.
    """
    params = parameters(dtype, shapes=SHAPES)
    optimizer = Lion(params, **options)
    eps = torch.finfo(dtype).eps
    for missing in ((), (1, 4), (0, 7)):
        give_grads(params, missing=missing)
        before = [(p.detach().double().clone(), p._version) for p in params]
        states = [exp_avg(optimizer, p) for p in params]
        with fastopt.use_backend(BACKEND):
            optimizer.step()
        for p, (old, version), m in zip(params, before, states, strict=True):
            if p.grad is None:
                assert torch.equal(p.double(), old)
                assert p._version == version
                continue
            right, new_m, sum_ = rule(options, old, m, p.grad.double())
            sure = (sum_.abs() > 1e-6) | (sum_ == 0)
            assert sure.sum() >= sure.numel() - 2
            scale = old.abs().max().item() if old.numel() else 0.0
            torch.testing.assert_close(p.double()[sure], right[sure], rtol=eps, atol=eps * scale)
            assert p._version > version
            found = optimizer.state[p]["exp_avg"]
            assert found.dtype == dtype
            assert found.stride() == p.stride()
            smallest = torch.finfo(dtype).smallest_normal
            torch.testing.assert_close(found.double(), new_m, rtol=eps, atol=eps + smallest)
    assert {d.backend for d in fastopt.explain(optimizer)} == {BACKEND}


@EACH
def test_as_the_plain_definition(options: dict[str, Any]) -> None:
    params = parameters(torch.float64, shapes=SHAPES)
    ours, plain, copies = pair(params, **options)
    for missing in ((2,), (), (0, 7)):
        give_grads(params, copies, missing=missing)
        with fastopt.use_backend(BACKEND):
            ours.step()
        plain.step()
    torch.testing.assert_close(params, copies, rtol=1e-13, atol=1e-13)
    assert layout(ours) == layout(plain)
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(ours.state[p], plain.state[q], rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize(("g", "change"), [(2.0, -1.0), (-1e-30, 1.0), (0.0, 0.0), (-0.0, 0.0)])
def test_the_size_of_a_step(g: float, change: float) -> None:
    """It is the learning rate, however large or small a gradient is."""
    p = Parameter(torch.full((70,), 3.0))
    optimizer = Lion([p], lr=0.5)
    p.grad = torch.full_like(p, g)
    with fastopt.use_backend(BACKEND):
        optimizer.step()
    assert torch.equal(p.detach(), torch.full((70,), 3.0 + 0.5 * change))


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 3e38])
def test_extremes(value: float) -> None:
    params = [Parameter(torch.zeros(70))]
    ours, plain, copies = pair(params, lr=0.5)
    for number in (1.0, value, 1.0, -value):
        for some in (params, copies):
            some[0].grad = torch.full((70,), number)
            some[0].grad[3] = -1.0
        with fastopt.use_backend(BACKEND):
            ours.step()
        plain.step()
        assert torch.equal(params[0], copies[0])
        torch.testing.assert_close(
            ours.state[params[0]]["exp_avg"], plain.state[copies[0]]["exp_avg"],
            rtol=1e-6, atol=1e-6 * (3e38 if value == 3e38 else 1.0), equal_nan=True,
        )  # fmt: skip


def test_what_no_kernel_serves() -> None:
    """Gaps in memory, and complex numbers, among others, in two groups."""
    memory = torch.randn(6, 8, dtype=torch.float64)
    params = [
        Parameter(memory[:, ::2]),
        Parameter(torch.randn(5, dtype=torch.float64)),
        Parameter(torch.randn(4, dtype=torch.complex128)),
    ]
    between = memory[:, 1::2].clone()
    copies = replica(params)
    ours, plain = (
        kind([{"params": p[:1]}, {"params": p[1:], "lr": 0.3, "weight_decay": 0.1}], lr=0.1)
        for kind, p in ((Lion, params), (PlainLion, copies))
    )
    for _ in range(3):
        give_grads(params, copies)
        ours.step()
        plain.step()
    torch.testing.assert_close(params, copies, rtol=1e-13, atol=1e-13)
    assert [d.backend for d in fastopt.explain(ours)] == ["reference", BACKEND, "reference"]
    assert torch.equal(memory[:, 1::2], between)


def test_differentiable() -> None:
    """Through the decay and the momentum; a sign has no slope."""
    found = []
    for kind in (Lion, PlainLion):
        start = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64, requires_grad=True)
        lr = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
        p = start.clone()
        optimizer = kind([p], lr=lr, weight_decay=0.5, differentiable=True)
        p.grad = torch.tensor([1.0, 1.0, -1.0], dtype=torch.float64)
        optimizer.step()
        found.append(torch.autograd.grad(p.sum(), (start, lr)))
    torch.testing.assert_close(found[0], found[1])
    torch.testing.assert_close(found[0][0], torch.full((3,), 0.95, dtype=torch.float64))
    # minus the signs and half of the numbers, added up
    torch.testing.assert_close(found[0][1], torch.tensor(-2.0, dtype=torch.float64))


@pytest.mark.parametrize("overflow", [False, True])
@pytest.mark.parametrize("kind", [Lion, PlainLion])
def test_grad_scaler(kind: Any, overflow: bool) -> None:
    """With fused=True the step has scale and verdict, and else the gradients as they are."""
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        p = Parameter(torch.randn(70))
        optimizer = kind([p], lr=0.1, fused=fused)
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for k in range(3):
            p.grad = None
            factor = torch.randn(70)
            scaler.scale((p * factor).sum()).backward()
            if overflow and k == 1:
                p.grad[5] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        results.append((p.detach(), optimizer.state[p]["exp_avg"], scaler.get_scale()))
    assert results[0][2] == results[1][2] == (4.0 if overflow else 8.0)
    torch.testing.assert_close(results[0][:2], results[1][:2])


@pytest.mark.parametrize("kind", [Lion, PlainLion])
@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"lr": -1.0}, (ValueError, "Invalid learning rate: -1.0")),
        ({"lr": torch.ones(2)}, (ValueError, "Tensor lr must be 1-element")),
        ({"betas": (1.0, 0.5)}, (ValueError, "Invalid beta parameter at index 0: 1.0")),
        ({"betas": (0.5, -0.5)}, (ValueError, "Invalid beta parameter at index 1: -0.5")),
        ({"weight_decay": -0.1}, (ValueError, "Invalid weight_decay value: -0.1")),
        (
            {"fused": True, "differentiable": True},
            (RuntimeError, "`fused` does not support `differentiable`"),
        ),
    ],
    ids=str,
)
def test_errors(kind: Any, options: dict[str, Any], error: Any) -> None:
    """Where Adam has the option its error is the same, but for one number's name."""
    assert outcome(lambda: kind([Parameter(torch.ones(3))], **options)) == error
    its = outcome(lambda: torch.optim.Adam([Parameter(torch.ones(3))], **options))
    assert its == error
    assert accepted("Adam", **options) == options


def test_sparse_gradients() -> None:
    words = torch.nn.Embedding(5, 3, sparse=True)
    words(torch.tensor([1])).sum().backward()
    before = words.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        Lion(words.parameters()).step()
    assert torch.equal(words.weight, before)


def test_checkpoints() -> None:
    params = parameters(torch.float32)
    ours, plain, copies = pair(params, lr=0.01)
    give_grads(params, copies)
    ours.step()
    plain.step()
    again, other = Lion(params), PlainLion(copies)
    again.load_state_dict(copy.deepcopy(plain.state_dict()))
    other.load_state_dict(copy.deepcopy(ours.state_dict()))
    pickled = pickle.loads(pickle.dumps(again))
    assert type(pickled) is Lion
    assert repr(pickled) == repr(again) == repr(ours)
    give_grads(params, copies)
    again.step()
    other.step()
    torch.testing.assert_close(params, copies)


def test_convert_says_that_torch_has_none() -> None:
    optimizer = Lion([Parameter(torch.ones(3))])
    assert fastopt.convert(optimizer) is optimizer
    with pytest.raises(TypeError, match=r"cannot convert an object of fastopt\.optim\.lion\.Lion "):
        fastopt.convert(optimizer, to="torch")
    assert type(optimizer) is Lion


def test_clipping() -> None:
    params = parameters(torch.float32, shapes=((5,), (70,)))
    ours, plain, copies = pair(params, lr=0.1, betas=(0.5, 0.5))
    ours.max_grad_norm = 0.5
    for _ in range(3):
        give_grads(params, copies)
        ours.step()
        norm = torch.nn.utils.clip_grad_norm_(copies, 0.5)
        plain.step()
        torch.testing.assert_close(ours.grad_norm.float(), norm)
    torch.testing.assert_close(params, copies)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_compiled() -> None:
    """What torch.compile makes of it is the plain definition."""
    torch.compiler.reset()
    params = parameters(torch.float32, shapes=((5,), (7, 3)))
    ours, plain, copies = pair(params, lr=0.1, weight_decay=0.1)
    step = torch.compile(ours.step, backend="eager")
    for _ in range(2):
        give_grads(params, copies)
        step()
        plain.step()
    torch.testing.assert_close(params, copies)

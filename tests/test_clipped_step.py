"""max_grad_norm: a step that clips is torch's clip_grad_norm_ and torch's step."""

from __future__ import annotations

import copy
import math
import pickle
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED
from race import EACH, give_grads, options_of, outcome, parameters, replica
from torch.nn import Parameter
from torch.nn.utils import clip_grad_norm_
from torch.testing._internal.common_optimizers import OptimizerInfo

import fastopt

DOUBLE = torch.float64


def pair(
    name: str, params: list[Parameter], most: float | None, **options: Any
) -> tuple[Any, Any, list[Parameter]]:
    """Our optimizer of some parameters, torch's of their copies, and these."""
    copies = replica(params)
    ours = getattr(fastopt.optim, name)(params, **copy.deepcopy(options), max_grad_norm=most)
    return ours, getattr(torch.optim, name)(copies, **copy.deepcopy(options)), copies


@pytest.mark.parametrize("most", [0.0, 0.3, 1e3, math.inf])
@EACH
def test_values(info: OptimizerInfo, most: float) -> None:
    """Of every size of a factor; the gradients are left as they are."""
    params = parameters(DOUBLE, shapes=[(5,), (3, 7), (), (0,)])
    ours, theirs, copies = pair(info.name, params, most, **options_of(info)[-1])
    for missing in ((), (1,), (0, 2)):
        give_grads(params, copies, missing=missing)
        before = [None if p.grad is None else p.grad.clone() for p in params]
        expected = clip_grad_norm_(copies, most)
        theirs.step()
        with fastopt.use_backend(BACKEND):
            ours.step()
        torch.testing.assert_close(ours.grad_norm, expected, rtol=1e-12, atol=0)
        for grad, p in zip(before, params, strict=True):
            assert (grad is None) == (p.grad is None)
            assert grad is None or torch.equal(grad, p.grad)
    torch.testing.assert_close(params, copies, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
def test_what_is_not_finite(value: float) -> None:
    params = parameters(DOUBLE, shapes=[(5,), (3,)])
    ours, theirs, copies = pair("SGD", params, 1.0, momentum=0.9)
    give_grads(params, copies)
    for p in (params[0], copies[0]):
        p.grad[2] = value
    clip_grad_norm_(copies, 1.0)
    theirs.step()
    ours.step()
    torch.testing.assert_close(params, copies, equal_nan=True)
    assert not ours.grad_norm.isfinite()
    assert params[0].isnan().any()


def test_large_halves() -> None:
    """Whose norm float16 can't hold, which makes torch's factor 0."""
    p = Parameter(torch.zeros(100_000, dtype=torch.float16))
    p.grad = torch.full_like(p, 300.0)
    optimizer = fastopt.optim.SGD([p], lr=1.0, max_grad_norm=1000.0)
    with fastopt.use_backend(BACKEND):
        optimizer.step()
    assert abs(p[0] + 3.162) < 0.01
    assert abs(optimizer.grad_norm - 300 * 100_000**0.5) < 1


def mixed() -> list[Parameter]:
    return [
        *parameters(torch.float32, DOUBLE, torch.complex64, shapes=[(4,)]),
        Parameter(torch.randn(6, 8)[:, ::2]),
    ]


@pytest.mark.parametrize("backend", [None, "reference"])
def test_what_is_torchs(backend: str | None) -> None:
    """Torch's norm of several dtypes, and torch's steps, take the same factor."""
    params = mixed()
    ours, theirs, copies = pair("Adam", params, 0.5)
    for _ in range(3):
        give_grads(params, copies)
        clip_grad_norm_(copies, 0.5)
        theirs.step()
        with fastopt.use_backend(backend) if backend else nullcontext():
            ours.step()
    torch.testing.assert_close(params, copies)


def test_insisting() -> None:
    """Nothing is changed where a backend can't have the norm."""
    params = mixed()[:2]
    ours, _, copies = pair("Adam", params, 0.5)
    give_grads(params)
    with fastopt.use_backend(BACKEND), pytest.raises(fastopt.BackendUnavailable, match="dtypes"):
        ours.step()
    assert all(map(torch.equal, params, copies))
    assert not ours.state


def test_a_step_of_its_own() -> None:
    """What a subclass overrides is followed, with the gradients scaled."""

    class Counted(fastopt.optim.Adam):
        groups = 0

        def _init_group(self, *args: Any, **kwargs: Any) -> Any:
            self.groups += 1
            return super()._init_group(*args, **kwargs)

    params = parameters(DOUBLE, shapes=[(4,), (5,)])
    copies = replica(params)
    ours, theirs = Counted(params, max_grad_norm=0.5), torch.optim.Adam(copies)
    for _ in range(3):
        give_grads(params, copies)
        before = params[0].grad.clone()
        clip_grad_norm_(copies, 0.5)
        theirs.step()
        ours.step()
        assert torch.equal(params[0].grad, before)
    torch.testing.assert_close(params, copies, rtol=1e-12, atol=1e-12)
    assert ours.groups == 3


def test_it_may_change() -> None:
    params = parameters(DOUBLE, shapes=[(40,)])
    ours, theirs, copies = pair("SGD", params, None, lr=0.1)
    for most in (None, 0.5, 0.25, None, 1e-3):
        give_grads(params, copies)
        if most is not None:
            clip_grad_norm_(copies, most)
        ours.max_grad_norm = most
        theirs.step()
        ours.step()
        torch.testing.assert_close(params, copies, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("overflows", [False, True])
@pytest.mark.parametrize("torchs", [False, True])
def test_grad_scaler(torchs: bool, overflows: bool) -> None:
    """The norm is that of unscaled gradients; a step that it skips changes nothing."""
    params = parameters(torch.float32, shapes=[(40,), (3, 5)])
    ours, theirs, copies = pair("AdamW", params, 0.5, fused=True)
    if torchs:
        ours._init_group = ours._init_group  # which torch's step has to follow
    scaler, its = (torch.amp.GradScaler(DEVICE, init_scale=1024.0) for _ in range(2))
    for step in range(3):
        for some, a_scaler in ((params, scaler), (copies, its)):
            torch.manual_seed(step)
            loss = sum((p * torch.randn_like(p)).sum() for p in some)
            a_scaler.scale(loss).backward()
        if overflows and step == 1:
            params[0].grad[3] = copies[0].grad[3] = math.inf
        its.unscale_(theirs)
        norm = clip_grad_norm_(copies, 0.5)
        its.step(theirs)
        scaler.step(ours)
        its.update()
        scaler.update()
        torch.testing.assert_close(ours.grad_norm.float(), norm)
        for p in (*params, *copies):
            p.grad = None
    torch.testing.assert_close(params, copies, rtol=1e-5, atol=1e-6)
    assert scaler.state_dict() == its.state_dict()


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")
@pytest.mark.skipif(INTERPRETED, reason="torch.compile traces torch's own step on any backend")
def test_compiled_by_torch() -> None:
    params = parameters(DOUBLE, shapes=[(40,), (3, 5)])
    ours, theirs, copies = pair("SGD", params, 0.5, lr=0.1, momentum=0.9)
    step = torch.compile(ours.step, backend="eager")
    for _ in range(2):
        give_grads(params, copies)
        clip_grad_norm_(copies, 0.5)
        theirs.step()
        step()
    torch.testing.assert_close(params, copies, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("most", [-1.0, math.nan, "1", torch.tensor(1.0), 1j])
def test_no_limit(most: Any) -> None:
    """Nothing is made, or changed, with it."""
    (p,) = parameters(torch.float32, shapes=[(4,)])
    with pytest.raises(ValueError, match=r"max_grad_norm=.*supported: None, and numbers from 0"):
        fastopt.optim.Adam([p], max_grad_norm=most)
    optimizer = fastopt.optim.Adam([p])
    optimizer.max_grad_norm = most
    give_grads([p])
    before = p.detach().clone()
    with pytest.raises(ValueError, match="max_grad_norm="):
        optimizer.step()
    assert torch.equal(p, before)
    assert not optimizer.state


def test_differentiable_is_refused() -> None:
    p = torch.ones(3, requires_grad=True) * 2
    p.retain_grad()
    optimizer = fastopt.optim.SGD([p], lr=0.1, differentiable=True, max_grad_norm=1.0)
    p.grad = torch.ones(3)
    with pytest.raises(ValueError, match="differentiable=True"):
        optimizer.step()


def test_without_gradients() -> None:
    params = parameters(torch.float32, shapes=[(4,)])
    optimizer = fastopt.optim.Adam(params, max_grad_norm=1.0)
    optimizer.step()
    assert optimizer.grad_norm is None
    assert outcome(optimizer.step)[0] == "returned"


@EACH
def test_it_is_no_part_of_a_checkpoint(info: OptimizerInfo) -> None:
    """Those go both ways; a copy or a pickle has it."""
    params = parameters(torch.float32, shapes=[(4,)])
    ours, theirs, copies = pair(info.name, params, 2, **options_of(info)[-1])
    give_grads(params, copies)
    ours.step()
    theirs.step()
    mine, its = ours.state_dict(), theirs.state_dict()
    assert mine["param_groups"] == its["param_groups"]
    assert mine["state"].keys() == its["state"].keys()
    assert repr(ours) == repr(theirs)
    for again in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert again.max_grad_norm == 2
    assert "max_grad_norm" not in vars(getattr(fastopt.optim, info.name)(params))


def test_convert_keeps_it() -> None:
    (p,) = parameters(torch.float32, shapes=[(4,)])
    optimizer = fastopt.convert(torch.optim.Adam([p]))
    optimizer.max_grad_norm = 1.0  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"max_grad_norm=1\.0.*set it to None first"):
        fastopt.convert(optimizer, to="torch")
    assert type(optimizer) is fastopt.optim.Adam
    optimizer.max_grad_norm = None  # type: ignore[attr-defined]
    assert type(fastopt.convert(optimizer, to="torch")) is torch.optim.Adam

"""Optimizers by users' rules, against loops over tensors in float64 and against torch's own."""

from __future__ import annotations

import copy
import gc
import inspect
import linecache
import pickle
from typing import Any

import numpy as np
import pytest
import rules
import torch
from cases import BACKEND, DEVICE, INTERPRETED
from children import run_code
from race import give_grads, layout, parameters, replica
from rules import Adam, Lion, Loop, Mixed, SignSGD, Sophia
from torch import Tensor
from torch.nn import Parameter

import fastopt
from fastopt import formula as m
from fastopt.errors import FormulaError
from fastopt.optim import _rule

F64, F32, BF16, F16 = torch.float64, torch.float32, torch.bfloat16, torch.float16
OPTIONS: list[tuple[Any, dict[str, Any]]] = [
    (Lion, {}),
    (Lion, {"lr": torch.tensor(0.01), "beta1": 0.5, "weight_decay": 0.2, "maximize": True}),
    (SignSGD, {"momentum": 0.5}),
    (SignSGD, {"nesterov": True, "lr": 0.1}),
    (Sophia, {"lr": 0.1, "beta": torch.tensor(0.5, dtype=F64)}),
    (Adam, {"lr": 0.01}),
    (Adam, {"beta1": 0.0, "eps": 0.1, "maximize": True}),
    (Mixed, {}),
    (Mixed, {"careful": False, "power": 2, "lr": 1, "warmup": 1.5}),
]
EACH = pytest.mark.parametrize(
    ("kind", "options"), OPTIONS, ids=[f"{k.__name__}-{','.join(o)}" for k, o in OPTIONS]
)
MISSING = ((2,), (), (0, 4), ())


def grads_of(params: list[Parameter]) -> list[Tensor | None]:
    return [p.grad for p in params]


def train(optimizer: Any, params: list[Parameter], loop: Loop, backend: str, steps: Any) -> None:
    for missing in steps:
        give_grads(params, missing=missing)
        with fastopt.use_backend(backend):
            optimizer.step()
        loop.step(grads_of(params))


@EACH
@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_as_a_loop_in_float64(kind: Any, options: dict[str, Any], backend: str) -> None:
    params = parameters(F64)
    optimizer, loop = kind(params, **options), Loop(kind, params, **options)
    train(optimizer, params, loop, backend, MISSING)
    for p, right, state in zip(params, loop.params, loop.states, strict=True):
        torch.testing.assert_close(p.detach(), right, rtol=1e-13, atol=1e-13)
        found = {k: v for k, v in optimizer.state[p].items() if k != "step"}
        torch.testing.assert_close(found, state, rtol=1e-13, atol=1e-13)
        assert list(found) == list(state)
    for k, p in enumerate(params):
        if kind in (Adam, Mixed):
            assert optimizer.state[p]["step"].item() == 4 - (k in (0, 2, 4))
        else:
            assert "step" not in optimizer.state[p]


NARROW = [(Lion, F32), (SignSGD, BF16), (Sophia, F16), (Adam, F32), (Mixed, F32), (Mixed, BF16)]


@pytest.mark.parametrize(("kind", "dtype"), NARROW, ids=str)
def test_one_rounding_in_a_step(kind: Any, dtype: torch.dtype) -> None:
    """Computed in float32 at least, and rounded when stored."""
    params = parameters(dtype)
    optimizer, eps = kind(params), torch.finfo(dtype).eps
    for _ in range(2):
        loop = Loop(kind, params)
        for k, p in enumerate(params):
            for name, value in optimizer.state.get(p, {}).items():
                loop.states[k][name] = value.double().clone()
            loop._steps[k] = int(loop.states[k].pop("step", torch.zeros(())))
        train(optimizer, params, loop, BACKEND, ((),))
        for p, right, state in zip(params, loop.params, loop.states, strict=True):
            torch.testing.assert_close(p.double(), right, rtol=2 * eps, atol=4 * eps)
            for name, value in state.items():
                found = optimizer.state[p][name]
                assert (found.dtype, found.stride()) == (dtype, p.stride())
                torch.testing.assert_close(found.double(), value, rtol=2 * eps, atol=2 * eps)


def test_as_our_own_lion() -> None:
    """The same record in other words, so the same bits."""
    params = parameters(F32)
    copies = replica(params)
    mine = Lion(params, lr=0.01, weight_decay=0.1)
    own = fastopt.optim.Lion(copies, lr=0.01, weight_decay=0.1)
    for missing in MISSING:
        give_grads(params, copies, missing=missing)
        with fastopt.use_backend(BACKEND):
            mine.step()
            own.step()
    torch.testing.assert_close(params, copies, rtol=0, atol=0 if BACKEND == "numba" else 1e-7)
    assert layout(mine) == layout(own)


def test_as_torchs_adam_through_checkpoints() -> None:
    """Over many steps, with a schedule, and checkpoints that go both ways."""
    params = parameters(F64, shapes=((3, 5), (), (70,)))
    copies = replica(params)
    mine, theirs = Adam(params, lr=0.01), torch.optim.Adam(copies, lr=0.01)
    for k in range(40):
        if k % 8 == 7:
            saved = copy.deepcopy(mine.state_dict()), copy.deepcopy(theirs.state_dict())
            mine, theirs = Adam(params, lr=1.0), torch.optim.Adam(copies, lr=1.0)
            for group in saved[1]["param_groups"]:  # the rule's names for what torch pairs
                group["beta1"], group["beta2"] = group["betas"]
            for group in saved[0]["param_groups"]:
                group["betas"] = group["beta1"], group["beta2"]
                group |= {key: theirs.defaults[key] for key in ("weight_decay", "amsgrad")}
                group |= {key: theirs.defaults[key] for key in ("foreach", "capturable")}
            mine.load_state_dict(saved[1])
            theirs.load_state_dict(saved[0])
        schedules = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (mine, theirs)]
        give_grads(params, copies, missing=(1,) if k % 3 else ())
        with fastopt.use_backend(BACKEND):
            mine.step()
        theirs.step()
        for schedule in schedules:
            schedule.step()
        assert mine.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"])
        assert layout(mine) == layout(theirs)
    torch.testing.assert_close(params, copies, rtol=1e-11, atol=1e-12)
    for p, q in zip(params, copies, strict=True):
        torch.testing.assert_close(dict(mine.state[p]), dict(theirs.state[q]))


@fastopt.optimizer(states=("rest", "power"))
def Scalars(param, grad, rest, power, *, step, beta=0.999):  # type: ignore[no-untyped-def]
    return param, (1 - beta) * grad, (1 - beta**step) * grad


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_numbers_of_a_step_are_computed_in_float64(backend: str) -> None:
    """1 - 0.999 of float32 numbers is off by 1e-5 of it."""
    p = Parameter(torch.zeros(70))
    optimizer = Scalars([p])
    for step in (1, 2, 3):
        p.grad = torch.ones(70)
        with fastopt.use_backend(backend):
            optimizer.step()
        state = optimizer.state[p]
        for name, right in (("rest", 1 - 0.999), ("power", 1 - 0.999**step)):
            expected = torch.full((70,), right, dtype=F64).float()
            torch.testing.assert_close(state[name], expected, rtol=1.2e-7, atol=0)
    assert not torch.isclose(
        torch.tensor(1.0) - torch.tensor(0.999), torch.tensor(1 - 0.999), rtol=1.2e-7, atol=0
    )


@fastopt.optimizer
def Plain(param, grad, *, lr=0.5):  # type: ignore[no-untyped-def]
    return param - lr * grad


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
def test_no_states(backend: str) -> None:
    p = Parameter(torch.arange(70.0))
    optimizer = Plain([p])
    for _ in range(2):
        p.grad = torch.ones(70)
        with fastopt.use_backend(backend):
            optimizer.step()
    assert torch.equal(p.detach(), torch.arange(70.0) - 1)
    assert not optimizer.state_dict()["state"]


HARD = (0.0, -0.0, 1.0, -2.5, 1e-45, -1e-39, 3e38, float("inf"), -float("inf"), float("nan"))


@pytest.mark.parametrize("kind", [Lion, Sophia, Adam, Mixed])
def test_hard_gradients_as_the_definition(kind: Any) -> None:
    params = [Parameter(torch.linspace(-1, 1, 70)), Parameter(torch.zeros(0))]
    copies = replica(params)
    ours, plain = kind(params), kind(copies)
    for k in range(3):
        for some in (params, copies):
            some[0].grad = torch.tensor([HARD[(i + k * (i // 10)) % 10] for i in range(70)])
            some[1].grad = torch.zeros(0)
        with fastopt.use_backend(BACKEND):
            ours.step()
        with fastopt.use_backend("reference"):
            plain.step()
        for p, q in zip(params, copies, strict=True):
            close = {"rtol": 2e-6, "atol": 1e-6, "equal_nan": True}
            torch.testing.assert_close(p.detach(), q.detach(), **close)
            torch.testing.assert_close(dict(ours.state[p]), dict(plain.state[q]), **close)


def test_what_no_kernel_serves() -> None:
    """Gaps in memory and complex numbers, in two groups, which are left to the definition."""
    memory = torch.randn(6, 8, dtype=F64)
    params = [
        Parameter(memory[:, ::2]),
        Parameter(torch.randn(5, dtype=F64)),
        Parameter(torch.randn(4, dtype=torch.complex128)),
    ]
    between, copies = memory[:, 1::2].clone(), replica(params)
    ours = Adam([{"params": params[:1]}, {"params": params[1:], "lr": 0.3}], lr=0.1)
    theirs = torch.optim.Adam(
        [{"params": copies[:1]}, {"params": copies[1:], "lr": 0.3}], lr=0.1, foreach=False
    )
    for _ in range(3):
        give_grads(params, copies)
        ours.step()
        theirs.step()
    torch.testing.assert_close(params, copies, rtol=1e-12, atol=1e-12)
    assert [d.backend for d in fastopt.explain(ours)] == ["reference", BACKEND, "reference"]
    assert "gaps" in str(fastopt.explain(ours))
    assert torch.equal(memory[:, 1::2], between)


def test_differentiable() -> None:
    start = torch.tensor([1.0, -2.0, 3.0], dtype=F64, requires_grad=True)
    lr = torch.tensor(0.1, dtype=F64, requires_grad=True)
    p = start.clone()
    optimizer = Lion([p], lr=lr, weight_decay=0.5, differentiable=True)
    p.grad = torch.tensor([1.0, 1.0, -1.0], dtype=F64)
    optimizer.step()
    found = torch.autograd.grad(p.sum(), (start, lr))
    torch.testing.assert_close(found[0], torch.full((3,), 0.95, dtype=F64))
    torch.testing.assert_close(found[1], torch.tensor(-2.0, dtype=F64))


@pytest.mark.parametrize("kind", [Lion, Adam])
def test_grad_scaler_and_clipping(kind: Any) -> None:
    """With fused=True the step has scale and verdict, and else the gradients as they are."""
    results = []
    for fused in (False, True):
        torch.manual_seed(3)
        p = Parameter(torch.randn(70))
        optimizer = kind([p], lr=0.1, fused=fused, max_grad_norm=2.0)
        scaler = torch.amp.GradScaler(DEVICE, init_scale=8.0)
        for k in range(3):
            p.grad = None
            factor = torch.randn(70)
            scaler.scale((p * factor).sum()).backward()
            if k == 1:
                p.grad[5] = float("inf")
            scaler.step(optimizer)
            scaler.update()
        torch.testing.assert_close(optimizer.grad_norm.float(), factor.norm())
        results.append((p.detach(), dict(optimizer.state[p]), scaler.get_scale()))
    assert results[0][2] == results[1][2] == 4.0
    torch.testing.assert_close(results[0][:2], results[1][:2])
    assert results[0][1].get("step", 2.0) == 2.0


def test_averaging_in_the_step() -> None:
    trainings = []
    for joined in (True, False):
        torch.manual_seed(1)
        model = torch.nn.Linear(30, 5)
        optimizer = SignSGD(model.parameters())
        more = {"optimizer": optimizer} if joined else {}
        average = fastopt.optim.swa_utils.AveragedModel(model, **more)
        for _ in range(3):
            model(torch.randn(4, 30)).square().mean().backward()
            with fastopt.use_backend(BACKEND):
                optimizer.step()
                if not joined:
                    average.update_parameters(model)
        trainings.append((list(model.parameters()), list(average.parameters())))
    torch.testing.assert_close(*trainings, rtol=1e-6, atol=1e-6)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.filterwarnings("ignore:Profiler record function")
def test_compiled() -> None:
    """What torch.compile makes of it is the definition."""
    torch.compiler.reset()
    params = parameters(F32, shapes=((5,), (7, 3)))
    copies = replica(params)
    ours, plain = Adam(params, lr=0.1), Adam(copies, lr=0.1)
    step = torch.compile(ours.step, backend="eager")
    for _ in range(2):
        give_grads(params, copies)
        step()
        with fastopt.use_backend("reference"):
            plain.step()
    torch.testing.assert_close(params, copies)


def test_deterministic() -> None:
    found = []
    for _ in range(2):
        torch.manual_seed(5)
        params = parameters(F32, shapes=((100_000,), (7,)))
        optimizer = Adam(params)
        for _ in range(2):
            give_grads(params)
            with fastopt.use_backend(BACKEND):
                optimizer.step()
        found.append([p.detach() for p in params])
    assert all(map(torch.equal, *found))


INFINITY = float("inf")


@fastopt.optimizer(states=("finite", "rate", "way"))
def Edges(param, grad, finite, rate, way, *, lr=0.1, most=0.1):  # type: ignore[no-untyped-def]
    """An infinite literal, a state that no element decides, and conditions of close numbers."""
    finite = m.where(m.abs(grad) < INFINITY, grad, 0.0)
    way = m.where(lr > most, 1.0, -1.0) * m.rounded(m.sign(finite), grad)
    return param, m.minimum(finite, INFINITY), 1 - lr, way


@pytest.mark.parametrize("backend", [BACKEND, "reference"])
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_edges(dtype: torch.dtype, backend: str) -> None:
    p = Parameter(torch.ones(5, dtype=dtype))
    optimizer = Edges([p], lr=np.float64(0.1) + 1e-12)
    p.grad = torch.tensor([1.0, -2.0, INFINITY, -INFINITY, float("nan")], dtype=dtype)
    with fastopt.use_backend(backend):
        optimizer.step()
    right = torch.tensor([1.0, -2.0, 0.0, 0.0, 0.0], dtype=dtype)
    state = optimizer.state[p]
    assert torch.equal(state["finite"], right)
    assert torch.equal(state["rate"], torch.full_like(p, 1 - (0.1 + 1e-12)).detach())
    assert torch.equal(state["way"], right.sign()), "0.1 + 1e-12 is more than 0.1"


def test_numpy_numbers_round_nothing() -> None:
    p, q = (Parameter(torch.ones(3)) for _ in range(2))
    for param, lr in ((p, np.float16(0.1)), (q, float(np.float16(0.1)))):
        param.grad = torch.full((3,), 1 / 3)
        Lion([param], lr=lr, weight_decay=0.1).step()
    assert torch.equal(p, q)


@pytest.mark.parametrize("rule", [Lion, Adam])
@pytest.mark.parametrize(("dtype", "options"), [
    (torch.float32, {"state_dtype": torch.bfloat16}),
    (torch.bfloat16, {"state_dtype": torch.bfloat16, "rounding": "stochastic", "seed": 3}),
    (torch.bfloat16, {"rounding": "kahan"}),
])  # fmt: skip
def test_fewer_bytes(rule: Any, dtype: torch.dtype, options: dict[str, Any]) -> None:
    """Stored alike by all backends, and as by fastopt's optimizer of the same rule."""
    twin = getattr(fastopt.optim, rule.__name__)
    found = []
    for kind, backend in ((rule, BACKEND), (rule, "reference"), (twin, BACKEND)):
        p = Parameter(torch.linspace(-1, 1, 999).to(dtype))
        optimizer = kind([p], lr=2**-7, **options)
        torch.manual_seed(0)
        with fastopt.use_backend(backend):
            for _ in range(4):
                p.grad = torch.randn(999).to(dtype)
                optimizer.step()
        found.append({"param": p.detach(), **optimizer.state[p]})
    mine, plain, its = found
    wide = {name for name, t in mine.items() if t.dtype == torch.float32}
    assert wide == {*(["param"] if dtype == torch.float32 else []), *({"step"} & mine.keys())}
    for other in (plain, its):
        assert mine.keys() == other.keys()
        for name, t in mine.items():
            assert other[name].dtype == t.dtype
            torch.testing.assert_close(t, other[name], rtol=2**-6, atol=2**-7)
            # The interpreter rounds bfloat16 as no device does. A parameter's random bits are
            # those behind the states', of which torch's Adam may have three.
            if (other is plain and not INTERPRETED) or (other is its and rule is Lion):
                # The last digit of a float32 may be another one, and so a number that is rounded.
                different = (t != other[name]).double().mean().item()
                assert different < (0.5 if t.dtype == torch.float32 else 0.05), name


# -- the class ----------------------------------------------------------------------------


def test_the_class() -> None:
    assert issubclass(Adam, torch.optim.Optimizer)
    assert (Lion.__name__, Lion.__module__, Lion.__doc__) == ("Lion", "rules", "Steps of one size.")
    assert "SignSGD" in (SignSGD.__doc__ or "")
    assert str(inspect.signature(SignSGD)) == (
        "(params, *, lr=0.01, momentum=0.9, nesterov=False, maximize=False, "
        "differentiable=False, fused=None, max_grad_norm: float | None = None, "
        "state_dtype: torch.dtype | None = None, rounding: str | None = None, "
        "seed: int | None = None)"
    )
    optimizer = SignSGD([Parameter(torch.ones(3))], nesterov=True)
    assert "nesterov: True" in repr(optimizer)
    assert repr(optimizer).startswith("SignSGD (")
    assert fastopt.convert(optimizer) is optimizer
    assert pickle.loads(pickle.dumps(Adam)) is Adam
    (decision,) = fastopt.explain(optimizer)
    assert str(decision).startswith(f"SignSGD on {DEVICE}, float32")


@pytest.mark.parametrize("way", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))])
def test_copies_go_on_alike(way: Any) -> None:
    params = parameters(F32, shapes=((70,), (3, 2)))
    optimizer = Adam(params, lr=0.1)
    give_grads(params)
    optimizer.step()
    other = way(optimizer)
    assert type(other) is Adam
    assert repr(other) == repr(optimizer)
    copies = other.param_groups[0]["params"]
    give_grads(params, copies)
    for each in (optimizer, other):
        with fastopt.use_backend(BACKEND):
            each.step()
    torch.testing.assert_close(params, copies, rtol=0, atol=0)


def test_checkpoint_from_before_an_option_and_a_state() -> None:
    p = Parameter(torch.ones(70))
    p.grad = torch.ones(70)
    optimizer = Adam([p])
    optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    del saved["param_groups"][0]["eps"], saved["state"][0]["exp_avg_sq"]
    other = Adam([p], eps=0.5)
    other.load_state_dict(saved)
    assert other.param_groups[0]["eps"] == 0.5
    other.step()
    assert torch.equal(other.state[p]["exp_avg_sq"], torch.full((70,), 1 - 0.999))


def test_sparse_gradients() -> None:
    words = torch.nn.Embedding(5, 3, sparse=True)
    words(torch.tensor([1])).sum().backward()
    before = words.weight.detach().clone()
    with pytest.raises(RuntimeError, match="Lion does not support sparse gradients"):
        Lion(words.parameters()).step()
    assert torch.equal(words.weight, before)


BAD_OPTIONS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"lr": -1.0}, ValueError, r"Invalid learning rate: -1\.0"),
    ({"lr": torch.tensor([-1.0])}, ValueError, r"Invalid learning rate: tensor"),
    ({"lr": float("nan")}, ValueError, r"Invalid learning rate: nan"),
    ({"lr": torch.ones(2)}, ValueError, r"Tensor lr must be 1-element"),
    ({"eps": -1}, ValueError, r"Invalid epsilon value: -1"),
    ({"beta1": float("nan")}, ValueError, r"Invalid beta1 value: nan"),
    ({"beta1": "0.9"}, TypeError, r"Invalid beta1: '0\.9' \(supported: numbers"),
    ({"beta1": (0.9, 0.99)}, TypeError, r"Invalid beta1: \(0\.9, 0\.99\)"),
    ({"beta1": True}, TypeError, r"Invalid beta1: True"),
    ({"beta1": None}, TypeError, r"Invalid beta1: None"),
    ({"beta3": 0.9}, TypeError, r"Adam has no option 'beta3'; did you mean beta1|2\? \(its opt"),
    ({"betas": (0.9, 0.9)}, TypeError, r"its options: lr, beta1, beta2, eps, maximize"),
    ({"max_grad_norm": -1.0}, ValueError, r"max_grad_norm=-1\.0"),
    ({"fused": True, "differentiable": True}, RuntimeError, r"`fused` does not support"),
]


@pytest.mark.parametrize(("options", "error", "words"), BAD_OPTIONS, ids=str)
def test_bad_options(options: dict[str, Any], error: Any, words: str) -> None:
    with pytest.raises(error, match=words):
        Adam([Parameter(torch.ones(3))], **options)


def test_bad_options_of_groups() -> None:
    p = Parameter(torch.ones(3))
    with pytest.raises(ValueError, match="Invalid learning rate: -1"):
        Adam([{"params": [p], "lr": -1}])
    with pytest.raises(TypeError, match=r"no option 'beta_1'; did you mean beta1\?"):
        Adam([{"params": [p], "beta_1": 0.5}])
    with pytest.raises(TypeError, match=r"Invalid nesterov: 1 \(supported: True and False\)"):
        SignSGD([p], nesterov=1)
    optimizer = Adam([{"params": [p], "initial_lr": 1.0, "name": "all"}])  # others' own
    assert optimizer.param_groups[0]["name"] == "all"
    with pytest.raises(TypeError, match="positional"):
        Adam([p], 0.1)  # type: ignore[misc]


# -- what can be no rule ------------------------------------------------------------------


def two(param, grad, a, b):  # type: ignore[no-untyped-def]
    return param, a, b


def short(param, grad, a):  # type: ignore[no-untyped-def]
    return param


def alone(param):  # type: ignore[no-untyped-def]
    return param


def taken(param, grad, *, params=1.0):  # type: ignore[no-untyped-def]
    return param


def record(param, grad, *, values=1.0):  # type: ignore[no-untyped-def]
    return param


def divided(param, grad, *, lr=0.1):  # type: ignore[no-untyped-def]
    return param - 1 / 0 * grad


def root(param, grad, *, lr=0.1):  # type: ignore[no-untyped-def]
    return param - m.sqrt(-2.0) * grad


BAD_RULES: list[tuple[Any, Any, str]] = [
    (two, ("a",), r"takes \(param, grad, a, b\), with states=\('a',\); .*: \(param, grad, a\)"),
    (two, ("b", "a"), r"states=\('b', 'a'\); its positional"),
    (two, ("a", "b", "c"), r"\(param, grad, a, b, c\)"),
    (short, ("a",), r"1 returned; return 2 values: param, a"),
    (alone, (), r"takes \(param\)"),
    (taken, (), r"can't have the name params"),
    (record, (), r"can't have the name values"),
    (divided, (), r"`1 / 0`: no number: .*division by zero|`1.0 / 0.0`: no number"),
    (root, (), r"`m?\.?sqrt\(-2.0\)`: no number, but nan"),
]


@pytest.mark.parametrize(
    ("rule", "states", "words"), BAD_RULES, ids=lambda value: getattr(value, "__name__", str(value))
)
def test_bad_rules(rule: Any, states: Any, words: str) -> None:
    with pytest.raises(FormulaError, match=words) as caught:
        fastopt.optimizer(states=states)(rule)
    first = inspect.getsourcelines(rule)[1]
    assert first <= caught.value.line <= first + 1


@pytest.mark.parametrize(
    ("states", "words"),
    [
        ("exp_avg", r"states='exp_avg' \(supported: a tuple of names"),
        (1, r"states=1"),
        (("a b",), r"'a b', which is no name"),
        ((1,), r"has 1, which is no name"),
        (("a", "a"), r"has 'a' twice"),
        (("step",), r"has 'step' \(not supported: average, grad, step"),
        (("_a",), r"has '_a'"),
        ({"a": "0"}, r"'a' begins as '0' \(supported: a number\)"),
    ],
)
def test_bad_states(states: Any, words: str) -> None:
    with pytest.raises(TypeError, match=words):
        fastopt.optimizer(states=states)


def test_nothing_is_compiled_before_a_step() -> None:
    code = """
import sys, torch, rules
def loaded():
    return {name.partition(".")[0] for name in sys.modules} & {"numba", "llvmlite", "triton"}
torch.optim.Adam([torch.ones(3)])  # torch itself loads triton here, where it is installed
before = loaded()
rules.Adam([torch.ones(3, requires_grad=True)])
assert loaded() == before and "numba" not in before, loaded()
"""
    run_code(code)


# -- rules that are defined anew ----------------------------------------------------------


def scaled(factor: float) -> Any:
    @fastopt.optimizer
    def Scaled(param, grad, *, lr=1.0):  # type: ignore[no-untyped-def]
        return param - lr * factor * grad

    return Scaled


def moved(kind: Any, optimizer: Any = None) -> float:
    """How far one step moves a parameter."""
    p = Parameter(torch.zeros(70))
    p.grad = torch.full((70,), -1.0)
    with fastopt.use_backend(BACKEND):
        kind([p]).step()
    assert p.min() == p.max()
    return p[0].item()


def test_two_rules_of_one_name() -> None:
    """The older one goes on as it was, also if its first step comes after the newer's."""
    two, three = scaled(2.0), scaled(3.0)
    assert two.__qualname__ == three.__qualname__
    assert (moved(three), moved(two), moved(three)) == (3.0, 2.0, 3.0)


def test_the_same_rule_again_compiles_nothing_and_keeps_nothing() -> None:
    assert scaled(4.0)._record is scaled(4.0)._record
    gc.collect()
    _rule._record_of.cache_clear()
    before = len([name for name in linecache.cache if "_rule " in name])
    for k in range(300):
        scaled(10.0 + k)
    assert _rule._record_of.cache_info().currsize <= 128
    _rule._record_of.cache_clear()
    gc.collect()
    after = [name for name in linecache.cache if "_rule " in name]
    assert len(after) <= before
    assert moved(scaled(5.0)) == 5.0


def test_a_source_is_there_as_long_as_a_record_is() -> None:
    older = scaled(6.0)
    _rule._record_of.cache_clear()
    newer = scaled(6.0)
    file = older._record.update.__code__.co_filename
    assert newer._record is not older._record
    assert newer._record.update.__code__.co_filename == file
    del older
    gc.collect()
    assert "6.0" in inspect.getsource(newer._record.at_step)
    assert moved(newer) == 6.0


def test_a_cell_that_is_run_again() -> None:
    """As in a notebook, whose cells are in linecache."""
    names: dict[str, Any] = {"fastopt": fastopt, "m": m, "__name__": "notebook"}
    found = []
    for count, factor in enumerate((2.0, 7.0)):
        cell = (
            "@fastopt.optimizer\n"
            "def Mine(param, grad, *, lr=1.0):\n"
            f"    return param - lr * {factor} * m.abs(grad) * m.sign(grad)\n"
        )
        file = f"<cell {count}>"
        linecache.cache[file] = len(cell), None, cell.splitlines(keepends=True), file
        exec(compile(cell, file, "exec"), names)
        found.append(names["Mine"])
    assert [moved(kind) for kind in (*found, found[0])] == [2.0, 7.0, 2.0]


def test_names_that_generated_code_has_too() -> None:
    @fastopt.optimizer(states=("h",))
    def Names(m_, update, h, *, step, at=1.0, derived0=2.0):  # type: ignore[no-untyped-def]
        update_1 = update * 1.0
        sign = m.sign(update_1) * (derived0 + step * at)
        h_1 = h + sign
        grad = h_1
        return m_ - grad, h_1

    p = Parameter(torch.zeros(3))
    p.grad = torch.ones(3)
    optimizer = Names([p])
    for _ in range(2):
        with fastopt.use_backend(BACKEND):
            optimizer.step()
    assert torch.equal(p.detach(), torch.full((3,), -10.0))  # -(3) - (3 + 4)
    assert torch.equal(optimizer.state[p]["h"], torch.full((3,), 7.0))


def test_outside_numbers_are_those_of_the_definition(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rules, "SCALE", 100.0)
    params = parameters(F64, shapes=((70,),))
    optimizer, loop = Mixed(params), Loop(Mixed, params)
    train(optimizer, params, loop, "reference", ((), ()))
    torch.testing.assert_close(optimizer.state[params[0]]["count"], loop.states[0]["count"])

"""Random lives of optimizers, each step element by element against torch's from the same place.

The longer run is `HYPOTHESIS_PROFILE=fuzz`. What is right is defined once, in fuzzing.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from cases import BACKEND, FLOATS, OPTIMIZERS
from fuzzing import (
    SIZES,
    Layout,
    assert_right,
    compute_dtype,
    fuzzed,
    identical,
    is_dense,
    layouts,
    shaken,
    values,
)
from hypothesis import given
from torch import Tensor
from torch.nn import Parameter

import fastopt

HYPERS: dict[str, tuple[Any, ...]] = {
    "lr": (0.0, 1e-3, 0.1, 8.0),
    "weight_decay": (0.0, 0.0, 0.1, 2.0),
    "momentum": (0.0, 0.5, 0.9, 1 - 2**-20),
    "dampening": (0.0, 0.3, 1.0),
    "betas": ((0.9, 0.999), (0.0, 0.0), (0.0, 0.99), (0.9, 0.0), (1 - 2**-20, 1 - 2**-30)),
    "eps": (1e-8, 0.0, 1e-3, 1e-30),
    "rho": (0.9, 0.0, 0.5, 1.0),
    "lr_decay": (0.0, 0.1),
    "alpha": (0.99, 0.0, 0.5, 1.0),
    "nesterov": (False, True),
    "maximize": (False, True),
    "amsgrad": (False, True),
    "centered": (False, True),
}
CHANGES = ("nothing", "nothing", "rebound", "missing", "kept", "state-edited", "state-new", "hyper")


def torch_class(operation: str) -> Any:
    return getattr(torch.optim, operation)


@st.composite
def hypers(draw: st.DrawFn, operation: str) -> dict[str, Any]:
    """Any of an optimizer's numbers, extremes included."""
    some = Parameter(torch.zeros(1))
    names = [n for n in torch_class(operation)([some], lr=0.1).defaults if n in HYPERS]
    found = {name: draw(st.sampled_from(HYPERS[name])) for name in names}
    if found.get("nesterov"):  # legal only so
        found["nesterov"] = found["momentum"] > 0
        found["dampening"] = 0.0 if found["nesterov"] else found["dampening"]
    return found


def parameters(optimizer: Any) -> list[Parameter]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def twin(tensor: Tensor) -> Tensor:
    """A copy in the same strides, gaps included: how torch rounds depends on them."""
    reach = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    memory = tensor.new_zeros(reach + 1 if tensor.numel() else 0)
    return memory.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def replica(
    optimizer: Any,
    convert: Callable[[Tensor], Tensor],
    convert_one: Callable[[Tensor], Tensor] | None = None,
    one: str = "",
) -> Any:
    """Torch's optimizer in the same place: parameters, gradients, states all converted.

    convert_one: for those named `one`, "parameter", "grad" or a state's name.
    """

    def converted(name: str, tensor: Tensor) -> Tensor:
        return (convert_one if convert_one is not None and name == one else convert)(tensor)

    base = torch_class(type(optimizer).__name__)
    groups, states = [], {}
    for group in optimizer.param_groups:
        params = []
        for p in group["params"]:
            param = Parameter(converted("parameter", p.detach()))
            if p.grad is not None:
                param.grad = converted("grad", p.grad)
            params.append(param)
            if p in optimizer.state:
                states[param] = {
                    name: value
                    if not isinstance(value, Tensor)
                    else value.clone()
                    if name == "step"
                    else converted(name, value)
                    for name, value in optimizer.state[p].items()
                }
        groups.append({**group, "params": params, "foreach": False})
    made = base(groups)
    made.state.update(states)
    return made


def results(optimizer: Any) -> dict[str, Tensor]:
    """All parameters and states by name."""
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        for k, p in enumerate(group["params"]):
            found[f"group {g} parameter {k}"] = p.detach()
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor):
                    found[f"group {g} parameter {k} {name}"] = value
    return found


def apply_change(data: st.DataObject, change: str, optimizer: Any) -> None:
    some = [p for p in parameters(optimizer) if data.draw(st.booleans(), "this one")]
    for p in some:
        if change == "rebound":
            p.data = p.data.clone()
        elif change == "missing":
            p.grad = None
        elif change.startswith("state"):
            for name, value in optimizer.state.get(p, {}).items():
                if isinstance(value, Tensor) and name != "step":
                    if change == "state-edited":
                        value.mul_(0.5)
                    else:
                        optimizer.state[p][name] = value.clone()
    if change == "hyper":
        for group in optimizer.param_groups:
            group["lr"] = data.draw(st.sampled_from(HYPERS["lr"]), "lr")
            group["weight_decay"] = data.draw(st.sampled_from(HYPERS["weight_decay"]), "decay")


@pytest.mark.parametrize("operation", sorted({case.operation for case in OPTIMIZERS}))
@fuzzed
@given(data=st.data())
def test_optimizer(operation: str, data: st.DataObject) -> None:
    """Each step from where we are, against torch's from there, in the dtype and in float64."""
    draw = data.draw
    groups: list[dict[str, Any]] = []
    grad_layouts: list[tuple[Parameter, Layout]] = []
    for _ in range(draw(st.integers(1, 3), "groups")):
        params = []
        for _ in range(draw(st.integers(1, 3), "parameters")):
            shape = draw(st.lists(SIZES, max_size=3).filter(lambda s: math.prod(s) < 5000), "shape")
            dtype = draw(st.sampled_from(FLOATS), "dtype")
            gaps = draw(st.integers(0, 9), "gaps") == 0
            layout = draw(layouts(len(shape), gaps), "layout")._replace(expanded=None)
            p = Parameter(layout.place(draw(values(), "values").make(shape, dtype)))
            params.append(p)
            if draw(st.integers(0, 9), "gradient's layout") == 9:
                layout = Layout(tuple(range(len(shape))), (1,) * len(shape), 1, None)
            grad_layouts.append((p, layout))
        groups.append({"params": params, **draw(hypers(operation), "hyperparameters")})
    optimizer = getattr(fastopt.optim, operation)(groups)
    for _ in range(draw(st.integers(1, 4), "steps")):
        change = draw(st.sampled_from(CHANGES), "change")
        if change != "kept":
            for p, layout in grad_layouts:
                p.grad = layout.place(draw(values(), "gradient").make(p.shape, p.dtype))
        apply_change(data, change, optimizer)
        check_step(optimizer)


def refusals(optimizer: Any) -> list[str]:
    """What of an optimizer the compiled backends can't serve."""
    found = []
    for group in optimizer.param_groups:
        if (
            "alpha" in optimizer._rates
            and group["alpha"] == 1
            and any(p.grad is not None for p in group["params"])
        ):
            found.append("alpha=1.0")
    for p in parameters(optimizer):
        if p.grad is None:
            continue
        same = p.stride() == p.grad.stride() or (p.is_contiguous() and p.grad.is_contiguous())
        if not is_dense(p):
            found.append("a parameter with gaps")
        elif not same or not is_dense(p.grad):
            found.append("a gradient of another layout")
    return found


def uncertain_variance(name: str, exact: dict[str, Tensor], compute: torch.dtype) -> Tensor | None:
    """Where a centered RMSprop divides by the root of what is 0 but for rounding, or overflows.

    Torch has NaN there where rounding makes it negative; the kernels have 0. The square of a
    mean is infinite, and infinity less infinity NaN, unless multiplied and subtracted at once.
    """
    place = " ".join(name.split()[:4])
    square, mean = (exact.get(f"{place} {state}") for state in ("square_avg", "grad_avg"))
    if square is None or mean is None or name.endswith("_avg"):
        return None
    limits = torch.finfo(compute)
    return (square - mean * mean <= 64 * limits.eps * square) | (square > limits.max / 4)


def cancelled(optimizer: Any) -> dict[str, Tensor]:
    """Where weight decay takes all of a gradient but its rounding, and eps is 0.

    The quotient is one of rounding errors: NaN where both are 0, a number where a product and a
    sum are rounded at once.
    """
    found = {}
    for g, group in enumerate(optimizer.param_groups):
        sign, decay = -1 if group["maximize"] else 1, group.get("weight_decay", 0)
        for k, p in enumerate(group["params"]):
            if p.grad is not None and group.get("eps") == 0 and decay != 0:
                grad, eps = p.grad.double(), torch.finfo(compute_dtype(p)).eps
                rest = sign * grad + decay * p.detach().double()
                found[f"group {g} parameter {k}"] = rest.abs() <= 8 * eps * grad.abs()
    return found


def check_step(optimizer: Any) -> None:
    plain = replica(optimizer, twin)
    wide = replica(optimizer, lambda t: t.to(compute_dtype(t), copy=True))
    oracle = replica(optimizer, lambda t: t.to(torch.float64, copy=True))
    # One kind of tensor at a time.
    shaken_twins = [
        replica(
            optimizer,
            lambda t: t.to(torch.float64, copy=True),
            lambda t: shaken(t, torch.finfo(compute_dtype(t)).eps, 0),
            kind,
        )
        for kind in ("parameter", "grad", *type(optimizer)._slots)
    ]
    # A parameter may be nearly what is taken from it.
    sizes = {
        name: t.double().abs().nan_to_num(0, 0, 0).clone()
        for name, t in results(optimizer).items()
        if name[-1].isdigit()
    }
    anything = cancelled(optimizer)
    grads = [(p.grad, p.grad.clone()) for p in parameters(optimizer) if p.grad is not None]
    refused = refusals(optimizer)
    if refused:
        before = {name: t.clone() for name, t in results(optimizer).items()}
        with fastopt.use_backend(BACKEND), pytest.raises(fastopt.BackendUnavailable) as error:
            optimizer.step()
        assert any(reason in str(error.value) for reason in refused)  # it names the first
        assert all(identical(t, before[name]) for name, t in results(optimizer).items())
        optimizer.step()
    else:
        with fastopt.use_backend(BACKEND):
            optimizer.step()
    for other in (plain, wide, oracle, *shaken_twins):
        other.step()
    assert all(identical(grad, copy) for grad, copy in grads)
    found, right, exact = results(optimizer), results(plain), results(oracle)
    widely = results(wide)
    nearby = [results(twin) for twin in shaken_twins]
    assert found.keys() == right.keys()
    for name, mine in found.items():
        if name.endswith("step"):
            assert torch.equal(mine, right[name])
            continue
        compute = compute_dtype(mine)
        around = [other[name] for other in nearby]
        size = sizes.get(name, 0.0)
        torchs, expected = (right[name], widely[name]), exact[name]
        variance = uncertain_variance(name, exact, compute)
        anywhere = anything.get(" ".join(name.split()[:4]))
        if anywhere is not None and anywhere.shape == mine.shape:
            mine, expected = mine.masked_fill(anywhere, 0), expected.masked_fill(anywhere, 0)
        if name.endswith("avg"):
            # Torch adds a share of a difference: of infinite numbers NaN, where their mean is
            # infinite.
            infinite = mine.isinf() & torchs[-1].isnan()
            mine, expected = mine.masked_fill(infinite, 0), expected.masked_fill(infinite, 0)
        if variance is not None:
            mine, expected = mine.masked_fill(variance, 0), expected.masked_fill(variance, 0)
        assert_right(name, mine, torchs, expected, around, compute, size)


def test_an_average_that_forgets_all() -> None:
    """betas of 0: the averages are the gradient and its square, whatever they were before."""
    for operation in ("Adam", "AdamW"):
        p = Parameter(torch.zeros(40))
        optimizer = getattr(fastopt.optim, operation)([p], lr=0.1, betas=(0.0, 0.0))
        for gradient in (1e8, 1.0, 1e-4):
            p.grad = torch.full((40,), gradient)
            with fastopt.use_backend(BACKEND):
                optimizer.step()
            torch.testing.assert_close(optimizer.state[p]["exp_avg"], p.grad)


SHARED = {case.operation for case in OPTIMIZERS} - {"SGD", "Adagrad"}  # which take no share


@pytest.mark.parametrize("operation", sorted(SHARED))
def test_a_square_that_only_its_share_keeps_finite(operation: str) -> None:
    """The square of the gradient alone overflows; torch takes a share of one factor first."""
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.zeros(40))
        p.grad = torch.full((40,), 3e19)
        optimizer = getattr(module, operation)([p], lr=0.1, foreach=False)
        optimizer.step()
        states = optimizer.state[p]
        outcomes.append([p.detach(), *(v for k, v in sorted(states.items()) if k != "step")])
    assert all(t.isfinite().all() for t in outcomes[1])
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("operation", ["Adam", "AdamW", "Adamax"])
def test_the_rate_comes_before_the_quotient(operation: str) -> None:
    """The quotient alone overflows; torch multiplies by the rate first, which may be 0."""
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.ones(40))
        optimizer = getattr(module, operation)([p], lr=0.0, betas=(0.9, 0.0), eps=1e-30)
        p.grad = torch.full((40,), 1e15)
        for _ in range(2):
            optimizer.step()
            p.grad = torch.zeros(40)
        outcomes.append(p.detach())
    assert outcomes[1].eq(1).all()
    torch.testing.assert_close(*outcomes)

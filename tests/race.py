"""The same training by fastopt and by torch, over the rows of torch's own table of optimizers.

That is ``optim_db``, which torch tests its optimizers with: inputs, errors, flags, what may be
sparse or complex. So a new optimizer needs nothing new in the tests that use it.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, assert_as_accurate
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerInfo, optim_db

import fastopt

_OURS = [info for info in optim_db if info.name in fastopt.optim._operations.OPTIMIZERS]
#: Those that take matrices and nothing else, none without elements, none but sparse gradients.
MATRICES: list[OptimizerInfo] = [info for info in _OURS if info.name == "Muon"]
FILLED: list[OptimizerInfo] = [info for info in _OURS if info.name == "Adafactor"]
SPARSE: list[OptimizerInfo] = [info for info in _OURS if info.only_supports_sparse_grads]
#: Those that take parameters of any shape.
INFOS = [info for info in _OURS if info not in (*MATRICES, *FILLED, *SPARSE)]
#: The names of the latter.
NAMES = tuple(info.name for info in INFOS)
EACH = pytest.mark.parametrize("info", INFOS, ids=lambda info: info.name)
FLAGS = ("foreach", "fused", "capturable", "differentiable")
COMPLEX = (torch.complex64, torch.complex128)
SHAPES = ((1,), (), (0,), (64,), (3, 5), (257,), (2, 0))


def options_of(info: OptimizerInfo, dtype: torch.dtype = torch.float32) -> list[dict[str, Any]]:
    return [row.kwargs for row in info.optim_inputs_func(DEVICE, dtype)]


def every_input(*places: int) -> Any:
    """Each optimizer with each of its inputs, or with those at some places."""
    return pytest.mark.parametrize(
        ("info", "place"),
        [
            pytest.param(info, k, id=f"{info.name}-{info.optim_inputs_func(DEVICE)[k].desc}")
            for info in INFOS
            for k in places or range(len(options_of(info)))
        ],
    )


def flags_of(info: OptimizerInfo) -> list[str]:
    listed = [*info.supported_impls, *(["capturable"] if info.has_capturable_arg else [])]
    return [flag for flag in FLAGS if flag in listed]


FLAGGED = [(info, flag) for info in INFOS for flag in (None, *flags_of(info))]
FLAGGED_IDS = [f"{info.name}-{flag}" for info, flag in FLAGGED]


def parameters(*dtypes: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[Parameter]:
    return [Parameter(torch.randn(s, dtype=d)) for d in dtypes for s in shapes]


def replica(params: Sequence[Tensor], wide: bool = False) -> list[Parameter]:
    """Copies with the same strides, if wide in double precision."""
    result = []
    for p in params:
        dtype = (torch.complex128 if p.is_complex() else torch.float64) if wide else p.dtype
        twin = torch.empty_strided(p.shape, p.stride(), dtype=dtype, device=p.device)
        result.append(Parameter(twin.copy_(p.detach()), requires_grad=p.requires_grad))
    return result


def give_grads(*replicas: Sequence[Tensor], missing: Sequence[int] = ()) -> None:
    """New random gradients, the same for all replicas."""
    for k, twins in enumerate(zip(*replicas, strict=True)):
        grad = torch.randn_like(twins[0])
        for p in twins:
            p.grad = None if k in missing else torch.empty_like(p).copy_(grad)


def outcome(call: Callable[[], Any]) -> tuple[Any, ...]:
    """A call's result, or its error by type and message."""
    try:
        return ("returned", call())
    except Exception as error:
        return (type(error), str(error))


def layout(optimizer: Optimizer) -> list[Any]:
    """What a checkpoint has but for the values, in its order."""
    return [
        (key, [(n, v.dtype, v.shape, v.stride(), v.device) for n, v in state.items()])
        for key, state in optimizer.state_dict()["state"].items()
    ]


def numbers(value: Any) -> Any:
    """Hyperparameters with tensors as plain numbers."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(numbers, value))
    return value.item() if isinstance(value, Tensor) else value


def accepted(name: str, **options: Any) -> dict[str, Any]:
    """Those of some options that an optimizer has."""
    known = inspect.signature(getattr(torch.optim, name)).parameters
    return {key: value for key, value in options.items() if key in known}


class Race:
    """One training by fastopt, by torch's for-loop, and by that in double precision."""

    def __init__(
        self,
        name: str,
        params: list[Parameter],
        options: dict[str, Any],
        grouped: Callable[[list[Parameter]], list[Any]] = list,
    ) -> None:
        loop = {k: v for k, v in options.items() if k not in FLAGS} | accepted(name, foreach=False)
        oracle = {k: numbers(v) for k, v in loop.items()}
        self.params = [params, replica(params), replica(params, wide=True)]
        modules = fastopt.optim, torch.optim, torch.optim
        self.optimizers: list[Optimizer] = [
            getattr(module, name)(grouped(p), **copy.deepcopy(o))
            for module, p, o in zip(modules, self.params, (options, loop, oracle), strict=True)
        ]

    @property
    def ours(self) -> Optimizer:
        return self.optimizers[0]

    def groups(self, place: int) -> list[dict[str, Any]]:
        return [optimizer.param_groups[place] for optimizer in self.optimizers]

    def step(self, missing: Sequence[int] = (), insist: bool = True) -> None:
        give_grads(*self.params, missing=missing)
        with fastopt.use_backend(BACKEND) if insist else nullcontext():
            self.ours.step()
        for optimizer in self.optimizers[1:]:
            optimizer.step()

    def check(self) -> None:
        """Checkpoints have the same form, and we are as accurate as torch."""
        assert layout(self.ours) == layout(self.optimizers[1])
        everything = []
        for params, optimizer in zip(self.params, self.optimizers, strict=True):
            found: dict[Any, list[Tensor]] = {}
            for p, mine in zip(params, self.params[0], strict=True):
                state = {} if p.is_meta else {"param": p, **optimizer.state.get(p, {})}
                for name, value in state.items():
                    real = torch.view_as_real(value) if value.is_complex() else value
                    found.setdefault((name, mine.dtype), []).append(real.detach().flatten())
            everything.append({key: torch.cat(values) for key, values in found.items()})
        assert everything[0].keys() == everything[1].keys() == everything[2].keys()
        for key, value in everything[0].items():
            assert_as_accurate(value, everything[1][key], everything[2][key].double())


Make = Callable[..., Optimizer]
#: Words and numbers that must be the same, and tensors that must agree.
Outcome = tuple[list[Any], list[Tensor]]


def same(info: OptimizerInfo, scenario: Callable[[Make], Outcome], insist: bool = False) -> None:
    """Run a scenario with torch's for-loop and with ours, and compare."""
    seed, outcomes = torch.randint(2**31, ()).item(), []
    for module in (torch.optim, fastopt.optim):
        torch.manual_seed(seed)
        make = getattr(module, info.name)
        if module is torch.optim:
            outcomes.append(scenario(partial(make, foreach=False)))
        elif insist:
            with fastopt.use_backend(BACKEND):
                outcomes.append(scenario(make))
        else:
            outcomes.append(scenario(make))
    (theirs, expected), (ours, found) = outcomes
    assert ours == theirs
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, equal_nan=True)


def perceptron() -> torch.nn.Sequential:
    first = torch.nn.Linear(4, 8, bias=False)  # whose gradient would be rounding and no more
    layers = first, torch.nn.BatchNorm1d(8), torch.nn.ReLU(), torch.nn.Linear(8, 2)
    return torch.nn.Sequential(*layers).double()


def loss_of(model: torch.nn.Module) -> Tensor:
    output: Tensor = model(torch.randn(6, 4, dtype=torch.float64))
    return (output - 1).square().mean()


def values(model: torch.nn.Module) -> list[Tensor]:
    return [v.detach().double() for v in model.state_dict().values()]


def given(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Its groups without the parameters, and without what a for-loop is told to be one with."""
    left_out = ("params", "foreach")
    return [
        {k: repr(v) for k, v in group.items() if k not in left_out}
        for group in optimizer.state_dict()["param_groups"]
    ]

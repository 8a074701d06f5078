"""Models to average, torch's rules for it, and what its averages are compared by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import LARGE
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import swa_utils as theirs

import fastopt
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


def backends(average: ours.AveragedModel, model: nn.Module) -> set[str]:
    return {decision.backend for decision in fastopt.explain(average, model)}


def own_ema(averages: Any, values: Any, count: Any) -> None:
    torch._foreach_lerp_(averages, values, 0.5)


def rebind(model: Any) -> None:
    model.linear.weight.data = torch.randn(7, 7)

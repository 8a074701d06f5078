"""What fastopt.check looks at in an optimizer that is made of a user's rule."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from ._check_loss import place_of
from .dispatch import BACKENDS, use_backend
from .errors import BackendUnavailable
from .optim._rule import Rule

__all__ = ["check_optimizer"]

#: backend, what was compared, error, allowed error, and words
Found = tuple[str, str, float, float, str]
#: Of each parameter the parameter itself and its states, by their names.
Values = list[dict[str, Tensor]]

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HARD = (0.0, -0.0, 1.0, -2.5, 1e-45, -1e-39, 3e38, -3e38, torch.inf, -torch.inf, torch.nan)
#: No elements, one, a tail behind whole vectors, more than one block of any backend, two axes.
_SHAPES = ((0,), (1,), (70,), (4099,), (58, 7))
_STEPS = 3


def check_optimizer(kind: type[Rule], options: dict[str, Any]) -> Iterator[Found]:
    """The findings. Each step is compared by itself, from where the last one has led.

    Args:
        kind: a class that :func:`fastopt.optimizer` has made.
        options: of its constructor.
    """
    for backend in BACKENDS:
        place = place_of(backend)
        try:
            _step(kind, options, backend, [{"param": torch.ones(3, device=place)}],
                  [torch.ones(3, device=place)], 0)  # fmt: skip
        except BackendUnavailable:
            continue
        for dtype in _DTYPES:
            yield _usual(kind, options, backend, place, dtype)
        yield _hard(kind, options, backend, place)


def _step(
    kind: type[Rule], options: dict[str, Any], backend: str, before: Values,
    grads: Sequence[Tensor], steps: int,
) -> Values:  # fmt: skip
    """What one step makes of parameters and states; steps: how many there have been."""
    params = [Parameter(values["param"].clone()) for values in before]
    optimizer = kind(params, **options)
    for param, values, grad in zip(params, before, grads, strict=True):
        param.grad = grad.clone()
        if steps:
            states = {name: v.clone() for name, v in values.items() if name != "param"}
            count = {"step": torch.tensor(float(steps))} if kind._counts_steps else {}
            optimizer.state[param] = {**count, **states}
    with use_backend(backend):
        optimizer.step()
    return [
        {
            "param": param.detach(),
            **{name: optimizer.state[param][name] for name in kind._beginnings},
        }
        for param in params
    ]


def _in(values: Values, dtype: torch.dtype) -> Values:
    return [{name: v.to(dtype) for name, v in tensors.items()} for tensors in values]


def _usual(
    kind: type[Rule], options: dict[str, Any], backend: str, place: torch.device, dtype: torch.dtype
) -> Found:
    """Steps with normally distributed gradients, against the rule in torch's float64."""
    generator = torch.Generator("cpu").manual_seed(1)

    def drawn() -> list[Tensor]:
        numbers = [
            torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in _SHAPES
        ]
        turned = [x.t().contiguous().t() if x.dim() == 2 else x for x in numbers]
        return [x.to(dtype).to(place) for x in turned]

    wide = torch.promote_types(dtype, torch.float32)
    # one rounding when it is stored, and of what is computed before a few
    rounding = torch.finfo(dtype).eps + 32 * torch.finfo(wide).eps
    error, allowed, words = 0.0, rounding, ""
    values: Values = [{"param": x} for x in drawn()]
    for steps in range(_STEPS):
        grads = drawn()
        exact, theirs = (
            _step(kind, options, "reference", _in(values, d), [g.to(d) for g in grads], steps)
            for d in (torch.float64, wide)
        )
        values = _step(kind, options, backend, values, grads, steps)
        for name in values[0]:
            mine, its, best = (
                torch.cat([tensors[name].reshape(-1).double() for tensors in some])
                for some in (values, theirs, exact)
            )
            scale = float(best.abs().max()) or 1.0
            here, spare = (
                float((x - best).abs().nan_to_num(torch.inf).max()) / scale for x in (mine, its)
            )
            limit = 4 * spare + rounding
            if here / limit > error / allowed:
                place_of_it = int((mine - best).abs().nan_to_num(torch.inf).argmax())
                words = (
                    f"{name} after step {steps + 1}: {float(mine[place_of_it]):g}, "
                    f"the rule in float64 {float(best[place_of_it]):g}"
                )
                error, allowed = here, limit
    return backend, str(dtype).removeprefix("torch."), error, allowed, words


def _hard(kind: type[Rule], options: dict[str, Any], backend: str, place: torch.device) -> Found:
    """Infinities, NaN, 0, subnormal and largest gradients, against the rule in torch's float32.

    Or in its float64, rounded: in between, numbers may overflow in the one and not in the other.
    """
    pairs = torch.tensor(list(itertools.product(_HARD, repeat=2)), device="cpu").to(place)
    values: Values = [{"param": torch.linspace(-1.0, 1.0, len(pairs), device=place)}]
    wrong, words = 0, ""
    for steps in range(2):
        grads = [pairs[:, steps]]
        narrow, wide = (
            _step(kind, options, "reference", _in(values, d), [g.to(d) for g in grads], steps)
            for d in (torch.float32, torch.float64)
        )
        values = _step(kind, options, backend, values, grads, steps)
        for name, mine in values[0].items():
            right = torch.zeros(len(pairs), dtype=torch.bool, device=place)
            for its in (narrow[0][name], wide[0][name].float()):
                right |= torch.isclose(mine, its, rtol=1e-3, atol=1e-6, equal_nan=True)
            bad = (~right).nonzero()
            wrong += len(bad)
            if len(bad) and not words:
                k = int(bad[0])
                words = (
                    f"{name} after gradients {pairs[k, : steps + 1].tolist()}: "
                    f"{float(mine[k]):g}, torch {float(narrow[0][name][k]):g}"
                )
    return backend, "hard gradients: how many are wrong", float(wrong), 0.0, words

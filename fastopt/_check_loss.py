"""What fastopt.check looks at in a loss."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from .dispatch import BACKENDS, use_backend
from .errors import BackendUnavailable
from .front.formula_loss import FormulaLoss

__all__ = ["check_loss", "place_of"]

Found = tuple[str, str, float, float, str]
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_HARD = (0.0, -0.0, 1.0, -1.0, 0.5, 1e-40, -1e-40, 3e38, -3e38, torch.inf, -torch.inf, torch.nan)
#: A tail behind whole vectors, and blocks: more than one chunk of any backend.
_SIZE = 4099


def check_loss(
    loss: FormulaLoss, samples: tuple[Tensor, ...], options: dict[str, Any]
) -> Iterator[Found]:
    """The findings: backend, what was compared, error, allowed error, and words."""
    options = loss.check_options(options, "mean")
    draw = _drawing(loss, samples, options)
    yield _derivatives(loss, draw, options)
    for backend in BACKENDS:
        place = place_of(backend)
        try:
            with use_backend(backend):
                loss(*draw(3, torch.float32, place), **options)
        except BackendUnavailable:
            continue
        for dtype in _DTYPES:
            yield _numbers(loss, backend, draw(_SIZE, dtype, place), dtype, options)
        yield from _layouts(loss, backend, draw, place, options)
        yield _hard(loss, backend, place, options)


def place_of(backend: str) -> torch.device:
    """Where a backend's tensors are."""
    if backend == "triton":
        for kind in ("cuda", "xpu"):
            module: Any = getattr(torch, kind, None)
            if module is not None and module.is_available():
                return torch.device(kind)
    return torch.device("cpu")


Draw = Callable[[int, torch.dtype, torch.device], tuple[Tensor, ...]]


def _drawing(loss: FormulaLoss, samples: tuple[Tensor, ...], options: dict[str, Any]) -> Draw:
    """What draws so many numbers of each tensor, always the same ones."""
    names = loss.tensors
    if samples and len(samples) != len(names):
        raise TypeError(f"samples of {len(samples)} tensors; there are {', '.join(names)}")

    def drawing(between: bool) -> Draw:
        def draw(size: int, dtype: torch.dtype, place: torch.device) -> tuple[Tensor, ...]:
            generator = torch.Generator("cpu").manual_seed(size)
            found = []
            for k in range(len(names)):
                shape = {"size": (size,), "generator": generator, "device": "cpu"}
                if samples:
                    flat = samples[k].detach().cpu().double().reshape(-1)
                    numbers = flat[torch.randint(len(flat), **shape)]  # type: ignore[call-overload]
                else:
                    of: Any = torch.rand if between else torch.randn
                    numbers = of(dtype=torch.float64, **shape)
                    numbers = numbers * 0.98 + 0.01 if between else numbers
                found.append(numbers.to(dtype).to(place))
            return tuple(found)

        return draw

    for between in (False, True):
        given = drawing(between)(_SIZE, torch.float64, torch.device("cpu"))
        if torch.isfinite(_by_torch(loss, given, options)[0]).all():
            return drawing(between)
    raise ValueError(
        f"the loss {loss.__name__} isn't finite for "
        + ("the samples" if samples else "numbers between 0 and 1; give samples: tensors of usual "
           "numbers, one for each tensor of the loss")
    )  # fmt: skip


def _by_torch(
    loss: FormulaLoss, tensors: tuple[Tensor, ...], options: dict[str, Any]
) -> tuple[Tensor, ...]:
    """What the user's own function, of torch's tensors, has by element, and torch's gradients."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) for t in tensors]
    with torch.enable_grad():
        value = loss.__wrapped__(*leaves, **options)
        grads = torch.autograd.grad(
            value, [leaves[k] for k in loss.followed], torch.ones_like(value),
            allow_unused=True, materialize_grads=True,
        )  # fmt: skip
    return (value.detach(), *grads)


def _by_loss(
    loss: FormulaLoss, backend: str, tensors: tuple[Tensor, ...], options: dict[str, Any],
    reduction: str,
) -> tuple[Tensor, ...]:  # fmt: skip
    leaves = [t.detach() for t in tensors]
    for k in loss.followed:
        leaves[k].requires_grad_()
    with torch.enable_grad(), use_backend(backend):
        value = loss(*leaves, **options, reduction=reduction)
        followed = [leaves[k] for k in loss.followed]
        grads = torch.autograd.grad(value, followed, torch.ones_like(value))
    return (value.detach(), *grads)


def _derivatives(loss: FormulaLoss, draw: Draw, options: dict[str, Any]) -> Found:
    """Those of the loss against differences of its values, in float64."""
    tensors = draw(101, torch.float64, torch.device("cpu"))
    _, *grads = _by_loss(loss, "reference", tensors, options, "none")
    step, error, words = 1e-5, 0.0, ""
    for k, grad in zip(loss.followed, grads, strict=True):
        beside = []
        for sign in (1, -1):
            moved = (*tensors[:k], tensors[k] + sign * step, *tensors[k + 1 :])
            with torch.no_grad():
                beside.append(loss.__wrapped__(*moved, **options))
        difference = (beside[0] - beside[1]) / (2 * step)
        off = ((grad - difference).abs() / (1 + difference.abs())).nan_to_num(torch.inf)
        if off.max() > error:
            error, place = float(off.max()), int(off.argmax())
            words = (
                f"by {loss.tensors[k]} at {_named(loss, [float(t[place]) for t in tensors])}: "
                f"{float(grad[place]):g}, by differences {float(difference[place]):g}"
            )
    return "reference", "derivatives against differences", error, 1e-5, words


def _named(loss: FormulaLoss, numbers: Sequence[float]) -> str:
    return ", ".join(f"{n}={v:g}" for n, v in zip(loss.tensors, numbers, strict=True))


def _numbers(
    loss: FormulaLoss, backend: str, tensors: tuple[Tensor, ...], dtype: torch.dtype,
    options: dict[str, Any],
) -> Found:  # fmt: skip
    """Values, their mean and gradients against the formula in float64."""
    exact = _by_torch(loss, tuple(t.double() for t in tensors), options)
    wide = torch.promote_types(dtype, torch.float32)
    theirs = _by_torch(loss, tuple(t.to(wide) for t in tensors), options)
    # one rounding, and of what is computed before a few
    rounding = torch.finfo(dtype).eps + 32 * torch.finfo(wide).eps
    worst: tuple[float, float, float] | None = None  # how much beyond what is allowed, and both
    for reduction in ("none", "mean"):
        found = _by_loss(loss, backend, tensors, options, reduction)
        for mine, its, best in zip(found, theirs, exact, strict=True):
            if reduction == "mean":
                count = len(best)
                its, best = (
                    (t.mean() if mine.dim() == 0 else t / count) for t in (its.double(), best)
                )
            # of a side of where that isn't chosen torch's autograd may have NaN
            known = ~torch.isnan(best)
            best, its, mine = (t.double()[known] for t in (best, its, mine))
            scale = float(best.abs().max()) or 1.0
            here, spare = (float((t - best).abs().max()) / scale for t in (mine, its))
            here = torch.inf if math.isnan(here) else here
            limit = 4 * spare + rounding
            worst = max(worst or (-torch.inf, 0.0, 0.0), (here - limit, here, limit))
    assert worst is not None
    _, error, allowed = worst
    return backend, str(dtype).removeprefix("torch."), error, allowed, ""


def _layouts(
    loss: FormulaLoss, backend: str, draw: Draw, place: torch.device, options: dict[str, Any]
) -> Iterator[Found]:
    """Strides, tensors that are broadcast, and no elements, against the definition."""
    flat = draw(7 * 58, torch.float32, place)
    spaced = tuple(t.reshape(7, 58)[:, ::2] for t in flat)
    turned = tuple(t.reshape(58, 7)[:29].t() if k % 2 else t.reshape(7, 58)[:, ::2]
                   for k, t in enumerate(flat))  # fmt: skip
    broadcast = tuple(
        t.reshape(7, 58)[:1] if k % 2 else t.reshape(7, 58) for k, t in enumerate(flat)
    )
    empty = tuple(t[:0] for t in flat)
    for what, tensors in (
        ("strides", spaced), ("different layouts", turned), ("broadcasting", broadcast),
        ("no elements", empty),
    ):  # fmt: skip
        ours = _by_loss(loss, backend, tensors, options, "none")
        right = _by_torch(loss, tuple(t.double() for t in tensors), options)
        error = 0.0
        for mine, best in zip(ours, right, strict=True):
            if mine.shape != best.shape:
                error = torch.inf
            elif len(found := mine.double()[known := ~torch.isnan(best)]):
                scale = float(best[known].abs().max()) or 1.0
                off = float((found - best[known]).abs().max()) / scale
                error = max(error, torch.inf if math.isnan(off) else off)
        yield backend, what, error, 1e-4, ""


def _hard(loss: FormulaLoss, backend: str, place: torch.device, options: dict[str, Any]) -> Found:
    """Infinities, NaN and the like, against the formula in float32 and in float64."""
    count = len(loss.tensors)
    if count <= 3:
        rows = list(itertools.product(_HARD, repeat=count))
    else:
        size = len(_HARD)
        rows = [
            tuple(_HARD[(first + step * k) % size] for k in range(count))
            for first, step in itertools.product(range(size), repeat=2)
        ]
    given = torch.tensor(rows, dtype=torch.float32, device="cpu").to(place).unbind(1)
    found = _by_loss(loss, backend, given, options, "none")
    narrow = _by_torch(loss, given, options)
    wide = [t.float() for t in _by_torch(loss, tuple(t.double() for t in given), options)]
    # of a side that isn't chosen torch's autograd may have NaN where there is a derivative
    wrong = torch.zeros(len(rows), dtype=torch.bool, device=place)
    for k, mine in enumerate(found):
        right = torch.zeros_like(wrong)
        for its in (narrow[k], wide[k]):
            right |= torch.isclose(mine, its, rtol=1e-3, atol=1e-6, equal_nan=True)
            if k:
                right |= torch.isnan(its)
        wrong |= ~right
    bad = wrong.nonzero()
    words = ""
    if len(bad):
        row = int(bad[0])
        ours, torchs = ([float(t[row]) for t in some] for some in (found, narrow))
        words = f"{_named(loss, rows[row])}: {ours}, torch {torchs}"
    return backend, "hard numbers: how many are wrong", float(len(bad)), 0.0, words

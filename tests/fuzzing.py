"""What random tests share: which results are right, and strategies for layouts and numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import hypothesis.strategies as st
import torch
from cases import INTERPRETED
from hypothesis import HealthCheck, settings
from torch import Tensor

INF, NAN = float("inf"), float("nan")
# The fixture that seeds torch is for others: here every tensor comes from a drawn seed.
fuzzed = settings(
    report_multiple_bugs=False,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


# -- what is right ------------------------------------------------------------------------


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """What a kernel computes in."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def shaken(tensor: Tensor, eps: float, pattern: int) -> Tensor:
    """The same but for the last digits of each element; pattern 0 makes all of them larger.

    By several units of the last place: one alone may be lost in torch's own rounding.
    """
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator().manual_seed(pattern)
    signs = torch.randint(0, 2, tensor.shape, generator=generator).double() * 2 - 1
    return tensor.double() * (1 + 8 * eps * (signs if pattern else 1.0))


def wrong_elements(
    mine: Tensor,
    torchs: Sequence[Tensor],
    oracle: Tensor,
    nearby: Sequence[Tensor],
    compute: torch.dtype,
    size: float | Tensor,
) -> Tensor:
    """Which elements are neither the exact result, nor torch's own.

    An element is right if it is the oracle's rounded once, but for what the last digit of the
    arguments is worth (`nearby` are oracles for other last digits) and that of `size` (of what
    it may be a difference of), or if it is torch's in the tensors' dtype or in the one that
    kernels compute in. That includes infinities and NaN: where torch agrees on one in all of
    these, or on a number, so do we; where its intermediate results overflow, anything will do.
    """
    found, eps = mine.double(), torch.finfo(compute).eps
    limits = torch.finfo(mine.dtype)
    spread = torch.zeros_like(oracle)
    for other in nearby:
        spread = torch.maximum(spread, (other - oracle).abs().nan_to_num(INF, INF))
    margin = 4 * spread + (limits.eps + 32 * eps) * oracle.abs() + 4 * limits.smallest_normal
    margin += 32 * eps * size
    margin = torch.where(oracle.isfinite(), margin, 0.0)

    def agrees(expected: Tensor) -> Tensor:
        overflows = found.isinf() & (expected.abs() + margin >= limits.max * (1 - limits.eps))
        return (
            (found == expected)
            | (found.isnan() & expected.isnan())
            | ((found - expected).abs() <= margin)
            | (overflows & (found.sign() == expected.sign()))
        )

    right = agrees(oracle) | (oracle.isfinite() & ~torchs[-1].isfinite())
    for other in torchs:
        right |= agrees(other.double())
    return ~right


def assert_right(
    what: str,
    mine: Tensor,
    torchs: Sequence[Tensor],
    oracle: Tensor,
    nearby: Sequence[Tensor],
    compute: torch.dtype,
    size: float | Tensor = 0.0,
) -> None:
    assert (mine.dtype, mine.shape) == (torchs[0].dtype, torchs[0].shape), what
    wrong = wrong_elements(mine, torchs, oracle, nearby, compute, size)
    if wrong.any():
        lines = [
            f"{what}{place.tolist()}: {mine[tuple(place)].item()!r}, torch has "
            f"{[t[tuple(place)].item() for t in torchs]}, "
            f"in float64 {oracle[tuple(place)].item()!r}"
            for place in wrong.nonzero()[:5]
        ]
        raise AssertionError("\n".join(lines))


def identical(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.allclose(a, b, rtol=0, atol=0, equal_nan=True)


# -- tensors --------------------------------------------------------------------------------


class Layout(NamedTuple):
    """Where a tensor's elements lie: dimensions in the order of memory, steps, an offset.

    expanded is a dimension along which all elements are one.
    """

    order: tuple[int, ...]
    steps: tuple[int, ...]
    offset: int
    expanded: int | None

    def place(self, values: Tensor) -> Tensor:
        """The values (of an expanded dimension the first ones) laid out; NaN between them."""
        if self.expanded is not None and values.shape[self.expanded]:
            shape = values.shape
            first = values.narrow(self.expanded, 0, 1)
            return self._replace(expanded=None).place(first).expand(shape)
        sizes = [values.shape[d] * self.steps[d] for d in self.order]
        memory = values.new_full(
            (self.offset + math.prod(sizes),), NAN if values.dtype.is_floating_point else 0
        )
        placed = memory[self.offset :].view(sizes)
        placed = placed[tuple(slice(None, None, self.steps[d]) for d in self.order)]
        placed = placed.permute([self.order.index(d) for d in range(values.dim())])
        return placed.copy_(values)


@st.composite
def layouts(draw: st.DrawFn, dims: int, gaps: bool = True) -> Layout:
    order = draw(st.one_of(st.just(tuple(range(dims))), st.permutations(range(dims)).map(tuple)))
    steps = (1,) * dims
    expanded = None
    if gaps and dims:
        some = st.tuples(*[st.sampled_from((1, 1, 2, 3))] * dims)
        steps = draw(st.one_of(st.just(steps), st.just(steps), some))
        expanded = draw(st.sampled_from((None, None, None, *range(dims))))
    return Layout(order, steps, draw(st.sampled_from((0, 0, 1, 3))), expanded)


def specials(dtype: torch.dtype) -> tuple[float, ...]:
    limits = torch.finfo(dtype)
    tiny = limits.smallest_normal * limits.eps
    return (
        0.0, -0.0, 1.0, NAN, INF, -INF, limits.max, -limits.max, limits.smallest_normal, tiny,
        -tiny, limits.eps, math.sqrt(limits.max), 1e3, -1e3,
    )  # fmt: skip


class Values(NamedTuple):
    """Random numbers, and special ones at random places.

    None very large or small if tame, nor finite ones in float64, where no oracle says what
    over- or underflows.
    """

    seed: int
    scale: float
    special: tuple[tuple[int, int], ...]  # places and which
    tame: bool

    def make(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        values = torch.randn(tuple(shape), generator=generator, dtype=torch.float64) * self.scale
        values = values.to(dtype)
        among, limits = specials(dtype), torch.finfo(dtype)
        for place, which in self.special if values.numel() else ():
            number = among[which % len(among)]
            size = abs(number)
            moderate = number == 0 or 1e-6 < size < 1e4 or math.isnan(number)
            if INTERPRETED and dtype == torch.bfloat16 and size < limits.smallest_normal:
                continue  # which the interpreter takes for 0
            if moderate or not (self.tame or (dtype == torch.float64 and size < INF)):
                values.view(-1)[place % values.numel()] = number
        return values


def values(
    scales: Sequence[float] = (1.0, 3.0, 100.0, 1e-3), tame: bool = False
) -> st.SearchStrategy[Values]:
    place_and_value = st.tuples(st.integers(0, 10**6), st.integers(0, 14))
    special = st.one_of(st.just(()), st.lists(place_and_value, max_size=5).map(tuple))
    return st.builds(Values, st.integers(0, 2**20), st.sampled_from(scales), special, st.just(tame))


SIZES = st.one_of(st.integers(0, 9), st.sampled_from((16, 17, 33, 64, 65)))


def is_dense(x: Tensor) -> bool:
    x = x.squeeze()
    return torch.empty_like(x).stride() == x.stride()

"""Numbers stored in 16 bits: unbiased, the same from every backend, and what they are good for."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, INTERPRETED
from torch import Tensor
from torch.nn import Parameter

import fastopt
from fastopt import optim
from fastopt.kernels.reference.rounding import compensated, element_bits, stochastic
from fastopt.kernels.rounding import key_of, mixed, stream_of, word_of

BFLOAT, HALF, FLOAT, DOUBLE = torch.bfloat16, torch.float16, torch.float32, torch.float64
#: Every optimizer that has the options, with arguments that give it all of its states.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "ASGD": {}, "Adadelta": {}, "Adagrad": {}, "Adam": {"amsgrad": True}, "AdamW": {},
    "Adamax": {}, "Lion": {}, "NAdam": {}, "RAdam": {},
    "RMSprop": {"momentum": 0.9, "centered": True}, "Rprop": {},
    "SGD": {"momentum": 0.9, "dampening": 0.5},
}  # fmt: skip
OPTIONS: tuple[dict[str, Any], ...] = (
    {"state_dtype": BFLOAT}, {"rounding": "stochastic", "state_dtype": BFLOAT},
    {"rounding": "kahan"}, {"rounding": "kahan", "state_dtype": BFLOAT}, {"rounding": "stochastic"},
)  # fmt: skip
#: Each optimizer with one pair of options and dtype after the other.
PAIRED = [
    (name, options, dtype)
    for place, name in enumerate(OPTIMIZERS)
    for options, dtype in [
        (OPTIONS[0], FLOAT),
        (OPTIONS[1 + place % 4], BFLOAT if place // 4 % 2 else HALF),
        (OPTIONS[1 + (place + 2) % 4], HALF if place // 4 % 2 else BFLOAT),
    ]
]
SIZES = (70, 4099, 1, 0)
# Triton's interpreter rounds to bfloat16 towards zero: not what is at stake here.
ROUNDS_TO_NEAREST = not INTERPRETED


def made(
    name: str, dtype: torch.dtype, options: dict[str, Any], sizes: tuple[int, ...] = SIZES
) -> tuple[list[Parameter], Any]:
    torch.manual_seed(5)
    params = [Parameter(torch.randn(size).to(dtype)) for size in sizes]
    arguments = {"lr": 0.01, **OPTIMIZERS[name], **options}
    return params, getattr(optim, name)(params, **arguments)


def train(params: list[Parameter], step: Callable[[], Any], steps: range) -> None:
    for k in steps:
        torch.manual_seed(100 + k)
        for param in params:
            param.grad = torch.randn(param.shape).to(param.dtype)
        step()


def tensors(params: list[Parameter], optimizer: Any) -> list[tuple[str, Tensor]]:
    """All that a step writes to, without the counters."""
    found = [("param", p.detach()) for p in params]
    for p in params:
        found += [(k, v) for k, v in optimizer.state[p].items() if v.shape == p.shape]
    return found


def assert_same(a: list[tuple[str, Tensor]], b: list[tuple[str, Tensor]]) -> None:
    assert [name for name, _ in a] == [name for name, _ in b]
    for (name, x), (_, y) in zip(a, b, strict=True):
        assert x.dtype == y.dtype, name
        assert torch.equal(x, y), name


def insisted(optimizer: Any, backend: str = BACKEND) -> Callable[[], None]:
    def step() -> None:
        with fastopt.use_backend(backend):
            optimizer.step()

    return step


# -- one number -------------------------------------------------------------------------


def neighbours(x: float, dtype: torch.dtype) -> tuple[float, float]:
    """The numbers of a dtype next to x, from below and above, found by bisection of its bits."""
    numbers = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).double()
    numbers = numbers[numbers.isfinite()]
    return numbers[numbers <= x].max().item(), numbers[numbers >= x].min().item()


ONES = [
    (dtype, x)
    for dtype, xs in (
        (BFLOAT, (1.001, -3.14159, 1e-30, -2e-39, 65519.0)),
        (HALF, (1.0003, -3.14159, 6.3e-5, -5e-5, 3.3e-7, 2e-8, -65490.0, 6.1e-5)),
    )
    for x in xs
]


@pytest.mark.parametrize(("dtype", "x"), ONES, ids=str)
def test_mean_is_unbiased(dtype: torch.dtype, x: float) -> None:
    """A million roundings of one number, at consecutive places: their mean is that number."""
    count = 1_000_000
    number = torch.tensor(x, dtype=FLOAT)
    bits = element_bits(torch.arange(count), key_of(*stream_of(3, 0, 0), 7), 0)
    rounded = stochastic(number.expand(count).contiguous(), bits, dtype).double()
    low, high = neighbours(number.item(), dtype)
    assert set(rounded.unique().tolist()) == {low, high}
    share = (number.item() - low) / (high - low)
    error = (high - low) * math.sqrt(share * (1 - share) / count)
    assert abs(rounded.mean().item() - number.item()) <= 4 * error


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_what_a_dtype_has_stays(dtype: torch.dtype) -> None:
    """All 65,536 of its numbers, with the largest and smallest random bits: infinities, NaN, ±0."""
    numbers = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(dtype)
    for bits in (0, 1, 0x7FFF, 0x8000, 0xFFFF):
        found = stochastic(numbers.float(), torch.full(numbers.shape, bits), dtype)
        nan = numbers.isnan()
        assert found[nan].isnan().all()
        assert torch.equal(found[~nan].view(torch.int16), numbers[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_nothing_becomes_infinite_but_by_nearest(dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    spacing = largest - neighbours(largest * (1 - 1e-6), dtype)[0]
    shares = torch.tensor([0.01, 0.25, 0.49, 0.5, 0.51, 0.99], dtype=DOUBLE)
    beyond = (largest + spacing * shares).float()
    beyond = torch.cat([beyond, -beyond, torch.tensor([3.4e38, -3.4e38])])
    for bits in (0, 0x8000, 0xFFFF):
        found = stochastic(beyond, torch.full(beyond.shape, bits), dtype)
        assert torch.equal(found, beyond.to(dtype))


def test_words_are_uncorrelated() -> None:
    """Those of neighbours, of the halves, pairs of slots, steps, parameters and seeds."""
    count = 1 << 16
    places = torch.arange(count)

    def bits(seed: int, place: int, step: int, half: int) -> Tensor:
        found = element_bits(places, key_of(*stream_of(seed, place, 0), step), half)
        assert 0 <= found.min() < 8
        assert 2**16 - 8 < found.max() < 2**16
        return found.double() / 2**16 - 0.5

    first = bits(0, 0, 1, 0)
    others = [first.roll(k) for k in (1, 2, 16, 1024)]
    others += [bits(0, 0, 1, half) for half in (1, 2, 3, 4)]
    others += [bits(0, 0, 2, 0), bits(0, 1, 1, 0), bits(1, 0, 1, 0), bits(1 << 40, 0, 1, 0)]
    for other in others:
        correlation = (first * other).mean() * 12
        assert abs(correlation) < 4 / math.sqrt(count)
    # and the bits of all words are evenly filled, each by itself
    words = word_of(places, *key_of(*stream_of(0, 0, 0), 1), 0)
    shares = torch.stack([(words >> k & 1).double().mean() for k in range(32)])
    assert (shares - 0.5).abs().max() < 4.5 * 0.5 / math.sqrt(count)


def test_hash_spreads_each_bit() -> None:
    """A bit more or less of what is hashed turns half of the bits of the hash."""
    x = torch.randint(0, 1 << 32, (1 << 14,))
    for bit in range(32):
        turned = mixed(x) ^ mixed(x ^ (1 << bit))
        shares = torch.stack([(turned >> k & 1).double().mean() for k in range(32)])
        assert (shares - 0.5).abs().max() < 0.03


def test_compensation_has_what_is_lost() -> None:
    value = torch.cat([torch.randn(1000), torch.tensor([math.inf, -math.inf, 3.4e38, 1e-40])])
    for dtype in (BFLOAT, HALF):
        stored, lost = compensated(value, dtype)
        assert torch.equal(stored, value.to(dtype))
        assert torch.equal(lost[1000:1002], torch.zeros(2, dtype=dtype))
        finite = stored.isfinite()
        whole = stored.double() + lost.double()
        error = (whole - value.double()).abs()[finite]
        ulp = torch.finfo(dtype).eps ** 2 * value[finite].abs() + torch.finfo(dtype).tiny
        assert (error <= ulp).all()
    stored, lost = compensated(torch.tensor([math.nan]), BFLOAT)
    assert stored.isnan().all()
    assert torch.equal(lost, torch.zeros(1, dtype=BFLOAT))


# -- steps ------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "options", "dtype"), PAIRED, ids=str)
def test_kernels_follow_the_definition(
    name: str, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Three steps. A float32 may differ by a rounding, and with it at most a few of 16 bits."""
    (params, optimizer), (others, reference) = (made(name, dtype, options) for _ in range(2))
    train(params, insisted(optimizer), range(3))
    train(others, insisted(reference, "reference"), range(3))
    for (kind, x), (_, y) in zip(
        tensors(params, optimizer), tensors(others, reference), strict=True
    ):
        assert x.dtype == y.dtype
        if kind not in ("param", "compensation"):
            assert x.dtype == options.get("state_dtype", dtype)
        if kind == "compensation" or (INTERPRETED and "state_dtype" not in options):
            continue
        tight = x.dtype == FLOAT or (kind == "param" and options.get("rounding") is None)
        near = {"rtol": 1e-5, "atol": 1e-6} if tight else {"rtol": 0.02, "atol": 1e-3}
        if x.dtype == FLOAT or ROUNDS_TO_NEAREST:
            torch.testing.assert_close(x, y, **near)  # type: ignore[arg-type]
        if x.dtype != FLOAT and ROUNDS_TO_NEAREST:
            assert (x != y).sum() <= 2 + 0.006 * x.numel(), kind
    if options.get("rounding") == "kahan":
        for p, q in zip(params, others, strict=True):
            sums = [
                t.double() + o.state[t]["compensation"].double()
                for t, o in ((p, optimizer), (q, reference))
            ]
            rough = INTERPRETED and "state_dtype" not in options
            torch.testing.assert_close(*sums, rtol=2e-4, atol=1e-3 if rough else 2e-5)


EXACT = {
    "SGD": {"lr": 2.0**-9, "momentum": 0.5},
    "Lion": {"lr": 2.0**-9, "betas": (0.5, 0.75)},
    "Rprop": {"lr": 2.0**-9, "etas": (0.5, 1.5), "step_sizes": (2.0**-12, 2.0**-4)},
}


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT, HALF])
@pytest.mark.parametrize("name", EXACT)
def test_backends_agree_to_the_bit(name: str, dtype: torch.dtype) -> None:
    """Where float32 computes exactly, so that only the random numbers could differ."""
    options: dict[str, Any] = {"state_dtype": BFLOAT, "seed": (1 << 50) + 3}
    options |= {} if dtype == FLOAT else {"rounding": "stochastic"}
    found = []
    for backend in (BACKEND, "reference"):
        params = [Parameter((torch.arange(-n, n) / 256).to(dtype)) for n in (2500, 3, 16)]
        optimizer = getattr(optim, name)(params, **EXACT[name], **options)
        for k in range(3):
            for param in params:
                steps = torch.arange(param.numel()) * (2 * k + 1) % 257 - 128
                param.grad = (steps / 128).to(dtype)
            with fastopt.use_backend(backend):
                optimizer.step()
        found.append(tensors(params, optimizer))
    assert_same(*found)
    changed = [t.float() for name, t in found[0] if name == "param"]
    assert not torch.equal(changed[0], torch.arange(-2500, 2500) / 256)


@pytest.mark.skipif(BACKEND != "numba", reason="of the threads of a CPU")
@pytest.mark.parametrize("options", OPTIONS[1:3])
def test_same_for_any_threads(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.kernels.numba import multi_tensor

    monkeypatch.setattr(multi_tensor, "GRAIN", 64)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            params, optimizer = made("Adam", BFLOAT, options)
            train(params, insisted(optimizer), range(2))
            found.append(tensors(params, optimizer))
    finally:
        torch.set_num_threads(before)
    assert_same(*found)


@pytest.mark.parametrize("options", OPTIONS[1:3])
def test_same_whatever_shares_a_launch(options: dict[str, Any]) -> None:
    """A place's numbers are its own: with others there, and without gradients of others."""
    params, optimizer = made("Adam", BFLOAT, options, (70, 4099, 300))
    train(params, insisted(optimizer), range(2))
    found = tensors(params, optimizer)
    params, optimizer = made("Adam", BFLOAT, options, (70, 4099, 300))
    for k in range(2):
        torch.manual_seed(100 + k)
        grads = [torch.randn(param.shape).to(param.dtype) for param in params]
        for chosen in (1, 0, 2):
            for place, param in enumerate(params):
                param.grad = grads[place] if place == chosen else None
            insisted(optimizer)()
    assert_same(tensors(params, optimizer), found)


@pytest.mark.parametrize("shape", [(6, 35), (2, 3, 5, 7)])
def test_layouts(shape: tuple[int, ...]) -> None:
    """Dense ones by a kernel as by the definition; one with gaps by the definition."""
    size, found = math.prod(shape), []
    for backend in (BACKEND, "reference"):
        flat = (torch.arange(size) / 64).to(BFLOAT).view(shape)
        param = Parameter(flat.transpose(0, 1))
        optimizer = optim.SGD([param], lr=2.0**-9, rounding="stochastic")
        param.grad = torch.ones_like(param)
        with fastopt.use_backend(backend):
            optimizer.step()
        found.append(param.detach())
    assert torch.equal(*found)
    assert found[0].stride() == found[1].stride()
    gaps = Parameter(torch.full((40, 40), 1.0, dtype=BFLOAT)[:, ::2])
    gaps.grad = torch.full_like(gaps, 2.0**-9)
    optim.SGD([gaps], lr=1.0, rounding="stochastic").step()
    low = gaps == 1 - 2.0**-8
    assert (low | (gaps == 1)).all()
    assert 300 < low.sum() < 500


# -- what it is for ---------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BFLOAT, HALF])
def test_many_small_updates_arrive(dtype: torch.dtype) -> None:
    """Against float64: plain rounding loses them all."""
    rate, steps, size = 2.0**-14, 512, 2048
    ends = {}
    for rounding in (None, "stochastic", "kahan"):
        param = Parameter(torch.ones(size, dtype=dtype))
        optimizer = optim.SGD([param], lr=rate, rounding=rounding)
        param.grad = torch.ones_like(param)
        for _ in range(steps // (8 if INTERPRETED else 1)):
            insisted(optimizer)()
        ends[rounding] = param.detach().double()
        if rounding == "kahan":
            ends["whole"] = ends["kahan"] + optimizer.state[param]["compensation"].double()
    exact = 1 - rate * (steps // (8 if INTERPRETED else 1))
    if ROUNDS_TO_NEAREST or dtype == HALF:
        assert (ends[None] == 1).all()
        assert (ends["kahan"] - exact).abs().max() <= torch.finfo(dtype).eps / 2
        assert (ends["whole"] - exact).abs().max() <= 2.0**-13
    spread = ends["stochastic"].std() / math.sqrt(size)
    assert abs(ends["stochastic"].mean() - exact) <= 4 * spread
    assert spread > 0


def test_second_moments_of_bfloat16_follow() -> None:
    """A hundredth of a gradient's square in a thousand: to nearest nothing of it would arrive."""
    param = Parameter(torch.zeros(4096))
    optimizer = optim.Adam([param], lr=0.0, betas=(0.9, 0.999), state_dtype=BFLOAT)
    param.grad = torch.ones_like(param)
    optimizer.step()
    average = optimizer.state[param]["exp_avg_sq"]
    average.fill_(1.0)
    param.grad.fill_(0.5)
    for _ in range(20):
        optimizer.step()
    exact = 0.25 + 0.75 * 0.999**20
    assert abs(average.double().mean() - exact) < 4 * average.double().std() / 64
    assert (torch.tensor(1.0, dtype=BFLOAT) * 0.999 + 0.001 * 0.25).to(BFLOAT) == 1


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_extreme_gradients(value: float) -> None:
    """As without the options: what isn't finite is so, and nothing else is."""
    found = []
    for options in ({}, {"state_dtype": BFLOAT, "rounding": "stochastic"}, {"rounding": "kahan"}):
        param = Parameter(torch.ones(70, dtype=BFLOAT))
        param.grad = torch.zeros_like(param)
        param.grad[3] = value
        optimizer = optim.SGD([param], lr=0.5, momentum=0.9, **options)
        for _ in range(2):
            insisted(optimizer)()
        found.append(param.detach())
    for other in found[1:]:
        assert torch.equal(other.isnan(), found[0].isnan())
        assert torch.equal(other.isinf(), found[0].isinf())


# -- surroundings -----------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Adam", "SGD", "NAdam", "Adagrad"])
def test_checkpoints_go_on(name: str) -> None:
    """As if there had been none: loaded, pickled, copied; and the seed is the checkpoint's."""
    options = {"state_dtype": BFLOAT, "rounding": "kahan", "seed": 11}
    params, optimizer = made(name, HALF, options)
    train(params, optimizer.step, range(2))
    again = [Parameter(p.detach().clone()) for p in params]
    loaded = getattr(optim, name)(again, lr=1.0, **{**OPTIMIZERS[name], **options, "seed": 4})
    loaded.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert [group["seed"] for group in loaded.param_groups] == [11]
    copies = [(again, loaded), copy.deepcopy((params, optimizer))]
    copies.append(pickle.loads(pickle.dumps((params, optimizer))))
    train(params, optimizer.step, range(2, 4))
    for others, other in copies:
        assert (other.state_dtype, other.rounding) == (BFLOAT, "kahan")
        train(others, other.step, range(2, 4))
        assert_same(tensors(others, other), tensors(params, optimizer))


def test_seeds_differ() -> None:
    found = []
    for seed in (0, 1, 1 << 40):
        params, optimizer = made("Adam", BFLOAT, {"rounding": "stochastic", "seed": seed})
        train(params, optimizer.step, range(1))
        found.append(params[1].detach())
    for a, b in ((0, 1), (1, 2), (0, 2)):
        assert 0.2 < (found[a] != found[b]).double().mean() < 0.8
    optimizer.param_groups[0]["seed"] = 1
    params, _ = made("Adam", BFLOAT, {"rounding": "stochastic", "seed": 1})
    for p, q in zip(optimizer.param_groups[0]["params"], params, strict=True):
        p.data.copy_(q)
    optimizer.state.clear()
    train(optimizer.param_groups[0]["params"], optimizer.step, range(1))
    assert torch.equal(optimizer.param_groups[0]["params"][1], found[1])


def test_states_beyond_float16_are_loaded_as_they_are() -> None:
    params, optimizer = made("Adam", HALF, {"state_dtype": BFLOAT})
    train(params, optimizer.step, range(1))
    optimizer.state[params[0]]["exp_avg_sq"].fill_(1e-30)
    others, other = made("Adam", HALF, {"state_dtype": BFLOAT})
    other.load_state_dict(optimizer.state_dict())
    assert (other.state[others[0]]["exp_avg_sq"] == torch.tensor(1e-30, dtype=BFLOAT)).all()


@pytest.mark.parametrize("name", ["Adam", "SGD", "Lion"])
def test_checkpoints_of_other_options(name: str) -> None:
    """States are then as they would have been; what doesn't belong there is gone."""
    plain, kept = made(name, BFLOAT, {}), made(name, BFLOAT, {**OPTIONS[3], "seed": 9})
    for params, optimizer in (plain, kept):
        train(params, optimizer.step, range(2))
    before = plain[1].state_dict()
    others, other = made(name, BFLOAT, {})
    other.load_state_dict(kept[1].state_dict())
    assert other.state_dict()["param_groups"][0].keys() == before["param_groups"][0].keys()
    for p in others:
        assert other.state[p].keys() == plain[1].state[plain[0][0]].keys()
    other.step()
    others, other = made(name, BFLOAT, OPTIONS[3])
    other.load_state_dict(before)
    assert other.param_groups[0]["seed"] == 0
    train(others, insisted(other), range(2, 3))  # with no state missing for a kernel
    for p in others:
        assert other.state[p].keys() == kept[1].state[kept[0][0]].keys()
    wide, optimizer = made(name, FLOAT, {})
    train(wide, optimizer.step, range(1))
    others, other = made(name, FLOAT, OPTIONS[0])
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(others, wide, strict=True):
        for key, value in other.state[p].items():
            if value.shape == p.shape and key != "step":
                assert torch.equal(value, optimizer.state[q][key].to(BFLOAT))


def test_state_dict_without_the_options_is_torchs() -> None:
    params, optimizer = made("Adam", FLOAT, {})
    theirs = torch.optim.Adam(params, lr=0.01, amsgrad=True)
    assert optimizer.defaults == theirs.defaults
    train(params, optimizer.step, range(1))
    train(params, theirs.step, range(1))
    ours, torchs = optimizer.state_dict(), theirs.state_dict()
    assert ours["param_groups"] == torchs["param_groups"]
    assert ours["state"][0].keys() == torchs["state"][0].keys()


def test_a_skipped_step_draws_nothing() -> None:
    """Of a GradScaler: as if it hadn't been, for counters on the host and beside the parameters."""
    for name in ("Adam", "SGD"):
        found = []
        for skips in (False, True):
            options = {**OPTIONS[1], "fused": True}
            params, optimizer = made(name, BFLOAT, options)
            train(params, insisted(optimizer), range(1))
            if skips:
                optimizer.grad_scale, optimizer.found_inf = torch.ones(1), torch.ones(1)
                train(params, insisted(optimizer), range(1, 2))
                del optimizer.grad_scale, optimizer.found_inf
            assert all(optimizer.state[p]["step"] == 1 for p in params if p.numel())
            train(params, insisted(optimizer), range(2, 3))
            found.append(tensors(params, optimizer))
        assert_same(*found)


def test_clipping_in_the_step() -> None:
    """As of gradients that were clipped before, where that is exact: the factor is a quarter."""
    found = []
    for limit in (None, 0.5):
        param = Parameter(torch.ones(1024, dtype=BFLOAT))
        options = {} if limit is None else {"max_grad_norm": limit}
        optimizer = optim.Lion([param], lr=2.0**-9, **options, **OPTIONS[1])
        param.grad = torch.full_like(param, 2.0**-4 if limit else 2.0**-6)
        insisted(optimizer)()
        found.append(tensors([param], optimizer))
        if limit:
            assert optimizer.grad_norm is not None
            assert optimizer.grad_norm.item() == pytest.approx(2.0)
    assert torch.equal(found[0][0][1], found[1][0][1])
    assert torch.allclose(found[0][1][1].float(), found[1][1][1].float(), rtol=0.01)


def test_averages_follow() -> None:
    """An average taken along by the launch is that of the parameter as it is stored."""
    torch.manual_seed(1)
    model = torch.nn.Linear(40, 30).to(BFLOAT)
    optimizer = optim.AdamW(model.parameters(), lr=0.01, **OPTIONS[1])
    average = optim.swa_utils.AveragedModel(
        model, multi_avg_fn=optim.swa_utils.get_ema_multi_avg_fn(0.5), optimizer=optimizer
    )
    expected = None
    for k in range(3):
        train(list(model.parameters()), optimizer.step, range(k, k + 1))
        weight = model.weight.detach().double()
        expected = weight if expected is None else 0.5 * expected + 0.5 * weight
    torch.testing.assert_close(average.module.weight.double(), expected, rtol=0.01, atol=1e-3)


def test_explain_names_a_kernel() -> None:
    params, optimizer = made("Lion", BFLOAT, OPTIONS[3])
    with fastopt.use_backend(BACKEND):
        (decision,) = fastopt.explain(optimizer)
    assert decision.backend == BACKEND
    assert params


# -- what doesn't go together -----------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype", "options", "words"),
    [
        ("Adam", FLOAT, {"state_dtype": HALF}, "state_dtype=torch.float16 .supported: None"),
        ("Adam", BFLOAT, {"rounding": "nearest"}, "rounding='nearest' .supported: None, 'stoch"),
        ("Adam", FLOAT, {"rounding": "kahan"}, "torch.float32 alone in group 0"),
        ("Adam", DOUBLE, {"rounding": "stochastic"}, "torch.float64 alone in group 0"),
        ("SGD", FLOAT, {"state_dtype": BFLOAT, "momentum": 0.0, "dampening": 0.0}, "without state"),
        ("Adam", BFLOAT, {"seed": 1}, "seed=1 with state_dtype=None"),
        ("Adam", BFLOAT, {"rounding": "kahan", "seed": 1}, "draw no random numbers"),
        ("Adam", BFLOAT, {"rounding": "stochastic", "seed": -1}, "seed=-1 .supported: integers"),
        ("Adam", BFLOAT, {"rounding": "stochastic", "seed": 0.5}, "seed=0.5"),
        ("Adam", BFLOAT, {"rounding": "stochastic", "differentiable": True}, "differentiable=True"),
        ("Adam", torch.complex64, {"state_dtype": BFLOAT}, "complex parameters in group 0"),
    ],
)  # fmt: skip
def test_refused_when_made(
    name: str, dtype: torch.dtype, options: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        made(name, dtype, options)


@pytest.mark.parametrize("name", ["Adafactor", "LBFGS", "Muon", "SparseAdam"])
@pytest.mark.parametrize("option", [{"state_dtype": BFLOAT}, {"rounding": "kahan"}])
def test_optimizers_without_the_options(name: str, option: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=next(iter(option))):
        getattr(optim, name)([Parameter(torch.zeros(4, 4, dtype=BFLOAT))], **option)


def test_refused_later() -> None:
    """A group that is added, a seed that is set, a sparse gradient: nothing has changed then."""
    params, optimizer = made("SGD", BFLOAT, OPTIONS[1])
    with pytest.raises(ValueError, match="group 1"):
        optimizer.add_param_group({"params": [Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == 1
    optimizer.add_param_group({"params": [Parameter(torch.zeros(3, dtype=HALF))], "lr": 0.5})
    assert optimizer.param_groups[1]["seed"] == 0
    before = params[0].detach().clone()
    params[0].grad = torch.ones_like(params[0])
    optimizer.param_groups[0]["seed"] = "x"
    with pytest.raises(ValueError, match="seed='x'"):
        optimizer.step()
    optimizer.param_groups[0]["seed"] = 1
    params[0].grad = torch.ones(70, dtype=BFLOAT).to_sparse()
    with pytest.raises(RuntimeError, match=r"sparse_coo with state_dtype=torch\.bfloat16"):
        optimizer.step()
    assert torch.equal(params[0], before)
    assert not optimizer.state
    with pytest.raises(ValueError, match=r"state_dtype=torch\.bfloat16"):
        fastopt.convert(optimizer, to="torch")


def test_mixed_groups_and_float64() -> None:
    """Parameters of float32 beside those of 16 bits are stored as ever; float64 is torch's code."""
    mixed_params = [Parameter(torch.ones(70, dtype=d)) for d in (FLOAT, BFLOAT)]
    optimizer = optim.Adam(mixed_params, lr=0.01, rounding="kahan")
    for p in mixed_params:
        p.grad = torch.ones_like(p)
    insisted(optimizer)()
    assert "compensation" not in optimizer.state[mixed_params[0]]
    assert "compensation" in optimizer.state[mixed_params[1]]
    exact = torch.optim.Adam([q := Parameter(torch.ones(70))], lr=0.01)
    q.grad = torch.ones_like(q)
    exact.step()
    torch.testing.assert_close(mixed_params[0], q)
    wide = Parameter(torch.ones(70, dtype=DOUBLE))
    optimizer = optim.Adam([wide], lr=0.01, state_dtype=BFLOAT)
    wide.grad = torch.full_like(wide, 0.3)
    optimizer.step()
    assert optimizer.state[wide]["exp_avg"].dtype == BFLOAT
    torch.testing.assert_close(wide, torch.full_like(wide, 0.99), rtol=1e-6, atol=0)


@pytest.mark.skipif(DEVICE != "cpu" or INTERPRETED, reason="of torch.compile on a CPU")
def test_not_inside_of_torch_compile() -> None:
    params, optimizer = made("Adam", BFLOAT, OPTIONS[1])
    params[0].grad = torch.ones_like(params[0])
    with pytest.raises(Exception, match=r"state_dtype=torch\.bfloat16|Unsupported|RuntimeError"):
        torch.compile(optimizer.step, fullgraph=True, backend="eager")()

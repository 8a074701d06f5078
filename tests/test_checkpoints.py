"""Checkpoints in every direction, states changed by hand, copies."""

from __future__ import annotations

import copy
import io
import json
import pickle
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from cases import INTERPRETED
from race import (
    EACH,
    INFOS,
    Make,
    Outcome,
    Race,
    accepted,
    every_input,
    flags_of,
    give_grads,
    given,
    layout,
    options_of,
    outcome,
    parameters,
    same,
)
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.testing._internal.common_optimizers import OptimizerInfo

import fastopt

# -- checkpoints -----------------------------------------------------------------------


def through_file(saved: Any) -> Any:
    file = io.BytesIO()
    torch.save(saved, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def through_json(saved: Any) -> Any:
    """Betas come back as lists, the states' keys are made numbers again."""
    text = json.dumps(saved, default=lambda t: {"tensor": t.tolist(), "dtype": str(t.dtype)[6:]})

    def decode(d: dict[str, Any]) -> Any:
        if "tensor" not in d:
            return {int(k) if k.isdigit() else k: v for k, v in d.items()}
        return torch.tensor(d["tensor"], dtype=getattr(torch, d["dtype"]))

    return json.loads(text, object_hook=decode)


@pytest.mark.parametrize("codec", [lambda saved: saved, through_file, through_json],
                         ids=["as-it-is", "file", "json"])  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_input(*((0, -1) if INTERPRETED else ()))
def test_relay(
    info: OptimizerInfo, place: int, dtype: torch.dtype, codec: Callable[[Any], Any]
) -> None:
    """One training handed back and forth between torch and us goes on like torch's."""
    shapes = [(5,), (2, 3), (), (70,)]
    race = Race(info.name, parameters(dtype, shapes=shapes), options_of(info)[place])
    for module in (torch.optim, fastopt.optim, torch.optim, fastopt.optim):
        saved = codec(race.ours.state_dict())
        race.optimizers[0] = getattr(module, info.name)(race.params[0])
        race.ours.load_state_dict(saved)
        # Which rounds states of one number to the parameters' dtype.
        race.optimizers[1].load_state_dict(race.optimizers[1].state_dict())
        for missing in ((1,), ()):
            race.step(missing, insist=module is fastopt.optim)
        race.check()
    reread = codec(race.ours.state_dict())
    again = getattr(torch.optim, info.name)(race.params[0])
    again.load_state_dict(reread)
    for key, state in race.ours.state_dict()["state"].items():
        for name, value in state.items():
            assert torch.equal(again.state_dict()["state"][key][name], value)


OLD_KEYS = [
    (info, key)
    for info in INFOS
    for key in getattr(torch.optim, info.name)([torch.zeros(1)]).defaults
]


@pytest.mark.parametrize(("info", "key"), OLD_KEYS, ids=[f"{i.name}-{k}" for i, k in OLD_KEYS])
def test_old_checkpoint(info: OptimizerInfo, key: str) -> None:
    """Without a key that came later (or never was away): loaded, or torch's error."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(4,), (2, 3)])
        optimizer = make(params, **options_of(info)[-1])
        give_grads(params)
        optimizer.step()
        saved = copy.deepcopy(optimizer.state_dict())
        for group in saved["param_groups"]:
            del group[key]
        log = [outcome(partial(optimizer.load_state_dict, saved))]
        for _ in range(2):
            give_grads(params)
            log.append(outcome(optimizer.step))
        return [log, [sorted(group) for group in given(optimizer)]], list(params)

    if key in info.not_og_supported_flags:
        same(info, scenario, insist=True)
    else:
        same(info, scenario)


@pytest.mark.parametrize("key", ["foreach", "maximize", "decoupled_weight_decay", "fused"])
@EACH
def test_old_pickle(info: OptimizerInfo, key: str) -> None:
    """Of a class that had no such option yet, which is then set."""
    late = {"maximize": True, "decoupled_weight_decay": True}

    def scenario(make: Make) -> Outcome:
        optimizer = make(
            parameters(torch.float64, shapes=[(4,)]), **accepted(info.name, weight_decay=0.5)
        )
        optimizer.defaults.pop(key, None)
        for group in optimizer.param_groups:
            group.pop(key, None)
        optimizer = pickle.loads(pickle.dumps(optimizer))
        (group,) = optimizer.param_groups
        params, log = group["params"], [group.get(key) if key != "foreach" else None]
        for turn in range(4):
            if turn == 2 and key in group:
                group[key] = late.get(key)
            give_grads(params)
            log.append(outcome(optimizer.step))
        return log, params

    same(info, scenario)


@pytest.mark.parametrize("number", [int, float])
@EACH
def test_counters_as_numbers(info: OptimizerInfo, number: type) -> None:
    """As very old checkpoints have them."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(4,), ()])
        optimizer = make(params)
        for turn in range(4):
            give_grads(params)
            optimizer.step()
            saved = optimizer.state_dict()
            for state in saved["state"].values():
                if turn == 1 and "step" in state:
                    state["step"] = number(state["step"])
            optimizer.load_state_dict(saved)
        return layout(optimizer), list(params)

    same(info, scenario, insist=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
@every_input(0, -1)
def test_load_into_another_dtype(info: OptimizerInfo, place: int, dtype: torch.dtype) -> None:
    """States become the parameters' dtype as torch casts them, counters don't."""
    torch.manual_seed(1)  # a centered variance in float16 is at times all rounding
    options = options_of(info, torch.float16)[place]
    first = Race(info.name, parameters(torch.float32), options)
    first.step()
    second = Race(info.name, [Parameter(p.detach().to(dtype)) for p in first.params[0]], options)
    for optimizer in second.optimizers:
        optimizer.load_state_dict(copy.deepcopy(first.optimizers[1].state_dict()))
    for _ in range(2):
        second.step()
    second.check()


@EACH
def test_loaded_groups_replace_options(info: OptimizerInfo) -> None:
    """Every one, flags too; and what the constructor alone would have set stays unset."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(4,), (3, 2)])
        flag = {"fused": True} if "fused" in flags_of(info) else {}
        maker = make.func if isinstance(make, partial) else make
        saved = maker(params, **{**options_of(info)[-1], **flag}).state_dict()
        optimizer = make(params, lr=0.5)
        optimizer.load_state_dict(saved)
        log = [given(optimizer), hasattr(optimizer, "_step_supports_amp_scaling"), repr(optimizer)]
        for _ in range(3):
            give_grads(params)
            optimizer.step()
        return log, list(params)

    same(info, scenario, insist=True)


@EACH
def test_checkpoint_hooks(info: OptimizerInfo) -> None:
    """In order, some put in front, changing what is saved and loaded, removed again."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(4,)])
        optimizer, log = make(params, lr=0.5), []

        def double(name: str, optimizer: Optimizer, saved: Any) -> Any:
            log.append(name)
            groups = [{**g, "lr": g["lr"] * 2} for g in saved["param_groups"]]
            return {**saved, "param_groups": groups}

        def note(name: str, optimizer: Optimizer, *rest: Any) -> None:
            log.append((name, len(optimizer.state), len(rest)))

        handles = []
        for where in ("state_dict_pre", "state_dict_post", "load_state_dict_pre",
                      "load_state_dict_post"):  # fmt: skip
            register = getattr(optimizer, f"register_{where}_hook")
            handles += [register(partial(note, f"{where} {k}"), prepend=k == 1) for k in range(3)]
            if where in ("state_dict_post", "load_state_dict_pre"):
                handles.append(register(partial(double, where)))
        for turn in range(3):
            give_grads(params)
            optimizer.step()
            optimizer.load_state_dict(optimizer.state_dict())
            log.append(optimizer.param_groups[0]["lr"])
            if turn == 1:
                for handle in handles:
                    handle.remove()
        return log, list(params)

    same(info, scenario, insist=True)


# -- states and groups changed by hand -------------------------------------------------


def elements(optimizer: Optimizer) -> list[tuple[dict[str, Tensor], str]]:
    """Every state that is made of elements."""
    return [(s, n) for s in optimizer.state.values() for n in list(s) if n != "step"]


def each_state(change: Callable[[Tensor], Any]) -> Callable[[Optimizer], None]:
    def edit(optimizer: Optimizer) -> None:
        for state, name in elements(optimizer):
            state[name] = change(state[name])

    return edit


def each_counter(change: Callable[[Tensor], Any]) -> Callable[[Optimizer], None]:
    def edit(optimizer: Optimizer) -> None:
        for state in optimizer.state.values():
            if "step" in state:
                state["step"] = change(state["step"])

    return edit


def replace(**attributes: Any) -> Callable[[Optimizer], None]:
    return lambda optimizer: vars(optimizer).update(copy.deepcopy(attributes))


def drop_one(optimizer: Optimizer) -> None:
    for state in optimizer.state.values():
        if state:
            del state[next(reversed(state))]


def swap(optimizer: Optimizer) -> None:
    first, second = optimizer.param_groups[0]["params"][:2]
    states = optimizer.state
    states[first], states[second] = states[second], states[first]


def share_counter(optimizer: Optimizer) -> None:
    counted = [state for state in optimizer.state.values() if "step" in state]
    for state in counted:
        state["step"] = counted[0]["step"]


def forms(optimizer: Optimizer) -> list[Any]:
    return [
        [(n, getattr(v, "dtype", type(v)), getattr(v, "shape", None)) for n, v in state.items()]
        for state in optimizer.state.values()
    ]


def numbers_in(optimizer: Optimizer) -> list[Tensor]:
    states = optimizer.state.values()
    return [v for state in states for v in state.values() if isinstance(v, Tensor)]


EDITS: dict[str, Callable[[Optimizer], Any]] = {
    "cleared": lambda optimizer: optimizer.state.clear(),
    "new-defaultdict": replace(state=defaultdict(dict)),
    "plain-dict": replace(state={}),
    "copied": lambda o: o.state.update({p: dict(s) for p, s in o.state.items()}),
    "no-groups": replace(param_groups=[]),
    "swapped": swap,
    "one-dropped": drop_one,
    "extra": lambda o: [s.update(mine=torch.ones(3)) for s in o.state.values()],
    "halved-in-place": each_state(lambda t: t.mul_(0.5)),
    "transposed-in-place": each_state(lambda t: t.t_()),
    "transposed": each_state(lambda t: t.t().contiguous().t()),
    "none": each_state(lambda t: None),
    "counter-int64": each_counter(lambda t: t.to(torch.int64)),
    "counter-1d": each_counter(lambda t: t.reshape(1)),
    "counter-number": each_counter(float),
    "counter-later": each_counter(lambda t: t.add_(10)),
    "counter-shared": share_counter,
    "reordered": lambda o: o.param_groups[0]["params"].reverse(),
    "one-left-out": lambda o: o.param_groups[0]["params"].pop(0),
    "split": lambda o: o.param_groups.append(
        {**o.param_groups[0], "params": [o.param_groups[0]["params"].pop()], "lr": 0.25}
    ),
}  # fmt: skip


@pytest.mark.parametrize("edit", EDITS)
@every_input(*((-1,) if INTERPRETED else (0, -1)))
def test_edited(info: OptimizerInfo, place: int, edit: str) -> None:
    """Before the first step, and between two, each time the same numbers or error."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(3, 3), (3, 3), (4, 4)])
        optimizer, log = make(params, **options_of(info)[place]), []
        for turn in range(5):
            if turn in (2, 4):
                EDITS[edit](optimizer)
            give_grads(params)
            log.append(outcome(optimizer.step)[0])
        return [log, forms(optimizer)], [*params, *numbers_in(optimizer)]

    same(info, scenario)


@EACH
def test_state_of_the_users_own(info: OptimizerInfo) -> None:
    """Put there before the first step: torch then believes that its own is there, too."""

    def scenario(make: Make) -> Outcome:
        params = parameters(torch.float64, shapes=[(3,)])
        optimizer = make(params, **options_of(info)[-1])
        optimizer.state[params[0]]["mine"] = torch.ones(1)
        give_grads(params)
        return [outcome(optimizer.step), forms(optimizer)], list(params)

    same(info, scenario)


@pytest.mark.parametrize("info", [i for i in INFOS if i.supports_sparse], ids=lambda i: i.name)
@pytest.mark.parametrize("place", range(9))
def test_a_first_step_that_fails(info: OptimizerInfo, place: int) -> None:
    """In torch's part: for the others the next one is the first."""
    every = options_of(info)
    options = {**every[place % len(every)], "weight_decay": 0.1, "lr": 0.1}

    def scenario(make: Make) -> Outcome:
        sparse, dense = parameters(torch.float64, shapes=[(4, 2), (5,)])
        optimizer, log = make([sparse, dense], **options), []
        for turn in range(3):
            give_grads([sparse, dense], missing=(0,))
            sparse.grad = sparse.detach().to_sparse() if turn == 0 else None
            log.append(outcome(optimizer.step))
        return log, [sparse, dense]

    same(info, scenario)


# -- copies ----------------------------------------------------------------------------


@pytest.mark.parametrize("how", [copy.deepcopy, copy.copy, lambda o: pickle.loads(pickle.dumps(o))],
                         ids=["deepcopy", "copy", "pickle"])  # fmt: skip
@every_input(0, -1)
def test_copies(info: OptimizerInfo, place: int, how: Callable[[Any], Any]) -> None:
    """In mid-flight; both go on in turn, a shallow copy with the states of the original."""

    def scenario(make: Make) -> Outcome:
        optimizer = make(
            parameters(torch.float64, shapes=[(4,), (2, 3)]), **options_of(info)[place]
        )
        both = [optimizer]
        for turn in range(5):
            for one in both:
                give_grads(one.param_groups[0]["params"])
                one.step()
            if turn == 1:
                both.append(how(optimizer))
                both[1].param_groups[0]["lr"] = 0.5
        public = [[name for name in vars(one) if not name.startswith("_")] for one in both]
        tensors = [p for one in both for p in one.param_groups[0]["params"]]
        assert both[1].state.keys() == set(both[1].param_groups[0]["params"]) or not both[1].state
        return [public, *map(layout, both), *map(given, both)], tensors

    same(info, scenario, insist=True)

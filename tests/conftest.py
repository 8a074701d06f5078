"""Random data that are the same in every run, unless FASTOPT_TEST_SEED is "fresh" or a number.

The same tests run three times: on the CPU as it is; with TRITON_INTERPRET=1 on Triton's
interpreter, which then serves whatever it can; with FASTOPT_TEST_DEVICE=cuda on a GPU.
"""

from __future__ import annotations

import gc
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# Crossovers that their user has measured would change which calls kernels serve.
os.environ["XDG_CACHE_HOME"] = str(Path(__file__).parents[1] / ".pytest_cache" / "user")

import hypothesis
import pytest
import torch
from cases import DEVICE, INTERPRETED
from hypothesis.internal.conjecture import providers
from torch.optim import swa_utils

from fastopt import dispatch
from fastopt.front.call import RECORDS
from fastopt.front.route import RouteCache
from fastopt.nn import functional

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
if DEVICE != "cpu" or INTERPRETED:
    # Triton's kernels serve tensors of any size, and not only those who insist on it.
    triton = dispatch.BACKENDS["triton"]
    rules = [rule for rule in triton.rules if not rule.advisory]
    if INTERPRETED:
        rules[0] = dispatch.BACKENDS["numba"].rules[0]
    dispatch.BACKENDS["triton"] = triton._replace(rules=tuple(rules))
if INTERPRETED:
    import interpreted

    interpreted.hasten()


def pytest_configure(config: pytest.Config) -> None:
    """What Triton has compiled names the files it was compiled from: ahead.py reads them. So this
    folder has a store of its own; in one that is shared, the files may be another folder's."""
    store = config.rootpath / ".pytest_cache" / "triton"
    os.environ.setdefault("TRITON_CACHE_DIR", str(store))


# Hypothesis draws now and then a constant from the modules that are loaded: another choice of
# tests would have other data, and so would a change in any file. Its own constants are enough.
providers._get_local_constants = lambda: providers._local_constants
hypothesis.settings.register_profile("default", deadline=None, print_blob=True, derandomize=True)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True, max_examples=5000)
hypothesis.settings.register_profile(
    "few", deadline=None, print_blob=True, derandomize=True, max_examples=20
)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "few" if INTERPRETED else "default")
)


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> int:
    """Seed torch with a number of the test's own, or with the one asked for; it is printed."""
    asked = os.environ.get("FASTOPT_TEST_SEED", "")
    number = zlib.crc32(request.node.nodeid.encode())
    if asked:
        number = torch.seed() % 2**31 if asked == "fresh" else int(asked)
    torch.manual_seed(number)
    print(f"FASTOPT_TEST_SEED={number}")
    return number


@pytest.fixture(autouse=True)
def unsettled() -> None:
    """What a test's calls have settled, and their backward passes have taught, ends with it."""
    RouteCache.forget()


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN: an element left unwritten shows."""
    from fastopt.kernels.numba import memory

    clean = memory.empty

    def poisoned(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return clean(shape, dtype).fill_(float("nan") if dtype.is_floating_point else 255)

    monkeypatch.setattr(memory, "empty", poisoned)
    before = torch.are_deterministic_algorithms_enabled()
    # Makes torch.empty fill with NaN. Some of torch's own on a GPU can't be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    yield
    torch.use_deterministic_algorithms(before)


@pytest.fixture
def torchs_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What torch's own code has been asked to average: all of a model, or a part."""
    calls: list[str] = []
    theirs_own = swa_utils.AveragedModel.update_parameters

    def update(self: Any, model: Any) -> None:
        calls.append("all" if isinstance(self, torch.nn.Module) else "part")
        theirs_own(self, model)

    monkeypatch.setattr(swa_utils.AveragedModel, "update_parameters", update)
    return calls


@pytest.fixture
def no_crossovers(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses are served by kernels from the first element on, without insisting on it."""
    for name, operation in RECORDS.items():
        function: Any = getattr(functional, name)
        names = function.__code__.co_freevars
        if "is_small" not in names:
            continue
        for variable, value in (("is_small", lambda input: False), ("surely", 0)):
            cell = function.__closure__[names.index(variable)]
            monkeypatch.setattr(cell, "cell_contents", value)
        monkeypatch.setattr(operation, "crossover", 0)
        monkeypatch.setattr(operation, "row_crossover", {})
    RouteCache.forget()
    yield
    RouteCache.forget()


@pytest.fixture(scope="module", autouse=True)
def small_heap() -> None:
    """What is there already is passed over by the collector: compilers leave millions of objects,
    and a look at all of them takes seconds."""
    gc.collect()
    gc.freeze()

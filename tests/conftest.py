"""Fresh random data in every run (the seed is printed with a failure), poisoned memory.

The same tests run three times: on the CPU as it is; with TRITON_INTERPRET=1 on Triton's
interpreter, which then serves whatever it can; with FASTOPT_TEST_DEVICE=cuda on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from cases import DEVICE, INTERPRETED

from fastopt import dispatch

if DEVICE != "cpu":
    torch.set_default_device(DEVICE)
if INTERPRETED:  # not only for who insists on it
    triton = dispatch.BACKENDS["triton"]
    on_cpu = dispatch.BACKENDS["numba"].rules[0]
    dispatch.BACKENDS["triton"] = triton._replace(rules=(on_cpu, *triton.rules[1:]))

hypothesis.settings.register_profile("default", deadline=None, print_blob=True)
hypothesis.settings.register_profile("fuzz", deadline=None, print_blob=True, max_examples=5000)
hypothesis.settings.register_profile("few", deadline=None, print_blob=True, max_examples=20)
hypothesis.settings.load_profile(
    os.environ.get("HYPOTHESIS_PROFILE", "few" if INTERPRETED else "default")
)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Seed torch with a new number; set FASTOPT_TEST_SEED to the printed one to repeat."""
    number = int(os.environ.get("FASTOPT_TEST_SEED", torch.seed() % 2**31))
    torch.manual_seed(number)
    print(f"FASTOPT_TEST_SEED={number}")
    return number


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Uninitialised memory is NaN: an element left unwritten shows."""
    from fastopt.kernels.numba import memory

    clean = memory.empty
    monkeypatch.setattr(
        memory, "empty", lambda shape, dtype: clean(shape, dtype).fill_(float("nan"))
    )
    before = torch.are_deterministic_algorithms_enabled()
    # Makes torch.empty fill with NaN. Some of torch's own on a GPU can't be deterministic.
    torch.use_deterministic_algorithms(True, warn_only=DEVICE != "cpu")
    yield
    torch.use_deterministic_algorithms(before)

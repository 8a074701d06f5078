"""Python processes to try things in, and results that a process can compare with another's."""

from __future__ import annotations

import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastopt

ROOT = Path(__file__).resolve().parent.parent
HANG = 240  # seconds; turns a deadlock into a failure, and measures nothing

# A vector longer than three grains of every loop, so that three threads or more take part.
LENGTH = 210_003
# Of parameters: three grains of an optimizer together; a larger one's states torch would fill on
# threads of its own.
LENGTHS = (30_000, 30_001, 7, *[32_000] * 5)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"momentum": 0.9, "nesterov": True},
    "Adam": {"amsgrad": True},
    "AdamW": {"weight_decay": 0.1},
    "RMSprop": {"momentum": 0.5, "centered": True},
}


def run_code(code: str, package: Path | None = None, **env: str | None) -> str:
    """Run code in a new process and return what it prints.

    Args:
        code: Python code.
        package: folder with a copy of fastopt that is to be imported in place of this one.
        env: environment variables to set, or with None to remove.
    """
    check = ""
    path = [str(ROOT / "tests")]
    if package is not None:
        path.insert(0, str(package))
        check = f"import fastopt; assert fastopt.__file__.startswith({str(package)!r})\n"
    # Without .pyc files, so that only numba's cache can be stale.
    usual = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    usual |= {"PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": os.pathsep.join(path)}
    merged = {k: v for k, v in {**usual, **env}.items() if v is not None}
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", check + code],
        env=merged,
        cwd=ROOT / "tests",
        timeout=HANG,
        capture_output=True,
        text=True,
    )
    assert child.returncode == 0, f"exit status {child.returncode}\n{child.stdout}\n{child.stderr}"
    return child.stdout


def run(
    function: Callable[..., None], *args: Any, package: Path | None = None, **env: str | None
) -> str:
    """Call a function of a test module in a new process; args need a repr that is code."""
    module = inspect.getmodulename(function.__code__.co_filename)
    code = f"import {module}; {module}.{function.__name__}(*{args!r})"
    return run_code(code, package, **env)


def copy_package(folder: Path) -> Path:
    """Copy fastopt, laid out as an install and without any cache; returns the folder above it."""
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastopt", folder / "fastopt", ignore=without_caches)
    shutil.copytree(ROOT / "kernels", folder / "fastopt" / "kernels", ignore=without_caches)
    return folder


def results(
    seed: int, functional: Any = fastopt.nn.functional, optim: Any = fastopt.optim
) -> list[np.ndarray]:
    """Every loss with its gradient and two steps of every optimizer, compiled.

    Computed without any of torch's own parallel loops: those hang in a forked child.

    Args:
        seed: of the inputs.
        functional, optim: where the losses and optimizers come from.
    """
    rng = np.random.default_rng(seed)

    def tensor(*shape: int) -> torch.Tensor:
        return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32))

    found = []
    with fastopt.use_backend("numba"):
        for name in ("mse_loss", "l1_loss"):
            input = tensor(LENGTH).requires_grad_()
            loss = getattr(functional, name)(input, tensor(LENGTH))
            loss.backward()
            found += [loss, input.grad]
        # Classes side by side, few of them, on an axis in the middle of few or many positions, and
        # rows so long and few that threads share them.
        for shape in ((1400, 101), (14_003, 10), (70, 21, 101), (1, 5, 70_001), (2, 70_001)):
            input = tensor(*shape).requires_grad_()
            labels = rng.integers(0, shape[1], (shape[0], *shape[2:]))
            loss = functional.cross_entropy(input, torch.from_numpy(labels), label_smoothing=0.1)
            loss.backward()
            found += [loss, input.grad]
        for name, options in OPTIMIZERS.items():
            params = [tensor(length).requires_grad_() for length in LENGTHS]
            optimizer = getattr(optim, name)(params, lr=0.01, **options)
            for _ in range(2):
                for param in params:
                    param.grad = tensor(len(param))
                optimizer.step()
            found += params
    return [t.detach().numpy() for t in found]


def assert_same(found: list[np.ndarray], expected: list[np.ndarray]) -> None:
    """Equal to the bit."""
    for place, (a, b) in enumerate(zip(found, expected, strict=True)):
        assert a.tobytes() == b.tobytes(), f"result {place}: {np.abs(a - b).max()} apart"


def assert_right(found: list[np.ndarray], seed: int) -> None:
    """Equal to torch's results but for rounding."""
    expected = results(seed, torch.nn.functional, torch.optim)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6)

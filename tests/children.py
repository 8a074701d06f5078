"""Python processes to try things in, and results that a process can compare with another's."""

from __future__ import annotations

import atexit
import inspect
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

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
    code, path, usual = _prepared(code, package)
    merged = {k: v for k, v in {**usual, **env}.items() if v is not None}
    child = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", code],
        env={**merged, "PYTHONPATH": os.pathsep.join(path)},
        cwd=ROOT / "tests",
        timeout=HANG,
        capture_output=True,
        text=True,
    )
    return _printed(child.returncode, child.stdout, child.stderr)


def run(
    function: Callable[..., None], *args: Any, package: Path | None = None, **env: str | None
) -> str:
    """Call a function of a test module in a new process; args need a repr that is code.

    The process may have imported torch and numba already, where they need no environment of their
    own.
    """
    module = inspect.getmodulename(function.__code__.co_filename)
    code = f"import {module}; {module}.{function.__name__}(*{args!r})"
    if env or sys.platform != "linux":
        return run_code(code, package, **env)
    code, path, usual = _prepared(code, package)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: str(Path(folder, name)) for name in ("stdout", "stderr")}
        request = {"code": code, "path": path, "env": usual, "seconds": HANG, **files}
        with _nursery() as (stdin, stdout):
            stdin.write(json.dumps(request) + "\n")
            status = int(stdout.readline())
        return _printed(status, *[Path(file).read_text() for file in files.values()])


def _prepared(code: str, package: Path | None) -> tuple[str, list[str], dict[str, str]]:
    """The code, where it imports from, and the usual environment."""
    path = [str(ROOT / "tests")]
    if package is not None:
        path.insert(0, str(package))
        code = f"import fastopt; assert fastopt.__file__.startswith({str(package)!r})\n{code}"
    # Without .pyc files, so that only numba's cache can be stale.
    usual = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
    return code, path, {**usual, "PYTHONDONTWRITEBYTECODE": "1"}


def _printed(status: int, stdout: str, stderr: str) -> str:
    assert status == 0, f"exit status {status}\n{stdout}\n{stderr}"
    return stdout


_idle: list[subprocess.Popen[str]] = []  # several threads have several children at once


@contextmanager
def _nursery() -> Iterator[tuple[IO[str], IO[str]]]:
    """The input and the output of one that is idle."""
    if _idle:
        nursery = _idle.pop()
    else:
        usual = {k: v for k, v in os.environ.items() if not k.startswith("NUMBA_")}
        nursery = subprocess.Popen(
            (sys.executable, "-c", "import nursery; nursery.serve()"),
            env={**usual, "PYTHONDONTWRITEBYTECODE": "1"},
            cwd=ROOT / "tests",
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
    assert nursery.stdin is not None
    assert nursery.stdout is not None
    yield nursery.stdin, nursery.stdout
    _idle.append(nursery)


@atexit.register
def _close() -> None:
    while _idle:
        _idle.pop().communicate()


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

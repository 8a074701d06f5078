"""python -m fastopt warmup: compile ahead what a training would compile at its first step."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from . import nn, optim
from .dispatch import use_backend
from .errors import BackendUnavailable

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# Elements few enough for one thread, and enough for several: two forms of each kernel.
_SIZES = (1 << 12, 1 << 18)
# Classes: of rows that are walked as they are, and of ones that are turned.
_CLASSES = (128, 8)
_OPTIMIZERS: dict[str, tuple[dict[str, float], ...]] = {
    "SGD": ({"lr": 0.1}, {"lr": 0.1, "momentum": 0.9}),
    "Adam": ({},),
    "AdamW": ({},),
    "RMSprop": ({},),
}


def jobs(dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is to be compiled for a dtype: its name, and a call that needs it."""
    for name in ("MSELoss", "L1Loss"):
        for size in _SIZES:
            x, y = torch.zeros(size, dtype=dtype), torch.zeros(size, dtype=dtype)
            yield name, _loss(getattr(nn, name)(), x, y)
    for smoothing in (0.0, 0.1):
        for classes in _CLASSES:
            for size in _SIZES:
                x = torch.zeros(size // classes, classes, dtype=dtype)
                labels = torch.zeros(len(x), dtype=torch.int64)
                yield (
                    "CrossEntropyLoss",
                    _loss(nn.CrossEntropyLoss(label_smoothing=smoothing), x, labels),
                )
    for name, settings in _OPTIMIZERS.items():
        for options in settings:
            for size in _SIZES:
                p = torch.nn.Parameter(torch.zeros(size, dtype=dtype))
                p.grad = torch.zeros_like(p)
                yield name, getattr(optim, name)([p], **options).step


def _loss(module: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> Callable[[], None]:
    def call() -> None:
        module(x.requires_grad_(), y).backward()
        (module(x, y) * 0.5).backward()  # where the backward pass computes the gradient
        with torch.no_grad():
            module(x, y)

    return call


def warm_up(dtypes: list[str]) -> None:
    """Compile for these dtypes, names of DTYPES; what is in the disk cache already is read."""
    begin = time.perf_counter()
    with use_backend("numba"):
        for dtype in dtypes:
            for name, job in jobs(DTYPES[dtype]):
                start = time.perf_counter()
                try:
                    job()
                except BackendUnavailable as error:
                    print(error)
                    break
                print(f"{name:16s} {dtype:8s} {time.perf_counter() - start:6.2f} s", flush=True)
    print(f"{time.perf_counter() - begin:.1f} s in all")

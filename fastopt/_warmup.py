"""python -m fastopt warmup: compile ahead what a training would compile at its first step."""

from __future__ import annotations

import functools
import time
import warnings
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch

from .dispatch import use_backend
from .errors import BackendUnavailable
from .front.call import RECORDS
from .front.route import RouteCache
from .front.samples import usual
from .front.torch_only import TorchOnly
from .nn._operations import FUNCTIONS
from .optim._operations import OPTIMIZERS

DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64)
}
# Elements few enough for one thread, and enough for several: two forms of each kernel.
_SIZES = (1 << 12, 1 << 18)
OPERATIONS = {name: kind for name, kind in RECORDS.items() if not issubclass(kind, TorchOnly)}
#: The losses and optimizers that there is something to compile for.
NAMES = (*OPERATIONS, *OPTIMIZERS)


def jobs(
    dtype: torch.dtype, only: Collection[str] = NAMES
) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is to be compiled for a dtype: its name, and a call that needs it."""
    for name in [n for n in OPERATIONS if n in only]:
        operation = OPERATIONS[name]
        for options in operation.variants:
            for size in _SIZES:
                for tensors in usual(operation, size, dtype):
                    yield name, _loss(functools.partial(FUNCTIONS[name], **tensors, **options))
    for name in [n for n in OPTIMIZERS if n in only]:
        for options in OPTIMIZERS[name]._record.variants:
            for size in _SIZES:
                params = OPTIMIZERS[name]._usual(size, dtype)
                yield name, OPTIMIZERS[name](params, **options).step


def _loss(value: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        RouteCache.forget()  # what earlier calls have taught about backward passes
        value().backward()
        (value() * 0.5).backward()  # where the backward pass computes the gradient
        with torch.no_grad():
            value()

    return call


def warm_up(dtypes: list[str], only: Collection[str] = NAMES) -> None:
    """Compile for these dtypes, names of DTYPES; what is in the disk cache already is read."""
    begin = time.perf_counter()
    widest = max(map(len, only))
    with use_backend("numba"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's, about usual calls
        for dtype in dtypes:
            for name, job in jobs(DTYPES[dtype], only):
                start = time.perf_counter()
                try:
                    job()
                except BackendUnavailable as error:
                    print(error)
                    break
                took = time.perf_counter() - start
                print(f"{name:{widest}s} {dtype:8s} {took:6.2f} s", flush=True)
    print(f"{time.perf_counter() - begin:.1f} s in all")

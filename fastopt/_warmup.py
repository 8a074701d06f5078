"""python -m fastopt warmup: compile ahead what a training would compile at its first step."""

from __future__ import annotations

import functools
import importlib
import itertools
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch

from .dispatch import use_backend
from .errors import BackendUnavailable
from .front.call import RECORDS
from .front.formula_loss import FormulaLoss
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


def written(place: str) -> FormulaLoss:
    """A user's loss by its place, as in "package.module:name".

    Raises:
        ValueError: there is none at that place.
    """
    module, _, name = place.partition(":")
    try:
        found = functools.reduce(getattr, name.split("."), importlib.import_module(module))
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"no {place!r} (expected MODULE:NAME): {error}") from error
    if not isinstance(found, FormulaLoss):
        raise ValueError(f"{place} is a {type(found).__name__}, not a loss made by fastopt.loss")
    return found


def jobs_of(loss: FormulaLoss, dtype: torch.dtype) -> Iterator[tuple[str, Callable[[], object]]]:
    """The same for a user's loss: with a gradient for its first tensor, or all that have one."""
    for size in _SIZES:
        for followed in dict.fromkeys((loss.followed[:1], loss.followed)):
            tensors = [torch.rand(size).to(dtype) for _ in loss.tensors]
            for k in followed:
                tensors[k].requires_grad_()
            yield loss.__name__, _loss(functools.partial(loss, *tensors))


def _loss(value: Callable[[], Any]) -> Callable[[], None]:
    def call() -> None:
        RouteCache.forget()  # what earlier calls have taught about backward passes
        value().backward()
        (value() * 0.5).backward()  # where the backward pass computes the gradient
        with torch.no_grad():
            value()

    return call


def warm_up(
    dtypes: list[str], only: Collection[str] = NAMES, losses: Sequence[FormulaLoss] = ()
) -> None:
    """Compile for these dtypes, names of DTYPES; what is in the disk cache already is read.

    Args:
        dtypes: names of DTYPES.
        only: names of operations.
        losses: of users.
    """
    begin = time.perf_counter()
    widest = max(map(len, (*only, *(loss.__name__ for loss in losses))))
    with use_backend("numba"), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # of torch's, about usual calls
        for dtype in dtypes:
            users = (jobs_of(loss, DTYPES[dtype]) for loss in losses)
            for name, job in itertools.chain(jobs(DTYPES[dtype], only), *users):
                start = time.perf_counter()
                try:
                    job()
                except BackendUnavailable as error:
                    print(error)
                    break
                took = time.perf_counter() - start
                print(f"{name:{widest}s} {dtype:8s} {took:6.2f} s", flush=True)
    print(f"{time.perf_counter() - begin:.1f} s in all")

"""Errors of fastopt and of torch, both against the long doubles of oracle.py, or torch's doubles.

One number for each quantity: the root mean square of the errors over that of the values, in
units of the dtype's eps, over all of an operation's rows of cases.py that are large enough.
A largest error would be a matter of luck from run to run; this one is stable to a percent.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import cases
import numpy as np
import oracle
import torch
import torch.nn.functional as F
from cases import BACKEND, FLOATS, LOSSES, OPTIMIZERS, REDUCTIONS
from torch import Tensor
from torch.nn import Parameter

import fastopt
from fastopt.front.call import RECORDS
from fastopt.front.samples import usual
from fastopt.kernels.operation import Elementwise, Gather, Rowwise

OPERATIONS = tuple(dict.fromkeys(case.operation for case in (*LOSSES, *OPTIMIZERS)))
#: The other losses, each with a dtype, of which torch in float64 says what is exact.
BY_TORCH = tuple(
    (name, dtype)
    for name, record in RECORDS.items()
    if name not in OPERATIONS and issubclass(record, Elementwise | Rowwise | Gather)
    for dtype in FLOATS
    if dtype != torch.float64 and (dtype.itemsize > 2 or getattr(record, "halves_on_cpu", True))
)

Samples = Iterator[tuple[str, Any, Tensor, Tensor]]  # (quantity, exact, fastopt's, torch's)


@dataclass
class Errors:
    """Mean squares of one quantity's errors, relative to its values, sample by sample.

    count: samples; inverses: the sum of 1 / numbers over them.
    """

    ours: float = 0.0
    torchs: float = 0.0
    count: int = 0
    inverses: float = 0.0

    def add(self, exact: Any, ours: Tensor, torchs: Tensor) -> None:
        mine, theirs = oracle.exact(ours), oracle.exact(torchs)
        scale = np.sqrt(np.mean(exact**2)) * np.longdouble(torch.finfo(ours.dtype).eps)
        kept = np.isfinite(theirs) & np.isfinite(exact)  # torch's float16 overflows at times
        if kept.any() and scale > 0:
            self.ours += float(np.mean(((mine - exact)[kept] / scale) ** 2))
            self.torchs += float(np.mean(((theirs - exact)[kept] / scale) ** 2))
            self.count += 1
            self.inverses += 1 / int(kept.sum())

    @property
    def numbers(self) -> float:
        """How many numbers, all in one sample, would say as much as these samples."""
        return self.count**2 / self.inverses

    def roots(self) -> tuple[float, float]:
        """Fastopt's error and torch's."""
        return math.sqrt(self.ours / self.count), math.sqrt(self.torchs / self.count)


def measure(operation: str, dtype: torch.dtype, enough: int = 200) -> dict[str, Errors]:
    """The errors of an operation's quantities in a dtype, each over `enough` new numbers."""
    errors: dict[str, Errors] = {}
    samples = _step_samples
    if operation in dir(F):
        samples = _loss_samples if operation in OPERATIONS else _samples_by_torch
    with np.errstate(all="ignore"):  # the mean of nothing, and float16's infinities
        while not errors or min(e.numbers for e in errors.values()) < enough:
            for quantity, exact, ours, torchs in samples(operation, dtype):
                errors.setdefault(quantity, Errors()).add(exact, ours, torchs)
    return errors


def _loss_samples(operation: str, dtype: torch.dtype) -> Samples:
    for case in LOSSES:
        if case.operation != operation or not case.compiled:
            continue
        tensors = case.make(dtype)
        if tensors[0].numel() < 600:
            continue
        for reduction in REDUCTIONS:
            yield from loss_sample(operation, tensors, reduction, **case.options)


def _samples_by_torch(operation: str, dtype: torch.dtype) -> Samples:
    for given in usual(RECORDS[operation], 4096, dtype):
        for reduction in REDUCTIONS:
            found = []
            for module, wide in ((fastopt.nn.functional, False), (F, False), (F, True)):
                leaves = {
                    name: (t.double() if wide and t.is_floating_point() else t)
                    .detach()
                    .requires_grad_(t.requires_grad)
                    for name, t in given.items()
                }
                with fastopt.use_backend(BACKEND), warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # of kl_div's mean
                    loss = getattr(module, operation)(**leaves, reduction=reduction)
                followed = [t for t in leaves.values() if t.requires_grad]
                grads = torch.autograd.grad(loss, followed, torch.ones_like(loss))
                found.append((loss.detach(), *grads))
            kind = "loss, elementwise" if reduction == "none" else "loss, mean and sum"
            for k, (ours, torchs, exact) in enumerate(zip(*found, strict=True)):
                yield "gradient" if k else kind, oracle.exact(exact), ours, torchs


def loss_sample(
    operation: str, tensors: tuple[Tensor, ...], reduction: str, **options: Any
) -> Samples:
    found = []
    for module in (fastopt.nn.functional, F):
        input = tensors[0].detach().requires_grad_()
        with fastopt.use_backend(BACKEND):
            loss = getattr(module, operation)(input, *tensors[1:], reduction=reduction, **options)
        upstream = torch.ones_like(loss)
        found.append((loss.detach(), torch.autograd.grad(loss, input, upstream)[0]))
    exact = oracle.loss(operation, tensors, reduction, upstream, **options)
    kind = "loss, elementwise" if reduction == "none" else "loss, mean and sum"
    yield kind, exact[0], found[0][0], found[1][0]
    yield "gradient", exact[1], found[0][1], found[1][1]


def _step_samples(operation: str, dtype: torch.dtype) -> Samples:
    """One step from a state that torch's first steps have made."""
    for case in OPTIMIZERS:
        if case.operation != operation:
            continue
        param = Parameter(cases.randn(4099)(dtype))
        torchs = getattr(torch.optim, operation)([param], foreach=False, **case.options)
        for _ in range(3):
            param.grad = cases.randn(4099, scale=1.0)(dtype)
            torchs.step()
        twin = Parameter(param.detach().clone())
        ours = getattr(fastopt.optim, operation)([twin], **case.options)
        ours.load_state_dict(copy.deepcopy(torchs.state_dict()))
        param.grad = twin.grad = cases.randn(4099, scale=1.0)(dtype)
        group, state = torchs.param_groups[0], torchs.state[param]
        exact = oracle.step(operation, group, state, param, param.grad)
        torchs.step()
        with fastopt.use_backend(BACKEND):
            ours.step()
        yield "parameter", exact.pop("param"), twin.detach(), param.detach()
        for name, values in exact.items():
            if values.ndim:  # loading rounds states of one number to the parameter's dtype
                yield "states", values, ours.state[twin][name], state[name]

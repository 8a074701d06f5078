"""What is compiled ahead of time: every operation of the GPU backend, in every variant."""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from ahead import MACHINES, Code, compiling

from fastopt.kernels import triton as backend
from fastopt.kernels.gradients import Gradients
from fastopt.kernels.operation import Options
from fastopt.kernels.tables import Tables
from fastopt.nn.cross_entropy import CrossEntropy
from fastopt.nn.l1 import L1
from fastopt.nn.mse import MSE
from fastopt.optim._operations import OPTIMIZERS
from fastopt.optim.adafactor import AdafactorUpdate
from fastopt.optim.adam import AdamUpdate
from fastopt.optim.muon import OrthogonalUpdate
from fastopt.optim.rmsprop import RMSpropUpdate
from fastopt.optim.sgd import SGDUpdate
from fastopt.optim.sparse_adam import SparseAdamUpdate

FLOAT, BFLOAT, HALF, DOUBLE = torch.float32, torch.bfloat16, torch.float16, torch.float64
META, CPU = torch.device("meta"), torch.device("cpu")


def empty(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device=META)


# -- the operations -------------------------------------------------------------------------


class Pointwise(NamedTuple):
    """mse_loss or l1_loss, forward and backward, with gradients to both tensors."""

    record: type
    count: int = 1 << 20
    reduction: str = "mean"

    def run(self, dtype: torch.dtype) -> None:
        tensors = (empty(self.count, dtype=dtype), empty(self.count, dtype=dtype), None)
        options, needs = Options(self.record(), self.reduction, dtype), (True, True, False)
        loss, grads, kept = backend.forward(options, tensors, needs)
        backend.backward(options, tensors, grads, kept, loss, needs)


class Rows(NamedTuple):
    """cross_entropy, forward and (training) backward; of class indices or of probabilities."""

    shape: tuple[int, ...]
    reduction: str = "mean"
    smoothing: float = 0.0
    weight: bool = False
    probability: bool = False
    training: bool = True
    classes_last: bool = False
    ignore_index: int = -100
    softcap: float | None = None  # with a z_loss

    @property
    def unit(self) -> bool:
        """Whether classes lie side by side; else positions do."""
        return len(self.shape) == 2 or self.classes_last

    def run(self, dtype: torch.dtype) -> None:
        order = (*self.shape[:1], *self.shape[2:], self.shape[1])
        input = empty(*(order if self.classes_last else self.shape), dtype=dtype)
        if self.classes_last:
            input = input.movedim(-1, 1)
        target = (
            empty(*self.shape, dtype=dtype)
            if self.probability
            else empty(*order[:-1], dtype=torch.int64)
        )
        weight = empty(self.shape[1], dtype=dtype) if self.weight else None
        z_loss = 0.0 if self.softcap is None else 1e-4
        record = CrossEntropy(self.ignore_index, self.smoothing, z_loss, self.softcap)
        options = Options(record, self.reduction, dtype)
        tensors, needs = (input, target, weight), (self.training, False, False)
        loss, grads, kept = backend.forward(options, tensors, needs)
        if self.training:
            backend.backward(options, tensors, grads, kept, loss, needs)

    def wide(self, dtype: torch.dtype) -> bool:
        """Whether every row, or stretch of positions, begins at a multiple of 16 bytes."""
        stretch = self.shape[1] if self.unit else math.prod(self.shape[2:])
        return stretch * dtype.itemsize % 16 == 0

    def gradients(self, dtype: torch.dtype) -> int:
        """How many launches write the gradient: both, unless forward leaves it to backward."""
        once = self.reduction == "none" or dtype == HALF
        return int(self.training) * (1 if once else 2)


COUNTER = torch.zeros(1, device=CPU)  # of every tensor, where the host counts


class Step(NamedTuple):
    """One optimizer step. states: of those that it may have, which are in use.

    scaled: under a GradScaler. counted: the step is counted on the device. other: the states'
    dtype, if not the parameters'.
    """

    record: type
    states: tuple[bool, ...]
    scaled: bool = False
    counted: bool = False
    other: torch.dtype | None = None

    def slots(self, dtype: torch.dtype) -> tuple[torch.dtype | None, ...]:
        """The dtypes of the parameter and of each state."""
        return (dtype, *(self.other or dtype if used else None for used in self.states))

    def bind(self, dtype: torch.dtype, tensors: int = 3) -> tuple[Tables, Callable[..., None]]:
        """The tables of so many tensors, and the step that reads them."""
        tables = Tables(
            CPU,
            np.ones((1, len(self.record.numbers))),
            [],
            np.zeros(tensors, np.int64),
            np.arange(tensors + 1) * 5000,
            np.zeros((len(self.states) + len(self.record.scalars) + 3, tensors), np.int64),
            self.counted,
        )
        tables.addresses[-1] = COUNTER.data_ptr()
        first = len(self.states) + 1
        tables.addresses[first : first + len(self.record.scalars)] = COUNTER.data_ptr()
        step = None if self.record is SGDUpdate else torch.float32
        scalars = (torch.float32,) * len(self.record.scalars)
        slots = self.slots(dtype)
        return tables, backend.step_launcher(self.record, slots, scalars, dtype, step)(tables)

    def run(self, dtype: torch.dtype) -> None:
        _, update = self.bind(dtype)
        one = torch.ones(1, device=CPU) if self.scaled else None
        update(one, one)


class Clip(NamedTuple):
    """clip_grad_norm_ of three gradients, or clip_grad_value_."""

    order: float | None = 2.0

    def run(self, dtype: torch.dtype) -> None:
        grads = Gradients(CPU, dtype, np.zeros(3, np.int64), np.arange(4) * 5000)
        if self.order is None:
            backend.clamp_all(grads, 0.5)
        else:
            backend.scale_all(grads, 0.5, backend.total_norm(grads, self.order))


class Case(NamedTuple):
    machine: str
    operation: Pointwise | Rows | Step | Clip
    dtype: torch.dtype

    def __str__(self) -> str:
        what = type(self.operation).__name__
        fields = [
            getattr(value, "__name__", str(value))
            for name, value in self.operation._asdict().items()
            if value != self.operation._field_defaults.get(name)
        ]
        dtype = str(self.dtype).removeprefix("torch.")
        return "-".join([self.machine, what, *fields, dtype]).replace(" ", "")


@functools.cache
def compiled(case: Case) -> tuple[Code, ...]:
    """The code of every kernel that a case launches."""
    with compiling(MACHINES[case.machine]) as codes:
        case.operation.run(case.dtype)
    return tuple(codes)


ODD = (1 << 20) + 7  # ends in the middle of 16 bytes
VOCABULARY, LONGEST, THOUSAND = Rows((8192, 32_000)), Rows((8192, 128_256)), Rows((4096, 1000))
WHOLE, SPLIT = Rows((512, 8192)), Rows((8, 128_256))
PIXELS = Rows((4, 21, 256, 256))
CHANNELS_LAST = Rows((4, 64, 96, 96), classes_last=True)
SHORT = Rows((70_000, 10))

SGD = (Step(SGDUpdate, (False,)), Step(SGDUpdate, (True,)))
ADAM = (Step(AdamUpdate, (True, True, False)), Step(AdamUpdate, (True, True, True)))
RMSPROP = tuple(
    Step(RMSpropUpdate, (True, *rest)) for rest in itertools.product((False, True), repeat=2)
)
#: Those of the others with all of their states, but for those with launches of their own.
OTHERS = tuple(
    Step(record, (True,) * len(record.slots))
    for record in (*dict.fromkeys(k._record for k in OPTIMIZERS.values()), OrthogonalUpdate)
    if record not in (SGDUpdate, AdamUpdate, RMSpropUpdate, AdafactorUpdate, SparseAdamUpdate)
)
STEPS = (*SGD, *ADAM, *RMSPROP, *OTHERS)
CLIPS = (Clip(), Clip(1.0), Clip(math.inf), Clip(None))

#: For every machine in float32 or bfloat16, for sm_90 in every dtype.
USUAL = (
    Pointwise(MSE), Pointwise(L1, ODD), VOCABULARY, LONGEST, THOUSAND, WHOLE, SPLIT,
    PIXELS, SGD[1], ADAM[0], RMSPROP[-1], *CLIPS,
)  # fmt: skip
#: For sm_90, in two dtypes.
MORE = (
    Pointwise(MSE, ODD), Pointwise(L1), Pointwise(MSE, reduction="none"),
    VOCABULARY._replace(reduction="none"), CHANNELS_LAST, SHORT, *STEPS,
)  # fmt: skip
#: For sm_90, in one dtype.
VARIANTS: dict[torch.dtype, tuple[Pointwise | Rows | Step | Clip, ...]] = {
    FLOAT: (
        Pointwise(MSE, ODD, "sum"),
        Pointwise(L1, ODD, "none"),
        *(rows._replace(smoothing=0.1) for rows in (VOCABULARY, WHOLE, SPLIT, PIXELS)),
        *(rows._replace(weight=True) for rows in (VOCABULARY, THOUSAND)),
        *(rows._replace(weight=True, smoothing=0.1) for rows in (VOCABULARY, SPLIT, PIXELS)),
        *(rows._replace(probability=True) for rows in (VOCABULARY, WHOLE, SPLIT)),
        WHOLE._replace(probability=True, weight=True, smoothing=0.1),
        *(rows._replace(training=False) for rows in (VOCABULARY, SPLIT)),
        *(rows._replace(softcap=30.0) for rows in (VOCABULARY, WHOLE, SPLIT, PIXELS)),
        *(rows._replace(reduction="none") for rows in (SPLIT, PIXELS)),
        *(rows._replace(reduction="sum") for rows in (THOUSAND, SPLIT)),
        *(step._replace(scaled=True, counted=step.record is AdamUpdate) for step in STEPS),
    ),
    BFLOAT: (
        VOCABULARY._replace(smoothing=0.1),
        VOCABULARY._replace(softcap=30.0),
        VOCABULARY._replace(probability=True, weight=True, smoothing=0.1),
        *(step._replace(other=FLOAT) for step in STEPS[1:]),
        ADAM[1]._replace(scaled=True, counted=True),
    ),
    HALF: (SPLIT._replace(smoothing=0.1), ADAM[1]._replace(scaled=True)),
    DOUBLE: (
        VOCABULARY._replace(smoothing=0.1, weight=True),
        VOCABULARY._replace(softcap=30.0),
        ADAM[1]._replace(counted=True),
    ),
}


def _cases() -> Iterator[Case]:
    for (i, machine), (j, operation) in itertools.product(enumerate(MACHINES), enumerate(USUAL)):
        yield Case(machine, operation, (FLOAT, BFLOAT)[(i + j) % 2])
    for operation, dtype in itertools.product(USUAL, (FLOAT, BFLOAT, HALF, DOUBLE)):
        yield Case("sm_90", operation, dtype)
    for k, operation in enumerate(MORE):
        yield Case("sm_90", operation, FLOAT)
        yield Case("sm_90", operation, (BFLOAT, HALF, DOUBLE)[k % 3])
    for dtype, operations in VARIANTS.items():
        for operation in operations:
            yield Case("sm_90", operation, dtype)


CASES = list(dict.fromkeys(_cases()))


def of(kind: type) -> list[Case]:
    return [case for case in CASES if isinstance(case.operation, kind)]

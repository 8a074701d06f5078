"""Who runs: fastopt, torch as it comes, and the best that torch can do for the same work.

    python bench/contenders.py CASE CONTENDER loop|context

times one of them in a process of its own: for each number on its standard input it makes so
many calls and prints how long they took. Torch with huge pages runs so, because what decides
on those is an environment variable, once, at the start.
"""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as theirs
from cases import ROWS, AverageRow, ClipRow, LossRow, OptimizerRow, Row
from report import LARGE
from timer import Seconds, Timed, in_context, timed
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours
from fastopt.optim._operations import OPTIMIZERS as KINDS
from fastopt.optim._operations import TORCHS

Call = Callable[[], object]
FASTOPT, TORCH = "fastopt", "torch"
COMPILED, HUGE_PAGES = "torch.compile", "torch, huge pages"
_HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}


class Contender(NamedTuple):
    """A way to do a row's work.

    Attributes:
        call: does it once.
        results: what it has computed, to be checked.
    """

    call: Call
    results: Callable[[], list[torch.Tensor]]


def _loss(
    row: LossRow, function: Callable[..., torch.Tensor], dtype: torch.dtype | None = None
) -> Contender:
    torch.manual_seed(0)
    leaf, *rest = (t.to(dtype) if dtype and t.is_floating_point() else t for t in row.make())
    leaf.requires_grad_()

    def forward_and_backward() -> None:
        leaf.grad = None
        function(leaf, *rest, **row.options).backward()

    def gradient() -> list[torch.Tensor]:
        assert leaf.grad is not None
        return [leaf.grad]

    return Contender(forward_and_backward, gradient)


def _optimizer(row: OptimizerRow, module: ModuleType, compiled: bool, **how: Any) -> Contender:
    torch.manual_seed(0)
    params = [Parameter(torch.randn(s, dtype=row.dtype)) for s in row.shapes]
    for p in params:
        p.grad = _rows_of(p, row.touched) if row.touched else torch.randn_like(p)
    groups = [{"params": params[k :: row.groups]} for k in range(row.groups)]
    limits = row.clip is not None and module is fastopt.optim
    how |= {"max_grad_norm": row.clip} if limits else {}
    ours = KINDS[row.operation]
    kind: Any = ours if module is fastopt.optim else ours._twin
    step = kind(groups, **row.options, **how).step
    if row.clip is not None and not limits:
        step = _after_clipping(params, row.clip, step)
    return Contender(
        torch.compile(step) if compiled else step, lambda: [p.detach() for p in params]
    )


def _rows_of(param: Parameter, count: int) -> torch.Tensor:
    """A sparse gradient as an embedding has it for so many words, some of them the same."""
    rows = torch.randint(len(param), (1, count))
    values = torch.randn(count, *param.shape[1:])
    return torch.sparse_coo_tensor(rows, values, param.shape, check_invariants=False)


def _after_clipping(params: list[Parameter], most: float, step: Callable[[], Any]) -> Any:
    def clip_and_step() -> None:
        torch.nn.utils.clip_grad_norm_(params, most)
        step()

    return clip_and_step


def _clip(row: ClipRow, module: ModuleType, dtype: torch.dtype = torch.float32) -> Contender:
    torch.manual_seed(0)
    params = [Parameter(torch.empty(s, dtype=dtype)) for s in row.shapes]
    grads = [torch.randn(s).to(dtype) for s in row.shapes]
    for p, grad in zip(params, grads, strict=True):
        p.grad = grad
    clip, most = getattr(module, row.operation), -1.0 if row.scales else 1e9
    return Contender(lambda: clip(params, most), lambda: grads)


def _average(row: AverageRow, module: ModuleType) -> Contender:
    torch.manual_seed(0)
    model = torch.nn.ModuleList([torch.nn.LayerNorm(row.width) for _ in range(row.layers)])
    ema = module.swa_utils.get_ema_multi_avg_fn(0.99)
    more, steps = {}, None
    if row.optimizer is not None:
        optimizer = getattr(module, row.optimizer)(model.parameters(), lr=1e-3)
        steps = optimizer.step
        more = {"optimizer": optimizer} if module is fastopt.optim else {}
    average = module.swa_utils.AveragedModel(model, multi_avg_fn=ema, **more)
    average.update_parameters(model)  # which copies
    for p in model.parameters():
        torch.nn.init.normal_(p)
        p.grad = torch.randn_like(p)

    def step_and_update() -> None:
        if steps is not None:
            steps()
        if not more:
            average.update_parameters(model)

    return Contender(step_and_update, lambda: [p.detach() for p in average.parameters()])


def make(row: Row, name: str) -> Contender:
    """One contender of a row, on data that is the same for each."""
    if isinstance(row, LossRow):
        function = getattr(ours if name == FASTOPT else theirs, row.operation)
        return _loss(row, torch.compile(function) if name == COMPILED else function)
    if isinstance(row, ClipRow):
        return _clip(row, fastopt.nn.utils if name == FASTOPT else torch.nn.utils)
    module = fastopt.optim if name == FASTOPT else torch.optim
    if isinstance(row, AverageRow):
        return _average(row, module)
    how = {"torch foreach": {"foreach": True}, "torch fused": {"fused": True}}.get(name, {})
    return _optimizer(row, module, name == COMPILED, **how)


def _choices(optimizer: str) -> Iterable[str]:
    """Torch's own implementations beside its for-loop."""
    twin = KINDS[optimizer]._twin
    known = inspect.signature(twin).parameters if optimizer in TORCHS else ()
    return [f"torch {name}" for name in ("foreach", "fused") if name in known]


def names(row: Row, full: bool) -> list[str]:
    """The contenders; compiled ones only if full."""
    found = [FASTOPT, TORCH]
    if isinstance(row, ClipRow | AverageRow):
        return found
    if isinstance(row, OptimizerRow):
        found += _choices(row.operation)
    elif row.size >= LARGE and sys.platform == "linux":
        found.append(HUGE_PAGES)
    return found + [COMPILED] * full


def expect(row: Row) -> list[torch.Tensor]:
    """What is right: by torch, of losses and clipping in float64."""
    right = make(row, TORCH)
    if isinstance(row, LossRow):
        right = _loss(row, getattr(theirs, row.operation), torch.float64)
    elif isinstance(row, ClipRow):
        right = _clip(row, torch.nn.utils, torch.float64)
    right.call()
    return [t.clone() for t in right.results()]


def check(row: Row, contender: Contender, expected: list[torch.Tensor]) -> None:
    """Results are right, or an AssertionError."""
    for mine, its in zip(contender.results(), expected, strict=True):
        digits = torch.finfo(mine.dtype)
        # Muon's products in bfloat16 a CPU rounds otherwise, many at once; and of Adafactor's norms
        # of 16 million numbers torch loses digits (it is 7e-6 from float64, fastopt 5e-8).
        loose = row.operation in ("Muon", "Adafactor")
        limit = 1e-5 if loose else max(8 * digits.eps, 1e-7)
        scale = float(its.abs().max()) if its.numel() else 0.0
        smallest = 2 * digits.smallest_normal * digits.eps
        torch.testing.assert_close(
            mine.to(its.dtype), its, rtol=limit, atol=limit * scale + smallest, msg=row.name
        )


class Elsewhere:
    """A contender in a process of its own; to be closed."""

    def __init__(self, row: Row, name: str, loop: bool) -> None:
        self._process = subprocess.Popen(
            (sys.executable, __file__, row.name, name, "loop" if loop else "context"),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1,
            env={**os.environ, **_HUGE_PAGES},
        )  # fmt: skip

    def __call__(self, count: int) -> Seconds:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{count}\n")
        return float(self._process.stdout.readline())

    def close(self) -> None:
        self._process.communicate()


def main() -> None:
    row, name, how = ROWS[sys.argv[1]], *sys.argv[2:]
    clock = timed if how == "loop" else in_context
    run: Timed = clock(make(row, TORCH if name == HUGE_PAGES else name).call)
    for line in sys.stdin:
        print(run(int(line)), flush=True)


if __name__ == "__main__":
    main()

"""Memory that comes and goes while optimizers, threads and forks use it: see guarded.py.

Memory whose tensor is gone can't be touched, so whoever still has its address crashes.
"""

from __future__ import annotations

import copy
import gc
import queue
import random
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as theirs
from cases import DEVICE, INTERPRETED, LOSSES, OPTIMIZERS, OptimizerCase, labelled, pair
from guarded import SUPPORTED, Guards, Progress, run
from test_guarded import Twins, begin, sides
from test_processes import in_fork
from torch import Tensor
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours

pytestmark = [
    pytest.mark.skipif(not SUPPORTED, reason="mmap and mprotect as Linux has them"),
    pytest.mark.skipif(DEVICE != "cpu", reason="guards memory of the CPU alone"),
]

# -- memory that comes and goes -----------------------------------------------------------


def rebind_data(twins: Twins) -> None:
    for k, m in enumerate(twins.mine):
        if random.random() < 0.7:
            m.data = twins.guards.copy(m)
        if m.dim() == 2 and random.random() < 0.5:  # perhaps at the same address
            for _, params in twins.replicas():
                params[k].data = params[k].data.t()


def rebind_states(twins: Twins) -> None:
    """In every way there is, for all or some."""
    for state in twins.ours.state.values():
        for name, value in list(state.items()):
            if not isinstance(value, Tensor):
                continue
            how = random.randrange(5)
            if how == 0:
                state[name] = twins.guards.copy(value)
            elif how == 1:
                value.data = twins.guards.copy(value)
            elif how == 2:
                value.set_(twins.guards.copy(value))
            elif how == 3:
                value.mul_(1.0)


def new_state_dicts(twins: Twins) -> None:
    for param, state in list(twins.ours.state.items()):
        twins.ours.state[param] = dict(state)


def load_checkpoint(twins: Twins) -> None:
    for optimizer, _ in twins.replicas():
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


def load_each_others(twins: Twins) -> None:
    mine, torchs = (copy.deepcopy(o.state_dict()) for o in (twins.ours, twins.theirs))
    twins.ours.load_state_dict(torchs)
    twins.theirs.load_state_dict(mine)


def forget_states(twins: Twins) -> None:
    for k in random.sample(range(len(twins.mine)), 2):
        for optimizer, params in twins.replicas():
            optimizer.state.pop(params[k], None)


def replace_parameters(twins: Twins) -> None:
    """Some end, others take their places in the groups."""
    for k in random.sample(range(len(twins.mine)), 2):
        value = torch.randn(random.randrange(1, 50))
        new = (twins.guards.copy(value), value.clone(), value.double())
        for (optimizer, params), tensor in zip(twins.replicas(), new, strict=True):
            optimizer.state.pop(params[k], None)
            optimizer.param_groups[0]["params"][k] = params[k] = Parameter(tensor)


def replace_optimizer(twins: Twins) -> None:
    """The old one ends while it has a plan; states begin anew."""
    twins.begin()


def copy_optimizer(twins: Twins) -> None:
    twins.mine, twins.ours = copy.deepcopy((twins.mine, twins.ours))


CHANGES = (
    rebind_data, rebind_states, new_state_dicts, load_checkpoint, load_each_others,
    forget_states, replace_parameters, replace_optimizer, copy_optimizer,
)  # fmt: skip


def memory_comes_and_goes(file: str, at_end: bool, seed: int) -> None:
    guards, progress = begin(file, at_end, seed)
    for case in OPTIMIZERS:
        values = [torch.randn(n) for n in (1, 70, 5, 33, 0)] + [torch.randn(6, 6)]
        twins = Twins(guards, values, case)
        done: list[str] = []
        # Adagrad's constructor makes the states, and torch raises where there are none.
        early = getattr(fastopt.optim, case.operation)._made_early
        changes = [c for c in CHANGES if not (early and c in (forget_states, replace_parameters))]
        for change in (None, *random.choices(changes, k=2 if INTERPRETED else 6)):
            if change is not None:
                done.append(change.__name__)
                change(twins)
            if random.random() < 0.3:
                gc.collect()
            progress(case, *done)
            for _ in range(random.randrange(1, 3)):
                twins.set_grads(missing=random.choice((0.0, 0.0, 0.3)))
                twins.step()
            twins.assert_same()


@sides
def test_memory_comes_and_goes(at_end: bool, seed: int, tmp_path: Path) -> None:
    run(memory_comes_and_goes, tmp_path, at_end, seed)


# -- gradients' memory, handed out and taken back -------------------------------------------


class PoolTorch:
    """torch, for the module that reuses the gradients' memory: its memory is guarded, too."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def empty(self, shape: Any, dtype: torch.dtype, device: str) -> Tensor:
        if shape == 0:  # what gets its memory from another tensor
            return torch.empty(shape, dtype=dtype, device=device)
        return self._guards.empty(shape, dtype)


def gradients_from_several_threads(file: str, seed: int) -> None:
    """Kept, dropped here or by another thread, poisoned before: never overwritten, never stale."""
    from fastopt.kernels.numba import memory

    guards, progress = Guards(True), Progress(file)
    memory.torch = PoolTorch(guards)
    memory.POOLED_BYTES = 1 << 12
    exchange: queue.SimpleQueue[tuple[Tensor, Tensor]] = queue.SimpleQueue()
    operations = sorted({case.operation for case in LOSSES})

    def work(worker: int) -> None:
        rng = random.Random(seed * 10 + worker)
        generator = torch.Generator().manual_seed(worker)
        kept: list[tuple[Tensor, Tensor]] = []
        for turn in range(150):
            rows = rng.choice((40, 41, 60, 200))
            input = guards.copy(torch.randn(rows, 31, generator=generator), read_only=True)
            target = torch.randn(rows, 31, generator=generator)
            operation = rng.choice(operations)
            if operation == "cross_entropy":
                target = torch.randint(0, 31, (rows,), generator=generator)
            leaf, twin = input.requires_grad_(), input.detach().clone().requires_grad_()
            with fastopt.use_backend("numba"):
                loss = getattr(ours, operation)(leaf, target)
            scale = rng.choice((1.0, 1.0, 0.5))
            (grad,) = torch.autograd.grad(loss, leaf, torch.tensor(scale))
            (right,) = torch.autograd.grad(
                getattr(theirs, operation)(twin, target), twin, torch.tensor(scale)
            )
            torch.testing.assert_close(grad, right)
            held = rng.choice((grad, grad.t(), grad[3:]))
            kept.append((held, held.clone()))
            del grad, held
            if rng.random() < 0.3:
                exchange.put(kept.pop())
            with suppress(queue.Empty):
                kept.append(exchange.get_nowait())
            while len(kept) > 3 or (kept and rng.random() < 0.4):
                view, before = kept.pop(rng.randrange(len(kept)))
                assert torch.equal(view, before)
                view.fill_(float("nan"))
                del view
            if turn % 50 == 49:
                fastopt.empty_cache()
                gc.collect()

    progress("threads", seed)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@pytest.mark.skipif(INTERPRETED, reason="torch's allocator serves Triton's gradients")
def test_gradients_from_several_threads(seed: int, tmp_path: Path) -> None:
    run(gradients_from_several_threads, tmp_path, seed)


# -- threads and forks at once --------------------------------------------------------------

LONG = 70_001  # elements of a loss that two threads share; torch itself has none to do with it
STEPS = 3


class Work:
    """Losses on shared read-only data, and steps of an own optimizer, with torch's results."""

    def __init__(self, guards: Guards) -> None:
        self._guards = guards
        self._shared = []
        for operation in sorted({case.operation for case in LOSSES}):
            makes = [pair(70), pair(LONG)]
            if operation == "cross_entropy":
                makes = [labelled((7, 10)), labelled((700, 101)), labelled((9000, 8))]
            for make in makes:
                tensors = make(torch.float32)
                leaf = tensors[0].clone().requires_grad_()
                loss = getattr(theirs, operation)(leaf, *tensors[1:])
                (grad,) = torch.autograd.grad(loss, leaf)
                read_only = [guards.copy(t, read_only=True) for t in tensors]
                self._shared.append((operation, read_only, (loss.detach().numpy(), grad.numpy())))
        self._values = [torch.randn(n) for n in (20_000, 7, 20_001, 1)]
        self._grads = [
            [guards.copy(torch.randn(v.shape), read_only=True) for v in self._values]
            for _ in range(STEPS)
        ]
        self._expected = [self.train(torch.optim, case, None) for case in OPTIMIZERS]

    def train(self, module: Any, case: OptimizerCase, guards: Guards | None) -> list[np.ndarray]:
        params = [Parameter(v.clone() if guards is None else guards.copy(v)) for v in self._values]
        optimizer = getattr(module, case.operation)(params, **case.options)
        for grads in self._grads:
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad
            optimizer.step()
        return [p.detach().numpy() for p in params]

    def do(self, place: int) -> None:
        """Without any of torch's own parallel loops: those hang in a forked child."""
        with fastopt.use_backend("numba"):
            for operation, tensors, expected in self._shared:
                leaf = tensors[0].detach().requires_grad_()
                loss = getattr(ours, operation)(leaf, *tensors[1:])
                (grad,) = torch.autograd.grad(loss, leaf)
                for m, t in zip((loss.detach(), grad), expected, strict=True):
                    np.testing.assert_allclose(m.numpy(), t, rtol=1e-4, atol=1e-6)
            for k in range(place, len(OPTIMIZERS), 3):
                found = self.train(fastopt.optim, OPTIMIZERS[k], self._guards)
                for m, t in zip(found, self._expected[k], strict=True):
                    np.testing.assert_allclose(m, t, rtol=1e-4, atol=1e-5)


def threads_and_forks(file: str) -> None:
    """Children are forked while three threads compute; both do the same work."""
    progress, guards = Progress(file), Guards(True)
    torch.set_num_threads(2)
    guards.install()
    work = Work(guards)
    progress("alone")
    for place in range(3):
        work.do(place)
    in_fork(lambda: work.do(0))
    stop = threading.Event()

    def go_on(place: int) -> int:
        rounds = 0
        while not stop.is_set() or rounds < 3:
            work.do(place)
            rounds += 1
        return rounds

    with ThreadPoolExecutor(3) as pool:
        running = [pool.submit(go_on, place) for place in range(3)]
        try:
            for child in range(8):
                progress("child", child)
                in_fork(lambda place=child % 3: work.do(place))
        finally:
            stop.set()
        progress("threads")
        for thread in running:
            thread.result()


@pytest.mark.skipif(INTERPRETED, reason="the interpreter is no matter of threads")
def test_threads_and_forks(tmp_path: Path) -> None:
    run(threads_and_forks, tmp_path)

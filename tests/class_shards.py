"""Cross-entropy whose classes are shared out among two processes, beside a single process's.

As in ranks.py, scenarios return (what they found, what the single process found).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import (
    DeviceMesh,
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import loss_parallel

import fastopt
import fastopt.nn.functional as F

Outcome = tuple[dict[str, Tensor], dict[str, Tensor]]
torchs = torch.nn.functional
WHOLE = Replicate()


def spread(values: Tensor | None, mesh: DeviceMesh, placement: Any) -> Any:
    return None if values is None else distribute_tensor(values, mesh, [placement]).requires_grad_()


def single(values: Tensor | None) -> Any:
    return None if values is None else values.to(torch.float64, copy=True).requires_grad_()


def random(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def full(tensor: Any, dtype: torch.dtype, placement: Any) -> Tensor:
    """All of a result, in the oracle's dtype; it has to be cut and rounded as torch's."""
    assert type(tensor) is DTensor
    assert (tensor.placements, tensor.dtype) == ((placement,), dtype)
    return tensor.detach().full_tensor().double()


def labels(classes: int, shape: tuple[int, ...], ignored: int, all_ignored: bool) -> Tensor:
    found = torch.randint(classes, shape)
    if shape:
        found.view(-1)[: None if all_ignored else 1] = ignored
    return found


def is_compiled(function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
    (decision,) = fastopt.explain(function, *args, **kwargs)
    assert decision.backend == "numba", str(decision)


def backward(loss: Any, mesh: DeviceMesh | None, seed: int) -> None:
    """From a gradient that isn't 1."""
    torch.manual_seed(seed)
    grad = torch.randn(loss.shape, dtype=torch.float64).to(loss.dtype)
    loss.backward(grad if mesh is None else distribute_tensor(grad, mesh, [WHOLE]))


def logits_in_shards(seed: int, folder: Path, dtype: torch.dtype) -> Outcome:
    """All shapes of logits, with as many classes in each process, fewer in the last, or none."""
    mesh, found, expected = init_device_mesh("cpu", (2,)), {}, {}
    torch.manual_seed(seed)
    cases = [
        ((5, 7), "mean", False, -100), ((6, 8), "none", True, 0), ((9,), "mean", True, 1),
        ((1, 7, 3), "sum", True, -100), ((2, 6, 3, 2), "none", False, 5),
        ((4, 1), "mean", False, -100), ((0, 6), "sum", True, -100), ((3, 5), "mean", True, 2),
    ]  # fmt: skip
    for k, (shape, reduction, weighted, ignored) in enumerate(cases):
        dim = min(1, len(shape) - 1)
        x, w = 3 * random(shape, dtype), random((shape[dim],), dtype).abs() if weighted else None
        y = labels(shape[dim], shape[:dim] + shape[dim + 1 :], ignored, shape == (3, 5))
        options: Any = {"reduction": reduction, "ignore_index": ignored}
        leaf, alone = spread(x, mesh, Shard(dim)), single(x)
        whole = torchs.cross_entropy(alone, y, None if w is None else w.double(), **options)
        if k % 2:  # torch takes either
            y = distribute_tensor(y, mesh, [WHOLE])
            w = None if w is None else distribute_tensor(w, mesh, [WHOLE])
        with loss_parallel():
            is_compiled(F.cross_entropy, leaf, y, w, **options)
            loss = F.cross_entropy(leaf, y, w, **options)
        backward(whole, None, seed)
        backward(loss, mesh, seed)
        found[f"loss of {shape}"] = full(loss, dtype, WHOLE)
        found[f"gradient of {shape}"] = full(leaf.grad, dtype, Shard(dim))
        expected |= {f"loss of {shape}": whole.detach(), f"gradient of {shape}": alone.grad}
    return found, expected


def extreme_logits(seed: int, folder: Path, dtype: torch.dtype) -> Outcome:
    """Infinite and NaN ones, in the shard that has the class or in the other one; large, sure."""
    mesh, found, expected = init_device_mesh("cpu", (2,)), {}, {}
    torch.manual_seed(seed)
    inf, x = torch.inf, random((12, 7), dtype)
    x[0, :4], x[1, 4:], x[2], x[3, 2], x[4, 5] = -inf, -inf, -inf, inf, inf
    x[5, 5], x[6, 1], x[7], x[8, 3], x[9, 5] = torch.nan, torch.nan, x[7] + 1e4, 30.0, 30.0
    x[10], x[10, 6], x[11] = -inf, 1.0, x[11] - 1e30
    for label in (3, 5):
        y = torch.full((12,), label)
        leaf, alone = spread(x, mesh, Shard(1)), single(x)
        with loss_parallel():
            loss = F.cross_entropy(leaf, y, reduction="none")
        whole = torchs.cross_entropy(alone, y, reduction="none")
        loss.sum().backward()
        whole.sum().backward()
        found[f"losses at {label}"] = full(loss, dtype, WHOLE)
        found[f"gradient at {label}"] = full(leaf.grad, dtype, Shard(1))
        expected |= {f"losses at {label}": whole.detach(), f"gradient at {label}": alone.grad}
    return found, expected


def layer_in_shards(seed: int, folder: Path, dtype: torch.dtype) -> Outcome:
    """A linear layer whose weight and bias have their classes in shards."""
    mesh, found, expected = init_device_mesh("cpu", (2,)), {}, {}
    torch.manual_seed(seed)
    cases = [
        ((5, 4), 7, True, "mean", False, -100), ((2, 3, 4), 6, False, "none", True, 2),
        ((4,), 5, True, "sum", True, -100), ((6, 4), 1, False, "mean", False, -100),
        ((6, 4), 1, True, "none", False, -100), ((3, 4), 8, True, "mean", True, 1),
    ]  # fmt: skip
    for shape, classes, biased, reduction, weighted, ignored in cases:
        tensors = (
            random(shape, dtype),
            random((classes, shape[-1]), dtype),
            random((classes,), dtype) if biased else None,
        )
        w = random((classes,), dtype).abs() if weighted else None
        y = labels(classes, shape[:-1], ignored, classes == 8)
        options: Any = {"reduction": reduction, "ignore_index": ignored}
        late = classes == 1  # an input that is still on its way
        placements = Shard(0) if late else WHOLE, Shard(0), Shard(0)
        leaves = [spread(t, mesh, p) for t, p in zip(tensors, placements, strict=True)]
        alone = [single(t) for t in tensors]
        with loss_parallel():
            args, given = leaves[:2], {"linear_bias": leaves[2], "weight": w, **options}
            if late:
                args[0] = args[0].redistribute(placements=[WHOLE], async_op=True)
            is_compiled(F.linear_cross_entropy, *args, y, **given)
            loss = F.linear_cross_entropy(*args, y, **given)
        logits = torchs.linear(*alone).reshape(-1, classes)
        w = None if w is None else w.double()
        whole = torchs.cross_entropy(logits, y.flatten(), w, **options).reshape(loss.shape)
        backward(whole, None, seed)
        backward(loss, mesh, seed)
        key = f"{shape}, {classes} classes, {biased=}"
        found[key], expected[key] = full(loss, dtype, WHOLE), whole.detach()
        cuts = Shard(0) if late else Partial(), Shard(0), Shard(0)
        for k, (leaf, one, cut) in enumerate(zip(leaves, alone, cuts, strict=True)):
            if leaf is not None:
                found[f"{key}, gradient {k}"] = full(leaf.grad, dtype, cut)
                expected[f"{key}, gradient {k}"] = one.grad
    return found, expected


def outcome(call: Callable[[], Any]) -> Any:
    """What a call gives, or its error."""
    try:
        return call().full_tensor()
    except (RuntimeError, ValueError, IndexError) as error:
        return f"{type(error).__name__}: {error}"


def class_out_of_range(seed: int, folder: Path) -> Outcome:
    """Each process has the single process's error, and no collective that another one is not in."""
    mesh = init_device_mesh("cpu", (2,))
    x, layer = torch.randn(3, 7), torch.randn(7, 2)
    for label in (7, -1, 2**40):
        y = torch.tensor([6, label, 0])
        expected = outcome(functools.partial(F.cross_entropy, x, y))
        assert expected.startswith(f"IndexError: Target {label} is out of bounds. It is target[1]")
        logits, inputs = spread(x, mesh, Shard(1)), spread(x[:, :2], mesh, WHOLE)
        head = spread(layer, mesh, Shard(0))
        with loss_parallel():  # which no error may leave: torch's would stay in force
            assert outcome(functools.partial(F.cross_entropy, logits, y)) == expected
            assert outcome(functools.partial(F.linear_cross_entropy, inputs, head, y)) == expected
    return {}, {}


def what_is_sent(seed: int, folder: Path) -> Outcome:
    """Two collectives a loss, of so many bytes a position as the pages say; none in backward."""
    mesh = init_device_mesh("cpu", (2,))
    for dtype, size in ((torch.float32, 16), (torch.bfloat16, 16), (torch.float64, 24)):
        x, layer, y = torch.randn(40, 9), torch.randn(9, 5), torch.randint(9, (40,))
        calls = (
            (F.cross_entropy, spread(x.to(dtype), mesh, Shard(1))),
            (F.linear_cross_entropy, spread(x[:, :5].to(dtype), mesh, WHOLE),
             spread(layer.to(dtype), mesh, Shard(0))),
        )  # fmt: skip
        for function, *tensors in calls:
            with (
                loss_parallel(),
                torch.autograd.profiler.profile() as profile,
                mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce,
            ):
                function(*tensors, y).backward()
            sent = [call.args[0] for call in all_reduce.call_args_list]
            assert sum(t.numel() * t.itemsize for t in sent) == size * len(y)
            collectives = [e.name for e in profile.function_events if e.name.startswith("gloo:")]
            assert collectives == ["gloo:all_reduce"] * 2
    return {}, {}


def left_to_torch(seed: int, folder: Path) -> Outcome:
    """What only torch serves: its result or its error, and the reason."""
    mesh, square = init_device_mesh("cpu", (2,)), init_device_mesh("cpu", (1, 2))
    torch.manual_seed(seed)
    x, y = torch.randn(4, 6), torch.randint(6, (4,))
    on_square = distribute_tensor(x, square, [WHOLE, Shard(1)])
    logits, head = spread(x, mesh, Shard(1)), spread(torch.randn(6, 3), mesh, Shard(0))
    calls: dict[str, tuple[str, tuple[Any, ...], dict[str, Any]]] = {
        "label_smoothing=0.1": ("cross_entropy", (logits, y), {"label_smoothing": 0.1}),
        "a DTensor of (Shard(dim=0),)": ("cross_entropy", (spread(x, mesh, Shard(0)), y), {}),
        "isn't one row of processes": ("cross_entropy", (on_square, y), {"reduction": "sum"}),
        "a target of torch.float32": ("cross_entropy", (logits, x.softmax(1)), {}),
        "an input that is no DTensor": ("linear_cross_entropy", (x[:, :3], head, y), {}),
    }
    outside = {
        "DTensors in a graph or outside of loss_parallel":
            ("cross_entropy", (logits, distribute_tensor(y, mesh, [WHOLE])), {}),
    }  # fmt: skip
    with loss_parallel():
        for reason, call in calls.items():
            _is_torchs(reason, *call)
        loss = F.cross_entropy(logits, y)
        second = functools.partial(torch.autograd.grad, loss, logits, create_graph=True)
        assert "no second derivative" in outcome(second)
    for reason, call in outside.items():
        _is_torchs(reason, *call)
    return {}, {}


def _is_torchs(reason: str, name: str, args: tuple[Any, ...], options: dict[str, Any]) -> None:
    call = functools.partial(getattr(F, name), *args, **options)
    (decision,) = fastopt.explain(getattr(F, name), *args, **options)
    assert decision.backend == "reference"
    assert reason in str(decision)
    ours, theirs = outcome(call), outcome(lambda: getattr(torchs, name)(*args, **options))
    assert isinstance(ours, Tensor) == isinstance(theirs, Tensor)
    if isinstance(theirs, str):
        assert ours == theirs
        return
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    with fastopt.use_backend("numba"):
        assert reason in outcome(call)

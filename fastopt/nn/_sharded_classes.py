"""Cross-entropy over classes that are shared out among processes, inside torch's `loss_parallel`.

Each process reads its shard of the logits once. Two collectives join what the shards say of a
row: its largest logit and that of its class, of which there is a maximum, and the sum of the
exponentials. The backward pass needs none: with the joint sum a shard's gradient is that of the
softmax over all classes. Gradients are cut as torch cuts them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from ..front.analysis import Call, Evaluation
from ..front.circumstances import in_loss_parallel, is_traced
from ..kernels.layout import is_released, released_error
from ..kernels.linear import OutcomesOfLayer
from ..kernels.operation import Options
from ..kernels.outcomes import Outcomes
from ..kernels.reference import out_of_bounds
from ..optim._shards import cut, is_dtensor, local

__all__ = ["is_dtensor", "of_layer", "of_logits", "served", "shares"]

Operands = tuple[Tensor | None, ...]

# Bound now: a user may put fastopt's functions in the place of torch's.
_pad = F.pad


# -- which calls are served ------------------------------------------------------------------


def shares(
    operands: Operands, dims: tuple[int | None, ...], target: Tensor, record: Any,
    special: list[str],
) -> Operands | None:  # fmt: skip
    """What this process holds of each operand; None where none of them is in shards.

    Whatever decides is the same in all processes, which have to agree about the collectives.

    Args:
        operands: of a call, None for one that wasn't given.
        dims: of each the dimension that has to be cut; None for one that has to be whole.
        target: the one of them that should be class indices.
        record: of the call's options.
        special: gets each reason why torch has to serve the DTensors among them.
    """
    first: Any = next((t for t in operands if is_dtensor(t)), None)
    if first is None:
        return None
    if is_traced() or not in_loss_parallel():
        special.append("DTensors in a graph or outside of loss_parallel")
        return None
    from torch.distributed.tensor import Replicate, Shard

    mesh = first.device_mesh
    if mesh.ndim != 1 or mesh.get_coordinate() is None:
        special.append(f"DTensors of {mesh}, which isn't one row of processes with this one")
        return None
    for t, dim in zip(operands, dims, strict=True):
        right = Replicate() if dim is None else Shard(dim)
        if is_dtensor(t):
            if cut(t) != (mesh, (right,)):
                special.append(f"a DTensor of {cut(t)[1]}, not {(right,)}, of one mesh")
        elif t is not None and dim is not None:
            special.append(f"a tensor that is no DTensor of {(right,)}")
    for name in ("label_smoothing", *record.beyond()):
        if value := getattr(record, name):
            special.append(f"{name}={value} of classes in shards")
    if target.dtype != torch.int64:
        special.append(f"a target of {target.dtype} of classes in shards")
    return tuple([None if t is None else _waited(local(t)) for t in operands])


def served(call: Call, evaluate: Evaluation) -> Call:
    """The call of shares, by one of the functions below.

    At any size: torch's own code has a collective more, and no size that one process knows may
    decide on its own.
    """
    return call._replace(evaluate=evaluate, request=call.request._replace(crossover=0))


def _waited(tensor: Tensor) -> Tensor:
    """The tensor itself, of one that a collective may still be writing."""
    wait: Callable[[], Tensor] | None = getattr(tensor, "wait", None)
    return tensor if wait is None else wait()


# -- the loss --------------------------------------------------------------------------------


def of_logits(
    backend: Any, options: Options, expected: Any, operands: Operands, followed: bool
) -> Tensor:
    """The cross-entropy of logits: see `evaluate` in front/autograd.py."""
    logits, target, weight = operands
    assert target is not None
    whole: Any = logits
    dim = min(1, whole.dim() - 1)
    x = whole.to_local().movedim(dim, -1)
    x = x.reshape(target.numel(), x.shape[-1])
    if not x.shape[1]:  # as good as a class that is impossible
        x = _pad(x, (0, 1), value=-torch.inf)
    elif x.stride(1) != 1:
        x = x.contiguous()
    return _loss(backend, options, whole.device_mesh, whole.shape[dim], target, weight, x)


def of_layer(
    backend: Any, options: Options, expected: Any, operands: Operands, followed: bool
) -> Tensor:
    """The same of the logits that a linear layer makes."""
    from torch.distributed.tensor import Partial

    input, layer, target, bias, weight = operands
    assert target is not None
    wholes: tuple[Any, ...] = input, layer, bias
    x, w = wholes[0].to_local(grad_placements=[Partial()]), wholes[1].to_local()
    b = None if bias is None else wholes[2].to_local()
    if not len(w):
        b = _pad(w.new_empty(0) if b is None else b, (0, 1), value=-torch.inf)
        w = _pad(w, (0, 0, 0, 1))
    x = x.reshape(target.numel(), x.shape[-1])
    mesh, classes = wholes[1].device_mesh, len(wholes[1])
    return _loss(backend, options, mesh, classes, target, weight, x, w, b)


def _loss(
    backend: Any, options: Options, mesh: Any, classes: int, target: Tensor, weight: Tensor | None,
    x: Tensor, w: Tensor | None = None, b: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The loss of this process's logits x, or of those that its part of a layer makes of x."""
    from torch.distributed.tensor import DTensor, Replicate

    record: Any = options.record
    shape, target = target.shape, _waited(local(target)).reshape(-1)
    counts = target != record.ignore_index
    known = (target >= 0) & (target < classes)
    _check(known | ~counts, target.view(shape), classes, record.ignore_index)
    shard = -(-classes // mesh.size())  # as torch.chunk has it: the last ones may be smaller
    label = target - min(mesh.get_local_rank() * shard, classes)
    rows = None
    if w is not None and target.is_cpu and not counts.all():  # in no matrix product
        rows = counts.nonzero().view(-1)
        x, label = x[rows], label[rows]
    log_prob: Tensor = _LogProb.apply(backend, mesh.get_group(), label, x, w, b)  # type: ignore[no-untyped-call]
    if rows is not None:
        log_prob = log_prob.new_zeros(len(target)).index_copy(0, rows, log_prob)
    each = log_prob.new_ones(())
    if weight is not None:
        each = _waited(local(weight)).to(log_prob.dtype)[target.where(known, 0)]
    losses = torch.where(counts, -each * log_prob, 0.0)
    if options.reduction == "none":
        loss = losses.view(shape)
    else:
        loss = losses.sum()
        if options.reduction == "mean":
            loss = loss / torch.where(counts, each, 0.0).sum()
    loss = loss.to(options.dtype)
    joint: Tensor = DTensor.from_local(loss, mesh, [Replicate()], run_check=False)
    return joint


def _check(right: Tensor, target: Tensor, classes: int, ignore_index: int) -> None:
    """Raise for a class index out of range: in every process, since each has the whole target."""
    if not target.is_cpu:
        torch._assert_async(right.all(), "Target is out of bounds")
    elif not right.all():
        raise out_of_bounds(target, classes, ignore_index)


class _Rows:
    """Of rows of logits what OutcomesOfLayer is of a layer."""

    def __init__(self, backend: Any, x: Tensor, label: Tensor) -> None:
        self._given = backend, x, label

    def forward(self) -> Outcomes:
        backend, x, label = self._given
        found: Outcomes = backend.outcomes(x, label)
        return found

    def backward(self, kept: Tensor, grads: Tensor, needs: tuple[bool, ...]) -> Operands:
        backend, x, label = self._given
        return backend.gradient(x, label, kept, grads), None, None, None


class _LogProb(torch.autograd.Function):
    """Of each row the logarithm of its class's probability, among the classes of all processes.

    `label` is the class's place in this process's shard; one outside of the shard is another's.
    """

    @staticmethod
    def forward(
        ctx: Any, backend: Any, group: Any, label: Tensor, *tensors: Tensor | None
    ) -> Tensor:
        x, w, b = [None if t is None else _waited(t) for t in tensors]
        assert x is not None
        here = (label >= 0) & (label < (x.shape[1] if w is None else len(w)))
        label = label.where(here, 0)
        found = _source(backend, label, x, w, b).forward()
        top, total, _ = found.kept.double()
        own = torch.where(here & (total > 0), found.log_prob + top + total.log(), -torch.inf)
        # Maxima of float32 lose nothing. Whether gloo's hear of a NaN doesn't matter: the sum does.
        maxima = torch.stack([top, own]).to(found.log_prob.dtype)
        distributed.all_reduce(maxima, distributed.ReduceOp.MAX, group)
        highest, own = maxima.double()
        total *= (top - highest).exp()
        distributed.all_reduce(total, group=group)
        top = highest.where(total == total, torch.nan)  # then no probability is a number
        kept = torch.stack([top, total, torch.zeros_like(total)]).to(found.kept.dtype)
        ctx.backend, ctx.wide = backend, found.log_prob.dtype
        ctx.given = [w is not None, b is not None]
        # Who reads saved_tensors finds no None.
        ctx.save_for_backward(label, here, kept, *[t for t in (x, w, b) if t is not None])
        log_prob: Tensor = own - highest - total.log()
        return log_prob

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError(
                "a cross-entropy of classes in shards has no second derivative (create_graph is "
                "True; supported: False)"
            )
        label, here, kept, x, *layer = ctx.saved_tensors
        for t in (x, *layer):
            if is_released(t):
                raise released_error("a tensor that a loss has been computed from", t)
        given = iter(layer)
        w, b = [next(given) if there else None for there in ctx.given]
        # Where the class is another process's, of the log-sum-exp only is there a gradient here.
        grad = grad.to(ctx.wide)
        grads = torch.stack([grad.where(here, 0), torch.zeros_like(grad), -grad.where(~here, 0)])
        x_needs, w_needs, b_needs = ctx.needs_input_grad[3:]
        found = _source(ctx.backend, label, x, w, b).backward(
            kept, grads, (x_needs, w_needs, False, b_needs)
        )
        return None, None, None, found[0], found[1], found[3]


def _source(
    backend: Any, label: Tensor, x: Tensor, w: Tensor | None, b: Tensor | None
) -> _Rows | OutcomesOfLayer:
    return _Rows(backend, x, label) if w is None else OutcomesOfLayer(backend, x, w, label, b)

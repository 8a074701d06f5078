"""A softmax loss of a linear layer's logits, of which never more than a few rows are in memory.

Rows of logits, their losses and the gradient over them, which is written in their place, come one
piece after another through one buffer. Torch multiplies matrices around that: a piece needs the
weight once for its logits and once for the gradient of its input, and adds to the gradient of the
weight. Since a mean's divisor is known before, all of this is done in the forward pass, where
grad_output is one number: another one only scales it.

For N rows, F features and C classes that is 6 N F C flops, as many as with the logits in memory. A
piece reads and writes the gradient of the weight, so pieces must not be too small. What a backend
says of them, and how it computes their losses, is its `Pieces`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import torch

from .operation import Options
from .outcomes import Outcomes

__all__ = ["Linear", "OutcomesOfLayer", "Pieces"]

Tensors = tuple[torch.Tensor | None, ...]

# Of a gradient in half precision: bytes that are made float32 at a time, and stay in a cache.
_WIDE_BYTES = 1 << 20


class Pieces(Protocol):
    """A softmax loss whose logits come some rows at a time.

    Attributes:
        BYTES, ROWS: of a piece of logits, about so many bytes; and at least so many rows.
        places: the rows that count; None for all of them.
    """

    BYTES: int
    ROWS: int
    places: torch.Tensor | None

    def __init__(
        self, options: Options, input: torch.Tensor, target: torch.Tensor,
        weight: torch.Tensor | None, classes: int,
    ) -> None:  # fmt: skip
        """Of a whole call; `input` is what a linear layer is given.

        Raises:
            IndexError: a class index out of range, where the host may look at it.
        """

    @staticmethod
    def early(options: Options, dtype: torch.dtype) -> bool:
        """Whether the forward pass is to compute gradients."""

    @staticmethod
    def scaled(options: Options, grads: Tensors, grad_output: torch.Tensor) -> bool:
        """Make gradients for the grad_output expected those for another; False if it can't."""

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Uninitialised memory where the tensors are."""

    def empty_losses(self, count: int) -> torch.Tensor:
        """Room for the losses of so many positions."""

    def run(
        self, logits: torch.Tensor, target: torch.Tensor, losses: torch.Tensor | None,
        overwrite: bool, grad_output: torch.Tensor | None, t_grad: torch.Tensor | None,
    ) -> None:  # fmt: skip
        """One piece.

        Args:
            logits: (rows, C) or (rows, C, D), contiguous.
            target: theirs.
            losses: gets those of the positions, if wanted.
            overwrite: whether the logits are to become their gradient.
            grad_output: the loss's, or those of the positions; None for the one expected.
            t_grad: gets the gradient of the target's probabilities, if wanted.
        """

    def reduce(self, losses: torch.Tensor) -> torch.Tensor:
        """The loss, from those of all positions."""


class Linear(NamedTuple):
    """The contract of losses (see kernels/losses.py), by a backend's pieces."""

    pieces: type[Pieces]

    def forward(
        self, options: Options, tensors: Tensors, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor, Tensors | None, tuple[()]]:
        layer = _Layer(self.pieces, options, tensors)
        early = any(needs) and self.pieces.early(options, layer.x.dtype)
        losses = layer.pieces.empty_losses(layer.rows * layer.places)
        grads = layer.run(losses, needs if early else (False,) * len(needs), None)
        return layer.reduced(losses), grads if early else None, ()

    def backward(
        self,
        options: Options,
        tensors: Tensors,
        grads: Tensors | None,
        kept: Tensors,
        grad_output: torch.Tensor,
        needs: tuple[bool, ...],
    ) -> Tensors:
        if grads is not None and self.pieces.scaled(options, grads, grad_output):
            return grads
        return _Layer(self.pieces, options, tensors).run(None, needs, grad_output)

    def describe(self, options: Options, tensors: Tensors) -> str:
        """How a call runs, in words."""
        input, linear_weight, *_ = tensors
        assert input is not None
        assert linear_weight is not None
        columns = linear_weight.numel() // max(linear_weight.shape[-1], 1)
        rows = _step(self.pieces, input.numel() // max(input.shape[-1], 1), columns, input.itemsize)
        when = "in the forward pass" if self.pieces.early(options, input.dtype) else "in backward"
        return f"linear softmax, {rows} rows of logits at a time; gradient {when}"


def _step(pieces: Any, rows: int, columns: int, itemsize: int) -> int:
    """How many rows a piece has, all of about one size."""
    most: int = max(pieces.BYTES // max(columns * itemsize, 1), pieces.ROWS)
    return max(-(-rows // max(-(-rows // most), 1)), 1)


class _Layer:
    """One call: its tensors as matrices."""

    def __init__(self, pieces: type[Pieces], options: Options, tensors: Tensors) -> None:
        input, linear_weight, target, linear_bias, weight = tensors
        assert input is not None
        assert linear_weight is not None
        assert target is not None
        self.options, self.tensors = options, tensors
        features, (classes, *places) = input.shape[-1], linear_weight.shape[:-1]
        self.each = (classes, *([linear_weight[0, ..., 0].numel()] if places else []))
        self.places = self.each[-1] if places else 1
        self.x = input.reshape(input.numel() // features, features)
        self.w = _for_products(linear_weight.reshape(linear_weight.numel() // features, features))
        self.b = None if linear_bias is None else linear_bias.reshape(-1)
        self.pieces = pieces(options, input, target, weight, classes)
        soft = target.is_floating_point()
        self.target = target.reshape(len(self.x), *(self.each if soft else self.each[1:]))
        counting = self.pieces.places
        self.rows = len(self.x) if counting is None else len(counting)

    def run(
        self, losses: torch.Tensor | None, needs: tuple[bool, ...], grad_output: torch.Tensor | None
    ) -> Tensors:
        """Losses and gradients, each if wanted."""
        step = _step(self.pieces, self.rows, len(self.w), self.x.itemsize)
        grads = _Gradients(self, needs, self.rows <= step)
        counting, places = self.pieces.places, self.places
        each = self.options.reduction == "none" and grad_output is not None
        upstream = (
            grad_output.reshape(len(self.x), places) if each and grad_output is not None else None
        )
        with torch.no_grad():  # all products go into memory that is there, which autocast ignores
            buffer = self.pieces.empty((min(step, self.rows), len(self.w)), self.x.dtype)
            for begin in range(0, self.rows, step):
                end = min(begin + step, self.rows)
                at: Any = slice(begin, end) if counting is None else counting[begin:end]
                x, logits = self.x[at], buffer[: end - begin]
                if self.b is None:
                    torch.mm(x, self.w.t(), out=logits)
                else:
                    torch.addmm(self.b, x, self.w.t(), out=logits)
                self.pieces.run(
                    logits.view(-1, *self.each), self.target[at],
                    None if losses is None else losses[begin * places : end * places],
                    grads.of_logits, grad_output if upstream is None else upstream[at].flatten(),
                    None if grads.target is None else grads.target[begin:end],
                )  # fmt: skip
                grads.add(logits, x, at)
            return grads.finished()

    def reduced(self, losses: torch.Tensor) -> torch.Tensor:
        if self.options.reduction != "none":
            return self.pieces.reduce(losses)
        target, counting = self.tensors[2], self.pieces.places
        assert target is not None
        every = losses.to(self.options.dtype)
        if counting is not None:
            every = every.new_zeros(len(self.x), self.places)
            every[counting] = losses.view(-1, self.places).to(every.dtype)
        return every.view(self.shape)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the positions."""
        input, linear_weight, *_ = self.tensors
        assert input is not None
        assert linear_weight is not None
        return (*input.shape[:-1], *linear_weight.shape[1:-1])


class _Gradients:
    """Those of one call, as its pieces come.

    The weight's and the bias's are added up in float32 at least, and rounded once.

    Attributes:
        of_logits: whether any of them needs that of the logits.
        target: the one of probabilities, None if it isn't wanted.
    """

    def __init__(self, layer: Any, needs: tuple[bool, ...], single: bool) -> None:
        self._layer, self._first = layer, True
        wide = layer.x.dtype if layer.x.itemsize > 2 or single else torch.float32
        empty = layer.pieces.empty
        self._input = self._weight = self._bias = self.target = None
        if needs[0]:
            self._input = empty(tuple(layer.x.shape), layer.x.dtype)
            if layer.pieces.places is not None:
                self._input.zero_()
        if needs[1]:
            self._weight = empty(tuple(layer.w.shape), wide)
        if needs[2]:
            self.target = empty(tuple(layer.target.shape), layer.target.dtype)
        if needs[3]:
            dtype = torch.promote_types(layer.x.dtype, torch.float32)
            self._bias = empty((len(layer.w),), dtype).zero_()
        self.of_logits = needs[0] or needs[1] or needs[3]

    def add(self, logits: torch.Tensor, x: torch.Tensor, at: Any) -> None:
        """One piece's, from the gradient of its logits, its input and its rows' places."""
        if self._input is not None:
            if isinstance(at, slice):
                torch.mm(logits, self._layer.w, out=self._input[at])
            else:
                rows = self._layer.pieces.empty((len(x), x.shape[1]), x.dtype)
                self._input[at] = torch.mm(logits, self._layer.w, out=rows)
        if self._weight is not None:
            _add_product(self._weight, logits, x, self._first)
        if self._bias is not None:
            self._bias += torch.sum(logits, 0, dtype=self._bias.dtype)
        self._first = False

    def finished(self) -> Tensors:
        """As autograd is given them."""
        if self._first and self._weight is not None:  # no row counts
            self._weight.zero_()
        found = (self._input, self._weight, self.target, self._bias, None)
        return tuple(
            [
                g if g is None or t is None else self._as(g, t)
                for g, t in zip(found, self._layer.tensors, strict=True)
            ]
        )

    def _as(self, grad: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        if grad.dtype != like.dtype:
            grad = self._layer.pieces.empty(tuple(grad.shape), like.dtype).copy_(grad)
        return grad.view(like.shape)


class OutcomesOfLayer:
    """What the rows of a layer's logits say (see kernels/outcomes.py), some rows at a time."""

    def __init__(
        self, backend: Any, x: torch.Tensor, w: torch.Tensor, target: torch.Tensor,
        b: torch.Tensor | None,
    ) -> None:  # fmt: skip
        self.x, self.w, self.target, self.b = x, _for_products(w), target, b
        self.tensors = (x, w, target, b, None)
        self._backend, self.pieces = backend, self
        self.places = None
        # There are two such buffers in the backward pass, the other one for gradients.
        self._step = _step(backend.Pieces, len(x), len(w), 2 * x.itemsize)

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        return self.x.new_empty(shape, dtype=dtype)

    def _rows(self) -> Iterator[tuple[slice, torch.Tensor]]:
        """Which ones, and their logits, which the next ones overwrite."""
        step = min(self._step, len(self.x))
        buffer = self.empty((step, len(self.w)), self.x.dtype)
        for begin in range(0, len(self.x), step or 1):
            at = slice(begin, min(begin + step, len(self.x)))
            logits = buffer[: at.stop - begin]
            if self.b is None:
                torch.mm(self.x[at], self.w.t(), out=logits)
            else:
                torch.addmm(self.b, self.x[at], self.w.t(), out=logits)
            yield at, logits

    def forward(self) -> Outcomes:
        wide = torch.promote_types(self.x.dtype, torch.float32)
        found = [self._backend.outcomes(rows, self.target[at]) for at, rows in self._rows()]
        if not found:
            none = self.empty((0,), wide)
            places = none.to(torch.int64)
            return Outcomes(none, none.clone(), none.clone(), places, self.empty((3, 0), wide))
        return Outcomes(*[torch.cat(each, -1) for each in zip(*found, strict=True)])

    def backward(
        self, kept: torch.Tensor, grads: torch.Tensor, needs: tuple[bool, ...]
    ) -> tuple[torch.Tensor | None, ...]:
        found = _Gradients(self, (*needs[:2], False, needs[3]), len(self.x) <= self._step)
        for at, rows in self._rows():
            rows_grad = self._backend.gradient(rows, self.target[at], kept[:, at], grads[:, at])
            found.add(rows_grad, self.x[at], at)
        return found.finished()[:4]


def _add_product(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, first: bool) -> None:
    """total += aᵀ b, or = where it is the first one, without rounding to a half in between."""
    if total.dtype == a.dtype:
        if first:
            torch.mm(a.t(), b, out=total)
        else:
            total.addmm_(a.t(), b)
    elif a.is_cuda:  # there are products in half precision whose result isn't
        options: Any = {"out_dtype": total.dtype, "out": total}
        if first:
            torch.mm(a.t(), b, **options)
        else:
            torch.addmm(total, a.t(), b, **options)
    else:
        b = b.to(total.dtype)
        width = max(_WIDE_BYTES // (len(a) * total.itemsize), 1)
        for begin in range(0, len(total), width):
            part = a[:, begin : begin + width].to(total.dtype)
            _add_product(total[begin : begin + width], part, b, first)


def _for_products(matrix: torch.Tensor) -> torch.Tensor:
    """The matrix, or a copy if each of its products would copy it."""
    return matrix if 1 in matrix.stride() else matrix.contiguous()

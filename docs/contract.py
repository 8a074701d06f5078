"""python docs/contract.py: writes contract.md, by asking the rules about every feature.

Each row is a real call, explained on the CPU; what the rules say of the same call on a GPU
is read off its Request. A test compares the page with what this prints.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.distributed.tensor import DeviceMesh, DTensor, Shard
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours
from fastopt.dispatch import BACKENDS, Decision
from fastopt.front import autograd
from fastopt.front.circumstances import traced

# Sizes and strides of an example say nothing of the reader's call.
EXAMPLES = (
    (r" \(supported: none of these\)", ""),
    (r"input of size \(.*\) and strides .*", "d1, d2, … share no one stride"),
    (r"input of size \(.*\) and layout .*", "a sparse input"),
    (r"sizes \(.*\) and \(.*\) to broadcast", "shapes to broadcast"),
    (r"strides \(.*\) and \(.*\)", "no one dense layout of both"),
    (r": strides \(.*\)", ""),
    (r"a (\w+) of type Subclass", r"a \1 of a tensor subclass"),
)

PAGE = Path(__file__).with_suffix(".md")
DEVICES = {"CPU": ("cpu", None), "GPU": ("cuda", (9, 0))}

HEAD = """\
# The contract

<!-- Written by docs/contract.py (make docs) from the dispatcher's rules: do not edit. -->

What fastopt replaces, it replaces whole: where no kernel serves a call, torch's own code does,
with the same arguments. These tables say which calls those are. "kernel" is the compiled path,
Numba's on a CPU and Triton's on a GPU (compute capability 8.0 or newer); anything else is the
reason why the call is torch's. `fastopt.explain` says the same of a call of yours.
"""

TAIL = """\
## Where fastopt differs from torch, on purpose

Of losses, where a kernel serves; small ones are torch's in every respect:

- **Ignored positions** of a cross-entropy get a gradient of exactly 0 even where their logits are
  NaN or infinite (torch: NaN), because their logits are never read.
- **Class weights that add up to exactly 0** make the mean of a cross-entropy NaN; torch's may be
  infinite.
- **A class index out of range** gives torch's `IndexError` with more words: where it is, and what
  would be right. On a GPU it is a device assert, as torch's.
- **Inputs changed in place** between forward and backward raise torch's "modified by an inplace
  operation" wherever backward has to compute the gradient
  ([when that is](losses.md#what-is-fused)), because the logits themselves are kept; torch keeps a
  copy of their softmax. Elsewhere nothing raises, and the gradient is that of the inputs as they
  were; torch raises for the target. Memory released in between raises likewise.

Of optimizers:

- **foreach=True and fused=True** are met by the one compiled step. They stay in the groups and in
  checkpoints as given.
- **A GradScaler with fused=True** has its scale taken out in the kernel; `p.grad` keeps it.
- **Strided parameters under fused=True** are updated rightly. Torch's fused CPU step writes
  between their elements.
- **Centered RMSprop** takes a variance that rounding has made negative for 0; torch's root of it
  is NaN.
- **An error in one group** stops a step before anything is written, but for what torch's own code
  was to update; torch has updated the groups before it.
- **States and gradients of other dtypes** than the parameter's (float32 states of a bfloat16
  parameter, say) are computed with, where torch refuses some of them.
Of both:

- **Inside torch.compile** a loss and [a step](dispatch.md#a-compiled-training-step) are
  [operators of the graph](dispatch.md#inside-torchcompile). In torch.jit.trace both are torch's own
  code, whatever `use_backend` insists on.
- **Precision**: bfloat16 and float16 are computed in float32 and rounded once, so results are
  closer to the exact ones than torch's ([how close](accuracy.md)) and now and then finite where
  torch's overflow.
"""


class Feature(NamedTuple):
    """A row: what a user would call it, and for each operation a call of that kind."""

    words: str
    ask: Callable[[str], Iterable[Decision]]


# -- losses ------------------------------------------------------------------------------

POINTWISE = ("mse_loss", "l1_loss")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def pointwise(
    view: Callable[[Tensor], Tensor] = lambda x: x,
    target: Callable[[Tensor], Tensor] = torch.ones_like,
    **options: Any,
) -> Callable[[str], Iterable[Decision]]:
    def ask(operation: str) -> Iterable[Decision]:
        x = view(torch.randn(4, 6, 8, 10))
        return fastopt.explain(getattr(ours, operation), x, target(x), **options)

    return ask


def classes(
    view: Callable[[Tensor], Tensor] = lambda x: x,
    target: Callable[[Tensor], Tensor] = lambda x: x.detach().argmax(1),
    **options: Any,
) -> Callable[[str], Iterable[Decision]]:
    return pointwise(view, target, **options)


def within(context: Callable[[], Any]) -> Callable[[str], Iterable[Decision]]:
    """The usual call, made inside a context."""

    def ask(operation: str) -> Iterable[Decision]:
        with context():
            return usual(operation, torch.randn(4, 6))

    return ask


def usual(operation: str, x: Tensor) -> Iterable[Decision]:
    return fastopt.explain(getattr(ours, operation), x, target_of(operation, x))


def target_of(operation: str, x: Tensor) -> Tensor:
    return (
        torch.zeros(x.shape[:-1]).long() if operation == "cross_entropy" else torch.zeros(x.shape)
    )


def transformed(transform: Callable[..., Any]) -> Callable[[str], Iterable[Decision]]:
    def ask(operation: str) -> Iterable[Decision]:
        found: list[Decision] = []

        def function(x: Tensor) -> Tensor:
            found.extend(usual(operation, x))
            return x.sum()

        transform(function)(torch.randn(4, 6))
        return found

    return ask


def channels_last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def matrix(x: Tensor) -> Tensor:
    return x[:, :, 0, 0].contiguous()


class Mode(torch.overrides.TorchFunctionMode):
    """Sees torch's functions and leaves them as they are."""

    def __torch_function__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return function(*args, **(kwargs or {}))


class Subclass(Tensor):
    """Any tensor subclass; for losses DTensor is one, but for classes in shards."""


def dtensor() -> Tensor:
    mesh = DeviceMesh("cpu", [0], _init_backend=False, _rank=0)
    return DTensor.from_local(torch.randn(4, 6), mesh, [Shard(0)], run_check=False)


POINTWISE_FEATURES = [
    *(Feature(str(d), pointwise(lambda x, d=d: x.to(d))) for d in DTYPES),  # type: ignore[misc]
    Feature("float32 with float64", pointwise(target=lambda x: x.double())),
    Feature("bfloat16 with float16", pointwise(lambda x: x.bfloat16(), lambda x: x.half())),
    Feature("float64 with bfloat16", pointwise(lambda x: x.double(), lambda x: x.bfloat16())),
    Feature("an integer target", pointwise(target=lambda x: x.long())),
    Feature("complex (L1 alone has it)", pointwise(lambda x: x + 1j)),
    Feature("reduction mean", pointwise()),
    Feature("reduction sum", pointwise(reduction="sum")),
    Feature("reduction none", pointwise(reduction="none")),
    Feature("a gradient to the target", pointwise(target=lambda x: x.clone().requires_grad_())),
    Feature("an elementwise weight", pointwise(weight=torch.ones(4, 6, 8, 10))),
    Feature("size_average, reduce (deprecated)", pointwise(size_average=False)),
    Feature("shapes to broadcast", pointwise(target=lambda x: x[0])),
    Feature("transposed or permuted, both alike", pointwise(lambda x: x.permute(2, 0, 3, 1))),
    Feature("channels_last, both", pointwise(channels_last)),
    Feature("of two layouts", pointwise(target=channels_last)),
    Feature("with gaps", pointwise(lambda x: x[..., ::2])),
    Feature("no elements", pointwise(lambda x: x[:0])),
]

CLASS_FEATURES = [
    *(Feature(str(d), classes(lambda x, d=d: x.to(d))) for d in DTYPES),  # type: ignore[misc]
    Feature("reduction mean", classes()),
    Feature("reduction sum", classes(reduction="sum")),
    Feature("reduction none", classes(reduction="none")),
    Feature("ignore_index", classes(ignore_index=3)),
    Feature("class weights", classes(weight=torch.ones(6))),
    Feature("a gradient to the weights", classes(weight=torch.ones(6, requires_grad=True))),
    Feature("label_smoothing", classes(label_smoothing=0.1)),
    Feature("uint8 targets", classes(matrix, lambda x: x.argmax(1).to(torch.uint8))),
    Feature("size_average, reduce (deprecated)", classes(size_average=False)),
    Feature("(C,)", classes(lambda x: x[0, :, 0, 0], lambda x: x.argmax(0))),
    Feature("(N, C)", classes(matrix)),
    Feature("(N, C, d1, d2, …)", classes()),
    Feature("channels_last", classes(channels_last)),
    Feature("(N, L, C) transposed", classes(lambda x: x[..., 0].mT)),
    Feature("classes or rows with gaps", classes(lambda x: x[::2, ::2, 0, 0])),
    Feature("rows expanded", classes(lambda x: x[:1, :, 0, 0].expand(4, 6))),
    Feature("d1, d2, … without a common stride", classes(lambda x: x.mT)),
    Feature("no rows", classes(lambda x: x[:0])),
    Feature("probabilities", classes(matrix, lambda x: x.softmax(1))),
    Feature(
        "probabilities of another dtype",
        classes(matrix, lambda x: x.double().softmax(1)),
    ),
    Feature(
        "a gradient to the probabilities",
        classes(matrix, lambda x: x.softmax(1).requires_grad_()),
    ),
    Feature("probabilities (N, C, d1, …)", classes(target=lambda x: x.softmax(1))),
]

CIRCUMSTANCES = [
    Feature("torch.autocast", within(lambda: torch.autocast("cpu", torch.bfloat16))),
    Feature("torch.no_grad", within(torch.no_grad)),
    Feature("torch.inference_mode", within(torch.inference_mode)),
    Feature("a default device", within(lambda: torch.device("cpu"))),
    Feature("torch.func.grad, vjp, jacrev", transformed(torch.func.grad)),
    Feature("torch.func.vmap", transformed(torch.func.vmap)),
    Feature("forward-mode differentiation, torch.func.jvp", within(forward_ad.dual_level)),
    Feature(
        "inside torch.compile and torch.export, as an operator",
        within(traced),
    ),
    Feature("a __torch_function__ mode", within(Mode)),
    Feature("a tensor subclass", lambda op: usual(op, torch.randn(4, 6).as_subclass(Subclass))),
    Feature("a sparse input", lambda op: usual(op, torch.randn(4, 6).to_sparse())),
]


# -- derivatives -------------------------------------------------------------------------


class Derivative(NamedTuple):
    """A row that is seen, not asked: whether a backward pass takes torch's derivatives."""

    words: str
    run: Callable[[Tensor, Tensor], Any]


def again(loss: Tensor, x: Tensor) -> None:
    for _ in range(2):
        torch.autograd.grad(loss, x, retain_graph=True)


DERIVATIVES = [
    Derivative("loss.backward()", lambda loss, x: torch.autograd.grad(loss, x)),
    Derivative("any grad_output", lambda loss, x: torch.autograd.grad(0.37 * loss, x)),
    Derivative("backward twice (retain_graph)", again),
    Derivative(
        "second derivatives (create_graph)",
        lambda loss, x: torch.autograd.grad(loss, x, create_graph=True),
    ),
    Derivative(
        "several grad_outputs at once (is_grads_batched)",
        lambda loss, x: torch.autograd.grad(loss, x, torch.ones(3), is_grads_batched=True),
    ),
]


def how(derivative: Derivative, operation: str) -> str:
    x = torch.randn(4, 6, requires_grad=True)
    with fastopt.use_backend("numba"):
        loss = getattr(ours, operation)(x, target_of(operation, x))
    with mock.patch.object(autograd, "reference_grads", wraps=autograd.reference_grads) as seen:
        derivative.run(loss, x)
    return "torch's derivative of the same function" if seen.called else "kernel"


# -- optimizers --------------------------------------------------------------------------


def parameter(
    make: Callable[[], Tensor] = lambda: torch.randn(4, 6),
    grad: Callable[[Tensor], Tensor] = torch.ones_like,
    **options: Any,
) -> Callable[[str], Iterable[Decision]]:
    def ask(operation: str) -> Iterable[Decision]:
        data = make()
        param = data if isinstance(data, Parameter) else Parameter(data)
        param.grad = grad(param.detach())
        kept = {k: v for k, v in options.items() if k in DEFAULTS[operation]}
        if options and not kept:
            return ()
        return fastopt.explain(getattr(fastopt.optim, operation)([param], **kept))

    return ask


def float32_gradient() -> Parameter:
    param = Parameter(torch.randn(4, 6).bfloat16())
    param.grad_dtype = torch.float32  # type: ignore[attr-defined]
    return param


def tied(operation: str) -> Iterable[Decision]:
    memory = torch.randn(10, 1)
    params = [Parameter(memory[:6]), Parameter(memory[4:])]
    return fastopt.explain(getattr(fastopt.optim, operation)(params))


DEFAULTS = {
    name: kind([torch.zeros(1, 1)]).defaults
    for name, kind in fastopt.optim._operations.OPTIMIZERS.items()
}

OPTIMIZER_FEATURES = [
    *(Feature(str(d), parameter(lambda d=d: torch.randn(4, 6).to(d))) for d in DTYPES),  # type: ignore[misc]
    Feature("bfloat16 with a float32 gradient", parameter(float32_gradient, lambda p: p.float())),
    Feature("complex", parameter(lambda: torch.randn(4, 6) + 1j)),
    Feature("a sparse gradient", parameter(grad=lambda p: p.to_sparse())),
    Feature("weight_decay", parameter(weight_decay=0.1)),
    Feature("maximize", parameter(maximize=True)),
    Feature("momentum, dampening", parameter(momentum=0.9, dampening=0.1)),
    Feature("nesterov", lambda op: parameter(momentum=0.9, nesterov=True)(op)
            if op == "SGD" else ()),
    Feature("amsgrad", parameter(amsgrad=True)),
    Feature("centered", parameter(centered=True)),
    Feature("lr as a tensor", parameter(lr=torch.tensor(0.1))),
    Feature("foreach=True", parameter(foreach=True)),
    Feature("fused=True", parameter(fused=True)),
    Feature("differentiable=True", parameter(differentiable=True)),
    Feature("capturable=True", parameter(capturable=True)),
    Feature("any dense layout, say transposed", parameter(lambda: torch.ones(4, 6).t())),
    Feature("gaps or overlaps", parameter(lambda: torch.randn(4, 6)[:, ::2])),
    Feature("a gradient of another layout", parameter(grad=lambda p: torch.ones(6, 4).t())),
    Feature("parameters that share memory", tied),
    Feature("no elements", parameter(lambda: torch.randn(0, 3))),
    Feature("DTensors (FSDP2), gradients cut alike", parameter(dtensor)),
    Feature("DTensors, gradients cut otherwise",
            parameter(dtensor, grad=lambda p: torch.ones(p.shape))),
    Feature("any other tensor subclass",
            parameter(lambda: torch.randn(4, 6).as_subclass(Subclass))),
]  # fmt: skip


# -- the page ----------------------------------------------------------------------------


def verdict(decision: Decision, device: str) -> str:
    kind, capability = DEVICES[device]
    request = decision.request._replace(
        device=kind,
        capability=capability,
        crossover=0,
        special=tuple(
            words for words in decision.request.special if device == "CPU" or "CPU" not in words
        ),
    )
    backend = BACKENDS["numba" if device == "CPU" else "triton"]
    reasons = "; ".join(backend.refusals(request))
    for pattern, words in EXAMPLES:
        reasons = re.sub(pattern, words, reasons)
    return f"torch: {reasons}" if reasons else "kernel"


def table(features: Iterable[Feature], operations: tuple[str, ...]) -> list[str]:
    lines = [f"| | {' | '.join(DEVICES)} |", f"| --- {'| --- ' * len(DEVICES)}|"]
    for feature in features:
        cells: list[str] = []
        for device in DEVICES:
            found: dict[str, list[str]] = {}
            for operation in operations:
                for decision in feature.ask(operation):
                    found.setdefault(verdict(decision, device), []).append(operation)
            words = "; ".join(f"{', '.join(names)}: {v}" for v, names in found.items())
            cell = next(iter(found)) if len(found) == 1 else words
            cells.append("the same" if [cell] == cells and cell != "kernel" else cell)
        lines.append(f"| {feature.words} | {' | '.join(cells)} |")
    return lines


#: The optimizers that don't take all that the others take.
APART = ("Adafactor", "SparseAdam", "LBFGS")


def apart(name: str, device: str) -> str:
    """Of a contiguous parameter and a gradient of its dtype."""
    place = "cpu" if device == "CPU" else "meta"
    optimizer = getattr(fastopt.optim, name)([Parameter(torch.zeros(4, 6, device=place))])
    (decision,) = fastopt.explain(optimizer)
    return verdict(decision, device)


def page() -> str:
    every = (*POINTWISE, "cross_entropy")
    sections = {
        "Mean squared and mean absolute error": table(POINTWISE_FEATURES, POINTWISE),
        "Cross-entropy": table(CLASS_FEATURES, ("cross_entropy",)),
        "Around a loss": table(CIRCUMSTANCES, every),
        "Derivatives of a loss that a kernel has computed": [
            "| | any device |",
            "| --- | --- |",
            *(f"| {d.words} | {', '.join({how(d, op): 0 for op in every})} |" for d in DERIVATIVES),
        ],
        "Optimizers": table(
            OPTIMIZER_FEATURES,
            tuple(n for n in fastopt.optim._operations.OPTIMIZERS if n not in APART),
        ),
        "Optimizers for CPUs, or without kernels": [
            "| | CPU | GPU |",
            "| --- | --- | --- |",
            *(f"| {name} | {apart(name, 'CPU')} | {apart(name, 'GPU')} |" for name in APART),
        ],
    }
    tables = "\n".join(
        "\n".join([f"## {title}", "", *rows, ""]) for title, rows in sections.items()
    )
    return f"{HEAD}\n{tables}\n{TAIL}"


if __name__ == "__main__":
    PAGE.write_text(page())
    print(PAGE)

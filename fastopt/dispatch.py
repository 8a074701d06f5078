"""Which backend runs a call, and why not each other one: data, not control flow.

A :class:`Request` summarises a call without its tensors. Each :class:`Backend` is an
ordered list of :class:`Rule`; one that refuses gives its reason, with the actual and the
supported values. :func:`choose` walks the registry in order of priority and remembers
its decision, so that the hot path is one dictionary look-up, and so that the GPU's
rules can be tested on a machine without a GPU.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from types import ModuleType
from typing import NamedTuple

import torch
from torch.compiler import is_dynamo_compiling

from .errors import BackendUnavailable
from .kernels.operation import NEVER

__all__ = ["BACKENDS", "Backend", "Decision", "Request", "Rule", "choose", "load", "use_backend"]


class Request(NamedTuple):
    """One call, without its tensors.

    Attributes:
        operation: the public function's or class's name in torch, e.g. "cross_entropy".
        device: device type, e.g. "cpu".
        dtypes: of the tensors, in the order of the operation's arguments; for an optimizer
            of the parameter, the gradient and the states.
        numel: elements to process; for an optimizer those of all tensors together.
        special: what makes this call one that only torch itself serves, as words for the
            reader; empty for the usual call.
        capability: compute capability (major, minor) of a CUDA device, else None.
        insisted: the backend named in use_backend, else None.
        crossover: elements from which a loss is worth compiled code on the device.
        label: which of the dtypes is that of class indices, as its place; None if none is.
    """

    operation: str
    device: str
    dtypes: tuple[torch.dtype, ...]
    numel: int
    special: tuple[str, ...] = ()
    capability: tuple[int, int] | None = None
    insisted: str | None = None
    crossover: int = 0
    label: int | None = None

    def numbers(self) -> tuple[torch.dtype, ...]:
        """The dtypes of what is computed with: all but that of class indices."""
        return tuple(d for k, d in enumerate(self.dtypes) if k != self.label)


class Rule(NamedTuple):
    """A condition for a backend to serve a request.

    Attributes:
        holds: whether it is met.
        reason: why not, in one sentence with the actual and the supported values.
        advisory: a matter of speed, set aside when the backend is insisted on.
    """

    holds: Callable[[Request], bool]
    reason: Callable[[Request], str]
    advisory: bool = False


class Backend(NamedTuple):
    """A way to compute: its name, the module with its launchers, its rules.

    Attributes:
        variants: whether the module says how it runs a call, with `describe` for a loss and
            `describe_step` for an optimizer's bucket.
    """

    name: str
    module: str
    rules: tuple[Rule, ...]
    variants: bool = False

    def refusals(self, request: Request) -> tuple[str, ...]:
        """Every reason why this backend can't (or, unless insisted on, shouldn't) serve."""
        return tuple(
            rule.reason(request)
            for rule in self.rules
            if not (rule.advisory and request.insisted == self.name) and not rule.holds(request)
        )


class Decision(NamedTuple):
    """The outcome for one request; ``str`` of it is what :func:`fastopt.explain` prints.

    Attributes:
        request: what was asked.
        backend: the one that serves it.
        refusals: for every other backend its reasons.
        variant: how the backend runs the call, where it has several ways and was asked.
    """

    request: Request
    backend: str
    refusals: Mapping[str, tuple[str, ...]]
    variant: str = ""

    @property
    def insisted(self) -> str | None:
        """The backend named in use_backend, if any."""
        return self.request.insisted

    def __str__(self) -> str:
        r = self.request
        dtypes = ", ".join(map(_name, r.dtypes))
        head = f"{r.operation} on {r.device}, {dtypes}, {r.numel:,} elements: {self.backend}"
        if r.insisted:
            head += " (insisted on with use_backend)"
        lines = [head]
        if self.variant:
            lines.append(f"  {self.backend}: {self.variant}")
        for name, reasons in self.refusals.items():
            lines += [f"  not {name}: {reason}" for reason in reasons]
        return "\n".join(lines)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _names(values: Iterable[object]) -> str:
    words = {_name(v) if isinstance(v, torch.dtype) else str(v) for v in values}
    return ", ".join(sorted(words)) or "none"


# -- the rules' building blocks ------------------------------------------------------

_FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
_HALVES = frozenset({torch.bfloat16, torch.float16})
_LABELS = frozenset({torch.int64, torch.uint8})


def _installed(module: str) -> Rule:
    return Rule(
        lambda r: _found(module),
        lambda r: f"the package {module} is not installed (pip install {module})",
    )


@functools.cache
def _found(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def _one_of(what: Callable[[Request], str], supported: frozenset[str], label: str) -> Rule:
    return Rule(
        lambda r: what(r) in supported,
        lambda r: f"{label}={what(r)} (supported: {_names(supported)})",
    )


_COMMON = (
    Rule(
        lambda r: not r.special,
        lambda r: f"{'; '.join(r.special)} (supported: none of these)",
    ),
    Rule(
        lambda r: _FLOATS.issuperset(r.numbers()),
        lambda r: f"dtypes={_names(r.numbers())} (supported: {_names(_FLOATS)})",
    ),
    Rule(
        lambda r: r.label is None or r.dtypes[r.label] in _LABELS,
        lambda r: (
            f"class indices of {_name(r.dtypes[r.label or 0])} (supported: {_names(_LABELS)})"
        ),
    ),
    Rule(
        lambda r: not (torch.float64 in r.dtypes and _HALVES & set(r.dtypes)),
        lambda r: f"dtypes={_names(r.dtypes)} (supported: float64 with float64 and float32 only)",
    ),
)


_PAYS = Rule(
    lambda r: r.numel >= r.crossover,
    lambda r: (
        (
            "torch's own code is at least as fast at any size"
            if r.crossover >= NEVER
            else f"{r.numel} elements, fewer than the {r.crossover} from which compiled code "
            "pays off"
        )
        + ("" if r.device == "cpu" else " (derived, not measured)")
    ),
    advisory=True,
)


# -- the numba backend: CPU ----------------------------------------------------------


@functools.cache
def _jit_enabled() -> bool:
    from numba.core import config

    return not config.DISABLE_JIT


def _converts_float16() -> bool:
    """Whether the CPU that numba compiles for converts half precision by itself."""
    from .kernels.numba import target

    return target.converts_float16()


def _target_cpu() -> str:
    from .kernels.numba import target

    return target.cpu_name()


_NUMBA = Backend(
    "numba",
    "fastopt.kernels.numba",
    (
        _one_of(lambda r: r.device, frozenset({"cpu"}), "device"),
        *_COMMON,
        _installed("numba"),
        Rule(
            lambda r: not _found("numba") or _jit_enabled(),
            lambda r: "NUMBA_DISABLE_JIT is set (supported: unset)",
        ),
        Rule(
            lambda r: (
                not (torch.float16 in r.dtypes and r.device == "cpu")
                or not (_found("numba") and _jit_enabled())
                or _converts_float16()
            ),
            lambda r: f"float16 on a CPU without instructions that convert it ({_target_cpu()})",
        ),
        _PAYS,
    ),
)


# -- the triton backend: GPU ---------------------------------------------------------

_ACCELERATORS = ("cuda", "xpu")
_MINIMUM_CAPABILITY = (8, 0)
_MINIMUM_TRITON = (3, 6)


@functools.cache
def _triton_version() -> tuple[int, ...]:
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2])


@functools.cache
def _interpreted() -> bool:
    """Whether Triton's kernels run in its interpreter, on CPU tensors."""
    if not _found("triton") or _triton_version() < _MINIMUM_TRITON:  # which may have no knobs
        return False
    from triton import knobs

    return bool(knobs.runtime.interpret)


def _wants_interpreter(r: Request) -> bool:
    # It is for tests: only who insists on it gets it, and only then is triton imported.
    return r.device == "cpu" and r.insisted == "triton"


_TRITON = Backend(
    "triton",
    "fastopt.kernels.triton",
    (
        Rule(
            lambda r: r.device in _ACCELERATORS or (_wants_interpreter(r) and _interpreted()),
            lambda r: (
                f"device={r.device} (supported: {', '.join(_ACCELERATORS)})"
                + (", or with TRITON_INTERPRET=1 if insisted on" if r.device == "cpu" else "")
            ),
        ),
        *_COMMON,
        _installed("triton"),
        Rule(
            lambda r: (
                not (r.device in _ACCELERATORS or _wants_interpreter(r))
                or not _found("triton")
                or _triton_version() >= _MINIMUM_TRITON
            ),
            lambda r: f"triton {_triton_version()} (supported: {_MINIMUM_TRITON} and newer)",
        ),
        Rule(
            lambda r: r.capability is None or r.capability >= _MINIMUM_CAPABILITY,
            lambda r: (
                f"compute capability {r.capability} (supported: {_MINIMUM_CAPABILITY} and newer)"
            ),
        ),
        _PAYS,
    ),
    variants=True,
)

_REFERENCE = Backend("reference", "fastopt.kernels.reference", ())

#: The registry, in order of priority. The reference serves everything.
BACKENDS: dict[str, Backend] = {b.name: b for b in (_TRITON, _NUMBA, _REFERENCE)}


@functools.lru_cache(maxsize=4096)
def choose(request: Request) -> Decision:
    """The backend for a request.

    Raises:
        BackendUnavailable: the backend insisted on can't serve it.
    """
    refusals: dict[str, tuple[str, ...]] = {}
    chosen = None
    for name, backend in BACKENDS.items():
        reasons = backend.refusals(request)
        if request.insisted not in (None, name):
            reasons = (*reasons, f"use_backend({request.insisted!r}) insists on another")
        if not reasons and chosen is None:
            chosen = name
        elif reasons:
            refusals[name] = reasons
    if chosen is None:
        raise BackendUnavailable(Decision(request, "none", refusals))
    return Decision(request, chosen, refusals)


def describe(decision: Decision, function: str, *arguments: object) -> Decision:
    """The decision with its variant, by the backend's function of that name."""
    if not BACKENDS[decision.backend].variants:
        return decision
    words = getattr(load(decision.backend), function)(*arguments)
    return decision._replace(variant=words)


@functools.cache
def load(name: str) -> ModuleType:
    """The module of a backend, imported on first use."""
    return importlib.import_module(BACKENDS[name].module)


_insisted: ContextVar[str | None] = ContextVar("fastopt_backend", default=None)
insisted = _insisted.get


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Insist on one backend for every call inside the ``with`` block.

    What counts is where the call is made; for an optimizer that is ``step``, and the
    backward pass of a loss keeps the backend of its forward pass. Concerns the current
    thread and the tasks it starts; a function of torch.compile is compiled anew inside, and takes
    no notice of whose thread it was.

    Args:
        name: "triton", "numba" or "reference".

    Raises:
        ValueError: no such backend.
        BackendUnavailable: (in the calls) the backend can't serve one; nothing has been
            written. Its message holds every reason.

    Example:
        >>> with fastopt.use_backend("reference"):
        ...     loss = fastopt.nn.functional.mse_loss(input, target)
    """
    if name not in BACKENDS:
        raise ValueError(f"no backend {name!r} (available: {', '.join(BACKENDS)})")
    # A graph of torch.compile is guarded by what is in a list, and by no context variable.
    _blocks.append(name)
    token = None if is_dynamo_compiling() else _insisted.set(name)
    try:
        yield
    finally:
        _blocks.remove(name)
        if token is not None:
            _insisted.reset(token)


_blocks: list[str] = []


def insisted_while_tracing() -> str | None:
    """The backend of the innermost use_backend, of any thread, for a program that is traced."""
    return _blocks[-1] if _blocks else None

"""The samples that torch tests its own losses with, through fastopt's functions.

Torch's table of operators is the table here, too: a loss that fastopt gains is tested as soon as
its file is there. Torch's samples are small, so the sizes below which torch itself serves are set
aside; then what isn't compiled has to have one of the REASONS.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from cases import BACKEND, DEVICE, INTERPRETED, any_size_counts, assert_as_accurate, level
from torch import Tensor
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_utils import noncontiguous_like

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.call import RECORDS
from fastopt.kernels.operation import Elementwise, Loss, Softmax

#: Torch's rows, of losses by element and cross-entropy (those of the others are in test_rows,
#: test_nll and test_torch_only); of one that is there several times, the first is the plain one.
OPS: dict[str, Any] = {}
for _op in op_db:
    _name = _op.name.rpartition(".")[2]
    if _op.name == f"nn.functional.{_name}" and issubclass(
        RECORDS.get(_name, object), Elementwise | Softmax
    ):
        OPS.setdefault(_name, _op)
EACH_OPERATION = pytest.mark.parametrize("operation", OPS)
#: The losses whose samples are all taken in the longer tests; of the others every fourth.
OLDEST = ("cross_entropy", "l1_loss", "mse_loss")
#: More samples than this are thinned, evenly, to about as many.
ENOUGH = 6 if INTERPRETED else 12

pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a target size"),
    pytest.mark.filterwarnings("ignore:reduction. .mean. divides"),
    pytest.mark.filterwarnings("ignore:There is a performance drop"),  # without a batching rule
    pytest.mark.filterwarnings("ignore:An output with one or more elements was resized"),
]


@pytest.fixture(autouse=True)
def any_size() -> Iterator[None]:
    """Sizes below which torch is faster count for nothing, in calls that name their arguments."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # which would wait for each other longer than these sizes take
    with any_size_counts():
        yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Call:
    """A call of a loss by names of arguments; `wanted` are the tensors with a gradient."""

    operation: str
    tensors: dict[str, Tensor]
    options: dict[str, Any]

    def __call__(self, module: Any, **replaced: Any) -> Tensor:
        arguments = {**self.tensors, **self.options, **replaced}
        result: Tensor = getattr(module, self.operation)(**arguments)
        return result

    @property
    def wanted(self) -> dict[str, Tensor]:
        return {name: t for name, t in self.tensors.items() if t.requires_grad}

    @property
    def soft(self) -> bool:
        """Whether it is a cross-entropy with class probabilities."""
        return self.operation == "cross_entropy" and self.tensors["target"].is_floating_point()

    def of(self, change: Callable[[str, Tensor], Tensor]) -> Call:
        """The same call of other tensors."""
        return replace(self, tensors={name: change(name, t) for name, t in self.tensors.items()})

    def with_gradients(self, *names: str) -> Call:
        return self.of(lambda name, t: t.detach().requires_grad_(name in names))


def samples(operation: str, dtype: torch.dtype) -> list[Call]:
    """All, but for class weights that happen to add up to 0, of which each rounding differs.

    A tensor that the operation has no derivative by gets no gradient.
    """
    found, record = [], RECORDS[operation]
    names = list(inspect.signature(getattr(theirs, operation)).parameters)
    followed = dtype.is_floating_point or dtype.is_complex
    constants = getattr(record, "constants", ())
    for s in OPS[operation].reference_inputs(DEVICE, dtype, requires_grad=followed):
        given = {**dict(zip(names, (s.input, *s.args), strict=False)), **s.kwargs}
        tensors = {k: v for k, v in given.items() if isinstance(v, Tensor)}
        for name in constants:
            tensors[name] = tensors[name].detach()
        if operation == "hinge_embedding_loss":
            # Of others than 1 and -1 the loss is a sum of two that cancel.
            tensors["target"] = torch.where(tensors["target"] > 0, 1, -1).to(dtype)
        options = {k: v for k, v in given.items() if k not in tensors}
        weight, target = tensors.get("weight"), tensors.get("target")
        labels = target is not None and not (target.is_floating_point() or target.is_complex())
        if weight is None or not labels or weight[target].double().sum() != 0:
            found.append(Call(operation, tensors, options))
    enough = 5 * ENOUGH if operation in OLDEST else ENOUGH
    return found[:: max(1, len(found) // enough)]


def thinned(calls: list[Call]) -> list[Call]:
    """Every third of many that the interpreter takes long for."""
    return calls[::3] if INTERPRETED and len(calls) > 10 else calls


def compilable(operation: str, dtype: torch.dtype) -> list[Call]:
    """The samples that a compiled backend serves, if only their inputs need gradients."""
    return [c for c in samples(operation, dtype) if not expected_reasons(c)]


# -- why a call may be torch's own ------------------------------------------------------


def walkable(x: Tensor) -> bool:
    """Whether all that comes after the classes can be seen as one dimension."""
    try:
        return x.dim() < 2 or x.view(*x.shape[:2], -1) is not None
    except RuntimeError:
        return False


def softmax(call: Call) -> bool:
    return issubclass(RECORDS[call.operation], Softmax)


#: A part of the reason that explain gives, and when it has to be given.
REASONS: dict[str, Callable[[Call], bool]] = {
    "dtypes=complex": lambda c: any(t.is_complex() for t in c.tensors.values()),
    "operands of different dtypes": lambda c: (
        issubclass(RECORDS[c.operation], Loss)
        and RECORDS[c.operation].same_dtypes  # type: ignore[attr-defined]
        and len({t.dtype for t in c.tensors.values()}) > 1
    ),
    " of dtype torch.": lambda c: any(
        issubclass(RECORDS[c.operation], Loss)
        and not (t.is_floating_point() or t.is_complex())
        and name not in RECORDS[c.operation].integers  # type: ignore[attr-defined]
        for name, t in c.tensors.items()
    ),
    "a lazily negated tensor": lambda c: any(t.is_neg() for t in c.tensors.values()),
    " and strides ": lambda c: softmax(c) and not walkable(c.tensors["input"]),
}


def expected_reasons(call: Call) -> list[str]:
    return [reason for reason, holds in REASONS.items() if holds(call)]


def outcome(module: Any, call: Call, upstream: Tensor | None = None) -> tuple[Tensor, ...]:
    """The loss and its gradients."""
    loss = call(module)
    wanted = list(call.wanted.values())
    if not wanted:
        return (loss,)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return loss.detach(), *torch.autograd.grad(loss, wanted, upstream)


def in_double(call: Call) -> Call:
    def change(name: str, t: Tensor) -> Tensor:
        t = t.detach().resolve_neg()  # to() keeps the bit
        double = t.double() if t.is_floating_point() else t
        return double.requires_grad_(call.tensors[name].requires_grad)

    return call.of(change)


def check(call: Call) -> None:
    """Compiled and as accurate as torch, or for good reasons exactly torch."""
    reasons = expected_reasons(call)
    plain = call(theirs)
    upstream = torch.randn(plain.shape).to(plain.dtype)
    torchs = outcome(theirs, call, upstream)
    automatic = outcome(ours, call, upstream)
    if reasons:
        with pytest.raises(fastopt.BackendUnavailable) as caught, fastopt.use_backend(BACKEND):
            call(ours)
        decision = caught.value.decision
        for reason in reasons:
            assert any(reason in said for said in decision.refusals[BACKEND])
        for special in decision.request.special:
            assert any(reason in special for reason in reasons)
        assert_same(automatic, torchs)
        return
    (decision,) = fastopt.explain(getattr(ours, call.operation), **call.tensors, **call.options)
    assert decision.backend == BACKEND
    with fastopt.use_backend(BACKEND):
        insisted = outcome(ours, call, upstream)
    doubles = in_double(call)
    even = doubles.of(lambda name, t: level(call.operation, (t,))[0] if name == "input" else t)
    exact, terms = (outcome(theirs, of, upstream.double()) for of in (doubles, even))
    if plain.dim() == 0 and plain.numel():  # a sum of numbers of these sizes, which may cancel
        single = replace(doubles, options={**doubles.options, "reduction": "none"})(theirs)
        terms = (single.detach().abs().max() if single.numel() else exact[0], *terms[1:])
    for found in (automatic, insisted):
        for one in zip(found, torchs, exact, terms, strict=True):
            assert_as_accurate(*one)


def assert_same(found: Any, expected: Any) -> None:
    """To the last bit, dtypes and shapes included."""
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


# -- values and gradients ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [(name, dtype) for name, op in OPS.items() for dtype in sorted(op.dtypes, key=str)],
    ids=str,
)
def test_sample(operation: str, dtype: torch.dtype, poison: None) -> None:
    """With gradients to all that has one; in float32 also to each subset.

    Every sample in float32, and in one of the other dtypes.
    """
    calls, others = samples(operation, dtype), (torch.float64, torch.bfloat16, torch.float16)
    if dtype in others and len(calls) > 3:
        calls = calls[others.index(dtype) :: 3]
    for number, call in enumerate(calls):
        names = list(call.wanted)
        subsets: list[tuple[str, ...]] = [tuple(names)]
        if dtype == torch.float32 and number < 2:
            subsets += [s for n in range(len(names)) for s in itertools.combinations(names, n)]
        for subset in subsets:
            check(call.with_gradients(*subset))


def test_complex_with_real() -> None:
    """Torch's table has these two samples for complex dtypes alone."""
    calls = [c for c in samples("l1_loss", torch.complex64) if not same_dtypes(c)]
    assert len(calls) == 2
    for call in calls:
        check(call)


def same_dtypes(call: Call) -> bool:
    return len({t.dtype for t in call.tensors.values()}) == 1


def permuted(t: Tensor) -> Tensor:
    return t.detach().mT.contiguous().mT if t.dim() > 1 else t.detach()


def expanded(t: Tensor, axis: int) -> Tensor:
    if t.dim() <= axis:
        return t.detach()
    return t.detach().narrow(axis, 0, 1).clone().expand_as(t)


VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "noncontiguous": noncontiguous_like,  # NaN in the gaps
    "permuted": permuted,
    "expanded": lambda t: expanded(t, 0),
    "classes-expanded": lambda t: expanded(t, 1),
    "negated": lambda t: torch._neg_view(-t.detach()) if t.is_floating_point() else t,
    "non-leaf": lambda t: t.clone(),
}


@pytest.mark.parametrize("view", VIEWS)
@EACH_OPERATION
def test_view_of_each_argument(operation: str, view: str, poison: None) -> None:
    for call in samples(operation, torch.float32)[:: 1 + 3 * (operation not in OLDEST)]:
        for names in [*([name] for name in call.tensors), list(call.tensors)]:

            def seen(name: str, t: Tensor, names: list[str] = names) -> Tensor:
                found = VIEWS[view](t) if name in names else t
                return found if found.requires_grad else found.requires_grad_(t.requires_grad)

            check(call.of(seen))


@EACH_OPERATION
def test_error_samples(operation: str) -> None:
    op, said = OPS[operation], []
    for bad in op.error_inputs(DEVICE) if op.error_inputs_func else ():
        sample = bad.sample_input
        for module in (theirs, ours):
            raised = pytest.raises(bad.error_type, match=bad.error_regex)
            with fastopt.use_backend(BACKEND), raised as caught:
                getattr(module, operation)(sample.input, *sample.args, **sample.kwargs)
            said.append((type(caught.value), str(caught.value)))
    assert said[::2] == said[1::2]


# -- derivatives of any order ------------------------------------------------------------


@EACH_OPERATION
def test_numerical_derivatives(operation: str) -> None:
    op = OPS[operation]
    calls = [c for c in thinned(samples(operation, torch.float64)) if call_is_finite(c)]
    for number, call in enumerate(calls):
        served = call

        def loss(*wanted: Tensor, call: Call = call) -> Tensor:
            return call(ours, **dict(zip(call.wanted, wanted, strict=True)))

        def served_loss(*wanted: Tensor, call: Call = served) -> Tensor:
            with fastopt.use_backend(BACKEND):
                return call(ours, **dict(zip(call.wanted, wanted, strict=True)))

        fast = number > 0  # one sample in every entry of its Jacobian
        wanted = tuple(served.wanted.values())
        if not expected_reasons(served):
            for test in (torch.autograd.gradcheck, torch.autograd.gradgradcheck):
                assert test(served_loss, wanted, check_batched_grad=True, fast_mode=fast)
        wanted = tuple(call.wanted.values())
        # Torch's own forward derivative of that one by the target is NaN at some places.
        forward = op.supports_forward_ad and operation != "margin_ranking_loss"
        assert torch.autograd.gradcheck(
            loss, wanted, check_forward_ad=forward, check_batched_forward_grad=forward,
            fast_mode=fast,
        )  # fmt: skip
        # Of undefined tangents torch's own mse_loss raises something.
        assert torch.autograd.gradgradcheck(
            loss, wanted, check_fwd_over_rev=op.supports_fwgrad_bwgrad,
            check_undefined_grad=False, fast_mode=fast,
        )  # fmt: skip


def call_is_finite(call: Call) -> bool:
    """Whether there are numbers to differentiate, of numbers."""
    finite = all(t.isfinite().all() for t in call.tensors.values())
    return finite and bool(call(theirs).isfinite().all())


def _sum(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *tensors: function(*tensors).sum()


def _dual(f: Callable[..., Tensor], x: tuple[Tensor, ...], all_of: tuple[int, ...]) -> Any:
    with forward_ad.dual_level():
        duals = [forward_ad.make_dual(t, t.cos()) if k in all_of else t for k, t in enumerate(x)]
        return tuple(forward_ad.unpack_dual(f(*duals)))


def _over_wanted(
    transform: Callable[..., Any],
) -> Callable[[Callable[..., Tensor], tuple[Tensor, ...], tuple[int, ...]], Any]:
    """A transform of a function of the differentiable arguments, by their numbers."""

    def apply(f: Callable[..., Tensor], x: tuple[Tensor, ...], wanted: tuple[int, ...]) -> Any:
        def partial(*some: Tensor) -> Tensor:
            given = dict(zip(wanted, some, strict=True))
            return f(*(given.get(k, t) for k, t in enumerate(x)))

        return transform(partial, tuple(x[k] for k in wanted))

    return apply


def _tangents(x: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return tuple(t.cos() for t in x)


def _batches(x: tuple[Tensor, ...], dim: int = 0) -> tuple[Tensor, ...]:
    """Three of each, differing if they are floats."""
    return tuple(
        torch.stack([t, t.sin() + 1.5, t.cos() + 1.5] if t.is_floating_point() else [t] * 3, dim)
        for t in x
    )


def _vmap(f: Callable[..., Any], x: tuple[Tensor, ...], dim: int = 0, only: int = -1) -> Any:
    """Over all tensors, or one of them."""
    batches = _batches(x, dim)
    some = tuple(b if only in (-1, k) else x[k] for k, b in enumerate(batches))
    dims = tuple(dim if only in (-1, k) else None for k in range(len(x)))
    return torch.func.vmap(f, dims)(*some)


#: Of f, its tensors, and the numbers of those that have a derivative.
TRANSFORMS: dict[str, Callable[..., Any]] = {
    "grad": lambda f, x, w: torch.func.grad(_sum(f), w)(*x),
    "grad-and-value": lambda f, x, w: torch.func.grad_and_value(_sum(f), w)(*x),
    "jacrev": lambda f, x, w: torch.func.jacrev(f, w)(*x),
    "jacfwd": lambda f, x, w: torch.func.jacfwd(f, w)(*x),
    "hessian": lambda f, x, w: torch.func.hessian(_sum(f), w)(*x),
    "vjp": _over_wanted(lambda f, x: (lambda y, back: back(y.cos()))(*torch.func.vjp(f, *x))),
    "jvp": _over_wanted(lambda f, x: torch.func.jvp(f, x, _tangents(x))),
    "linearize": _over_wanted(lambda f, x: torch.func.linearize(f, *x)[1](*_tangents(x))),
    "forward-over-reverse": _over_wanted(
        lambda f, x: torch.func.jvp(torch.func.grad(_sum(f)), x, _tangents(x))
    ),
    "reverse-over-forward": _over_wanted(
        lambda f, x: torch.func.grad(lambda *y: torch.func.jvp(_sum(f), y, _tangents(x))[1])(*x)
    ),
    "dual": _dual,
    "vmap": lambda f, x, w: _vmap(f, x),
    "vmap-last": lambda f, x, w: _vmap(f, x, dim=-1),
    "vmap-input": lambda f, x, w: _vmap(f, x, only=0),
    "vmap-target": lambda f, x, w: _vmap(f, x, only=1),
    "vmap-grad": lambda f, x, w: _vmap(torch.func.grad(_sum(f), w), x),
    "vmap-vmap": lambda f, x, w: torch.func.vmap(torch.func.vmap(f))(*_batches(_batches(x), dim=1)),
    "functionalize": lambda f, x, w: torch.func.functionalize(f)(*x),
    "traced": lambda f, x, w: make_fx(f)(*x)(*x),
}


CIRCUMSTANCES = ("a torch.func transform", "forward-mode differentiation", "tracing")


# (of linearize itself, with any function)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr Node")
@pytest.mark.parametrize("transform", TRANSFORMS)
@EACH_OPERATION
def test_transform(operation: str, transform: str) -> None:
    """Exactly torch's, and refused by the compiled backends."""
    calls = samples(operation, torch.float64)
    # What is torch's code is so whichever of them refuses it.
    for call in calls[:1] if INTERPRETED else calls:
        arguments = tuple(t.detach() for t in call.tensors.values())
        wanted = tuple(k for k, t in enumerate(call.tensors.values()) if t.requires_grad)

        def run(module: Any, call: Call = call, x: Any = arguments, w: Any = wanted) -> Any:
            def loss(*tensors: Tensor) -> Tensor:
                return call(module, **dict(zip(call.tensors, tensors, strict=True)))

            return TRANSFORMS[transform](loss, x, w)

        try:
            expected = run(theirs)
        except (NotImplementedError, RuntimeError) as error:  # torch has no such derivative
            with pytest.raises(type(error)):
                run(ours)
            continue
        assert_same(run(ours), expected)
        # linearize begins with a plain call
        said = "|".join([*CIRCUMSTANCES, *expected_reasons(call.with_gradients())])
        with pytest.raises(fastopt.BackendUnavailable, match=said), fastopt.use_backend(BACKEND):
            run(ours)


# -- what may come back as the gradient of the loss --------------------------------------


def _dual_gradients(gradients: Callable[[Tensor], Any], g: Tensor) -> Any:
    with forward_ad.dual_level():
        found = gradients(forward_ad.make_dual(g, g.cos()))
        return [tuple(forward_ad.unpack_dual(t)) for t in found]


def _vjp_of_gradients(gradients: Callable[..., Any], g: Tensor) -> Any:
    found, back = torch.func.vjp(lambda g: gradients(g, create_graph=True), g)
    return found, back(tuple(t.cos() for t in found))


def _second_gradients(gradients: Callable[..., Any], g: Tensor) -> Any:
    leaf = g.clone().requires_grad_()
    found = gradients(leaf, create_graph=True)
    return found, torch.autograd.grad(sum(t.square().sum() for t in found), leaf)


#: Of a function from the gradient of the loss to those of its tensors, and such a gradient.
GRADIENTS: dict[str, Callable[[Callable[..., Any], Tensor], Any]] = {
    "expanded": lambda f, g: f(g.flatten()[0].expand(g.shape)),
    "gaps": lambda f, g: f(noncontiguous_like(g)),
    "permuted": lambda f, g: f(permuted(g)),
    "negated": lambda f, g: f(torch._neg_view(g)),
    "negated-ones": lambda f, g: f(torch._neg_view(torch.ones_like(g))),
    "differentiable": _second_gradients,
    "batched": lambda f, g: f(torch.stack([g, g.cos()]), is_grads_batched=True),
    "batched-differentiable": lambda f, g: f(
        torch.stack([g, g.cos()]), is_grads_batched=True, create_graph=True
    ),
    "vmap": lambda f, g: torch.func.vmap(f)(torch.stack([g, g.cos()])),
    "vmap-last": lambda f, g: torch.func.vmap(f, -1)(torch.stack([g, g.cos()], -1)),
    "jvp": lambda f, g: torch.func.jvp(f, (g,), (g.cos(),)),
    "vjp": _vjp_of_gradients,
    "dual": _dual_gradients,
    "traced": lambda f, g: make_fx(lambda g: f(g))(g)(g.cos()),
}


@pytest.mark.parametrize("kind", GRADIENTS)
@EACH_OPERATION
def test_gradient_of_the_loss(operation: str, kind: str) -> None:
    """A loss computed beforehand; backward then meets transforms that forward knew nothing of."""
    if (operation, kind) == ("gaussian_nll_loss", "traced"):
        pytest.skip("torch's function, which the derivatives come from then, looks at its numbers")
    for call in compilable(operation, torch.float64):
        found = []
        upstream = torch.randn_like(call(theirs))
        for module in (theirs, ours):
            with fastopt.use_backend(BACKEND):
                loss = call(module)

            def gradients(g: Tensor, loss: Tensor = loss, call: Call = call, **more: Any) -> Any:
                wanted = list(call.wanted.values())
                return torch.autograd.grad(loss, wanted, g, retain_graph=True, **more)

            if module is theirs:
                try:
                    found.append(GRADIENTS[kind](gradients, upstream))
                except (NotImplementedError, RuntimeError):  # torch has no such derivative
                    break
            else:
                found.append(GRADIENTS[kind](gradients, upstream))
        else:
            torch.testing.assert_close(*found, rtol=1e-9, atol=1e-11, equal_nan=True)

"""Losses that no kernel has: torch's own results and errors, and the reason in words."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE
from torch import Tensor
from torch.nn import functional as theirs
from torch.testing import assert_close
from torch.testing._internal.common_methods_invocations import op_db
from torch.testing._internal.common_modules import ModuleErrorEnum, module_db

import fastopt
import fastopt.nn.functional as ours

#: A part of the reason that `explain` gives, by torch's names.
FUNCTIONS = {
    "multilabel_margin_loss": "pairs of each target class",
    "ctc_loss": "a recurrence over time",
}
MODULES = {
    "MultiLabelMarginLoss": "pairs of each target class",
    "CTCLoss": "a recurrence over time",
    "AdaptiveLogSoftmaxWithLoss": "clusters of classes",
}
OPERATORS = {op.name.rpartition(".")[2]: op for op in op_db}
INFOS = {info.module_cls.__name__: info for info in module_db}
DTYPES = (torch.float32, torch.float64)


@pytest.fixture(autouse=True)
def fixed_seed() -> Iterator[None]:
    torch.manual_seed(7)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def tensors_of(*values: Any) -> list[Tensor]:
    found = [v.output if hasattr(v, "output") else v for v in values]
    return [t for t in found if isinstance(t, Tensor) and t.requires_grad]


def same(mine: Any, torchs: Any, leaves: list[Tensor]) -> None:
    """Results, and gradients for a random grad_output, to the bit."""
    assert_close(mine, torchs, rtol=0, atol=0, equal_nan=True)
    if leaves:
        upstream = torch.randn_like(torchs)
        grads = (
            torch.autograd.grad(loss, leaves, upstream, allow_unused=True, retain_graph=True)
            for loss in (mine, torchs)
        )
        for g, h in zip(*grads, strict=True):
            assert (g is None) == (h is None)
            if g is not None:
                assert_close(g, h, rtol=0, atol=0, equal_nan=True)


def refused(call: Callable[[], object], reason: str) -> None:
    with pytest.raises(fastopt.BackendUnavailable, match=reason), fastopt.use_backend(BACKEND):
        call()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_samples_of_functions(name: str, dtype: torch.dtype) -> None:
    if name not in OPERATORS:
        pytest.skip("torch's table has no row for it")
    function, torchs = getattr(ours, name), getattr(theirs, name)
    for sample in OPERATORS[name].sample_inputs(DEVICE, dtype, requires_grad=True):
        args, kwargs = (sample.input, *sample.args), sample.kwargs
        same(function(*args, **kwargs), torchs(*args, **kwargs), tensors_of(*args))
        (decision,) = fastopt.explain(function, *args, **kwargs)
        assert decision.backend == "reference"
        for backend in ("numba", "triton"):
            assert any(FUNCTIONS[name] in reason for reason in decision.refusals[backend])
        refused(lambda a=args, k=kwargs: function(*a, **k), FUNCTIONS[name])
        with fastopt.use_backend("reference"):
            assert_close(function(*args, **kwargs), torchs(*args, **kwargs), equal_nan=True)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_errors_of_functions(name: str) -> None:
    """Those of torch's table, with and without a backend insisted on, which comes second."""
    operator = OPERATORS.get(name)
    if operator is None or operator.error_inputs_func is None:
        pytest.skip("torch's table has none")
    for one in operator.error_inputs(DEVICE):
        args, kwargs = (one.sample_input.input, *one.sample_input.args), one.sample_input.kwargs
        with pytest.raises(one.error_type, match=one.error_regex):
            getattr(ours, name)(*args, **kwargs)
        with pytest.raises(one.error_type, match=one.error_regex), fastopt.use_backend(BACKEND):
            getattr(ours, name)(*args, **kwargs)


X, Y, STEPS = torch.randn(5, 2, 3), torch.ones(2, 2).long(), (5, 5)
SCORES, ZEROS = torch.randn(2, 3), torch.zeros(2, 3).long()
ERRORS: dict[str, Callable[[Any], object]] = {
    "ctc_loss": lambda f: f(X, Y, (5, 6), (2, 2)),
    "ctc_loss-dtype": lambda f: f(X.half(), Y, STEPS, (2, 2)),
    "ctc_loss-reduction": lambda f: f(X, Y, STEPS, (2, 2), reduction="avg"),
    "ctc_loss-list": lambda f: f([1.0], Y, STEPS, (2, 2)),
    "multilabel_margin_loss": lambda f: f(SCORES, torch.zeros(2, 4).long()),
    "multilabel_margin_loss-class": lambda f: f(SCORES, ZEROS + 3),
    "multilabel_margin_loss-integers": lambda f: f(ZEROS, ZEROS),
}


@pytest.mark.parametrize("backend", [None, BACKEND])
@pytest.mark.parametrize("name", [n for n in ERRORS if n.partition("-")[0] in FUNCTIONS])
def test_bad_input_raises_torchs_error(name: str, backend: str | None) -> None:
    function = name.partition("-")[0]
    with pytest.raises(Exception) as expected:  # noqa: PT011
        ERRORS[name](getattr(theirs, function))
    with pytest.raises(type(expected.value)) as found, fastopt.use_backend(backend or "reference"):
        ERRORS[name](getattr(ours, function))
    assert str(found.value) == str(expected.value)


def made(name: str, nn: Any, *args: Any, **kwargs: Any) -> Any:
    torch.manual_seed(3)  # of the layers' weights
    return getattr(nn, name)(*args, **kwargs)


def module_cases(name: str, dtype: torch.dtype) -> Iterator[tuple[Any, Any, tuple[Any, ...]]]:
    """Ours and torch's, and what they are called with: torch's samples, or if it has none a few."""
    info = INFOS.get(name)
    if info is not None:
        for sample in info.module_inputs_func(
            info, DEVICE, dtype, requires_grad=True, training=True
        ):
            args, kwargs = sample.constructor_input.args, sample.constructor_input.kwargs
            pair = (made(name, nn, *args, **kwargs) for nn in (fastopt.nn, torch.nn))
            yield *pair, sample.forward_input.args
        return
    x, y = torch.randn(6, 8, dtype=dtype, requires_grad=True), torch.randint(20, (6,))
    for sample in ((x, y), (x[0], y[0])):
        pair = (made(name, nn, 8, 20, [5, 10], dtype=dtype) for nn in (fastopt.nn, torch.nn))
        yield *pair, sample


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", MODULES)
def test_samples_of_modules(name: str, dtype: torch.dtype) -> None:
    for mine, torchs, args in module_cases(name, dtype):
        assert isinstance(mine, type(torchs))
        assert repr(mine) == repr(torchs)
        mine.load_state_dict(torchs.state_dict())
        found, expected = mine(*args), torchs(*args)
        for f, e in zip(
            *[r if isinstance(r, tuple) else (r,) for r in (found, expected)], strict=True
        ):
            same(f, e, tensors_of(*args))
        for result in (found, expected):
            (result.loss if isinstance(result, tuple) else result).sum().backward(retain_graph=True)
        for p, q in zip(mine.parameters(), torchs.parameters(), strict=True):
            assert_close(p.grad, q.grad, rtol=0, atol=0)
        (decision,) = fastopt.explain(mine, *args)
        assert decision.backend == "reference"
        assert any(MODULES[name] in reason for reason in decision.refusals["numba"])
        refused(lambda m=mine, a=args: m(*a), MODULES[name])
        for again in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
            assert_close(again(*args), expected, rtol=0, atol=0)


@pytest.mark.parametrize("name", MODULES)
def test_errors_of_modules(name: str) -> None:
    info = INFOS.get(name)
    if info is None or info.module_error_inputs_func is None:
        pytest.skip("torch's table has none")
    for one in info.module_error_inputs_func(info, DEVICE, torch.float32, False, True):
        if one.error_on is ModuleErrorEnum.FORWARD_ERROR:
            i = one.module_error_input
            module = made(name, fastopt.nn, *i.constructor_input.args, **i.constructor_input.kwargs)
            with pytest.raises(one.error_type, match=one.error_regex):
                module(*i.forward_input.args)


def layer() -> Any:
    return made("AdaptiveLogSoftmaxWithLoss", fastopt.nn, 8, 20, [5, 10])


def test_bad_input_of_layers_raises_torchs_error() -> None:
    module, x = layer(), torch.randn(6, 8)
    for backend, (args, words) in itertools.product(
        ("reference", BACKEND),
        [((x, torch.full((6,), 20)), "20"), ((x[:, :3], torch.zeros(6).long()), "")],
    ):
        with pytest.raises((RuntimeError, IndexError), match=words), fastopt.use_backend(backend):
            module(*args)
    with pytest.raises(TypeError, match="there is nothing to explain"):
        fastopt.explain(module, [1.0], x)


def test_layers_by_keywords_convert_and_trace() -> None:
    """What people do with torch's: keywords, fastopt.convert there and back, torch.fx."""
    module, x, y = layer(), torch.randn(6, 8), torch.randint(20, (6,))
    expected = module(x, y)
    assert_close(module(input_=x, target_=y), expected)
    (decision,) = fastopt.explain(module, input_=x, target_=y)
    assert decision.request.numel == x.numel()

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.loss = module

        def forward(self, x: Tensor, y: Tensor) -> Any:
            return self.loss(x, y)

    model = Model()
    assert_close(torch.fx.symbolic_trace(model)(x, y), expected)
    for to, nn in (("torch", torch.nn), ("fastopt", fastopt.nn)):
        fastopt.convert(model, to=to)
        assert type(model.loss) is nn.AdaptiveLogSoftmaxWithLoss
        assert_close(model(x, y), expected)
    assert_close(torch.compile(model, backend="eager")(x, y), expected)

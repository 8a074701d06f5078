"""The samples that torch tests its own loss modules with, and what people do around a module.

Torch's tables of modules are the tables here, too: a loss that fastopt gains is tested as soon
as fastopt has its class. The last part holds properties of single losses.
"""

from __future__ import annotations

import copy
import inspect
import pickle
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, INTERPRETED, assert_as_accurate, level
from torch import Tensor
from torch.testing._internal import common_nn
from torch.testing._internal.common_modules import ModuleErrorEnum, ModuleInput, module_db
from torch.utils.checkpoint import checkpoint

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.call import RECORDS
from fastopt.kernels.operation import Elementwise, Softmax

#: Losses by element and cross-entropy; the others' samples are in test_rows, test_nll and
#: test_torch_only, which know their operands.
SWEPT = {
    name
    for name, kind in fastopt.nn._operations.MODULES.items()
    if hasattr(kind, "_function")
    and issubclass(RECORDS[kind._function.__name__], Elementwise | Softmax)
}
MODULES = {
    info.module_cls.__name__: info for info in module_db if info.module_cls.__name__ in SWEPT
}
EACH_MODULE = pytest.mark.parametrize("name", MODULES)
#: The losses that have all dtypes in all modes.
OLDEST = ("CrossEntropyLoss", "L1Loss", "MSELoss")
#: More samples than this are thinned, evenly, to about as many.
ENOUGH = 4 if INTERPRETED else 8
pytestmark = [
    pytest.mark.filterwarnings("ignore:Using a target size"),
    pytest.mark.filterwarnings("ignore:reduction. .mean. divides"),
]
Tensors = tuple[Tensor, ...]


def test_each_loss_has_a_row() -> None:
    assert set(MODULES) == SWEPT
    assert len(SWEPT) >= 13


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Beside other processes, threads wait for each other longer than these sizes take."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def module_inputs(name: str, dtype: torch.dtype) -> list[ModuleInput]:
    """Torch's, thinned where there are many; those that warn of deprecated options are torch's."""
    info = MODULES[name]
    found = info.module_inputs_func(info, DEVICE, dtype, requires_grad=True, training=True)
    found = [sample for sample in found if not cancels(sample)]
    enough = 5 * ENOUGH if name in OLDEST else ENOUGH
    return found[:: max(1, len(found) // enough)]


def cancels(sample: ModuleInput) -> bool:
    """Whether class weights happen to add up to 0, of which each rounding differs."""
    weight, target = sample.constructor_input.kwargs.get("weight"), sample.forward_input.args[1]
    if weight is None or target.is_floating_point() or weight.dim() != 1:
        return False
    return bool(weight[target].double().sum() == 0)


def made(namespace: Any, name: str, sample: ModuleInput) -> Any:
    given = sample.constructor_input
    return getattr(namespace, name)(*given.args, **given.kwargs)


def leaves(name: str, sample: ModuleInput) -> Tensors:
    """The tensors of a call, those with a gradient that have one and that the kernels give one."""
    first, *rest = sample.forward_input.args
    constants = fixed(name)
    return (
        first.detach().requires_grad_(),
        *(
            t.detach().requires_grad_(t.requires_grad and k not in constants)
            for k, t in enumerate(rest, 1)
        ),
    )


def fixed(name: str) -> set[int]:
    """The places of a call's tensors that have no gradient."""
    record: Any = RECORDS[getattr(fastopt.nn, name)._function.__name__]
    constants = getattr(record, "constants", ())
    return {k for k, operand in enumerate(record.operands) if operand in constants}


def outcome(module: Callable[..., Tensor], tensors: Tensors, upstream: Tensor | None) -> Tensors:
    """The loss and its gradients, if it has any."""
    loss = module(*tensors)
    if not loss.requires_grad:
        return (loss,)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    wanted = [t for t in tensors if t.requires_grad]
    for t in wanted:
        t.grad = None
    loss.backward(upstream)  # a checkpoint may refuse torch.autograd.grad
    return loss.detach(), *(t.grad for t in wanted)


def doubles(tensors: Tensors) -> Tensors:
    return tuple(
        t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t
        for t in tensors
    )


def compare(
    name: str, sample: ModuleInput, mode: Callable[[], AbstractContextManager[Any]] = nullcontext
) -> None:
    """Ours, insisted on, against torch's, both called inside of `mode`."""
    mine, its = made(fastopt.nn, name, sample), made(torch.nn, name, sample)
    tensors = leaves(name, sample)
    upstream = torch.randn(its(*tensors).shape).to(its(*tensors).dtype)

    def inside(module: Any) -> Callable[..., Tensor]:
        def call(*tensors: Tensor) -> Tensor:
            with mode():
                result: Tensor = module(*tensors)
            return result

        return call

    expected = outcome(inside(its), tensors, upstream)
    with fastopt.use_backend(BACKEND):
        found = outcome(inside(mine), tensors, upstream)
    assert len(found) == len(expected)
    operation = "cross_entropy" if name == "CrossEntropyLoss" else ""
    exact, even = (
        outcome(copy.deepcopy(its).double(), of, upstream.double())
        for of in (doubles(tensors), level(operation, doubles(tensors)))
    )
    for one, torchs, oracle, terms in zip(found, expected, exact, even, strict=False):
        assert one.is_inference() == torchs.is_inference()
        assert_as_accurate(one, torchs, oracle, terms)


# -- values and gradients ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in MODULES for dtype in FLOATS[: 4 if name in OLDEST else 1]],
    ids=str,
)
def test_sample(name: str, dtype: torch.dtype, poison: None) -> None:
    for sample in module_inputs(name, dtype):
        compare(name, sample)


@EACH_MODULE
def test_sample_by_torchs_formula_in_python(name: str) -> None:
    for sample in module_inputs(name, torch.float64):
        tensors = tuple(t.detach() for t in leaves(name, sample))
        expected = sample.reference_fn(made(torch.nn, name, sample), *tensors)
        with fastopt.use_backend(BACKEND):
            found = made(fastopt.nn, name, sample)(*tensors)
        torch.testing.assert_close(found, expected, equal_nan=True)


@contextmanager
def default_float64() -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:  # a failure is not to change the tests after it
        torch.set_default_dtype(before)


MODES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no-grad": torch.no_grad,
    "inference": torch.inference_mode,
    "default-float64": default_float64,
    "autocast-bfloat16": partial(torch.autocast, DEVICE, dtype=torch.bfloat16),
    "autocast-float16": partial(torch.autocast, DEVICE, dtype=torch.float16),
    "anomaly": partial(torch.autograd.set_detect_anomaly, True),
    "saved-on-cpu": torch.autograd.graph.save_on_cpu,
    "saved-copies": lambda: torch.autograd.graph.saved_tensors_hooks(
        lambda t: t.clone(), lambda t: t.clone()
    ),
}


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        (name, dtype)
        for name in MODULES
        # of the losses by element MSE and L1 stand for the others in half precision
        for dtype in (torch.float32, torch.bfloat16, torch.float16)[: 3 if name in OLDEST else 1]
    ],
    ids=str,
)
@pytest.mark.parametrize("mode", MODES)
def test_mode(name: str, mode: str, dtype: torch.dtype) -> None:
    samples = module_inputs(name, dtype)
    for sample in samples[:: max(len(samples) // 8, 1)]:
        compare(name, sample, MODES[mode])


# -- errors ------------------------------------------------------------------------------


def result_of(call: Callable[[], Any]) -> Any:
    """What it returns, or the error's type and words."""
    try:
        return call()
    except fastopt.BackendUnavailable:
        raise
    except Exception as error:
        return type(error).__name__, str(error)


@EACH_MODULE
def test_error_samples(name: str) -> None:
    info = MODULES[name]
    make = info.module_error_inputs_func
    for bad in make(info, DEVICE, torch.float32, True, True) if make else ():
        sample = bad.module_error_input
        for backend in (BACKEND, "reference"):
            said = []
            for namespace in (torch.nn, fastopt.nn):
                raised = pytest.raises(bad.error_type, match=bad.error_regex)
                with fastopt.use_backend(backend), raised as caught:
                    module = made(namespace, name, sample)
                    assert bad.error_on is ModuleErrorEnum.FORWARD_ERROR
                    module(*sample.forward_input.args)
                said.append((type(caught.value), str(caught.value)))
            assert said[0] == said[1]


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize(
    "options",
    [
        {"reduction": "median"}, {"reduction": None}, {"reduction": 1}, {"size_average": False},
        {"reduce": False}, {"size_average": True, "reduce": True, "reduction": "none"},
        {"unknown": 1}, {"weight": [1.0, 2.0]}, {"weight": torch.ones(2, 2)},
        {"label_smoothing": -0.1}, {"label_smoothing": "0.1"}, {"ignore_index": 0.5},
        {"device": "cpu"},
    ],
    ids=str,
)  # fmt: skip
@EACH_MODULE
def test_strange_options(name: str, options: dict[str, Any]) -> None:
    """Errors of the constructor, or else of the call, or else results."""
    sample = module_inputs(name, torch.float32)[0]
    tensors = leaves(name, sample)

    def run(namespace: Any) -> Any:
        return result_of(lambda: getattr(namespace, name)(**options)(*tensors).detach())

    expected, found = run(torch.nn), run(fastopt.nn)
    assert type(found) is type(expected)
    if isinstance(expected, Tensor):
        torch.testing.assert_close(found, expected, equal_nan=True)
    else:
        assert found == expected


@pytest.mark.filterwarnings("ignore:Using a target size")  # before the error
@EACH_MODULE
def test_strange_calls(name: str) -> None:
    """Errors, or where torch computes something, that."""
    input, target, *more = (t.detach() for t in leaves(name, module_inputs(name, torch.float32)[0]))
    if more:
        pytest.skip("a call of two tensors is what is made strange here")
    for arguments, named in (
        ((), {}), ((input,), {}), ((input, target, None), {}), ((input, None), {}),
        ((None, target), {}), ((input.tolist(), target), {}), ((input,), {"targets": target}),
        ((input.long(), target.long()), {}), ((input.bool(), target.bool()), {}),
        ((input > 0, target), {}), ((input, target.cfloat()), {}), ((input[0], target[:0]), {}),
    ):  # fmt: skip

        def run(namespace: Any, arguments: Any = arguments, named: Any = named) -> Any:
            return result_of(lambda: getattr(namespace, name)()(*arguments, **named))

        expected = run(torch.nn)
        if isinstance(expected, Tensor):
            found = run(fastopt.nn)
            torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
            continue
        for backend in (BACKEND, "reference"):
            with fastopt.use_backend(backend):
                assert run(fastopt.nn) == expected


# -- what people do with a module --------------------------------------------------------


def scripted(module: Any) -> Any:
    with pytest.warns((DeprecationWarning, FutureWarning), match="jit.script"):
        return torch.jit.script(module)


def traced(module: Any, *tensors: Tensor) -> Tensor:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`torch.jit.trace", DeprecationWarning)
        # torch's own functions, where they compare sizes
        warnings.filterwarnings("ignore", module=r"torch\.nn\.functional")
        result: Tensor = torch.jit.trace(module, tensors, check_trace=False)(*tensors)
    return result


def exported(module: Any, *tensors: Tensor) -> Tensor:
    result: Tensor = torch.export.export(module, tensors).module()(*tensors)
    return result


def hooked(module: Any, *tensors: Tensor) -> Tensor:
    """Hooks that change what they see, and one that has to see a gradient."""
    module.register_forward_pre_hook(lambda m, args: (args[0] * 0.5, *args[1:]))
    module.register_forward_hook(lambda m, args, result: result * 3)
    module.register_full_backward_hook(lambda m, to, of: (to[0] * 0.25, *to[1:]))
    result: Tensor = module(*tensors)
    return result


def changed(module: Any, *tensors: Tensor) -> Tensor:
    module.reduction = "sum"
    result: Tensor = module.eval()(*tensors)
    return result


def torchs_class(module: Any) -> Any:
    return next(c for c in type(module).__mro__ if c.__module__.startswith("torch.nn."))


def named(module: Any, *tensors: Tensor) -> Tensor:
    """By the names of torch's own forward, the last one first."""
    names = list(inspect.signature(torchs_class(module).forward).parameters)[1:]
    result: Tensor = module(**dict(reversed(list(zip(names, tensors, strict=True)))))
    return result


AROUND: dict[str, Callable[..., Tensor]] = {
    "named-arguments": named,
    "deepcopy": lambda m, *t: copy.deepcopy(m)(*t),
    "pickle": lambda m, *t: pickle.loads(pickle.dumps(m))(*t),
    "functional-call": lambda m, *t: torch.func.functional_call(m, dict(m.named_buffers()), t),
    "checkpoint": partial(checkpoint, use_reentrant=False),
    "checkpoint-reentrant": partial(checkpoint, use_reentrant=True),
    "hooks": hooked,
    "reduction-changed": changed,
    "to-float64": lambda m, *t: m.to(torch.float64)(
        *(s.double() if s.is_floating_point() else s for s in t)
    ),
    "fx": lambda m, *t: torch.fx.symbolic_trace(m)(*t),
    "script": lambda m, *t: scripted(m)(*t),
    "trace": traced,
    "export": exported,
}
# These don't call the module at all as it is, or with something that is no plain tensor.
TORCHS_OWN = {"fx", "script", "trace", "export"}


@pytest.mark.parametrize("way", AROUND)
@EACH_MODULE
def test_way_to_use_a_module(name: str, way: str) -> None:
    # Random weights may nearly cancel, which only double precision bears.
    dtype = torch.float32 if way == "to-float64" else torch.float64
    samples = module_inputs(name, dtype)
    few = 2 if way in TORCHS_OWN else 12
    for sample in samples[:: max(len(samples) // few, 1)]:
        tensors = leaves(name, sample)

        def attempt(
            namespace: Any, sample: ModuleInput = sample, tensors: Tensors = tensors
        ) -> Any:
            module, own = made(namespace, name, sample), namespace is torch.nn or way in TORCHS_OWN
            with nullcontext() if own else fastopt.use_backend(BACKEND):
                return result_of(lambda: outcome(partial(AROUND[way], module), tensors, None))

        expected, found = attempt(torch.nn), attempt(fastopt.nn)
        if isinstance(expected[0], str):  # torch's own can't be used so
            assert isinstance(found[0], str)
        else:
            torch.testing.assert_close(found, expected, equal_nan=True)


class Model(torch.nn.Module):
    def __init__(self, criterion: torch.nn.Module) -> None:
        super().__init__()
        self.criterion = criterion

    def forward(self, input: Tensor, target: Tensor) -> Tensor:
        result: Tensor = self.criterion(input * 1, target)
        return result


@EACH_MODULE
def test_symbolic_trace_keeps_fastopt(name: str) -> None:
    """Only modules of torch.nn are leaves to torch.fx; of ours it sees the function called."""
    if len(module_inputs(name, torch.float32)[0].forward_input.args) != 2:
        pytest.skip("the model here has a criterion of two tensors")
    module = getattr(fastopt.nn, name)()
    traced = torch.fx.symbolic_trace(Model(module))
    calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
    assert type(module)._function in calls
    sample = module_inputs(name, torch.float32)[0]
    input, target = (t.detach() for t in leaves(name, sample))
    with fastopt.use_backend(BACKEND):
        torch.testing.assert_close(traced(input, target), module(input * 1, target), equal_nan=True)


@EACH_MODULE
def test_what_a_module_shows(name: str) -> None:
    for sample in module_inputs(name, torch.float32):
        mine, its = made(fastopt.nn, name, sample), made(torch.nn, name, sample)
        assert repr(mine) == repr(its)
        assert vars(mine).keys() == vars(its).keys()
        assert getattr(mine, "__constants__", None) == getattr(its, "__constants__", None)
        for way in (lambda m: m, lambda m: m.double(), lambda m: m.half().eval()):
            states = way(mine).state_dict(), way(its).state_dict()
            assert list(states[0]) == list(states[1])
            torch.testing.assert_close(dict(states[0]), dict(states[1]), rtol=0, atol=0)
            assert mine.training == its.training
        its.load_state_dict(states[0])
        mine.load_state_dict(states[1])
        if states[1]:
            for module in (mine, its):
                with pytest.raises(RuntimeError, match=f"{name}:\n\tMissing key.*weight"):
                    module.load_state_dict({})


# -- torch's older tables of modules -----------------------------------------------------


def older_entries() -> dict[str, dict[str, Any]]:
    entries = [*common_nn.criterion_tests, *common_nn.get_new_module_tests()]
    named = {str(entry.get("fullname")): entry for entry in entries}
    return {
        name: e
        for name, e in named.items()
        if name.split("_")[0] in MODULES
        and not name.endswith("legacy_enum")  # whose deprecated arguments are torch's
        and not isinstance(e.get("input_fn", Tensor)(), tuple)
    }


OLDER = older_entries()


@pytest.mark.filterwarnings("ignore:size_average and reduce args")
@pytest.mark.parametrize("fullname", OLDER)
def test_older_table(fullname: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its constructors look for torch's names in their own file."""
    entry = OLDER[fullname]

    def tensor(role: str) -> Tensor:
        make = entry.get(f"{role}_fn") or partial(torch.randn, entry[f"{role}_size"])
        value: Tensor = make()
        return value if value.is_complex() else value.double()

    input = tensor("input").requires_grad_()
    target = (tensor("target"),) if {"target_size", "target_fn"} & entry.keys() else ()
    its = entry["constructor"]()
    expected = entry["reference_fn"](input, *(target or (None,)), its)
    torchs_node = its(input, *target).grad_fn
    with monkeypatch.context() as patch:
        patch.setattr(common_nn, "F", ours)
        patch.setattr(common_nn, "nn", fastopt.nn)
        mine = entry["constructor"]()

        def loss(input: Tensor) -> Tensor:
            with fastopt.use_backend("reference" if input.is_complex() else BACKEND):
                return mine(input, *target)

        found = loss(input)
        assert input.is_complex() or type(found.grad_fn) is not type(torchs_node)
        torch.testing.assert_close(found, expected)
        assert torch.autograd.gradcheck(loss, input, check_batched_grad=True)
        assert torch.autograd.gradgradcheck(loss, input)


def test_older_table_is_not_empty() -> None:
    assert {name.split("_")[0] for name in OLDER} >= {"L1Loss", "MSELoss"}

"""What few people do, and what must end as it does with torch: neither in a crash nor silently."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as theirs
from race import NAMES
from torch import Tensor
from torch.nn import Parameter

import fastopt
import fastopt.nn.functional as ours
from fastopt.front.route import RouteCache

each_loss = pytest.mark.parametrize("name", ["cross_entropy", "l1_loss", "mse_loss"])
each_optimizer = pytest.mark.parametrize("name", NAMES)


def arguments(name: str, rows: int = 1600) -> tuple[Tensor, Tensor]:
    """Of a size at which a kernel serves, if there are many rows."""
    input = torch.randn(rows, 1000, requires_grad=True)
    if name == "cross_entropy":
        return input, torch.randint(1000, (rows,))
    return input, torch.randn(rows, 1000)


def error_of(call: Callable[..., object], *args: Any, **kwargs: Any) -> tuple[type, str]:
    with pytest.raises((RuntimeError, TypeError, ValueError, AssertionError)) as caught:
        call(*args, **kwargs)
    return caught.type, str(caught.value)


# -- losses ------------------------------------------------------------------------------


@each_loss
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("offset", [0, 1])
def test_memory_released_before_a_loss(name: str, place: int, offset: int) -> None:
    """As FSDP does; torch's own mean squared error reads at that address and ends the process."""
    tensors = [t[offset:] for t in arguments(name)]
    expected = getattr(theirs, name)(*tensors)
    torch.testing.assert_close(getattr(ours, name)(*tensors), expected)
    tensors[place] = released = tensors[place].detach()
    released.untyped_storage().resize_(0)
    for insisted in (nullcontext(), fastopt.use_backend("numba")):
        with insisted, pytest.raises(RuntimeError, match=r"has no memory; its storage has 0 bytes"):
            getattr(ours, name)(*tensors)


@pytest.mark.parametrize(
    ("name", "place"), [("cross_entropy", 0), ("l1_loss", 0), ("l1_loss", 1), ("mse_loss", 1)]
)
def test_tensors_that_a_transform_has_left_behind(name: str, place: int) -> None:
    """They have no address; torch takes them for what they wrap."""
    tensors, left = [t.detach() for t in arguments(name)], []

    def leak(x: Tensor) -> Tensor:
        left.append(x)
        return x.sum()

    torch.func.grad(leak)(tensors[place])
    expected = getattr(theirs, name)(*tensors)
    (tensors[place],) = left
    with pytest.raises(RuntimeError, match="storage"):
        left[0].data_ptr()
    for _ in range(2):
        torch.testing.assert_close(getattr(ours, name)(*tensors), expected)
    (decision,) = fastopt.explain(getattr(ours, name), *tensors)
    assert "a tensor that a torch.func transform has left behind" in str(decision)


@each_loss
def test_memory_released_before_a_backward_pass(name: str) -> None:
    RouteCache.forget()  # what other tests' backward passes have asked for
    outcomes = []
    for scale in (1.0, 2.0):
        input, target = arguments(name)
        with fastopt.use_backend("numba"):
            loss = getattr(ours, name)(input, target)
        input.untyped_storage().resize_(0)
        outcomes.append((loss * scale, input))
    outcomes[0][0].backward()  # the gradient is there already
    assert outcomes[0][1].grad.isfinite().all()
    with pytest.raises(RuntimeError, match="has no memory; its storage has 0 bytes"):
        outcomes[1][0].backward()


@each_loss
@pytest.mark.parametrize("rows", [2, 1600])
def test_scripted(name: str, rows: int) -> None:
    """The functions themselves and what calls them, as torch's."""

    def of_labels(input: Tensor, target: Tensor) -> Tensor:
        return ours.cross_entropy(input, target) + 1

    def of_numbers(input: Tensor, target: Tensor) -> Tensor:
        return ours.mse_loss(input, target) + ours.l1_loss(input, target)

    class Module(torch.nn.Module):
        def forward(self, input: Tensor, target: Tensor) -> Tensor:
            return ours.mse_loss(input, target)

    tensors = arguments(name, rows)
    candidates: list[Any] = [getattr(ours, name)]
    candidates += [of_labels] if name == "cross_entropy" else [of_numbers, Module()]
    for candidate in candidates:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", ".*torch.jit.script")
            scripted = torch.jit.script(candidate)
        torch.testing.assert_close(scripted(*tensors), candidate(*tensors))


class Handled(Tensor):
    """It knows losses alone, and says so of everything else."""

    @classmethod
    def __torch_function__(cls, function: Any, *rest: Any) -> Any:
        return (
            "handled"
            if getattr(function, "__name__", "") in fastopt.nn._operations.FUNCTIONS
            else NotImplemented
        )


@each_loss
@pytest.mark.parametrize("rows", [2, 1600])
@pytest.mark.parametrize("place", [0, 1])
def test_override_of_the_losses_alone(name: str, rows: int, place: int) -> None:
    tensors = list(arguments(name, rows))
    tensors[place] = tensors[place].detach().as_subclass(Handled)
    assert getattr(theirs, name)(*tensors) == getattr(ours, name)(*tensors) == "handled"
    kind = {"cross_entropy": "CrossEntropyLoss", "mse_loss": "MSELoss", "l1_loss": "L1Loss"}[name]
    assert getattr(fastopt.nn, kind)()(*tensors) == "handled"
    assert "a tensor of type Handled" in str(fastopt.explain(getattr(ours, name), *tensors))
    with fastopt.use_backend("numba"), pytest.raises(fastopt.BackendUnavailable, match="Handled"):
        getattr(ours, name)(*tensors)


@each_loss
@pytest.mark.parametrize("rows", [2, 1600])
@pytest.mark.parametrize("reduction", [["mean"], 3, "men", ("sum",)], ids=str)
def test_reduction_of_another_kind(name: str, rows: int, reduction: object) -> None:
    tensors = arguments(name, rows)
    expected = error_of(getattr(theirs, name), *tensors, reduction=reduction)
    assert error_of(getattr(ours, name), *tensors, reduction=reduction) == expected


@each_loss
def test_signature(name: str) -> None:
    mine, torchs = (inspect.signature(getattr(module, name)) for module in (ours, theirs))
    count = len(torchs.parameters)
    assert list(mine.parameters)[:count] == list(torchs.parameters)
    defaults = [[p.default for p in s.parameters.values()][:count] for s in (mine, torchs)]
    assert defaults[0] == defaults[1]
    assert all(p.kind is p.KEYWORD_ONLY for p in list(mine.parameters.values())[count:])
    assert mine.return_annotation is torchs.return_annotation is Tensor


# -- optimizers --------------------------------------------------------------------------


@each_optimizer
@pytest.mark.parametrize("where", ["parameter", "state"])
def test_inference_tensors(name: str, where: str) -> None:
    """They may be changed in inference mode only, and are left as they are elsewhere."""
    early = getattr(fastopt.optim, name)._made_early
    if early and where == "state":
        pytest.skip("its states are made by the constructor")
    options = {"momentum": 0.9} if name == "SGD" else {}
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        with torch.inference_mode(where == "parameter"):
            param = Parameter(torch.ones(70))
        param.grad = torch.arange(70.0)
        optimizer = getattr(module, name)([param], lr=0.1, **options)
        with torch.inference_mode():
            optimizer.step()
        before = param.detach().clone()
        error = error_of(optimizer.step)
        # Torch's own with such states writes before it says so.
        assert where == "state" or early or torch.equal(param.detach(), before)
        outcomes.append((error, before))
    (error, value), (expected, torchs) = outcomes
    assert error == expected
    torch.testing.assert_close(value, torchs)


@each_optimizer
def test_scale_left_for_a_step_that_is_not_fused(name: str) -> None:
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        param = Parameter(torch.ones(70))
        param.grad = torch.ones(70)
        optimizer = getattr(module, name)([param], lr=0.1)
        optimizer.grad_scale, optimizer.found_inf = torch.tensor(2.0), torch.tensor(0.0)
        try:
            optimizer.step()
            outcomes.append(None)
        except AssertionError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]


def test_an_optimizer_is_explained_by_itself() -> None:
    optimizer = fastopt.optim.SGD([torch.zeros(3)])
    with pytest.raises(TypeError, match="by itself"):
        fastopt.explain(optimizer, torch.zeros(3))

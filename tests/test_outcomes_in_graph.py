"""What torch has no function for, inside torch.compile: operators of its graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from cases import BACKEND
from test_operators import Graphs
from torch import Tensor

import fastopt
import fastopt.nn.functional as ours
from fastopt.nn._log_prob_and_entropy import plain

pytestmark = [
    # torch's own, while it traces or compiles
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def graphs() -> Iterator[Graphs]:
    torch._dynamo.reset()
    with torch._functorch.config.patch(donated_buffer=False):
        yield Graphs()
    torch._dynamo.reset()


def said(function: Callable[..., Any], x: Tensor, target: Tensor) -> list[Tensor]:
    """All that a call gives, and the gradient of a sum of which each weighs differently."""
    leaf = x.detach().clone().requires_grad_()
    found = function(leaf, target)
    total = (found.log_prob + 3 * found.entropy - 0.5 * found.log_sum_exp).sum()
    total.backward(retain_graph=True)
    total.backward()
    assert leaf.grad is not None
    return [t.detach() for t in found] + [leaf.grad]


def twice(x: Tensor, target: Tensor) -> Any:
    return plain(2 * x, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_graph_for_all_batches(dtype: torch.dtype, graphs: Graphs) -> None:
    """Of which each pass is one operator; the numbers are those of the definition in float64."""
    compiled = torch.compile(
        lambda x, t: ours.log_prob_and_entropy(2 * x, t), fullgraph=True, backend=graphs.backend
    )
    for rows in (6, 7, 12):
        x, target = torch.randn(rows, 3, 50, dtype=dtype), torch.randint(50, (rows, 3))
        with fastopt.use_backend(BACKEND):
            found = said(compiled, x, target)
        for mine, exact in zip(found, said(twice, x.double(), target), strict=True):
            torch.testing.assert_close(mine, exact.to(mine.dtype))
    assert graphs.operators == {"row_outcomes": 2, "row_outcomes_gradient": 2}
    assert graphs.compiled == 4


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_distillation(beta: float, graphs: Graphs) -> None:
    """Each divergence, its mean by torch, for a teacher that isn't followed."""
    options: dict[str, Any] = {"temperature": 2.0, "beta": beta}
    compiled = torch.compile(
        lambda x, y: 4 * ours.distillation_loss(2 * x, y, **options),
        fullgraph=True, backend=graphs.backend,
    )  # fmt: skip
    for rows in (6, 7, 12):
        x, y = torch.randn(2, rows, 3, 40, dtype=torch.float64)
        grads, losses = [], []
        for function, backend, dtype in (
            (compiled, BACKEND, torch.float32),
            (
                lambda x, y: 4 * ours.distillation_loss(2 * x, y, **options),
                "reference",
                torch.float64,
            ),
        ):
            leaf = x.to(dtype, copy=True).requires_grad_()
            with fastopt.use_backend(backend):
                loss = function(leaf, y.to(dtype))
            (-2 * loss).backward()
            losses.append(loss.detach().float())
            grads.append(leaf.grad.float())  # type: ignore[union-attr]
        torch.testing.assert_close(*losses)
        torch.testing.assert_close(*grads)
    assert graphs.operators == {"divergences": 2, "divergences_gradient": 2}
    assert graphs.compiled == 4


@pytest.mark.skipif(BACKEND != "numba", reason="on a GPU there are no small calls")
def test_by_size(graphs: Graphs) -> None:
    """A small call is torch's operations, compiled with the rest."""
    compiled = torch.compile(ours.log_prob_and_entropy, fullgraph=True, backend=graphs.backend)
    x, target = torch.randn(4, 50), torch.randint(50, (4,))
    for mine, exact in zip(compiled(x, target), plain(x.double(), target), strict=True):
        torch.testing.assert_close(mine, exact.to(mine.dtype))
    assert not graphs.operators
    large = torch.empty(1, device="meta").expand(4_194_304 // 1_000 + 1, 1_000)
    with fastopt.front.circumstances.traced():
        decide: Any = ours.log_prob_and_entropy
        request = decide.decide(large, torch.empty(len(large), dtype=torch.int64)).request
    assert request.crossover == 4_194_304 <= request.numel


def test_errors(graphs: Graphs) -> None:
    """A class out of range is found by the run; shapes by the trace."""
    compiled = torch.compile(ours.log_prob_and_entropy, fullgraph=True, backend=graphs.backend)
    x, target = torch.randn(4, 50), torch.tensor([1, 2, 50, 3])
    with fastopt.use_backend(BACKEND):
        with pytest.raises(IndexError, match=r"Target 50.*target\[2\]"):
            compiled(x, target)
        with pytest.raises(Exception, match="expected logits of shape"):
            compiled(x, target[:3])


def test_operators_tell_the_truth() -> None:
    """Torch's own check of schemas, mutation, and what operators say of sizes and strides."""
    x, target = torch.randn(6, 50), torch.randint(50, (6,))
    operators, tests = torch.ops.fastopt, ("test_schema", "test_faketensor")
    torch.library.opcheck(operators.row_outcomes, (x, target, BACKEND), test_utils=tests)
    kept = operators.row_outcomes(x, target, BACKEND)[-1]
    given = (x, target, kept, torch.randn(3, 6), BACKEND)
    torch.library.opcheck(operators.row_outcomes_gradient, given, test_utils=tests)
    settings = 2.0, 0.3, BACKEND
    torch.library.opcheck(operators.divergences, (x, -x, *settings), test_utils=tests)
    kept = operators.divergences(x, -x, *settings)[-1]
    given = (x, -x, kept, torch.randn(6), *settings)
    torch.library.opcheck(operators.divergences_gradient, given, test_utils=tests)

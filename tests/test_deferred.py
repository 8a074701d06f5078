"""A head whose logits are computed once somebody wants them, against torch's linear layer."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from fastopt.front.deferred import Head, Logits

SHAPE, CLASSES = (3, 5, 7), 11


def heads(bias: bool = True) -> tuple[nn.Linear, nn.Linear]:
    """Ours, and torch's with the same weights."""
    theirs = nn.Linear(SHAPE[-1], CLASSES, bias, dtype=torch.float64)
    ours = copy.deepcopy(theirs)
    ours.__class__ = Head
    return ours, theirs


def written_to(logits: Tensor) -> Tensor:
    logits = logits.mul_(2.0)
    logits[..., 0] = -1.0
    logits[0].exp_()
    return logits.square()


def smoothed(logits: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), torch.arange(15) % CLASSES, label_smoothing=0.1)


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "capped": lambda x: torch.tanh(x / 3) * 3,
    "written to": written_to,
    "smoothed": smoothed,
    "float": lambda x: x.float() - x.float()[..., :1],
    "twice": lambda x: x[..., :-1, :] * x.softmax(-1)[:, 1:],
    "checkpointed": lambda x: checkpoint(torch.sin, x, use_reentrant=False),
}


@pytest.mark.parametrize("use", USES)
def test_values_and_gradients(use: str) -> None:
    """Second derivatives, too."""
    results = []
    x = torch.randn(SHAPE, dtype=torch.float64)
    for head in heads(bias=use != "smoothed"):
        hidden = x.clone().requires_grad_()
        used = USES[use](head(hidden))
        inputs = [hidden, *head.parameters()]
        grads = torch.autograd.grad(used.square().sum(), inputs, create_graph=True)
        seconds = torch.autograd.grad(grads[0].square().sum(), inputs[:2])
        results.append([used, *grads, *seconds])
        assert type(used) is Tensor
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_nothing_is_computed_before() -> None:
    ours, theirs = heads()
    hidden = torch.randn(SHAPE, dtype=torch.float64)
    logits = ours(hidden)
    assert type(logits) is Logits
    assert (logits.shape, logits.dtype, logits.requires_grad) == ((3, 5, 11), torch.float64, True)
    assert type(logits.float()) is Logits
    with torch.no_grad():
        ours.weight.add_(1.0)  # so that what is computed from now on would be noticed
    for read in (logits.clone, logits.float().sum, logits.tolist, logits.layer):
        with pytest.raises(RuntimeError, match=r"the hidden states or the weight .* have changed"):
            read()
    assert not torch.equal(ours(hidden), theirs(hidden))


def test_read_in_time_they_stay() -> None:
    ours, theirs = heads()
    hidden = torch.randn(SHAPE, dtype=torch.float64)
    logits, expected = ours(hidden), theirs(hidden)
    before = repr(logits)
    with torch.no_grad():
        ours.weight.add_(1.0)
    assert torch.equal(logits, expected)
    assert logits.tolist() == expected.tolist()
    assert before == repr(logits) == repr(expected.clone())
    file = io.BytesIO()
    torch.save(logits, file)
    file.seek(0)
    assert torch.equal(torch.load(file), expected)


def test_under_autocast() -> None:
    """Whatever autocast is when they are read."""
    results = []
    x = torch.randn(SHAPE)
    for head in heads():
        hidden = x.clone().requires_grad_()
        head.float()
        with torch.autocast("cpu", torch.bfloat16):
            logits = head(hidden)
        wide = logits.float()
        with torch.autocast("cpu", torch.float16):
            used = torch.cat([wide[0], logits[1]])
        grads = torch.autograd.grad(used.square().sum(), [hidden, *head.parameters()])
        results.append([logits.detach(), used, *grads])
    assert results[0][0].dtype == torch.bfloat16
    torch.testing.assert_close(*results, rtol=2**-8, atol=0.02)
    torch.testing.assert_close(results[0][:2], results[1][:2], rtol=0, atol=0)


def hook(*_: Any) -> None: ...


PLAIN: dict[str, Callable[[nn.Linear, Tensor], Tensor]] = {
    "eval": lambda head, x: head.eval()(x),
    "hook": lambda head, x: (head.register_forward_hook(hook), head(x))[1],
    "vector": lambda head, x: head(x[0, 0]),
    "meta": lambda head, x: torch.zeros_like(head.to("meta")(x.to("meta")), device="cpu"),
    "no_grad": lambda head, x: torch.no_grad()(head)(x),
    "transform": lambda head, x: torch.func.vmap(head)(x),
    "compile": lambda head, x: torch.compile(head, backend="eager")(x),
}


@pytest.mark.parametrize("case", PLAIN)
def test_what_is_plain(case: str) -> None:
    ours, theirs = heads()
    x = torch.randn(SHAPE, dtype=torch.float64)
    logits = PLAIN[case](ours, x)
    assert type(logits) is Tensor
    torch.testing.assert_close(logits, PLAIN[case](theirs, x), rtol=1e-12, atol=0)


def test_errors_are_torchs() -> None:
    messages = []
    for head in heads():
        for x in (torch.randn(SHAPE), torch.randn(2, 3, dtype=torch.float64)):
            with pytest.raises(RuntimeError) as caught:
                head(x)
            messages.append(str(caught.value))
    assert messages[:2] == messages[2:]

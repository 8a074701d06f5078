"""What the tests of other people's training loops share: text to train on, what to compare."""

from __future__ import annotations

import argparse
import ast
import copy
import functools
import inspect
import re
import typing
from collections import Counter
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from watching import watch_losses

import fastopt
from fastopt.front.call import RECORDS

MODULES = (argparse, ast, copy, functools, inspect, typing)
VOCABULARY, IGNORED = 5_000, -100
#: Even a batch of the shortest excerpts has logits enough for the compiled kernels.
BATCH, SHORTEST, LONGEST = 4, 24, 48
assert RECORDS["cross_entropy"].crossover < BATCH * SHORTEST * VOCABULARY
#: Whose state is saved, and who goes on from it.
RESUMED = pytest.mark.parametrize(
    ("first", "second"),
    [(torch, fastopt), (fastopt, torch), (fastopt, fastopt)],
    ids=["torch-fastopt", "fastopt-torch", "fastopt-fastopt"],
)


@functools.cache
def text() -> Tensor:
    """Sources of the standard library, every word as its rank among the most frequent."""
    sources = "\n".join(map(inspect.getsource, MODULES))
    words = re.findall(r"\w+|[^\w\s]", sources)
    ranks = {word: rank for rank, (word, _) in enumerate(Counter(words).most_common())}
    return torch.tensor([min(ranks[word], VOCABULARY - 1) for word in words])


def excerpts(count: int) -> list[Tensor]:
    """Random excerpts of the text, of random lengths."""
    starts = torch.randint(len(text()) - LONGEST, (count,)).tolist()
    lengths = torch.randint(SHORTEST, LONGEST + 1, (count,)).tolist()
    return [text()[start : start + n] for start, n in zip(starts, lengths, strict=True)]


def padded(rows: list[Tensor]) -> dict[str, Tensor]:
    """A batch, padded to its longest row; padding is no label."""
    return {
        "input_ids": pad_sequence(rows, batch_first=True),
        "labels": pad_sequence(rows, batch_first=True, padding_value=IGNORED),
    }


def next_words(labels: Tensor) -> Tensor:
    """The word to predict at each place, which is the next place's; all rows in one."""
    return torch.nn.functional.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()


class Training(NamedTuple):
    """What a training leaves behind.

    Attributes:
        losses, norms: a step's loss and its gradients' norm before clipping.
        start, end: all weights before and after, in one vector.
        optimizer: which has taken the steps.
    """

    losses: list[float]
    norms: list[float]
    start: Tensor
    end: Tensor
    optimizer: torch.optim.Optimizer


class Apart(NamedTuple):
    """How far two trainings may be apart.

    Attributes:
        losses, norms: relative to the expected ones.
        way: the weights in the end, in one norm of all, relative to how far they have come.
    """

    losses: float
    norms: float
    way: float


FLOAT32 = Apart(3e-6, 1e-5, 2e-4)
#: The float32 gradients of logits, a rounding apart, may become neighbours in bfloat16.
BFLOAT16 = Apart(2e-4, 3e-3, 3e-2)


def assert_same(actual: Training, expected: Training, apart: Apart = FLOAT32) -> None:
    """That two trainings from the same weights went the same way."""
    torch.testing.assert_close(actual.losses, expected.losses, rtol=apart.losses, atol=0)
    torch.testing.assert_close(actual.norms, expected.norms, rtol=apart.norms, atol=0)
    way = (actual.end - expected.end).norm() / (expected.end - expected.start).norm()
    assert way <= apart.way, f"{way:.1e} of the way apart"


def assert_compiled(optimizer: torch.optim.Optimizer) -> None:
    """That the kernels update every parameter of an optimizer of fastopt's."""
    decisions = fastopt.explain(optimizer)
    assert {decision.backend for decision in decisions} == {"numba"}
    count = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
    assert sum(decision.request.numel for decision in decisions) == count


def count_losses(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """A list that gets an entry with every loss that the compiled kernels serve."""
    served: list[Any] = []
    watch_losses(monkeypatch, lambda options, _: served.append(options))
    return served

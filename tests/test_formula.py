"""What becomes of a formula before a compiler sees it."""

from __future__ import annotations

import inspect
import itertools
import re
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from fastopt.kernels.formula import without
from fastopt.kernels.operation import Update
from fastopt.optim._operations import OPTIMIZERS
from fastopt.optim.muon import OrthogonalUpdate

UPDATES: list[type[Update]] = [
    *[optimizer._record for optimizer in OPTIMIZERS.values()],
    OrthogonalUpdate,
]


def optional(record: type[Update]) -> list[str]:
    """The states that a rule can do without."""
    source = inspect.getsource(record.update)
    return [name for name in record.slots if re.search(rf"\b{name} is not None", source)]


SUBSETS = [
    (record, absent)
    for record in UPDATES
    for count in range(len(record.slots) + 1)
    for absent in itertools.combinations(optional(record), count)
]


def rule(h: Any, a: Any, b: Any, c: Any) -> Any:
    if b is None:
        a = a + 1.0
    elif c is not None:
        a = a + b * c
    if c is None:
        c = b
    return a, b, c


@pytest.mark.parametrize("absent", [(), ("b",), ("c",), ("b", "c")])
def test_without(absent: tuple[str, ...]) -> None:
    """The results are those with None for what is absent, which is not among them."""
    given = {"a": 2.0, "b": 3.0, "c": 5.0}
    full = {name: None if name in absent else value for name, value in given.items()}
    present = [value for name, value in given.items() if name not in absent]
    expected = rule(None, **full)
    found = without(rule, absent)(None, *present)
    kept = [x for name, x in zip(given, expected, strict=True) if name not in absent]
    assert list(found) == kept


def test_its_source_can_be_read() -> None:
    source = inspect.getsource(without(rule, ("b", "c")))
    assert source.startswith("def rule(h: Any, a: Any)")
    assert "if" not in source


@pytest.mark.parametrize(("record", "absent"), SUBSETS, ids=str)
def test_optimizers_without_states(record: type[Update], absent: tuple[str, ...]) -> None:
    names = ("param", "grad", *record.slots)
    numbers = {name: torch.rand(5, dtype=torch.float64) + 0.5 for name in names}
    fields = (*record.numbers, *record.derived)
    h = SimpleNamespace(**{name: 0.25 + 0.1 * k for k, name in enumerate(fields)})
    update: Any = record.update
    with_none = {name: None if name in absent else value for name, value in numbers.items()}
    expected = update(h, **with_none)
    present = [value for name, value in numbers.items() if name not in absent]
    found = without(update, absent)(h, *present)
    there = [
        x for name, x in zip(("param", *record.slots), expected, strict=True) if name not in absent
    ]
    for mine, theirs in zip(found, there, strict=True):
        assert torch.equal(mine, theirs)

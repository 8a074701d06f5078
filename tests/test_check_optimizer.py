"""fastopt.check of optimizers: right rules are right everywhere, and wrong kernels are seen."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import BACKEND
from rules import Adam, Mixed, SignSGD
from torch.nn import Parameter

import fastopt


@pytest.mark.parametrize(
    ("kind", "options"),
    [(Adam, {"lr": 0.1}), (SignSGD, {"nesterov": True}), (Mixed, {"maximize": True})],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_right_rules(kind: Any, options: Any, capsys: pytest.CaptureFixture[str]) -> None:
    report = fastopt.check(kind, **options)
    printed = capsys.readouterr().out
    assert report
    assert printed.strip() == str(report)
    found = {(finding.backend, finding.what) for finding in report}
    for backend in (BACKEND, "reference"):
        for what in ("float64", "float32", "bfloat16", "float16"):
            assert (backend, what) in found
    assert all(finding.error <= finding.allowed < 0.01 for finding in report)


HARD = "hard gradients: how many are wrong"
WRONG: dict[str, Any] = {
    # what a kernel would do, and which findings are wrong then
    "a little": (lambda p: p.mul_(1 + 1e-5), {"float64", "float32"}),
    "the last": (
        lambda p: p.flatten()[-1:].add_(0.5),
        {"float64", "float32", "bfloat16", "float16"},
    ),
    "infinite": (lambda p: p.nan_to_num_(0.0, 0.0, 0.0), {HARD}),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_kernels_are_seen(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that is off is found out; infinities among the hard gradients."""
    change, expected = WRONG[what]
    take = Adam._take_step  # type: ignore[attr-defined]

    def take_and_change(self: Any, *args: Any) -> None:
        take(self, *args)
        if fastopt.dispatch.insisted() == BACKEND:
            for group in self.param_groups:
                for p in group["params"]:
                    if p.is_contiguous():
                        change(p.data)

    monkeypatch.setattr(Adam, "_take_step", take_and_change)
    report = fastopt.check(Adam)
    assert not report
    assert {f.what for f in report if not f} == expected
    assert {f.backend for f in report if not f} == {BACKEND}


def test_what_is_no_rule() -> None:
    with pytest.raises(TypeError, match="optimizers made by fastopt"):
        fastopt.check(torch.optim.Adam)
    with pytest.raises(TypeError, match="samples are for losses"):
        fastopt.check(Adam, torch.ones(3))
    with pytest.raises(TypeError, match="Adam has no option 'betas'"):
        fastopt.check(Adam, betas=(0.9, 0.99))


def test_half_precision_is_for_what_is_stored() -> None:
    """The definition in torch's operations, too, computes in float32: a square would be 0."""
    p = Parameter(torch.ones(3, dtype=torch.float16))
    p.grad = torch.full_like(p, 1e-5)
    optimizer = Adam([p], lr=0.25, eps=1e-9)
    with fastopt.use_backend("reference"):
        optimizer.step()
    assert (p.detach() - 0.75).abs().max() <= 5e-4  # a rounding

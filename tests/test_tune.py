"""Crossovers that are measured on a machine: what is kept, and when it is used."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from fastopt import _tune
from fastopt.front import measured
from fastopt.front.crossover import NEVER
from fastopt.front.measured import Limits

LIMITS = {
    "mse_loss": Limits(12_288, {}),
    "cross_entropy": Limits(4_096, {4: ((15, 8_192), (79, NEVER)), 8: ((31, 0),)}),
}


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache folder of the test's own, for it and its children."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured.read.cache_clear()
    yield tmp_path / "fastopt" / "crossovers.json"
    measured.read.cache_clear()


def fastopt(*arguments: str) -> str:
    """What ``python -m fastopt`` prints."""
    done = subprocess.run(
        [sys.executable, "-m", "fastopt", *arguments], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_is_written_is_read(home: Path) -> None:
    assert measured.read().limits == {}
    assert "defaults" in measured.read().source
    assert measured.write(LIMITS, "2026-01-02") == home
    assert measured.read().limits == LIMITS
    assert measured.read().source == f"measured on 2026-01-02, in {home}"
    assert [file.name for file in home.parent.iterdir()] == [home.name]  # and no part of one


def test_another_process_uses_it(home: Path) -> None:
    measured.write(LIMITS, "2026-01-02")
    program = (
        "import torch, fastopt\n"
        "F = fastopt.nn.functional\n"
        "for n, c in ((1, 12288), (1, 12287)):\n"
        "    print(fastopt.explain(F.mse_loss, *[torch.rand(n, c)] * 2)[0].backend)\n"
        "for n, c in ((4, 1024), (3, 1024), (1024, 8), (1023, 8), (1 << 15, 64)):\n"
        "    given = torch.rand(n, c), torch.zeros(n).long()\n"
        "    print(fastopt.explain(F.cross_entropy, *given)[0].backend)\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stderr == ""
    served = ["numba", "reference", "numba", "reference", "numba", "reference", "reference"]
    assert done.stdout.split() == served
    report = fastopt()
    assert f"measured on 2026-01-02, in {home}" in report
    assert "any number in rows of up to 79 classes of 4 bytes" in report


def test_other_machines_keep_theirs(monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured with another processor, torch or number of threads is not used."""
    measured.write(LIMITS, "2026-01-02")
    here = measured.machine()
    assert all(
        part in here
        for part in (torch.__version__, f"{torch.get_num_threads()} threads", "fastopt")
    )
    monkeypatch.setattr(measured, "machine", lambda: "another one")
    measured.read.cache_clear()
    assert measured.read().limits == {}
    assert f"of other machines ({here})" in measured.read().source
    other = {"l1_loss": Limits(1, {})}
    measured.write(other, "2026-01-03")
    assert measured.read().limits == other
    measured.forget()
    assert measured.read().limits == {}
    monkeypatch.setattr(measured, "machine", lambda: here)
    measured.read.cache_clear()
    assert measured.read().limits == LIMITS


@pytest.mark.parametrize(
    "spoil",
    [
        lambda good: "",
        lambda good: "[]",
        lambda good: "{",
        lambda good: "null",
        lambda good: "\0\xff",
        lambda good: "[" * 100_000,
        lambda good: good.replace('"format": 1', '"format": 2'),
        lambda good: good.replace("12288", "-1"),
        lambda good: good.replace("12288", "1.5"),
        lambda good: good.replace("12288", "true"),
        lambda good: good.replace("12288", '"12288"'),
        lambda good: good.replace('"rows": {}', '"rows": []'),
        lambda good: good.replace('"date"', '"day"'),
        lambda good: json.dumps({"format": 1, "machines": []}),
    ],
)
def test_a_file_that_is_none(spoil: Callable[[str], str], home: Path) -> None:
    """It is as if there were none, and the report says so."""
    measured.write(LIMITS, "2026-01-02")
    good = home.read_text()
    bad = spoil(good)
    assert bad != good
    home.write_text(bad, encoding="latin-1")
    measured.read.cache_clear()
    assert measured.read().limits == {}
    assert f"{home} can't be read" in measured.read().source
    measured.write(LIMITS, "2026-01-03")  # and a new one takes its place
    assert measured.read().limits == LIMITS


def test_forgetting(home: Path) -> None:
    assert "forgotten" in fastopt("tune", "--forget")  # where there is nothing
    measured.write(LIMITS, "2026-01-02")
    assert str(home) in fastopt("tune", "--forget")
    assert not home.exists()


def test_nowhere_to_keep_it(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home.parent.write_text("a file where the folder should be")
    with pytest.raises(OSError, match="fastopt"):
        measured.write(LIMITS, "2026-01-02")
    monkeypatch.setattr(measured, "user_cache", lambda: None)
    with pytest.raises(OSError, match="no home folder"):
        measured.forget()
    measured.read.cache_clear()
    assert "defaults" in measured.read().source


@pytest.mark.parametrize("first", range(3, 9))
def test_bisection(first: int) -> None:
    asked = []

    def pays(size: int) -> bool:
        asked.append(size)
        return size >= first

    assert _tune.first_that(pays, 3, 8) == min(first, 8)
    assert len(asked) <= 5
    assert all(3 <= size < 8 for size in asked)


def test_bisection_asks_again() -> None:
    """One answer that was noise doesn't make torch's own loss give way where it is faster."""
    wrong = [True]

    def pays(size: int) -> bool:
        return size >= 7 or (size == 5 and bool(wrong) and wrong.pop())

    assert _tune.first_that(pays, 3, 8) == 7


def test_the_slower_one_never_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only torch's calls move, or only fastopt's, decides about every size."""
    now = [0.0]
    ours, theirs = _tune.FUNCTIONS["l1_loss"], _tune.OPERATIONS["l1_loss"].twin
    slow: dict[str, Any] = {}

    def timed(which: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(**tensors: Any) -> Any:
            now[0] += slow[which]
            return function(**tensors)

        return call

    monkeypatch.setattr(_tune.time, "perf_counter", lambda: now[0])
    monkeypatch.setitem(_tune.FUNCTIONS, "l1_loss", timed("ours", ours))
    monkeypatch.setattr(_tune.OPERATIONS["l1_loss"], "twin", staticmethod(timed("theirs", theirs)))
    for ours_takes, theirs_takes, limit in ((0.9, 1.0, 1 << 12), (1.0, 1.0, NEVER)):
        slow.update(ours=ours_takes, theirs=theirs_takes)
        assert _tune._measure("l1_loss", torch.float32, 128, lambda: None) == limit


def test_the_command(home: Path) -> None:
    """It measures what it is asked for, and leaves what was measured before."""
    measured.write({"mse_loss": Limits(1, {})}, "2026-01-02")
    assert "l1_loss" in fastopt("tune", "--only", "l1_loss")
    measured.read.cache_clear()
    limits = measured.read().limits
    assert limits.keys() == {"mse_loss", "l1_loss"}
    assert limits["mse_loss"].crossover == 1
    found = limits["l1_loss"].crossover
    assert found in {1 << k for k in range(_tune.SMALLEST, _tune.NONE)} | {NEVER}

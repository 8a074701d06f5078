"""Random data are the same in every run."""

import importlib.util
import sys
from pathlib import Path

import hypothesis
import hypothesis.strategies as st
import pytest


@hypothesis.settings(derandomize=True, database=None, max_examples=200)
@hypothesis.given(data=st.data())
def draw_some(data: st.DataObject, drawn: list[int]) -> None:
    drawn.append(data.draw(st.integers(0, 2**40)))


def test_hypothesis_draws_the_same_whatever_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before: list[int] = []
    draw_some(drawn=before)
    source = "numbers = [" + ", ".join(str(7919 * n) for n in range(100, 1000)) + "]\n"
    (tmp_path / "some_numbers.py").write_text(source)
    spec = importlib.util.spec_from_file_location("some_numbers", tmp_path / "some_numbers.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "some_numbers", module)
    spec.loader.exec_module(module)
    after: list[int] = []
    draw_some(drawn=after)
    assert before == after

"""Watching the losses that a backend computes, by whichever way they reach it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from cases import BACKEND

import fastopt


def watch_losses(monkeypatch: pytest.MonkeyPatch, note: Callable[[Any, Any], object]) -> None:
    """Have `note` see each call's options and what `forward` gives.

    That is the backend's, or of what it has bound to a kind of calls; where the latter leaves a
    call to the backend, there is one result.
    """
    backend, inside = fastopt.dispatch.load(BACKEND), []

    def watched(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            inside.append(forward)
            try:
                result = forward(*arguments)
            finally:
                inside.pop()
            if not inside:
                note(arguments[-3], result)
            return result

        return call

    monkeypatch.setattr(backend, "forward", watched(backend.forward))
    if hasattr(backend, "bind"):
        from fastopt.kernels.numba.bound import Bound

        monkeypatch.setattr(Bound, "forward", watched(Bound.forward))

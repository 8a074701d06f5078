"""Torch's hooks around a step, at the cost of those that are there."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

__all__ = ["with_hooks"]

_profiling = torch._C._autograd._profiler_enabled
_record = torch._C._profiler._RecordFunctionFast


def with_hooks(step: Callable[..., Any]) -> Callable[..., Any]:
    """What ``Optimizer.profile_hook_step`` makes of a step, 6 µs faster where nobody looks on.

    Those 6 µs are the record that a profiler would show. Without one, it is opened by the same
    library's faster way, for what else may observe torch's functions.
    """
    theirs = Optimizer.profile_hook_step(step)

    @functools.wraps(step)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        if (
            torch.compiler.is_compiling()
            or _profiling()
            or self._optimizer_step_pre_hooks
            or self._optimizer_step_post_hooks
            or _global_optimizer_pre_hooks
            or _global_optimizer_post_hooks
        ):
            return theirs(self, *args, **kwargs)
        with _record(f"Optimizer.step#{type(self).__name__}.step"):
            result = step(self, *args, **kwargs)
            self._optimizer_step_code()
        return result

    return wrapper

"""Backward passes that compiled autograd calls and doesn't read.

It would follow them into whatever prepares a kernel, with warnings of what can't be traced there.
"""

from __future__ import annotations

from typing import Any

import torch


@torch.compiler.disable  # type: ignore[untyped-decorator]
def backward(function: type[torch.autograd.Function], ctx: Any, *grad_outputs: Any) -> Any:
    """That of a function of autograd, as in an eager backward pass.

    Args:
        ctx: what compiled autograd has in place of the function's own, which is behind it.
    """
    return function.backward(ctx, *grad_outputs)

"""fastopt.convert: running optimizers and losses inside models change sides in place."""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

import torch
import torch.nn.utils.clip_grad as torchs_clipping
from torch.nn.modules.loss import _Loss
from torch.optim import Optimizer

from ._language_models import convert_language_models
from .errors import wrapper_hint
from .front.call import LossModule
from .nn._operations import MODULES
from .nn.utils.clip_grad import FUNCTIONS as CLIPPING
from .optim._operations import TORCHS
from .optim._planned import PlannedStep
from .optim._torchs_step import TorchsStep
from .optim.swa_utils import AveragedModel

__all__ = ["convert"]

_Subject = TypeVar("_Subject", Optimizer, torch.nn.Module, ModuleType)
_Twins = dict[type, type]
#: Torch's functions that clip gradients, as they were when fastopt was imported.
_CLIPPING: dict[str, Callable[..., Any]] = {
    name: getattr(torch.nn.utils, name) for name in CLIPPING
}


def convert(subject: _Subject, to: str = "fastopt") -> _Subject:
    """Make a torch optimizer, the losses in a model, or gradient clipping fastopt's; or torch's.

    It happens in place, by a change of class: the object, its state and hyperparameters, its
    hooks, and whoever holds it (schedulers, a GradScaler, a framework) stay as they are.
    Frameworks that keep an optimizer's `step` should be given it afterwards.

    Of `torch.nn.utils` the functions that clip gradients are replaced, for whoever looks them up
    there when it calls them, as Accelerate and Lightning do. Nothing else replaces them.

    Args:
        subject: an optimizer whose class is torch's own and one that fastopt has, too; or a
            module, of which every loss changes whose class fastopt has, itself included, and so
            does an AveragedModel. Losses called as functions in a forward are no modules, and
            stay torch's, but for causal language models of transformers: there the head, a
            Linear, and `loss_function` change, so that in training the loss is linear
            cross-entropy and `outputs.logits` are computed only if they are read. Or
            `torch.nn.utils`.
        to: "fastopt" or "torch".

    Returns:
        subject.

    Warns:
        UserWarning: names the loss modules and language models that were left alone, and why (a
            loss has an option that torch's class has not, say); or the functions of
            `torch.nn.utils` that somebody else has replaced.

    Raises:
        TypeError: an optimizer of another class (of a subclass, too, whose own ways could be
            lost), or whose `step` has been replaced; or something else than all of these.
        ValueError: another `to`; or an optimizer with a max_grad_norm, a state_dtype or a rounding,
            or with an AveragedModel that its steps update, which would be lost.

    Example:
        >>> optimizer = fastopt.convert(optimizer)
        >>> model = fastopt.convert(model)
        >>> fastopt.convert(optimizer, to="torch")
        >>> fastopt.convert(torch.nn.utils)
        >>> fastopt.convert(torch.nn.utils, to="torch")
    """
    if to not in ("fastopt", "torch"):
        raise ValueError(f"to={to!r} (supported: 'fastopt', 'torch')")
    if isinstance(subject, Optimizer):
        ours = to == "fastopt" and isinstance(subject, PlannedStep | TorchsStep)
        if not ours:  # a subclass of ours, too
            _convert_optimizer(subject, _twins(TORCHS, to), to)
    elif isinstance(subject, torch.nn.Module):
        _convert_modules(subject, _twins({**MODULES, "AveragedModel": AveragedModel}, to), to)
    elif subject is torch.nn.utils:
        _convert_clipping(to)
    else:
        raise TypeError(
            f"cannot convert an object of {_name(type(subject))} "
            "(supported: optimizers and modules, and torch.nn.utils)"
        )
    return subject


def _twins(ours: Mapping[str, type], to: str) -> _Twins:
    """Torch's classes are the bases of ours; torch may have ours under their names by now."""
    pairs = [(kind, _torchs(kind)) for kind in ours.values()]
    return {theirs: ours for ours, theirs in pairs} if to == "fastopt" else dict(pairs)


def _torchs(kind: type) -> type:
    return next(base for base in kind.__bases__ if base.__name__ == kind.__name__)


def _name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"


def _convert_optimizer(optimizer: Any, twins: _Twins, to: str) -> None:
    kind = type(optimizer)
    if kind in twins.values():
        return
    if kind not in twins:
        supported = ", ".join(_name(k) for k in twins)
        raise TypeError(
            f"cannot convert an object of {_name(kind)} (supported: {supported}; no subclasses)"
            f"{wrapper_hint(optimizer)}"
        )
    replaced = vars(optimizer).get("step")
    counts = getattr(replaced, "_wrapped_by_lr_sched", False)
    if replaced is not None and not (counts and replaced.__wrapped__ is kind.step):
        raise TypeError(
            f"cannot convert an object of {_name(kind)} whose step has been replaced by "
            f"{replaced!r}, which would go on to call the old one; convert it before that"
        )
    limit = vars(optimizer).get("max_grad_norm")
    if limit is not None and to == "torch":
        raise ValueError(
            f"cannot convert an optimizer with max_grad_norm={limit}, which torch's does not have, "
            "to torch; set it to None first, and call clip_grad_norm_ before its steps"
        )
    if to == "torch" and getattr(optimizer, "_is_rounded", False):
        raise ValueError(
            f"cannot convert an optimizer with state_dtype={optimizer.state_dtype}, "
            f"rounding={optimizer.rounding!r}, which torch's does not have, to torch; load its "
            "state_dict into one made without them"
        )
    followers = getattr(optimizer, "_followers", ())
    if to == "torch" and any(average() is not None for average, _ in followers):
        raise ValueError(
            "cannot convert an optimizer whose steps update an AveragedModel, which torch's don't, "
            "to torch; make one without optimizer= first"
        )
    vars(optimizer).pop("_planner", None)
    optimizer.__class__ = twins[kind]
    optimizer._patch_step_function()  # as at the beginning and after unpickling: hooks, profiling
    if counts:
        optimizer.step = _counting(optimizer)


def _counting(optimizer: Any) -> Any:
    """What a scheduler replaces an optimizer's step by, to see that it is called before its own."""
    held, step = weakref.ref(optimizer), type(optimizer).step

    @functools.wraps(step)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        optimizer: Any = held()
        optimizer._opt_called = True
        return step(optimizer, *args, **kwargs)

    wrapper._wrapped_by_lr_sched = True  # type: ignore[attr-defined]
    return wrapper


def _convert_modules(subject: torch.nn.Module, twins: _Twins, to: str) -> None:
    left = []
    for path, module in subject.named_modules():
        kind = type(module)
        if kind in twins and "forward" not in vars(module) and not _beyond(module):
            vars(module).pop("_averager", None)
            module.__class__ = twins[kind]
        elif kind not in twins.values() and (why := _why_left(module, twins, to)):
            left.append(f"{path or 'the module itself'} ({why})")
    left += convert_language_models(subject, to)
    if left:
        warnings.warn(f"fastopt.convert left alone: {', '.join(left)}", stacklevel=3)


def _beyond(module: Any) -> dict[str, Any]:
    """The options that torch's class has not, and would be lost."""
    return module._beyond() if isinstance(module, LossModule) else {}


def _convert_clipping(to: str) -> None:
    """Replace the functions, in the module that has them from another one in that as well."""
    left = []
    for name, torchs in _CLIPPING.items():
        old, new = (torchs, CLIPPING[name]) if to == "fastopt" else (CLIPPING[name], torchs)
        for module in (torch.nn.utils, torchs_clipping):
            found = getattr(module, name, None)
            if found is old:
                setattr(module, name, new)
            elif found not in (None, new):
                left.append(f"{module.__name__}.{name} (replaced by {found!r})")
    if left:
        warnings.warn(f"fastopt.convert left alone: {', '.join(left)}", stacklevel=3)


def _why_left(module: Any, twins: _Twins, to: str) -> str | None:
    """Of a loss module that doesn't change, the reason; None if it is no loss, or on that side."""
    name = type(module).__name__
    if isinstance(module, torch.jit.ScriptModule):  # torch's own, always
        name = getattr(module, "original_name", name)
        known = to == "fastopt" and name in {kind.__name__ for kind in twins}
        return f"{name}, compiled by torch.jit" if known else None
    is_ours = isinstance(module, LossModule)
    if not isinstance(module, _Loss) or is_ours == (to == "fastopt"):
        return None
    if beyond := _beyond(module):
        return f"{name}, whose {', '.join(beyond)} torch's has not"
    if type(module) in twins:
        return f"{name}, whose forward has been replaced"
    parent = next((kind for kind in twins if isinstance(module, kind)), None)
    if parent is not None:
        return f"{name}, a subclass of {parent.__name__}, whose own ways could be lost"
    return f"{name}, of which fastopt has none"

"""Optimizers that users write: a rule for one element, made into a class."""

from __future__ import annotations

import difflib
import functools
import hashlib
import inspect
import keyword
import linecache
import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, overload

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT, _use_grad_for_differentiable

from .. import formula
from ..front.records import name_for, register
from ..front.written import Written, read
from ..kernels.operation import Update
from ._kinds import default_counter, numbers_of
from ._planned import PlannedStep
from ._rule_source import Formulas, formulas_of

__all__ = ["Rule", "optimizer"]

_AUTOMATIC = ("maximize", "differentiable", "fused")
#: What groups, states and a step's tables have under these names already.
_RESERVED_OPTIONS = {"params", "foreach", "capturable", "max_grad_norm", "found_inf", *_AUTOMATIC}
_RESERVED_STATES = {"step", "grad", "average"}
#: What torch's optimizers say of a negative number.
_NOT_NEGATIVE = {
    "lr": "Invalid learning rate: {}",
    "weight_decay": "Invalid weight_decay value: {}",
    "eps": "Invalid epsilon value: {}",
}


class Rule(Optimizer):
    """An optimizer by a user's rule, in torch's operations: what torch's classes are to others."""

    _record: ClassVar[type[Update]]
    _counts_steps: ClassVar[bool]
    #: the defaults of the rule's options
    _options: ClassVar[Mapping[str, bool | int | float]]
    #: what the states begin as, by their names
    _beginnings: ClassVar[Mapping[str, float]]

    def __init__(
        self,
        params: ParamsT,
        *,
        maximize: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
        **options: float | Tensor,
    ) -> None:
        if unknown := options.keys() - self._options.keys():
            raise TypeError(_unknown_option(type(self), sorted(unknown)[0]))
        options = {**self._options, **options}
        for name, value in options.items():
            _check_option(name, value, self._options[name])
        if fused:
            if differentiable:
                raise RuntimeError("`fused` does not support `differentiable`")
            self._step_supports_amp_scaling = True
        defaults = {
            **options, "maximize": maximize, "differentiable": differentiable, "fused": fused
        }  # fmt: skip
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as torch's optimizers do; its options are checked first."""
        for name in param_group if isinstance(param_group, dict) else ():
            if name in self._options:
                _check_option(name, param_group[name], self._options[name])
            elif name not in self.defaults and _near(type(self), name, 0.8):
                raise TypeError(_unknown_option(type(self), name))
        super().add_param_group(param_group)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # of a checkpoint from before the rule had an option
            for name, value in self.defaults.items():
                group.setdefault(name, value)

    @_use_grad_for_differentiable
    def step(self, closure: Any = None) -> Any:
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        grad_scale, found_inf = (getattr(self, n, None) for n in ("grad_scale", "found_inf"))
        if found_inf is not None and found_inf.item():
            return loss
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    _update(self, group, param, grad_scale)
        return loss


def _update(optimizer: Any, group: dict[str, Any], param: Tensor, grad_scale: Any) -> None:
    """Update one parameter and its states by the rule, in torch's operations."""
    grad = param.grad
    assert grad is not None
    if grad.is_sparse:
        raise RuntimeError(f"{type(optimizer).__name__} does not support sparse gradients")
    state, step = {}, None
    if optimizer._counts_steps or optimizer._beginnings:
        state = optimizer.state[param]
    if optimizer._counts_steps:
        if "step" not in state:
            dtype, device = default_counter(optimizer, param, group)
            state["step"] = torch.zeros((), dtype=dtype, device=device)
        step = state["step"]
        step += 1
    for name in optimizer._beginnings:
        if state.get(name) is None:
            state[name] = optimizer._begin(name, param, group)
    written = [param, *(state[name] for name in optimizer._beginnings)]
    if torch.is_complex(param):  # a rule is one of real numbers
        *written, grad = map(torch.view_as_real, (*written, grad))
    if grad_scale is not None:
        grad = grad / grad_scale.to(grad.device)
    numbers = _numbers(optimizer, group, step)
    # Half precision is for what is stored, as in kernels; gradients' squares would be 0 in it.
    wide = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in (*written, grad)]
    new = optimizer._record.update(numbers, wide[0], wide[-1], *wide[1:-1])
    for old, value in zip(written, new, strict=True):
        if isinstance(value, Tensor):
            old.copy_(value)
        else:
            old.fill_(value)


def _numbers(optimizer: Any, group: dict[str, Any], step: Tensor | None) -> SimpleNamespace:
    """What a rule's `update` finds in its record: Python's numbers, where no option is a tensor."""
    record: Any = optimizer._record
    given = {name: group[name] for name in optimizer._options}
    has_tensors = torch.compiler.is_compiling()
    for name, value in given.items():
        if isinstance(value, Tensor):
            has_tensors, given[name] = True, value.squeeze()
        elif not isinstance(value, bool | np.bool_):  # of NumPy's types some would round
            given[name] = float(value)
    sign = -1.0 if group["maximize"] else 1.0
    numbers = SimpleNamespace(grad_scale=sign, **given)
    if record.derived:
        wide = SimpleNamespace(**{name: _wide(value) for name, value in given.items()})
        derived = record.at_step(wide, _wide(0.0 if step is None else step))
        for name, value in zip(record.derived, derived, strict=True):
            setattr(numbers, name, value if has_tensors else value.item())
    return numbers


def _wide(number: Any) -> Tensor:
    if isinstance(number, Tensor):
        return number.double()
    return torch.tensor(float(number), dtype=torch.float64, device="cpu")


class _Planned(PlannedStep):
    """What every class made of a rule says to its plan."""

    _record: ClassVar[Any]
    _beginnings: ClassVar[Mapping[str, float]]

    def _begin(self, name: str, param: Tensor, group: dict[str, Any]) -> Tensor:
        number = self._beginnings.get(name, 0.0)  # a compensation is none of the rule's
        return torch.full_like(param, number, memory_format=torch.preserve_format)


@overload
def optimizer(rule: Callable[..., Any], /) -> type[Rule]: ...
@overload
def optimizer(
    *, states: Sequence[str] | Mapping[str, float] = ()
) -> Callable[[Callable[..., Any]], type[Rule]]: ...
def optimizer(
    rule: Callable[..., Any] | None = None, /, *, states: Sequence[str] | Mapping[str, float] = ()
) -> Any:
    r"""Decorator: makes an optimizer of a rule for one element.

    The rule takes one number of the parameter, of its gradient (negated if ``maximize``) and of
    each state, and returns the new parameter and the new states, in that order. What it is
    written in is :mod:`fastopt.formula`. It is compiled for CPUs and GPUs, and is the reference
    in torch's operations as well.

    The class that it becomes is a :class:`torch.optim.Optimizer`. Its constructor takes
    parameters, or groups of them, and by keyword the rule's options, and ``maximize``,
    ``differentiable``, ``fused`` (leave a GradScaler's scale and verdict to the step) and
    ``max_grad_norm``, ``state_dtype``, ``rounding`` and ``seed``, as :class:`fastopt.optim.Lion`
    does. States have the parameter's shape,
    dtype and layout. Parameters may be float64, float32, bfloat16 or float16.

    Args:
        rule: a function whose positional parameters are the parameter, its gradient and the
            states. Its keyword-only parameters are the options: numbers, or True and False,
            which are conditions. A keyword-only ``step`` without a default is the number of the
            step, from 1 on; a parameter then has a state ``step``, as in torch's optimizers.
            What options, step and literals alone decide is computed in float64, once a tensor.
        states: the names of the states, in the rule's order; they begin as zeros. Or a mapping
            of the names to the numbers that they begin as.

    Returns:
        The class, under the rule's name.

    Raises:
        TypeError: the rule is no function defined by ``def``, or states are no names.
        FormulaError: with file and line, for what a rule can't say, or where parameters,
            states and results don't fit together.

    Example:
        >>> from fastopt import formula as m
        >>> @fastopt.optimizer(states=("exp_avg",))
        ... def Lion(param, grad, exp_avg, *, lr=1e-4, beta1=0.9, beta2=0.99, weight_decay=0.0):
        ...     update = m.sign(beta1 * exp_avg + (1 - beta1) * grad)
        ...     exp_avg = beta2 * exp_avg + (1 - beta2) * grad
        ...     return param - lr * (update + weight_decay * param), exp_avg
        >>> optimizer = Lion(model.parameters(), lr=3e-4)
        >>> loss.backward(); optimizer.step(); optimizer.zero_grad()
    """
    if rule is not None:
        return _class_of(rule, {})
    return functools.partial(_class_of, beginnings=_beginnings(states))


def _beginnings(states: Any) -> dict[str, float]:
    """What the states begin as, by their names."""
    if isinstance(states, str) or not isinstance(states, Sequence | Mapping):
        raise TypeError(f"states={states!r} (supported: a tuple of names, or a dict of numbers)")
    names = list(states)
    for name in names:
        if not isinstance(name, str) or not name.isidentifier() or keyword.iskeyword(name):
            raise TypeError(f"states has {name!r}, which is no name of a parameter")
        if names.count(name) > 1:
            raise TypeError(f"states has {name!r} twice")
        if name in _RESERVED_STATES or name.startswith("_"):
            taken = ", ".join(sorted(_RESERVED_STATES))
            raise TypeError(f"states has {name!r} (not supported: {taken}, and names with _ first)")
    numbers = dict(states) if isinstance(states, Mapping) else dict.fromkeys(names, 0.0)
    for name, number in numbers.items():
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise TypeError(f"the state {name!r} begins as {number!r} (supported: a number)")
    return {name: float(number) for name, number in numbers.items()}


def _class_of(rule: Any, beginnings: dict[str, float]) -> type[Rule]:
    written = read(rule, given=("step",))
    _check_signature(written, beginnings)
    record = _record_of(f"{name_for(rule)}_rule", formulas_of(written), tuple(written.options))
    register(record)
    name = rule.__name__
    automatic = {"maximize": False, "differentiable": False, "fused": None}
    usual = {**written.options, **automatic}
    defaults = usual, numbers_of(usual)
    members = {
        "__doc__": rule.__doc__ or f"The optimizer by the rule {name}; see fastopt.optimizer.",
        "__init__": _constructor(usual),
        "__module__": rule.__module__,
        "__qualname__": rule.__qualname__,
        "_beginnings": beginnings,
        "_counts_steps": "step" in written.given,
        "_defaults_of": staticmethod(lambda twin: defaults),
        "_operation": name,
        "_options": dict(written.options),
        "_record": record,
    }
    return type(name, (_Planned, Rule), members)


def _check_signature(written: Written, beginnings: Mapping[str, float]) -> None:
    """That tensors, options, states and results fit together."""
    states = tuple(beginnings)
    if len(written.tensors) < 2 or written.tensors[2:] != states:
        expected = ", ".join(("param", "grad", *states))
        raise written.error(
            None,
            f"takes ({', '.join(written.tensors)}), with states={states}; its positional "
            f"parameters have to be the parameter, its gradient and the states: ({expected})",
        )
    written.expect_results((written.tensors[0], *states))
    for name in written.options:
        if name in _RESERVED_OPTIONS or name.startswith("_") or hasattr(Update, name):
            raise written.error(
                None, f"an option can't have the name {name}, which means something else already"
            )


def _constructor(usual: Mapping[str, Any]) -> Callable[..., None]:
    """A constructor that says which options it takes."""

    def __init__(self: Any, params: ParamsT, **options: Any) -> None:
        Rule.__init__(self, params, **options)

    kinds = inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY
    parameters = [inspect.Parameter(name, kinds[0]) for name in ("self", "params")]
    parameters += [inspect.Parameter(n, kinds[1], default=v) for n, v in usual.items()]
    __init__.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return __init__


# A cell of a notebook that is run again as it is has the same record, and nothing is compiled.
@functools.lru_cache(maxsize=128)
def _record_of(name: str, formulas: Formulas, options: tuple[str, ...]) -> type[Update]:
    """The record of a rule."""
    # Another rule of that name, which may still run, is another file; the same one is the same file
    # in each process.
    file = f"<{name} {hashlib.sha256(formulas.source.encode()).hexdigest()[:16]}>"
    # There, compilers find the source.
    lines = formulas.source.splitlines(keepends=True)
    entry = linecache.cache[file] = len(formulas.source), None, lines, file
    # Without __name__: who finds one looks for the names in that module, as torch.compile does.
    made: dict[str, Any] = {formulas.vocabulary: formula}
    exec(compile(formulas.source, file, "exec", dont_inherit=True), made)
    members = {
        "__annotations__": dict.fromkeys(options, float),
        "__doc__": f"The options of {name}.",
        "derived": formulas.derived,
    }
    for definition in ("at_step", "update"):
        if definition in made:
            made[definition].__module__ = __name__
            made[definition].__qualname__ = f"{name}.{definition}"
            members[definition] = made[definition]
    record = type(name, (Update,), members)
    weakref.finalize(record, _forget_source, file, entry).atexit = False
    return record


def _forget_source(file: str, entry: Any) -> None:
    """Unless it has become the source of another record."""
    if linecache.cache.get(file) is entry:
        del linecache.cache[file]


# -- what options may be ------------------------------------------------------------------


def _check_option(name: str, value: Any, default: bool | int | float) -> None:
    """Refuse what an option can't be; what torch's optimizers refuse as well, in their words."""
    if type(default) is bool:
        if not isinstance(value, bool | np.bool_):
            raise TypeError(f"Invalid {name}: {value!r} (supported: True and False)")
        return
    is_number = isinstance(value, int | float | np.integer | np.floating)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"Tensor {name} must be 1-element")
        is_number = not value.is_complex() and value.dtype != torch.bool
    if not is_number or isinstance(value, bool):
        raise TypeError(f"Invalid {name}: {value!r} (supported: numbers and one-element tensors)")
    if name in _NOT_NEGATIVE and not value >= 0.0:
        raise ValueError(_NOT_NEGATIVE[name].format(value))
    if not isinstance(value, Tensor) and math.isnan(value):
        raise ValueError(f"Invalid {name} value: {value}")


def _near(kind: type[Rule], name: str, likeness: float) -> list[str]:
    return difflib.get_close_matches(name, kind._options, 1, likeness)


def _unknown_option(kind: type[Rule], name: str) -> str:
    near = "".join(f"; did you mean {option}?" for option in _near(kind, name, 0.5))
    options = ", ".join((*kind._options, *_AUTOMATIC, "max_grad_norm"))
    return f"{kind.__name__} has no option {name!r}{near} (its options: {options})"

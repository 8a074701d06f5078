"""A step as one operator of torch.library: what a graph of torch.compile has of an optimizer.

``fastopt::optimizer_step`` is given the parameters that have a gradient, those gradients, the
states that there are and the options that are tensors, and changes parameters and states where
they are. So a compiler knows what a step reads and writes, though not what it computes. All else is
read from the optimizer while the operator runs: a learning rate that is a number may change from
step to step, and no graph is compiled anew.

A compiler may hand over copies, which it writes back itself. So the step is not the optimizer's,
but that of a stand-in of the same class with the same options, which has the tensors that the
operator is given. It is an eager step, with a plan, a proof and launches as any other.
"""

from __future__ import annotations

import itertools
import weakref
from collections import defaultdict
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._dynamo.symbolic_convert import InstructionTranslator

from .. import dispatch
from ._plan import all_params
from ._planned import PlannedStep
from ._planner import Planner
from ._proof import increment_versions

__all__ = ["step_in_graph"]

#: What a compiled function may set of an optimizer before a step, which doesn't read it.
_UNREAD = {"_opt_called", "_step_count", "grad_norm"}
_NOTHING = torch.empty(0)

# -- while a graph is traced ----------------------------------------------------------------


def step_in_graph(optimizer: PlannedStep) -> bool:
    """Put a step into the graph that is being traced; False if it has to be torch's own code."""
    backend = dispatch.insisted_while_tracing()
    facts = optimizer._facts_for_graph(backend)
    if facts.changed:
        # The operator would read what was there before: such changes are made after a graph.
        torch._dynamo.graph_break(msg="an optimizer's options or states change before its step")
    # The optimizer's own attribute would have a guard for the value of every option.
    groups = vars(optimizer)["param_groups"]
    follows = optimizer._followers or any(group.get("differentiable") for group in groups)
    if follows or not facts.served:
        return False
    every = [param for group in groups for param in group["params"]]
    # Before any state: a gradient that is first found by way of a key of `state` is guarded as
    # that one object.
    found = [param.grad for param in every]
    places = [k for k, grad in enumerate(found) if grad is not None]
    params, grads = [every[k] for k in places], [found[k] for k in places]
    if any(g.dtype != p.dtype or g.is_sparse for p, g in zip(params, grads)):  # noqa: B905
        return False
    states, cells = [], []
    for k, param in enumerate(params):
        state = optimizer.state.get(param)
        for n, name in enumerate(facts.states):
            value = None if state is None else state.get(name)
            if value is not None:
                states.append(value)
                cells.append(k * len(facts.states) + n)
    options = []
    for group, name, item in facts.options:
        value = groups[group][name]
        options.append(value if item < 0 else value[item])
    if params:
        clips = optimizer.max_grad_norm is not None
        with torch.no_grad():
            norm = torch.ops.fastopt.optimizer_step.default(
                optimizer._name_in_graphs, params, grads, places, states, cells, options,
                clips, backend,
            )  # fmt: skip
        if clips:  # for who reads it in the same graph; later readers find what the operator sets
            object.__setattr__(optimizer, "grad_norm", norm)
    return True


class Facts(NamedTuple):
    """What is true of an optimizer while a graph is traced.

    Attributes:
        changed: whether the function that is traced has changed an option or a state already.
        served: whether kernels serve any parameter; the operator has torch's code for the others.
        states: the names of those that a step may change.
        options: which are tensors: of each its group, name and place in a pair, or -1.
    """

    changed: bool
    served: bool
    states: tuple[str, ...]
    options: tuple[tuple[int, str, int], ...]


def facts_of(optimizer: PlannedStep, backend: str | None) -> Facts:
    """The facts, and a name for the optimizer if it has none: it is part of a graph's guards.

    Args:
        backend: what the function that is traced insists on.

    Raises:
        BackendUnavailable: that can't serve every parameter.
        RuntimeError: the function has assigned an attribute that the step depends on.
    """
    with nullcontext() if backend is None else dispatch.use_backend(backend):
        decisions = optimizer._decisions(compiled=True)
    if optimizer._name_in_graphs is None:
        known = InGraph(optimizer)
        optimizer._in_graph, optimizer._name_in_graphs = known, known.name
    return Facts(
        _is_being_changed(optimizer),
        not decisions or any(decision.backend != "reference" for decision in decisions),
        state_names(optimizer),
        tensor_options(optimizer),
    )


def state_names(optimizer: PlannedStep) -> tuple[str, ...]:
    """Of the states that a step may change."""
    counter = ("step",) if optimizer._counts_steps else ()
    return *optimizer._slots, *optimizer._scalars, *counter


def tensor_options(optimizer: PlannedStep) -> tuple[tuple[int, str, int], ...]:
    """Which options are tensors; see `Facts`."""
    found = []
    for k, group in enumerate(optimizer.param_groups):
        for name in optimizer._defaults_of(optimizer._twin)[0]:
            value = group.get(name)
            if isinstance(value, Tensor):
                found.append((k, name, -1))
            elif isinstance(value, (tuple, list)):
                found += [(k, name, i) for i, v in enumerate(value) if isinstance(v, Tensor)]
    return tuple(found)


def _is_being_changed(optimizer: PlannedStep) -> bool:
    """See `Facts`."""
    effects = InstructionTranslator.current_tx().output.side_effects
    for variable, names in effects.store_attr_mutations.items():
        if getattr(variable, "value", None) is optimizer and not _UNREAD.issuperset(names):
            raise RuntimeError(
                f"{', '.join(set(names) - _UNREAD)} of an optimizer assigned inside torch.compile, "
                "which loses what is assigned to an optimizer (supported: outside of it)"
            )
    known = effects.id_to_variable
    groups, state = optimizer.param_groups, optimizer.state
    lists = [group["params"] for group in groups]
    things: list[Any] = [vars(optimizer), groups, *groups, *lists, state, *state.values()]
    variables = [known[id(thing)] for thing in things if id(thing) in known]
    return any(v.mutation_type is not None and effects.is_modified(v) for v in variables)


# A method, as torch 2.10 passes no objects to functions that it runs while it traces.
torch.compiler.assume_constant_result(PlannedStep._facts_for_graph)  # type: ignore[no-untyped-call]


# -- while a graph runs ---------------------------------------------------------------------


class InGraph:
    """What the operator knows of an optimizer, for as long as that lives.

    Attributes:
        name: what it is known by. The first of each process has the same one, so that a graph
            which torch keeps on disk is found again.
    """

    def __init__(self, optimizer: PlannedStep) -> None:
        self._optimizer = weakref.ref(optimizer)
        #: By the places of the parameters that have a gradient: a stand-in's plan and parameters.
        self._casts: dict[tuple[int, ...], tuple[Planner, list[Tensor]]] = {}
        self.name = f"{type(optimizer).__name__} {next(_numbers)}"
        _in_graphs[self.name] = self

    def step(
        self, params: list[Tensor], grads: list[Tensor], places: list[int], states: list[Tensor],
        cells: list[int], options: list[Tensor],
    ) -> Tensor | None:  # fmt: skip
        """Take a step; arguments as those of the operator. Returns the gradients' norm, if any."""
        optimizer = self._optimizer()
        if optimizer is None:
            raise RuntimeError("a graph has a step of an optimizer that is no longer there")
        every = all_params(optimizer)
        owners = [every[place] for place in places]
        names = state_names(optimizer)
        given: list[dict[str, Tensor]] = [{} for _ in params]
        for cell, state in zip(cells, states, strict=True):
            k, n = divmod(cell, len(names))
            given[k][names[n]] = state
        fresh = Planner(), [torch.empty(0) for _ in params]
        planner, shells = self._casts.setdefault(tuple(places), fresh)
        with planner._lock:
            stand_in: PlannedStep = object.__new__(type(optimizer))
            before = {
                **vars(optimizer),
                "_planner": planner,
                "_followers": (),
                "param_groups": _groups(optimizer, dict(zip(places, shells, strict=True)), options),
                "state": defaultdict(dict),
            }
            vars(stand_in).update(before)
            for shell, owner, own in zip(shells, owners, given, strict=True):
                if owner in optimizer.state:
                    stand_in.state[shell] = {**optimizer.state[owner], **own}
            try:
                for shell, param, grad in zip(shells, params, grads, strict=True):
                    shell.data, shell.grad = param, None
                    shell.grad = grad
                PlannedStep.step(stand_in)  # without hooks, which are in the graph
            finally:
                for shell in shells:  # the memory is the optimizer's, to be kept or released
                    shell.grad, shell.data = None, _NOTHING
        increment_versions(params)
        for shell, owner, own in zip(shells, owners, given, strict=True):
            if shell in stand_in.state:
                _hand_over(stand_in.state[shell], optimizer.state[owner], own)
        after = vars(stand_in).items()
        vars(optimizer).update({n: v for n, v in after if v is not before.get(n)})
        return stand_in.grad_norm


def _groups(
    optimizer: PlannedStep, shells: dict[int, Tensor], options: list[Tensor]
) -> list[dict[str, Any]]:
    """An optimizer's groups, of a stand-in's parameters and with the options that are given."""
    groups, place = [], 0
    for group in optimizer.param_groups:
        end = place + len(group["params"])
        params = [shells[k] for k in range(place, end) if k in shells]
        groups.append({**group, "params": params})
        place = end
    found = tensor_options(optimizer)
    if len(found) != len(options):
        raise RuntimeError(
            f"{len(found)} of the groups' options are tensors, and {len(options)} were when the "
            "step was compiled (supported: what were numbers stay numbers, or "
            "torch.compiler.reset() and the step is compiled anew)"
        )
    for (k, name, item), option in zip(found, options, strict=True):
        value = groups[k][name]
        if item >= 0:
            option = (*value[:item], option, *value[item + 1 :])  # type: ignore[assignment]
        groups[k][name] = option
    return groups


def _hand_over(found: dict[str, Any], state: dict[str, Any], given: dict[str, Tensor]) -> None:
    """To an optimizer's state what a step has made of a stand-in's."""
    for name, value in found.items():
        if name not in given:
            state[name] = value
        elif value is not given[name]:
            given[name].copy_(value)


_numbers = itertools.count()
_in_graphs: weakref.WeakValueDictionary[str, InGraph] = weakref.WeakValueDictionary()


def _run(
    name: str, params: list[Tensor], grads: list[Tensor], places: list[int],
    states: list[Tensor], cells: list[int], options: list[Tensor], clips: bool,
    backend: str | None,
) -> Tensor:  # fmt: skip
    known = _in_graphs.get(name)
    if known is None:
        raise RuntimeError("a graph has a step of an optimizer that is no longer there")
    with nullcontext() if backend is None else dispatch.use_backend(backend):
        norm = known.step(params, grads, places, states, cells, options)
    return _norm_like(grads, clips) if norm is None or not clips else norm.detach().double()


def _norm_like(grads: list[Tensor], clips: bool) -> Tensor:
    return grads[0].new_empty(() if clips else (0,), dtype=torch.float64)


_library: Any = torch.library.Library("fastopt", "FRAGMENT")  # type: ignore[no-untyped-call]
_library.define(
    "optimizer_step(str name, Tensor(a!)[] params, Tensor[] grads, int[] places, "
    "Tensor(b!)[] states, int[] cells, Tensor[] options, bool clips, str? backend) -> Tensor",
    # A CUDA graph would replay the numbers that were there when it was captured.
    tags=(torch.Tag.needs_exact_strides, torch.Tag.cudagraph_unsafe),
)
_library.impl("optimizer_step", _run, "CompositeExplicitAutograd")
_library._register_fake("optimizer_step", lambda *arguments: _norm_like(arguments[2], arguments[7]))

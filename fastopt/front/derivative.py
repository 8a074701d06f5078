"""Derivatives of formulas, as further operations of their graphs.

Backwards from the value each operation learns the derivative by it, and passes that times its own
derivatives on to its arguments. What has gone through a side of `where` that may not be the chosen
one carries the condition along, and becomes 0 by it at the end, not before: a 0 on the way would
meet infinite derivatives of what isn't chosen, and their product is NaN. Where derivatives jump,
they are what torch's are.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from math import pi, sqrt

from .graph import LEAVES, Graph

__all__ = ["derivatives"]

#: Conditions, with what they have to be for a derivative to count.
Guard = tuple[tuple[int, bool], ...]
Term = tuple[Guard, int]


def derivatives(graph: Graph, value: int, tensors: Sequence[str]) -> list[int]:
    """The derivatives of an operation by some tensors, as operations; 0 of what it doesn't use."""
    wanted = [graph.tensor(name) for name in tensors]
    depends = {*wanted}
    for node, (name, arguments) in enumerate(graph.operations[: value + 1]):
        if name not in LEAVES and depends.intersection(arguments):
            depends.add(node)
    terms: dict[int, list[Term]] = defaultdict(list)
    terms[value].append(((), graph.number(1.0)))
    for node in range(value, -1, -1):
        if node in wanted or node not in depends or node not in terms:
            continue
        guard, slope = _merged(graph, terms.pop(node))
        for argument, further, part in _passed_on(graph, node, slope):
            if argument in depends and (joined := _joined(guard, further)) is not None:
                terms[argument].append((joined, part))
    results = []
    for node in wanted:
        guard, slope = _merged(graph, terms[node]) if node in terms else ((), graph.number(0.0))
        results.append(_closed(graph, guard, slope))
    return results


def _joined(guard: Guard, further: Guard) -> Guard | None:
    """Both of them; None where they can't hold together."""
    for condition, holds in further:
        if (condition, not holds) in guard:
            return None
        if (condition, holds) not in guard:
            guard = (*guard, (condition, holds))
    return guard


def _closed(graph: Graph, guard: Guard, slope: int) -> int:
    """The slope where the guard holds, else 0."""
    for condition, holds in reversed(guard):
        zero = graph.number(0.0)
        slope = graph.call("where", condition, *((slope, zero) if holds else (zero, slope)))
    return slope


def _merged(graph: Graph, terms: list[Term]) -> Term:
    """The sum of all terms as one: what is guarded by opposite conditions is a choice of one."""
    sums: dict[Guard, int] = {}
    for guard, slope in terms:
        _put(graph, sums, guard, slope)
    pair: tuple[Guard, Guard] | None
    while (pair := _opposite(sums)) is not None:
        holds, fails = (sums.pop(guard) for guard in pair)
        choice = graph.call("where", pair[0][-1][0], holds, fails)
        _put(graph, sums, pair[0][:-1], choice)
    if len(sums) == 1:
        return next(iter(sums.items()))
    common = 0
    while len({guard[: common + 1] for guard in sums}) == 1:
        common += 1
    shared = next(iter(sums))[:common]
    total = indicator = None
    for guard, slope in sums.items():
        part = _closed(graph, guard[common:], slope)
        total = part if total is None else _sum(graph, total, part)
        counts = _closed(graph, guard[common:], graph.number(1.0))
        indicator = counts if indicator is None else graph.call("+", indicator, counts)
    assert total is not None
    assert indicator is not None
    if all(guard[common:] for guard in sums):  # where none of them holds, nothing counts
        shared = (*shared, (graph.call(">", indicator, graph.number(0.0)), True))
    return shared, total


def _put(graph: Graph, sums: dict[Guard, int], guard: Guard, slope: int) -> None:
    sums[guard] = _sum(graph, sums[guard], slope) if guard in sums else slope


def _sum(graph: Graph, a: int, b: int) -> int:
    if a == b:
        return graph.call("*", graph.number(2.0), a)
    if graph.operations[a][0] == "negative":  # b - a is shorter than -a + b
        a, b = b, a
    return graph.call("+", a, b)


def _opposite(sums: dict[Guard, int]) -> tuple[Guard, Guard] | None:
    """Two guards that differ by their last condition alone, first the one where it holds."""
    for guard in sums:
        if guard and guard[-1][1]:
            other = (*guard[:-1], (guard[-1][0], False))
            if other in sums:
                return guard, other
    return None


def _passed_on(graph: Graph, node: int, slope: int) -> Iterator[tuple[int, Guard, int]]:
    """For arguments of an operation: what more guards the derivative by it, and that.

    Args:
        node: the operation.
        slope: the derivative of the value by it.
    """
    name, arguments = graph.operations[node]
    call, number = graph.call, graph.number

    def times(factor: int) -> int:
        return call("*", slope, factor)

    a = arguments[0]
    b = arguments[1] if len(arguments) > 1 else a
    match name:
        case "+":
            yield a, (), slope
            yield b, (), slope
        case "-":
            yield a, (), slope
            yield b, (), call("negative", slope)
        case "*":
            yield a, (), times(b)
            yield b, (), times(a)
        case "/":
            part = call("/", slope, b)
            yield a, (), part
            yield b, (), call("negative", call("*", part, node))
        case "negative":
            yield a, (), call("negative", slope)
        case "power":
            lower = call("power", a, call("-", b, number(1.0)))
            zero = call("==", b, number(0.0))
            guard = () if graph.number_of(zero) is not None else ((zero, False),)
            yield a, guard, times(call("*", b, lower))
            # of 0 to any power from 0 on the logarithm is infinite, and the slope 0
            size = call("where", call(">=", b, number(0.0)), call("abs", a), number(1.0))
            yield (
                b,
                ((call("==", size, number(0.0)), False),),
                times(call("*", node, call("log", a))),
            )
        case "abs":
            yield a, (), times(call("sign", a))
        case "maximum" | "minimum":
            beyond, other = ("<", ">") if name == "maximum" else (">", "<")
            half = call("*", slope, number(0.5))
            shared = call("where", call("==", a, b), half, slope)
            yield a, ((call(beyond, a, b), False),), shared
            yield b, ((call(other, a, b), False),), shared
        case "where":
            _, first, second = arguments
            yield first, ((a, True),), slope
            yield second, ((a, False),), slope
        case "exp":
            yield a, (), times(node)
        case "expm1":
            yield a, (), times(call("exp", a))
        case "log":
            yield a, (), call("/", slope, a)
        case "log1p":
            yield a, (), call("/", slope, call("+", number(1.0), a))
        case "sqrt":
            yield a, (), call("/", call("*", slope, number(0.5)), node)
        case "rsqrt":
            yield a, (), call("*", times(number(-0.5)), call("*", node, call("*", node, node)))
        case "tanh":
            yield a, (), times(call("-", number(1.0), call("*", node, node)))
        case "sigmoid":
            yield a, (), times(call("*", node, call("-", number(1.0), node)))
        case "softplus":
            yield a, (), times(call("sigmoid", a))
        case "log_sigmoid":
            yield a, (), times(call("sigmoid", call("negative", a)))
        case "erf":
            square = call("exp", call("negative", call("*", a, a)))
            yield a, (), times(call("*", number(2.0 / sqrt(pi)), square))
        case "sign":
            pass  # its steps have no slope
        case _:
            raise AssertionError(name)

"""What an operation is to a backend: a record of its options with a formula as a method.

The *type* of a record chooses the code that a loop is compiled with. Its fields of type float
are numbers that a kernel is given, those of type `float | None` ones that may be missing; those of
type bool or int are part of the compiled code.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any, ClassVar, NamedTuple

import torch
from typing_extensions import dataclass_transform  # of typing from Python 3.11 on

__all__ = [
    "NEVER", "Elementwise", "Gather", "LinearSoftmax", "Loss", "Operation", "Options", "Rowwise",
    "Softmax", "Update",
]  # fmt: skip

#: The crossover of a loss whose kernel is the slower one at any size.
NEVER = 1 << 40


@dataclass_transform(frozen_default=True)
class Operation:
    """The base of all records. A subclass is a frozen dataclass by itself.

    Attributes:
        numbers, flags: the names of the fields of type float, and of type bool or int.
        formulas: the names of the methods that are compiled.
        twin: torch's function.
        operands: the names of the tensors.
        arranged: whether `arrange` has something to do.
        checked: whether torch refuses some numbers. The formula makes NaN of those.
        crossover: elements from which compiled code is at least as fast as torch's on a CPU;
            where a class says nothing, what is usual for a function like its twin.
        row_crossover: the same for rows of up to so many classes side by side, by the bytes of
            a number: pairs (classes, elements), in order.
        compiled_crossover: the same for a call inside torch.compile, whose own code for a loss is
            one pass, too, and is taken at any size where a class says nothing.
        variants: keyword arguments of usual calls that are compiled apart from each other.
        rescaled: whether gradients for one grad_output are sooner made those for another one than
            computed.
        further: the names of options that torch's function has not.
    """

    numbers: ClassVar[tuple[str, ...]]
    flags: ClassVar[tuple[str, ...]]
    formulas: ClassVar[tuple[str, ...]] = ()
    _fields: ClassVar[tuple[str, ...]]
    twin: ClassVar[Any]
    operands: ClassVar[tuple[str, ...]]
    arranged: ClassVar[bool] = False
    checked: ClassVar[bool] = False
    crossover: ClassVar[int]
    row_crossover: ClassVar[Mapping[int, tuple[tuple[int, int], ...]]] = {}
    compiled_crossover: ClassVar[int] = NEVER
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    rescaled: ClassVar[bool] = False
    further: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        if cls.__dict__.get("_abstract"):
            return
        dataclasses.dataclass(frozen=True)(cls)
        fields = dataclasses.fields(cls)  # type: ignore[arg-type]
        cls.numbers = tuple(f.name for f in fields if f.type in ("float", float))
        cls.flags = tuple(f.name for f in fields if f.type in ("bool", bool, "int", int))
        cls._fields = (*cls.numbers, *cls.flags)

    def beyond(self) -> dict[str, Any]:
        """The options, of those that torch's function has not, that aren't the usual ones."""
        given = {name: getattr(self, name) for name in self.further}
        return {name: v for name, v in given.items() if v != getattr(type(self), name)}

    @property
    def values(self) -> tuple[float, ...]:
        """The numbers, in their order."""
        return tuple([float(getattr(self, name)) for name in self.numbers])

    @property
    def settings(self) -> tuple[int, ...]:
        """The flags, in their order."""
        return tuple([getattr(self, name) for name in self.flags])


class Loss(Operation):
    """A loss that formulas say all about.

    Attributes:
        reductions: those it has.
        required: the operands that have to be given.
        followed: the operands that there is a derivative by.
        constants: the operands that have no derivative in torch, either.
        decisive: the operands whose dtypes decide about the result's.
        integers: the operands that may be integers.
        label: the operand that holds class indices, if there is one.
        same_dtypes: whether all operands have to be of one dtype.
        halves_on_cpu: whether torch has it in half precision on the CPU.
        autocast: whether it is on autocast's float32 list.
        domains: what the numbers of an operand are, where not any: "unit" for 0 to 1, "positive",
            "sign" for 1 or -1, "log" for logarithms of probabilities.
    """

    _abstract = True
    reductions: ClassVar[tuple[str, ...]] = ("none", "mean", "sum")
    required: ClassVar[tuple[str, ...]]
    followed: ClassVar[tuple[str, ...]]
    constants: ClassVar[tuple[str, ...]] = ()
    decisive: ClassVar[tuple[str, ...]]
    integers: ClassVar[tuple[str, ...]] = ()
    label: ClassVar[str | None] = None
    same_dtypes: ClassVar[bool] = False
    halves_on_cpu: ClassVar[bool] = True
    autocast: ClassVar[bool] = True
    domains: ClassVar[dict[str, str]] = {}

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.arranged = cls.arrange is not Loss.arrange

    def refuse(self) -> str | None:
        """The option of which torch has to say what is wrong with it, if there is one."""
        return None

    def arrange(self, *operands: Any) -> tuple[Any, ...] | None:
        """The operands as a kernel takes them; None where torch refuses their sizes."""
        return operands

    def warning(self, reduction: str, *operands: Any) -> str | None:
        """What torch warns of at such a call."""
        return None


class Elementwise(Loss):
    """A loss whose value at a place depends on its operands at that place alone.

    `value_and_slopes(h, *operands)` is the formula: from one number of each operand (1 for one
    that was not given) the value, and its derivatives by the first operands, one after another.

    Attributes:
        slopes: of how many of them, from the first on, there is a derivative.
        factor: what all derivatives are still to be multiplied by. It goes into the scale of
            the gradients ahead of all elements, where a factor in the formula might overflow.
        averaged_by: the operand, if given, by whose sum the mean divides.
        same_sizes: whether the first two operands have to be of one size.
        weighted_as_input: whether the other operands have to be of the first one's size.
        warns_of_sizes: whether torch warns where the first two operands are of different sizes.
    """

    _abstract = True
    formulas = ("value_and_slopes",)
    slopes: ClassVar[int] = 1
    factor: ClassVar[float] = 1.0
    averaged_by: ClassVar[str | None] = None
    same_sizes: ClassVar[bool] = False
    weighted_as_input: ClassVar[bool] = False
    warns_of_sizes: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        parameters = inspect.signature(cls.value_and_slopes).parameters
        cls.operands = cls.decisive = tuple(parameters)[1:]
        cls.required, cls.followed = cls.operands[:2], cls.operands[: cls.slopes]

    def value_and_slopes(self, *operands: Any) -> Any:
        raise NotImplementedError

    def warning(self, reduction: str, *operands: Any) -> str | None:
        if not self.warns_of_sizes:
            return None
        first, second = operands[:2]
        if first.shape == second.shape:
            return None
        return (
            f"Using a target size ({second.size()}) that is different to the input size "
            f"({first.size()}). This will likely lead to incorrect results due to broadcasting. "
            "Please ensure they have the same size."
        )


class Rowwise(Loss):
    """A loss that has one value for a row, of what its operands are at the row's classes.

    Its formulas, of numbers (1 for an operand that was not given):

    - `fold(h, *at a class, *of the row)`: what is to be summed over the classes, a tuple;
    - `finish(h, classes, *sums, *of the row)`: the value, and coefficients for `slopes`;
    - `slopes(h, *coefficients, *at a class, *of the row)`: the derivatives by the columns there.

    At a class are the columns and the weights of classes. Of the row are the numbers that it
    has; and if it has a label, the columns and the weights there, and, but for `finish`, whether
    the class is the label.

    Attributes:
        columns: the operands of a number for each class of each row, which have derivatives.
        by_class: the operands of a number for each class.
        by_row: the operands of a number for each row. (`label` has a class index for each.)
        sums: how many numbers `fold` gives.
        most_dims: how many dimensions columns may have, None for any number.
    """

    _abstract = True
    formulas = ("fold", "finish", "slopes")
    columns: ClassVar[tuple[str, ...]]
    by_class: ClassVar[tuple[str, ...]] = ()
    by_row: ClassVar[tuple[str, ...]] = ()
    sums: ClassVar[int] = 1
    most_dims: ClassVar[int | None] = None

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        of_row = (*cls.by_row, *([cls.label] if cls.label else []))
        cls.operands = (*cls.columns, *cls.by_class, *of_row)
        cls.required, cls.followed = (*cls.columns, *of_row), cls.columns
        cls.decisive = (*cls.columns, *cls.by_class)

    def fold(self, *numbers: Any) -> Any:
        raise NotImplementedError

    def finish(self, classes: Any, *numbers: Any) -> Any:
        raise NotImplementedError

    def slopes(self, *numbers: Any) -> Any:
        raise NotImplementedError


class Softmax(Operation):
    """A loss of a softmax over classes: of logits, a target and perhaps a weight for each class.

    Its record has an `ignore_index`, a `label_smoothing`, a `z_loss` and a `softcap`.
    """

    _abstract = True
    operands = ("input", "target", "weight")
    further = ("z_loss", "softcap")


class LinearSoftmax(Operation):
    """A loss of a softmax over the classes of a linear layer, the layer included.

    Its record has what the same loss of logits has.
    """

    _abstract = True
    operands = ("input", "linear_weight", "target", "linear_bias", "weight")
    rescaled = True
    further = ("z_loss", "softcap")


class Gather(Operation):
    """A loss of one number for each position, that of its class: minus it times a class weight.

    Its record has an `ignore_index`.
    """

    _abstract = True
    operands = ("input", "target", "weight")


@dataclasses.dataclass(frozen=True)
class Update(Operation):
    """What an optimizer does to each element of a parameter, in a step.

    Its fields are hyperparameters, all of them numbers: a step has a table of them, with a row for
    each group of parameters. Its formulas:

    - `update(h, param, grad, *states)`: the new parameter and states. A state that this optimizer
      doesn't have with its options is None;
    - `next_numbers(h, step, *scalars)`: what the states that are one number become in a step, a
      tuple. They are given in their dtypes, of 16 bits in float32, as is the step's number;
    - `at_step(h, step, *old, *new)`: what depends on the step but not on the element, a tuple; once
      a tensor, in float64. old and new are the states that are one number.

    Attributes:
        slots: the names of the states.
        scalars: the names of the states that are one number, beside the step.
        derived: the names by which `update` finds in `h` what `at_step` gives.
        grad_scale: multiplies each gradient first: -1 to maximise, 1/scale under a GradScaler.
    """

    _abstract = True
    formulas = ("next_numbers", "at_step", "update")
    slots: ClassVar[tuple[str, ...]]
    scalars: ClassVar[tuple[str, ...]] = ()
    derived: ClassVar[tuple[str, ...]] = ()
    grad_scale: float

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        cls.slots = tuple(inspect.signature(cls.update).parameters)[3:]

    @property
    def row(self) -> tuple[Any, ...]:
        """The hyperparameters as they were given, which may be tensors."""
        return tuple([getattr(self, name) for name in self.numbers])

    def next_numbers(self, step: Any, *scalars: Any) -> Any:
        return ()

    def at_step(self, step: Any, *scalars: Any) -> Any:
        return ()

    def update(self, param: Any, grad: Any, *states: Any) -> Any:
        raise NotImplementedError


class Options(NamedTuple):
    """One call of a loss without its tensors.

    Attributes:
        record: the operation's.
        reduction: "none", "mean", "sum" or "batchmean".
        dtype: the dtype of the result.
        grad_output: what the backward pass is expected to be given, None if that is unknown.
            A backend that can't look at a grad_output before its kernels run is told 1 or None.
    """

    record: Operation
    reduction: str
    dtype: torch.dtype
    grad_output: float | None = 1.0

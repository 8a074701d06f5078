"""The traversal of an optimizer's tensors: a block of one tensor a program.

A table on the device has a line of int64 for each slot (the addresses of the parameters and of
each state), for the gradients' and for the step counters' addresses, and the three below, each
with an entry for every tensor.
"""

from __future__ import annotations

import triton.language as tl

from .compiler import device_function, kernel
from .rounding import key_of, stochastic, word_of

#: Lines after the addresses: elements, first block, whether all addresses are multiples of 16.
COUNT, FIRST, ALIGNED = range(3)


@device_function
def entries(table, place, stride, COUNT: tl.constexpr):
    """A tuple of the numbers at place, place + stride, …"""
    values = ()
    for k in tl.static_range(COUNT):
        values = values + (tl.load(table + k * stride + place),)
    return values


@kernel
def derive(
    hypers, row_of, steps, behind, step, scalars, found_inf, constants, tensors,
    STEP: tl.constexpr, FORMULA: tl.constexpr, MAKE: tl.constexpr, FIELDS: tl.constexpr,
    SCALARS: tl.constexpr, WIDE: tl.constexpr, NEXT: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr, DRAWN: tl.constexpr,
):  # fmt: skip
    """The numbers of each tensor's update at this step, and counters on the device one further.

    They are the hyperparameters, FIELDS of them, and what the FORMULA, if any, makes of them.

    steps: the table's line of the counters' addresses, and STEP their dtype. Where they are on
    the host, step is the largest of their new values, and behind how many each is behind.
    scalars: of each state that is one number, of the dtypes SCALARS and computed with in WIDE ones,
    a line of addresses; where they are on the host, of the numbers themselves, and it is the host
    that stores what NEXT makes of them.
    DRAWN: whether random numbers are; then the words of their streams are behind the rows, a line
    each, and the words of their keys, as they are, go behind the constants.
    """
    tensor = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = tensor < tensors
    values = ()
    row = tl.load(row_of + tensor, mask=inside, other=0)
    for k in tl.static_range(FIELDS):
        values = values + (tl.load(hypers + row * FIELDS + k),)
    if steps is not None:
        address = tl.load(steps + tensor, mask=inside, other=0)
        counter = address.to(tl.pointer_type(STEP))
        there = inside & (address != 0)  # else it has no gradient
        count = tl.load(counter, mask=there, other=0.0)
        taken = there
        if found_inf is not None:
            taken = tl.where(tl.load(found_inf) == 0, there, False)
        tl.store(counter, count + 1, mask=taken)
        now = count.to(tl.float64) + 1
    elif behind is not None:
        now = tl.cast(step, tl.float64) - tl.load(behind + tensor, mask=inside, other=0.0)
    else:
        now = tl.zeros([BLOCK], tl.float64)
    old = ()
    for k in tl.static_range(len(SCALARS)):
        place = scalars + k * tensors + tensor
        if steps is not None:
            number = tl.load(place, mask=inside, other=0).to(tl.pointer_type(SCALARS[k]))
            old = old + (tl.load(number, mask=there, other=0.0).to(WIDE[k]),)
        else:
            old = old + (tl.load(place, mask=inside, other=0.0).to(WIDE[k]),)
    numbers = ()
    if len(SCALARS) > 0:
        new = NEXT(MAKE(values, ()), now.to(STEP), *old)
        for k in tl.static_range(len(SCALARS)):
            numbers = numbers + (old[k].to(tl.float64),)
        for k in tl.static_range(len(SCALARS)):
            rounded = new[k].to(SCALARS[k])
            numbers = numbers + (rounded.to(tl.float64),)
            if steps is not None:
                place = tl.load(scalars + k * tensors + tensor, mask=inside, other=0)
                tl.store(place.to(tl.pointer_type(SCALARS[k])), rounded, mask=taken)
    if FORMULA is not None:
        values = values + FORMULA(MAKE(values, ()), now, *numbers)
    for k in tl.static_range(len(values)):
        tl.store(constants + k * tensors + tensor, values[k].to(COMPUTE), mask=inside)
    if DRAWN:
        first = tl.load(row_of + tensors + tensor, mask=inside, other=0).to(tl.uint32)
        second = tl.load(row_of + 2 * tensors + tensor, mask=inside, other=0).to(tl.uint32)
        key = key_of(first, second, now.to(tl.uint32))
        words = (constants + len(values) * tensors).to(tl.pointer_type(tl.uint32))
        for k in tl.static_range(2):
            tl.store(words + k * tensors + tensor, key[k], mask=inside)


@device_function
def rounded_update(
    numbers, grad, record, offset, first, second, SLOTS: tl.constexpr, CODES: tl.constexpr,
    DTYPES: tl.constexpr, FORMULA: tl.constexpr, STATES: tl.constexpr,
):  # fmt: skip
    """What the slots of a block become: numbers that their DTYPES have.

    CODES: how each of the SLOTS is stored; STATES: the states that the FORMULA takes.
    """
    param = numbers[0]
    if SLOTS > STATES + 1:
        param += numbers[SLOTS - 1]
    new = FORMULA(record, param, grad, *numbers[1 : STATES + 1])
    stored = ()
    for k in tl.static_range(STATES + 1):
        value = new[k]
        if CODES[k] >= 0:
            word = word_of(offset, first, second, CODES[k] // 2)
            value = stochastic(value, word, CODES[k] % 2, DTYPES[k]).to(new[k].dtype)
        stored = stored + (value,)
    if SLOTS > STATES + 1:
        lost = new[0] - new[0].to(DTYPES[0]).to(new[0].dtype)
        stored = stored + (tl.where(tl.abs(lost) < float("inf"), lost, 0.0),)
    return stored


@device_function
def update_block(
    table, tensor, tensors, offset, mask, values, averaging, scale, first, second,
    LINES: tl.constexpr, DTYPES: tl.constexpr, FORMULA: tl.constexpr, MAKE: tl.constexpr,
    RULE: tl.constexpr, COMPUTE: tl.constexpr, VECTORS: tl.constexpr, ROUNDING: tl.constexpr,
    STATES: tl.constexpr,
):  # fmt: skip
    """Update the elements `offset` of one tensor. VECTORS: all addresses are multiples of 16.

    averaging: the record of the RULE, if any, by which what is stored of the parameter goes into
    the last slot, its average.
    ROUNDING: how the slots are stored, if not all are to nearest, with the words first and second
    of the key of random numbers, and STATES of the slots among the arguments of the formula.
    """
    numbers = ()
    for k in tl.static_range(len(LINES)):
        start = tl.load(table + LINES[k] * tensors + tensor).to(tl.pointer_type(DTYPES[k]))
        if VECTORS:
            start = tl.multiple_of(start, 16)
        numbers = numbers + (tl.load(start + offset, mask=mask).to(COMPUTE),)
    grad = numbers[len(LINES) - 1]
    if scale is not None:
        grad *= scale
    if ROUNDING is not None:
        new = rounded_update(
            numbers, grad, MAKE(values, ()), offset, first, second, len(ROUNDING), ROUNDING,
            DTYPES, FORMULA, STATES,
        )  # fmt: skip
    elif RULE is None:
        new = FORMULA(MAKE(values, ()), numbers[0], grad, *numbers[1 : len(LINES) - 1])
    else:
        new = FORMULA(MAKE(values, ()), numbers[0], grad, *numbers[1 : len(LINES) - 2])
    if RULE is not None:
        stored = new[0].to(DTYPES[0]).to(COMPUTE)
        new = new + RULE(averaging, numbers[len(LINES) - 2], stored)
    for k in tl.static_range(len(LINES) - 1):
        start = tl.load(table + LINES[k] * tensors + tensor).to(tl.pointer_type(DTYPES[k]))
        if VECTORS:
            start = tl.multiple_of(start, 16)
        tl.store(start + offset, new[k], mask=mask)


@kernel
def update_blocks(
    table, tensor_of, constants, tensors, grad_scale, found_inf, rule, LINES: tl.constexpr,
    DTYPES: tl.constexpr, FORMULA: tl.constexpr, MAKE: tl.constexpr, FIELDS: tl.constexpr,
    RULE: tl.constexpr, MAKE_RULE: tl.constexpr, RULE_FIELDS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr, ROUNDING: tl.constexpr, STATES: tl.constexpr,
    DRAWN: tl.constexpr,
):  # fmt: skip
    """Update one block. LINES of the table: the parameter's, those of states, the gradients'.

    rule: the numbers of the RULE for the parameters' averages, if they have any, whose line is
    that before the gradients'.
    """
    if found_inf is not None:
        if tl.load(found_inf) != 0:
            return
    scale = None
    if grad_scale is not None:
        scale = 1.0 / tl.load(grad_scale).to(COMPUTE)
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    rest = table + (LINES[len(LINES) - 1] + 2) * tensors + tensor
    count, first, aligned = entries(rest, 0, tensors, 3)
    values = entries(constants, tensor, tensors, FIELDS)
    key = (None, None)
    if DRAWN:
        words = (constants + FIELDS * tensors).to(tl.pointer_type(tl.uint32))
        key = entries(words, tensor, tensors, 2)
    averaging = None
    if RULE is not None:
        numbers = ()
        for k in tl.static_range(RULE_FIELDS):
            numbers = numbers + (tl.load(rule + k).to(COMPUTE),)
        averaging = MAKE_RULE(numbers, ())
    begin = (program - first) * BLOCK
    offset = begin + tl.arange(0, BLOCK)
    if (begin + BLOCK <= count) & (aligned != 0):
        update_block(
            table, tensor, tensors, offset, None, values, averaging, scale, key[0], key[1],
            LINES, DTYPES, FORMULA, MAKE, RULE, COMPUTE, True, ROUNDING, STATES,
        )  # fmt: skip
    else:
        update_block(
            table, tensor, tensors, offset, offset < count, values, averaging, scale, key[0],
            key[1], LINES, DTYPES, FORMULA, MAKE, RULE, COMPUTE, False, ROUNDING, STATES,
        )  # fmt: skip

"""The traversal of cross-entropy: tiles of ROWS positions by COLUMNS classes.

One kernel serves every layout. Where classes lie side by side a program takes one long row
or several short ones; where positions do, many positions and a few classes at a time.
Names of strides: x is the logits' ClassAxis, g the gradient's, t the probabilities'. STEP is a
power of two that all rows' starts and ends are known to be multiples of.
"""

from __future__ import annotations

import triton.language as tl

from .compiler import as_number, device_function, kernel
from .reduction import sum_all
from .vector_math import quotient


@device_function
def part(span, x, WIDE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr):
    """A program's positions, and the classes from where to where."""
    program = tl.program_id(0)
    if WIDE:
        program = program.to(tl.int64)
    begin = tl.program_id(1) * span
    end = tl.minimum(begin + span, x.classes) // STEP * STEP
    return program * ROWS + tl.arange(0, ROWS), begin, end


@device_function
def row_starts(row, axis, FLAT: tl.constexpr, STEP: tl.constexpr):
    """Where each position's first class lies.

    The strides are divided and multiplied so that the compiler sees what they are multiples of.
    """
    if FLAT:
        return row.to(tl.int64) * (axis.inner_stride // STEP * STEP)
    else:
        outer, inner = (row // axis.inner).to(tl.int64), (row % axis.inner).to(tl.int64)
        return outer * (axis.outer_stride // STEP * STEP) + inner * (
            axis.inner_stride // STEP * STEP
        )


@device_function
def tile(tensor, starts, column, axis, UNIT: tl.constexpr):
    """Pointers to the classes `column` of the positions that begin at `starts`."""
    if UNIT:
        return (tensor + starts)[:, None] + column[None, :]
    else:
        return (tensor + starts)[:, None] + (column.to(tl.int64) * axis.class_stride)[None, :]


@device_function
def with_one_more(top, total, value):
    """Each lane's largest value and its sum of exponentials relative to that, with a value more.

    One exponential is enough: of -|difference|, whichever way the largest moves. A top starts from
    the lowest finite number, because inf - inf is NaN.
    """
    difference = value - top
    factor = tl.exp(-tl.abs(difference))
    rises = difference > 0
    total = tl.where(rises, total * factor + 1.0, total + factor)
    return tl.where(rises, value, top), total


@device_function
def tanh(value):
    """By an exponential; near 0, where that leaves few digits, by Lambert's continued fraction.

    It is cut off where float64 has no digit of the rest.
    """
    magnitude = tl.abs(value)
    e = tl.exp(-2.0 * magnitude)
    near = magnitude < 0.35
    q = value * value
    above = ((q + 378.0) * q + 17325.0) * q + 135135.0
    below = ((28.0 * q + 3150.0) * q + 62370.0) * q + 135135.0
    part = tl.where(near, magnitude * above, 2.0 * e) / tl.where(near, below, 1.0 + e)
    part = tl.where(near, part, 1.0 - part)
    return tl.where(value < 0, -part, part)


@device_function
def capped(logits, softcap):
    """Logits as the softmax has them.

    The product is rounded by itself: as one operation with the difference from the largest, that
    would not be 0 for the largest.
    """
    bent = tanh(logits / softcap)
    return tl.fma(bent, tl.zeros_like(bent) + softcap, tl.zeros_like(bent))


@device_function
def join(top, total, axis: tl.constexpr):
    """The largest of several tops, and their totals relative to it, summed."""
    joint = tl.max(top, axis)
    return joint, tl.sum(total * tl.exp(top - tl.expand_dims(joint, axis)), axis)


@device_function
def soft_target(
    probability, weight, starts, column, mask, t, kept, smooth, COMPUTE: tl.constexpr,
    SMOOTH: tl.constexpr,
):  # fmt: skip
    """The coefficients of a tile but for the one that a class index puts on top."""
    share = tl.zeros(mask.shape, COMPUTE)
    if SMOOTH:
        share += smooth
    if probability is not None:
        places = tile(probability, starts, column, t, True)
        share += kept * tl.load(places, mask=mask, other=0.0).to(COMPUTE)
    if weight is not None:
        inside = column < t.classes
        share *= tl.load(weight + column, mask=inside, other=0.0).to(COMPUTE)[None, :]
    return tl.where(mask, share, 0.0)


@device_function
def statistics(
    input, probability, weight, starts, t_starts, inside, begin, end, x, t, kept, smooth, softcap,
    COMPUTE: tl.constexpr, SMOOTH: tl.constexpr, UNIT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Of classes begin to end: the largest logit, the sum of exponentials relative to it,
    and the mass of probabilities.

    Each lane of the tile keeps its own, so that nothing is exchanged between threads until the end.
    """
    top = tl.full([ROWS, COLUMNS], LOWEST, COMPUTE)
    total = tl.zeros([ROWS, COLUMNS], COMPUTE)
    mass = tl.zeros([ROWS, COLUMNS], COMPUTE)
    for start in tl.range(begin, end, COLUMNS, num_stages=STAGES):
        column = start + tl.arange(0, COLUMNS)
        mask = inside[:, None] & (column < end)[None, :]
        places = tile(input, starts, column, x, UNIT)
        value = tl.load(places, mask=mask, other=-float("inf")).to(COMPUTE)
        if softcap is not None:
            value = tl.where(mask, capped(value, softcap), -float("inf"))
        top, total = with_one_more(top, total, value)
        if probability is not None:
            mass += soft_target(
                probability, weight, t_starts, column, mask, t, kept, smooth, COMPUTE, SMOOTH
            )
    row_top, row_total = join(top, total, 1)
    return row_top, row_total, tl.sum(mass, 1)


@kernel(do_not_specialize=["kept", "smooth", "softcap"])
def row_statistics(
    input, probability, weight, tops, totals, masses, rows, span, x, t, kept, smooth, softcap,
    COMPUTE: tl.constexpr, SMOOTH: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr,
    WIDE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    STAGES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """The statistics of `span` classes of some positions, into line program_id(1)."""
    kept, smooth = as_number(kept, COMPUTE), as_number(smooth, COMPUTE)
    if softcap is not None:
        softcap = as_number(softcap, COMPUTE)
    row, begin, end = part(span, x, WIDE, STEP, ROWS)
    inside = row < rows
    starts, t_starts = row_starts(row, x, FLAT, STEP), row_starts(row, t, FLAT, STEP)
    top, total, mass = statistics(
        input, probability, weight, starts, t_starts, inside, begin, end, x, t, kept, smooth,
        softcap, COMPUTE, SMOOTH, UNIT, ROWS, COLUMNS, STAGES, LOWEST,
    )  # fmt: skip
    place = tl.program_id(1) * rows + row
    tl.store(tops + place, top, mask=inside)
    tl.store(totals + place, total, mask=inside)
    if masses is not None:
        tl.store(masses + place, mass, mask=inside)


@kernel(
    do_not_specialize=[
        "lines", "target_mass_count", "ignore_index", "kept", "smooth", "softcap", "z_loss"
    ]
)  # fmt: skip
def softmax_rows(
    input, target, probability, weight, weight_sum, tops, totals, masses, lines, target_masses,
    target_mass_count, divisor, grad_output, losses, partials, grad, t_grad, rows, span,
    ignore_index, x, t, g, kept, smooth, softcap, z_loss,
    COMPUTE: tl.constexpr, SMOOTH: tl.constexpr, GIVEN: tl.constexpr, READY: tl.constexpr,
    PER_ROW: tl.constexpr, FLAT: tl.constexpr, UNIT: tl.constexpr, G_UNIT: tl.constexpr,
    WIDE: tl.constexpr, SINGLE: tl.constexpr, STEP: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, STAGES: tl.constexpr, LINES: tl.constexpr, LOWEST: tl.constexpr,
):  # fmt: skip
    """Losses and gradients of `span` classes of some positions, each if wanted.

    t_grad is the gradient of the probabilities.

    tops, totals, masses: the rows' statistics. GIVEN: to be read, `lines` lines of them (from
    each span of classes); else to be written. READY: the gradients are there already, if
    grad_output is 1. PER_ROW: grad_output is.
    SINGLE: COLUMNS holds a whole row, which is read once and stays in registers.
    """
    kept, smooth = as_number(kept, COMPUTE), as_number(smooth, COMPUTE)
    if softcap is not None:
        softcap = as_number(softcap, COMPUTE)
    if z_loss is not None:
        z_loss = as_number(z_loss, COMPUTE)
    if READY:
        if tl.load(grad_output) == 1.0:
            return
    row, begin, end = part(span, x, WIDE, STEP, ROWS)
    inside = row < rows
    starts, t_starts = row_starts(row, x, FLAT, STEP), row_starts(row, t, FLAT, STEP)
    column = tl.arange(0, COLUMNS)

    # The rows' targets: a class index puts `hard` on its class; `soft` is the mass of the rest.
    counts = inside
    soft = tl.zeros([ROWS], COMPUTE)
    if SMOOTH and probability is None:
        if weight is not None:
            soft += smooth * tl.load(weight_sum).to(COMPUTE)
        else:
            soft += smooth * tl.cast(x.classes, COMPUTE)
    if target is not None:
        label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
        counts = inside & (label != ignore_index)
        valid = (label >= 0) & (label < x.classes)
        # Where asserts are not compiled, at least NaN and no access out of bounds.
        label = tl.where(valid, label, 0)
        hard = tl.where(valid, kept, float("nan"))
        if weight is not None:
            hard *= tl.load(weight + label).to(COMPUTE)

    # The rows' statistics.
    if SINGLE:
        mask = inside[:, None] & (column < end)[None, :]
        places = tile(input, starts, column, x, UNIT)
        value = tl.load(places, mask=mask, other=-float("inf")).to(COMPUTE)
        if softcap is not None:
            value = tl.where(mask, capped(value, softcap), -float("inf"))
        if probability is not None:
            soft = tl.sum(
                soft_target(
                    probability, weight, t_starts, column, mask, t, kept, smooth, COMPUTE, SMOOTH
                ),
                1,
            )
    if GIVEN:
        line = tl.arange(0, LINES)
        lane = (line < lines)[:, None] & inside[None, :]
        place = (line * rows)[:, None] + row[None, :]
        top = tl.load(tops + place, mask=lane, other=LOWEST)
        top, total = join(top, tl.load(totals + place, mask=lane, other=0.0), 0)
        if masses is not None:
            soft = tl.sum(tl.load(masses + place, mask=lane, other=0.0), 0)
    else:
        if SINGLE:
            top = tl.maximum(tl.max(value, 1), LOWEST)
            total = tl.sum(tl.exp(value - top[:, None]), 1)
        else:
            top, total, mass = statistics(
                input, probability, weight, starts, t_starts, inside, begin, end, x, t, kept,
                smooth, softcap, COMPUTE, SMOOTH, UNIT, ROWS, COLUMNS, STAGES, LOWEST,
            )  # fmt: skip
            if probability is not None:
                soft = mass
        if tops is not None:
            tl.store(tops + row, top, mask=inside)
            tl.store(totals + row, total, mask=inside)
            if masses is not None:
                tl.store(masses + row, soft, mask=inside)
    log_total = tl.log(total)
    inverse_total = 1.0 / total  # by division that may be off by two units in the last place

    scale = tl.full([ROWS], 1.0, COMPUTE)
    if grad_output is not None:
        if PER_ROW:
            scale = tl.load(grad_output + row, mask=inside, other=0.0).to(COMPUTE)
        else:
            scale *= tl.load(grad_output).to(COMPUTE)
    if target_masses is not None:
        whole = sum_all(target_masses, target_mass_count, 128)
        scale /= tl.where(whole != 0.0, whole, float("nan"))
    elif divisor is not None:
        scale /= tl.cast(divisor, COMPUTE)

    mass = soft  # what the softmax is multiplied by in the gradient
    if target is not None:
        mass += hard
    if z_loss is not None:
        log_sum = top + log_total
        squared = z_loss * log_sum * log_sum
        mass += 2.0 * z_loss * log_sum

    # The gradient, and the soft targets' part of the loss: last tiles first, which the first
    # pass has left in the cache.
    dot = tl.zeros([ROWS], COMPUTE)
    if grad is not None or probability is not None or SMOOTH:
        if grad is not None or t_grad is not None:
            g_starts = row_starts(row, g, FLAT, STEP)
        tiles = 1 if SINGLE else tl.cdiv(end - begin, COLUMNS)
        for back in tl.range(0, tiles, num_stages=STAGES):
            if SINGLE:
                here, valid_here, logits = column, mask, value
            else:
                here = begin + (tiles - 1 - back) * COLUMNS + column
                valid_here = inside[:, None] & (here < end)[None, :]
                places = tile(input, starts, here, x, UNIT)
                logits = tl.load(places, mask=valid_here, other=-float("inf")).to(COMPUTE)
                if softcap is not None:
                    logits = tl.where(valid_here, capped(logits, softcap), -float("inf"))
            difference = logits - top[:, None]
            if probability is not None or SMOOTH:
                share = soft_target(
                    probability, weight, t_starts, here, valid_here, t, kept, smooth, COMPUTE,
                    SMOOTH,
                )  # fmt: skip
                dot += tl.sum(tl.where(valid_here, share * difference, 0.0), 1)
            if t_grad is not None:  # which lies as grad does
                slope = (log_total[:, None] - difference) * (kept * scale)[:, None]
                if weight is not None:
                    within = here < x.classes
                    slope *= tl.load(weight + here, mask=within, other=0.0).to(COMPUTE)[None, :]
                tl.store(tile(t_grad, g_starts, here, g, True), slope, mask=valid_here)
            if grad is not None:
                slope = mass[:, None] * (tl.exp(difference) * inverse_total[:, None])
                if probability is not None or SMOOTH:
                    slope -= share
                if target is not None:
                    slope -= tl.where(here[None, :] == label[:, None], hard[:, None], 0.0)
                if softcap is not None:  # by the logit before the cap
                    bent = quotient(logits, softcap)  # 1 where it is the cap itself
                    slope *= (1.0 - bent) * (1.0 + bent)
                # Of a row that does not count the gradient is 0, whatever its logits are.
                slope = tl.where(counts[:, None], slope * scale[:, None], 0.0)
                tl.store(tile(grad, g_starts, here, g, G_UNIT), slope, mask=valid_here)

    if losses is not None or partials is not None:
        loss = -dot
        if probability is not None or SMOOTH:
            loss += tl.where(tl.program_id(1) == 0, soft * log_total, 0.0)
        if target is not None:
            # Read again, so that it need not stay in a register beside the loop.
            label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
            label = tl.where((label >= 0) & (label < x.classes), label, 0)
            if UNIT:
                logit = tl.load(input + starts + label, mask=inside, other=0.0).to(COMPUTE)
            else:
                place = starts + label * x.class_stride
                logit = tl.load(input + place, mask=inside, other=0.0).to(COMPUTE)
            if softcap is not None:
                logit = capped(logit, softcap)
            own = hard * (log_total - (logit - top))
            loss += tl.where(tl.program_id(1) == 0, own, 0.0)
        if z_loss is not None:
            loss += tl.where(tl.program_id(1) == 0, squared, 0.0)
        loss = tl.where(counts, loss, 0.0)
        if losses is not None:
            tl.store(losses + tl.program_id(1) * rows + row, loss, mask=inside)
        if partials is not None:
            partial = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
            tl.store(partials + partial, tl.sum(loss))
    if target is not None:
        # Here and of labels read again, so that no register is kept for the call that fails.
        label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
        known = (label == ignore_index) | (label >= 0) & (label < x.classes)
        tl.device_assert(known, "Target is out of bounds")


@kernel(do_not_specialize=["classes", "ignore_index"])
def target_mass(
    target, weight, masses, rows, span, classes, ignore_index, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Into masses[program]: how many of `span` positions count, or the sum of their weights."""
    begin = tl.program_id(0).to(tl.int64) * span
    lanes = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], COMPUTE)
    for start in range(begin, tl.minimum(begin + span, rows), BLOCK):
        row = start + lanes
        inside = (row < rows) & (row < begin + span)
        label = tl.load(target + row, mask=inside, other=0).to(tl.int64)
        counts = inside & (label != ignore_index)
        if weight is not None:
            counts &= (label >= 0) & (label < classes)
            total += tl.load(weight + label, mask=counts, other=0.0).to(COMPUTE)
        else:
            total += counts.to(COMPUTE)
    tl.store(masses + tl.program_id(0), tl.sum(total))

"""The traversals of an update by the mean squares of a gradient's rows and columns.

Every pass has a table of its work, two int32 for each program: a tensor, and which part of it. The
table of tensors has seven more lines than an elementwise update's (see `SHAPE` in factored.py): of
a matrix rows and columns, into how many parts the means of its rows and of its columns are cut, and
the places in scratch memory of these parts and of the means of whole matrices.

What is squared is divided by the number of elements first, so that no sum overflows where the mean
doesn't. Sums are in the compute dtype, in an order that shapes alone decide.
"""

from __future__ import annotations

import triton.language as tl

from .compiler import device_function, kernel
from .updates import entries
from .vector_math import quotient, root
from .vocabulary import maximum


@device_function
def part_of(work):
    """This program's tensor, and its part of it."""
    here = work + 2 * tl.program_id(0)
    return tl.load(here), tl.load(here + 1).to(tl.int64)


@device_function
def shape_of(table, tensor, tensors, SHAPE: tl.constexpr):
    """The seven numbers of a tensor's shape, and how many elements it has in this step."""
    numbers = entries(table + SHAPE * tensors, tensor, tensors, 7)
    count = tl.load(table + (SHAPE - 3) * tensors + tensor)
    return numbers + (count,)


@device_function
def start_of(
    table, tensor, tensors, LINE: tl.constexpr, DTYPE: tl.constexpr, VECTORS: tl.constexpr = False
):  # fmt: skip
    """Where a tensor is. VECTORS: at a multiple of 16, which has to be said of this very number."""
    start = tl.load(table + LINE * tensors + tensor).to(tl.pointer_type(DTYPE))
    if VECTORS:
        start = tl.multiple_of(start, 16)
    return start


# -- the means --------------------------------------------------------------------------------


@device_function
def rows_of_tile(
    start, rows, width, first, begin, end, inverse, SQUARES: tl.constexpr, R: tl.constexpr,
    C: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The sums of R rows over the columns from begin to end, of what is times `inverse`."""
    row, lanes = first + tl.arange(0, R), tl.arange(0, C)
    totals = tl.zeros([R, C], COMPUTE)
    for column in range(begin, end, C):
        place = column + lanes
        inside = (row < rows)[:, None] & (place < end)[None, :]
        offset = row[:, None] * width + place[None, :]
        values = tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
        if SQUARES:
            totals += values * (values * inverse)
        else:
            totals += values * inverse
    return tl.sum(totals, 1)


@device_function
def store_rows(
    start, rows, width, across, at, part, room, inverse, R: tl.constexpr, C: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Mean squares of R rows, over one of the parts of their columns."""
    first, here = part // across * R, part % across
    begin = here * (16 * C)
    end = tl.minimum(begin + 16 * C, width)
    found = rows_of_tile(start, rows, width, first, begin, end, inverse, True, R, C, COMPUTE)
    row = first + tl.arange(0, R)
    tl.store(room + at + here * rows + row, found, mask=row < rows)


@kernel
def row_means(
    table, work, tensors, grad_scale, room, GRAD: tl.constexpr, DTYPE: tl.constexpr,
    SHAPE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Parts of the rows' mean squares. Tiles as in `row_tile` of factored.py."""
    tensor, part = part_of(work)
    _, width, across, _, at, _, _, count = shape_of(table, tensor, tensors, SHAPE)
    start, rows = start_of(table, tensor, tensors, GRAD, DTYPE), count // width
    scale = scale_of(grad_scale, COMPUTE)
    inverse = quotient(scale * scale, width.to(COMPUTE))
    if width <= 4:
        store_rows(start, rows, width, across, at, part, room, inverse, 512, 4, COMPUTE)
    elif width <= 32:
        store_rows(start, rows, width, across, at, part, room, inverse, 64, 32, COMPUTE)
    else:
        store_rows(start, rows, width, across, at, part, room, inverse, 8, 256, COMPUTE)


@device_function
def store_columns(
    start, columns, height, width, down, at, part, room, inverse, K: tl.constexpr, C: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    """Mean squares of C columns of a stack of matrices, over one of the parts of their rows."""
    first, here = part // down * C, part % down
    begin = here * (16 * K)
    end = tl.minimum(begin + 16 * K, height)
    matrix = first // width
    behind = (first - matrix * width).to(tl.int32) + tl.arange(0, C)
    more = behind // width.to(tl.int32)
    corner = (matrix + more) * height * width + (behind - more * width)
    column, lanes = first + tl.arange(0, C), tl.arange(0, K)
    totals = tl.zeros([K, C], COMPUTE)
    for row in range(begin, end, K):
        place = row + lanes
        inside = (place < end)[:, None] & (column < columns)[None, :]
        offset = corner[None, :] + place[:, None] * width
        values = tl.load(start + offset, mask=inside, other=0.0).to(COMPUTE)
        totals += values * (values * inverse)
    tl.store(room + at + here * columns + column, tl.sum(totals, 0), mask=column < columns)


@kernel
def column_means(
    table, work, tensors, grad_scale, room, GRAD: tl.constexpr, DTYPE: tl.constexpr,
    SHAPE: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """Parts of the columns' mean squares. Tiles as in `column_tile` of factored.py."""
    tensor, part = part_of(work)
    height, width, _, down, _, at, _, count = shape_of(table, tensor, tensors, SHAPE)
    start, columns = start_of(table, tensor, tensors, GRAD, DTYPE), count // height
    scale = scale_of(grad_scale, COMPUTE)
    inverse = quotient(scale * scale, height.to(COMPUTE))
    if height <= 4:
        store_columns(start, columns, height, width, down, at, part, room, inverse, 4, 512, COMPUTE)
    elif columns <= 4:
        store_columns(start, columns, height, width, down, at, part, room, inverse, 512, 4, COMPUTE)
    elif columns <= 32:
        store_columns(start, columns, height, width, down, at, part, room, inverse, 64, 32, COMPUTE)
    else:
        store_columns(
            start, columns, height, width, down, at, part, room, inverse, 16, 128, COMPUTE
        )


@device_function
def scale_of(grad_scale, COMPUTE: tl.constexpr):
    """What gradients are multiplied by."""
    if grad_scale is None:
        return tl.full([], 1.0, COMPUTE)
    else:
        return 1.0 / tl.load(grad_scale).to(COMPUTE)


@device_function
def move_block(
    means, length, parts, found, block, hyper, MOVED: tl.constexpr, COMPUTE: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Have kept means take in those of this step, whose parts are `found`."""
    place = block * BLOCK + tl.arange(0, BLOCK)
    inside = place < length
    new = tl.zeros([BLOCK], COMPUTE)
    for k in range(0, parts):
        new += tl.load(found + k * length + place, mask=inside, other=0.0)
    old = tl.load(means + place, mask=inside, other=0.0).to(COMPUTE)
    tl.store(means + place, MOVED(hyper, old, new), mask=inside)


@kernel
def move_means(
    table, work, constants, tensors, room, LINES: tl.constexpr, DTYPES: tl.constexpr,
    SHAPE: tl.constexpr, MOVED: tl.constexpr, MAKE: tl.constexpr, FIELDS: tl.constexpr,
    COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of a tensor's blocks the first are of rows, the others of columns."""
    tensor, block = part_of(work)
    height, width, across, down, rows_at, columns_at, _, count = shape_of(
        table, tensor, tensors, SHAPE
    )
    hyper = MAKE(entries(constants, tensor, tensors, FIELDS), ())
    rows, columns = count // width, count // height
    of_rows = (rows + BLOCK - 1) // BLOCK
    if block < of_rows:
        means = start_of(table, tensor, tensors, LINES[1], DTYPES[1])
        found = room + rows_at
        move_block(means, rows, across, found, block, hyper, MOVED, COMPUTE, BLOCK)
    else:
        means = start_of(table, tensor, tensors, LINES[2], DTYPES[2])
        found = room + columns_at
        move_block(means, columns, down, found, block - of_rows, hyper, MOVED, COMPUTE, BLOCK)


@device_function
def store_matrices(
    start, matrices, height, found, part, least, R: tl.constexpr, C: tl.constexpr,
    COMPUTE: tl.constexpr,
):  # fmt: skip
    first, inverse = part * R, quotient(tl.full([], 1.0, COMPUTE), height.to(COMPUTE))
    means = rows_of_tile(start, matrices, height, first, 0, height, inverse, False, R, C, COMPUTE)
    matrix = first + tl.arange(0, R)
    tl.store(found + matrix, maximum(means, least), mask=matrix < matrices)


@kernel
def matrix_means(
    table, work, constants, tensors, room, LINES: tl.constexpr, DTYPES: tl.constexpr,
    SHAPE: tl.constexpr, MAKE: tl.constexpr, FIELDS: tl.constexpr, COMPUTE: tl.constexpr,
):  # fmt: skip
    """The means of the rows' means, at least eps1. Tiles as in `matrix_tile` of factored.py."""
    tensor, part = part_of(work)
    height, width, _, _, _, _, at, count = shape_of(table, tensor, tensors, SHAPE)
    start = start_of(table, tensor, tensors, LINES[1], DTYPES[1])
    hyper = MAKE(entries(constants, tensor, tensors, FIELDS), ())
    matrices, least, found = count // (height * width), hyper.eps1, room + at
    if height <= 4:
        store_matrices(start, matrices, height, found, part, least, 512, 4, COMPUTE)
    elif height <= 32:
        store_matrices(start, matrices, height, found, part, least, 64, 32, COMPUTE)
    else:
        store_matrices(start, matrices, height, found, part, least, 1, 2048, COMPUTE)


# -- the changes ------------------------------------------------------------------------------


@device_function
def read(places, mask, other):
    if mask is None:
        return tl.load(places)
    else:
        return tl.load(places, mask=mask, other=other)


@device_function
def factors_of(
    table, tensor, tensors, begin, mask, room, LINES: tl.constexpr, DTYPES: tl.constexpr,
    SHAPE: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The factors of a block's elements: of the row, by its matrix's mean, and of the column."""
    height, width, _, _, _, _, at, _ = shape_of(table, tensor, tensors, SHAPE)
    row, column = begin // width, begin % width
    matrix, behind = row // height, (row % height).to(tl.int32)
    across = column.to(tl.int32) + tl.arange(0, BLOCK)
    more = across // width.to(tl.int32)
    further = (behind + more) // height.to(tl.int32)
    rows = start_of(table, tensor, tensors, LINES[1], DTYPES[1]) + row
    columns = start_of(table, tensor, tensors, LINES[2], DTYPES[2]) + matrix * width
    of_row = read(rows + more, mask, 1.0).to(COMPUTE)
    mean = read(room + at + matrix + further, mask, 1.0)
    place = further.to(tl.int64) * width + (across - more * width.to(tl.int32))
    return quotient(of_row, mean), read(columns + place, mask, 1.0).to(COMPUTE)


@device_function
def change_block(
    table, tensor, tensors, begin, mask, values, scale, room, LINES: tl.constexpr,
    DTYPES: tl.constexpr, SHAPE: tl.constexpr, FORMULA: tl.constexpr, MOVED: tl.constexpr,
    MAKE: tl.constexpr, FIELDS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    UPDATES: tl.constexpr, VECTORS: tl.constexpr,
):  # fmt: skip
    """Update the block at `begin`; or tell the mean squares of its elements and of its changes."""
    offset = begin + tl.arange(0, BLOCK)
    params = start_of(table, tensor, tensors, LINES[0], DTYPES[0], VECTORS)
    grads = start_of(table, tensor, tensors, LINES[len(LINES) - 1], DTYPES[len(LINES) - 1], VECTORS)
    param = read(params + offset, mask, 0.0).to(COMPUTE)
    grad = read(grads + offset, mask, 0.0).to(COMPUTE) * scale
    if len(LINES) == 4:
        states = factors_of(
            table, tensor, tensors, begin, mask, room, LINES, DTYPES, SHAPE, COMPUTE, BLOCK
        )
    else:
        variances = start_of(table, tensor, tensors, LINES[1], DTYPES[1], VECTORS)
        variance = read(variances + offset, mask, 1.0)
        if not UPDATES:
            new = MOVED(MAKE(values, ()), variance.to(COMPUTE), grad * grad)
            variance = new.to(DTYPES[1])
            tl.store(variances + offset, variance, mask=mask)
        states = (variance.to(COMPUTE),)
    if UPDATES:
        new = FORMULA(MAKE(values, ()), param, grad, *states)
        tl.store(params + offset, new[0], mask=mask)
        return 0.0, 0.0
    else:
        # a rate of 1, and nothing kept of a parameter
        kept = tl.zeros([], COMPUTE)
        rest = values[: FIELDS - 2] + (kept, kept + 1.0)
        change = FORMULA(MAKE(rest, ()), tl.zeros([BLOCK], COMPUTE), grad, *states)[0]
        if mask is not None:
            change = tl.where(mask, change, 0.0)
        count = tl.load(table + (SHAPE - 3) * tensors + tensor).to(COMPUTE)
        inverse = quotient(kept + 1.0, count)
        return tl.sum(param * (param * inverse)), tl.sum(change * (change * inverse))


@kernel
def change_blocks(
    table, tensor_of, constants, tensors, grad_scale, room, partials, LINES: tl.constexpr,
    DTYPES: tl.constexpr, SHAPE: tl.constexpr, FORMULA: tl.constexpr, MOVED: tl.constexpr,
    MAKE: tl.constexpr, FIELDS: tl.constexpr, COMPUTE: tl.constexpr, BLOCK: tl.constexpr,
    UPDATES: tl.constexpr,
):  # fmt: skip
    """Update each block, or leave two partial means; LINES as for an elementwise update."""
    program = tl.program_id(0)
    tensor = tl.load(tensor_of + program)
    count, first, aligned = entries(table + (SHAPE - 3) * tensors, tensor, tensors, 3)
    values = entries(constants, tensor, tensors, FIELDS)
    scale = scale_of(grad_scale, COMPUTE)
    begin = (program - first) * BLOCK
    if (begin + BLOCK <= count) & (aligned != 0):
        size, change = change_block(
            table, tensor, tensors, begin, None, values, scale, room, LINES, DTYPES, SHAPE,
            FORMULA, MOVED, MAKE, FIELDS, COMPUTE, BLOCK, UPDATES, True,
        )  # fmt: skip
    else:
        mask = begin + tl.arange(0, BLOCK) < count
        size, change = change_block(
            table, tensor, tensors, begin, mask, values, scale, room, LINES, DTYPES, SHAPE,
            FORMULA, MOVED, MAKE, FIELDS, COMPUTE, BLOCK, UPDATES, False,
        )  # fmt: skip
    if not UPDATES:
        tl.store(partials + 2 * program, size)
        tl.store(partials + 2 * program + 1, change)


@kernel
def set_rates(
    table, constants, tensors, partials, SHAPE: tl.constexpr, RATE: tl.constexpr,
    MAKE: tl.constexpr, FIELDS: tl.constexpr, COMPUTE: tl.constexpr, PER_BLOCK: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """By what a tensor's changes are to be multiplied: the last of its constants."""
    tensor = tl.program_id(0)
    count, first = entries(table + (SHAPE - 3) * tensors, tensor, tensors, 2)
    blocks, lanes = (count + PER_BLOCK - 1) // PER_BLOCK, tl.arange(0, BLOCK)
    sizes, changes = tl.zeros([BLOCK], COMPUTE), tl.zeros([BLOCK], COMPUTE)
    for k in range(0, blocks, BLOCK):
        here, inside = partials + 2 * (first + k + lanes), k + lanes < blocks
        sizes += tl.load(here, mask=inside, other=0.0)
        changes += tl.load(here + 1, mask=inside, other=0.0)
    hyper = MAKE(entries(constants, tensor, tensors, FIELDS), ())
    rate = RATE(hyper, root(tl.sum(sizes)), root(tl.sum(changes)))
    tl.store(constants + (FIELDS - 1) * tensors + tensor, rate)

"""What compiled code asks a Python tensor, at a few nanoseconds a question.

Asked from Python, an address costs 40 ns, and as much again its dtype, sizes and strides. Torch has
the same answers as C functions, kept stable for the models that its own compiler builds (the shim
in torch/csrc/inductor/aoti_torch/c/shim.h), and compiled code can call them by itself: their
argument is the address of a C++ tensor, which a Python tensor holds at a place of its own.
Where the functions and that place are is found out on tensors made for it; what is missing is an
exception, and the caller has to ask Python.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic

from ..tables import EMPTY
from .compiler import entry, kernel, locked_entry
from .pointer import at, load, per_line, prefetch, store

# In this order: without the layout of a tensor that has strides, others may fail.
_FACTS = (
    "aoti_torch_get_layout", "aoti_torch_get_dtype", "aoti_torch_get_device_type",
    "aoti_torch_get_device_index", "aoti_torch_get_dim",
)  # fmt: skip
_FUNCTIONS = (
    *_FACTS, "aoti_torch_get_sizes", "aoti_torch_get_strides", "aoti_torch_get_data_ptr",
    "aoti_torch_get_storage_offset", "_ZN2at6native6is_negERKNS_6TensorE",
    "_ZN2at6native12is_inferenceERKNS_6TensorE",
)  # fmt: skip
_BUMP = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
#: About what is around a call, without arguments; and of the tensor's part in c10.
_STATES = (
    "_ZN3c104impl20TorchDispatchModeTLS9stack_lenEv",
    "_ZN2at4impl22PythonTorchFunctionTLS9stack_lenEv",
    "_ZN2at9functorch20getDynamicLayerStackEv",
    "_ZN5torch3jit6tracer15getTracingStateEv",
    "_ZNK3c1010TensorImpl13requires_gradEv",
)
# Places in a table of those; before, how many say by a number how many modes there are.
MODES, LAYERS, TRACE, REQUIRES_GRAD = 2, 2, 3, 4
# Places in a table of these functions.
FACTS = len(_FACTS)
DIM, SIZES, STRIDES, DATA_PTR, OFFSET, IS_NEG, IS_INFERENCE = range(FACTS - 1, FACTS + 6)
#: Of a tensor: its type, the facts, its flags; then its sizes and strides.
WORDS = FACTS + 2
#: Cache lines that a C++ tensor has.
LINES = 4
#: The flags: lazily negated, made in inference mode.
NEGATED, INFERENCE = 1, 2


@intrinsic
def ask(typingctx: Any, function: Any, tensor: Any, answer: Any) -> Any:
    """The C function at an address, called as function(tensor, answer); 0 if it succeeded."""
    byte = ir.IntType(8).as_pointer()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), (byte, byte)).as_pointer()
        return builder.call(
            builder.inttoptr(args[0], kind), [builder.inttoptr(a, byte) for a in args[1:]]
        )

    return types.int32(types.intp, types.intp, types.intp), codegen


@intrinsic
def ask_whether(typingctx: Any, function: Any, tensor: Any) -> Any:
    """The C++ function ``bool f(const Tensor&)`` at an address, or one without a result."""
    byte = ir.IntType(8).as_pointer()

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(8), (byte,)).as_pointer()
        found = builder.call(builder.inttoptr(args[0], kind), [builder.inttoptr(args[1], byte)])
        return builder.trunc(found, ir.IntType(1))

    return types.boolean(types.intp, types.intp), codegen


@intrinsic
def answer_of(typingctx: Any, function: Any) -> Any:
    """The C++ function without arguments at an address, which gives a word."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(64), ()).as_pointer()
        return builder.call(builder.inttoptr(args[0], kind), [])

    return types.intp(types.intp), codegen


@kernel
def same_word(words: Any, place: int, value: int, recording: bool) -> bool:
    if recording:
        store(words, place, value)
        return True
    same: bool = load(words, place) == value
    return same


@kernel
def same_tensor(
    thing: int, words: Any, place: int, flags: int, scratch: Any, scratch_at: int, functions: Any,
    type_at: int, tensor_at: int, recording: bool,
) -> bool:  # fmt: skip
    """Write down all that is to know of a tensor, or compare it with what was written.

    Args:
        thing: the Python object's address.
        words: what is known; of this tensor it begins at `place`.
        flags: those that count.
        scratch, scratch_at: memory for one answer, and its address.
        functions: addresses of _FUNCTIONS.
        type_at, tensor_at: where an object has its type and its C++ tensor.
    """
    # What is no tensor must not be asked anything.
    if not same_word(words, place, load(at(words, thing + type_at), 0), recording):
        return False
    tensor = thing + tensor_at
    for k in range(FACTS):
        store(scratch, 0, 0)  # some answers have four bytes only
        if ask(load(functions, k), tensor, scratch_at) != 0:
            return False
        if not same_word(words, place + 1 + k, load(scratch, 0), recording):
            return False
    dim = load(scratch, 0)
    found = NEGATED if ask_whether(load(functions, IS_NEG), tensor) else 0
    if flags & INFERENCE and ask_whether(load(functions, IS_INFERENCE), tensor):
        found += INFERENCE
    if not same_word(words, place + WORDS - 1, found, recording):
        return False
    if dim == 0:
        return True
    place += WORDS
    if ask(load(functions, SIZES), tensor, scratch_at) != 0:
        return False
    sizes = at(words, load(scratch, 0))
    for d in range(dim):
        if not same_word(words, place + d, load(sizes, d), recording):
            return False
    if ask(load(functions, STRIDES), tensor, scratch_at) != 0:
        return False
    strides = at(words, load(scratch, 0))
    for d in range(dim):
        counts = recording or load(sizes, d) != 1  # the stride of a single element means nothing
        if counts and not same_word(words, place + dim + d, load(strides, d), recording):
            return False
    return True


@kernel
def fetch_tensor(thing: int, like: int, words: Any, type_at: int, tensor_at: int) -> None:
    """Have fetched what `same_tensor` will ask a tensor for.

    In a training step the model has emptied the caches, and what comes from memory takes as long
    as all questions about a tensor. What is not of the type of `like`, a tensor, may be none.
    """
    if load(at(words, thing + type_at), 0) == load(at(words, like + type_at), 0):
        tensor = at(words, load(at(words, thing + tensor_at), 0))
        for line in range(LINES):
            prefetch(tensor, line * per_line(words))


@kernel
def fetch_storage(
    thing: int, like: int, words: Any, type_at: int, tensor_at: int, storage_at: int
) -> None:  # fmt: skip
    """The same for `address_of`, once the tensor itself is there."""
    if load(at(words, thing + type_at), 0) == load(at(words, like + type_at), 0):
        tensor = load(at(words, thing + tensor_at), 0)
        prefetch(at(words, load(at(words, tensor + storage_at), 0)), 0)


@entry
def fetch_lines(lines: Any, count: int) -> None:
    """Have the cache lines of some addresses fetched, which need not be anybody's any more."""
    for k in range(count):
        prefetch(at(lines, load(lines, k)), 0)


@kernel
def length(words: Any, place: int) -> int:
    """How many words there are of the tensor whose words begin at `place`."""
    dim: int = load(words, place + 1 + DIM)
    return WORDS + 2 * dim


@kernel
def address_of(
    thing: int, itemsize: int, size: int, scratch: Any, scratch_at: int, functions: Any,
    tensor_at: int,
) -> int:  # fmt: skip
    """Where a tensor's elements begin, EMPTY if it has none, 0 if they have no memory."""
    if size == 0:
        return EMPTY
    if ask(load(functions, OFFSET), thing + tensor_at, scratch_at) != 0:
        return 0
    offset: int = load(scratch, 0)
    if ask(load(functions, DATA_PTR), thing + tensor_at, scratch_at) != 0:
        return 0
    found: int = load(scratch, 0)
    return 0 if found == offset * itemsize else found  # so of a storage that begins at 0


@locked_entry
def record_tensors(
    things: Any, count: int, words: Any, flags: int, scratch: Any, scratch_at: int,
    functions: Any, type_at: int, tensor_at: int,
) -> bool:  # fmt: skip
    """Write down all that is to know of some tensors, one after the other."""
    place = 0
    for i in range(count):
        if not same_tensor(
            load(things, i), words, place, flags, scratch, scratch_at, functions, type_at,
            tensor_at, True,
        ):  # fmt: skip
            return False
        place += length(words, place)
    return True


@locked_entry
def same_objects(things: int, items_at: int, ids: Any, count: int) -> bool:
    """Whether the items of the list at `things` are the objects at these addresses."""
    items = at(ids, load(at(ids, things + items_at), 0))
    for i in range(count):  # noqa: SIM110 (compiled code has no generators)
        if load(items, i) != load(ids, i):
            return False
    return True


@locked_entry
def bump_versions(
    things: int, items_at: int, count: int, bump: int, functions: Any, type_at: int,
    tensor_at: int, tensor: int, parameter: int,
) -> bool:  # fmt: skip
    """Increment the versions of a list's tensors; False, and nothing done, if one has none.

    tensor, parameter: the two types that they may be of.
    """
    items = at(functions, load(at(functions, things + items_at), 0))
    for i in range(count):
        kind = load(at(functions, load(items, i) + type_at), 0)
        if kind != tensor and kind != parameter:
            return False
        if ask_whether(load(functions, IS_INFERENCE), load(items, i) + tensor_at):
            return False
    for i in range(count):
        ask_whether(bump, load(items, i) + tensor_at)
    return True


class Torch:
    """Where torch's functions are, and where Python's objects have what.

    Raises:
        OSError, KeyError, AttributeError, LookupError: not to be found in this torch.
    """

    def __init__(self) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise LookupError("without the GIL a tensor may vanish while it is looked at")
        suffix = {"linux": ".so", "darwin": ".dylib"}[sys.platform]
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
        self.functions = np.array([_address(library, name) for name in _FUNCTIONS], np.int64)
        self.states = np.array([_address(library, name) for name in _STATES], np.int64)
        self.bump = _address(library, _BUMP)
        parameter = torch.nn.Parameter(torch.empty(2))
        self.type_at = _offset(parameter, id(type(parameter)))
        self.tensor_at = _offset(parameter, parameter._cdata)
        self.items_at = _items_offset()
        self.tuple_items_at = _tuple_items_offset()
        self.storage_at = _place_in(parameter, parameter.untyped_storage()._cdata)
        self.autograd_at = _autograd_offset()
        self.scratch = np.zeros(1, np.int64)  # used under the GIL alone


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


def _word(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _offset(thing: object, value: int, begin: int = 0) -> int:
    """Where in an object that number is, from `begin` on."""
    for offset in range(begin, type(thing).__basicsize__ + type(thing).__itemsize__, 8):
        if _word(id(thing) + offset) == value:
            return offset
    raise LookupError(f"no {value:#x} in a {type(thing).__name__}")


def _place_in(tensor: torch.Tensor, value: int) -> int:
    """Where near the beginning of a C++ tensor that number is; 0 if nobody knows.

    It is for what is to be fetched ahead, where a wrong place does no harm.
    """
    return next((8 * k for k in range(1, 8) if _word(tensor._cdata + 8 * k) == value), 0)


def _autograd_offset() -> int:
    """Where a C++ tensor has what autograd knows of it: nothing, until it needs a gradient."""
    tensor = torch.empty(2)
    before = [_word(tensor._cdata + 8 * k) for k in range(8)]
    tensor.requires_grad_()
    after = [_word(tensor._cdata + 8 * k) for k in range(8)]
    changed = [8 * k for k in range(8) if before[k] == 0 != after[k]]
    return changed[0] if len(changed) == 1 else 0


def _items_offset() -> int:
    """Where in a list the address of its items is: behind the number of them."""
    things: list[object] = [object(), object(), object()]
    # behind the type: before, how many refer to the list may be the same number
    behind = _offset(things, id(list)) + 8
    offset = _offset(things, len(things), behind) + 8
    items = _word(id(things) + offset)
    if [_word(items + 8 * k) for k in range(3)] != list(map(id, things)):
        raise LookupError("no array of its items in a list")
    return offset


def _tuple_items_offset() -> int:
    """Where in a tuple its items are."""
    things = (object(), object(), object())
    offset = _offset(things, id(things[0]))
    if [_word(id(things) + offset + 8 * k) for k in range(3)] != list(map(id, things)):
        raise LookupError("no items in a tuple")
    return offset


_found: dict[str, Torch] = {}


def torch_functions() -> Torch:
    """The one for this process: compiled code has addresses in it, for as long as that lives.

    Threads that ask for it at once get the same, which a cache of results would not give them.
    """
    found = _found.get("torch")
    return _found.setdefault("torch", Torch()) if found is None else found


def are_there() -> bool:
    """Whether torch has these functions, and Python's objects are as compiled code needs them."""
    if config.DISABLE_JIT:
        return False
    try:
        torch_functions()
    except (OSError, KeyError, AttributeError, LookupError):
        return False
    return True

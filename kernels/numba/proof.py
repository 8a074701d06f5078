"""What tensors are and where they lie, at a few nanoseconds a tensor.

A step has to know of each tensor that nothing about it has changed. Asked from Python, an
address costs 40 ns, and as much again its dtype, sizes and strides. Torch has the same answers
as C functions, kept stable for the models that its own compiler builds (the shim in
torch/csrc/inductor/aoti_torch/c/shim.h), and compiled code can call them by itself: their
argument is the address of a C++ tensor, which a Python tensor holds at a place of its own.
That place and all answers are tried first, on tensors made for it. Where something is missing,
`available` says so, and the caller has to ask Python.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
import sys
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba.core import config, types
from numba.extending import intrinsic
from torch import Tensor

from .compiler import locked_kernel, pointer, specialise
from .pointer import at, load, store

__all__ = ["Proof", "Versions", "available"]

_DATA_PTR = "aoti_torch_get_data_ptr"
_SIZES, _STRIDES = "aoti_torch_get_sizes", "aoti_torch_get_strides"
# In this order: without the layout of a tensor that has strides, others may fail.
_FACTS = (
    "aoti_torch_get_layout", "aoti_torch_get_dtype", "aoti_torch_get_device_type",
    "aoti_torch_get_device_index", "aoti_torch_get_dim",
)  # fmt: skip
_IS_NEG = "_ZN2at6native6is_negERKNS_6TensorE"
_BUMP = "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE"
# Of a tensor: its type, the facts, whether it is lazily negated; then its sizes and strides.
_WORDS = len(_FACTS) + 2


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


@locked_kernel
def same_word(words: Any, place: int, value: int, recording: bool) -> bool:
    if recording:
        store(words, place, value)
        return True
    same: bool = load(words, place) == value
    return same


@locked_kernel
def same_tensors(
    objects: Any, count: int, words: Any, addresses: Any, address_of: int, functions: Any,
    type_at: int, tensor_at: int, recording: bool,
) -> bool:  # fmt: skip
    """Write down all that is to know of some tensors, or compare it with what was written.

    Args:
        objects: the Python objects' addresses.
        words: what is known, _WORDS + 2 dim numbers a tensor.
        addresses: gets where each tensor's elements begin.
        address_of: of `addresses` itself.
        functions: addresses of _FACTS, _SIZES, _STRIDES, _DATA_PTR, _IS_NEG.
        type_at, tensor_at: where an object has its type and its C++ tensor.
    """
    facts, place = _WORDS - 2, 0
    for i in range(count):
        thing, answer = load(objects, i), address_of + 8 * i
        # What is no tensor (a gradient that is None) must not be asked anything.
        if not same_word(words, place, load(at(words, thing + type_at), 0), recording):
            return False
        tensor = thing + tensor_at
        for k in range(facts):
            store(addresses, i, 0)  # some answers have four bytes only
            if ask(load(functions, k), tensor, answer) != 0:
                return False
            if not same_word(words, place + 1 + k, load(addresses, i), recording):
                return False
        dim = load(addresses, i)
        negated = int(ask_whether(load(functions, facts + 3), tensor))
        if not same_word(words, place + _WORDS - 1, negated, recording):
            return False
        place += _WORDS
        for k in range(facts, facts + 2) if dim else range(0):
            if ask(load(functions, k), tensor, answer) != 0:
                return False
            numbers = at(words, load(addresses, i))
            for d in range(dim):
                if not same_word(words, place + d, load(numbers, d), recording):
                    return False
            place += dim
        if ask(load(functions, facts + 2), tensor, answer) != 0:
            return False
    return True


@locked_kernel
def overlap(starts: Any, ends: Any, spans: int, address: int, size: int) -> bool:
    """Whether [address, address + size) overlaps one of the spans, sorted and apart."""
    low, high = 0, spans  # the first span that ends behind the address
    while low < high:
        middle = (low + high) // 2
        if load(ends, middle) > address:
            high = middle
        else:
            low = middle + 1
    return low < spans and load(starts, low) < address + size


@locked_kernel
def same_step(
    grads: Any, written: Any, writes: int, words: Any, known: Any, found: Any, found_of: int,
    tensors: int, grad_words: Any, addresses: Any, addresses_of: int, sizes: Any, starts: Any,
    ends: Any, spans: int, functions: Any, type_at: int, tensor_at: int,
) -> bool:  # fmt: skip
    """Whether a step's tensors are what they were; addresses gets the gradients' ones.

    What is written must be where it was (known), and gradients must have memory, and apart from
    it. found is scratch memory.
    """
    same = same_tensors(
        written, writes, words, found, found_of, functions, type_at, tensor_at, False
    )  # fmt: skip
    if not same:
        return False
    for i in range(writes):
        if load(found, i) != load(known, i):
            return False
    same = same_tensors(
        grads, tensors, grad_words, addresses, addresses_of, functions, type_at, tensor_at, False
    )  # fmt: skip
    if not same:
        return False
    for i in range(tensors):
        address, size = load(addresses, i), load(sizes, i)
        if size > 0 and (address == 0 or overlap(starts, ends, spans, address, size)):
            return False
    return True


@locked_kernel
def bump_versions(objects: Any, inner: Any, count: int, tensor_at: int, bump: int) -> bool:
    """Whether each object still has the same C++ tensor; if so, increment all versions."""
    for i in range(count):
        if load(at(inner, load(objects, i) + tensor_at), 0) != load(inner, i):
            return False
    for i in range(count):
        ask_whether(bump, load(objects, i) + tensor_at)
    return True


# -- torch's C functions ------------------------------------------------------------------


class _Torch:
    """Where torch's functions are, and where a Python tensor has what.

    Raises:
        OSError, AttributeError, LookupError: not to be found in this torch.
    """

    def __init__(self) -> None:
        if not getattr(sys, "_is_gil_enabled", lambda: True)():
            raise LookupError("without the GIL a tensor may vanish while it is looked at")
        suffix = {"linux": ".so", "darwin": ".dylib"}[sys.platform]
        library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / f"libtorch_cpu{suffix}"))
        names = (*_FACTS, _SIZES, _STRIDES, _DATA_PTR, _IS_NEG)
        self.functions = np.array([_address(library, name) for name in names], np.int64)
        self.bump = _address(library, _BUMP)
        parameter = torch.nn.Parameter(torch.empty(2))
        self.type_at = _offset(parameter, id(type(parameter)))
        self.tensor_at = _offset(parameter, parameter._cdata)
        index = pointer("int64", 0)
        number = types.intp
        self._record = specialise(
            same_tensors, index, number, index, index, number, index, number, number,
            types.boolean,
        )  # fmt: skip
        self.same_step = specialise(
            same_step, index, index, number, index, index, index, number, number, index, index,
            number, index, index, index, number, index, number, number,
        )  # fmt: skip
        self.bump_versions = specialise(bump_versions, index, index, *[number] * 3)

    def record(self, tensors: Sequence[Tensor], addresses: np.ndarray) -> np.ndarray:
        """What is to know of tensors; addresses gets where their elements begin."""
        words = np.empty(sum(_WORDS + 2 * t.dim() for t in tensors), np.int64)
        objects, where = _objects(tensors), addresses.ctypes.data
        if not self._record(
            objects.ctypes.data, len(tensors), words.ctypes.data, where, where,
            self.functions.ctypes.data, self.type_at, self.tensor_at, True,
        ):  # fmt: skip
            raise RuntimeError("torch did not say what these tensors are")
        return words


def _address(library: ctypes.CDLL, name: str) -> int:
    address = ctypes.cast(getattr(library, name), ctypes.c_void_p).value
    assert address is not None
    return address


def _offset(thing: object, value: int) -> int:
    """Where in an object that number is."""
    for offset in range(0, type(thing).__basicsize__, 8):
        if ctypes.c_int64.from_address(id(thing) + offset).value == value:
            return offset
    raise LookupError(f"no {value:#x} in a {type(thing).__name__}")


@functools.cache
def _torch() -> _Torch:
    return _Torch()


class Proof:
    """That the tensors of a step are what they were; see fastopt.optim._metadata."""

    def __init__(
        self, written: Sequence[Tensor], grads: Sequence[Tensor], addresses: np.ndarray,
        starts: np.ndarray, ends: np.ndarray,
    ) -> None:  # fmt: skip
        torch_ = self._torch = _torch()
        known = np.empty(len(written), np.int64)
        sizes = np.array([t.numel() * t.itemsize for t in grads], np.int64)
        arrays = (
            _objects(written), torch_.record(written, known), known, np.empty_like(known),
            torch_.record(grads, addresses), addresses, sizes, starts, ends,
        )  # fmt: skip
        self._arrays = arrays  # whose memory the kernel reads
        objects, words, known_, found, grad_words, line, sizes_, starts_, ends_ = (
            a.ctypes.data for a in arrays
        )
        self._arguments = (
            objects, len(written), words, known_, found, found, len(grads), grad_words, line,
            line, sizes_, starts_, ends_, len(starts), torch_.functions.ctypes.data,
            torch_.type_at, torch_.tensor_at,
        )  # fmt: skip

    def holds(self, written: Sequence[Tensor], grads: Sequence[object]) -> bool:
        objects = array("q", map(id, grads))
        same: bool = self._torch.same_step(objects.buffer_info()[0], *self._arguments)
        return same


class Versions:
    """The versions of some tensors, for autograd. It keeps no tensor.

    All must have one: torch's function ends the process otherwise.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._torch = torch_ = _torch()
        self._arrays = _objects(tensors), np.array([t._cdata for t in tensors], np.int64)
        addresses = (a.ctypes.data for a in self._arrays)
        self._arguments = (*addresses, len(tensors), torch_.tensor_at, torch_.bump)

    def increment(self) -> bool:
        """Each by one; False, and nothing done, if one of them has become another C++ tensor."""
        done: bool = self._torch.bump_versions(*self._arguments)
        return done


def _objects(things: Sequence[object]) -> np.ndarray:
    return np.fromiter(map(id, things), np.int64, len(things))


@functools.cache
def available() -> bool:
    """Whether torch has here what is needed, and its answers are right."""
    if config.DISABLE_JIT:
        return False
    try:
        _torch()
    except (OSError, KeyError, AttributeError, LookupError):
        return False
    with torch.inference_mode(False):
        samples = [
            torch.nn.Parameter(torch.empty(3, 4, device="cpu").t()),
            torch.empty((), device="cpu"),
            torch.empty(2, 0, 3, dtype=torch.float64, device="cpu"),
            torch._neg_view(torch.empty(5, dtype=torch.bfloat16, device="cpu")[1:]),
        ]
    found = np.empty(len(samples), np.int64)
    all_words, versions = _torch().record(samples, found), Versions(samples)
    words = iter(all_words.tolist())
    for t in samples:
        kind, layout, _, device, index, dim, negated = itertools.islice(words, _WORDS)
        layouts = list(itertools.islice(words, 2 * t.dim()))
        if (kind, dim, negated) != (id(type(t)), t.dim(), t.is_neg()):
            return False
        if layouts != [*t.shape, *t.stride()] or (layout, device, index) != tuple(
            all_words[[1, 3, 4]]
        ):
            return False
    before = [t._version for t in samples]
    versions.increment()
    if [t._version for t in samples] != [version + 1 for version in before]:
        return False
    return found.tolist() == [t.data_ptr() for t in samples]

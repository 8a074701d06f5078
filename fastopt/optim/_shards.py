"""DTensors, of which a step updates this process's shards.

An update is elementwise: where a parameter, its gradient and its states are cut alike, each
process can update what it holds without asking another.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from operator import attrgetter
from typing import Any

from torch import Tensor

# `to_local()` makes a new view at every call, an order of magnitude slower; FSDP2 and the
# checkpoints of torch itself read the attribute.
_local: Callable[[Any], Tensor] = attrgetter("_local_tensor")


def is_dtensor(tensor: Any) -> bool:
    """Whether it is a DTensor, which nothing is before its module has been imported."""
    if type(tensor) is Tensor:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and type(tensor) is module.DTensor


def local(tensor: Tensor) -> Tensor:
    """What this process holds: a DTensor's shard; anything else itself."""
    return _local(tensor) if is_dtensor(tensor) else tensor


def cut(tensor: Any) -> Any:
    """How a DTensor is cut, and among whom; None of anything else."""
    return (tensor.device_mesh, tensor.placements) if is_dtensor(tensor) else None


def shard_of(tensor: Any) -> int:
    """Which of a DTensor's shards this process holds, alike on all that hold it; else 0."""
    if not is_dtensor(tensor):
        return 0
    mesh, shard = tensor.device_mesh, 0
    coordinates = mesh.get_coordinate() or (0,) * mesh.ndim  # None outside of the mesh
    for axis, (placement, place) in enumerate(zip(tensor.placements, coordinates, strict=True)):
        if placement.is_shard():
            shard = shard * mesh.size(axis) + place
    return shard


def specials(name: str, tensor: Any, param: Any) -> list[str]:
    """Why an update can't go shard by shard: of a parameter, its gradient or a state."""
    if cut(tensor) != cut(param):
        how = f"placements {tensor.placements}" if is_dtensor(tensor) else "no DTensor"
        whole = f"placements {param.placements}" if is_dtensor(param) else "no DTensor"
        return [f"a {name} of {how} for a parameter of {whole}"]
    if is_dtensor(tensor) and any(p.is_partial() for p in tensor.placements):
        return [f"a {name} of placements {tensor.placements}, a sum yet to be taken"]
    return []


_cut = attrgetter("device_mesh", "placements")


def cuts(tensors: Iterable[Any]) -> list[Any]:
    """How DTensors are cut, and among whom.

    Raises:
        AttributeError: one of them is none.
    """
    return list(map(_cut, tensors))


def locals_of(tensors: Iterable[Any]) -> list[Tensor]:
    """What this process holds of DTensors."""
    return list(map(_local, tensors))

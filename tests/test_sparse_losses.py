"""Tensors that have no strides: whatever torch does with them, at sizes that would be compiled."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as theirs

import fastopt.nn.functional as ours


def outcome(module: Any, operation: str, *tensors: torch.Tensor) -> tuple[type, str]:
    try:
        result = getattr(module, operation)(*tensors)
    except Exception as error:
        return type(error), str(error)
    return type(result), str(result)


@pytest.mark.filterwarnings("ignore:Sparse")
@pytest.mark.parametrize("operation", ["mse_loss", "l1_loss", "cross_entropy"])
@pytest.mark.parametrize("layout", ["sparse", "mkldnn", "csr"])
@pytest.mark.parametrize("which", ["input", "target", "both"])
def test_layouts_without_strides(operation: str, layout: str, which: str) -> None:
    convert = {
        "sparse": torch.Tensor.to_sparse,
        "mkldnn": torch.Tensor.to_mkldnn,
        "csr": torch.Tensor.to_sparse_csr,
    }[layout]
    input, target = torch.randn(400, 400), torch.rand(400, 400)
    if which in ("input", "both"):
        input = convert(input)
    if which in ("target", "both"):
        target = convert(target)
    mine = outcome(ours, operation, input, target)
    assert mine == outcome(theirs, operation, input, target)

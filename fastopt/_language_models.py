"""Causal language models of transformers: their loss by linear cross-entropy, for `convert`.

A model calls its head and gives the logits to its loss function. Here the head gives logits that
are computed once somebody wants them, and the loss function computes itself of what they would be
computed of.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .front.deferred import Head, Logits
from .nn.linear_cross_entropy import linear_cross_entropy

__all__ = ["causal_lm_loss", "convert_language_models"]

#: What configurations call that which a model does to logits between its head and its loss.
_CHANGES = (
    "final_logit_softcapping", "logits_soft_cap", "logit_scale", "logits_scaling",
    "lm_head_multiplier", "output_multiplier",
)  # fmt: skip


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """The loss of transformers' causal language models, under its arguments and their meaning.

    Of logits that are there it is transformers' own.
    """
    layer = logits.layer() if isinstance(logits, Logits) else None
    if layer is None or vocab_size != logits.shape[-1]:
        loss: Tensor = _theirs()(
            logits, labels, vocab_size, num_items_in_batch, ignore_index, shift_labels, **kwargs
        )
        return loss
    if shift_labels is None:
        assert labels is not None
        shift_labels = torch.nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    halves = layer.dtype.itemsize == 2  # autocast has their loss in float32, as is theirs
    with torch.autocast(logits.device.type, layer.dtype, halves):
        loss = linear_cross_entropy(
            layer.input.flatten(0, -2),
            layer.weight,
            shift_labels.flatten().to(logits.device),
            linear_bias=layer.bias,
            reduction="mean" if num_items_in_batch is None else "sum",
            ignore_index=ignore_index,
        ).float()
    if num_items_in_batch is None:
        return loss
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(loss.device)
    return loss / num_items_in_batch


def _theirs() -> Any:
    return sys.modules["transformers.loss.loss_utils"].ForCausalLMLoss


def convert_language_models(subject: torch.nn.Module, to: str) -> Iterator[str]:
    """Convert those in a module, and say of those that are left alone why."""
    transformers = sys.modules.get("transformers.modeling_utils")
    if transformers is None:  # then there can be none
        return
    for path, model in subject.named_modules():
        if not isinstance(model, transformers.PreTrainedModel):
            continue
        head = model.get_output_embeddings()
        why = _why_left(model, head) if to == "fastopt" else _why_kept(head)
        if why is not None:
            yield f"{path or 'the module itself'} ({type(model).__name__}, {why})"
        elif to == "fastopt" and head is not None:
            head.__class__, model.loss_function = Head, causal_lm_loss
        elif to == "torch" and type(head) is Head:
            head.__class__ = torch.nn.Linear  # type: ignore[assignment]
        if to == "torch" and _is_converted(model):
            del model._loss_function


def _is_converted(model: Any) -> bool:
    return vars(model).get("_loss_function") is causal_lm_loss


def _why_left(model: Any, head: Any) -> str | None:
    """Of a model whose head isn't to become ours, the reason; None if it has no head."""
    if head is None:
        return None
    kind = type(head)
    if kind not in (torch.nn.Linear, Head):
        return f"whose head is a {kind.__module__}.{kind.__qualname__}, not torch.nn.Linear itself"
    if any("forward" in vars(module) for module in (model, head)):
        return "whose forward, or its head's, has been replaced"
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        return "whose forward doesn't call its loss_function"
    if not _is_converted(model) and model.loss_function is not _theirs():
        return f"whose loss_function is {model.loss_function!r}, not transformers' ForCausalLMLoss"
    config = model.config.get_text_config(decoder=True)
    for name in _CHANGES:
        if (value := getattr(config, name, None)) is not None:
            return f"whose logits are changed before the loss, by {name}={value!r}"
    return None


def _why_kept(head: Any) -> str | None:
    """Of a head that has become something else since it was ours, the reason to leave it."""
    made_of_ours = isinstance(head, Head) and type(head) is not Head
    return f"whose head has become a {type(head).__name__}" if made_of_ours else None

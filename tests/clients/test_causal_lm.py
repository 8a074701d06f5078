"""Causal language models of transformers whose loss `convert` makes linear cross-entropy."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from clients.language_model import IGNORED, VOCABULARY, count_losses
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastopt
from fastopt.front.deferred import Head
from fastopt.nn.linear_cross_entropy import LinearCrossEntropy

transformers = pytest.importorskip("transformers", reason="needs the package transformers")

BATCH, LENGTH, WIDTH = 8, 33, 64
assert LinearCrossEntropy.crossover < BATCH * LENGTH * VOCABULARY


def model_of(name: str, **options: Any) -> Any:
    """A small model with random weights, in training."""
    sizes = {
        "vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    if "Gemma" in name:
        sizes["head_dim"] = WIDTH // 2
    kind = getattr(transformers, name)
    return kind(kind.config_class(**sizes | options)).train()


def batch() -> dict[str, Tensor]:
    """Two rows begin with what is no label."""
    labels = torch.randint(VOCABULARY, (BATCH, LENGTH))
    ids = labels.clone()
    labels[:2, :10] = IGNORED
    return {"input_ids": ids, "labels": labels}


def loss_and_grads(model: Any, **call: Any) -> list[Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", torch.bfloat16, enabled=call.pop("autocast", False)):
        loss = model(**call).loss
    loss.backward()
    return [loss.detach(), *[p.grad for p in model.parameters() if p.grad is not None]]


def shifted(labels: Tensor) -> Tensor:
    """A collator's own idea of what follows what."""
    return labels.roll(-2, 1)


UNDROPPED = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
CASES: dict[str, tuple[str, dict[str, Any], Callable[[Tensor], dict[str, Any]]]] = {
    "tied": ("GPT2LMHeadModel", UNDROPPED,
             lambda labels: {"num_items_in_batch": (labels != IGNORED).sum()}),
    "bias": ("PhiForCausalLM", {},
             lambda labels: {"labels": labels.clamp(min=7), "ignore_index": 7}),
    "checkpointed": ("Qwen2ForCausalLM", {}, lambda labels: {"num_items_in_batch": 77}),
    "autocast": ("LlamaForCausalLM", {}, lambda labels: {"autocast": True}),
    "bfloat16": ("Gemma3ForCausalLM", {"dtype": torch.bfloat16},
                 lambda labels: {"shift_labels": shifted(labels)}),
    "all ignored": ("MistralForCausalLM", {},
                    lambda labels: {"labels": torch.full_like(labels, IGNORED)}),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradients(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are those of transformers, and no logits are computed."""
    name, options, call_of = CASES[case]
    dtype = options.get("dtype", torch.float32)
    model, call = model_of(name, **options).to(dtype), batch()
    call |= call_of(call["labels"])
    if case == "checkpointed":
        model.gradient_checkpointing_enable()
    expected = loss_and_grads(model, **call)
    assert fastopt.convert(model) is model
    served = count_losses(monkeypatch)
    actual = loss_and_grads(model, **call)

    assert [type(options.record) for options in served] == [LinearCrossEntropy]
    half = case in ("autocast", "bfloat16")
    torch.testing.assert_close(
        actual[0], expected[0], rtol=1e-4 if half else 1e-6, atol=0, equal_nan=True
    )
    assert len(actual) == len(expected)
    for a, e in zip(actual[1:], expected[1:], strict=True):
        difference = (a.double() - e.double()).norm() / e.double().norm().clamp(min=1e-9)
        assert difference < (2e-2 if half else 1e-5)


def largest_allocation(call: Callable[[], Any]) -> int:
    with torch.profiler.profile(profile_memory=True) as profile:
        call()
    return max(event.self_cpu_memory_usage for event in profile.events())


def test_no_memory_for_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither torch's nor, in the buffer of rows of logits, the kernels'."""
    from fastopt.kernels.numba import memory, pieces

    monkeypatch.setattr(pieces.Pieces, "BYTES", 16 * VOCABULARY * 4)
    monkeypatch.setattr(pieces.Pieces, "ROWS", 1)
    taken = []
    empty = memory.empty

    def noted(shape: tuple[int, ...], *more: Any) -> Tensor:
        taken.append(empty(shape, *more))
        return taken[-1]

    monkeypatch.setattr(memory, "empty", noted)
    model, call = model_of("LlamaForCausalLM"), batch()
    logits = BATCH * LENGTH * VOCABULARY * 4
    assert largest_allocation(lambda: loss_and_grads(model, **call)) >= logits
    fastopt.convert(model)
    assert largest_allocation(lambda: loss_and_grads(model, **call)) < logits
    weight = model.lm_head.weight.nbytes
    assert sorted(t.nbytes for t in taken)[-2:] == [16 * VOCABULARY * 4, weight]


def test_logits_of_outputs() -> None:
    """Where somebody reads them, with labels or without, and what a loss of them asks for."""
    model, call = model_of("LlamaForCausalLM"), batch()
    results = []
    for _ in range(2):
        outputs = model(**call)
        following = call["labels"][:, 1:].flatten()
        own = nn.functional.cross_entropy(outputs.logits[:, :-1].flatten(0, 1), following)
        both = own * 2 + outputs.loss
        unlabelled = model(call["input_ids"]).logits
        changed = model(call["input_ids"]).logits.mul_(0.5)
        loss = model.loss_function(changed, call["labels"], VOCABULARY)
        grads = torch.autograd.grad(both + loss, [*model.parameters()])
        results.append([outputs.logits.clone(), unlabelled.clone(), both, loss, *grads])
        fastopt.convert(model)
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)


def test_evaluation_and_generation_are_plain() -> None:
    model, call = model_of("LlamaForCausalLM"), batch()
    results = []
    for _ in range(2):
        model.eval()
        outputs = model(**call)
        assert type(outputs.logits) is Tensor
        words = model.generate(call["input_ids"][:, :4], max_new_tokens=5, do_sample=False)
        results.append([outputs.loss, outputs.logits, words])
        fastopt.convert(model.train())
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_after_the_optimizers_step() -> None:
    model, call = fastopt.convert(model_of("LlamaForCausalLM")), batch()
    optimizer = fastopt.optim.AdamW(model.parameters())
    outputs = model(**call)
    outputs.loss.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="read them before the optimizer's step"):
        outputs.logits.argmax(-1)


def test_there_and_back(tmp_path: Path) -> None:
    """Weights, ties and files stay; copies and pickles are what they are made of."""
    model, call = model_of("GPT2LMHeadModel", **UNDROPPED), batch()
    expected, weights = loss_and_grads(model, **call), model.state_dict()
    forward, attributes = model.forward, set(vars(model))
    fastopt.convert(fastopt.convert(model))
    assert type(model.lm_head) is Head
    assert model.lm_head.weight is model.transformer.wte.weight
    assert model.state_dict().keys() == weights.keys()
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(copied.lm_head) is Head
        torch.testing.assert_close(loss_and_grads(copied, **call), expected, rtol=1e-5, atol=1e-7)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).train()
    assert type(loaded.lm_head) is nn.Linear
    torch.testing.assert_close(loaded.state_dict(), weights, rtol=0, atol=0)

    fastopt.convert(model, to="torch")
    assert type(model.lm_head) is nn.Linear
    assert (model.forward, set(vars(model))) == (forward, attributes)
    assert model.loss_function is loaded.loss_function
    torch.testing.assert_close(loss_and_grads(model, **call), expected, rtol=0, atol=0)


def test_inside_another_module() -> None:
    """As in a wrapper that adds adapters; a head that it wraps is left alone."""
    model = nn.ModuleDict({"base": model_of("LlamaForCausalLM"), "loss": nn.MSELoss()})
    fastopt.convert(model)
    assert type(model["base"].lm_head) is Head
    assert type(model["loss"]) is fastopt.nn.MSELoss
    fastopt.convert(model, to="torch")
    model["base"].lm_head = nn.Sequential(model["base"].lm_head)
    with pytest.warns(UserWarning, match=r"base \(Llama.*, whose head is a .*\.Sequential, not"):
        fastopt.convert(model)


def test_under_ddp_that_looks_for_unused_parameters() -> None:
    """It follows the graph from the outputs, which without labels are logits alone."""
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    try:
        model, call = model_of("LlamaForCausalLM"), batch()
        results = []
        for _ in range(2):
            ddp = DistributedDataParallel(model, find_unused_parameters=True)
            ddp.zero_grad()
            ddp(input_ids=call["input_ids"]).logits.square().mean().backward()
            results.append([p.grad for p in model.parameters()])
            results[-1] += loss_and_grads(ddp, **call)
            fastopt.convert(model)
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-7)
    finally:
        dist.destroy_process_group()


def own_loss(model: Any) -> None:
    model.loss_function = shifted


def own_forward(model: Any) -> None:
    model.forward = model.forward


def own_heads_forward(model: Any) -> None:
    model.lm_head.forward = model.lm_head.forward


def nothing(model: Any) -> None: ...


REASONS: dict[str, tuple[str, dict[str, Any], Callable[[Any], None], str]] = {
    "softcap": ("Gemma2ForCausalLM", {}, nothing, "by final_logit_softcapping=30.0"),
    "scale": ("CohereForCausalLM", {}, nothing, "before the loss, by logit_scale=0.0625"),
    "scaling": ("GraniteForCausalLM", {}, nothing, "before the loss, by logits_scaling=1.0"),
    "loss": ("LlamaForCausalLM", {}, own_loss, "whose loss_function is <function shifted"),
    "forward": ("LlamaForCausalLM", {}, own_forward, "whose forward, or its head's, has been"),
    "head": ("LlamaForCausalLM", {}, own_heads_forward, "whose forward, or its head's, has"),
    "its own": ("GPT2DoubleHeadsModel", {}, nothing, "whose forward doesn't call its loss_funct"),
    "masked": ("BertForMaskedLM", {}, nothing, "whose forward doesn't call its loss_function"),
}


@pytest.mark.parametrize("case", REASONS)
def test_what_is_left_alone_is_named(case: str) -> None:
    name, options, change, reason = REASONS[case]
    model = model_of(name, **options)
    change(model)
    head, loss = model.get_output_embeddings(), model.loss_function
    message = re.escape(f"left alone: the module itself ({name}, whose ")
    with pytest.warns(UserWarning, match=message) as caught:
        fastopt.convert(model)
    assert reason in str(caught[0].message)
    assert caught[0].filename == __file__
    assert type(head) is nn.Linear
    assert model.loss_function is loss
    fastopt.convert(model, to="torch")  # nothing to say there


def test_other_models_are_not_named() -> None:
    """Those without a head; warnings are errors here."""
    for name in ("LlamaModel", "LlamaForSequenceClassification"):
        fastopt.convert(model_of(name))

"""Bugs that projects of this kind have shipped, and the test that keeps each of them out.

TRAPS names, for each bug (and where it was found), tests of any file; those that fit nowhere
else are at the end of this one.
"""

from __future__ import annotations

import ast
import functools
import inspect
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from race import NAMES
from torch.nn import Parameter

import fastopt

TRAPS: dict[str, tuple[str, ...]] = {
    # losses
    "logits overwritten by forward or backward (Liger-Kernel #272, #343, #1251; unsloth #5002)": (
        "test_losses::test_values_and_gradients", "test_guarded::test_every_loss"),
    "a second backward sees what the first has scaled in place (quack 209)": (
        "test_losses::test_backward_twice_and_into_leaves",
        "test_expected::test_gradients_left_behind"),
    "one grad_output for all rows, or read past its end (Liger-Kernel #678, #968; NeMo Automodel "
    "3853; TransformerEngine 623; FlagGems #5212)": (
        "test_losses::test_expanded_grad_output", "test_opinfo::test_gradient_of_the_loss"),
    "strides ignored (TransformerEngine #2734; unsloth 10713)": (
        "test_opinfo::test_view_of_each_argument", "test_sizes::test_layouts_of_cross_entropy"),
    "(-inf) - (-inf) in an online softmax; a running maximum from 0 (flash-attention #1930)": (
        "test_losses::test_extreme_logits", "test_fuzz::test_cross_entropy"),
    "p - 1 rounded before it is taken (Liger-Kernel 1329)": ("test_losses::test_confident_rows",),
    "all targets ignored, no rows (Liger-Kernel #177)": (
        "test_losses::test_nothing_counts", "test_sizes::test_no_positions"),
    "32-bit row * stride (fla 1082; trl 7266)": (
        "test_huge::test_cross_entropy_far_apart", "test_huge::test_pointwise_loss_of_many",
        "test_gpu::test_huge_cross_entropy"),
    "a vocabulary that is no multiple of the tile (verl #2899)": (
        "test_sizes::test_every_number_of_classes",
        "test_sizes::test_class_counts_around_switches"),
    "rows that return early leave output unwritten (Liger-Kernel 1338)": (
        "test_losses::test_values_and_gradients",),  # under the poison fixture
    "a mean that counts ignored rows, tested against itself (TransformerEngine 2476)": (
        "test_accuracy::test_error_is_no_larger_than_torchs",
        "test_loss_properties::test_ignored_positions_might_as_well_not_be_there"),
    "the host waits (Liger-Kernel 1292)": ("test_gpu::test_losses_do_not_wait",),
    "smoothing with ignored or weighted targets, soft targets, gradients to them "
    "(pytorch #72056, #73205; Automodel 2428)": (
        "test_opinfo::test_sample", "test_loss_properties::test_smoothing_is_another_distribution"),
    "no torch.func; a launch on another GPU (Liger-Kernel #1184, #1303)": (
        "test_opinfo::test_transform",
        "test_gpu::test_tensors_on_another_device_than_the_current"),
    "a transposed batch goes the slow way (picotron 33)": (
        "test_losses::test_values_and_gradients",),  # the rows NLC insist on the kernel
    "torch's own contract of dtypes, errors, autocast, weights, broadcasting": (
        "test_opinfo::test_error_samples", "test_moduleinfo::test_mode",
        "test_loss_contract::test_mixed_dtypes_promote", "test_loss_properties::test_broadcast"),
    # optimizers
    "torch's fused CPU kernels never read strides": ("test_optimizers::test_every_layout",),
    "torch's fused CPU SGD skips SIMD blocks (pytorch #191763)": (
        "test_optimizers::test_updates", "test_sizes::test_every_size_of_a_parameter"),
    "a skipped first step leaves momentum uninitialised (LibreYOLO #771)": (
        "test_optimizer_contract::test_grad_scaler_with_fused",
        "test_optimizer_contract::test_skipped_first_step_does_not_count_as_the_first"),
    "dtypes and devices of loaded states; loaded flags (pytorch #43706, #75224, #80809, #103256)": (
        "test_checkpoints::test_load_into_another_dtype",
        "test_checkpoints::test_loaded_groups_replace_options"),
    "step counts kept in the group (apex #577)": (
        "test_checkpoints::test_relay", "test_optimizers::test_late_group"),
    "attributes lost by pickle and deepcopy": ("test_checkpoints::test_copies",),
    "a trailing empty tensor skips the last launch (apex; DeepSpeed; TransformerEngine #3207)": (
        "test_optimizers::test_updates", "test_sizes::test_nothing_but_empty_parameters"),
    "32-bit numel (pytorch #101449; DeepSpeed #7640)": (
        "test_huge::test_step_of_many", "test_gpu::test_huge_sgd"),
    "the two kinds of weight decay confused (FlagGems #4988)": (
        "test_accuracy::test_error_is_no_larger_than_torchs", "test_optim_db::test_inputs"),
    "the caller's gradient changed": (
        "test_optimizers::test_updates", "test_guarded::test_every_optimizer"),
    "a learning rate compiled in; autotuning in place (FlagGems #3810; dion #81)": (
        "test_compiled_ahead::test_hyperparameters_and_steps_are_no_constants",
        "test_optim_surroundings::test_scheduler"),
    "found_inf read by the host; flags that make Lightning raise (FlagGems #5878; "
    "accelerate #4242; Lightning #15555)": (
        "test_gpu::test_scaled_steps_do_not_wait", "test_optim_surroundings::test_grad_scaler",
        "test_traps::test_scaling_is_offered_as_torch"),
    "no momentum yet where there was no gradient yet": (
        "test_optimizers::test_missing_gradients", "test_traps::test_late_gradient_under_fused"),
    "what accelerate and GradScaler do to an optimizer": (
        "test_traps::test_habits_of_frameworks", "test_optim_surroundings::test_grad_scaler"),
    "shared storage, the same parameter twice, rebound data, gradients of another dtype": (
        "test_sizes::test_shared_memory", "test_optimizers::test_rebound_data",
        "test_guarded_stress::test_memory_comes_and_goes",
        "test_optimizer_contract::test_gradient_dtype_differs"),
    # numba
    "torch's thread count reset (numba #9387)": ("test_processes::test_thread_counts",),
    "threads at once abort, forked children die (numba #8563)": (
        "test_processes::test_threads_at_once",
        "test_processes::test_fork_after_use", "test_guarded_stress::test_threads_and_forks"),
    "stale or unfindable disk caches, leaked files (numba #1833, #9483, #6845, #4032)": (
        "test_cache::test_edited_formula_is_compiled_anew", "test_cache::test_read_only_install",
        "test_cache::test_cache_does_not_grow"),
    "NUMBA_NUM_THREADS caps, OMP_NUM_THREADS is ignored (numba #10454)": (
        "test_processes::test_thread_counts_with_one_thread_in_the_environment",),
    "fast mathematics assume NaN and infinities away": (
        "test_losses::test_extreme_logits", "test_extremes::test_extreme_elements",
        "test_fuzz_optimizers::test_optimizer"),
    # triton
    "versions of Triton fuse operations by default, or don't": (
        "test_compiled_ahead::test_options_are_told",),
    "doubles creep in (Liger-Kernel 1362; pytorch #154069)": (
        "test_compiled_ahead::test_no_float64",),
    "arguments of 1 or divisible by 16 compile anew": (
        "test_compiled_ahead::test_number_of_elements_is_no_constant",
        "test_compiled_ahead::test_number_of_rows_is_no_constant"),
    "the interpreter is no GPU": (
        "test_compiled_ahead::test_registers", "test_compiled_ahead::test_row_accesses",
        "test_gpu::test_losses_are_the_same_bits"),
}  # fmt: skip


@functools.cache
def functions_in(name: str) -> frozenset[str]:
    tree = ast.parse((Path(__file__).parent / f"{name}.py").read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


@pytest.mark.parametrize("trap", TRAPS)
def test_each_trap_has_tests(trap: str) -> None:
    for test in TRAPS[trap]:
        file, name = test.split("::")
        assert name in functions_in(file)


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_scaling_is_offered_as_torch(name: str, fused: bool) -> None:
    """Lightning and GradScaler look whether the attribute is there."""
    ours, theirs = (
        getattr(module, name)([torch.zeros(3)], fused=fused)
        for module in (fastopt.optim, torch.optim)
    )
    word = "_step_supports_amp_scaling"
    assert getattr(ours, word, None) == getattr(theirs, word, None)


def test_late_gradient_under_fused() -> None:
    """Where torch's fused SGD raises a TypeError its for-loop is right."""
    grads = torch.randn(3, 70)
    outcomes = []
    for module, options in ((fastopt.optim, {"fused": True}), (torch.optim, {"foreach": False})):
        params = [Parameter(torch.ones(70)) for _ in range(2)]
        optimizer = module.SGD(params, lr=0.1, momentum=0.9, dampening=0.5, **options)
        for turn, grad in enumerate(grads):
            params[0].grad = grad.clone()
            params[1].grad = grad.clone() if turn else None
            optimizer.step()
        outcomes.append(params)
    torch.testing.assert_close(*outcomes)


@pytest.mark.parametrize("name", NAMES)
def test_habits_of_frameworks(name: str) -> None:
    """Accelerate loads before the first step, wraps step and looks at zero_grad's signature."""
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        param = Parameter(torch.ones(70))
        optimizer = getattr(module, name)([param], lr=0.1)
        optimizer.load_state_dict(optimizer.state_dict())
        assert "set_to_none" in inspect.signature(optimizer.zero_grad).parameters
        calls: list[Any] = []
        step = optimizer.step

        def patched(self: Any, *args: Any, step: Any = step, calls: Any = calls) -> Any:
            calls.append(self)
            return step(*args)

        def closure(param: Parameter = param, optimizer: Any = optimizer) -> torch.Tensor:
            optimizer.zero_grad()
            loss = (param**2).sum()
            loss.backward()
            return loss

        optimizer.step = types.MethodType(patched, optimizer)
        losses = torch.stack([optimizer.step(closure).detach() for _ in range(3)])
        assert calls == [optimizer] * 3
        outcomes.append((losses, param.detach()))
    torch.testing.assert_close(*outcomes)

"""torch.distributed on two processes: the same numbers as one process with torch alone."""

from __future__ import annotations

import io
import multiprocessing
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytestmark = pytest.mark.skipif(
    not torch.distributed.is_available() or not torch.distributed.is_gloo_available(),
    reason="torch was built without torch.distributed's gloo",
)

if torch.distributed.is_available():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, while it is imported
        import ranks

Run = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    """Run a scenario on every process; what each of them returned."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe() for _ in range(ranks.WORLD)]
    processes = [
        context.Process(target=ranks.serve, args=(rank, theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    for process in processes:
        process.start()

    def order(name: str, options: dict[str, Any], seed: int) -> list[Any]:
        folder: Path = tmp_path_factory.mktemp("group")
        for ours, _ in pipes:
            ours.send((name, options, seed, folder))
        answers = [ours.recv() for ours, _ in pipes]
        assert not any(isinstance(a, str) for a in answers), "\n".join(map(str, answers))
        return [torch.load(io.BytesIO(answer)) for answer in answers]

    yield order
    for (ours, _), process in zip(pipes, processes, strict=True):
        ours.send(None)
        process.join(60)


@pytest.mark.parametrize(
    ("scenario", "options"),
    [
        *(("data_parallel", {"name": name}) for name in ranks.OPTIMIZERS),
        ("data_parallel", {"gradient_as_bucket_view": True}),
        ("compiled_with_loss", {}),
        *(("fully_sharded", {"name": name}) for name in ranks.OPTIMIZERS),
        ("fully_sharded", {"name": "AdamW", "fused": True}),
        ("mixed_precision", {}),
        ("shards_replaced", {}),
        ("cut_otherwise", {}),
        ("rounded_shards", {}),
        ("rule_in_shards", {}),
        ("zero_redundancy", {}),
        ("zero_redundancy", {"views": True}),
        ("checkpoints", {"first": "torch"}),
        ("checkpoints", {"first": "fastopt"}),
        ("tensor_parallel", {}),
        ("parallel_loss", {}),
        ("parallel_loss", {"layer": True}),
        ("class_out_of_range", {}),
        ("what_is_sent", {}),
        ("left_to_torch", {}),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(map(str, value.values())),
)
def test_is_the_single_process(scenario: str, options: dict[str, Any], run: Run, seed: int) -> None:
    for found, expected in run(scenario, options, seed):
        if scenario == "mixed_precision":  # a last digit decides how a bfloat16 is rounded
            bounds = {"rtol": 1e-2, "atol": 1e-3}
        else:
            bounds = {"rtol": 1e-9, "atol": 1e-10}
        torch.testing.assert_close(found, expected, **bounds)


# Of bfloat16 a layer's logits are rounded, too.
BOUNDS = {torch.float64: (1e-9, 1e-10), torch.float32: (1e-5, 1e-6), torch.bfloat16: (1e-2, 3e-2)}


@pytest.mark.parametrize("scenario", ["logits_in_shards", "layer_in_shards", "extreme_logits"])
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_classes_in_shards(scenario: str, dtype: torch.dtype, run: Run, seed: int) -> None:
    rtol, atol = BOUNDS[dtype]
    for found, expected in run(scenario, {"dtype": dtype}, seed):
        assert found
        torch.testing.assert_close(found, expected, rtol=rtol, atol=atol, equal_nan=True)

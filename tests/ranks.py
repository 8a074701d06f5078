"""Trainings on several processes, each beside the same one on a single process by torch alone.

Every scenario returns (what it found, what the single process found), tensors by name.
"""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from class_shards import (  # noqa: F401
    class_out_of_range,
    extreme_logits,
    layer_in_shards,
    left_to_torch,
    logits_in_shards,
    what_is_sent,
)
from rules import Adam
from torch import Tensor, nn
from torch._dynamo.backends.debugging import aot_eager
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_tensor,
    init_device_mesh,
)
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

import fastopt

WORLD = 2
STEPS = 5
CLASSES = 1001  # an odd one: shards differ in size
ROWS = 128 * WORLD  # 128,128 logits a process: more than where torch's own loss is the faster one
Results = dict[str, Tensor]
Outcome = tuple[Results, Results]
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "SGD": {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01},
    "Adam": {"lr": 0.01, "amsgrad": True},
    "AdamW": {"lr": 0.01, "weight_decay": 0.1},
    "RMSprop": {"lr": 0.001, "momentum": 0.5, "centered": True},
}


def net(seed: int, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    """Its scale is one number, of which only one process can have the shard."""
    torch.manual_seed(seed)

    class Scale(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.by = nn.Parameter(torch.ones(1))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.by

    layers = nn.Linear(24, 33), nn.GELU(), nn.LayerNorm(33), Scale(), nn.Linear(33, CLASSES)
    return nn.Sequential(*layers).to(dtype)


def data(seed: int, dtype: torch.dtype = torch.float64) -> list[tuple[Tensor, Tensor]]:
    torch.manual_seed(seed + 1)
    return [
        (torch.randn(ROWS, 24, dtype=dtype), torch.randint(CLASSES, (ROWS,))) for _ in range(STEPS)
    ]


def mine(batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """This process's part of a batch."""
    x, y = batch
    return x.chunk(WORLD)[dist.get_rank()], y.chunk(WORLD)[dist.get_rank()]


def train(
    model: nn.Module,
    optimizer: Optimizer,
    batches: list[tuple[Tensor, Tensor]],
    criterion: nn.Module,
    clip: float | None = None,
) -> list[Tensor]:
    losses = []
    for x, y in batches:
        loss = criterion(model(x), y)
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    return losses


def alone(
    seed: int, name: str, clip: float | None = None, dtype: torch.dtype = torch.float64
) -> Results:
    """The single process, torch's loss and optimizer."""
    model = net(seed, dtype)
    optimizer = getattr(torch.optim, name)(model.parameters(), **OPTIMIZERS[name])
    losses = train(model, optimizer, data(seed, dtype), nn.CrossEntropyLoss(), clip)
    return results(model, losses)


def results(model: nn.Module, losses: list[Tensor]) -> Results:
    found = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = {name: p.full_tensor() if isinstance(p, DTensor) else p for name, p in found.items()}
    return {**found, "losses": torch.stack(losses)}


def averaged(losses: list[Tensor]) -> list[Tensor]:
    for loss in losses:
        dist.all_reduce(loss)
    return [loss / WORLD for loss in losses]


def is_compiled(optimizer: Optimizer) -> None:
    decisions = fastopt.explain(optimizer)
    assert decisions
    assert {d.backend for d in decisions} == {"numba"}, str(decisions)


def sharded(model: nn.Sequential, **options: Any) -> nn.Sequential:
    mesh = init_device_mesh("cpu", (WORLD,))
    for layer in (model[0], model[-1]):
        fully_shard(layer, mesh=mesh, **options)
    fully_shard(model, mesh=mesh, **options)
    return model


# -- scenarios ----------------------------------------------------------------------------


def data_parallel(seed: int, folder: Path, name: str = "AdamW", **options: Any) -> Outcome:
    model = DistributedDataParallel(net(seed), **options)
    optimizer = getattr(fastopt.optim, name)(model.parameters(), **OPTIMIZERS[name])
    criterion = fastopt.nn.CrossEntropyLoss()
    losses = train(model, optimizer, [*map(mine, data(seed))], criterion, clip=0.1)
    is_compiled(optimizer)
    return results(model.module, averaged(losses)), alone(seed, name, clip=0.1)


def compiled_with_loss(seed: int, folder: Path, name: str = "AdamW") -> Outcome:
    """Torch.compile splits a graph where buckets of gradients end; the last part has the loss."""

    class WithLoss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.criterion = net(seed), fastopt.nn.CrossEntropyLoss()

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            loss: Tensor = self.criterion(self.net(x), y)
            return loss

    operators = []

    def note(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        # The loss's operator, which is made a kernel's once the graph is made ready for a compiler.
        operators.append([str(node.target) for node in graph.graph.nodes])
        return aot_eager(graph, inputs)

    assert torch._dynamo.config.optimize_ddp
    model = DistributedDataParallel(WithLoss(), bucket_cap_mb=0.05)
    optimizer = getattr(fastopt.optim, name)(model.parameters(), **OPTIMIZERS[name])
    compiled = torch.compile(model, backend=note)
    losses = []
    first = mock.patch.object(dist, "_DEFAULT_FIRST_BUCKET_BYTES", 10_000)
    with first, fastopt.use_backend("numba"):
        for x, y in map(mine, data(seed)):
            loss = compiled(x, y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
    assert len(operators) > 1
    assert sum("fastopt.cross_entropy" in names for names in operators) == 1
    return results(model.module.net, averaged(losses)), alone(seed, name)


def fully_sharded(seed: int, folder: Path, name: str = "AdamW", **options: Any) -> Outcome:
    model = sharded(net(seed))
    optimizer = getattr(fastopt.optim, name)(model.parameters(), **OPTIMIZERS[name], **options)
    criterion = fastopt.nn.CrossEntropyLoss()
    losses = train(model, optimizer, [*map(mine, data(seed))], criterion, clip=0.1)
    is_compiled(optimizer)
    for p, state in optimizer.state.items():
        assert isinstance(p, DTensor)
        assert {type(s) for key, s in state.items() if key != "step"} == {DTensor}
    return results(model, averaged(losses)), alone(seed, name, clip=0.1)


def mixed_precision(seed: int, folder: Path) -> Outcome:
    """Gradients are reduced in bfloat16; beside torch's optimizer on the same shards."""
    found = []
    for module in (fastopt, torch):
        policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.bfloat16)
        model = sharded(net(seed, torch.float32), mp_policy=policy)
        optimizer = module.optim.AdamW(model.parameters(), **OPTIMIZERS["AdamW"])
        batches = [mine(batch) for batch in data(seed, torch.float32)]
        losses = train(model, optimizer, batches, torch.nn.CrossEntropyLoss())
        if module is fastopt:
            is_compiled(optimizer)
        found.append(results(model, averaged(losses)))
    return found[0], found[1]


def shards_replaced(seed: int, folder: Path) -> Outcome:
    """Loaded, moved and replaced between steps: the plan must notice each."""
    found = []
    for module in (fastopt, torch):
        model = sharded(net(seed))
        optimizer = module.optim.Adam(model.parameters(), lr=0.01)
        batches = [mine(batch) for batch in data(seed)]
        losses = train(model, optimizer, batches[:2], nn.CrossEntropyLoss())
        other = {n: distribute_tensor(t.detach(), p.device_mesh, p.placements)
                 for (n, p), t in zip(model.named_parameters(), net(seed + 7).parameters(), strict=True)}  # fmt: skip  # noqa: E501
        model.load_state_dict(other, assign=False)
        losses += train(model, optimizer, batches[2:3], nn.CrossEntropyLoss())
        optimizer.load_state_dict(optimizer.state_dict())
        losses += train(model, optimizer, batches[3:4], nn.CrossEntropyLoss())
        model.load_state_dict(other, assign=True)
        losses += train(model, optimizer, batches[4:], nn.CrossEntropyLoss())
        if module is fastopt:
            is_compiled(optimizer)
        found.append(results(model, averaged(losses)))
    return found[0], found[1]


def cut_otherwise(seed: int, folder: Path) -> Outcome:
    """Gradients cut unlike their parameters, and parameters that are sums yet to be taken."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(seed)
    values = [torch.randn(7, 5, dtype=torch.float64) for _ in range(6)]
    found = []
    for module in (fastopt, torch):
        params = [
            nn.Parameter(distribute_tensor(values[0], mesh, [Shard(0)])),
            nn.Parameter(distribute_tensor(values[1], mesh, [Shard(0)])),
            nn.Parameter(DTensor.from_local(values[2].clone(), mesh, [Partial()])),
        ]
        optimizer = module.optim.SGD(params, lr=0.1)
        for placements in ([Shard(1)], [Replicate()]):
            params[0].grad = distribute_tensor(values[3], mesh, placements)
            params[1].grad = distribute_tensor(values[4], mesh, [Shard(0)])
            params[2].grad = DTensor.from_local(values[5].clone(), mesh, [Partial()])
            if module is fastopt:
                said = {d.backend: str(d) for d in fastopt.explain(optimizer)}
                assert said.keys() == {"numba", "reference"}
                assert "a gradient of placements" in str(fastopt.explain(optimizer))
                assert "a sum yet to be taken" in str(fastopt.explain(optimizer))
            optimizer.step()
        found.append({str(k): p.detach().full_tensor() for k, p in enumerate(params)})
    return found[0], found[1]


def rounded_shards(seed: int, folder: Path) -> Outcome:
    """Replicas round alike, shards each by numbers of their own; beside torch's operations."""
    mesh, found = init_device_mesh("cpu", (WORLD,)), []
    for backend in ("numba", "reference"):
        ones = torch.ones(4 * WORLD, 500, dtype=torch.bfloat16)
        whole, cut = (
            nn.Parameter(distribute_tensor(ones, mesh, [placement]))
            for placement in (Replicate(), Shard(0))
        )
        optimizer = fastopt.optim.SGD(
            [whole, cut], lr=2.0**-10, momentum=0.5, state_dtype=torch.bfloat16,
            rounding="stochastic", seed=seed,
        )  # fmt: skip
        for p in (whole, cut):
            p.grad = torch.ones_like(p)
        with fastopt.use_backend(backend):
            for _ in range(2):
                optimizer.step()
        assert type(optimizer.state[cut]["momentum_buffer"]) is DTensor
        replicas = [torch.empty_like(ones) for _ in range(WORLD)]
        dist.all_gather(replicas, whole.to_local().detach())
        assert all(torch.equal(replicas[0], other) for other in replicas)
        first, second = cut.detach().full_tensor().chunk(WORLD)
        assert not torch.equal(first, second)
        found.append({"whole": replicas[0], "cut": cut.detach().full_tensor()})
    return found[0], found[1]


def rule_in_shards(seed: int, folder: Path) -> Outcome:
    """A user's rule, beside torch's optimizer of the same name on whole parameters."""
    mesh = init_device_mesh("cpu", (WORLD,))
    torch.manual_seed(seed)
    values = [torch.randn(7, 5, dtype=torch.float64) for _ in range(4)]
    whole = nn.Parameter(values[0].clone())
    cut = nn.Parameter(distribute_tensor(values[0], mesh, [Shard(0)]))
    theirs, ours = torch.optim.Adam([whole], lr=0.1), Adam([cut], lr=0.1)
    for grad in values[1:]:
        whole.grad, cut.grad = grad, distribute_tensor(grad, mesh, [Shard(0)])
        theirs.step()
        ours.step()
    is_compiled(ours)
    (state,) = ours.state.values()
    found = {"p": cut, "m": state["exp_avg"]}
    return (
        {name: value.detach().full_tensor() for name, value in found.items()},
        {"p": whole.detach(), "m": theirs.state[whole]["exp_avg"]},
    )


def zero_redundancy(seed: int, folder: Path, views: bool = False) -> Outcome:
    model = DistributedDataParallel(net(seed))
    optimizer = ZeroRedundancyOptimizer(
        model.parameters(), optimizer_class=fastopt.optim.AdamW,
        parameters_as_bucket_view=views, **OPTIMIZERS["AdamW"],
    )  # fmt: skip
    losses = train(model, optimizer, [*map(mine, data(seed))], fastopt.nn.CrossEntropyLoss())
    is_compiled(optimizer.optim)
    return results(model.module, averaged(losses)), alone(seed, "AdamW")


def checkpoints(seed: int, folder: Path, first: str = "torch") -> Outcome:
    """Two steps with one, saved by all processes; the rest with the other."""
    modules = {"torch": torch, "fastopt": fastopt}
    batches = [mine(batch) for batch in data(seed)]
    losses = []
    for place, (name, part) in enumerate(
        ((first, batches[:2]), ({"torch": "fastopt", "fastopt": "torch"}[first], batches[2:]))
    ):
        model = sharded(net(seed + 10 * place))  # other values, which the checkpoint replaces
        options = OPTIMIZERS["Adam"]
        optimizer = modules[name].optim.Adam(model.parameters(), **options)
        if place:
            states = dict(
                zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
            )
            dcp.load(states, checkpoint_id=folder)
            set_state_dict(
                model, optimizer,
                model_state_dict=states["model"], optim_state_dict=states["optimizer"],
            )  # fmt: skip
        losses += train(model, optimizer, part, modules[name].nn.CrossEntropyLoss())
        if name == "fastopt":
            is_compiled(optimizer)
        if not place:
            states = dict(
                zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True)
            )
            dcp.save(states, checkpoint_id=folder)
    return results(model, averaged(losses)), alone(seed, "Adam")


def tensor_parallel(seed: int, folder: Path) -> Outcome:
    """Some parameters are DTensors and some are not."""
    model = net(seed)
    whole = ColwiseParallel(output_layouts=Replicate(), use_local_output=True)
    plan = {"0": whole, "4": whole}
    parallelize_module(model, init_device_mesh("cpu", (WORLD,)), plan)
    optimizer = fastopt.optim.AdamW(model.parameters(), **OPTIMIZERS["AdamW"])
    losses = train(model, optimizer, data(seed), fastopt.nn.CrossEntropyLoss())
    is_compiled(optimizer)
    return results(model, losses), alone(seed, "AdamW")


def parallel_loss(seed: int, folder: Path, layer: bool = False) -> Outcome:
    """The last layer's classes stay in shards, and so do its logits, or there are none."""
    model, mesh = net(seed), init_device_mesh("cpu", (WORLD,))
    in_shards = ColwiseParallel(output_layouts=Shard(-1), use_local_output=False)
    parallelize_module(model, mesh, {"4": in_shards})
    optimizer = fastopt.optim.AdamW(model.parameters(), **OPTIMIZERS["AdamW"])

    def of_layer(hidden: Tensor, target: Tensor) -> Tensor:
        whole = DTensor.from_local(hidden, mesh, [Replicate()], run_check=False)
        head: Any = model[-1]
        return fastopt.nn.functional.linear_cross_entropy(
            whole, head.weight, target, linear_bias=head.bias
        )

    criterion: Any = of_layer if layer else fastopt.nn.CrossEntropyLoss()
    with loss_parallel():
        losses = train(model[:-1] if layer else model, optimizer, data(seed), criterion)
    return results(model, [loss.full_tensor() for loss in losses]), alone(seed, "AdamW")


# -- a process that plays one rank ------------------------------------------------------------


def serve(rank: int, connection: Connection) -> None:
    """Run scenarios by name until told to stop; each in a process group of its own."""
    torch.set_num_threads(1)
    while (order := connection.recv()) is not None:
        name, options, seed, folder = order
        scenario: Callable[..., Outcome] = globals()[name]
        try:
            store = dist.FileStore(str(folder / "store"), WORLD)
            dist.init_process_group(
                "gloo", rank=rank, world_size=WORLD, store=store, timeout=timedelta(seconds=60)
            )
            try:
                outcome = scenario(seed, folder / "checkpoint", **options)
            finally:
                dist.destroy_process_group()
            buffer = io.BytesIO()
            torch.save(outcome, buffer)
            connection.send(buffer.getvalue())
        except Exception:
            connection.send(traceback.format_exc())

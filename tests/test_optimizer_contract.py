"""What surrounds an optimizer in torch: copies, hooks, closures, scalers, odd parameters."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from cases import BACKEND, DEVICE, FLOATS, OPTIMIZERS, OptimizerCase
from race import NAMES
from test_optimizers import (
    ADAM,
    RMSPROP,
    SGD,
    Pair,
    assert_same,
    assert_same_state,
    build,
    parameters,
    set_grads,
    twins,
)
from torch.nn import Parameter

import fastopt


@pytest.mark.parametrize("case", OPTIMIZERS, ids=str)
def test_is_torchs_class(case: OptimizerCase) -> None:
    params = parameters(shapes=[(3,)])
    mine, torchs = build(fastopt.optim, case, params), getattr(torch.optim, case.operation)
    assert isinstance(mine, torchs)
    assert repr(mine) == repr(torchs(params, **case.options))


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@pytest.mark.parametrize("case", [ADAM, SGD, RMSPROP], ids=str)
def test_copies_go_on(case: OptimizerCase, how: str) -> None:
    """A model and its optimizer copied in mid-flight; the original goes on, too."""
    pair = Pair(case)
    pair.step(2)
    together = {"params": pair.mine, "optimizer": pair.ours}
    twin = copy.deepcopy(together) if how == "deepcopy" else pickle.loads(pickle.dumps(together))
    original, original_optimizer = pair.mine, pair.ours
    pair.mine, pair.ours = twin["params"], twin["optimizer"]
    kept = [p.detach().clone() for p in original]
    pair.step(2)
    assert all(torch.equal(p, k) for p, k in zip(original, kept, strict=True))
    set_grads(original)
    original_optimizer.step()
    assert not torch.equal(original[0], kept[0])


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_learning_rate_tensor(name: str) -> None:
    mine = parameters()
    torchs = twins(mine)
    lr, lr_twin = torch.tensor(0.05), torch.tensor(0.05)
    ours, theirs = (
        getattr(fastopt.optim, name)(mine, lr=lr),
        getattr(torch.optim, name)(torchs, lr=lr_twin),
    )
    for _ in range(3):
        set_grads(mine, torchs)
        ours.step()
        theirs.step()
        lr.mul_(0.5)  # in place: the tensor is the same object
        lr_twin.mul_(0.5)
    assert_same(mine, torchs)
    assert ours.param_groups[0]["lr"] is lr


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_learning_rate_becomes_a_tensor(name: str) -> None:
    """Of the same value, so that nothing seems to have changed, until it does so in place."""
    mine = parameters(shapes=[(70,)])
    torchs = twins(mine)
    optimizers = [
        getattr(m, name)(p, lr=0.5) for m, p in ((fastopt.optim, mine), (torch.optim, torchs))
    ]
    for rate in (None, 0.5, 0.125, 0.25):
        set_grads(mine, torchs)
        for optimizer in optimizers:
            group = optimizer.param_groups[0]
            if isinstance(group["lr"], torch.Tensor):
                group["lr"].fill_(rate)
            elif rate is not None:
                group["lr"] = torch.tensor(rate)
            optimizer.step()
        assert_same(mine, torchs)


def test_learning_rate_elsewhere() -> None:
    """Not ignored: whatever torch makes of it."""
    p = Parameter(torch.zeros(4))
    p.grad = torch.ones(4)
    optimizer = fastopt.optim.SGD([p], lr=1.0)
    optimizer.param_groups[0]["lr"] = torch.tensor(1.0, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        optimizer.step()


@pytest.mark.parametrize("case", [ADAM, RMSPROP], ids=str)
def test_step_counters_stay_where_they_are(case: OptimizerCase) -> None:
    """Others may have them in shared memory, or look at them from elsewhere."""
    pair = Pair(case)
    pair.step()
    counters = [state["step"] for state in pair.ours.state.values()]
    if DEVICE == "cpu":
        for counter in counters:
            counter.share_memory_()
    places, views = [c.data_ptr() for c in counters], [c.detach() for c in counters]
    pair.step()
    for p in (pair.mine[2], pair.torchs[2]):
        p.requires_grad_(False).grad = None
    pair.step()
    assert [c.data_ptr() for c in counters] == places
    assert sorted({v.item() for v in views}) == [3.0]


def test_closure() -> None:
    p = Parameter(torch.tensor([3.0]))
    optimizer = fastopt.optim.SGD([p], lr=0.1)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 9.0
    with torch.no_grad():
        assert optimizer.step(closure=closure).item() == pytest.approx(2.4**2)


@pytest.mark.parametrize("name", NAMES)
def test_hooks_run_once(name: str) -> None:
    params = parameters(shapes=[(3,), (4, 4)])
    getattr(torch.optim, name)(params)  # torch's own step is wrapped from now on
    optimizer = getattr(fastopt.optim, name)(params)
    seen: list[str] = []
    optimizer.register_step_pre_hook(lambda *a: seen.append("pre"))
    optimizer.register_step_post_hook(lambda *a: seen.append("post"))
    set_grads(params)
    optimizer.step()
    with fastopt.use_backend("reference"):
        optimizer.step()
    assert seen == ["pre", "post"] * 2


@pytest.mark.parametrize("name", NAMES)
def test_subclasses_of_ours(name: str) -> None:
    class Mine(getattr(fastopt.optim, name)):
        def step(self, closure: Any = None) -> Any:
            self.steps = getattr(self, "steps", 0) + 1
            return super().step(closure)

    params = parameters(shapes=[(3,)])
    torchs = twins(params)
    ours, theirs = Mine(params, lr=0.1), getattr(torch.optim, name)(torchs, lr=0.1)
    for _ in range(2):
        set_grads(params, torchs)
        ours.step()
        theirs.step()
    assert_same(params, torchs)
    assert ours.steps == 2


@pytest.mark.parametrize("name", ["Adam", "AdamW", "RMSprop"])
def test_sparse_gradients_get_torchs_error(name: str) -> None:
    dense = Parameter(torch.zeros(4))
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = getattr(fastopt.optim, name)([dense, embedding.weight])
    embedding(torch.tensor([1, 2])).sum().backward()
    dense.grad = torch.ones(4)
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()
    assert torch.equal(dense, torch.zeros(4))
    assert dense._version == 0


def test_sparse_sgd_beside_dense() -> None:
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        torch.manual_seed(3)
        embedding, linear = torch.nn.Embedding(5, 3, sparse=True), torch.nn.Linear(3, 2)
        params = [*embedding.parameters(), *linear.parameters()]
        optimizer = module.SGD(params, lr=0.1)
        for _ in range(3):
            optimizer.zero_grad()
            linear(embedding(torch.tensor([1, 2, 1]))).sum().backward()
            optimizer.step()
        outcomes.append(params)
    assert_same(*outcomes)


@pytest.mark.parametrize("name", NAMES)
def test_mixed_kinds_in_one_group(name: str) -> None:
    """Complex, half, double and strided parameters, each by who can serve it."""
    mine = [
        Parameter(torch.randn(5, dtype=torch.complex64)),
        Parameter(torch.randn(6).bfloat16()),
        Parameter(torch.randn(7).double()),
        Parameter(torch.randn(8)),
        Parameter(torch.randn(9, 4)[:, ::2]),
    ]
    torchs = twins(mine)
    ours, theirs = (
        getattr(m, name)(p, lr=0.1) for m, p in ((fastopt.optim, mine), (torch.optim, torchs))
    )
    for _ in range(3):
        for p, q in zip(mine, torchs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        ours.step()
        theirs.step()
    for p, q in zip(mine, torchs, strict=True):
        loose = {"rtol": 2e-2, "atol": 2e-2} if p.dtype == torch.bfloat16 else {}
        torch.testing.assert_close(p, q, **loose)
    backends = [d.backend for d in fastopt.explain(ours)]
    assert sorted(backends) == sorted(["reference"] * 2 + [BACKEND] * 3)


def test_saved_tensors_notice_the_step() -> None:
    p = Parameter(torch.randn(4))
    loss = (p**2).sum()
    p.grad = torch.ones(4)
    fastopt.optim.Adam([p]).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_grad_scaler_with_fused(name: str) -> None:
    """A skipped first step leaves no trace; gradients are scaled in the kernel, not in place."""
    options: dict[str, Any] = {"lr": 0.1, **({"momentum": 0.9} if name == "SGD" else {})}
    mine = parameters()
    torchs = twins(mine)
    ours = getattr(fastopt.optim, name)(mine, fused=True, **options)
    theirs = getattr(torch.optim, name)(torchs, **options)
    scaler = torch.amp.GradScaler(DEVICE, init_scale=4.0, growth_interval=100)
    for turn in range(4):
        set_grads(mine, torchs)
        for p in mine:
            p.grad.mul_(scaler.get_scale())
        if turn == 0:
            mine[1].grad[3] = float("inf")
        scaler.scale(torch.zeros(()))
        kept = mine[1].grad.clone()
        scaler.step(ours)
        assert torch.equal(mine[1].grad, kept)
        scaler.update()
        if turn > 0:
            theirs.step()
        assert_same(mine, torchs)
        assert not hasattr(ours, "grad_scale")


@pytest.mark.parametrize("name", ["SGD", "Adam", "AdamW"])
def test_scaled_gradients_of_what_torch_updates(name: str) -> None:
    """GradScaler's numbers reach parameters with gaps, too, beside one without."""
    start = torch.randn(6, 8), torch.randn(40)
    mine, torchs = (
        [Parameter(start[0].clone()[:, ::2]), Parameter(start[1].clone())] for _ in range(2)
    )
    ours = getattr(fastopt.optim, name)(mine, lr=0.1, fused=True)
    theirs = getattr(torch.optim, name)(torchs, lr=0.1, foreach=False)
    ours.grad_scale = torch.tensor(4.0)
    for found in (1.0, 0.0, 1.0, 0.0):
        set_grads(mine, torchs)
        for p in mine:
            p.grad.mul_(4.0)
        grads = [p.grad for p in mine]
        ours.found_inf = torch.tensor(found)
        ours.step()
        if not found:
            theirs.step()
        assert_same(mine, torchs)
        assert all(p.grad is g for p, g in zip(mine, grads, strict=True))


def test_skipped_first_step_does_not_count_as_the_first() -> None:
    """Dampening spares the first step of a momentum buffer: the first that is taken."""
    mine = parameters()
    torchs = twins(mine)
    options = {"lr": 0.1, "momentum": 0.9, "dampening": 0.5}
    ours = fastopt.optim.SGD(mine, fused=True, **options)
    theirs = torch.optim.SGD(torchs, **options)
    ours.grad_scale = torch.tensor(2.0)
    for found in (1.0, 1.0, 0.0, 1.0, 0.0):
        set_grads(mine, torchs)
        for p in mine:
            p.grad.mul_(2.0)
        ours.found_inf = torch.tensor(found)
        ours.step()
        if not found:
            theirs.step()
        assert_same(mine, torchs)


def test_differentiable_goes_to_torch() -> None:
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        lr = torch.tensor(0.1, requires_grad=True)
        p = torch.tensor([1.0, 2.0], requires_grad=True)
        q = p.clone()
        q.grad = 3 * p
        optimizer = module.SGD([q.detach().requires_grad_()], lr=0.1, differentiable=True)
        param = optimizer.param_groups[0]["params"][0]
        optimizer.param_groups[0]["params"][0] = q
        optimizer.step()
        (grad,) = torch.autograd.grad(q.sum(), p)
        outcomes.append((q.detach(), grad))
        del lr, param
    assert_same(*outcomes)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "options", [{"lr": -1.0}, {"weight_decay": -1.0}, {"lr": torch.ones(2)}], ids=str
)
def test_bad_hyperparameters(name: str, options: dict[str, Any]) -> None:
    params = parameters(shapes=[(3,)])
    with pytest.raises((ValueError, TypeError), match=r".") as expected:
        getattr(torch.optim, name)(params, **options)
    with pytest.raises(expected.type, match=r".") as raised:
        getattr(fastopt.optim, name)(params, **options)
    assert str(raised.value) == str(expected.value)


def test_no_parameters_with_gradients() -> None:
    params = parameters(shapes=[(3,)])
    for name in NAMES:
        optimizer = getattr(fastopt.optim, name)(params)
        assert optimizer.step() is None
        assert optimizer.state.keys() == getattr(torch.optim, name)(params).state.keys()


def test_old_checkpoint_with_a_number_as_step() -> None:
    pair = Pair(ADAM)
    pair.step(2)
    for optimizer, _ in pair.both():
        saved = optimizer.state_dict()
        for state in saved["state"].values():
            state["step"] = int(state["step"])
        optimizer.load_state_dict(saved)
    pair.step(2)


def test_default_dtype_double_counts_in_double() -> None:
    torch.set_default_dtype(torch.float64)
    try:
        mine = parameters(torch.float64)
        torchs = twins(mine)
        ours, theirs = build(fastopt.optim, ADAM, mine), build(torch.optim, ADAM, torchs)
        for _ in range(2):
            set_grads(mine, torchs)
            ours.step()
            theirs.step()
        assert_same_state(ours, theirs)
    finally:
        torch.set_default_dtype(torch.float32)


def test_gradient_dtype_differs() -> None:
    p = Parameter(torch.ones(70, dtype=torch.bfloat16))
    if not hasattr(p, "grad_dtype"):
        pytest.skip("this torch has no gradients of another dtype")
    p.grad_dtype = torch.float32
    grad = torch.randn(70)
    p.grad = grad
    with fastopt.use_backend(BACKEND):
        fastopt.optim.SGD([p], lr=0.5).step()
    torch.testing.assert_close(p.detach(), (1 - 0.5 * grad).bfloat16())


@pytest.mark.parametrize("name", NAMES)
def test_default_device_elsewhere(name: str) -> None:
    """Torch puts new step counters on the default device, whatever comes of it.

    Its ASGD, whose counters are the parameters' device's, makes the next rate there, and fails.
    """
    outcomes = []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(torch.ones(6, device=DEVICE))
        p.grad = torch.full_like(p, 0.5)
        optimizer = getattr(module, name)([p], lr=0.1)
        with torch.device("meta"):
            try:
                optimizer.step()
            except RuntimeError as error:
                outcomes.append(str(error))
            else:
                outcomes.append(p.tolist())
    if name == "ASGD":
        assert "meta" in outcomes[1]
        outcomes[1] = [1 - 0.1 * (0.5 + 1e-4)] * 6
    assert outcomes[0] == pytest.approx(outcomes[1])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_centered_variance_is_never_negative(dtype: torch.dtype) -> None:
    """Under a constant gradient it is 0 but for rounding, of which torch takes a root at times."""
    p = Parameter(torch.zeros(4099, dtype=dtype))
    optimizer = fastopt.optim.RMSprop([p], lr=1e-6, alpha=0.5, eps=1.0, centered=True)
    for _ in range(40):
        p.grad = torch.linspace(-3, 3, 4099).to(dtype)
        with fastopt.use_backend(BACKEND):
            optimizer.step()
    assert p.isfinite().all()


@pytest.mark.parametrize("compiled", [True, False], ids=["compiled", "python"])
@pytest.mark.parametrize("name", ["SGD", "Adam"])
def test_dtypes_changed_in_place(
    name: str, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other numbers of the same size at the same address."""
    if not compiled:
        monkeypatch.setattr("fastopt.optim._proof._compiled", lambda: None)
    start, outcomes = torch.randn(70).half(), []
    for module in (fastopt.optim, torch.optim):
        p = Parameter(start.clone())
        options = {"momentum": 0.9} if name == "SGD" else {}
        optimizer = getattr(module, name)([p], lr=0.1, foreach=False, **options)
        for _ in range(2):
            p.grad = torch.ones_like(p)
            optimizer.step()
        p.grad = None
        states = [v for v in optimizer.state[p].values() if v is not None and v.dim()]
        for t in (p, *states):
            t.data = t.data.view(torch.bfloat16)
        p.grad = torch.ones_like(p)
        optimizer.step()
        outcomes.append([p.detach(), *states])
    torch.testing.assert_close(*outcomes, rtol=2e-2, atol=1e-2, equal_nan=True)

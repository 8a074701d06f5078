"""Which backend runs a call: the decisions as data, without any GPU."""

from __future__ import annotations

import asyncio
import itertools
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from cases import FLOATS

import fastopt
import fastopt.nn.functional as ours
from fastopt import BackendUnavailable, dispatch
from fastopt.dispatch import BACKENDS, Decision, Request
from fastopt.front import crossover as crossovers
from fastopt.front.call import RECORDS
from fastopt.front.crossover import crossover, gpu_crossover, quick_test, usual_crossover
from fastopt.front.torch_only import TorchOnly
from fastopt.kernels.operation import LinearSoftmax
from fastopt.nn._log_prob_and_entropy import RowOutcomes

SINGLE = (torch.float32, torch.float32)
LARGE = 1 << 20
OPERATIONS = (*fastopt.nn._operations.FUNCTIONS, *fastopt.optim._operations.OPTIMIZERS)


def request(operation: str = "mse_loss", **changes: Any) -> Request:
    usual = Request(operation, device="cpu", dtypes=SINGLE, numel=LARGE)
    return usual._replace(**changes)


def choose(**changes: Any) -> Decision:
    return dispatch.choose.__wrapped__(request(**changes))  # past the memory of earlier decisions


# -- decisions --------------------------------------------------------------------------


@pytest.fixture
def triton(monkeypatch: pytest.MonkeyPatch) -> None:
    """The triton backend as if it were installed and had every kernel."""
    backend = BACKENDS["triton"]
    modern = [request(name, device="cuda", capability=(9, 0)) for name in OPERATIONS]
    rules = tuple(rule for rule in backend.rules if all(map(rule.holds, modern)))
    monkeypatch.setitem(BACKENDS, "triton", backend._replace(rules=rules))


@pytest.mark.usefixtures("triton")
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(
    ("changes", "backend", "reasons"),
    [
        ({}, "numba", {"triton": "device=cpu (supported: cuda, xpu)"}),
        (
            {"device": "cuda", "capability": (9, 0)},
            "triton",
            {"numba": "device=cuda (supported: cpu)"},
        ),
        ({"device": "cuda", "capability": (8, 0)}, "triton", {}),
        (
            {"device": "cuda", "capability": (7, 0)},
            "reference",
            {"triton": "compute capability (7, 0) (supported: (8, 0) and newer)"},
        ),
        ({"device": "xpu"}, "triton", {"numba": "device=xpu (supported: cpu)"}),
        (
            {"device": "mps"},
            "reference",
            {
                "triton": "device=mps (supported: cuda, xpu)",
                "numba": "device=mps (supported: cpu)",
            },
        ),
        (
            {"dtypes": (torch.complex64, torch.complex64)},
            "reference",
            {"numba": "dtypes=complex64 (supported: bfloat16, float16, float32, float64)"},
        ),
        (
            {"dtypes": (torch.int64, torch.float32)},
            "reference",
            {"numba": "dtypes=float32, int64 (supported: bfloat16, float16, float32, float64)"},
        ),
        (
            {"dtypes": (torch.float64, torch.bfloat16)},
            "reference",
            {"numba": "dtypes=bfloat16, float64 (supported: float64 with float64 and float32 only"},
        ),
        (
            {"special": ("a torch.func transform", "layout=torch.sparse_coo")},
            "reference",
            {"numba": "a torch.func transform; layout=torch.sparse_coo (supported: none of these)"},
        ),
    ],
)
def test_choice(
    operation: str, changes: dict[str, Any], backend: str, reasons: dict[str, str]
) -> None:
    decision = choose(operation=operation, **changes)
    assert decision.backend == backend
    assert decision.request == request(operation, **changes)
    assert backend not in decision.refusals
    assert decision.refusals.keys() == BACKENDS.keys() - {backend, "reference"}
    for name, reason in reasons.items():
        assert any(reason in found for found in decision.refusals[name]), decision
    for name, found in decision.refusals.items():
        for reason in found:
            assert f"not {name}: {reason}" in str(decision)
    assert str(decision).startswith(f"{operation} on {decision.request.device}, ")


def test_old_gpu_without_triton() -> None:
    """The real rules, whatever is installed here: every reason at once, not the first one."""
    reasons = choose(device="cuda", capability=(7, 0), special=("tracing",)).refusals["triton"]
    assert "compute capability (7, 0) (supported: (8, 0) and newer)" in reasons
    assert "tracing (supported: none of these)" in reasons


#: The losses that there are kernels of.
COMPILED = [name for name, kind in RECORDS.items() if not issubclass(kind, TorchOnly)]


@pytest.mark.parametrize("operation", COMPILED)
def test_crossover(operation: str) -> None:
    limit = crossover(RECORDS[operation], 4, 0)
    assert limit == RECORDS[operation].crossover > 0
    assert choose(operation=operation, numel=limit, crossover=limit).backend == "numba"
    below = choose(operation=operation, numel=limit - 1, crossover=limit)
    assert below.backend == "reference"
    (reason,) = below.refusals["numba"]
    assert str(limit) in reason
    assert str(limit - 1) in reason
    few = choose(operation=operation, numel=1, crossover=limit, insisted="numba")
    assert few.backend == "numba"


class Properties:
    """Those that decide of an H100, as CUDA gives them."""

    memory_clock_rate, memory_bus_width = 2_619_000, 5_120  # kHz, bits: 3.35 TB/s


@pytest.mark.parametrize("operation", COMPILED)
def test_crossover_of_a_gpu(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """From there on the bytes spared take longer than all that the host does more."""
    kind, device = RECORDS[operation], torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(crossovers, "_bandwidth", crossovers._bandwidth.__wrapped__)
    limit, halves = (gpu_crossover(kind, size, device) for size in (4, 2))
    if operation == "linear_cross_entropy":
        assert limit == halves == 0
        return
    if operation == "nll_loss":
        assert limit == halves == crossovers.NEVER
    else:
        assert halves == pytest.approx(2 * limit, abs=2)
        seconds = limit * 8 * 4 / 3.35e12  # no loss has more than eight passes spared
        assert seconds > 50e-6
    call = {"operation": operation, "device": "cuda", "capability": (9, 0), "crossover": limit}
    monkeypatch.setitem(BACKENDS, "triton", BACKENDS["triton"]._replace(rules=(dispatch._PAYS,)))
    assert choose(**call, numel=limit).backend == "triton"
    below = choose(**call, numel=limit - 1)
    assert below.backend == "reference"
    said = "at least as fast" if limit == crossovers.NEVER else f"fewer than the {limit} "
    assert said in below.refusals["triton"][0]
    assert below.refusals["triton"][0].endswith("(derived, not measured)")
    assert choose(**call, numel=1, insisted="triton").backend == "triton"


def test_what_torch_has_not_has_no_crossover_on_a_gpu() -> None:
    assert gpu_crossover(RowOutcomes, 4, torch.device("cuda", 0)) == 0


@pytest.mark.parametrize("kind", ["cuda", "xpu"])
def test_a_gpu_that_says_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for the fastest there is: torch's own loss is the safe choice."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: object())
    found = crossovers._bandwidth.__wrapped__(torch.device(kind, 0))
    assert found == crossovers.BANDWIDTH > 3.35e12


def test_usual_crossovers() -> None:
    """One kernel of torch's is harder to beat than several that are called one after another."""
    for function in ("mse_loss", "smooth_l1_loss", "huber_loss", "soft_margin_loss"):
        assert usual_crossover(function) == 98_304
    for function in ("gaussian_nll_loss", "poisson_nll_loss", "kl_div", "hinge_embedding_loss"):
        assert usual_crossover(function) == 32_768


def test_the_crossover_of_a_call() -> None:
    """It is what the record says, for the rows and the bytes of a number that the call has."""
    for operation in ("mse_loss", "l1_loss", "kl_div"):
        limit = RECORDS[operation].crossover
        for numel, name in ((limit, "numba"), (limit - 1, "reference")):
            x = torch.rand(numel)
            (decision,) = fastopt.explain(getattr(ours, operation), x, x, reduction="sum")
            assert (decision.backend, decision.request.crossover) == (name, limit)
    for dtype, row, limit in row_limits("cross_entropy"):
        if row == 0:  # classes apart from each other
            logits = torch.zeros(3, limit // 2, dtype=dtype).t()
        else:
            logits = torch.zeros(limit // row + 1, row, dtype=dtype)
        labels = torch.zeros(len(logits), dtype=torch.int64)
        (decision,) = fastopt.explain(ours.cross_entropy, logits, labels)
        assert (decision.backend, decision.request.crossover) == ("numba", limit), (dtype, row)


def row_limits(operation: str) -> list[tuple[torch.dtype, int, int]]:
    """(dtype, classes side by side, crossover) on both sides of each step of the table."""
    found = []
    dtypes = {2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
    kind = RECORDS[operation]
    for size, rows in kind.row_crossover.items():
        assert list(rows) == sorted(rows)
        limits = [limit for _, limit in rows] + [kind.crossover]
        for (classes, limit), above in zip(rows, limits[1:], strict=True):
            found += [(dtypes[size], classes, limit), (dtypes[size], classes + 1, above)]
        found += [(dtypes[size], 1, limits[0]), (dtypes[size], 0, kind.crossover)]
    return found


@pytest.mark.parametrize("operation", COMPILED)
def test_crossover_of_rows(operation: str) -> None:
    assert row_limits(operation) or operation != "cross_entropy"
    for dtype, row, limit in row_limits(operation):
        assert crossover(RECORDS[operation], dtype.itemsize, row) == limit
        call = {"operation": operation, "dtypes": (dtype, torch.int64), "crossover": limit}
        call["label"] = 1
        assert choose(numel=limit, **call).backend == "numba"
        assert choose(numel=limit - 1, **call).backend == "reference"


@pytest.mark.parametrize("operation", COMPILED)
def test_quick_test_of_size(operation: str) -> None:
    """It must never send to torch what pays off, whatever the layout."""
    kind = RECORDS[operation]
    test, surely = quick_test(kind)

    def quick(input: torch.Tensor) -> bool:
        return input.numel() < surely or test(input)

    steps = row_limits(operation)
    limits = {kind.crossover, *(limit for _, _, limit in steps)}
    widths = {1, 2, 1000, *(row for _, row, _ in steps if row)}
    for dtype, limit, width in itertools.product(FLOATS, limits, widths):
        for rows in (limit // width - 1, limit // width, limit // width + 1):
            if rows < 1:
                continue
            call = {"operation": operation, "dtypes": (dtype, dtype), "numel": rows * width}
            aside, apart = [
                choose(**call, crossover=crossover(kind, dtype.itemsize, row)).backend
                for row in (width, 0)
            ]
            settled = aside if steps else apart
            input = torch.empty(rows, width, dtype=dtype, device="meta")
            assert not quick(input) or settled == "reference"
            transposed = torch.empty(width, rows, dtype=dtype, device="meta").t()
            assert not quick(transposed) or apart == "reference"
            if steps:  # (batch, classes, length), the classes side by side
                rest = torch.empty(1, rows, width, dtype=dtype, device="meta").transpose(1, 2)
                assert not quick(rest) or aside == "reference"
    counted = not issubclass(kind, LinearSoftmax)  # whose input says little of its logits
    assert quick(torch.empty(1, 1000)) == counted
    assert quick(torch.empty(2, 1000, 3)) == counted or operation == "cross_entropy"


def test_missing_packages_and_features(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value, changes, reason in (
        ("_found", False, {}, "the package numba is not installed (pip install numba)"),
        ("_jit_enabled", False, {}, "NUMBA_DISABLE_JIT is set (supported: unset)"),
        ("_converts_float16", False, {"dtypes": (torch.float16,) * 2}, "float16 on a CPU without"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(dispatch, name, lambda *args, value=value: value)
            decision = choose(**changes)
            assert decision.backend == "reference"
            assert any(reason in found for found in decision.refusals["numba"])
        assert choose(**changes).backend == "numba"


def test_gpu_without_a_new_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu: dict[str, Any] = {"device": "cuda", "capability": (9, 0)}
    monkeypatch.setattr(dispatch, "_triton_version", lambda: (3, 5))
    decision = choose(**gpu)
    assert decision.backend == "reference"
    assert "triton (3, 5) (supported: (3, 6) and newer)" in decision.refusals["triton"]
    monkeypatch.setattr(dispatch, "_found", lambda name: False)
    reasons = choose(**gpu).refusals["triton"]
    assert reasons == ("the package triton is not installed (pip install triton)",)


def test_all_reasons_are_in_the_error() -> None:
    with pytest.raises(BackendUnavailable) as caught:
        choose(device="mps", dtypes=(torch.complex64,) * 2, special=("tracing",), insisted="numba")
    decision = caught.value.decision
    assert decision.backend == "none"
    assert len(decision.refusals["numba"]) == 3
    for backend, reasons in decision.refusals.items():
        for reason in reasons:
            assert f"not {backend}: {reason}" in str(caught.value)
    assert "use_backend('numba') insists on another" in decision.refusals["reference"]


def test_error_survives_pickling() -> None:
    """Or a worker process that raises it takes the whole multiprocessing pool down."""
    with pytest.raises(BackendUnavailable) as caught:
        choose(device="mps", insisted="numba")
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.decision == caught.value.decision


# -- use_backend ------------------------------------------------------------------------


def test_unknown_backend() -> None:
    with (
        pytest.raises(ValueError, match=r"'nonsense' \(available: triton, numba, reference\)"),
        fastopt.use_backend("nonsense"),
    ):
        pass
    assert dispatch.insisted() is None


def test_triton_on_the_cpu() -> None:
    x = torch.zeros(3)
    param = torch.zeros(3, requires_grad=True)
    param.grad = torch.ones(3)
    optimizer = fastopt.optim.SGD([param])
    with fastopt.use_backend("triton"):
        for call in (lambda: ours.mse_loss(x, x), optimizer.step):
            with pytest.raises(BackendUnavailable, match=r"device=cpu \(supported: cuda, xpu\)"):
                call()


def test_old_triton_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too old to say whether it interprets: refused, as on a GPU."""
    pytest.importorskip("triton")
    monkeypatch.setitem(sys.modules, "triton.knobs", None)  # as if there were none
    monkeypatch.delattr("triton.knobs", raising=False)
    monkeypatch.setattr(dispatch, "_triton_version", lambda: (3, 2))
    monkeypatch.setattr(dispatch, "_interpreted", dispatch._interpreted.__wrapped__)
    with pytest.raises(BackendUnavailable, match=r"triton \(3, 2\) \(supported: \(3, 6\)"):
        choose(device="cpu", insisted="triton")


def test_nesting_and_exceptions_restore() -> None:
    with fastopt.use_backend("numba"):
        with fastopt.use_backend("reference"):
            assert dispatch.insisted() == "reference"
        assert dispatch.insisted() == "numba"
        with pytest.raises(KeyError), fastopt.use_backend("reference"):
            {}["nothing"]
        assert dispatch.insisted() == "numba"
        with pytest.raises(ValueError, match="nonsense"), fastopt.use_backend("nonsense"):
            pass
        assert dispatch.insisted() == "numba"
    assert dispatch.insisted() is None


def test_threads_and_tasks() -> None:
    """Another thread chooses for itself, a task that was started inside inherits."""

    async def task() -> str | None:
        await asyncio.sleep(0)
        return dispatch.insisted()

    async def start() -> str | None:
        with fastopt.use_backend("reference"):
            inside = asyncio.create_task(task())
        assert dispatch.insisted() is None
        return await inside

    with ThreadPoolExecutor(1) as pool, fastopt.use_backend("numba"):
        assert pool.submit(dispatch.insisted).result() is None
    assert asyncio.run(start()) == "reference"


def test_backward_keeps_the_backend_of_forward() -> None:
    x = torch.randn(5, requires_grad=True)
    with fastopt.use_backend("numba"):
        compiled = ours.mse_loss(x, torch.zeros(5))
    reference = ours.mse_loss(x, torch.zeros(5))
    with fastopt.use_backend("triton"):
        (a,) = torch.autograd.grad(compiled, x)
        (b,) = torch.autograd.grad(reference, x)
    torch.testing.assert_close(a, b)

"""Every name and every module of torch.nn and torch.optim can be had from fastopt."""

from __future__ import annotations

import importlib
import io
import pickle
import pkgutil
import re
import subprocess
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from children import ROOT, run, run_code

import fastopt
from fastopt.nn._operations import FUNCTIONS, MODULES
from fastopt.nn.utils.clip_grad import FUNCTIONS as CLIPPING
from fastopt.optim._operations import CLASSES

AVERAGES = {"AveragedModel": fastopt.optim.swa_utils.AveragedModel}
#: Modules of fastopt with the names of one of torch's, and what they have of their own.
PAIRS: list[tuple[ModuleType, ModuleType, dict[str, Any]]] = [
    (
        fastopt.nn,
        torch.nn,
        {**MODULES, "functional": fastopt.nn.functional, "utils": fastopt.nn.utils},
    ),
    (fastopt.nn.functional, torch.nn.functional, {**FUNCTIONS, **fastopt.nn.functional.BEYOND}),
    (fastopt.optim, torch.optim, {**CLASSES, "swa_utils": fastopt.optim.swa_utils}),
    (fastopt.optim.swa_utils, torch.optim.swa_utils, AVERAGES),
    (fastopt.nn.utils, torch.nn.utils, {**CLIPPING, "clip_grad": fastopt.nn.utils.clip_grad}),
    (
        fastopt.nn.utils.clip_grad,
        torch.nn.utils.clip_grad,
        {name: CLIPPING[name] for name in ("clip_grad_norm_", "clip_grad_value_")},
    ),
]
NAMES = ["nn", "F", "optim", "swa_utils", "utils", "clip_grad"]
EACH_PAIR = pytest.mark.parametrize(("ours", "theirs", "own"), PAIRS, ids=NAMES)

LINES = """
import fastopt.nn as nn
import fastopt.nn
import fastopt.nn.functional as F
import fastopt.nn.functional
import fastopt.nn.init as init
import fastopt.nn.utils
import fastopt.nn.utils.rnn
import fastopt.nn.utils.rnn as rnn_utils
import fastopt.nn.utils.prune as prune
import fastopt.nn.parallel
import fastopt.optim as optim
import fastopt.optim.lr_scheduler
import fastopt.optim.lr_scheduler as sched
from fastopt import nn
from fastopt import nn, optim
from fastopt import optim
from fastopt.nn import *
from fastopt.nn import CrossEntropyLoss
from fastopt.nn import Linear, CrossEntropyLoss
from fastopt.nn import Module, Parameter
from fastopt.nn import functional as F
from fastopt.nn import init
from fastopt.nn import utils as nn_utils
from fastopt.nn.attention import SDPBackend, sdpa_kernel
from fastopt.nn.functional import cross_entropy, relu
from fastopt.nn.init import xavier_uniform_
from fastopt.nn.modules import Module
from fastopt.nn.modules.batchnorm import _BatchNorm
from fastopt.nn.modules.utils import _pair
from fastopt.nn.parallel import DistributedDataParallel as DDP
from fastopt.nn.parameter import Parameter
from fastopt.nn.utils import clip_grad_norm_
from fastopt.nn.utils import parametrizations, rnn
from fastopt.nn.utils.clip_grad import clip_grad_norm_
from fastopt.nn.utils.parametrizations import weight_norm
from fastopt.nn.utils.parametrize import register_parametrization
from fastopt.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from fastopt.optim import *
from fastopt.optim import Adam, LBFGS, Optimizer, SparseAdam
from fastopt.optim import lr_scheduler, swa_utils
from fastopt.optim.adam import Adam
from fastopt.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, StepLR
from fastopt.optim.lr_scheduler import LRScheduler, _LRScheduler
from fastopt.optim.optimizer import Optimizer, required
from fastopt.optim.sgd import SGD
from fastopt.optim.swa_utils import SWALR, AveragedModel
""".strip().splitlines()


def own(value: Any) -> bool:
    """Whether it is of fastopt's making."""
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    return str(name).startswith("fastopt.")


@pytest.mark.parametrize("line", LINES)
def test_import_line(line: str) -> None:
    """It gives what torch's line gives, but for what fastopt has."""
    mine: dict[str, Any] = {}
    its: dict[str, Any] = {}
    exec(line, mine)
    exec(line.replace("fastopt", "torch", 1), its)
    renamed = {"fastopt" if name == "torch" else name for name in its}
    if "*" in line:
        assert mine.keys() >= its.keys()
    else:
        assert mine.keys() == renamed
    known = {**FUNCTIONS, **MODULES, **CLASSES, **AVERAGES, **CLIPPING}
    for name in mine.keys() & its.keys() - {"__builtins__"}:
        a, b = mine[name], its[name]
        if name in known:
            assert a is known[name]
        elif isinstance(a, ModuleType) and own(a):
            assert a.__name__.replace("fastopt", "torch", 1) == b.__name__
        else:
            assert a is b, name


@EACH_PAIR
def test_every_name(ours: ModuleType, theirs: ModuleType, own: dict[str, Any]) -> None:
    for name in dir(theirs):
        if not (name.startswith("__") and name.endswith("__")):
            expected = own[name] if name in own else getattr(theirs, name)
            assert getattr(ours, name) is expected, name
    beyond = fastopt.nn.functional.BEYOND.keys() if ours is fastopt.nn.functional else set()
    beyond = {"Lion"} if ours is fastopt.optim else beyond
    newer = {"LinearCrossEntropyLoss", "linear_cross_entropy"}  # of torch 2.13
    assert own.keys() - set(dir(theirs)) <= beyond | newer, "a name that torch hasn't"
    assert not beyond & set(dir(theirs)), "a name that torch has by now"


@EACH_PAIR
def test_names_for_completion(ours: ModuleType, theirs: ModuleType, own: dict[str, Any]) -> None:
    assert set(dir(ours)) >= set(dir(theirs))
    assert dir(ours) == sorted(set(dir(ours)))
    public = getattr(theirs, "__all__", [n for n in vars(theirs) if not n.startswith("_")])
    assert ours.__all__ == sorted({*public, *own})


@EACH_PAIR
def test_a_name_that_is_nowhere(ours: ModuleType, theirs: ModuleType, own: dict[str, Any]) -> None:
    """The error is about fastopt's module, and suggests a name."""
    near = {
        "nn": "Linaer", "functional": "reul", "optim": "Adma", "swa_utils": "SWARL",
        "utils": "skip_inti", "clip_grad": "clip_grad_nrom_",
    }[ours.__name__.split(".")[-1]]  # fmt: skip
    with pytest.raises(AttributeError) as caught:
        getattr(ours, near)
    assert str(caught.value) == f"module '{ours.__name__}' has no attribute '{near}'"
    assert (caught.value.name, caught.value.obj) == (near, theirs)
    assert not hasattr(ours, near)
    with pytest.raises(ImportError, match=rf"cannot import name '{near}' from '{ours.__name__}'"):
        exec(f"from {ours.__name__} import {near}", {})
    with pytest.raises(ModuleNotFoundError) as missing:
        importlib.import_module(f"{ours.__name__}.{near}")
    assert missing.value.name == f"{ours.__name__}.{near}"


def test_a_patch_of_torchs_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever replaces a name there (a profiler, a quantizer) replaces it for all."""

    class Other(torch.nn.Linear):
        pass

    monkeypatch.setattr(torch.nn, "Linear", Other)
    monkeypatch.setattr(torch.nn, "fresh", 5, raising=False)
    assert fastopt.nn.Linear is Other
    assert fastopt.nn.fresh == 5


# -- modules ------------------------------------------------------------------------------


def modules_of(package: ModuleType) -> list[str]:
    """The modules below a package of torch's, deeper ones too."""
    found = pkgutil.walk_packages(package.__path__, f"{package.__name__}.", onerror=lambda _: None)
    return sorted(module.name for module in found)


def import_all() -> None:
    """In a process of its own: what is imported first by fastopt's name is torch's all the same."""
    prefixes = ("torch.nn.", "torch.optim.")
    before = {n: dict(vars(m)) for n, m in sys.modules.items() if n.startswith(prefixes)}
    count = 0
    for name in (*modules_of(torch.nn), *modules_of(torch.optim)):
        mine = name.replace("torch", "fastopt", 1)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of those that are deprecated
                module = importlib.import_module(mine)
        except ImportError:  # needs what is not installed
            with pytest.raises(ImportError):
                importlib.import_module(name)
            continue
        if not module.__name__.startswith("fastopt."):
            count += 1
            assert module is sys.modules[name] is importlib.import_module(name)
            assert module.__name__ == module.__spec__.name == name
    assert count > 80
    for name, names in before.items():
        after = vars(sys.modules[name])
        for key, value in names.items():
            first = f"{name}.{key}" not in before  # torch's first import of a module puts it there
            assert after[key] is (sys.modules.get(f"{name}.{key}", value) if first else value), key
    for name, module in sys.modules.items():
        file = getattr(module, "__file__", None) or ""
        if name.startswith("fastopt.") and module.__name__ == name:
            assert "/torch/" not in file, f"{name} is a second copy"


def test_every_module() -> None:
    run(import_all)


def test_a_deep_module_first() -> None:
    """Of one that torch itself hasn't imported yet, and asked for before anything else."""
    run_code("""
import fastopt.nn.utils._per_sample_grad as first
import sys, torch
assert first.__name__ == "torch.nn.utils._per_sample_grad"
assert sys.modules["torch.nn.utils._per_sample_grad"] is first
assert torch.nn.utils._per_sample_grad is first
""")
    run_code("""
import sys, torch
assert "torch.nn.attention.flex_attention" not in sys.modules
from fastopt.nn.attention.flex_attention import flex_attention
from torch.nn.attention.flex_attention import flex_attention as expected
assert flex_attention is expected
""")


def test_functions_where_modules_have_the_same_name() -> None:
    """An import of the module puts it in no function's place."""
    before = torch.nn.utils.spectral_norm, torch.nn.parallel.data_parallel
    module = importlib.import_module("fastopt.nn.utils.spectral_norm")
    assert module is importlib.import_module("torch.nn.utils.spectral_norm")
    assert importlib.import_module("fastopt.nn.parallel.data_parallel").__name__.startswith("torch")
    assert (torch.nn.utils.spectral_norm, torch.nn.parallel.data_parallel) == before
    assert (fastopt.nn.utils.spectral_norm, fastopt.nn.parallel.data_parallel) == before
    assert all(map(callable, before))


def test_imports_by_spec() -> None:
    """importlib.util.find_spec, as pkgutil and lazy importers ask."""
    for name in ("fastopt.nn.utils", "fastopt.nn.utils.rnn", "fastopt.optim.swa_utils"):
        assert importlib.util.find_spec(name) is not None
    for name in ("fastopt.nn.nothing", "fastopt.nn.utils.nothing", "fastopt.nothing"):
        assert importlib.util.find_spec(name) is None
    with pytest.raises(ModuleNotFoundError, match="not a package"):
        importlib.import_module("fastopt.nn.init.nothing")
    assert importlib.util.find_spec("fastopt.nn.mse").origin.endswith("mse.py")


# -- what a second name must not change ------------------------------------------------------


def test_pickles_name_torchs_modules() -> None:
    from fastopt.nn.utils.rnn import PackedSequence, pack_sequence

    for value in (
        fastopt.nn.Linear, fastopt.nn.Linear(2, 3), fastopt.nn.init.zeros_, PackedSequence,
        pack_sequence([torch.ones(2)]), fastopt.nn.functional.relu, fastopt.nn.functional.conv1d,
        fastopt.optim.Optimizer, fastopt.optim.lr_scheduler.StepLR, fastopt.optim.swa_utils.SWALR,
    ):  # fmt: skip
        data = pickle.dumps(value)
        assert b"fastopt" not in data, value
        pickle.loads(data)
    file = io.BytesIO()
    torch.save(fastopt.nn.Linear(2, 3), file)
    assert b"fastopt" not in file.getvalue()


def test_compiled_and_scripted() -> None:
    import fastopt.nn.functional as F
    from fastopt import nn

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.relu(self.linear(x))

    def step(x: torch.Tensor) -> torch.Tensor:
        return F.mse_loss(F.softplus(x), nn.functional.relu(x))

    net, x = Net(), torch.randn(5, 3)
    expected = torch.relu(net.linear(x))
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), expected)
    torch.testing.assert_close(torch.compile(step, backend="eager", fullgraph=True)(x), step(x))
    torch.testing.assert_close(torch.jit.script(net)(x), expected)
    torch.testing.assert_close(torch.fx.symbolic_trace(net)(x), expected)


# -- type checkers ----------------------------------------------------------------------------

STUBS = sorted((ROOT / "fastopt").rglob("*.pyi"))


@pytest.mark.parametrize("stub", STUBS, ids=lambda path: path.stem)
def test_stub_is_of_a_module_that_torch_has(stub: Path) -> None:
    path = stub.relative_to(ROOT).with_suffix("").as_posix().removesuffix("/__init__")
    name = path.replace("/", ".")
    found = importlib.import_module(name)
    torchs = name.replace("fastopt", "torch", 1)
    assert found is importlib.import_module(torchs)
    assert f"from {torchs} import *" in stub.read_text().splitlines()


def test_stubs_are_shipped() -> None:
    text = (ROOT / "pyproject.toml").read_text()
    for folder in {stub.parent for stub in STUBS}:
        package = "nn" if "nn" in folder.parts else "optim"
        (patterns,) = re.findall(rf'^"fastopt\.{package}" = (\[.*\])$', text, re.MULTILINE)
        relative = folder.relative_to(ROOT / "fastopt" / package)
        assert f'"{(relative / "*.pyi").as_posix()}"' in patterns


TYPED = """
import torch
import fastopt.nn
import fastopt.nn as nn
import fastopt.nn.functional as F
import fastopt.nn.utils.rnn
import fastopt.optim as optim
import fastopt.optim.lr_scheduler as sched
from fastopt.nn import CrossEntropyLoss, Linear, Module
from fastopt.nn.functional import mse_loss, relu
from fastopt.nn.parallel import DistributedDataParallel
from fastopt.nn.parameter import Parameter
from fastopt.nn.utils import clip_grad_norm_
from fastopt.nn.utils.parametrizations import weight_norm
from fastopt.nn.utils.rnn import pad_sequence
from fastopt.optim import AdamW, Optimizer, swa_utils
from fastopt.optim.lr_scheduler import LRScheduler, StepLR, _LRScheduler
from fastopt.optim.swa_utils import AveragedModel


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(10, 20), nn.ReLU(), Linear(20, 1))
        self.scale = Parameter(torch.ones(1))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.layers(x) * self.scale
        return F.relu(result)


def train(model: Module, optimizer: Optimizer) -> torch.Tensor:
    schedules: list[LRScheduler] = [sched.StepLR(optimizer, 2), StepLR(optimizer, 2)]
    criterion: torch.nn.CrossEntropyLoss = nn.CrossEntropyLoss(label_smoothing=0.1)
    clip_grad_norm_(model.parameters(), 1.0)
    fastopt.nn.utils.rnn.pad_sequence([torch.ones(1)])
    nn.utils.clip_grad_value_(model.parameters(), 1.0)
    nn.init.zeros_(torch.zeros(3))
    for average in (AveragedModel(model), swa_utils.AveragedModel(model)):
        average.update_parameters(model)
    return mse_loss(model(torch.ones(1, 10)), torch.zeros(1, 1))


train(Net(), optim.Adagrad(Net().parameters(), lr=0.1))
train(Net(), AdamW(Net().parameters()))
"""
WRONG = """
import fastopt.nn as nn
from fastopt import nn as again, optim
from fastopt.nn.functional import reul
from fastopt.optim.lr_scheduler import StepRL

nn.Linaer
optim.Adma
again.functional.reul
number: int = nn.Linear(3, 4)
"""


def test_type_checker(tmp_path: Path) -> None:
    """mypy knows the names, strictly, and those that nobody has it does not."""
    pytest.importorskip("mypy")
    for name, text in (("typed", TYPED), ("wrong", WRONG)):
        (tmp_path / f"{name}.py").write_text(text)
    (tmp_path / "star.py").write_text(
        "from fastopt.nn import *\nfrom fastopt.optim import *\nLinear(3, 4)\nlr_scheduler.StepLR\n"
        "CrossEntropyLoss()\nLBFGS\n"
    )
    child = subprocess.run(
        [sys.executable, "-m", "mypy", "--strict", "--follow-imports=silent", "--config-file=",
         f"--cache-dir={tmp_path / 'cache'}", "typed.py", "wrong.py", "star.py"],
        cwd=tmp_path, capture_output=True, text=True, env={"MYPYPATH": str(ROOT), "PATH": ""},
    )  # fmt: skip
    complaints = re.findall(r"^(\w+)\.py:(\d+): error: (.*)$", child.stdout, re.MULTILINE)
    assert [(name, int(line)) for name, line, _ in complaints] == [
        ("wrong", line) for line in (4, 5, 7, 8, 9, 10)
    ], child.stdout + child.stderr

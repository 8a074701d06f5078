"""What is shipped: files, names, signatures, documentation."""

from __future__ import annotations

import inspect
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from children import ROOT

import fastopt
from fastopt.nn._operations import FUNCTIONS as FUNCTIONS_OF_NN
from fastopt.nn._operations import MODULES
from fastopt.optim._operations import CLASSES
from fastopt.optim._planned import PlannedStep

if sys.version_info >= (3, 11):
    import tomllib
else:
    tomllib = pytest.importorskip("tomli")

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SOURCES = sorted([*(ROOT / "fastopt").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
STUBS = {str(file.relative_to(ROOT)) for file in (ROOT / "fastopt").rglob("*.pyi")}
NAMES = {
    fastopt: {
        "BackendUnavailable", "Explanation", "FormulaError", "check", "convert", "dispatch",
        "empty_cache", "explain", "formula", "loss", "nn", "optim", "optimizer", "use_backend",
    },
    fastopt.nn: {*MODULES, "functional"},
    fastopt.nn.functional: {*FUNCTIONS_OF_NN},
    fastopt.optim: {*CLASSES},
    fastopt.optim.swa_utils: {"AveragedModel"},
}  # fmt: skip
TWINS: list[tuple[type, type]] = [
    (getattr(ours, name), getattr(theirs, name))
    for ours, theirs in ((fastopt.nn, torch.nn), (fastopt.optim, torch.optim))
    for name in sorted(NAMES[ours] - {"functional"})
    if hasattr(theirs, name)  # it may be older
] + [(fastopt.optim.swa_utils.AveragedModel, torch.optim.swa_utils.AveragedModel)]
FUNCTIONS: list[tuple[Callable[..., Any], Callable[..., Any]]] = [
    (getattr(fastopt.nn.functional, name), getattr(torch.nn.functional, name))
    for name in sorted(NAMES[fastopt.nn.functional])
    if hasattr(torch.nn.functional, name)
]


def name_of(value: Any) -> str:
    return value.__name__ if hasattr(value, "__name__") else ""


# -- files ------------------------------------------------------------------------------


def test_package_list_equals_the_folders() -> None:
    found = {str(f.parent.relative_to(ROOT)) for f in SOURCES if f.name == "__init__.py"}
    listed = PROJECT["tool"]["setuptools"]["packages"]
    assert len(set(listed)) == len(listed)
    modules = {path.replace("/", ".") for path in found}
    assert set(listed) == {re.sub(r"^kernels", "fastopt.kernels", name) for name in modules}
    folders = {str(f.parent.relative_to(ROOT)) for f in SOURCES}
    assert folders == found, "a folder without __init__.py would not be shipped"
    assert PROJECT["tool"]["setuptools"]["package-dir"] == {
        "fastopt": "fastopt",
        "fastopt.kernels": "kernels",
    }


def test_py_typed_is_shipped() -> None:
    assert (ROOT / "fastopt" / "py.typed").is_file()
    assert "py.typed" in PROJECT["tool"]["setuptools"]["package-data"]["fastopt"]


def test_wheel_holds_every_source(tmp_path: Path) -> None:
    """And nothing else: no tests, no second copy of the kernels."""
    pytest.importorskip("setuptools", minversion="77")
    project = tmp_path / "project"
    for folder in ("fastopt", "kernels", "tests"):
        caches = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / folder, project / folder, ignore=caches)
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, project)
    code = f"import setuptools.build_meta as b; b.build_wheel({str(tmp_path)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=project, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    names = {n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n}
    sources = {re.sub("^kernels", "fastopt/kernels", str(f.relative_to(ROOT))) for f in SOURCES}
    assert names == {*sources, *STUBS, "fastopt/py.typed"}
    assert wheel.name == f"fastopt-{fastopt.__version__}-py3-none-any.whl"


def test_version_is_written_once() -> None:
    assert "version" not in PROJECT["project"]
    assert PROJECT["tool"]["setuptools"]["dynamic"] == {"version": {"attr": "fastopt.__version__"}}
    text = (ROOT / "fastopt" / "__init__.py").read_text()
    assert text.count(f'"{fastopt.__version__}"') == 1
    assert f"## {fastopt.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_files_fit_a_head() -> None:
    lines = {str(f.relative_to(ROOT)): len(f.read_text().splitlines()) for f in SOURCES}
    assert {name: count for name, count in lines.items() if count > 400} == {}


def test_kernels_can_not_be_imported_by_that_name() -> None:
    """It would be a second copy of every kernel, and the name belongs to another project."""
    for module in ("kernels", "kernels.numba", "kernels.layout"):
        child = subprocess.run(
            [sys.executable, "-c", f"import {module}"], cwd=ROOT, capture_output=True, text=True
        )
        assert child.returncode == 1
        last = child.stderr.strip().splitlines()[-1]
        assert last.startswith("ImportError: ")
        assert "fastopt.kernels" in last
        assert "import fastopt" in last
        assert "pip install" in last


def test_report() -> None:
    """python -m fastopt names what runs where."""
    child = subprocess.run(
        [sys.executable, "-W", "error", "-m", "fastopt"], cwd=ROOT, capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert not child.stderr
    operations = NAMES[fastopt.nn.functional] | NAMES[fastopt.optim]
    for word in (*operations, *fastopt.dispatch.BACKENDS, fastopt.__version__, torch.__version__):
        assert word in child.stdout, word


def test_unknown_words() -> None:
    for words in (["warmup", "float8"], ["warm"], ["warmup", "--only", "mse"]):
        child = subprocess.run(
            [sys.executable, "-m", "fastopt", *words], cwd=ROOT, capture_output=True, text=True
        )
        assert child.returncode == 2
        assert words[-1] in child.stderr


# -- names ------------------------------------------------------------------------------


@pytest.mark.parametrize("module", NAMES, ids=name_of)
def test_public_names(module: ModuleType) -> None:
    assert len(set(module.__all__)) == len(module.__all__)
    if module is fastopt:
        assert set(module.__all__) == NAMES[module]
    else:  # torch's names, too
        assert set(module.__all__) > NAMES[module]
    for name in module.__all__:
        assert hasattr(module, name)
    assert set(module.__all__) <= set(dir(module))


def test_operations_are_the_public_names() -> None:
    """What dispatch calls an operation is what users call it."""
    assert fastopt.front.call.RECORDS.keys() == NAMES[fastopt.nn.functional]
    for name in NAMES[fastopt.optim]:
        assert getattr(fastopt.optim, name)._operation == name


# -- signatures -------------------------------------------------------------------------


@pytest.mark.parametrize(("ours", "theirs"), TWINS, ids=name_of)
def test_class_is_torchs_but_for_what_it_computes(ours: type, theirs: type) -> None:
    assert issubclass(ours, theirs)
    assert ours.__name__ == theirs.__name__
    for mine, its in ((ours, theirs), (ours.__init__, theirs.__init__)):  # type: ignore[misc]
        found = list(inspect.signature(mine).parameters.values())
        if issubclass(ours, PlannedStep):
            names = ["max_grad_norm"]
            names += ["state_dtype", "rounding", "seed"] if ours._elementwise else []
            assert [p.name for p in found[-len(names) :]] == names
            assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in found[-len(names) :])
            found = found[: -len(names)]
        expected = list(inspect.signature(its).parameters.values())
        own = further(ours)
        assert plain(found[len(found) - len(own) :]) == own
        found = found[: len(found) - len(own)]
        if ours.__name__ == "AveragedModel":
            assert found.pop().name == "optimizer"
        if own or ours.__name__ == "AveragedModel":
            found, expected = (
                [p.replace(annotation=p.empty) for p in some] for some in (found, expected)
            )
        assert found == expected
    method = "step" if issubclass(ours, torch.optim.Optimizer) else "forward"
    method = "update_parameters" if ours.__name__ == "AveragedModel" else method
    mine, its = (inspect.signature(getattr(c, method)) for c in (ours, theirs))
    assert plain(mine) == plain(its)


@pytest.mark.parametrize(("ours", "theirs"), FUNCTIONS, ids=name_of)
def test_function_takes_what_torchs_takes(
    ours: Callable[..., Any], theirs: Callable[..., Any]
) -> None:
    assert ours.__name__ == theirs.__name__
    own = further(ours)
    found = plain(inspect.signature(ours))
    assert found[len(found) - len(own) :] == own
    assert found[: len(found) - len(own)] == plain(inspect.signature(theirs))


Parameters = list[tuple[str, Any, Any]]


def plain(given: inspect.Signature | list[inspect.Parameter]) -> Parameters:
    """Names, kinds and defaults in order; annotations may be better than torch's."""
    some = given.parameters.values() if isinstance(given, inspect.Signature) else given
    return [(p.name, p.kind, p.default) for p in some]


def further(ours: Any) -> Parameters:
    """The last ones of ours, which torch has not, all of them by name only."""
    name = ours.__name__.lower().replace("_", "").removesuffix("loss")
    if name not in ("crossentropy", "linearcrossentropy"):
        return []
    kind = inspect.Parameter.KEYWORD_ONLY
    return [("z_loss", kind, 0.0), ("softcap", kind, None)]


# -- documentation ----------------------------------------------------------------------


@pytest.mark.parametrize("public", [ours for ours, _ in TWINS + FUNCTIONS], ids=name_of)
def test_documentation_has_example_and_reference(public: Any) -> None:
    text = public.__doc__
    assert text
    assert "Args:" in text
    assert "Example:\n" in text
    assert ">>> " in text
    assert re.search(r"Reference: :(class|func):`torch\.", text)
    assert public.__name__ in text.split("Reference:")[1]


@pytest.mark.parametrize("public", [ours for ours, _ in TWINS + FUNCTIONS], ids=name_of)
def test_documentation_names_every_parameter(public: Any) -> None:
    for parameter in inspect.signature(public).parameters:
        assert re.search(rf"\b{parameter}\b", public.__doc__.split("Args:")[1]), parameter


@pytest.mark.parametrize(
    "public",
    [
        fastopt.check, fastopt.explain, fastopt.loss, fastopt.optimizer, fastopt.use_backend,
        fastopt.empty_cache,
    ],
    ids=name_of,
)  # fmt: skip
def test_documentation_of_what_torch_does_not_have(public: Any) -> None:
    text = public.__doc__
    assert re.search(rf">>> .*fastopt\.{public.__name__}\b", text.split("Example:\n")[1])


def test_documentation_of_every_public_name() -> None:
    for module, names in NAMES.items():
        assert module.__doc__
        for name in names:
            value = getattr(module, name)
            assert value.__doc__, name
            if inspect.isclass(value):
                assert value.__doc__ != value.__mro__[1].__doc__, f"{name}: inherited"


def test_modules_say_what_they_are_for() -> None:
    for file in SOURCES:
        text = file.read_text()
        assert text.startswith(('"""', 'r"""')) or not text.strip(), file

"""The disk cache of machine code, places without one, and what an import costs."""

from __future__ import annotations

import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from children import assert_right, copy_package, results, run, run_code

import fastopt

Files = dict[str, int]


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copied package whose cache one run of everything has filled; not to be changed."""
    folder = copy_package(tmp_path_factory.mktemp("warm"))
    run(use, package=folder)
    return folder


def use() -> None:
    torch.set_num_threads(2)
    found = results(0)
    assert_right(found, 0)


def cached(folder: Path) -> Files:
    """The cache's files, and when each was last written."""
    found = [f for f in folder.rglob("*") if f.suffix in (".nbi", ".nbc")]
    return {str(f.relative_to(folder)): f.stat().st_mtime_ns for f in found}


# -- importing --------------------------------------------------------------------------


def test_import_is_light(tmp_path: Path) -> None:
    """Importing, and a loss too small for compiled code, load no compiler and compile nothing."""
    folder = copy_package(tmp_path)
    code = """
import sys, torch, fastopt
def loaded():
    return {name.partition(".")[0] for name in sys.modules} & {"numba", "llvmlite", "triton"}
assert not loaded(), loaded()
torch.optim.Adam([torch.ones(3)])  # torch itself loads triton here, where it is installed
before = loaded()
fastopt.empty_cache()
fastopt.nn.MSELoss()(torch.ones(3, requires_grad=True), torch.zeros(3)).backward()
fastopt.optim.Adam([torch.ones(3, requires_grad=True)])
assert loaded() == before, loaded()
"""
    run_code(code, folder)
    assert not cached(folder)


# -- the cache --------------------------------------------------------------------------


def test_cache_does_not_grow(warm: Path) -> None:
    first = cached(warm)
    assert first
    run(use, package=warm)
    run(use, package=warm)
    assert cached(warm) == first, "a second run compiles nothing, so it writes nothing"


def train() -> None:
    """A step of what the warm-up has compiled for, on one thread and on two."""
    for size in (1 << 12, 1 << 17):
        torch.set_num_threads(2)
        x = torch.randn(size, requires_grad=True)
        with fastopt.use_backend("numba"):
            fastopt.nn.MSELoss()(x, torch.randn(size)).backward()
            logits = x.view(-1, 64)
            fastopt.nn.CrossEntropyLoss()(logits, torch.zeros(len(logits)).long()).backward()
            fastopt.optim.AdamW([x], weight_decay=0.1).step()
            fastopt.optim.SGD([x], lr=0.1, momentum=0.9, nesterov=True).step()


def test_warmup(tmp_path: Path) -> None:
    """python -m fastopt warmup leaves nothing to compile."""
    folder = copy_package(tmp_path)
    code = """
import runpy, sys, torch
torch.set_num_threads(2)
sys.argv = ["fastopt", "warmup"]
runpy.run_module("fastopt", run_name="__main__")
"""
    words = run_code(code, folder)
    assert "AdamW" in words
    assert "float32" in words
    assert "bfloat16" not in words
    first = cached(folder)
    assert first
    run(train, package=folder)
    assert cached(folder) == first


def losses_of(dtypes: tuple[str, ...]) -> None:
    """Each of several specialisations of the same kernels, and whether its code is its own."""
    for name in dtypes:
        dtype = getattr(torch, name)
        x = torch.randn(64, 8).to(dtype).requires_grad_()
        labels = torch.randint(0, 8, (64,))
        for reduction in ("mean", "none"):
            with fastopt.use_backend("numba"):
                loss = fastopt.nn.CrossEntropyLoss(reduction=reduction)(x, labels)
            expected = torch.nn.functional.cross_entropy(x.double(), labels, reduction=reduction)
            torch.testing.assert_close(loss.double(), expected, rtol=1e-2, atol=1e-2)
            loss.sum().backward()


def test_processes_that_compile_at_once(tmp_path: Path) -> None:
    """None finds another one's code under a name of its own, and nothing is lost."""
    folder, dtypes = copy_package(tmp_path), ("float32", "bfloat16", "float16")
    orders = [dtypes[k:] + dtypes[:k] for k in range(3)]
    with ThreadPoolExecutor(len(orders)) as pool:
        started = [pool.submit(run, losses_of, order, package=folder) for order in orders]
        for child in started:
            child.result()
    first = cached(folder)
    assert first
    run(losses_of, dtypes, package=folder)
    assert cached(folder) == first


# An edit that makes another function, and leaves the file as long as it was.
EDIT = ("difference * difference, grad", "difference + difference, grad")


def formulas(folder: Path) -> Path:
    return folder / "fastopt" / "kernels" / "numba" / "formulas.py"


def mean_squared_error() -> None:
    """Of 3 against 0, which the edit turns from 9 into 6."""
    with fastopt.use_backend("numba"):
        print(fastopt.nn.functional.mse_loss(torch.full((5,), 3.0), torch.zeros(5)).item())


def test_edited_formula_is_compiled_anew(warm: Path, tmp_path: Path) -> None:
    """Formulas lie in another file than the kernels that numba watches."""
    folder = tmp_path / "edited"
    shutil.copytree(warm, folder)
    source = formulas(folder)
    assert float(run(mean_squared_error, package=folder)) == 9.0
    before = cached(folder)

    text, status = source.read_text(), source.stat()
    edited = text.replace(*EDIT)
    assert edited != text
    source.write_text(edited)
    os.utime(source, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert source.stat().st_size == status.st_size

    assert float(run(mean_squared_error, package=folder)) == 6.0
    assert float(run(mean_squared_error, package=folder)) == 6.0
    assert cached(folder).keys() <= before.keys(), "an outdated entry is overwritten"


def test_two_copies_do_not_share_a_cache(tmp_path: Path) -> None:
    """Also where both have to keep it in the same place."""
    shared = tmp_path / "cache"
    for name in ("squared", "doubled"):
        copy_package(tmp_path / name)
    source = formulas(tmp_path / "doubled")
    source.write_text(source.read_text().replace(*EDIT))
    found = []
    for _ in range(2):
        for name, expected in (("squared", 9.0), ("doubled", 6.0)):
            folder = tmp_path / name
            printed = run(mean_squared_error, package=folder, NUMBA_CACHE_DIR=str(shared))
            assert float(printed) == expected
            assert not cached(folder)
        found.append(cached(shared))
    assert found[0]
    assert found[0] == found[1], "neither overwrites the other's"


# -- installs that can't be written to --------------------------------------------------


def drop_privileges() -> None:
    """Make permission bits count for root as well: they do not for its capabilities."""
    if sys.platform == "linux":
        import ctypes

        version_3 = 0x20080522
        header = (ctypes.c_uint32 * 2)(version_3, 0)
        ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)())


def use_without_a_place(package: str, user: str) -> None:
    drop_privileges()
    if user == "unknown":  # as in a container that runs under any number
        import pwd

        def unknown(uid: int) -> None:
            raise KeyError(uid)

        pwd.getpwuid = unknown  # type: ignore[assignment]
    for place in (package, os.environ.get("HOME", package)):
        with pytest.raises(OSError, match=r"denied|Not a directory"):
            (Path(place) / "probe").touch()
    mean_squared_error()
    param = torch.ones(5, requires_grad=True)
    param.grad = torch.ones(5)
    fastopt.optim.SGD([param], lr=0.5).step()
    assert param.tolist() == [0.5] * 5


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("user", ["no home", "home is no folder", "unknown"])
def test_read_only_install(tmp_path: Path, user: str) -> None:
    """Each process compiles anew, and everything works."""
    folder = copy_package(tmp_path / "site")
    home = tmp_path / "home"
    home.mkdir()
    environment = {
        "no home": {"HOME": str(home), "XDG_CACHE_HOME": str(home / "cache")},
        "home is no folder": {"HOME": os.devnull, "XDG_CACHE_HOME": None},
        "unknown": {"HOME": None, "XDG_CACHE_HOME": None},
    }[user]
    folders = [home, folder, *(f for f in folder.rglob("*") if f.is_dir())]
    for f in folders:
        f.chmod(0o555)
    try:
        arguments = str(folder / "fastopt"), user
        printed = run(use_without_a_place, *arguments, package=folder, **environment)
    finally:
        for f in folders:
            f.chmod(0o755)
    assert float(printed) == 9.0
    assert not cached(tmp_path)


def test_read_only_install_with_a_user_cache(tmp_path: Path) -> None:
    folder = copy_package(tmp_path / "site")
    # In the way of the folder, and nobody's permissions matter.
    (folder / "fastopt" / "kernels" / "numba" / "__pycache__").write_text("")
    for variable in ("XDG_CACHE_HOME", "NUMBA_CACHE_DIR"):
        place = tmp_path / variable
        assert float(run(mean_squared_error, package=folder, **{variable: str(place)})) == 9.0
        first = cached(place)
        assert first
        assert float(run(mean_squared_error, package=folder, **{variable: str(place)})) == 9.0
        assert cached(place) == first
    assert not cached(folder)


@pytest.mark.skipif(not hasattr(os, "chown") or os.geteuid() != 0, reason="takes root")
def test_cache_of_another_user_is_not_run(tmp_path: Path) -> None:
    """Cached machine code is executed: whoever can write it could be anybody."""
    folder = copy_package(tmp_path / "site")
    place = folder / "fastopt" / "kernels" / "numba" / "__pycache__"
    place.mkdir()
    os.chown(place, 65534, 65534)
    elsewhere = tmp_path / "cache"
    printed = run(mean_squared_error, package=folder, XDG_CACHE_HOME=str(elsewhere))
    assert float(printed) == 9.0
    assert not cached(folder)
    assert cached(elsewhere)

"""The disk cache of machine code, places without one, and what an import costs."""

from __future__ import annotations

import hashlib
import os
import pickle
import shutil
import sys
import warnings
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
    mean_squared_error()


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
sys.argv = "fastopt warmup --only mse_loss l1_loss cross_entropy AdamW SGD".split()
runpy.run_module("fastopt", run_name="__main__")
"""
    words = run_code(code, folder)
    assert "AdamW" in words
    assert "RMSprop" not in words
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
EDIT = ("weight * (d * d)", "weight * (d + d)")


def formulas(folder: Path) -> Path:
    return folder / "fastopt" / "nn" / "mse.py"


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


# -- what can't be loaded or saved ------------------------------------------------------


def entries(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.nbc"))


@pytest.fixture
def place(warm: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A package whose cache has the mean squared error, and where that cache is."""
    folder = tmp_path / "site"
    shutil.copytree(warm, folder)
    return folder, entries(folder)[0].parent


def damage(file: Path, how: str) -> None:
    content = file.read_bytes()
    if how == "a folder":
        file.unlink()
        file.mkdir()
        return
    if how == "another one's mark":
        content = content[:5] + b"?" + content[6:]
    if how == "a pickle that fails":  # with everything before it right
        text = b"cnowhere_to_be_found\nthing\n."
        content = content[:32] + hashlib.sha256(text).digest() + text
    if how == "a pickle of something else":
        text = pickle.dumps((1, 2))
        content = content[:32] + hashlib.sha256(text).digest() + text
    lengths = {"empty": 0, "mark only": 32, "header only": 64, "half": len(content) // 2}
    content = content[: lengths.get(how, len(content))]
    if how == "one bit":
        content = content[:-100] + bytes([content[-100] ^ 1]) + content[-99:]
    if how == "garbage":
        content = b"x" * len(content)
    file.write_bytes(content)


@pytest.mark.parametrize(
    "how",
    [
        "empty", "mark only", "header only", "half", "one bit", "garbage", "another one's mark",
        "a pickle that fails", "a pickle of something else",
    ],
)  # fmt: skip
def test_damaged_entry_is_compiled_anew(place: tuple[Path, Path], how: str) -> None:
    folder, _ = place
    before = {file: file.read_bytes() for file in entries(folder)}
    for file in before:
        damage(file, how)
    damaged = {file: file.read_bytes() for file in before}
    assert float(run(mean_squared_error, package=folder)) == 9.0
    replaced = [file for file in before if file.read_bytes() != damaged[file]]
    assert replaced, "what was compiled is kept in place of it"
    stamps = cached(folder)
    assert float(run(mean_squared_error, package=folder)) == 9.0
    assert cached(folder) == stamps, "and then found"


def one_warning(folder: str, trouble: str) -> None:
    """Compile where nothing can be saved: right results, and one warning in all."""
    place = Path(folder)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        import fastopt.kernels.numba

        if trouble == "full":
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # no file may have one byte
        elif trouble == "vanished":
            shutil.rmtree(place)
            place.write_text("no folder")
        elif trouble == "read only":
            place.chmod(0o555)
            drop_privileges()
        elif trouble == "written by others":
            place.chmod(0o777)
        elif trouble == "gone and made anew":
            shutil.rmtree(place)
        mean_squared_error()
        with fastopt.use_backend("numba"):
            fastopt.nn.L1Loss()(torch.ones(3), torch.zeros(3))
    found = [w for w in caught if "could not keep compiled code" in str(w.message)]
    assert len(found) == (trouble != "gone and made anew")
    if trouble == "gone and made anew":
        assert entries(place)


@pytest.mark.skipif(sys.platform != "linux", reason="limits and permissions as Linux has them")
@pytest.mark.parametrize(
    "trouble", ["full", "vanished", "read only", "written by others", "gone and made anew"]
)
def test_what_can_not_be_saved_is_a_warning(tmp_path: Path, trouble: str) -> None:
    folder = copy_package(tmp_path)
    place = folder / "fastopt" / "kernels" / "numba" / "__pycache__"
    # One with an environment of its own prints to a pipe, and not to a file.
    own = {"PYTHONHASHSEED": "0"} if trouble == "full" else {}
    try:
        printed = run(one_warning, str(place), trouble, package=folder, **own)
    finally:
        if place.is_dir():
            place.chmod(0o700)
    assert float(printed) == 9.0
    if trouble != "gone and made anew":
        assert not cached(folder)


@pytest.mark.skipif(os.name != "posix", reason="a folder in place of a file")
def test_entry_that_can_neither_be_read_nor_replaced(place: tuple[Path, Path]) -> None:
    folder, _ = place
    for file in entries(folder):
        damage(file, "a folder")
    code = """
import warnings, test_cache
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    test_cache.mean_squared_error()
assert sum("could not keep" in str(w.message) for w in caught) == 1
"""
    assert float(run_code(code, folder)) == 9.0
    assert not list(folder.rglob("*.tmp.*")), "drafts are removed"


# -- nobody else's code is run ----------------------------------------------------------


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("mode", [0o777, 0o775, 0o757])
def test_folder_that_others_may_write_to_is_passed_over(tmp_path: Path, mode: int) -> None:
    folder = copy_package(tmp_path / "site")
    place = folder / "fastopt" / "kernels" / "numba" / "__pycache__"
    place.mkdir()
    link = tmp_path / "link"
    for number, named in enumerate((place, link)):
        place.chmod(0o700)
        if named == link:  # to a folder like that
            place.rename(tmp_path / "target")
            place.symlink_to(tmp_path / "target")
        place.chmod(mode)
        elsewhere = tmp_path / f"cache{number}"
        printed = run(mean_squared_error, package=folder, XDG_CACHE_HOME=str(elsewhere))
        assert float(printed) == 9.0
        assert not cached(folder)
        assert not cached(tmp_path / "target")
        assert cached(elsewhere)


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
@pytest.mark.parametrize("whose", ["others may write", "another's"])
def test_file_that_others_may_have_written_is_not_run(place: tuple[Path, Path], whose: str) -> None:
    folder, _ = place
    if whose == "another's" and os.geteuid() != 0:
        pytest.skip("takes root")
    stamps = cached(folder)
    for file in entries(folder):
        if whose == "another's":
            os.chown(file, 65534, 65534)
        else:
            file.chmod(0o666)
    assert float(run(mean_squared_error, package=folder)) == 9.0
    assert cached(folder) != stamps, "compiled, and a file of one's own put in its place"


@pytest.mark.skipif(os.name != "posix", reason="permission bits")
def test_only_the_owner_may_write(tmp_path: Path) -> None:
    folder, place = copy_package(tmp_path / "site"), tmp_path / "cache"
    code = "import os; os.umask(0); import test_cache; test_cache.mean_squared_error()"
    run_code(code, folder, NUMBA_CACHE_DIR=str(place))
    files = entries(place)
    assert files
    assert {file.stat().st_mode & 0o777 for file in files} == {0o600}
    assert {file.parent.stat().st_mode & 0o777 for file in files} == {0o700}


# -- formulas of one's own --------------------------------------------------------------

OWN = {
    "own_loss.py": """
import own_numbers
from fastopt.kernels.operation import Elementwise
from own_helper import helped, made

SHIFT = 1.0

class Own(Elementwise):
    scale: float = 1.0
    slopes = 2

    def value_and_slopes(h, input, target):
        d = input - target
        return h.scale * (d + SHIFT + own_numbers.NUMBER + helped(d) + made(d)), d, -d
""",
    "own_numbers.py": "NUMBER = 10.0\n",
    "own_helper.py": """
from fastopt import formula as m

def make(number):
    def inner(d):
        return m.where(d == d, number, d)
    return inner

made = make(100.0)

def helped(d):
    return m.maximum(0.0 * d, 1000.0)
""",
}
EDITS = {
    "constant": ("own_loss.py", "SHIFT = 1.0", "SHIFT = 2.0", 1.0),
    "formula": ("own_loss.py", "d = input - target", "d = input + target", 2.0),
    "module's number": ("own_numbers.py", "10.0", "20.0", 10.0),
    "closure": ("own_helper.py", "100.0", "200.0", 100.0),
    "helper": ("own_helper.py", "1000.0", "2000.0", 1000.0),
    "comment": ("own_loss.py", "SHIFT = 1.0", "SHIFT = 1.0  # as before", 0.0),
    "other formula": (
        "own_loss.py",
        "SHIFT = 1.0",
        "SHIFT = 1.0\nclass Other(Elementwise):\n    a: float = 1.0\n"
        "    def value_and_slopes(h, x, y):\n        return x, y",
        0.0,
    ),
}


def own_loss() -> None:
    """What the formula of another file makes of 3 and 1: the sum of one element, and MSE."""
    from own_loss import Own  # type: ignore[import-not-found]

    from fastopt.kernels.numba import flat
    from fastopt.kernels.operation import Options

    options = Options(Own(1.0), "sum", torch.float32)
    loss, _, _ = flat.forward(options, (torch.full((1,), 3.0), torch.ones(1)), (True, True))
    print(loss.item())


@pytest.fixture(scope="module")
def own(warm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own") / "site"
    shutil.copytree(warm, folder)
    for name, text in OWN.items():
        (folder / name).write_text(text)
    assert float(run(own_loss, package=folder)) == 2 + 1 + 10 + 100 + 1000
    run(mean_squared_error, package=folder)
    return folder


@pytest.mark.parametrize("what", EDITS)
def test_edited_formula_of_another_file(own: Path, tmp_path: Path, what: str) -> None:
    """Whatever it is that the formula's code is made from; and nothing else makes it new."""
    folder = tmp_path / "site"
    shutil.copytree(own, folder)
    stamps = cached(folder)
    assert float(run(own_loss, package=folder)) == 1113
    assert cached(folder) == stamps
    file, old, new, difference = EDITS[what]
    source = folder / file
    text = source.read_text()
    assert old in text
    source.write_text(text.replace(old, new))
    assert float(run(own_loss, package=folder)) == 1113 + difference
    assert (cached(folder) == stamps) == (difference == 0)
    assert float(run(mean_squared_error, package=folder)) == 9.0
    assert cached(folder).keys() == stamps.keys(), "an outdated entry is overwritten"


def test_formula_of_the_main_program(tmp_path: Path) -> None:
    """A script or a notebook: its record's class is another one in each process."""
    folder = copy_package(tmp_path / "site")
    for factor in (2.0, 2.0, 3.0):
        program = f"""
import torch
from fastopt.kernels.numba import flat
from fastopt.kernels.operation import Elementwise, Options

class Own(Elementwise):
    slopes = 2

    def value_and_slopes(h, input, target):
        value = (input - target) * {factor}
        return value, value, value

options = Options(Own(), "sum", torch.float32)
loss, _, _ = flat.forward(options, (torch.full((1,), 3.0), torch.ones(1)), (True, True))
print(loss.item())
"""
        assert float(run_code(program, folder)) == 2 * factor


def test_two_formulas_of_one_name(tmp_path: Path) -> None:
    """A cell of a notebook that is run again, with another formula in it."""
    folder = copy_package(tmp_path / "site")
    program = """
import torch
from fastopt.kernels.numba import flat
from fastopt.kernels.operation import Elementwise, Options

def define(factor):
    class Own(Elementwise):
        def value_and_slopes(h, input, target):
            return factor * input, input
    return Own

found = []
for kind in (define(2.0), define(3.0)):
    options = Options(kind(), "sum", torch.float32)
    found.append(flat.forward(options, (torch.ones(1), torch.ones(1)), (True, False))[0].item())
print(found[0] + 10 * found[1])
"""
    assert float(run_code(program, folder)) == 32


def test_packages_in_archives(tmp_path: Path) -> None:
    """There are no files to look at, and the cache knows one archive from an edited one."""
    cache = tmp_path / "cache"
    for name, expected in (("first", 9.0), ("edited", 6.0), ("first again", 9.0)):
        folder = copy_package(tmp_path / name)
        if name == "edited":
            formulas(folder).write_text(formulas(folder).read_text().replace(*EDIT))
        archive = tmp_path / "all.zip"
        archive.unlink(missing_ok=True)
        shutil.make_archive(str(archive.with_suffix("")), "zip", folder)
        shutil.rmtree(folder)
        code = "import test_cache; test_cache.mean_squared_error()"
        assert float(run_code(code, archive, NUMBA_CACHE_DIR=str(cache))) == expected
        assert cached(cache)


# -- the log ----------------------------------------------------------------------------


@pytest.mark.parametrize("wanted", [False, True])
def test_messages_of_the_compiler(tmp_path: Path, wanted: bool) -> None:
    """They stay out of a program's log, unless numba's logger itself has been given a level."""
    code = f"""
import logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stdout, format="%(name)s")
if {wanted}:
    logging.getLogger("numba").setLevel(logging.DEBUG)
before = logging.getLogger("numba").level
import test_cache
test_cache.mean_squared_error()
assert logging.getLogger("numba").level == before
logging.getLogger("numba.of_the_user").debug("")
"""
    folder = copy_package(tmp_path / "site")
    printed = run_code(code, folder, NUMBA_CACHE_DIR=str(tmp_path / "cache")).splitlines()
    assert printed[-1] == "numba.of_the_user", "who logs by a logger below numba's is not muted"
    assert (len([line for line in printed if line.startswith("numba")]) > 100) == wanted


# -- rules of one's own -----------------------------------------------------------------

RULE = """
import torch
import fastopt
from fastopt import formula as m

FACTOR = 2.0

@fastopt.optimizer(states=("total",))
def Own(param, grad, total, *, lr=1.0):
    total = total + m.abs(grad)
    return param - lr * FACTOR * grad / total, total

def moved():
    p = torch.nn.Parameter(torch.zeros(70))
    optimizer = Own([p])
    with fastopt.use_backend("numba"):
        for _ in range(2):
            p.grad = torch.ones(70)
            optimizer.step()
    print(-p[0].item())
"""
RULE_EDITS = {
    "nothing": ("", "", 3.0),
    "comment": ("FACTOR = 2.0", "FACTOR = 2.0  # as before", 3.0),
    "number of outside": ("FACTOR = 2.0", "FACTOR = 4.0", 6.0),
    "operator": ("lr * FACTOR", "lr + FACTOR", -1.0),
    "literal": ("total + m.abs(grad)", "total + 2.0 * m.abs(grad)", 1.5),
}


@pytest.mark.parametrize("place", ["own_rule.py", "__main__"])
def test_edited_rule(tmp_path: Path, place: str) -> None:
    """Of a module and of a script: another rule is compiled anew, the same one never again."""
    folder, cache = copy_package(tmp_path / "site"), str(tmp_path / "cache")
    file = tmp_path / "rules" / "own_rule.py"
    file.parent.mkdir()
    known: dict[Path, int] = {}
    for what, (old, new, expected) in {"first": ("", "", 3.0), **RULE_EDITS}.items():
        file.write_text(RULE.replace(old, new) if old else RULE)
        if place == "__main__":
            code = f"import runpy; runpy.run_path({str(file)!r}, run_name='__main__')['moved']()"
        else:
            code = f"import sys; sys.path.insert(0, {str(file.parent)!r})\n"
            code += "import own_rule; own_rule.moved()"
        printed = float(run_code(code, folder, NUMBA_CACHE_DIR=cache))
        assert printed == expected, what
        now = cached(Path(cache))
        if what in ("nothing", "comment"):
            assert now == known, what
        known = now

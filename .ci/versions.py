"""Test with the oldest, the pinned and the newest torch, each with the Triton that it brings.

    python .ci/versions.py [oldest] [pinned] [newest]

Makes an environment for each from the package index, runs in it the tests below and removes it;
its row of docs/versions.md says how that went. A build of torch with CUDA, which Linux gets,
takes 5 GB for as long, and in uv's cache until `uv cache clean torch` and the like.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "versions.md"
#: How fastopt's own requirements are resolved.
ENVIRONMENTS = {
    "oldest": ("--resolution", "lowest-direct"),
    "pinned": ("--constraints", str(ROOT / "constraints.txt")),
    "newest": (),
}
TOOLS = ("pytest>=8", "pytest-xdist>=3.6", "hypothesis>=6.100", "expecttest>=0.3", "setuptools>=77")
KERNELS = ("losses", "optimizers")
#: Of each test's cases one in so many runs: versions differ in kinds of calls, not in single ones.
ONE_IN = 6
#: What runs, in the order of the page's columns: tests, and environment variables.
SUITES: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {
    "kernels": (KERNELS, {}),
    "contract and checkpoints": (
        ("loss_contract", "optimizer_contract", "checkpoints", "convert", "dispatch", "explain"),
        {},
    ),
    "compiled ahead": (("compiled_ahead",), {}),
    "interpreter": (("triton", *KERNELS), {"TRITON_INTERPRET": "1"}),
}
HEAD = """\
# Versions

<!-- The rows are written by .ci/versions.py (make versions). -->

`make versions` makes three environments from the package index alone: with the oldest torch, numba
and numpy that [pyproject.toml](../pyproject.toml) admits, with what
[constraints.txt](../constraints.txt) pins, and with the newest of each. Every torch has the Triton
that it asks for. In each these tests run, on a CPU, with one in {one_in} of each test's cases:

"""
NUMBERS = ("passed", "skipped", "failed")


def uv(*arguments: str) -> None:
    """With no setting of this machine but how to reach the index, as tests/test_resolution.py."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith("UV_") or "CACHE" in k}
    program = str(Path(sys.executable).with_name("uv"))
    subprocess.run([program, "--no-config", *arguments], check=True, env=environment)


def versions(python: str) -> list[str]:
    """Of Python and of what decides how kernels are compiled."""
    code = (
        "import platform, importlib.metadata as m, importlib.util as u\n"
        "print(platform.python_version())\n"
        "for p in 'torch', 'triton', 'numba', 'numpy':\n"
        "    print(m.version(p) if u.find_spec(p) else 'none')\n"
    )
    return subprocess.check_output([python, "-c", code], text=True).split()


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """This file is also a plugin of pytest's."""
    tests: dict[tuple[Any, str], list[Any]] = {}
    for item in items:
        tests.setdefault((item.path, item.originalname), []).append(item)
    items[:] = [
        case
        for cases in tests.values()
        for case in cases[len(cases) % ONE_IN :: ONE_IN] or cases[:1]
    ]


def run(python: str, work: Path, names: tuple[str, ...], variables: dict[str, str]) -> list[int]:
    """How many tests passed, were skipped and failed; all that do not pass are printed."""
    report = work / "report.xml"
    plugin = ("-p", Path(__file__).stem)
    options = ("--numprocesses", "auto", "--dist", "worksteal", "-rfE", f"--junitxml={report}")
    command = [
        python,
        "-m",
        "pytest",
        *plugin,
        *options,
        *(f"tests/test_{name}.py" for name in names),
    ]
    environment = {
        **os.environ,
        "PYTHONPATH": str(Path(__file__).parent),
        "OMP_WAIT_POLICY": "passive",
        "TRITON_CACHE_DIR": str(work / "triton"),  # what is compiled names files of its Triton
        **variables,
    }
    code = subprocess.run(command, cwd=ROOT, env=environment).returncode
    assert code in (0, 1, 5), f"pytest ended with {code}"
    (tag,) = re.findall(r"<testsuite [^>]*>", report.read_text())
    total, errors, failures, skipped = (
        int(re.findall(rf'\b{word}="(\d+)"', tag)[0])
        for word in ("tests", "errors", "failures", "skipped")
    )
    return [total - errors - failures - skipped, skipped, errors + failures]


def test(name: str) -> tuple[str, bool]:
    """The row of one environment, and whether nothing failed."""
    with tempfile.TemporaryDirectory() as folder:
        uv("venv", "--quiet", "--python", sys.executable, f"{folder}/environment")
        (scripts,) = (p.parent for p in Path(folder, "environment").glob("*/activate"))
        python = str(scripts / "python")
        install = ("pip", "install", "--quiet", "--python", python)
        uv(*install, *ENVIRONMENTS[name], "--editable", str(ROOT))
        uv(*install, *TOOLS)
        cells = [name, f"{datetime.date.today()}", *versions(python)]
        print(f"== {' '.join(cells)}", flush=True)
        results = [run(python, Path(folder), *suite) for suite in SUITES.values()]
    for numbers in results:
        words = [f"{n:,} {word}" for n, word in zip(numbers, NUMBERS, strict=True) if n]
        cells.append(", ".join(words))
    return f"| {' | '.join(cells)} |", not any(failed for *_, failed in results)


def write(rows: dict[str, str]) -> None:
    """The page, with these rows in place of what they were."""
    before = PAGE.read_text() if PAGE.exists() else ""
    found = {name: re.findall(rf"^\| {name} \|.*$", before, re.MULTILINE) for name in ENVIRONMENTS}
    rows = {name: line for name, (line,) in ((n, f) for n, f in found.items() if f)} | rows
    titles = ["", "date", "Python", "torch", "triton", "numba", "numpy", *SUITES]
    lines = [f"| {' | '.join(titles)} |", f"|{' --- |' * len(titles)}"]
    lines += [rows[name] for name in ENVIRONMENTS if name in rows]
    what = [
        f"- {title}: {', '.join(f'`test_{name}.py`' for name in names)}"
        + "".join(f", with `{k}={v}`" for k, v in variables.items())
        for title, (names, variables) in SUITES.items()
    ]
    PAGE.write_text(HEAD.format(one_in=ONE_IN) + "\n".join([*what, "", *lines]) + "\n")


def main() -> int:
    passed = True
    for name in sys.argv[1:] or ENVIRONMENTS:
        row, green = test(name)
        print(row, flush=True)
        write({name: row})
        passed &= green
    return not passed


if __name__ == "__main__":
    sys.exit(main())

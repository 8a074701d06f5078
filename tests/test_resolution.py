"""What the package index alone would install, on machines other than this one.

A resolver reads metadata and downloads nothing else. Neither the settings of this machine nor
files on it take part: they can hide that torch asks for a Triton which is pinned otherwise.
"""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest
from children import ROOT

PLATFORMS = {
    "linux-x86_64": "x86_64-manylinux_2_28",
    "linux-aarch64": "aarch64-manylinux_2_28",
    "macos-arm64": "aarch64-apple-darwin",
    "windows-x86_64": "x86_64-pc-windows-msvc",
}
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
MACHINES = [(platform, python) for platform in PLATFORMS for python in PYTHONS]
CONSTRAINTS = ROOT / "constraints.txt"
PROJECT = (str(ROOT / "pyproject.toml"), "--all-extras")
TESTED = (*PROJECT, "--constraints", str(CONSTRAINTS))
UNREACHABLE = ("Failed to fetch", "error sending request", "Could not connect", "timed out")

Machine = tuple[str, str]
Packages = dict[str, str]
Found = TypeVar("Found")


def uv(*arguments: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    """Run the resolver, with no setting of this machine but how to reach the index."""
    found = shutil.which("uv", path=sysconfig.get_path("scripts")) or shutil.which("uv")
    assert found, "uv is not installed (pip install '.[dev]')"
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("UV_", "PIP_"))}
    environment["MACOSX_DEPLOYMENT_TARGET"] = "14.0"  # what torch's wheels ask for
    environment["UV_PYTHON_DOWNLOADS"] = "never"  # else it looks for each Python, for seconds
    return subprocess.run(
        [found, "--no-config", *arguments],
        input=stdin,
        env=environment,
        capture_output=True,
        text=True,
    )


def compile(machine: Machine, *sources: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
    platform, python = machine
    options = ("--python-platform", PLATFORMS[platform], "--python-version", python)
    quiet = ("--quiet", "--no-header", "--no-annotate", "--only-binary", ":all:")
    return uv("pip", "compile", "--python", sys.executable, *options, *quiet, *sources, stdin=stdin)


def solution(machine: Machine, *sources: str, stdin: str = "") -> Packages:
    """The version of each package."""
    result = compile(machine, *sources, stdin=stdin)
    assert not result.returncode, f"{machine}\n{result.stderr}"
    return dict(re.findall(r"^([\w.-]+)==(\S+)", result.stdout, flags=re.MULTILINE))


def torch_alone(machine: Machine, version: str) -> Packages:
    return solution(machine, "-", stdin=f"torch=={version}")


def everywhere(function: Callable[[Machine], Found]) -> dict[Machine, Found]:
    with ThreadPoolExecutor(8) as pool:
        return dict(zip(MACHINES, pool.map(function, MACHINES), strict=True))


@functools.cache
def pinned_torch_alone() -> dict[Machine, Packages]:
    return everywhere(lambda machine: torch_alone(machine, pinned("torch")))


def pinned(package: str, file: Path = CONSTRAINTS) -> str:
    (version,) = re.findall(rf"\b{package}==([\d.]+)", file.read_text())
    return version


@pytest.fixture(scope="module", autouse=True)
def registry() -> None:
    """Skips where the package index can't be reached: asked, not remembered."""
    asked = uv("--no-cache", "pip", "compile", "--quiet", "-", stdin="iniconfig")
    if asked.returncode:
        assert any(words in asked.stderr for words in UNREACHABLE), asked.stderr
        pytest.skip(f"the package index can't be reached: {asked.stderr.strip()}")


def test_what_is_tested_with_resolves() -> None:
    """With all extras, to what is pinned, and on Linux to the Triton that torch asks for."""
    own = pinned_torch_alone()
    for machine, packages in everywhere(lambda machine: solution(machine, *TESTED)).items():
        assert packages["torch"] == pinned("torch"), machine
        assert packages["numba"] == pinned("numba"), machine
        assert packages.get("triton") == own[machine].get("triton"), machine
        assert ("triton" in packages) == machine[0].startswith("linux"), machine


def test_what_users_install_resolves() -> None:
    """Without extras or constraints: the newest torch for each, and its Triton."""
    found = everywhere(lambda machine: solution(machine, PROJECT[0]))
    own = everywhere(lambda machine: torch_alone(machine, found[machine]["torch"]))
    for machine, packages in found.items():
        assert packages.get("triton") == own[machine].get("triton"), machine
        assert ("triton" in packages) == machine[0].startswith("linux"), machine


def test_triton_for_builds_of_torch_without_one() -> None:
    """The Makefile's: it is that of the same torch's builds which have one."""
    own = pinned_torch_alone().values()
    of_torch = {packages["triton"] for packages in own if "triton" in packages}
    assert of_torch == {pinned("triton", ROOT / "Makefile")}


def test_contradictory_pin_is_found(tmp_path: Path) -> None:
    """Were it not, the tests above would say nothing."""
    constraints = tmp_path / "constraints.txt"
    constraints.write_text(CONSTRAINTS.read_text() + "triton==3.9.0\n")
    for machine in (("linux-x86_64", "3.11"), ("linux-aarch64", "3.14")):
        result = compile(machine, *PROJECT, "--constraints", str(constraints))
        assert result.returncode
        assert "triton" in result.stderr

"""Build the archives, and test what they install, away from the sources.

    python .ci/release.py [PYTHON ...]

The sdist is built first and the wheel from it. For each Python (by default each of 3.10 to 3.13
that can be found) a new environment gets the wheel, the first one the sdist as well, and the
quick tests run from the unpacked sdist, whose own packages have been taken out.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
QUICK = (
    "checkpoints", "convert", "dispatch", "explain", "memory", "optimizers", "settled", "tutorials",
)  # fmt: skip
TOOLS = ("pytest", "hypothesis", "expecttest", "pytest-xdist")


def found(version: str) -> str | None:
    """An interpreter of this version that starts (a shim of that name may not)."""
    name = f"python{version}"
    path = shutil.which(name)
    if path and not subprocess.run([path, "--version"], capture_output=True).returncode:
        return path
    return None


def test(python: str, archive: Path, sources: Path, work: Path) -> bool:
    """Whether the quick tests pass with this archive installed."""
    environment = work / "environment"
    subprocess.run([python, "-m", "venv", "--clear", str(environment)], check=True)
    new = str(environment / "bin" / "python")
    torch = next(
        line for line in (ROOT / "constraints.txt").read_text().splitlines() if "torch==" in line
    )
    # Torch is the one that was tested with; the others are what a user's pip would choose.
    install = [new, "-m", "pip", "install", "--quiet"]
    subprocess.run([*install, torch], check=True)
    subprocess.run([*install, str(archive), *TOOLS], check=True)
    tests = [f"tests/test_{name}.py" for name in QUICK]
    options = ["--numprocesses", "auto", "--dist", "loadfile"]
    where = [new, "-c", "import fastopt; print(fastopt.__file__, fastopt.__version__)"]
    print(subprocess.run(where, cwd=work, capture_output=True, text=True).stdout.strip())
    environ = {**os.environ, "OMP_WAIT_POLICY": "passive"}  # two processes' threads share the cores
    run = [new, "-m", "pytest", *options, *tests]
    return not subprocess.run(run, cwd=sources, env=environ).returncode


def main() -> int:
    pythons = sys.argv[1:] or [path for v in VERSIONS if (path := found(v)) is not None]
    with tempfile.TemporaryDirectory() as name:
        work = Path(name)
        build = [sys.executable, "-m", "build", "--outdir", str(work / "dist"), str(ROOT)]
        subprocess.run(build, check=True, stdout=subprocess.DEVNULL)
        (wheel,), (sdist,) = (work / "dist").glob("*.whl"), (work / "dist").glob("*.tar.gz")
        with tarfile.open(sdist) as archive:
            archive.extractall(work, filter="data")
        sources = work / sdist.name.removesuffix(".tar.gz")
        shutil.rmtree(sources / "fastopt")
        shutil.rmtree(sources / "kernels")
        failed = []
        for python, archive in [*((p, wheel) for p in pythons), *((p, sdist) for p in pythons[:1])]:
            print(f"== {archive.name} with {python}", flush=True)
            if not test(python, archive, sources, work):
                failed.append(f"{archive.name} with {python}")
    print("failed: " + ", ".join(failed) if failed else f"passed with {', '.join(pythons)}")
    return bool(failed) or not pythons


if __name__ == "__main__":
    sys.exit(main())

"""Everything that needs a GPU, in one command and one file: tests, memory check, benchmark.

    python bench/gpu_check.py [--out FOLDER] [--commit HASH] [--dry-run]

Nothing is installed: a copy of the package, laid out as an install, goes first on the path of
its child processes. Tests run in several of those at a time, as most of their time is the
compiler's. Each phase has its limit, and the file is written anew after each. --dry-run tries
the machinery on a CPU, with a few tests and tiny cases in Triton's interpreter.

This module is also the pytest plugin of those children: it gives each its share of the tests
and writes what becomes of them, line by line, so that a child that dies leaves its results.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TESTS = ("gpu", "losses", "loss_contract", "optimizers", "optimizer_contract", "triton")
PROCESSES = 12
# Seconds: under eight minutes together, with what lies between.
TEST_LIMIT, MEMCHECK_LIMIT, BENCHMARK_LIMIT = 200, 60, 205
MEMCHECK = (
    "test_values_and_gradients and mean and bfloat16 and "
    "(65x10 or 19x4099 or smooth-weight-long or NLC-long-smooth or mse_loss-70001) "
    "or test_updates and bfloat16 and (AdamW-amsgrad or SGD and dampening)"
)
DRY_RUN = (
    "test_values_and_gradients and 3x7 and mean and float32 or test_updates and SGD and float32 "
    "or test_waiting"
)
# After these nothing works any more in the same process.
FATAL = re.compile(r"CUDA error|device-side assert|AcceleratorError|illegal memory access")

Result = dict[str, Any]

# -- the plugin ----------------------------------------------------------------------


def _journal(line: Result) -> None:
    with open(os.environ["GPU_CHECK_JOURNAL"], "a") as file:
        file.write(json.dumps(line) + "\n")


def _lines(journal: Path) -> list[Result]:
    if not journal.exists():
        return []
    return [json.loads(line) for line in journal.read_text().splitlines() if line.endswith("}")]


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep this child's share, without what one before it has tried."""
    share, shares = map(int, os.environ["GPU_CHECK_SHARE"].split("/"))
    tried = {line.get("id") for line in _lines(Path(os.environ["GPU_CHECK_JOURNAL"]))}
    items[:] = [item for item in items[share::shares] if item.nodeid not in tried]


def pytest_collection_finish(session: Any) -> None:
    _journal({"collected": len(session.items)})


def pytest_runtest_logstart(nodeid: str) -> None:
    _journal({"id": nodeid, "outcome": "started"})


def pytest_runtest_logreport(report: Any) -> None:
    """One line a test, or two where its fixtures fail."""
    if report.when != "call" and report.outcome == "passed":
        return
    reason = ""
    if report.outcome == "skipped" and isinstance(report.longrepr, tuple):
        reason = str(report.longrepr[2])
    elif report.outcome == "failed":
        reason = report.longreprtext[-1500:]
    _journal({"id": report.nodeid, "outcome": report.outcome, "reason": reason})
    if report.outcome == "failed" and FATAL.search(report.longreprtext):
        os._exit(3)  # another process goes on from here


# -- child processes -----------------------------------------------------------------


class Child:
    """A process with its own limit; its output goes to a file, or to the terminal."""

    def __init__(self, command: list[str], environment: dict[str, str], log: Path | None) -> None:
        self._log = log
        output = log.open("a") if log else None
        self.process = subprocess.Popen(
            command,
            cwd=environment["PYTHONPATH"].split(os.pathsep)[0],  # comes first on Python's path
            env={**os.environ, **environment},
            stdout=output,
            stderr=subprocess.STDOUT if output else None,
            start_new_session=True,
        )
        if output:
            output.close()

    @property
    def said(self) -> str:
        return self._log.read_text(errors="replace") if self._log else ""

    def kill(self) -> None:
        """With the processes it has started."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def wait(self, seconds: float) -> int | None:
        """The exit status, or None if it had to be killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            return None
        finally:
            self.kill()


def tests_command(*more: str) -> list[str]:
    """Of the tests, whatever the current folder is."""
    return [
        sys.executable, "-m", "pytest", "-c", str(ROOT / "pyproject.toml"), "--rootdir", str(ROOT),
        "-p", "no:cacheprovider", *more,
    ]  # fmt: skip


def files_of(*names: str) -> list[str]:
    return [str(ROOT / "tests" / f"test_{name}.py") for name in names]


# -- the phases ----------------------------------------------------------------------


def run_tests(folder: Path, environment: dict[str, str], dry_run: bool) -> Result:
    """All tests, in shares; a share whose process dies is taken up by another."""
    begin = time.monotonic()
    shares = 2 if dry_run else max(min(os.cpu_count() or 1, PROCESSES), 1)
    more = ["-k", DRY_RUN] if dry_run else []
    journals = [folder / f"journal-{share}" for share in range(shares)]
    log = folder / "tests.log"

    def start(share: int) -> Child:
        own = {"GPU_CHECK_SHARE": f"{share}/{shares}", "GPU_CHECK_JOURNAL": str(journals[share])}
        bench = os.pathsep.join((environment["PYTHONPATH"], str(ROOT / "bench")))
        command = tests_command("-p", "gpu_check", *more, *files_of(*TESTS))
        return Child(command, {**environment, **own, "PYTHONPATH": bench}, log)

    running = {share: start(share) for share in range(shares)}
    seen = dict.fromkeys(running, 0)
    try:
        while running and time.monotonic() - begin < TEST_LIMIT:
            time.sleep(0.2)
            for share, child in list(running.items()):
                status = child.process.poll()
                if status is None:
                    continue
                del running[share]
                tried = len(_lines(journals[share]))
                if status not in (0, 1, 5) and tried > seen[share] + 1:  # it died of a test
                    seen[share] = tried
                    running[share] = start(share)
    finally:
        for child in running.values():
            child.kill()
    return {
        **summary([_lines(journal) for journal in journals]),
        "out_of_time": bool(running),
        "output": log.read_text(errors="replace")[-2000:],
        "seconds": round(time.monotonic() - begin, 1),
    }


def summary(journals: list[list[Result]]) -> Result:
    """Counts, and the tests that failed or killed their process."""
    outcomes: dict[str, Result] = {}
    for line in (line for journal in journals for line in journal if "id" in line):
        if outcomes.get(line["id"], {}).get("outcome") != "failed":
            outcomes[line["id"]] = line
    # The first process of a share collects all of it.
    collected = sum(journal[0]["collected"] for journal in journals if journal)
    counts = collections.Counter(line["outcome"] for line in outcomes.values())
    failures = [line for line in outcomes.values() if line["outcome"] in ("failed", "started")]
    skips = collections.Counter(
        line["reason"] for line in outcomes.values() if line["outcome"] == "skipped"
    )
    return {
        "collected": collected,
        "passed": counts["passed"],
        "failed": counts["failed"],
        "skipped": counts["skipped"],
        "died_or_unfinished": counts["started"],
        "not_tried": collected - len(outcomes),
        "skip_reasons": dict(skips),
        "failures": sorted(line["id"] for line in failures),
        "messages": {line["id"]: line.get("reason", "") for line in failures[:40]},
    }


def run_memcheck(folder: Path, environment: dict[str, str]) -> Result:
    """A few tests under compute-sanitizer, with an allocation of its own for every tensor."""
    tool = find_sanitizer()
    if tool is None:
        return {"outcome": "skipped", "reason": "compute-sanitizer was not found"}
    begin = time.monotonic()
    command = [
        tool, "--tool", "memcheck", "--report-api-errors", "no", "--error-exitcode", "99",
        *tests_command("-k", MEMCHECK, *files_of("losses", "optimizers")),
    ]  # fmt: skip
    log = folder / "memcheck.log"
    child = Child(command, {**environment, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, log)
    status = child.wait(MEMCHECK_LIMIT)
    errors = re.findall(r"ERROR SUMMARY: (\d+) error", child.said)
    if status is None:
        outcome = "out of time"
    elif not errors:
        outcome = "did not run"
    else:
        outcome = "clean" if status == 0 and set(errors) == {"0"} else "errors"
    return {
        "outcome": outcome,
        "exit_status": status,
        "selection": MEMCHECK,
        "output": child.said[-3000:],
        "seconds": round(time.monotonic() - begin, 1),
    }


def find_sanitizer() -> str | None:
    from torch.utils import cpp_extension

    home = cpp_extension.CUDA_HOME
    return shutil.which("compute-sanitizer") or (
        shutil.which("compute-sanitizer", path=Path(home, "bin")) if home else None
    )


def run_benchmark(folder: Path, environment: dict[str, str], dry_run: bool) -> Result:
    """The benchmark; its progress and table are shown as they come."""
    begin = time.monotonic()
    file = folder / "benchmark.json"
    more = ["--dry-run", "--repeats", "2"] if dry_run else ["--seconds", str(BENCHMARK_LIMIT - 20)]
    command = [sys.executable, str(ROOT / "bench" / "gpu.py"), "--json", str(file), *more]
    status = Child(command, environment, None).wait(BENCHMARK_LIMIT)
    found: Result = json.loads(file.read_text()) if file.exists() else {"rows": []}
    return {**found, "exit_status": status, "seconds": round(time.monotonic() - begin, 1)}


# -- all together --------------------------------------------------------------------


def copy_package(folder: Path) -> None:
    """fastopt laid out as an install: the folder kernels/ is fastopt.kernels."""
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fastopt", folder / "fastopt", ignore=ignored)
    shutil.copytree(ROOT / "kernels", folder / "fastopt" / "kernels", ignore=ignored)


def output_of(*command: str) -> str | None:
    try:
        found = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe_machine(commit: str | None) -> Result:
    import torch

    machine: Result = {"gpu": None}
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        machine = {
            "gpu": properties.name,
            "capability": list(torch.cuda.get_device_capability(0)),
            "memory": properties.total_memory,
            "driver": output_of(
                "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
        }  # fmt: skip
    packages = (
        "triton",
        "numba",
        "numpy",
        "pytest",
        "liger-kernel",
        "torch-optimi",
        "quack-kernels",
    )
    return {
        **machine,
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        **{package: version(package) for package in packages},
        "python": platform.python_version(),
        "commit": commit or output_of("git", "rev-parse", "HEAD"),
    }  # fmt: skip


def report(result: Result) -> str:
    """A few lines for people; the benchmark has printed its own table."""
    tests, memcheck = result.get("tests", {}), result.get("memcheck", {})
    lines = [f"{result['machine']['gpu']}, {result['seconds']:.0f} s"]
    if tests:
        counts = ("passed", "failed", "skipped", "died_or_unfinished", "not_tried")
        words = ", ".join(f"{tests[name]} {name.replace('_', ' ')}" for name in counts)
        lines += [f"tests: {words}", *(f"  FAILED {name}" for name in tests["failures"][:30])]
        if not tests["collected"]:
            lines.append(tests["output"])
    if memcheck:
        lines.append(f"memory check: {memcheck.get('reason') or memcheck['outcome']}")
    wrong = [row["case"] for row in result.get("benchmark", {}).get("rows", []) if "failed" in row]
    lines += [f"  WRONG {name}" for name in wrong]
    return "\n".join(lines)


def good(result: Result) -> bool:
    """Whether every test ran and none failed, no access was wrong, and no measured result."""
    tests = result["tests"]
    return (
        tests["passed"] > 0
        and not tests["failures"]
        and not tests["not_tried"]
        and result.get("memcheck", {}).get("outcome") != "errors"
        and not any("failed" in row for row in result["benchmark"]["rows"])
        and result["benchmark"]["exit_status"] in (0, None)  # None: only slower than its limit
    )


def main() -> int:
    """Run all phases; 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="folder for the results (bench/results)")
    parser.add_argument("--commit", help="of the code, where git can't say")
    parser.add_argument("--dry-run", action="store_true", help="try the machinery on a CPU")
    arguments = parser.parse_args()
    begin = time.monotonic()
    machine = describe_machine(arguments.commit)
    if machine["gpu"] is None and not arguments.dry_run:
        print("torch sees no GPU, so there is nothing to check (try --dry-run)", file=sys.stderr)
        return 1
    name = "dry-run" if arguments.dry_run else re.sub(r"[^a-z0-9]+", "-", machine["gpu"].lower())
    out = arguments.out or ROOT / ("build" if arguments.dry_run else "bench/results")
    out.mkdir(parents=True, exist_ok=True)
    file = out / f"gpu-{name.strip('-')}.json"
    result: Result = {"machine": machine}

    def save() -> None:
        result["seconds"] = round(time.monotonic() - begin, 1)
        file.write_text(json.dumps(result, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        copy_package(folder)
        environment = {"PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}
        on = {"TRITON_INTERPRET": "1"} if arguments.dry_run else {"FASTOPT_TEST_DEVICE": "cuda"}
        print("tests …", flush=True)
        result["tests"] = run_tests(folder, {**environment, **on}, arguments.dry_run)
        save()
        print(report(result), flush=True)
        if not arguments.dry_run:
            print("memory check …", flush=True)
            result["memcheck"] = run_memcheck(folder, {**environment, **on})
            save()
        print("benchmark …", flush=True)
        extra = on if arguments.dry_run else {}
        result["benchmark"] = run_benchmark(folder, {**environment, **extra}, arguments.dry_run)
        save()
    print(f"{report(result)}\n{file}")
    return 0 if good(result) else 1


if __name__ == "__main__":
    sys.exit(main())

"""python -m fastopt: versions, devices, threads, and what runs where.

python -m fastopt warmup [DTYPE ...] [--only NAME ...]: compile for the CPU ahead of the first step.
python -m fastopt warmup --loss MODULE:NAME ...: the same for losses of your own.
python -m fastopt tune [--only NAME ...]: measure from how many elements on kernels pay here.
python -m fastopt tune --forget: back to the crossovers that fastopt comes with.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import platform

import torch

from . import __version__, _tune
from ._warmup import DTYPES, NAMES, warm_up, written
from .dispatch import BACKENDS, Request
from .errors import BackendUnavailable
from .front import measured
from .front.call import RECORDS
from .front.crossover import NEVER
from .optim._operations import CLASSES


def main() -> None:
    """Report, or what the command line asks for."""
    parser = argparse.ArgumentParser(
        prog="python -m fastopt", description="Without a command: versions, devices, backends."
    )
    commands = parser.add_subparsers(dest="command")
    warmup = commands.add_parser(
        "warmup", help="compile for the CPU ahead of the first step, into the disk cache"
    )
    warmup.add_argument("dtype", nargs="*", help=f"{', '.join(DTYPES)} (default: float32)")
    warmup.add_argument(
        "--only", nargs="+", choices=NAMES, metavar="NAME",
        help="losses (as functions are called) and optimizers (as classes are; default: all)",
    )  # fmt: skip
    warmup.add_argument(
        "--loss", nargs="+", metavar="MODULE:NAME", default=[],
        help="losses of your own, made by fastopt.loss; without --only them alone",
    )  # fmt: skip
    tuning = commands.add_parser(
        "tune", help="measure from how many elements on losses' kernels pay on this machine"
    )
    tuning.add_argument(
        "--only", nargs="+", choices=_tune.NAMES, metavar="NAME", default=_tune.NAMES,
        help="losses, as functions are called (default: all)",
    )  # fmt: skip
    tuning.add_argument("--forget", action="store_true", help="forget what was measured here")
    arguments = parser.parse_args()
    if arguments.command == "warmup":
        if unknown := set(arguments.dtype) - DTYPES.keys():
            parser.error(f"no dtype {', '.join(unknown)} (choose from {', '.join(DTYPES)})")
        try:
            losses = list(map(written, arguments.loss))
        except ValueError as error:
            parser.error(str(error))
        only = arguments.only or (() if losses else NAMES)
        warm_up(arguments.dtype or ["float32"], only, losses)
    elif arguments.command == "tune":
        try:
            if arguments.forget:
                print(f"forgotten, in {measured.forget()}")
            else:
                _tune.tune(arguments.only)
        except (BackendUnavailable, OSError) as error:
            parser.exit(1, f"{error}\n")
    else:
        report()


def report() -> None:
    """Print versions, devices and what runs where."""
    print(f"fastopt {__version__}")
    print(f"python  {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "numba", "triton"):
        print(f"{package:7s} {_version(package)}")
    print(f"threads {torch.get_num_threads()} (torch.get_num_threads)")
    print(f"devices {', '.join(_devices())}")
    print("\nOperations and backends, for float32 on each device:")
    for device in dict.fromkeys(name.split(":")[0] for name in _devices()):
        for operation in (*sorted(RECORDS), *CLASSES):
            dtypes = (torch.float32,) * 2
            special = tuple(filter(None, (_reason(operation),)))
            capability = torch.cuda.get_device_capability() if device == "cuda" else None
            request = Request(operation, device, dtypes, 1, special, capability)
            print(f"  {operation} on {device}")
            for name, backend in BACKENDS.items():
                reasons = backend.refusals(request)
                print(f"    {name:9s} {'no: ' + '; '.join(reasons) if reasons else 'yes'}")
    print("\nElements below which torch's own loss is the faster one:")
    print(f"  {measured.read().source}")
    widest = max(map(len, RECORDS))
    for name, kind in sorted(RECORDS.items()):
        print(f"  {name:{widest}s} {_elements(kind.crossover)}")
        for size, rows in kind.row_crossover.items():
            for classes, count in rows:
                what = f"in rows of up to {classes} classes of {size} bytes"
                print(f"  {name:{widest}s} {_elements(count)} {what}")


def _elements(count: int) -> str:
    return "any number" if count == NEVER else f"{count:,}"


def _reason(operation: str) -> str | None:
    """Why no kernel has an operation."""
    if operation in RECORDS:
        return getattr(RECORDS[operation], "reason", None)
    return getattr(CLASSES[operation], "_reason", None)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[str]:
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [
            f"cuda:{i} ({torch.cuda.get_device_name(i)})" for i in range(torch.cuda.device_count())
        ]
    return names


if __name__ == "__main__":
    main()

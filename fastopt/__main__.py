"""python -m fastopt: versions, devices, threads, and what runs where."""

from __future__ import annotations

import importlib.metadata
import platform
import sys

import torch

from . import __version__, optim
from .dispatch import BACKENDS, CROSSOVER, Request
from .nn import functional


def main() -> int:
    """Print the report."""
    print(f"fastopt {__version__}")
    print(f"python  {platform.python_version()} on {platform.platform()}")
    for package in ("torch", "numba", "triton"):
        print(f"{package:7s} {_version(package)}")
    print(f"threads {torch.get_num_threads()} (torch.get_num_threads)")
    print(f"devices {', '.join(_devices())}")
    print("\nOperations and backends, for float32 on each device:")
    for device in dict.fromkeys(name.split(":")[0] for name in _devices()):
        for operation in (*functional.__all__, *optim.__all__):
            dtypes = (torch.float32,) * 2
            capability = torch.cuda.get_device_capability() if device == "cuda" else None
            request = Request(
                operation, device, dtypes, max(CROSSOVER.values()), capability=capability
            )
            print(f"  {operation} on {device}")
            for name, backend in BACKENDS.items():
                reasons = backend.refusals(request)
                print(f"    {name:9s} {'no: ' + '; '.join(reasons) if reasons else 'yes'}")
    print("\nElements below which torch's own loss is the faster one:")
    for operation, count in CROSSOVER.items():
        print(f"  {operation:13s} {count:,}")
    return 0


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
    sys.exit(main())

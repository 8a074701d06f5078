"""The compute backends, shipped as ``fastopt.kernels``.

Nothing here imports the rest of fastopt: layers run one way, from the public
classes through dispatch down to a launcher, its loop and its formula.
"""

if __name__ != "fastopt.kernels":
    # From the repository root ``import kernels`` would load a second copy of every
    # module, with a second set of compiled functions and buffers.
    raise ImportError(
        f"this package is fastopt.kernels, not {__name__!r}: install the project "
        "(pip install -e .) and import fastopt"
    )

from . import process  # noqa: F401  (has to see every fork from now on)

"""Which CUDA kernels Hopper gets: its own (90) or those of every GPU (80). PYQEMB_KERNELS chooses."""

import os

from pyqemb import _C
from pyqemb.errors import ConfigError

# sha256 of Hopper's kernels and primitives (tests/cuda/conformance) as they have passed on a device; None: they have
# not. The tests tie it to the sources and to the answers of the device.
PROVEN_ON_HOPPER: str | None = None
_CHOICES = ("auto", "80", "90")


def choose() -> tuple[int, str]:
    """Return the newest set of kernels that may run, 80 or 90, and why. ConfigError: PYQEMB_KERNELS is wrong."""
    wanted = os.environ.get("PYQEMB_KERNELS", "auto")
    if wanted not in _CHOICES:
        raise ConfigError(f"PYQEMB_KERNELS: expected one of {', '.join(_CHOICES)}, got {wanted!r}")
    if wanted != "auto":
        return int(wanted), f"PYQEMB_KERNELS={wanted}"
    if PROVEN_ON_HOPPER is None:
        return 80, "auto: Hopper's own kernels have not passed their tests on a GPU yet; PYQEMB_KERNELS=90 uses them"
    return 90, "auto"


_C.set_newest_kernels(choose()[0])

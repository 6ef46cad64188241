"""How much memory this process has had resident. Rule: it reads the kernel's own count."""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path
from typing import final

from attrs import frozen

__all__ = ["Loaded", "PeakMemory"]

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


@final
@frozen
class Loaded:
    """What reading a model's weights took.

    Attributes:
        weights_bytes: of this rank's tensors.
        seconds: from the first to the last.
        peak_bytes: most that the process had resident meanwhile, all that it had before included.
    """

    weights_bytes: int
    seconds: float
    peak_bytes: int

    def __str__(self) -> str:
        return (
            f"{self.weights_bytes / 1e6:,.0f} MB of weights in {self.seconds:.1f} s, "
            f"at most {self.peak_bytes / 1e6:,.0f} MB resident"
        )


@final
class PeakMemory:
    """Most that was resident since this was made; where that cannot be told, since the start."""

    def __init__(self) -> None:
        with contextlib.suppress(OSError):
            _RESET.write_text("5")  # sets VmHWM to what is resident now

    @property
    def peak_bytes(self) -> int:
        """In bytes."""
        with contextlib.suppress(OSError, StopIteration):
            lines = _STATUS.read_text(encoding="ascii").splitlines()
            line = next(line for line in lines if line.startswith("VmHWM:"))
            return int(line.split()[1]) * 1024
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit

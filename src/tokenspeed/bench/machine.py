"""What a measurement ran on, in one line: figures without it mean nothing.

Rule: it says of torch what a measurement that uses it should say, and loads it for no other.
"""

from __future__ import annotations

import os
import platform
import sys
from pathlib import Path

__all__ = ["machine"]


def machine() -> str:
    """Processor, cores that this process may use, Python; if loaded: torch, its threads, a GPU."""
    parts = [_processor(), f"{_cores()} cores"]
    torch = sys.modules.get("torch")
    if torch is not None:
        parts.append(f"{torch.get_num_threads()} torch threads")
        if torch.cuda.is_available():
            parts.append(torch.cuda.get_device_name())
        parts.append(f"torch {torch.__version__}")
    return ", ".join([*parts, f"Python {platform.python_version()}"])


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()

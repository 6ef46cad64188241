"""The compilers and tools that tests build with, and how strictly.

Rule: what others compile, compiles without a warning, an exception or RTTI, by every compiler that
is here. One that is not is a skip with its name, never a test that passes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

__all__ = ["CC", "CXX", "CXX_FLAGS", "C_FLAGS", "HEADERS", "ROOT", "needs", "run", "tool"]

ROOT = Path(__file__).resolve().parents[1]
HEADERS = ROOT / "cpp" / "include"

STRICT = ("-Wall", "-Wextra", "-Werror")
C_FLAGS = ("-std=c99", "-pedantic", *STRICT)
CXX_FLAGS = ("-std=c++20", *STRICT, "-fno-exceptions", "-fno-rtti")


def tool(name: str) -> str | None:
    """Where a program is: beside this Python, or on the path."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else shutil.which(name)


def needs(*names: str) -> pytest.MarkDecorator:
    """Skip unless all of these programs are here."""
    absent = [name for name in names if tool(name) is None]
    return pytest.mark.skipif(bool(absent), reason=f"not on this machine: {', '.join(absent)}")


CC = [pytest.param(name, marks=needs(name)) for name in ("gcc", "clang")]
CXX = [pytest.param(name, marks=needs(name)) for name in ("g++", "clang++")]


def run(
    command: str | Path, *arguments: str | Path, cwd: Path | None = None, **environment: str
) -> str:
    """What a program prints; it must succeed."""
    done = subprocess.run(
        [tool(str(command)) or command, *arguments],
        capture_output=True, text=True, check=False, cwd=cwd, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, (
        f"{command} {arguments}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    )
    return done.stdout

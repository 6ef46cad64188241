"""`tokenspeed codegen`: from the spec to the committed files, and the check that they are fresh.

Rule: a generated file is a function of the spec alone; stale output is an error, never a warning.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from tokenspeed.errors import ConfigError
from tokenspeed.fsm.emit_c import emit_c
from tokenspeed.fsm.emit_cpp import emit_cpp
from tokenspeed.fsm.emit_diagram import emit_mermaid, emit_svg
from tokenspeed.fsm.emit_python import emit_python
from tokenspeed.fsm.lifecycle import read_lifecycle

__all__ = ["checkout", "generate", "main", "stale"]


def checkout() -> Path:
    """The root of the source tree that this package is imported from.

    Raises:
        ConfigError: the package is installed without its sources.
    """
    root = Path(__file__).resolve().parents[3]
    if not (root / "specs" / "Lifecycle.tla").exists():
        raise ConfigError(
            "checkout", str(root), "a source tree with specs/Lifecycle.tla; clone one"
        )
    return root


def generate(root: Path) -> dict[Path, str]:
    """Every generated file with its text, formatted as the house formats."""
    lifecycle = read_lifecycle(root / "specs" / "Lifecycle.tla")
    headers = root / "cpp" / "include" / "tokenspeed"
    mirror = root / "src" / "tokenspeed" / "fsm" / "generated.py"
    printed = {
        headers / "lifecycle.hpp": emit_cpp(lifecycle),
        headers / "lifecycle_c.h": emit_c(lifecycle),
    }
    return {
        **{
            path: _formatted(["clang-format", f"--assume-filename={path}"], text)
            for path, text in printed.items()
        },
        mirror: _formatted(
            ["ruff", "format", "--stdin-filename", str(mirror), "-"], emit_python(lifecycle)
        ),
        root / "specs" / "Lifecycle.svg": emit_svg(lifecycle),
        root / "specs" / "Lifecycle.mmd": emit_mermaid(lifecycle),
    }


def stale(root: Path) -> list[Path]:
    """Generated files that do not say what the spec says."""
    return [
        path
        for path, text in generate(root).items()
        if not path.exists() or path.read_text(encoding="utf-8") != text
    ]


def main(*, check: bool) -> int:
    """Write what is stale, or with `check` only name it; the exit status."""
    root = checkout()
    old = stale(root)
    for path in old:
        if check:
            sys.stderr.write(f"{path.relative_to(root)} is stale; run: tokenspeed codegen\n")
        else:
            path.write_text(generate(root)[path], encoding="utf-8")
            sys.stderr.write(f"wrote {path.relative_to(root)}\n")
    return 1 if check and old else 0


def _formatted(command: list[str], text: str) -> str:
    beside = Path(sys.executable).with_name(command[0])
    tool = str(beside) if beside.exists() else shutil.which(command[0])
    if tool is None:
        raise ConfigError(command[0], None, "the formatter to be installed: pip install '.[test]'")
    done = subprocess.run(
        [tool, *command[1:]], input=text, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise ConfigError(
            command[0], done.returncode, f"it to accept generated text: {done.stderr}"
        )
    return done.stdout

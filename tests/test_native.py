"""The C++ tests, built with asserts and with sanitizers."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.skipif(
    shutil.which("c++") is None, reason="no C++ compiler on this machine"
)


def tool(name: str) -> str:
    beside = Path(sys.executable).with_name(name)
    found = str(beside) if beside.exists() else shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed: pip install '.[test]'")
    return found


@pytest.mark.parametrize("sanitizers", ["address,undefined", "thread"])
def test_native_tests_pass(tmp_path: Path, sanitizers: str) -> None:
    settings = {
        "CMAKE_BUILD_TYPE": "Debug",
        "TOKENSPEED_TESTS": "ON",
        "TOKENSPEED_PYTHON": "OFF",
        "TOKENSPEED_WERROR": "ON",
        "TOKENSPEED_SANITIZE": sanitizers,
    }
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    for command in (
        [tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path), *flags],
        [tool("cmake"), "--build", str(tmp_path), "--parallel", "2"],
        [tool("ctest"), "--test-dir", str(tmp_path), "--output-on-failure"],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "100% tests passed" in done.stdout

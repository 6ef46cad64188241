"""The C++ tests, built with asserts and with sanitizers."""

from __future__ import annotations

import re
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


TESTS = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "cpp/tests").glob("*.cpp")}
WITH_THREADS = [name for name, text in TESTS.items() if "<thread>" in text]


@pytest.mark.parametrize(
    ("sanitizers", "tests"),
    [
        pytest.param("address,undefined", list(TESTS), id="address,undefined"),
        pytest.param("thread", WITH_THREADS, id="thread"),  # nothing races in the others
    ],
)
def test_native_tests_pass(tmp_path: Path, sanitizers: str, tests: list[str]) -> None:
    settings = {
        "CMAKE_BUILD_TYPE": "Debug",
        "CMAKE_CXX_FLAGS_DEBUG": "-O1 -g1",  # less to run is worth more than less to optimise
        "TOKENSPEED_TESTS": "ON",
        "TOKENSPEED_PYTHON": "OFF",
        "TOKENSPEED_WERROR": "ON",
        "TOKENSPEED_SANITIZE": sanitizers,
    }
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    named = f"^({'|'.join(tests)})$"
    for command in (
        [tool("cmake"), "-S", str(ROOT), "-B", str(tmp_path), *flags],
        [tool("cmake"), "--build", str(tmp_path), "--parallel", "2", "--target", *tests],
        [tool("ctest"), "--test-dir", str(tmp_path), "--output-on-failure", "-R", named],
    ):
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert re.search(rf"100% tests passed.* out of {len(tests)}\b", done.stdout), done.stdout

"""The C++ tests, built with asserts and with sanitizers."""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tokenspeed.kernels.cpu import library

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


def run(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


def built(folder: Path, flags: list[str], targets: list[str]) -> None:
    run([tool("cmake"), "-S", str(ROOT), "-B", str(folder), *flags])
    run([tool("cmake"), "--build", str(folder), "--parallel", "2", "--target", *targets])


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
        "CMAKE_CXX_FLAGS_DEBUG": "-Og -g1",  # compiled sooner than by -O1, and run in the same time
        "TOKENSPEED_TESTS": "ON",
        "TOKENSPEED_PYTHON": "OFF",
        "TOKENSPEED_WERROR": "ON",
        "TOKENSPEED_SANITIZE": sanitizers,
    }
    flags = [f"-D{name}={value}" for name, value in settings.items()]
    named = f"^({'|'.join(tests)})$"
    built(tmp_path, flags, tests)
    said = run([tool("ctest"), "--test-dir", str(tmp_path), "--output-on-failure", "-R", named])
    assert re.search(rf"100% tests passed.* out of {len(tests)}\b", said), said


TWO_ROUNDINGS = "--param=avoid-fma-max-bits=512"
"""Of a product that is added to a sum where that sum is alone: what GCC 13 does unasked, as chains
of fused operations wait longer for each other."""


def multiplied(product: Any, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    (tokens, columns), rows = x.shape, len(weight)
    out = np.empty((tokens, rows), np.float32)
    given = (x.ctypes.data, columns, tokens, columns, weight.ctypes.data, rows)
    product(0, *given, None, out.ctypes.data, 1)
    return out


@pytest.mark.slow
def test_a_token_is_as_among_others_whatever_the_compiler_prefers(tmp_path: Path) -> None:
    pybind11 = pytest.importorskip("pybind11")
    if subprocess.run(["c++", TWO_ROUNDINGS, "--version"], capture_output=True, check=False).stderr:
        pytest.skip("a compiler with other preferences")
    flags = [f"-DCMAKE_CXX_FLAGS={TWO_ROUNDINGS}", f"-DPython_EXECUTABLE={sys.executable}"]
    built(tmp_path, [*flags, f"-Dpybind11_DIR={pybind11.get_cmake_dir()}"], ["_cpu"])
    product = ctypes.CDLL(str(tmp_path / "_cpu.so")).ts_cpu_product
    product.argtypes, product.restype = library._SIGNATURES["product"], None
    drawn = np.random.default_rng(0)
    for rows, columns in ((1, 576), (4, 576), (5, 591)):
        x = drawn.standard_normal((4, columns), np.float32)
        weight = drawn.standard_normal((rows, columns), np.float32)
        together = multiplied(product, x, weight)
        alone = [multiplied(product, x[token : token + 1], weight) for token in range(len(x))]
        np.testing.assert_array_equal(together, np.concatenate(alone))
        np.testing.assert_allclose(together, x @ weight.T, rtol=1e-3, atol=1e-3)

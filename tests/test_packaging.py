"""The wheel stands alone: built, installed and used outside the checkout.

Rule: what a user gets is what is tested, with its headers, its spec and its types.
"""

from __future__ import annotations

import sys
import sysconfig
import venv
from pathlib import Path

import pytest

import tokenspeed
from compiling import CXX_FLAGS, ROOT, needs, run

pytestmark = pytest.mark.xdist_group("packaging")


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A fresh environment with the wheel; its dependencies are borrowed from this one."""
    place = tmp_path_factory.mktemp("outside")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    # The build's own requirements are in the test extra, so nothing is fetched.
    build: list[str | Path] = [
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        place,
        "-C",
        f"build-dir={place}/build",
    ]
    run(*pip, *build, "-C", "cmake.define.TOKENSPEED_WERROR=ON", ROOT, cwd=place)
    venv.create(place / "env", with_pip=False)
    python = place / "env" / "bin" / "python"
    run(*pip, "--python", python, "install", "--no-deps", *place.glob("*.whl"), cwd=place)
    # The .pth files in a folder that a .pth file names are not read: no editable install.
    (site,) = (place / "env" / "lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return place


def python(outside: Path, code: str) -> str:
    return run(outside / "env" / "bin" / "python", "-c", code, cwd=outside).strip()


@pytest.mark.slow
def test_the_package_is_the_installed_one_and_its_extension_loads(outside: Path) -> None:
    found = python(
        outside, "import tokenspeed, tokenspeed._core as c; print(tokenspeed.__file__, c.__file__)"
    )
    for path in found.split():
        assert Path(path).is_relative_to(outside), path


@pytest.mark.slow
@needs("g++")
def test_the_headers_come_along_and_need_nothing_else(outside: Path) -> None:
    include = Path(python(outside, "import tokenspeed; print(tokenspeed.get_include())"))
    assert include.is_relative_to(outside)
    program = outside / "embeds.cpp"
    program.write_text('#include "tokenspeed/lifecycle.hpp"\nint main() {}\n')
    run("g++", *CXX_FLAGS, "-fsyntax-only", "-I", include, program, cwd=outside)


@pytest.mark.slow
@needs("cmake", "make", "g++")
def test_an_engine_finds_the_headers_by_the_package(outside: Path) -> None:
    root = Path(python(outside, "import tokenspeed; print(tokenspeed.get_cmake_dir())"))
    assert root.is_relative_to(outside)
    source, build = ROOT / "cpp" / "examples" / "find_package", outside / "engine"
    run("cmake", "-S", source, "-B", build, f"-Dtokenspeed_fsm_ROOT={root}", cwd=outside)
    run("cmake", "--build", build, cwd=outside)
    assert run(build / "engine", cwd=outside).endswith("Finished\n")


@pytest.mark.slow
def test_the_spec_comes_along_and_is_the_one_of_the_checkout(outside: Path) -> None:
    package = Path(python(outside, "import tokenspeed; print(tokenspeed.__path__[0])"))
    specs = [path for path in (ROOT / "specs").rglob("*") if path.suffix in {".tla", ".cfg"}]
    assert specs
    specs.append(ROOT / "specs" / "VERSION")
    for path in specs:
        assert (
            package / "specs" / path.relative_to(ROOT / "specs")
        ).read_text() == path.read_text()


@pytest.mark.slow
def test_shapes_come_along(outside: Path) -> None:
    code = "from tokenspeed import models; print(models.find_config('deepseek-v3').layers)"
    assert python(outside, code) == "61"


@pytest.mark.slow
def test_types_come_along(outside: Path) -> None:
    package = Path(python(outside, "import tokenspeed; print(tokenspeed.__path__[0])"))
    assert (package / "py.typed").exists()
    assert (package / "_core.pyi").exists()


@pytest.mark.slow
def test_both_ways_to_the_command_line(outside: Path) -> None:
    script = run(outside / "env" / "bin" / "tokenspeed", "--version", cwd=outside)
    module = run(outside / "env" / "bin" / "python", "-m", "tokenspeed", "--version", cwd=outside)
    assert script == module
    assert tokenspeed.__version__ in script


def test_a_checkout_has_its_headers() -> None:
    assert (tokenspeed.get_include() / "tokenspeed" / "lifecycle.hpp").is_file()


def test_importing_the_package_imports_no_torch() -> None:
    code = """
import sys, tokenspeed
assert "torch" not in sys.modules
assert tokenspeed.Engine.__module__ == "tokenspeed.engine"
assert "torch" in sys.modules
"""
    run(sys.executable, "-c", code, cwd=ROOT / "tests")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Motor'"):
        _ = tokenspeed.Motor

"""TokenSpeed: LLM inference whose request and KV-cache lifecycle is generated from its TLA+ spec.

    from tokenspeed import Engine, SamplingParams

    with Engine.from_pretrained() as engine:
        print(engine.generate(["Once upon a time"], SamplingParams(max_tokens=32))[0].text)

Rule: importing this package is cheap. The values are imported at once; `Engine`, and torch with it,
when it is first asked for (PEP 562).
"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import TYPE_CHECKING

from tokenspeed.config import EngineConfig
from tokenspeed.request import Completion, Delta, Request, SamplingParams

if TYPE_CHECKING:
    from tokenspeed.engine import Engine

__all__ = [
    "Completion",
    "Delta",
    "Engine",
    "EngineConfig",
    "Request",
    "SamplingParams",
    "__version__",
    "get_cmake_dir",
    "get_include",
]

__version__ = "0.1.0"


def get_include() -> Path:
    """The directory to put on a C++ compiler's include path: it holds `tokenspeed/lifecycle.hpp`.

    The headers lie inside an installed package, and in `cpp/include` of a checkout.

    Raises:
        FileNotFoundError: they are in neither place, so the installation is damaged.
    """
    package = Path(__file__).resolve().parent
    for root in (package / "include", package.parents[1] / "cpp" / "include"):
        if (root / "tokenspeed" / "lifecycle.hpp").is_file():
            return root
    raise FileNotFoundError(
        f"{package}: no C++ headers in it or in a checkout around it; reinstall tokenspeed"
    )


def get_cmake_dir() -> Path:
    """The directory to give CMake as `tokenspeed_fsm_ROOT`, for `find_package(tokenspeed_fsm)`.

    It came with the last `pip install`, in a checkout too, and so did the headers that it names.

    Raises:
        FileNotFoundError: there is none, so the installation is damaged.
    """
    for package in __path__:
        root = Path(package) / "share" / "cmake" / "tokenspeed_fsm"
        if (root / "tokenspeed_fsmConfig.cmake").is_file():
            return root
    raise FileNotFoundError(f"{__path__}: no share/cmake/tokenspeed_fsm; reinstall tokenspeed")


def __getattr__(name: str) -> object:
    if name == "Engine":
        return importlib.import_module("tokenspeed.engine").Engine
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})

"""The registry: who is chosen, why, and what happens when nobody can."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tokenspeed.errors import ConfigError, KernelError
from tokenspeed.kernels import Backend, Problem, Registry
from tokenspeed.kernels.contract import OPS
from tokenspeed.kernels.cpu import BACKEND as CPU
from tokenspeed.kernels.reference import BACKEND as REFERENCE


def backend(name: str, *, priority: int = 20, refuses: str | None = None) -> Backend:
    def rope(*_: object) -> str:
        return name

    return Backend(
        name=name, priority=priority, functions={"rope": rope}, supports=lambda _problem: refuses
    )


def test_every_backend_of_ours_knows_every_op() -> None:
    for one in (REFERENCE, CPU):
        assert set(one.functions) == set(OPS)


def test_the_highest_supported_priority_runs_and_the_others_have_reasons() -> None:
    registry = Registry((REFERENCE, CPU, backend("picky", refuses="dislikes it")))
    choice = registry.explain(Problem("rope", "cpu", "float32"))
    assert choice.backend == "cpu"
    assert dict(choice.rejected) == {
        "picky": "dislikes it",
        "reference": "cpu has the higher priority",
    }
    assert registry.explain(Problem("rope", "cuda", "float32")).backend == "reference"
    assert registry.explain(Problem("rope", "cpu", "float64")).backend == "reference"
    assert registry.of("rope", torch.zeros(1)) is CPU.functions["rope"]


def test_using_overrides_within_its_block_only() -> None:
    registry = Registry((REFERENCE, CPU))
    x = torch.zeros(1)
    with registry.using(rope="reference"):
        assert registry.of("rope", x) is REFERENCE.functions["rope"]
        assert registry.of("linear", x) is CPU.functions["linear"]
    assert registry.of("rope", x) is CPU.functions["rope"]


def test_the_environment_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TOKENSPEED_KERNELS", "rope=reference,linear=reference")
    registry = Registry((REFERENCE, CPU))
    assert registry.of("rope", torch.zeros(1)) is REFERENCE.functions["rope"]
    assert registry.of("silu_mul", torch.zeros(1)) is CPU.functions["silu_mul"]


@pytest.mark.parametrize("words", ["rope=fast", "twist=cpu", "rope"])
def test_a_wrong_override_is_refused(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    monkeypatch.setenv("TOKENSPEED_KERNELS", words)
    with pytest.raises(ConfigError, match="TOKENSPEED_KERNELS"):
        Registry((REFERENCE, CPU))


def test_when_nobody_can_each_says_why() -> None:
    registry = Registry((backend("one", refuses="is tired"), CPU))
    with pytest.raises(KernelError, match=r"one is tired; cpu runs on the CPU, not on cuda"):
        registry.explain(Problem("rope", "cuda", "float32"))


def test_strangers_are_added_and_a_broken_one_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    class Entry:
        def __init__(self, name: str, loaded: Any) -> None:
            self.name, self._loaded = name, loaded

        def load(self) -> Any:
            if isinstance(self._loaded, Exception):
                raise self._loaded
            return self._loaded

    entries = [
        Entry("broken", ImportError("no such library")),
        Entry("twice", backend("cpu")),
        Entry("good", backend("good")),
    ]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: entries)
    registry = Registry((REFERENCE, CPU))
    registry.discover()
    assert registry.names == ("good", "cpu", "reference")
    assert registry.of("rope", torch.zeros(1))() == "good"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the laws run on the GPU itself")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: '.[test]' has it"
)
def test_triton_keeps_the_contract_under_its_interpreter() -> None:
    """The laws of property/test_kernels.py, in a process where Triton interprets."""
    laws = Path(__file__).parent / "property" / "test_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "EXAMPLES": "12"}
    done = subprocess.run(
        [*command, str(laws)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert "5 passed" in done.stdout


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is no CPU-only machine")
def test_a_cpu_process_never_imports_triton() -> None:
    code = "import sys, tokenspeed.engine; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"

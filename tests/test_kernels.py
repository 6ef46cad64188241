"""The registry: who is chosen, why, and what happens when nobody can."""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

import tiny
from tokenspeed import models
from tokenspeed.cli import cli
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError, ContractError, KernelError
from tokenspeed.kernels import (
    Backend,
    Problem,
    Registry,
    mla_decode,
    mla_decode_plan,
    registry,
)
from tokenspeed.kernels.contract import OPS
from tokenspeed.kernels.cpu import BACKEND as CPU
from tokenspeed.kernels.cuda import BACKEND as CUDA
from tokenspeed.kernels.cuda import build
from tokenspeed.kernels.cuda.mla import NARROW_PAGES, WIDE, _functions
from tokenspeed.kernels.listing import parse
from tokenspeed.kernels.reference import BACKEND as REFERENCE
from tokenspeed.ranks import build_on_mesh


def backend(name: str, *, priority: int = 20, refuses: str | None = None) -> Backend:
    def rope(*_: object) -> str:
        return name

    return Backend(
        name=name, priority=priority, functions={"rope": rope}, supports=lambda _problem: refuses
    )


def backend_for_mla(name: str, capability: tuple[int, int]) -> Backend:
    """One that runs only on some device, and at most 64 rows of queries and heads."""

    def supports(problem: Problem) -> str | None:
        if problem.capability != capability:
            return f"needs capability {capability}, not {problem.capability}"
        rows = (problem.q_len or 0) * (problem.heads or 0)
        return None if rows <= 64 else f"has 64 rows, not {rows}"

    return Backend(
        name=name, priority=30, functions={"mla_decode": lambda *_: name}, supports=supports
    )


def test_every_backend_of_ours_knows_every_op() -> None:
    assert set(REFERENCE.functions) == set(OPS)
    # Of the others the reference has as few calls as there can be; or they are for `native`.
    assert set(CPU.functions) == set(OPS) - {"moe_route", "linear_packed", "argmax", "finite"}


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


def costing(name: str, priority: int, cost: float | None) -> Backend:
    base = backend(name, priority=priority)
    return Backend(
        name=name,
        priority=priority,
        functions=base.functions,
        supports=base.supports,
        cost_us=lambda _problem: cost,
    )


@given(
    st.lists(st.tuples(st.integers(0, 3), st.none() | st.integers(1, 4)), min_size=1, max_size=5)
)
def test_the_cheapest_runs_if_the_highest_priority_knows_its_cost(
    made: list[tuple[int, int | None]],
) -> None:
    backends = [costing(f"b{i}", priority, cost) for i, (priority, cost) in enumerate(made)]
    problem = Problem("rope", "cpu", "float32")
    choice = Registry(tuple(backends)).explain(problem)
    top = max(backends, key=lambda one: one.priority)
    known = [cost for _, cost in made if cost is not None]
    chosen = next(one for one in backends if one.name == choice.backend)
    wanted = top.cost_us(problem) if top.cost_us(problem) is None else min(known)
    assert chosen.cost_us(problem) == wanted
    cheapest = [one for one in backends if one.cost_us(problem) == wanted or wanted is None]
    assert chosen.priority == max(one.priority for one in cheapest)
    assert len(choice.rejected) == len(made) - 1
    assert all(reason for _, reason in choice.rejected)


def test_on_hopper_tiles_cost_arithmetic_and_one_tile_its_keys() -> None:
    words = "mla_decode q={} h={} dtype=bf16 device=cuda cap=9.0"
    sizes = ((1, 16), (4, 16), (4, 32), (2, 128))
    costs = [CUDA.cost_us(parse(words.format(q, h))) or 0.0 for q, h in sizes]
    assert 0 < costs[0] == costs[1] < costs[2] < costs[3]


def test_using_overrides_within_its_block_only() -> None:
    registry = Registry((REFERENCE, CPU))
    x = torch.zeros(1)
    with registry.using(rope="reference"):
        assert registry.of("rope", x) is REFERENCE.functions["rope"]
        assert registry.of("linear", x) is CPU.functions["linear"]
    assert registry.of("rope", x) is CPU.functions["rope"]


def test_an_override_holds_until_the_next_one() -> None:
    registry, x = Registry((REFERENCE, CPU)), torch.zeros(1)
    assert registry.of("rope", x) is CPU.functions["rope"]
    before = registry.changes
    registry.override("here", "rope=reference, linear=reference,")
    assert registry.changes > before, "what was recorded is of other kernels"
    assert registry.of("rope", x) is REFERENCE.functions["rope"]
    assert registry.of("silu_mul", x) is CPU.functions["silu_mul"]
    with registry.using(rope="cpu"):
        assert registry.of("rope", x) is CPU.functions["rope"]
    registry.override("here", "rope=cpu")
    assert registry.of("rope", x) is CPU.functions["rope"]
    assert registry.of("linear", x) is REFERENCE.functions["linear"]


def test_the_engine_has_a_setting_for_it(tmp_path: Path) -> None:
    checkpoint = models.open_checkpoint(tiny.write(tmp_path))
    progress = lambda _done, _total: None  # noqa: E731
    with registry.using():
        build_on_mesh(checkpoint, EngineConfig(kernels="rope=reference"), progress)
        assert registry.of("rope", torch.zeros(1)) is REFERENCE.functions["rope"]
        with pytest.raises(ConfigError, match="kernels: got 'rope=nobody'"):
            build_on_mesh(checkpoint, EngineConfig(kernels="rope=nobody"), progress)
    assert registry.of("rope", torch.zeros(1)) is not REFERENCE.functions["rope"]


PLUGINS = {
    "good": """
from tokenspeed.kernels import Backend
rope = lambda q, k, *_: (q, k)
made = Backend(name="good", priority=90, functions={"rope": rope}, supports=lambda problem: None)
""",
    "vague": """
from tokenspeed.kernels import Backend
def fails(problem):
    raise RuntimeError("no idea")
run = {"rope": print, "argmax": print}
made = Backend(name="vague", priority=99, functions=run, supports=fails, cost_us=fails)
""",
    "broken": "import no_such_library",
    "empty": "made = None",
}


@pytest.fixture
def installed(tmp_path: Path) -> dict[str, str]:
    """The environment of a process in which these plugins are installed."""
    for name, code in PLUGINS.items():
        (tmp_path / f"plugin_{name}.py").write_text(code)
        told = tmp_path / f"plugin_{name}-1.0.dist-info"
        told.mkdir()
        (told / "METADATA").write_text(f"Name: plugin-{name}\nVersion: 1.0\n")
        entry = f"[tokenspeed.kernels]\n{name} = plugin_{name}:made\n"
        (told / "entry_points.txt").write_text(entry)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])}


def listed(env: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tokenspeed", "kernels", *words]
    env = {**env, "COLUMNS": "200"}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_the_command_tells_of_plugins_good_and_broken(installed: dict[str, str]) -> None:
    found = listed(installed, "--explain", "rope dtype=fp32")
    assert found.returncode == 0, found.stderr
    told = [line.strip("│ \n").split("│") for line in found.stdout.splitlines() if "│" in line]
    rows = {row[0].strip(): row[1].strip() for row in told}
    assert rows["good"] == "runs it"
    assert rows["vague"] == "does not say what it supports"
    assert "good has the higher priority" in rows["native"]
    assert "No module named 'no_such_library'" in rows["plugin broken"]
    assert rows["plugin empty"].startswith("left out: ")
    assert "no idea" in found.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_the_environment_overrides_with_plugins_too(installed: dict[str, str]) -> None:
    def run(text: str) -> str:
        found = listed({**installed, "TOKENSPEED_KERNELS": text}, "--explain", "rope dtype=fp32")
        return found.stdout + found.stderr

    assert "good is asked for" in run("argmax=reference,rope=good")
    assert "reference is asked for" in run("rope=reference")
    assert "TOKENSPEED_KERNELS: got 'rope=nobody'; expected op=backend" in run("rope=nobody")


@pytest.mark.parametrize("words", ["rope=fast", "twist=cpu", "rope"])
def test_a_wrong_override_is_refused(words: str) -> None:
    registry = Registry((REFERENCE, CPU))
    with pytest.raises(ConfigError, match="somewhere: got"):
        registry.override("somewhere", f"silu_mul=reference,{words}")
    assert registry.of("silu_mul", torch.zeros(1)) is CPU.functions["silu_mul"], "all or none"


def test_a_gpu_that_nobody_else_serves_is_told_of(caplog: pytest.LogCaptureFixture) -> None:
    """Once a problem; on a CPU, and where it is asked for, the reference is no surprise."""
    registry = Registry((REFERENCE,))
    old = Problem("paged_attention", "cuda", "bfloat16", (8, 0), kv_dtype="float8_e4m3fn")
    for _ in range(2):
        registry.find(old)
    assert caplog.text.count("runs on the reference, slowly") == 1
    assert "'paged_attention', device='cuda'" in caplog.text
    registry.find(Problem("rope", "cpu", "bfloat16"))
    with registry.using(rope="reference"):
        registry.find(Problem("rope", "cuda", "bfloat16"))
    assert len(caplog.records) == 1


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


@pytest.mark.parametrize("isa", ["avx512-vnni", "avx2", "portable"])
def test_lesser_instruction_sets_keep_the_laws(isa: str) -> None:
    """The laws of the native kernels, where the library has chosen other ones; more cannot run here
    than the machine has."""
    laws = Path(__file__).parent / "property" / "test_kernels.py"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-k", "native", str(laws)]
    env = {**os.environ, "TOKENSPEED_CPU_ISA": isa}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout
    asks = "from tokenspeed.kernels.cpu.library import isa; print(isa())"
    chosen = subprocess.run(
        [sys.executable, "-c", asks], env=env, capture_output=True, text=True, check=True
    )
    assert chosen.stdout.strip() in (isa, "portable")


@pytest.mark.skipif(torch.cuda.is_available(), reason="the laws run on the GPU itself")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed: '.[test]' has it"
)
def test_triton_keeps_the_contract_under_its_interpreter() -> None:
    """The laws of the kernels, in a process where Triton interprets."""
    names = ("kernels", "mla", "latent", "moe", "sampling")
    laws = [Path(__file__).parent / "property" / f"test_{name}.py" for name in names]
    laws.append(Path(__file__).with_name("test_contracts.py"))
    command = [sys.executable, "-m", "pytest", "-q", "-k", "triton", "-p", "no:cacheprovider"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "EXAMPLES": "12"}
    done = subprocess.run(
        [*command, *map(str, laws)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert re.search(r"\d\d passed, \d+ deselected", done.stdout), "none of them wants a GPU"


@pytest.mark.skipif(torch.cuda.is_available(), reason="this is no CPU-only machine")
def test_a_cpu_process_never_imports_triton() -> None:
    code = "import sys, tokenspeed.engine; print('triton' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_problem_in_words_is_what_selection_looks_at() -> None:
    words = "mla_decode b=8 q=3 h=16 kv=65536 dtype=bf16 device=cuda cap=9.0"
    problem = parse(words)
    assert problem == Problem("mla_decode", "cuda", "bfloat16", (9, 0), 16, 4, 64, 512, 64)
    assert parse(words.replace("b=8", "b=9")) == problem, "an answer serves every batch size"
    registry = Registry((REFERENCE, backend_for_mla("fast", (9, 0))))
    assert registry.explain(problem).backend == "fast"
    assert registry.find(problem)() == "fast"
    wrong = (
        ("q=5", "has 64 rows, not 128"),
        ("cap=8.0", "needs capability"),
        ("kv_dtype=fp8", "takes pages of bfloat16, not float8_e4m3fn"),
    )
    for change, reason in wrong:
        other = parse(f"{words} {change}")
        choice = registry.explain(other)
        assert choice.backend == "reference"
        assert reason in choice.rejected[0][1]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        ("twist", "twist"),
        ("mla_decode q=four", "q=four"),
        ("mla_decode h=0", "at least 1"),
        ("mla_decode b=-1", "at least 1"),
        ("rope dtype=bf17", "bf17"),
        ("rope colour=red", "colour"),
        ("rope cap=nine", "cap=nine"),
    ],
)
def test_a_problem_that_is_none_is_refused_by_name(words: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        parse(words)


def test_the_command_says_who_runs_what_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    listed = CliRunner().invoke(cli, ["kernels"]).output
    assert all(op in listed for op in OPS)
    monkeypatch.setattr(registry, "failed", {"broken": "ImportError: no such library"})
    words = "mla_decode b=8 q=4 h=16 kv=65536 dtype=bf16 device=cpu"
    told = CliRunner().invoke(cli, ["kernels", "--explain", words]).output
    assert "runs it" in told
    assert "runs on CUDA devices, not on cpu" in told
    assert "cpu has the higher priority" in told
    assert "no such library" in told


I32 = torch.int32


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"kv_lens": torch.zeros(2, dtype=torch.int64)}, "kv_lens is torch.int64"),
        ({"query_start": torch.zeros(2, dtype=I32)}, r"query_start is \[2\]; expected shape \[3\]"),
        ({"page_table": torch.zeros(1, 4, dtype=I32)}, "page_table"),
        ({"kv_lens": torch.tensor([0, 17], dtype=I32)}, "expected 0 to 16"),
        ({"query_start": torch.tensor([0, 2, 1], dtype=I32)}, "query_start"),
        ({"query_start": torch.tensor([0, 1, 4], dtype=I32)}, "q_len_max = 2"),
        ({"page_size": 0}, "page_size is 0"),
        ({"q": torch.zeros(3, 2, 9)}, r"q is \[3, 2, 9\]; expected shape \[tokens, 2, 8\]"),
        ({"kv_pages": torch.zeros(4, 4, 9)}, "kv_pages"),
        ({"kv_pages": torch.zeros(4, 4, 8, dtype=torch.bfloat16)}, "kv_pages is torch.bfloat16"),
        ({"scale": 0.0}, "scale is 0.0; expected a number above 0"),
        ({"scale": -0.5}, "scale is -0.5"),
        ({"scale": math.nan}, "scale is nan"),
    ],
)
def test_what_breaks_the_contract_of_mla_decode_is_refused(
    change: dict[str, Any], named: str
) -> None:
    given: dict[str, Any] = {
        "query_start": torch.tensor([0, 1, 3], dtype=I32),
        "kv_lens": torch.tensor([0, 16], dtype=I32),
        "page_table": torch.zeros(2, 4, dtype=I32),
        **{"page_size": 4, "heads": 2, "q_len_max": 2, "latent": 6, "rope": 2},
        "q": torch.zeros(3, 2, 8),
        "kv_pages": torch.zeros(4, 4, 8),
        "scale": 1.0,
    }

    def run(given: dict[str, Any]) -> None:
        q, kv_pages, scale = (given.pop(name) for name in ("q", "kv_pages", "scale"))
        mla_decode(q, kv_pages, mla_decode_plan(**given), scale)

    run(dict(given))
    with pytest.raises(ContractError, match=named):
        run(given | change)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("device=cpu", "runs on CUDA devices, not on cpu"),
        ("device=cuda cap=8.9", "capability 9.0, not on 8.9"),
        ("device=cuda cap=9.0 dtype=fp16", "bfloat16, not float16"),
        ("device=cuda cap=9.0 page=16", "pages of 64 tokens, not 16"),
        ("device=cuda cap=9.0 latent=256", "not 256 and 64"),
        ("device=cuda cap=9.0", "there is no nvcc"),
    ],
)
def test_the_hopper_kernel_says_what_it_cannot_run(
    nothing_built: Path, words: str, reason: str
) -> None:
    del nothing_built
    assert reason in (CUDA.supports(parse(f"mla_decode {words}")) or "")


KINDS = {"int": ctypes.c_int, "int64_t": ctypes.c_int64, "float": ctypes.c_float}


def test_the_hopper_kernel_is_called_with_what_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Argument for argument, as its source says."""
    source = Path(__file__).parents[1] / "cpp" / "cuda" / "mla_abi.cuh"
    found = re.findall(r'extern "C" int (\w+)\(([^)]*)\)', source.read_text())
    taken = {
        name: [
            ctypes.c_void_p if "*" in one else KINDS[one.split()[-2]]
            for one in told.split(",")
            if one != "void"
        ]
        for name, told in found
    }
    library = SimpleNamespace(**{name: SimpleNamespace() for name in taken})
    monkeypatch.setattr("tokenspeed.kernels.cuda.mla.library", lambda _name: library)
    _functions.cache_clear()
    _functions("any")
    _functions.cache_clear()
    assert {name: one.argtypes for name, one in vars(library).items()} == taken


@pytest.fixture
def nothing_built(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Path]:
    """A machine without nvcc, on which no library was built; its empty bin folder."""
    for name in ("XDG_CACHE_HOME", "CUDA_HOME", "PATH"):
        monkeypatch.setenv(name, str(tmp_path))
    (tmp_path / "bin").mkdir()
    build._built.cache_clear()
    yield tmp_path / "bin"
    build._built.cache_clear()


def test_what_nvcc_says_is_in_the_error_and_nothing_half_built_stays(nothing_built: Path) -> None:
    nvcc = nothing_built / "nvcc"
    nvcc.write_text("#!/bin/sh\necho no such architecture >&2\nexit 1\n")
    nvcc.chmod(0o755)
    with pytest.raises(KernelError, match="no such architecture"):
        build.library("mla_decode_sm90")
    assert not list(nothing_built.parent.rglob("*.so"))


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("name", [WIDE.library, NARROW_PAGES.library])
def test_nvcc_builds_the_hopper_kernels_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build._built.cache_clear()
    build.library.cache_clear()
    assert build.library(name).mla_decode_sm90
    (built,) = tmp_path.rglob("*.so")
    before = built.stat().st_mtime_ns
    build.library.cache_clear()
    build.library(name)
    assert built.stat().st_mtime_ns == before
    build._built.cache_clear()

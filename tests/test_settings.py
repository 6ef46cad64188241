"""Bad settings are refused by field, value and bound: by scheduler, engine and commands."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import attrs
import numpy as np
import pytest
from attrs import fields
from click.testing import CliRunner

import tiny
from tokenspeed._core import Scheduler
from tokenspeed.cli import cli
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError
from tokenspeed.kernels import Problem, registry
from tokenspeed.kernels.registry import Choice
from tokenspeed.models import host_pages, open_model, page_size

STUB = Path(__file__).resolve().parents[1] / "src/tokenspeed/_core.pyi"
GOOD = {
    "page_size": 4, "pages": 32, "slots": 4, "waiting_max": 4, "step_tokens": 16,
    "context_max": 100, "overlap": 0, "itl_budget_us": 0, "session_pages_max": 0,
    "host_pages": 0, "draft_tokens": 0, "window": 0,
    "full_groups": 0, "window_groups": 1,
}  # fmt: skip

BOUNDS = {
    "page_size": (1, 1 << 16),
    "pages": (1, 1 << 24),
    "slots": (1, 1 << 16),
    "waiting_max": (1, 1 << 24),
    "step_tokens": (1, 1 << 24),
    "context_max": (2, 1 << 24),
    "overlap": (0, 64),
    "itl_budget_us": (0, 60_000_000),
    "session_pages_max": (0, 1 << 24),
    "host_pages": (0, 1 << 24),
    "draft_tokens": (0, 1 << 10),
    "window": (0, 1 << 24),
    "full_groups": (0, 8),
    "window_groups": (1, 8),
}
"""Of the scheduler: from what to what each setting may be."""

ENGINE_BOUNDS = {
    "page_size": (1, 1024),
    "pages": (1, 1 << 24),
    "slots": (1, 4096),
    "waiting_max": (1, 1_000_000),
    "prefill_chunk": (1, 1 << 20),
    "context_max": (2, 1 << 24),
    "overlap": (0, 1),
    "threads": (1, 1024),
    "session_pages_max": (0, 1 << 24),
    "host_pages": (0, 1 << 24),
    "draft_tokens": (1, 64),
}

ENGINE_NUMBERS = {
    "itl_budget_ms": (0.1, 60_000.0, "milliseconds"),
    "tps_floor": (0.02, 10_000.0, "tokens/s"),
    "host_memory_gb": (1e-6, 1e6, "gigabytes"),
}

FAR = (-(10**30), -(2**63), -(2**31) - 1, -(2**31), 2**31 - 1, 2**31, 2**32 + 5, 2**63, 10**30)
"""What has no place in 32 bits, or in 64, or only just; 2^32 + 5 cut to 32 bits is a good 5."""


def outside(bounds: dict[str, tuple[int, int]]) -> list[tuple[str, int]]:
    return [
        (name, value)
        for name, (low, high) in bounds.items()
        for value in (low - 1, high + 1, -1, *FAR)
        if not low <= value <= high
    ]


@pytest.mark.parametrize(("field", "value"), outside(BOUNDS))
def test_the_scheduler_names_field_value_and_bounds(field: str, value: int) -> None:
    low, high = BOUNDS[field]
    with pytest.raises(ValueError) as caught:
        Scheduler(**{**GOOD, field: value})
    assert str(caught.value) == f"{field}: got {value}; expected {low} to {high}"


@pytest.mark.parametrize("field", [name for name in BOUNDS if name != "pages"])
def test_the_bounds_themselves_are_good(field: str) -> None:
    for value in BOUNDS[field]:
        needs = value if field in ("slots", "page_size") else 16
        page_size = 1 if field == "step_tokens" else 4
        slots = 1 if field == "step_tokens" else 4
        sizes = {"page_size": page_size, "slots": slots, "step_tokens": max(16, needs)}
        Scheduler(**{**GOOD, **sizes, field: value})


@pytest.mark.parametrize("value", ["4", 4.0, None, [4]])
@pytest.mark.parametrize("field", BOUNDS)
def test_what_is_no_integer_is_refused(field: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"^{field}: got .*; expected integers"):
        Scheduler(**{**GOOD, field: value})  # type: ignore[arg-type]


def test_integers_of_numpy_are_good_and_unknown_settings_are_not() -> None:
    Scheduler(**{name: np.int64(value) for name, value in GOOD.items()})
    with pytest.raises(TypeError, match="no setting pagez"):
        Scheduler(**GOOD, pagez=1)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"slots": 17}, "step_tokens: got 16; expected at least 17, one for each of the slots"),
        ({"page_size": 17}, "page_size: got 17; expected at most step_tokens (16)"),
        (
            {"window": 1},
            "window: got 1; expected 0, or at least 2: who sees itself alone reads no KV",
        ),
        (
            {"pages": 1 << 20, "page_size": 1 << 11, "step_tokens": 1 << 11},
            "pages: got 1048576; expected at most 1048575 of 2048 tokens, 32 bits of tokens in all",
        ),
    ],
)
def test_what_contradicts_another_setting_says_which(changed: dict[str, int], words: str) -> None:
    with pytest.raises(ValueError) as caught:
        Scheduler(**{**GOOD, **changed})
    assert str(caught.value) == words


@pytest.mark.parametrize("now_us", [-(2**63), 0, 2**63 - 1])
def test_pages_are_kept_whatever_the_time(now_us: int) -> None:
    scheduler = Scheduler(**{**GOOD, "session_pages_max": 4})
    scheduler.advance(now_us)
    scheduler.submit(1, np.ones(8, np.int32), 1, session="a", keep_us=30 * 24 * 3600 * 10**6)
    plan = scheduler.plan()
    assert plan is not None
    scheduler.commit(plan.step, np.ones(1, np.int32), np.zeros(1, np.bool_))
    assert scheduler.stats().pages_kept == 2


def test_every_setting_of_the_scheduler_is_in_the_tables() -> None:
    (init,) = (
        node
        for kind in ast.parse(STUB.read_text()).body
        if isinstance(kind, ast.ClassDef) and kind.name == "Scheduler"
        for node in kind.body
        if isinstance(node, ast.FunctionDef) and node.name == "__init__"
    )
    integers = {a.arg for a in init.args.kwonlyargs if ast.unparse(a.annotation) == "int"}  # type: ignore[arg-type]
    assert integers == BOUNDS.keys() == GOOD.keys()


def test_sums_at_the_bounds_do_not_overflow() -> None:
    """The largest request, refused for its pages: their number is what arithmetic says."""
    sizes = {"page_size": 1 << 16, "step_tokens": 1 << 16, "context_max": 1 << 24}
    scheduler = Scheduler(**{**GOOD, **sizes})
    with pytest.raises(ValueError, match="max_tokens: needs 256 pages, the pool has 32"):
        scheduler.submit(1, np.ones(1, np.int32), (1 << 24) - 1)
    with pytest.raises(ValueError, match="exceed context_max 16777216"):
        scheduler.submit(1, np.ones(1, np.int32), 2**31 - 1)


# --- the engine and the commands ------------------------------------------------------------------


@pytest.mark.parametrize(("field", "value"), outside(ENGINE_BOUNDS))
def test_the_engine_names_field_value_and_bounds(field: str, value: int) -> None:
    low, high = ENGINE_BOUNDS[field]
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**{field: value})
    assert str(caught.value) == f"{field}: got {value}; expected an integer from {low} to {high}"


@pytest.mark.parametrize("field", ENGINE_NUMBERS)
def test_numbers_with_a_point_have_bounds_too(field: str) -> None:
    low, high, unit = ENGINE_NUMBERS[field]
    for value in (-1.0, 0.0, low / 2, high * 2, math.inf, -math.inf, math.nan):
        with pytest.raises(ConfigError) as caught:
            EngineConfig(**{field: value})
        assert (
            str(caught.value) == f"{field}: got {value}; expected {unit} from {low:g} to {high:g}"
        )


def test_every_number_of_the_engine_is_in_a_table() -> None:
    kinds = {a.name: str(a.type) for a in fields(EngineConfig)}
    for kind, table in (("int", ENGINE_BOUNDS), ("float", ENGINE_NUMBERS)):
        assert {name for name, found in kinds.items() if found.startswith(kind)} == table.keys()


CONTRADICTIONS: list[tuple[dict[str, Any], str]] = [
    ({"slots": 600}, "prefill_chunk: got 512; expected at least slots (600)"),
    ({"page_size": 1024}, "page_size: got 1024; expected at most prefill_chunk (512)"),
    ({"pages": 1, "page_size": 1}, "pages: got 1; expected at least 2 of 1 token"),
    (
        {"pages": 4, "context_max": 65},
        "context_max: got 65; expected at most pages x page_size (64)",
    ),
    (
        {"pages": 1 << 24, "page_size": 128},
        "pages: got 16777216; expected at most 16777215 of 128 tokens",
    ),
]


@pytest.mark.parametrize(("changed", "words"), CONTRADICTIONS)
def test_the_engine_says_which_setting_contradicts_which(
    changed: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**changed)
    assert str(caught.value).startswith(words)


@pytest.mark.parametrize("command", [["serve"], ["chat", "hello"]])
def test_the_commands_refuse_the_same_before_they_load_anything(command: list[str]) -> None:
    bad = [({field: value}, f"{field}: got {value}") for field, value in outside(ENGINE_BOUNDS)]
    for changed, words in bad + CONTRADICTIONS:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in changed.items()]
        done = CliRunner().invoke(cli, [*command, *flags])
        assert isinstance(done.exception, ConfigError), flags
        assert str(done.exception).startswith(words)


def test_host_memory_is_as_many_pages_as_fit() -> None:
    model: Any = SimpleNamespace(kv=SimpleNamespace(token_bytes=1000))
    asked = EngineConfig(page_size=16, host_memory_gb=0.001)
    assert host_pages(model, asked) == 1_000_000 // 16_000
    assert host_pages(model, EngineConfig(host_pages=7)) == 7
    for memory_gb in (1e-5, 1e6):
        with pytest.raises(ConfigError, match=r"_gb: got .* 1\.6e-05 to 268\.435: .* 16,000"):
            host_pages(model, attrs.evolve(asked, host_memory_gb=memory_gb))


def test_host_memory_is_said_once_and_wants_a_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="host_memory_gb: got 2; expected none beside host_pages"):
        EngineConfig(host_memory_gb=2, host_pages=5)
    with pytest.raises(ConfigError, match=r"host_memory_gb: got 2; .* without the prefix cache"):
        EngineConfig(host_memory_gb=2, prefix_cache=False)


@pytest.mark.parametrize(
    ("changed", "size"),
    [({}, 64), ({"page_size": 32}, 32), ({"prefill_chunk": 63, "slots": 8}, 16)],
)
def test_pages_are_as_large_as_the_better_kernel_wants_them(
    changed: dict[str, Any], size: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Of latent attention on a GPU where one of two backends takes pages of 64 alone."""
    asked: list[Problem] = []

    def explain(problem: Problem) -> Choice:
        asked.append(problem)
        return Choice(problem, "better" if problem.page_size == 64 else "other", ())

    monkeypatch.setattr(type(registry), "explain", lambda _self, problem: explain(problem))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _device: (9, 0))
    config = EngineConfig(device="cuda", kv_dtype="float8", **changed)
    llama, latent = (
        open_model(str(tiny.write(tmp_path / name, **shape))).config
        for name, shape in (("llama", {}), ("deepseek", tiny.DEEPSEEK))
    )
    assert page_size(llama, config) == config.page_tokens
    assert not asked
    assert page_size(latent, config) == size
    if size == 64:
        known = {"latent": latent.latent, "rope": latent.rope, "kv_dtype": "float8_e4m3fn"}
        problem = Problem("mla_decode", "cuda", "bfloat16", (9, 0), page_size=16, **known)
        assert asked == [problem, attrs.evolve(problem, page_size=64)]

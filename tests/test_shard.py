"""`tokenspeed shard`: what is printed agrees with what is counted by hand from the shapes."""

from __future__ import annotations

import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from models_here import needs_smollm2
from tokenspeed import models
from tokenspeed.bench import shard
from tokenspeed.cli import cli
from tokenspeed.config import DEFAULT_MODEL
from tokenspeed.errors import CheckpointError, ConfigError, PlacementError
from tokenspeed.spmd import Bucket, Costs
from tokenspeed.spmd.overlap import Clock
from tokenspeed.spmd.report import batch_of, parse_mesh

BF16 = 2
BIG = ["deepseek-v3", "kimi-k2"]
MESHES = ["tp=4", "ep=4", "tp=4,ep=4", "dp=8,ep=8"]


@functools.cache
def printed(*arguments: str) -> Any:
    found = CliRunner().invoke(cli, ["shard", *arguments, "--json"], catch_exceptions=False)
    assert found.exit_code == 0
    return json.loads(found.stdout)


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", BIG)
def test_61_layers_compile_in_two_seconds(model: str, mesh: str) -> None:
    times = []
    while len(times) < 3 and min(times, default=2) >= 2:  # once, unless the machine is busy
        began = time.process_time()
        found = shard.measure(model, mesh, None, "bfloat16")
        times.append(time.process_time() - began)
    assert min(times) < 2
    assert [layer.index for layer in found.layers] == [*range(61), None]


@pytest.mark.parametrize(
    ("model", "tokens"),
    [("deepseek-v3", 1), ("deepseek-v3", 256), ("kimi-k2", 64)]
    + [(model, tokens) for model in ("deepseek-v2-lite", "smollm2") for tokens in (1, 64, 256)],
)
def test_decoding_tensor_parallel_takes_two_collectives_a_layer(model: str, tokens: int) -> None:
    config = models.find_config(model)
    ranks = 3 if model == "smollm2" else 4
    found = printed(model, "--mesh", f"tp={ranks}", "--tokens", str(tokens))
    for layer in found["layers"]:
        sizes = [(one["op"], one["axis"], one["bytes"]) for one in layer["collectives"]]
        assert sizes == [("all_reduce", "tp", tokens * config.hidden * BF16)] * 2
    rows = min(tokens, 256)
    outside = [(one["op"], one["bytes"]) for one in found["outside"]["collectives"]]
    assert outside == [("all_gather", rows * config.vocab_size * BF16)]


def test_many_tokens_are_cut_along_tensor_parallel_ranks() -> None:
    tokens, hidden, chosen = 8192, models.find_config("deepseek-v3").hidden, 8
    layer = printed("deepseek-v3", "--mesh", "tp=4", "--tokens", str(tokens))["layers"][30]
    whole = tokens * hidden * BF16
    assert sorted((one["op"], one["bytes"]) for one in layer["collectives"]) == [
        ("all_gather", tokens * chosen * 4),  # weights and numbers of experts, from a part each
        ("all_gather", tokens * chosen * 8),
        ("all_gather", whole),
        ("all_gather", whole),
        ("reduce_scatter", whole),
        ("reduce_scatter", whole),
    ]
    assert layer["bytes"] == 4 * whole + tokens * chosen * 12


def test_few_tokens_are_brought_to_the_experts_and_many_are_sent() -> None:
    """Along dp nothing moves: attention and experts keep to their rows."""
    config = models.find_config("kimi-k2")
    few = printed("kimi-k2", "--mesh", "dp=8,ep=8", "--tokens", "512")["layers"]
    assert few[0]["collectives"] == []  # a dense layer, on the rank's own rows
    group = 512 // 8 * config.hidden * BF16  # the rows of eight ranks along ep
    assert [(one["op"], one["axis"], one["bytes"]) for one in few[30]["collectives"]] == [
        ("all_gather", "ep", group),
        ("reduce_scatter", "ep", group),
    ]
    many = printed("kimi-k2", "--mesh", "dp=8,ep=8", "--tokens", "262144")["layers"]
    there, back = many[30]["collectives"]
    assert (there["op"], there["axis"], back["op"], back["axis"]) == ("all_to_all", "ep") * 2
    own, chosen = 262144 // 64, 8
    visits = own * 8 * (1 - (7 / 8) ** chosen)  # expected, if experts are chosen alike
    row = config.hidden * BF16
    assert back["bytes"] == math.ceil(visits * row)
    # Beside the row go its experts' numbers and weights, and before all a count for each rank.
    assert abs(there["bytes"] - (visits * (row + chosen * (8 + 4)) + 8 * 8)) < 3


def test_shared_experts_run_while_the_others_travel() -> None:
    """Where the sums of the routed experts are begun to travel back, the shared ones have not run,
    and where they are awaited they have: their weights take longer to read than that."""
    config, rows = models.find_config("deepseek-v3"), 128
    assert isinstance(config, models.DeepseekConfig)
    weights = config.shared_experts * 3 * config.hidden * config.expert_ffn * BF16
    arguments = ("deepseek-v3", "--mesh", "ep=4", "--tokens", str(rows))
    found = printed(*arguments)
    there, back = found["layers"][30]["collectives"]
    assert (there["op"], back["op"], there["hidden_s"]) == ("all_gather", "reduce_scatter", 0)
    assert back["hidden_s"] == back["cost_s"] < weights / 3.35e12
    table = CliRunner().invoke(cli, ["shard", *arguments]).stdout
    assert "1 reduce_scatter over ep, 1.835 MB, overlapped" in table
    mesh = parse_mesh("ep=4")
    programs = [
        models.compile_config(
            config,
            mesh,
            bucket=Bucket(tokens=rows, rows=rows, dtype=torch.bfloat16),
            batch=batch_of(mesh),
            costs=costs,
        )
        for costs in (Costs(), Costs(begin_s=1.0))
    ]
    beside, behind = programs
    experts = len(found["layers"]) - config.dense_layers
    assert behind.hidden_s == 0
    assert beside.hidden_s == pytest.approx(experts * back["cost_s"])
    assert beside.cost_s == pytest.approx(behind.cost_s - beside.hidden_s)
    early = [one for one in beside.collectives if one.started is not None]
    assert len(early) == experts
    for one in early:
        assert one.started is not None
        between = [call.path.split(":") for call in beside.calls[one.started : one.at + 1]]
        layer = f"layers.{one.layer}"
        assert between == [
            [f"{layer}.experts", "experts"],
            [f"{layer}.shared", "mlp"],
            [f"{layer}", "add"],
        ]
    lines = [
        line for line in beside.source.splitlines() if "layers'][30]" in line or "wait" in line
    ]
    at = next(n for n, line in enumerate(lines) if "'experts'" in line and "[30]" in line)
    assert ["'shared'" in lines[at + 1], " = wait(" in lines[at + 2]] == [True, True]
    assert "for " not in beside.source


def test_few_rows_hide_part_and_a_dear_beginning_hides_nothing() -> None:
    """What is hidden is the shorter of the two."""
    slow = printed("deepseek-v3", "--mesh", "ep=4", "--tokens", "128", "--link", "ep=100,100")
    config = models.find_config("deepseek-v3")
    assert isinstance(config, models.DeepseekConfig)
    back = slow["layers"][30]["collectives"][1]
    weights = config.shared_experts * 3 * config.hidden * config.expert_ffn * BF16
    touched = 2 * 128 // 4 * config.hidden * BF16
    assert back["hidden_s"] == pytest.approx((weights + touched) / 3.35e12)
    assert back["hidden_s"] < back["cost_s"]


def test_collectives_queue_behind_each_other() -> None:
    """Begun at 0 for 5 s; a module of 2; another one for 3, awaited at once; the first, awaited."""
    clock = Clock()
    clock.begin("first", 5)
    clock.work(2)
    assert clock.pause(3) == 3 - 6  # it waits for the first, and then takes its time
    assert clock.now_s == 8
    assert clock.wait("first", 5) == 5
    assert clock.now_s == 8 == 5 + 2 + 3 - (5 - 3)


def test_memory_is_counted() -> None:
    """SmolLM2 on three ranks: what tp does not shard is on each of them."""
    found = printed("smollm2", "--mesh", "tp=3")
    hidden, ffn, heads, kv_heads, dim, layers, vocab = 576, 1536, 9, 3, 64, 30, 49152
    attention = hidden * (heads + 2 * kv_heads) * dim + heads * dim * hidden
    layer = (attention + 3 * hidden * ffn) // 3 + 2 * hidden
    assert found["layers"][7]["parameter_bytes"] == layer * BF16
    embedding, head = vocab * hidden, vocab * hidden // 3 + hidden
    assert found["bytes_per_rank"] == (layers * layer + embedding + head) * BF16
    assert found["kv_bytes_per_token_per_rank"] == layers * 2 * dim * BF16
    eight = printed("smollm2", "--mesh", "tp=3", "--kv-dtype", "float8")
    assert eight["kv_bytes_per_token_per_rank"] == layers * 2 * dim
    assert eight["bytes_per_rank"] == found["bytes_per_rank"]
    alone = printed("smollm2")
    assert (
        alone["bytes_per_rank"]
        == (layers * (attention + 3 * hidden * ffn + 2 * hidden) + embedding + hidden) * BF16
    )  # embedding and head are one tensor
    assert alone["ranks"] == 1
    assert all(not entry["collectives"] for entry in alone["layers"])


def test_what_lies_between_modules_is_counted() -> None:
    """Of one token most when its logits are made: with them, what they are made of. Of many tokens,
    whose logits are few, most in a norm: two values go in, two come out, and no other is alive."""
    row, logits = 576 * BF16, 49152 * BF16
    one, many = (shard.measure("smollm2", "", n, "bfloat16") for n in (1, 65536))
    assert one.activation_bytes == logits + 2 * row
    assert many.activation_bytes == 4 * 65536 * row


def test_experts_are_dealt_out() -> None:
    config = models.find_config("deepseek-v3")
    assert isinstance(config, models.DeepseekConfig)
    one, four = (printed("deepseek-v3", "--mesh", mesh)["layers"][9] for mesh in ("", "ep=4"))
    experts = config.experts * 3 * config.hidden * config.expert_ffn * BF16
    assert one["parameter_bytes"] - four["parameter_bytes"] == experts * 3 // 4


def test_stages_have_their_own_layers() -> None:
    found = printed("smollm2", "--mesh", "pp=2,tp=3", "--tokens", "16")
    assert [layer["layer"] for layer in found["layers"]] == list(range(30))
    last = [one["op"] for one in found["layers"][14]["collectives"]]
    assert sorted(last) == ["all_reduce", "all_reduce", "send", "send"]
    assert found["kv_bytes_per_token_per_rank"] * 2 == 30 * 2 * 64 * BF16
    assert [one["op"] for one in found["outside"]["collectives"]].count("broadcast") == 1


def test_the_table_joins_layers_that_are_alike() -> None:
    found = CliRunner().invoke(cli, ["shard", "smollm2", "--mesh", "tp=3"])
    assert "1 to 29, each" in found.stdout
    assert "2 all_reduce over tp, 36.86 kB" in found.stdout


def test_links_can_be_set() -> None:
    slow = shard.measure("smollm2", "tp=3", 4098, "bfloat16", ["tp=1000,100"])
    fast = shard.measure("smollm2", "tp=3", 4098, "bfloat16", ["tp=0,100"])
    assert {one.op for one in slow.layers[3].sent} == {"all_reduce"}
    assert {one.op for one in fast.layers[3].sent} == {"all_gather", "reduce_scatter"}


def test_a_configuration_file_will_do(tmp_path: Path) -> None:
    shapes = Path(models.__file__).parent / "shapes" / "smollm2.json"
    (tmp_path / "config.json").write_text(shapes.read_text())
    for path in (tmp_path, tmp_path / "config.json"):
        found = printed(str(path), "--mesh", "tp=3")
        assert found["layers"] == printed("smollm2", "--mesh", "tp=3")["layers"]


@needs_smollm2
def test_the_shape_that_is_shipped_is_that_of_the_packaged_gguf() -> None:
    assert (
        printed(DEFAULT_MODEL, "--mesh", "tp=3")["layers"]
        == (printed("smollm2", "--mesh", "tp=3")["layers"])
    )


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        (("smollm2", "tp=x", None), ConfigError, "as in tp=4,ep=4"),
        (("smollm2", "tp=3,tp=3", None), ConfigError, "distinct axis names"),
        (("smollm2", "dp=8", 12), ConfigError, "expected 8 to .*, a multiple of 8: so many ranks"),
        (("smollm2", "tp=3", 0), ConfigError, "tokens: got 0; expected 1 to 2,147,483,648$"),
        (("smollm2", "tp=3", 1 << 70), ConfigError, "expected 1 to 2,147,483,648$"),
        (("smollm2", "pt=3", None), ConfigError, "axes among dp, ep, tp, pp"),
        (("smollm2", "tp=99999999", None), ConfigError, "at most 65,536 ranks"),
        (("smollm2", "tp=4", None), PlacementError, r"q_proj.*tp=4.*divisor of 9"),
        (("smollm2", "pp=31", None), PlacementError, "30 layers cannot be split over 31 stages"),
        (("no-such-model", "tp=2", None), CheckpointError, "none of .*deepseek-v3"),
    ],
)
def test_what_cannot_be_is_refused(
    arguments: tuple[str, str, int | None], error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        shard.measure(*arguments, "bfloat16")


@pytest.mark.parametrize("link", ["tp", "tp=1", "tp=1,x", "tp=-1,5", "tp=1,0", "ep=1,2"])
def test_bad_links_are_refused(link: str) -> None:
    with pytest.raises(ConfigError, match="link"):
        shard.measure("smollm2", "tp=3", None, "bfloat16", [link])

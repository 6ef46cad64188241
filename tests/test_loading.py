"""Reading weights: any part of any tensor, straight to where it belongs, in bounded memory."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

import tiny
from test_models import logits
from tokenspeed import models
from tokenspeed.cli import cli
from tokenspeed.engine import Engine
from tokenspeed.errors import CheckpointError
from tokenspeed.models.safetensors_file import FP8, SafetensorsFile
from tokenspeed.request import SamplingParams
from tokenspeed.spmd import Mesh
from tokenspeed.spmd.arena import Arena
from tokenspeed.spmd.params import Parameter, leaves

BLOCK = (16, 8)
FP8_CONFIG = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": list(BLOCK)}


def quantised(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """A matrix as 8-bit floats, the scales of its blocks, and what the two stand for."""
    high, wide = BLOCK
    scale = torch.zeros(-(-weight.shape[0] // high), -(-weight.shape[1] // wide))
    small, meant = torch.empty(weight.shape, dtype=FP8), torch.empty(weight.shape)
    for i in range(scale.shape[0]):
        for j in range(scale.shape[1]):
            at = (slice(i * high, (i + 1) * high), slice(j * wide, (j + 1) * wide))
            scale[i, j] = weight[at].abs().max() / 448
            small[at] = (weight[at] / scale[i, j]).to(FP8)
            meant[at] = small[at].float() * scale[i, j]
    return small, scale, meant


def write_fp8(folder: Path, **config: Any) -> Path:
    """A checkpoint whose projections are 8-bit floats in `folder`, and what it means beside it."""
    plain = tiny.write(folder.with_name(folder.name + "-plain"), **config)
    tensors = load_file(plain / "model.safetensors")
    small = dict(tensors)
    for name, tensor in tensors.items():
        if "_proj" in name and name.endswith("weight"):
            small[name], small[f"{name}_scale_inv"], tensors[name] = quantised(tensor)
    save_file(tensors, plain / "model.safetensors")
    tiny.write(folder, **config, quantization_config=FP8_CONFIG)
    save_file(small, folder / "model.safetensors")
    return plain


@pytest.mark.parametrize("config", [{}, tiny.DEEPSEEK], ids=["llama", "deepseek"])
def test_fp8_in_blocks_is_what_it_stands_for(config: dict[str, Any], tmp_path: Path) -> None:
    plain = write_fp8(tmp_path / "fp8", **config)
    ids = torch.arange(3, 40)
    got, wanted = (logits(f, ids, chunk=20) for f in (tmp_path / "fp8", plain))
    assert torch.equal(got, wanted)
    assert (
        models.open_checkpoint(tmp_path / "fp8")
        .read("model.layers.0.self_attn.o_proj.weight")
        .dtype
        == torch.bfloat16
    )


def test_what_is_wrong_with_scales_is_listed_with_the_rest(tmp_path: Path) -> None:
    write_fp8(tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    at = "model.layers.0.self_attn"
    del tensors[f"{at}.q_proj.weight_scale_inv"], tensors["model.norm.weight"]
    tensors[f"{at}.k_proj.weight_scale_inv"] = torch.ones(1, 1)
    tensors["model.norm.weight_scale_inv"] = torch.ones(1)
    save_file(tensors, tmp_path / "fp8" / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        models.build(models.open_checkpoint(tmp_path / "fp8"), Mesh.single())
    text = str(caught.value)
    assert "4 tensors are wrong" in text
    assert "missing: model.norm.weight [32]" in text
    assert f"missing: {at}.q_proj.weight_scale_inv [2, 4]" in text
    assert f"misshapen: {at}.k_proj.weight_scale_inv is [1, 1], expected [1, 4]" in text
    assert "unknown: model.norm.weight_scale_inv" in text


def test_8_bit_floats_without_a_block_size_are_refused(tmp_path: Path) -> None:
    write_fp8(tmp_path / "fp8")
    raw = json.loads((tmp_path / "fp8" / "config.json").read_text())
    del raw["quantization_config"]
    (tmp_path / "fp8" / "config.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="says nothing of quantization"):
        models.open_checkpoint(tmp_path / "fp8")


SHAPES: dict[str, tuple[int, ...]] = {"matrix": (37, 19), "row": (1, 64), "vector": (23,)}
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Tensor]:
    """By name, with one dtype each; in a file of which parts are read below."""
    folder = tmp_path_factory.mktemp("parts")
    random = torch.Generator().manual_seed(0)
    tensors = {
        f"{name}_{index}": torch.randn(shape, generator=random).to(dtype)
        for name, shape in SHAPES.items()
        for index, dtype in enumerate(DTYPES)
    }
    small, scale, meant = quantised(torch.randn(37, 19, generator=random))
    file = {**tensors, "small": small, "small_scale_inv": scale}
    tiny.write(folder, quantization_config=FP8_CONFIG)
    save_file(file, folder / "model.safetensors")
    _opened[0] = models.open_checkpoint(folder)
    return {**tensors, "small": meant}


_opened: dict[int, models.Checkpoint] = {}


@given(st.data())
def test_any_part_in_any_dtype(weights: dict[str, Tensor], data: st.DataObject) -> None:
    """Through blocks of a few rows as well, which cut at other places than the blocks of scales."""
    name = data.draw(st.sampled_from(sorted(weights)))
    whole = weights[name]
    part = []
    for size in whole.shape:
        first = data.draw(st.integers(0, size - 1))
        part.append(slice(first, data.draw(st.integers(first + 1, size))))
    wanted = whole[tuple(part)]
    target = torch.full(wanted.shape, torch.nan, dtype=data.draw(st.sampled_from(DTYPES)))
    with pytest.MonkeyPatch.context() as patch:
        block = data.draw(st.sampled_from([1, 200, 1 << 20]))
        patch.setattr("tokenspeed.models.checkpoint.BLOCK_BYTES", block)
        _opened[0].read_into(target, name, tuple(part))
    assert torch.equal(target, wanted.to(target.dtype))


def test_a_name_in_a_header_comes_once(tmp_path: Path) -> None:
    entry = '"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}'
    text = f"{{{entry}, {entry}}}".encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + bytes(4))
    with pytest.raises(CheckpointError, match=r"damaged: .*'w' comes twice"):
        SafetensorsFile(tmp_path / "model.safetensors")


def test_a_file_that_was_cut_off_since_it_was_opened_is_said(tmp_path: Path) -> None:
    save_file({"x": torch.ones(100)}, tmp_path / "x.safetensors")
    file = SafetensorsFile(tmp_path / "x.safetensors")
    data = file.path.read_bytes()
    file.path.write_bytes(data[:-8])
    with pytest.raises(CheckpointError, match="'x' is cut off"):
        file.read_rows("x", 0, torch.empty(100))
    file.path.unlink()
    with pytest.raises(CheckpointError, match="'x' cannot be read"):
        file.read_rows("x", 0, torch.empty(100))


@pytest.mark.parametrize("config", [{}, tiny.DEEPSEEK], ids=["llama", "deepseek"])
def test_ranks_read_their_parts_of_the_whole(config: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = models.open_checkpoint(tiny.write(tmp_path, **config))
    whole = dict(leaves(models.build(checkpoint, Mesh.single()).params))
    ranks = [dict(leaves(models.build(checkpoint, Mesh.of(tp=2, rank=r)).params)) for r in (0, 1)]
    cut = 0
    for path, tensor in whole.items():
        parts = [rank[path] for rank in ranks]
        if parts[0].shape != tensor.shape:
            assert sum(part.numel() for part in parts) == tensor.numel()
            torch.testing.assert_close(
                torch.cat([p.flatten() for p in parts]).sort().values,
                tensor.flatten().sort().values,
            )
            cut += 1
        else:
            assert torch.equal(parts[0], tensor)
    assert cut > 8


# --- memory and time ------------------------------------------------------------------------------

MEASURE = """
import sys, time, torch
from tokenspeed import models
from tokenspeed.spmd import Mesh
torch.set_num_threads(1)
checkpoint = models.open_checkpoint(sys.argv[1])
mesh = Mesh.of(tp=int(sys.argv[2]), rank=0)
models.build(models.DummyCheckpoint(sys.argv[3]), mesh, dtype="bfloat16")  # what a first time takes
before, started_s, counts = models.PeakMemory().peak_bytes, time.monotonic(), []
peak = models.PeakMemory()
model = models.build(
    checkpoint, mesh, dtype=sys.argv[4], progress=lambda done, total: counts.append((done, total))
)
loaded = models.Loaded(model.weights_bytes, time.monotonic() - started_s, peak.peak_bytes)
assert all(a < b for (a, _), (b, _) in zip(counts, counts[1:])), "progress goes up"
assert counts[-1][0] == counts[-1][1] and len(counts) > 20, "and ends at the whole"
print(loaded, file=sys.stderr)
print(loaded.weights_bytes, loaded.peak_bytes - before)
"""


def synthetic(folder: Path, vocab: int, hidden: int, layers: int) -> int:
    """A Llama in bfloat16, in a file a layer, written a layer at a time; its largest tensor."""
    shape = {"vocab_size": vocab, "hidden_size": hidden, "num_hidden_layers": layers}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": hidden // 8}
    (folder / "config.json").write_text(
        json.dumps({**tiny.CONFIG, **shape, **heads, "intermediate_size": 2 * hidden})
    )
    (folder / "tokenizer.json").write_text("{}")
    config = models.find_config(folder)
    tree = models.Family.of(config).parameters(config)
    files: dict[str, list[tuple[str, tuple[int, ...]]]] = {}
    for path, leaf in leaves(tree):
        if isinstance(leaf, Parameter):
            file = f"model-{'-'.join(map(str, path[:2]))}.safetensors"
            files.setdefault(file, []).extend((s.name, s.shape) for s in leaf.sources)
    weight_map = {}
    for file, tensors in files.items():
        save_file({n: torch.ones(s, dtype=torch.bfloat16) for n, s in tensors}, folder / file)
        weight_map |= {name: file for name, _ in tensors}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return 2 * vocab * hidden


def measured(folder: Path, dtype: str, ranks: int) -> tuple[int, int, str]:
    """(bytes of one rank's weights, how much more was resident at most, what is printed)"""
    small = tiny.write(folder / "small", num_attention_heads=8, num_key_value_heads=8)
    command = [sys.executable, "-c", MEASURE, str(folder), str(ranks), str(small), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    size, more = map(int, done.stdout.split())
    return size, more, done.stderr.strip()


SLACK = 48 << 20
"""A block of the file, the same in another dtype, and what allocators keep."""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="memory is counted by Linux")
@pytest.mark.parametrize(
    ("sizes", "dtype", "ranks"),
    [
        pytest.param((40000, 1024, 4), "float32", 4, id="250 MB, a quarter, in float32"),
        pytest.param((40000, 2048, 8), "bfloat16", 1, id="1 GB", marks=pytest.mark.slow),
        pytest.param((40000, 2048, 8), "bfloat16", 4, id="1 GB by 4", marks=pytest.mark.slow),
        pytest.param((40000, 2048, 8), "float32", 1, id="1 GB in float32", marks=pytest.mark.slow),
    ],
)
def test_loading_takes_little_more_than_the_weights(
    sizes: tuple[int, int, int],
    dtype: str,
    ranks: int,
    tmp_path: Path,
    record_property: Any,
) -> None:
    largest = synthetic(tmp_path, *sizes)
    size, more, said = measured(tmp_path, dtype, ranks)
    record_property("loading", said)
    assert "MB of weights in" in said
    assert more >= size * 0.9, "what is resident was not counted"
    assert more <= size + max(largest, SLACK)


@given(
    st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 2), st.integers(0, 5)), max_size=9)
)
def test_what_an_arena_gives_is_zeroed_and_everybody_s_own(
    wanted: list[tuple[torch.dtype, int, int]],
) -> None:
    """In blocks of a few hundred bytes, so that some end and some are too small."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tokenspeed.spmd.arena.BLOCK_BYTES", 300)
        patch.setattr("tokenspeed.spmd.arena.HUGE_BYTES", 4096)
        arena = Arena(torch.device("cpu"))
        held = []
        for number, (dtype, rows, columns) in enumerate(wanted, 1):
            made = arena.zeros((rows, 30 * columns), dtype=dtype)
            assert made.is_contiguous()
            assert made.data_ptr() % 64 == 0
            assert not made.any()
            held.append(made.fill_(number))
            held.append(arena.keep(made))
    for at, tensor in enumerate(held):
        assert (tensor == at // 2 + 1).all()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux tells what was advised")
def test_weights_and_kv_ask_for_huge_pages(tmp_path: Path) -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists():
        pytest.skip("this system has no transparent huge pages")
    model = models.build(models.open_checkpoint(tiny.write(tmp_path)), Mesh.single())
    kv = model.kv.allocate(3, 4)
    places = {part.data_ptr() for part in kv[0]}
    places |= {leaf.data_ptr() for path, leaf in leaves(model.params) if path[-1] != "cos_sin"}
    advised, here = set[int](), range(0)
    for line in Path("/proc/self/smaps").read_text(encoding="ascii").splitlines():
        head, _, rest = line.partition(" ")
        if "-" in head:
            low, high = (int(end, 16) for end in head.split("-"))
            here = range(low, high)
        elif head == "VmFlags:" and "hg" in rest.split():
            advised |= {place for place in places if place in here}
    assert advised == places


# --- without weights ------------------------------------------------------------------------------


def test_dummy_weights_are_the_same_for_all_and_differ_by_seed(tmp_path: Path) -> None:
    tiny.write(tmp_path, **tiny.DEEPSEEK)
    whole = models.DummyCheckpoint(tmp_path)
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    matrix = whole.read(name)
    assert 0.8 < float(matrix.std() * matrix.shape[1] ** 0.5) < 1.2
    part = torch.empty(5, 7)
    models.DummyCheckpoint(tmp_path).read_into(part, name, (slice(3, 8), slice(9, 16)))
    assert torch.equal(part, matrix[3:8, 9:16])
    assert not torch.equal(models.DummyCheckpoint(tmp_path, seed=1).read(name), matrix)
    assert not torch.equal(whole.read(name.replace("3", "4")), matrix)
    assert len({tuple(row) for row in matrix.tolist()}) == len(matrix)
    assert torch.equal(whole.read("model.norm.weight"), torch.ones(32))


def test_the_end_of_the_random_numbers_is_their_beginning(tmp_path: Path) -> None:
    tiny.write(tmp_path, vocab_size=40000)
    name = "model.embed_tokens.weight"  # more elements than there are numbers
    dummy = models.DummyCheckpoint(tmp_path)
    matrix = dummy.read(name)
    row = torch.empty(1, 30)
    for index in (0, 20000, 31250, 31251, 39999):
        dummy.read_into(row, name, (slice(index, index + 1), slice(2, 32)))
        assert torch.equal(row[0], matrix[index, 2:])


def test_a_model_without_weights_is_served(tmp_path: Path) -> None:
    """A configuration alone, with a token for each byte; one with a tokenizer keeps it."""
    (tmp_path / "config.json").write_text(json.dumps({**tiny.CONFIG, "vocab_size": 300}))
    with Engine.from_pretrained(
        tmp_path / "config.json", load_format="dummy", pages=8, dtype="float32"
    ) as engine:
        assert engine.loaded is not None
        assert engine.loaded.weights_bytes > 0
        (done,) = engine.generate("Hello", SamplingParams(temperature=0, max_tokens=5))
        assert engine.tokenizer.decode(engine.tokenizer.encode("Hello", special=False)) == "Hello"
        assert done.usage.prompt_tokens == 5
    tiny.letters(tmp_path)
    assert models.DummyCheckpoint(tmp_path).tokenizer.json_path == tmp_path / "tokenizer.json"


def test_a_model_that_is_none_is_said_by_the_command() -> None:
    done = CliRunner().invoke(cli, ["serve", "nothing-of-this-name", "--load-format", "dummy"])
    assert isinstance(done.exception, CheckpointError)
    assert "none of deepseek-v2-lite" in str(done.exception)

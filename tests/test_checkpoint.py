"""Checkpoints: what is read, and that damage is named before memory is taken."""

from __future__ import annotations

import functools
import http.server
import json
import math
import os
import shutil
import struct
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from models_here import needs_smollm2
from tokenspeed import models
from tokenspeed.config import DEFAULT_MODEL
from tokenspeed.errors import CheckpointError, ConfigError
from tokenspeed.kernels import PackedWeight
from tokenspeed.kernels.packing import unpack
from tokenspeed.models import llama
from tokenspeed.spmd import Mesh

# --- GGUF -----------------------------------------------------------------------------------------


def interleaved(tensor: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as GGUF keeps them for Llama: pairs instead of halves."""
    halves = tensor.reshape(heads, 2, tensor.shape[0] // heads // 2, *tensor.shape[1:])
    return halves.swapaxes(1, 2).reshape(tensor.shape)


def write_gguf(path: Path, source: Path, kind: str = "F32") -> Path:
    """The tiny checkpoint as GGUF, by the gguf package's own writer."""
    config = models.read_config(source / "config.json")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_context_length(config.context_max)
    writer.add_embedding_length(config.hidden)
    writer.add_feed_forward_length(config.ffn)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list([f"t{i}" for i in range(config.vocab_size)])
    writer.add_token_merges(["t 1"])
    writer.add_eos_token_id(2)
    writer.add_chat_template("{{ messages }}")
    names = {theirs: own for own, theirs in llama.GGUF_NAMES.items()}
    for name, tensor in load_file(source / "model.safetensors").items():
        stem, _, suffix = name.rpartition(".")
        layer = stem.split(".")[2] if ".layers." in stem else ""
        own = names[stem.replace(f".layers.{layer}.", ".layers.{}.")].format(layer)
        array = tensor.numpy()
        for part, heads in (("q_proj", config.heads), ("k_proj", config.kv_heads)):
            array = interleaved(array, heads) if part in name else array
        quant = gguf.GGMLQuantizationType[kind]
        if (
            array.ndim > 1
            and kind != "F32"
            and array.shape[-1] % gguf.GGML_QUANT_SIZES[quant][0] == 0
        ):
            writer.add_tensor(
                f"{own}.{suffix}", gguf.quants.quantize(array, quant), raw_dtype=quant
            )
        else:
            writer.add_tensor(f"{own}.{suffix}", array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write(tmp_path_factory.mktemp("hf"))


@pytest.fixture(scope="module")
def file(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "tiny.gguf", folder)


@pytest.mark.parametrize(
    ("kind", "atol"), [("F32", 0.0), ("F16", 1e-3), ("BF16", 1e-2), ("Q8_0", 1e-2), ("Q4_1", 0.1)]
)
def test_gguf_equals_the_directory_it_came_from(
    kind: str, atol: float, folder: Path, tmp_path: Path
) -> None:
    ours = models.open_checkpoint(write_gguf(tmp_path / "tiny.gguf", folder, kind))
    theirs = models.open_checkpoint(folder)
    assert set(ours.tensors) == set(theirs.tensors)
    assert ours.config == theirs.config
    for name in theirs.tensors:
        a, b = ours.read(name), theirs.read(name)
        torch.testing.assert_close(a.float(), b, atol=atol, rtol=0)


def test_gguf_tokenizer_and_template(file: Path) -> None:
    source = models.open_checkpoint(file).tokenizer
    assert models.find_config(file) == models.open_checkpoint(file).config
    assert (source.vocab[5], source.merges, source.pre) == ("t5", ("t 1",), "smollm")
    assert (source.eos_ids, source.chat_template) == ((2,), "{{ messages }}")


def patched(source: Path, target: Path, change: Callable[[bytearray], Any]) -> Path:
    data = bytearray(source.read_bytes())
    changed = change(data)
    target.write_bytes(changed if isinstance(changed, (bytes, bytearray)) else data)
    return target


def put(offset: int, form: str, value: int) -> Callable[[bytearray], None]:
    return lambda data: struct.pack_into(form, data, offset, value)


def put_after(key: bytes, skip: int, form: str, value: int) -> Callable[[bytearray], None]:
    """Overwrite what lies `skip` bytes behind the first occurrence of a name."""
    return lambda data: struct.pack_into(form, data, data.index(key) + len(key) + skip, value)


EMBED = b"token_embd.weight"
DAMAGE: dict[str, tuple[Callable[[bytearray], Any], str]] = {
    "empty": (lambda data: b"", "cannot be read"),
    "magic": (put(0, "<I", 0), "no GGUF"),
    "version": (put(4, "<I", 99), "version 99"),
    "tensor count": (put(8, "<Q", 2**63), "claims 9223372036854775808 tensors"),
    "metadata count": (put(16, "<Q", 2**60), "metadata entries"),
    "key length": (put(24, "<Q", 2**62), "truncated or damaged"),
    "token count": (put_after(b"tokenizer.ggml.tokens", 8, "<Q", 2**61), "strings"),
    "metadata type": (put_after(b"tokenizer.ggml.tokens", 0, "<I", 77), "type 77"),
    "dims": (put_after(EMBED, 0, "<I", 9), "9 dims"),
    "huge dim": (put_after(EMBED, 4, "<Q", 2**62), "truncated"),
    "zero dim": (put_after(EMBED, 4, "<Q", 0), "whole"),
    "tensor type": (put_after(EMBED, 20, "<I", 200), "unknown type 200"),
    "offset": (put_after(EMBED, 24, "<Q", 2**63), "truncated"),
    "overlap": (put_after(b"output_norm.weight", 16, "<Q", 0), "overlaps"),
    "half": (lambda data: data[: len(data) // 2], "truncated"),
    "header only": (lambda data: data[:100], "more than 100 bytes can hold"),
    "last byte": (lambda data: data[:-40], "truncated"),
    "architecture": (
        lambda data: data.replace(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba"),
        "'mamba'; supported: llama",
    ),
    "heads": (put_after(b"llama.attention.head_count", 4, "<I", 0), "heads is 0"),
    "text": (put_after(b"tokenizer.ggml.pre", 12, "<B", 0xFF), "no UTF-8"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_gguf_is_refused_with_its_reason(name: str, file: Path, tmp_path: Path) -> None:
    change, reason = DAMAGE[name]
    bad = patched(file, tmp_path / "bad.gguf", change)
    with pytest.raises(CheckpointError, match=reason) as caught:
        models.open_checkpoint(bad)
    assert str(bad) in str(caught.value)


def test_every_truncation_is_refused(file: Path, tmp_path: Path) -> None:
    whole = file.read_bytes()
    for size in range(0, len(whole) - 32, len(whole) // 60):
        bad = tmp_path / "cut.gguf"
        bad.write_bytes(whole[:size])
        with pytest.raises(CheckpointError):
            models.open_checkpoint(bad)


def write_odd(path: Path, source: Path, key: str, value: Any) -> Path:
    """The tiny checkpoint's configuration as GGUF, with one entry more or another."""
    config = models.read_config(source / "config.json")
    writer = gguf.GGUFWriter(path, "llama")
    entries: dict[str, Any] = {
        "llama.block_count": config.layers,
        "llama.context_length": config.context_max,
        "llama.embedding_length": config.hidden,
        "llama.feed_forward_length": config.ffn,
        "llama.attention.head_count": config.heads,
        "llama.attention.layer_norm_rms_epsilon": 1e-5,
        "llama.rope.scaling.type": "linear",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.tokens": ["a", "b"],
        key: value,
    }
    kinds = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT64}
    kinds |= {str: gguf.GGUFValueType.STRING, list: gguf.GGUFValueType.ARRAY}
    for name, entry in entries.items():
        writer.add_key_value(name, entry, kinds[type(entry)])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("tokenizer.ggml.tokens", 7, "vocab_size is None, expected an integer"),
        ("tokenizer.ggml.tokens", [1, 2], "tokenizer.ggml.tokens is no list of str alone"),
        ("tokenizer.ggml.merges", "a b", "tokenizer.ggml.merges is 'a b', expected list"),
        ("tokenizer.ggml.token_type", 1.5, "tokenizer.ggml.token_type is '1.5', expected list"),
        ("tokenizer.ggml.eos_token_id", [1, 2], "tokenizer.ggml.eos_token_id is .*, expected int"),
        (
            "tokenizer.ggml.bos_token_id",
            "<s>",
            "bos_token_id is .<s>., expected int",
        ),
        ("tokenizer.chat_template", 3, "tokenizer.chat_template is '3', expected str"),
        ("llama.rope.scaling.factor", 0.0, "factor is 0.0, expected a number from 1e-06"),
        ("llama.rope.scaling.factor", "4", "factor is '4'"),
        ("llama.embedding_length", 1 << 31, "hidden is 2147483648, expected an integer from 1 to"),
    ],
)
def test_odd_metadata_of_a_gguf_is_refused(
    key: str, value: Any, reason: str, folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=reason):
        models.open_checkpoint(write_odd(tmp_path / "odd.gguf", folder, key, value))


def test_metadata_that_is_not_odd_is_read(folder: Path, tmp_path: Path) -> None:
    ends = write_odd(tmp_path / "even.gguf", folder, "tokenizer.ggml.eos_token_id", 1)
    assert models.open_checkpoint(ends).tokenizer.eos_ids == (1,)


@needs_smollm2
def test_the_default_model_opens() -> None:
    checkpoint = models.open_checkpoint(models.resolve_model(DEFAULT_MODEL))
    assert (checkpoint.config.layers, checkpoint.config.hidden) == (30, 576)
    assert checkpoint.config.tied
    assert len(checkpoint.tensors) == 272
    assert checkpoint.tokenizer.pre == "smollm"
    assert checkpoint.tokenizer.eos_ids == (2,)
    assert "messages" in (checkpoint.tokenizer.chat_template or "")


# --- Hugging Face directories ---------------------------------------------------------------------


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(folder, tmp_path / "model"))


def edit_config(copy: Path, **changes: Any) -> None:
    raw = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**raw, **changes}))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"model_type": "mamba"},
            "architecture 'mamba'; supported: llama, mistral, qwen2",
        ),
        ({"hidden_size": "32"}, "hidden is '32'"),
        ({"num_hidden_layers": 0}, "layers is 0"),
        ({"num_attention_heads": 3}, "3 heads over 2 KV heads"),
        ({"head_dim": 7}, "head_dim 7 is odd"),
        ({"rms_norm_eps": float("nan")}, "norm_eps is nan"),
        ({"rope_scaling": {"type": "longrope", "factor": 2.0}}, "rope scaling 'longrope'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0, "mscale": "1"}}, "mscale is '1'"),
        ({"rope_scaling": {"type": "linear"}}, "factor is None"),
        ({"hidden_act": "gelu"}, "gelu"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantised"),
        ({"quantization_config": {"quant_method": "awq", "weight_block_size": [8, 8]}}, "awq"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": [0, 8]}},
            "quantised",
        ),
        ({"model_type": "mistral", "sliding_window": 0}, "sliding_window is 0"),
        ({"model_type": "mistral", "sliding_window": "8"}, "sliding_window is '8'"),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention"]},
            r"layer_types is \['full_attention'\], expected 2 of",
        ),
        (
            {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["mamba", 7]},
            "expected 2 of full_attention, sliding_attention",
        ),
    ],
)
def test_bad_configurations_are_refused(copy: Path, changes: dict[str, Any], reason: str) -> None:
    edit_config(copy, **changes)
    with pytest.raises(CheckpointError, match=reason):
        models.open_checkpoint(copy)


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"model_type": "llama", "sliding_window": 8}, ()),  # such a model has none
        ({"model_type": "mistral", "sliding_window": 8}, (8, 8)),
        ({"model_type": "mistral", "sliding_window": None}, ()),
        ({"model_type": "mistral", "sliding_window": 128}, ()),  # all that there can be
        ({"model_type": "qwen2", "sliding_window": 8}, ()),
        ({"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}, ()),
        (
            {"model_type": "qwen2", "sliding_window": 8, "max_window_layers": 1}
            | {"use_sliding_window": True},
            (None, 8),
        ),
        (
            {"model_type": "qwen2", "sliding_window": 8, "use_sliding_window": True}
            | {"layer_types": ["sliding_attention", "full_attention"]},
            (8, None),
        ),
    ],
)
def test_each_layer_has_the_window_that_the_file_says(
    copy: Path, changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    edit_config(copy, **changes)
    config = models.read_config(copy / "config.json")
    assert config.windows == windows
    assert [config.window(layer) for layer in range(2)] == list(windows or (None, None))


def header(path: Path) -> tuple[dict[str, Any], bytes]:
    data = path.read_bytes()
    length = struct.unpack_from("<Q", data)[0]
    return json.loads(data[8 : 8 + length]), data[8 + length :]


def rewrite(path: Path, entries: dict[str, Any], data: bytes) -> None:
    text = json.dumps(entries).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def with_offsets(entries: dict[str, Any], offsets: list[float]) -> dict[str, Any]:
    return {**entries, "lm_head.weight": {**entries["lm_head.weight"], "data_offsets": offsets}}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda e, d: (e, d[:-4]), "truncated"),
        (lambda e, d: ({**e, "lm_head.weight": {**e["lm_head.weight"], "dtype": "I64"}}, d), "I64"),
        (
            lambda e, d: ({**e, "lm_head.weight": {**e["lm_head.weight"], "shape": [2**40, 1]}}, d),
            "lies",
        ),
        (
            lambda e, d: (
                {**e, "lm_head.weight": {**e["lm_head.weight"], "data_offsets": [4, 12292]}},
                d,
            ),
            "lies",
        ),
        (lambda e, d: ({**e, "lm_head.weight": 3}, d), "damaged"),
        (lambda e, d: ([], d), "damaged"),
        (lambda e, d: (with_offsets(e, [0]), d), "damaged"),
        (lambda e, d: (with_offsets(e, [0, 1, 2]), d), "damaged"),
        (lambda e, d: (with_offsets(e, [0, math.inf]), d), "damaged"),
    ],
    ids=["short", "dtype", "shape", "overlap", "entry", "list", "one", "three", "infinite"],
)
def test_damaged_safetensors_are_refused(
    copy: Path, change: Callable[[Any, bytes], tuple[Any, bytes]], reason: str
) -> None:
    path = copy / "model.safetensors"
    rewrite(path, *change(*header(path)))
    with pytest.raises(CheckpointError, match=reason) as caught:
        models.open_checkpoint(copy)
    assert "model.safetensors" in str(caught.value)


def test_a_huge_header_is_not_read(copy: Path) -> None:
    (copy / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
    with pytest.raises(CheckpointError, match="header of 4611686018427387904 bytes"):
        models.open_checkpoint(copy)


def test_missing_unknown_and_misshapen_tensors_are_listed_together(copy: Path) -> None:
    tensors = load_file(copy / "model.safetensors")
    del tensors["model.norm.weight"]
    tensors["model.layers.0.mlp.down_proj.weight"] = torch.zeros(3, 3)
    tensors["model.layers.7.extra"] = torch.zeros(1)
    save_file(tensors, copy / "model.safetensors")
    with pytest.raises(CheckpointError) as caught:
        models.build(models.open_checkpoint(copy), Mesh.single())
    text = str(caught.value)
    assert "3 tensors are wrong" in text
    assert "missing: model.norm.weight [32]" in text
    assert "unknown: model.layers.7.extra" in text
    assert "misshapen: model.layers.0.mlp.down_proj.weight is [3, 3], expected [32, 48]" in text


def test_pickles_are_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="unpickling runs code"):
        models.open_checkpoint(copy)
    with pytest.raises(CheckpointError, match="unpickling runs code"):
        models.open_checkpoint(copy / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="does not exist"):
        models.open_checkpoint(tmp_path / "nowhere")


def test_an_index_cannot_leave_its_directory(copy: Path) -> None:
    index = {"weight_map": {"lm_head.weight": "../../secret.safetensors"}}
    (copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(CheckpointError, match="outside its directory"):
        models.open_checkpoint(copy)


def test_tokenizer_settings_of_a_directory(copy: Path) -> None:
    (copy / "generation_config.json").write_text('{"eos_token_id": [2, 7]}')
    (copy / "tokenizer_config.json").write_text('{"chat_template": "old"}')
    assert models.open_checkpoint(copy).tokenizer.chat_template == "old"
    (copy / "chat_template.jinja").write_text("new")
    source = models.open_checkpoint(copy).tokenizer
    assert (source.bos_id, source.eos_ids, source.chat_template) == (1, (2, 7), "new")
    (copy / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer\.json"):
        models.open_checkpoint(copy)


# --- building and finding -------------------------------------------------------------------------


def test_progress_counts_bytes_to_the_end(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = models.open_checkpoint(folder)
    models.build(checkpoint, Mesh.single(), progress=lambda done, total: seen.append((done, total)))
    total = sum(info.size_bytes for info in checkpoint.tensors.values())
    assert [done for done, _ in seen] == sorted({done for done, _ in seen})
    assert seen[-1] == (total, total)


def test_dtype_is_checked_and_kept(folder: Path) -> None:
    checkpoint = models.open_checkpoint(folder)
    model = models.build(checkpoint, Mesh.single(), dtype="bfloat16")
    assert model.params["embed"]["weight"].dtype == model.kv.dtype == torch.bfloat16
    with pytest.raises(ConfigError, match="int8"):
        models.build(checkpoint, Mesh.single(), dtype="int8")


def packed_bits(params: object) -> set[int | None]:
    """Of the matrices that products read: the bits, or None for floats."""
    assert isinstance(params, dict)
    read = [params["head"]["weight"]]
    for layer in params["layers"]:
        read += [layer["attention"]["qkv"], layer["attention"]["out"], layer["mlp"]["gate_up"]]
        # Its columns are no whole groups of 32.
        assert isinstance(layer["mlp"]["down"], torch.Tensor)
    return {one.bits if isinstance(one, PackedWeight) else None for one in read}


def test_matrices_are_packed_as_asked_for(folder: Path) -> None:
    checkpoint = models.open_checkpoint(folder)
    for quantize, bits in (("none", {None}), ("auto", {None}), ("int8", {8}), ("int4", {4, 8})):
        params = models.build(checkpoint, Mesh.single(), dtype="bfloat16", quantize=quantize).params
        assert packed_bits(params) == bits, quantize
        assert params["embed"]["weight"].dtype == torch.bfloat16
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="quantize: got 'int4'"):
            models.build(checkpoint, Mesh.single(), device="cuda", quantize="int4")


@pytest.mark.parametrize(("kind", "bits"), [("F32", {None}), ("Q8_0", {8}), ("Q4_1", {4, 8})])
def test_auto_packs_what_a_gguf_has_in_few_bits(
    tmp_path: Path, folder: Path, kind: str, bits: set[int | None]
) -> None:
    checkpoint = models.open_checkpoint(write_gguf(tmp_path / "tiny.gguf", folder, kind))
    built = models.build(checkpoint, Mesh.single(), dtype="bfloat16", quantize="auto")
    assert packed_bits(built.params) == bits
    exact = models.build(checkpoint, Mesh.single(), dtype="float32", quantize="auto")
    assert packed_bits(exact.params) == {None}
    if bits == {4, 8}:
        assert built.weights_bytes < exact.weights_bytes
        out = built.params["layers"][0]["attention"]["out"]
        held = exact.params["layers"][0]["attention"]["out"]
        torch.testing.assert_close(unpack(out), held, atol=1e-4, rtol=1e-3)


def test_tied_weights_take_memory_once(tmp_path: Path) -> None:
    folder = tiny.write(tmp_path, tie_word_embeddings=True)
    params = models.build(models.open_checkpoint(folder), Mesh.single()).params
    assert params["embed"]["weight"].data_ptr() == params["head"]["weight"].data_ptr()


def test_names_that_stand_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(CheckpointError, match="no such file or directory"):
        models.resolve_model("nothing-of-the-kind")
    with pytest.raises(CheckpointError, match="no such file or directory"):
        models.resolve_model("/a/b/c")
    assert models.resolve_model(tmp_path) == tmp_path
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"tokenspeed\[demo\]"):
        models.resolve_model(DEFAULT_MODEL)


class _Hub(http.server.SimpleHTTPRequestHandler):
    """Just enough of a model hub: a listing and its files, one of which must not be asked for."""

    asked: list[str] = []  # noqa: RUF012

    def do_GET(self) -> None:
        self.answer(body=True)

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def answer(self, *, body: bool) -> None:
        folder, commit = Path(self.directory), "a" * 40
        self.asked.append(self.path)
        name = self.path.rpartition("/")[2]
        files = sorted(file.name for file in folder.iterdir())
        if "/api/models/owner/tiny/tree/" in self.path:
            listing: Any = [
                {"type": "file", "path": f, "size": (folder / f).stat().st_size, "oid": "b" * 40}
                for f in files
            ]
        elif "/api/models/owner/tiny" in self.path:
            listing = {
                "id": "owner/tiny",
                "sha": commit,
                "siblings": [{"rfilename": f} for f in files],
            }
        else:
            listing = None
        found = listing is not None or ("/resolve/" in self.path and name in files)
        data = json.dumps(listing).encode() if listing is not None else b""
        if found and listing is None:
            data = (folder / name).read_bytes()
        self.send_response(200 if found else 404)
        self.send_header("Content-Length", str(len(data)))
        self.send_header("ETag", f'"{name}"')
        self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if body:
            self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002
        """Stay silent."""


def resolve_in_a_process(name: str, endpoint: str, home: Path) -> subprocess.CompletedProcess[str]:
    """The hub's address is read when its client is imported, so a process of its own asks."""
    code = (
        "from tokenspeed.models.hub import resolve_model\n"
        "seen = []\n"
        f"path = resolve_model({name!r}, progress=lambda *a: seen.append(a))\n"
        "print(sorted(f.name for f in path.iterdir()), seen[-1])\n"
    )
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home)}
    environment.pop("HF_HUB_OFFLINE", None)
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**environment, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_a_hub_id_is_downloaded_without_its_pickles(copy: Path, tmp_path: Path) -> None:
    (copy / "pytorch_model.bin").write_bytes(b"no")
    (copy / "modeling_tiny.py").write_text("no")
    handler = functools.partial(_Hub, directory=str(copy))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        done = resolve_in_a_process(
            "owner/tiny", f"http://127.0.0.1:{server.server_port}", tmp_path / "home"
        )
        server.shutdown()
    assert done.returncode == 0, done.stderr
    wanted = ["config.json", "model.safetensors", "tokenizer.json"]
    assert done.stdout.startswith(str(wanted))
    size = sum((copy / name).stat().st_size for name in wanted)
    assert f"('download', {size}, {size})" in done.stdout
    assert not any(name in path for path in _Hub.asked for name in ("pytorch_model", "modeling"))


def test_an_unreachable_hub_is_said(tmp_path: Path) -> None:
    done = resolve_in_a_process("owner/tiny", "http://127.0.0.1:9", tmp_path / "home")
    assert done.returncode != 0
    assert "CheckpointError: owner/tiny: is not in the local cache" in done.stderr

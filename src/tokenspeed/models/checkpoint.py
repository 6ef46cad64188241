"""Checkpoints: one way to read a GGUF file and a Hugging Face directory.

Rule: opening checks everything that can be known without reading weights; weights are read one
tensor at a time and never unpickled. Tensors have Hugging Face's names, whatever the file.
"""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from attrs import frozen
from safetensors import SafetensorError, safe_open
from torch import Tensor

from tokenspeed.config import TokenizerSource
from tokenspeed.errors import CheckpointError
from tokenspeed.models import llama
from tokenspeed.models.config import LlamaConfig, ModelConfig, read_json
from tokenspeed.models.families import read_config
from tokenspeed.models.gguf_file import GGUFFile

__all__ = ["Checkpoint", "GGUFCheckpoint", "HuggingFaceCheckpoint", "TensorInfo", "open_checkpoint"]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_HEADER_MAX = 100 << 20


@final
@frozen
class TensorInfo:
    """A tensor that a checkpoint holds: its shape and its size in the file."""

    shape: tuple[int, ...]
    size_bytes: int


class Checkpoint:
    """An opened model (abstract).

    Attributes:
        path: file or directory.
        config: the model's shape.
        tokenizer: where its text rules are.
        tensors: what it holds, by Hugging Face name.
    """

    path: Path
    config: ModelConfig
    tokenizer: TokenizerSource
    tensors: Mapping[str, TensorInfo]

    def read(self, name: str) -> Tensor:
        """One tensor in a float dtype. Raises CheckpointError."""
        raise NotImplementedError


def open_checkpoint(path: Path | str) -> Checkpoint:
    """Open a GGUF file or a Hugging Face directory (config.json, safetensors, tokenizer.json).

    Raises:
        CheckpointError: it is missing, damaged, of an unknown kind or architecture, or pickled.
    """
    path = Path(path)
    if path.is_dir():
        return HuggingFaceCheckpoint(path)
    if not path.exists():
        raise CheckpointError(path, "does not exist")
    if path.suffix in _PICKLES:
        raise CheckpointError(path, _pickle_reason("this file"))
    if path.suffix == ".safetensors":
        raise CheckpointError(path, f"is weights alone; give its directory: {path.parent}")
    return GGUFCheckpoint(path)


def _pickle_reason(what: str) -> str:
    return (
        f"{what} is pickled, and unpickling runs code that the file brings along; convert it to "
        "safetensors, or choose a repository that has them"
    )


@final
class GGUFCheckpoint(Checkpoint):
    """Weights, tokenizer and chat template in one GGUF file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = GGUFFile(path)
        self.config = self._shape = LlamaConfig.from_gguf(path, self._file.meta, self._file.tensors)
        self.tokenizer = _gguf_tokenizer(path, self._file.meta)
        self._names = {_huggingface_name(name): name for name in self._file.tensors}
        self.tensors = {
            name: TensorInfo(self._file.tensors[own].shape, self._file.tensors[own].size)
            for name, own in self._names.items()
        }

    def read(self, name: str) -> Tensor:
        """See Checkpoint. Llama's q and k rows go from GGUF's interleaved order to halves."""
        tensor = self._file.read(self._names[name])
        shape = self._shape
        if shape.architecture != "llama":
            return tensor
        for part, heads in (("q_proj", shape.heads), ("k_proj", shape.kv_heads)):
            if f".{part}." in name:
                pairs = tensor.view(heads, shape.head_dim // 2, 2, *tensor.shape[1:])
                return pairs.transpose(1, 2).reshape(tensor.shape)
        return tensor


def _huggingface_name(name: str) -> str:
    """`blk.3.attn_q.weight` -> `model.layers.3.self_attn.q_proj.weight`; others stay."""
    stem, _, suffix = name.rpartition(".")
    layer = re.match(r"blk\.(\d+)\.", stem)
    number = layer.group(1) if layer else ""
    known = llama.GGUF_NAMES.get(re.sub(r"^blk\.\d+\.", "blk.{}.", stem))
    return f"{known.format(number)}.{suffix}" if known else name


def _gguf_tokenizer(path: Path, meta: Mapping[str, Any]) -> TokenizerSource:
    kind = meta.get("tokenizer.ggml.model")
    if kind != "gpt2":
        raise CheckpointError(path, f"tokenizer {kind!r}; supported in GGUF: gpt2 (byte-level BPE)")
    eos = meta.get("tokenizer.ggml.eos_token_id")
    ends = [eos, meta.get("tokenizer.ggml.eot_token_id")]
    return TokenizerSource(
        vocab=tuple(meta.get("tokenizer.ggml.tokens", ())),
        merges=tuple(meta.get("tokenizer.ggml.merges", ())),
        kinds=tuple(meta.get("tokenizer.ggml.token_type", ())),
        pre=meta.get("tokenizer.ggml.pre", ""),
        bos_id=meta.get("tokenizer.ggml.bos_token_id"),
        eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=meta.get("tokenizer.chat_template"),
    )


@final
class HuggingFaceCheckpoint(Checkpoint):
    """A directory: config.json, model.safetensors (or shards and an index), tokenizer.json."""

    def __init__(self, path: Path) -> None:
        self.path = path
        config_file = path / "config.json"
        if not config_file.is_file():
            raise CheckpointError(path, "has no config.json; a Hugging Face directory is expected")
        self.config = read_config(config_file)
        self.tokenizer = _huggingface_tokenizer(path, read_json(config_file))
        self._files: dict[str, Path] = {}
        self.tensors = tensors = {}
        for file in _safetensors_files(path):
            for name, info in _safetensors_header(file).items():
                if name in tensors:
                    raise CheckpointError(
                        file, f"tensor {name!r} is also in {self._files[name].name}"
                    )
                tensors[name] = info
                self._files[name] = file

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        file = self._files[name]
        try:
            with safe_open(file, framework="pt") as weights:
                tensor: Tensor = weights.get_tensor(name)
        except (OSError, SafetensorError) as error:
            raise CheckpointError(file, f"tensor {name!r} cannot be read: {error}") from error
        return tensor


def _safetensors_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not all(
            isinstance(v, str) for v in weight_map.values()
        ):
            raise CheckpointError(index, "weight_map is no object of tensor name to file name")
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name]
        if outside:
            raise CheckpointError(index, f"names files outside its directory: {outside}")
        files = [path / name for name in names]
    else:
        files = [path / "model.safetensors"]
    missing = [file.name for file in files if not file.is_file()]
    if not missing:
        return files
    pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLES)
    if pickled:
        raise CheckpointError(path, _pickle_reason(f"{pickled[0]} (there is no model.safetensors)"))
    raise CheckpointError(path, f"lacks {', '.join(missing)}; fetch the whole repository")


def _safetensors_header(path: Path) -> dict[str, TensorInfo]:
    """Check and read a header: 8 bytes of length, JSON, then the tensors without gap or overlap."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_MAX, size - 8):
            raise CheckpointError(path, f"claims a header of {length} bytes in a file of {size}")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        entries = [
            (name, str(e["dtype"]), tuple(map(int, e["shape"])), *map(int, e["data_offsets"]))
            for name, e in header.items()
        ]
        entries.sort(key=lambda entry: entry[3:])
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise CheckpointError(path, f"the header is damaged: {error!r}") from error
    at, infos = 0, {}
    for name, dtype, shape, start, end in entries:
        if dtype not in _FLOATS:
            raise CheckpointError(
                path, f"tensor {name!r} is {dtype}; read are {', '.join(_FLOATS)}"
            )
        wanted = math.prod(shape) * _FLOATS[dtype].itemsize
        if start != at or end - start != wanted or any(n < 0 for n in shape):
            raise CheckpointError(
                path,
                f"tensor {name!r} {dtype}{list(shape)} lies at {start}..{end}; expected "
                f"{at}..{at + wanted}",
            )
        at = end
        infos[name] = TensorInfo(shape, wanted)
    if at != size - 8 - length:
        raise CheckpointError(
            path,
            f"describes {at} bytes of tensors and holds {size - 8 - length}: it is truncated or "
            "damaged; fetch it again",
        )
    return infos


def _huggingface_tokenizer(path: Path, config: Mapping[str, Any]) -> TokenizerSource:
    file = path / "tokenizer.json"
    if not file.is_file():
        raise CheckpointError(path, "has no tokenizer.json (fast tokenizer); fetch or convert it")
    settings_file, template_file = path / "tokenizer_config.json", path / "chat_template.jinja"
    settings = read_json(settings_file) if settings_file.is_file() else {}
    template = settings.get("chat_template")
    if isinstance(template, list):  # several by name
        named = {t.get("name"): t.get("template") for t in template if isinstance(t, dict)}
        template = named.get("default")
    if template_file.is_file():
        template = template_file.read_text(encoding="utf-8")
    generation_file = path / "generation_config.json"
    generation = read_json(generation_file) if generation_file.is_file() else {}
    eos = [*_ids(config.get("eos_token_id")), *_ids(generation.get("eos_token_id"))]
    bos = _ids(config.get("bos_token_id"))
    return TokenizerSource(
        json_path=file,
        bos_id=bos[0] if bos else None,
        eos_ids=tuple(dict.fromkeys(eos)),
        chat_template=template if isinstance(template, str) else None,
    )


def _ids(value: object) -> list[int]:
    """`eos_token_id` is an id, several, or absent."""
    several = value if isinstance(value, list) else [value]
    return [one for one in several if isinstance(one, int) and not isinstance(one, bool)]

"""Checkpoints: one way to read a GGUF file and a Hugging Face directory.

Rule: opening checks everything that can be known without reading weights; weights are read a part
of a tensor at a time and never unpickled. Tensors have Hugging Face's names, whatever the file.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, final

import torch
from attrs import frozen
from torch import Tensor

from tokenspeed.config import TokenizerSource
from tokenspeed.errors import CheckpointError
from tokenspeed.models import llama
from tokenspeed.models.config import LlamaConfig, ModelConfig, read_json
from tokenspeed.models.families import read_config
from tokenspeed.models.gguf_file import GGUFFile, GGUFTensor
from tokenspeed.models.safetensors_file import BLOCK_BYTES, FP8, Entry, SafetensorsFile

__all__ = [
    "Checkpoint",
    "GGUFCheckpoint",
    "HuggingFaceCheckpoint",
    "TensorInfo",
    "huggingface_tokenizer",
    "open_checkpoint",
]

_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
SCALE = "_scale_inv"
"""Behind the name of a tensor of 8-bit floats: that of what its blocks are multiplied by."""
_GGUF_BITS = {f"Q{bits}": bits for bits in (2, 3, 4, 5, 6, 8)}
"""By the first part of a kind's name, as Q4 of Q4_K."""


@final
@frozen
class TensorInfo:
    """A tensor that a checkpoint holds.

    Attributes:
        shape: of the tensor.
        size_bytes: in the file.
        bits: of a number that shares a scale with others; None: each is a float of its own.
    """

    shape: tuple[int, ...]
    size_bytes: int
    bits: int | None = None


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

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None:
        """Fill `target` with a part of a tensor, in the target's dtype.

        Args:
            target: of the part's shape, on any device.
            name: of a tensor.
            part: a slice of each dim.

        Raises:
            CheckpointError: the file cannot be read.
        """
        target.copy_(self.read(name)[part])

    def flaws(self) -> list[str]:
        """What is wrong with tensors, beyond missing, unknown and misshapen ones."""
        return []


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
            name: _tensor_info(self._file.tensors[own]) for name, own in self._names.items()
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


def _tensor_info(tensor: GGUFTensor) -> TensorInfo:
    bits = _GGUF_BITS.get(tensor.kind.name.partition("_")[0])
    return TensorInfo(tensor.shape, tensor.size, bits)


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

    def get(name: str, kind: type, default: Any) -> Any:
        said: Any = meta.get(f"tokenizer.{name}")
        if said is None:
            return default
        fits = type(said) is kind
        if not fits or (kind is int and said < 0):
            raise CheckpointError(
                path, f"tokenizer.{name} is {str(said)[:40]!r}, expected {kind.__name__}"
            )
        return said

    def several(name: str, kind: type) -> tuple[Any, ...]:
        said = get(name, list, [])
        if not all(type(one) is kind for one in said):
            raise CheckpointError(path, f"tokenizer.{name} is no list of {kind.__name__} alone")
        return tuple(said)

    ends = [get(f"ggml.{name}_token_id", int, None) for name in ("eos", "eot")]
    return TokenizerSource(
        vocab=several("ggml.tokens", str),
        merges=several("ggml.merges", str),
        kinds=several("ggml.token_type", int),
        pre=get("ggml.pre", str, ""),
        bos_id=get("ggml.bos_token_id", int, None),
        eos_ids=tuple(dict.fromkeys(end for end in ends if end is not None)),
        chat_template=get("chat_template", str, None),
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
        self.tokenizer = huggingface_tokenizer(path)
        self._files: dict[str, SafetensorsFile] = {}
        self._block = torch.empty(0, dtype=torch.uint8)
        for file in map(SafetensorsFile, _safetensors_files(path)):
            for name in file.entries:
                if name in self._files:
                    raise CheckpointError(
                        file.path, f"tensor {name!r} is also in {self._files[name].path.name}"
                    )
                self._files[name] = file
        self._scales = {
            f"{name}{SCALE}": name for name in self._files if self._entry(name).dtype == FP8
        }
        if self._scales and self.config.fp8_block is None:
            raise CheckpointError(
                config_file,
                f"says nothing of quantization, but {next(iter(self._scales.values()))} has 8-bit "
                "floats; quantization_config with a weight_block_size is expected",
            )
        self.tensors = {
            name: TensorInfo(self._entry(name).shape, self._entry(name).size_bytes)
            for name in self._files
            if name not in self._scales
        }

    def flaws(self) -> list[str]:
        """See Checkpoint: each tensor of 8-bit floats has a scale for every block."""
        found, (high, wide) = [], self.config.fp8_block or (1, 1)
        for scale, name in self._scales.items():
            shape = self._entry(name).shape
            blocks = [-(-shape[0] // high), -(-shape[-1] // wide)] if shape else []
            if scale not in self._files:
                found.append(f"missing: {scale} {blocks}")
            elif len(shape) != 2 or list(self._entry(scale).shape) != blocks:
                found.append(
                    f"misshapen: {scale} is {list(self._entry(scale).shape)}, expected {blocks}"
                )
        return found

    def read(self, name: str) -> Tensor:
        """See Checkpoint. 8-bit floats come as bfloat16."""
        entry = self._entry(name)
        dtype = torch.bfloat16 if entry.dtype == FP8 else entry.dtype
        whole = torch.empty(entry.shape, dtype=dtype)
        self.read_into(whole, name, tuple(slice(0, size) for size in entry.shape))
        return whole

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None:
        """See Checkpoint. Whole rows of the target's dtype go straight to it."""
        entry, file = self._entry(name), self._files[name]
        rows, rest = part[0], part[1:]
        whole = all(s.stop - s.start == n for s, n in zip(rest, entry.shape[1:], strict=True))
        alike = target.dtype == entry.dtype and target.device.type == "cpu"
        if whole and alike and target.is_contiguous():
            file.read_rows(name, rows.start, target)
            return
        step = max(1, BLOCK_BYTES // max(1, entry.row_bytes))
        scale = self._scale(name)
        block = self._scratch((min(step, rows.stop - rows.start), *entry.shape[1:]), entry.dtype)
        for first in range(rows.start, rows.stop, step):
            here = block[: min(step, rows.stop - first)]
            file.read_rows(name, first, here)
            own = here[(slice(None), *rest)]
            if scale is not None:
                own = own.float() * self._spread(scale, first, len(here), rest[0])
            at = first - rows.start
            target[at : at + len(here)].copy_(own)

    def _scratch(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor for now. One memory serves all: a block taken and freed for every tensor would
        leave the heap in pieces that hold several hundred MB."""
        size = math.prod(shape) * dtype.itemsize
        if len(self._block) < size:
            self._block = torch.empty(max(size, BLOCK_BYTES), dtype=torch.uint8)
        return self._block[:size].view(dtype).view(shape)

    def _entry(self, name: str) -> Entry:
        return self._files[name].entries[name]

    def _scale(self, name: str) -> Tensor | None:
        """The scales float32 of a tensor's blocks, if it is one of 8-bit floats."""
        if self._entry(name).dtype != FP8:
            return None
        entry = self._entry(name + SCALE)
        scale = torch.empty(entry.shape, dtype=entry.dtype)
        self._files[name + SCALE].read_rows(name + SCALE, 0, scale)
        return scale.float()

    def _spread(self, scale: Tensor, first: int, count: int, columns: slice) -> Tensor:
        """Each element's own scale, for so many rows from the first one on."""
        high, wide = self.config.fp8_block or (1, 1)
        rows = torch.arange(first, first + count) // high
        return scale[rows][:, torch.arange(columns.start, columns.stop) // wide]


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


def huggingface_tokenizer(path: Path) -> TokenizerSource:
    """Where a directory says how text becomes ids. Raises CheckpointError."""
    config = read_json(path / "config.json")
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

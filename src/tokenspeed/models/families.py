"""The families: which file of this room runs a configuration, and where configurations come from.

Rule: a family is a class of configurations and three functions; this table is all that knows them.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, final

from attrs import frozen

from tokenspeed.config import DEFAULT_MODEL
from tokenspeed.errors import CheckpointError, ConfigError
from tokenspeed.models import deepseek, llama, qwen_moe
from tokenspeed.models.blocks import Cached
from tokenspeed.models.config import LlamaConfig, ModelConfig, known_architecture, read_json
from tokenspeed.models.deepseek_config import DeepseekConfig
from tokenspeed.models.gguf_file import GGUFFile, is_gguf
from tokenspeed.models.hub import resolve_model
from tokenspeed.models.qwen_moe import QwenMoeConfig
from tokenspeed.spmd.params import Tree

__all__ = ["SHAPES", "Family", "find_config", "read_config"]

SHAPES = Path(__file__).parent / "shapes"
"""Configurations of published models, written from their papers; each is known by its name."""


def _all_layers(config: ModelConfig) -> int:
    return config.layers


@final
@frozen
class Family:
    """What a model file offers, for the configurations of one class.

    Attributes:
        forward: the model function, (params, batch, kv, *, config) -> (logits, kv).
        parameters: the tree of what it is given, by names in the checkpoint.
        cached: what a layer keeps of a token.
        unused: whether a tensor of a checkpoint is one that the model does without.
        layers: how many have a KV.
    """

    forward: Callable[..., tuple[Any, Any]]
    parameters: Callable[[Any], Tree]
    cached: Callable[[Any], Cached]
    unused: Callable[[Any, str], bool]
    layers: Callable[[Any], int] = _all_layers

    @classmethod
    def of(cls, config: ModelConfig) -> Family:
        """The family of a configuration. Raises ConfigError."""
        for kind, family in _FAMILIES.items():
            if isinstance(config, kind):
                return family
        raise ConfigError("model", config.architecture, "an architecture with a file in this room")


_FAMILIES = {
    LlamaConfig: Family(llama.forward, llama.parameters, llama.cached, llama.unused),
    QwenMoeConfig: Family(qwen_moe.forward, qwen_moe.parameters, qwen_moe.cached, qwen_moe.unused),
    DeepseekConfig: Family(deepseek.forward, deepseek.parameters, deepseek.cached, deepseek.unused),
}

_DEEPSEEK = ("deepseek_v2", "deepseek_v3", "kimi_k2", "kimi_k25", "glm4_moe_lite")
_READERS: dict[str, type[LlamaConfig | QwenMoeConfig | DeepseekConfig]] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3"), LlamaConfig),
    "qwen3_moe": QwenMoeConfig,
    **dict.fromkeys(_DEEPSEEK, DeepseekConfig),
}
"""`model_type` -> the family's value."""


def read_config(path: Path) -> ModelConfig:
    """Read a Hugging Face `config.json` of any family. Raises CheckpointError."""
    kind = known_architecture(path, read_json(path).get("model_type"), tuple(_READERS))
    return _READERS[kind].from_hf(path)


def find_config(name: str | Path) -> ModelConfig:
    """A checkpoint's folder, its `config.json`, a GGUF file, the default model, or the name of one
    of SHAPES; reads no weights.

    Raises:
        CheckpointError: it is none of these, or its configuration is refused.
    """
    path = resolve_model(name) if str(name) == DEFAULT_MODEL else Path(name)
    shapes = {file.stem: file for file in SHAPES.glob("*.json")}
    for candidate in (path / "config.json", path, shapes.get(str(name), path)):
        if candidate.is_file():
            return _of_gguf(candidate) if is_gguf(candidate) else read_config(candidate)
    raise CheckpointError(
        name, f"no folder with a config.json, no such file, and none of {', '.join(sorted(shapes))}"
    )


def _of_gguf(path: Path) -> ModelConfig:
    file = GGUFFile(path)
    return LlamaConfig.from_gguf(path, file.meta, file.tensors)

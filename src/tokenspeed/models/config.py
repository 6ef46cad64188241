"""What a checkpoint says about its model's shape, whatever file it came from.

Rule: every number is checked here, before any tensor is looked at; what the model code does not
implement is refused by name, never ignored.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self, final

from attrs import frozen

from tokenspeed.errors import CheckpointError

__all__ = [
    "EXPERTS_MAX",
    "LAYERS_MAX",
    "LlamaConfig",
    "ModelConfig",
    "RopeScaling",
    "common",
    "common_out_of_range",
    "is_integer",
    "is_number",
    "known_architecture",
    "out_of_range",
    "read_json",
    "switch",
]

_IN_GGUF = ("llama", "qwen2")
"""`general.architecture`; Mistral's files say "llama", and nothing of a window."""

_QWEN = ("qwen2", "qwen3", "qwen3_moe")
LAYERS_MAX, EXPERTS_MAX, CONTEXT_MAX = 1024, 4096, 1 << 24
"""Whatever a file claims: each takes memory before a tensor is looked at."""
_SCALES = (1e-6, 1e10)
_LAYER_TYPES = ("full_attention", "sliding_attention")


@final
@frozen(kw_only=True)
class RopeScaling:
    """How rotary frequencies are stretched for long contexts.

    Attributes:
        kind: "linear" (divide by `factor`), "llama3" (Llama 3.1: divide low frequencies only) or
            "yarn" (Peng et al., 2023: likewise, by how often they turn in the original context).
        factor: the stretch.
        low, high: for llama3: wavelengths between original / high and original / low blend; for
            yarn: frequencies that turn between `low` and `high` times blend.
        original_context: for llama3 and yarn: context of the pre-training.
        amplitude: for yarn: cosines and sines are multiplied by it.
        sharpness: for yarn in DeepSeek's models: scores are multiplied by it.
    """

    kind: str
    factor: float
    low: float = 1.0
    high: float = 4.0
    original_context: int = 8192
    amplitude: float = 1.0
    sharpness: float = 1.0


@frozen(kw_only=True)
class ModelConfig:
    """A decoder-only transformer (abstract): what the configurations of all families say.

    Attributes:
        architecture: `model_type`, or GGUF's `general.architecture`.
        vocab_size, layers, context_max: counts.
        hidden: width of the residual stream.
        norm_eps: of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: None leaves them as they are.
        tied: the output matrix is the embedding.
        fp8_block: rows and columns that share a scale where weights are 8-bit floats; None: they
            are not.
    """

    architecture: str
    vocab_size: int
    layers: int
    hidden: int
    context_max: int
    norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None = None
    tied: bool = False
    fp8_block: tuple[int, int] | None = None

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """Of each layer, how many tokens a query sees, its own included; None: all before it."""
        return (None,) * self.layers

    @property
    def rotary_dim(self) -> int:
        """Elements of a head that are turned by their position."""
        raise NotImplementedError


@final
@frozen(kw_only=True)
class LlamaConfig(ModelConfig):
    """A model of the Llama family.

    Attributes:
        ffn: width of the MLP.
        heads, kv_heads, head_dim: of attention; heads is a multiple of kv_heads.
        qkv_bias, o_bias, mlp_bias: which projections add a bias.
        qk_norm: each head's query and key are normed (Dehghani et al., 2023).
        windows: of each layer, how many tokens a query sees, its own included; None: all before it.
            Empty: no layer has a window.
    """

    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    windows: tuple[int | None, ...] = ()

    def window(self, layer: int) -> int | None:
        """How many tokens a query of the layer sees, its own included; None: all before it."""
        return self.windows[layer] if self.windows else None

    @property
    def rotary_dim(self) -> int:
        """See ModelConfig."""
        return self.head_dim

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """See ModelConfig."""
        return self.windows or (None,) * self.layers

    @classmethod
    def checked(cls, path: Path, **values: Any) -> Self:
        """Make one from what a file said.

        Raises:
            CheckpointError: a value is missing, of the wrong kind or out of range; all are listed.
        """
        wrong = common_out_of_range(values)
        wrong += out_of_range(values, "heads", "kv_heads", "head_dim", "ffn")
        if not wrong and values["heads"] % values["kv_heads"]:
            wrong.append(
                f"{values['heads']} heads over {values['kv_heads']} KV heads do not divide"
            )
        if not wrong and values["head_dim"] % 2:
            wrong.append(f"head_dim {values['head_dim']} is odd: rotary embedding wants pairs")
        if wrong:
            raise CheckpointError(path, "bad configuration: " + "; ".join(wrong))
        return cls(**values)

    @classmethod
    def from_hf(cls, path: Path) -> Self:
        """Read a Hugging Face `config.json`. Raises CheckpointError."""
        raw = read_json(path)
        kind = raw["model_type"]
        heads, hidden = raw.get("num_attention_heads"), raw.get("hidden_size")
        return cls.checked(
            path,
            **common(path, raw),
            heads=heads,
            kv_heads=raw.get("num_key_value_heads", heads),
            head_dim=_head_dim(raw.get("head_dim"), heads, hidden),
            ffn=raw.get("intermediate_size"),
            qkv_bias=switch(path, raw, "attention_bias") or kind == "qwen2",
            o_bias=switch(path, raw, "attention_bias") and kind != "qwen2",
            mlp_bias=switch(path, raw, "mlp_bias"),
            qk_norm=kind in ("qwen3", "qwen3_moe"),
            windows=_windows(path, kind, raw),
        )

    @classmethod
    def from_gguf(cls, path: Path, meta: Mapping[str, Any], tensors: Mapping[str, Any]) -> Self:
        """Read GGUF metadata; `tensors` (by GGUF name) tell ties and biases."""
        kind = known_architecture(path, meta.get("general.architecture"), _IN_GGUF)

        def get(key: str, default: Any = None) -> Any:
            return meta.get(f"{kind}.{key}", default)

        heads, hidden = get("attention.head_count"), get("embedding_length")
        head_dim = _head_dim(get("attention.key_length"), heads, hidden)
        scaling = get("rope.scaling.type", "none")
        if scaling not in ("none", "linear"):
            raise CheckpointError(path, f"rope scaling {scaling!r}; supported: none, linear")
        factor = _scale(path, "factor", get("rope.scaling.factor", 1.0))
        tokens = meta.get("tokenizer.ggml.tokens")
        vocab_size = get("vocab_size", len(tokens) if isinstance(tokens, list) else None)
        return cls.checked(
            path,
            architecture=kind,
            vocab_size=vocab_size,
            layers=get("block_count"),
            hidden=hidden,
            heads=heads,
            kv_heads=get("attention.head_count_kv", heads),
            head_dim=head_dim,
            ffn=get("feed_forward_length"),
            context_max=get("context_length"),
            norm_eps=get("attention.layer_norm_rms_epsilon"),
            rope_theta=get("rope.freq_base", 10000.0),
            rope_scaling=RopeScaling(kind="linear", factor=factor) if scaling == "linear" else None,
            tied="output.weight" not in tensors,
            qkv_bias="blk.0.attn_q.bias" in tensors,
            o_bias="blk.0.attn_output.bias" in tensors,
            mlp_bias="blk.0.ffn_gate.bias" in tensors,
        )


def common(path: Path, raw: Mapping[str, Any]) -> dict[str, Any]:
    """What ModelConfig has, from a `config.json`; numbers are not checked yet."""
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(path, f"hidden_act is {raw['hidden_act']!r}; only silu is supported")
    rope = _object(path, raw, "rope_parameters")
    for name, only in (("partial_rotary_factor", 1.0), ("truncate", True)):
        said = rope.get(name, raw.get(name, only))
        if said != only:
            raise CheckpointError(path, f"{name} is {said!r}; only {only} is supported")
    context = raw.get("max_position_embeddings")
    return {
        "architecture": raw.get("model_type"),
        "vocab_size": raw.get("vocab_size"),
        "layers": raw.get("num_hidden_layers"),
        "hidden": raw.get("hidden_size"),
        "context_max": context,
        "norm_eps": raw.get("rms_norm_eps", 1e-6),
        "rope_theta": rope.get("rope_theta", raw.get("rope_theta", 10000.0)),
        "rope_scaling": _rope_scaling(path, rope or _object(path, raw, "rope_scaling"), context),
        "tied": switch(path, raw, "tie_word_embeddings"),
        "fp8_block": _fp8_block(path, raw.get("quantization_config")),
    }


def _object(path: Path, raw: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A part of a `config.json` that has names of its own; empty, if it is null or not there."""
    found = raw.get(name)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(path, f"{name} is {found!r}, expected an object")
    return found or {}


def _fp8_block(path: Path, raw: Any) -> tuple[int, int] | None:
    """Rows and columns of a block with one scale, if weights are 8-bit floats in blocks."""
    if raw is None:
        return None
    block = raw.get("weight_block_size") if isinstance(raw, dict) else None
    if (
        not isinstance(block, list)
        or len(block) != 2
        or not all(is_integer(size) and size > 0 for size in block)
        or raw.get("quant_method") != "fp8"
    ):
        raise CheckpointError(
            path,
            f"the weights are quantised: {raw!r}; float32, float16 and bfloat16 safetensors are "
            "read, and fp8 with a weight_block_size",
        )
    return (block[0], block[1])


def switch(path: Path, raw: Mapping[str, Any], name: str, default: bool = False) -> bool:
    """True or false of a `config.json`; null is the default. Raises CheckpointError."""
    said = raw.get(name)
    if said is not None and not isinstance(said, bool):
        raise CheckpointError(path, f"{name} is {said!r}, expected true or false")
    return default if said is None else said


def out_of_range(
    values: Mapping[str, Any], *integers: str, low: int = 1, high: int = 1 << 24
) -> list[str]:
    """What is wrong with these integers."""
    return [
        f"{name} is {values[name]!r}, expected an integer from {low} to {high:,}"
        for name in integers
        if not is_integer(values[name]) or not low <= values[name] <= high
    ]


def common_out_of_range(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with the numbers that every family has."""
    wrong = out_of_range(values, "vocab_size", "hidden")
    wrong += out_of_range(values, "layers", high=LAYERS_MAX)
    wrong += out_of_range(values, "context_max", high=CONTEXT_MAX)
    return wrong + [
        f"{name} is {values[name]!r}, expected a number above {low}"
        for name, low in (("norm_eps", 0), ("rope_theta", 1))
        if not is_number(values[name]) or not low < values[name] <= 1e300
    ]


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CheckpointError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(path, f"not readable as JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(path, f"expected a JSON object, got {type(value).__name__}")
    return value


def known_architecture(path: Path, name: object, known: tuple[str, ...]) -> str:
    """The name, if it is among those known. Raises CheckpointError."""
    if not isinstance(name, str) or name not in known:
        raise CheckpointError(path, f"architecture {name!r}; supported: {', '.join(known)}")
    return name


def _windows(path: Path, kind: str, raw: Mapping[str, Any]) -> tuple[int | None, ...]:
    """What a `config.json` says of each layer's window, with the defaults of its architecture.

    One that reaches over the whole context is none.
    """
    layers: Any = raw.get("num_hidden_layers")
    context: Any = raw.get("max_position_embeddings")
    everywhere = kind == "mistral"
    possible = everywhere or (kind in _QWEN and raw.get("use_sliding_window"))
    window = raw.get("sliding_window", 4096) if possible else None
    if window is None or not is_integer(layers) or layers < 1 or not is_integer(context):
        return ()
    if not is_integer(window) or window < 1:
        raise CheckpointError(path, f"sliding_window is {window!r}, expected an integer from 1")
    first = 0 if everywhere else raw.get("max_window_layers", 28)
    if not is_integer(first):
        raise CheckpointError(path, f"max_window_layers is {first!r}, expected an integer")
    default = ["sliding_attention" if at >= first else "full_attention" for at in range(layers)]
    types = default if everywhere else raw.get("layer_types") or default
    named = isinstance(types, list) and all(name in _LAYER_TYPES for name in types)
    if not named or len(types) != layers:
        raise CheckpointError(
            path, f"layer_types is {types!r}, expected {layers} of {', '.join(_LAYER_TYPES)}"
        )
    if window >= context or "sliding_attention" not in types:
        return ()
    return tuple(window if name == "sliding_attention" else None for name in types)


def _rope_scaling(path: Path, raw: Mapping[str, Any], context: Any) -> RopeScaling | None:
    kind = raw.get("rope_type", raw.get("type"))
    if kind is None and raw.get("factor") is not None:
        raise CheckpointError(
            path,
            f"rope scaling {raw!r} has a factor and no rope_type; expected linear, llama3, yarn",
        )
    if kind in (None, "default"):
        return None
    if kind not in ("linear", "llama3", "yarn"):
        raise CheckpointError(
            path, f"rope scaling {kind!r}; supported: default, linear, llama3, yarn"
        )
    yarn = kind == "yarn"
    values = {
        "factor": raw.get("factor"),
        "low": raw.get("beta_slow", 1.0) if yarn else raw.get("low_freq_factor", 1.0),
        "high": raw.get("beta_fast", 32.0) if yarn else raw.get("high_freq_factor", 4.0),
        "original_context": raw.get("original_max_position_embeddings", context if yarn else 8192),
    }
    optional = ("mscale", "mscale_all_dim", "attention_factor") if yarn else ()
    said = {name: raw[name] for name in optional if raw.get(name) not in (None, 0)}
    for name, value in (values | said).items():
        _scale(path, name, value)
    low, high = values["low"], values["high"]
    if kind != "linear" and (low > high if yarn else low >= high):  # Kimi K2 has 1 and 1
        names = "beta_slow to beta_fast" if yarn else "low_freq_factor to high_freq_factor"
        raise CheckpointError(path, f"rope scaling blends from {low} to {high}, as {names}")
    more: dict[str, Any] = _yarn(values["factor"], said) if yarn else {}
    return RopeScaling(kind=kind, **values, **more)


def _scale(path: Path, name: str, value: Any) -> Any:
    """The number, if it is one that a scale can be. Raises CheckpointError."""
    low, high = _SCALES
    if not is_number(value) or not low <= value <= high:
        raise CheckpointError(
            path, f"rope scaling: {name} is {value!r}, expected a number from {low:g} to {high:g}"
        )
    return value


def _yarn(factor: float, said: Mapping[str, float]) -> dict[str, float]:
    """What stretching does to the size of scores: a part in cosines and sines, a part beside."""

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0

    own, all_dim = said.get("mscale", 0.0), said.get("mscale_all_dim", 0.0)
    amplitude = magnitude(own) / magnitude(all_dim) if own and all_dim else magnitude(1.0)
    return {
        "amplitude": said.get("attention_factor", amplitude),
        "sharpness": magnitude(all_dim) ** 2 if all_dim else 1.0,
    }


def _head_dim(said: Any, heads: Any, hidden: Any) -> Any:
    """What the file said, or else hidden / heads; None where that makes no sense."""
    if said is not None or not (is_integer(heads) and is_integer(hidden) and heads > 0):
        return said
    return hidden // heads


def is_integer(value: object) -> bool:
    """Whether a value of a file is one; true and false are none."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Whether a value of a file is one, and finite; true and false are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)

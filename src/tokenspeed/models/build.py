"""From a checkpoint to a compiled model with its parameters in place.

Rule: what is wrong with the names and shapes of tensors is listed together before memory is taken;
then tensors are read one at a time into their rank's part of the fused parameters.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, final

import attrs
import torch
from attrs import frozen
from torch import Tensor

from tokenspeed import kernels
from tokenspeed.config import HOST_PAGES_MAX, KV_DTYPES, EngineConfig
from tokenspeed.errors import CheckpointError, ConfigError
from tokenspeed.kernels import PackedWeight
from tokenspeed.kernels.contract import capability
from tokenspeed.kernels.pages import NARROW
from tokenspeed.models.checkpoint import Checkpoint, open_checkpoint
from tokenspeed.models.config import ModelConfig
from tokenspeed.models.deepseek_config import DeepseekConfig
from tokenspeed.models.dummy import DummyCheckpoint
from tokenspeed.models.families import Family
from tokenspeed.models.hub import Progress as HubProgress
from tokenspeed.models.hub import resolve_model
from tokenspeed.plan import StepPlan
from tokenspeed.spmd.arena import Arena
from tokenspeed.spmd.collectives import Communicator
from tokenspeed.spmd.compile import Program, compile_model
from tokenspeed.spmd.kv import CacheGroups, KVSpec
from tokenspeed.spmd.mesh import Mesh
from tokenspeed.spmd.params import (
    Constant,
    Parameter,
    Path,
    Source,
    Tree,
    allocate,
    leaves,
    own_sources,
    shard_slice,
)
from tokenspeed.spmd.placement import REPLICATED
from tokenspeed.spmd.step import StepKV
from tokenspeed.spmd.trace import Bucket

__all__ = [
    "Model",
    "build",
    "compile_config",
    "context_max",
    "default_pages",
    "host_pages",
    "in_cache_groups",
    "open_model",
]

_BITS = {"int8": 8, "int4": 4}
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
_TRACE = ("trace_lifecycle", None)  # which is judged of a window alone
_WITHOUT_WINDOWS = (("host_pages", 0), ("host_memory_gb", None), ("kv_events", None), _TRACE)
"""Settings, and what they must be where pages slide away."""
_AVERAGE_REQUEST_TOKENS = 1024
_MEMORY_SHARE = 0.25
_LARGE_PAGE = 64  # which some kernels take alone

LoadProgress = Callable[[int, int], None]
"""Called with (bytes read, bytes in all)."""


@final
@frozen(kw_only=True, eq=False)
class Model:
    """A compiled model: what the executor runs. It is a step: `(params, kv, plan) -> (kv, logits)`.

    Attributes:
        config: its shape.
        step: the compiled program, (params, batch, kv) -> (logits, kv).
        params: this rank's tensors.
        kv: what this rank caches for a token.
    """

    config: ModelConfig
    step: Program
    params: Tree
    kv: KVSpec

    def allocate(self, *, slots: int, pages: int, page_size: int) -> StepKV:
        """Empty KV to call this with: pages of `page_size` tokens, shared by so many slots."""
        vocab = self.config.vocab_size
        return StepKV.allocate(
            self.kv, slots=slots, pages=pages, page_size=page_size, vocab_size=vocab
        )

    def __call__(self, params: Tree, kv: StepKV, plan: StepPlan) -> tuple[StepKV, Tensor]:
        """Run a plan. `kv` is donated: see `StepKV.run`."""
        return kv.run(self.step, params, plan)

    @property
    def weights_bytes(self) -> int:
        """Of this rank's tensors; what stands in the tree twice counts once."""
        held = (
            leaf.data if isinstance(leaf, PackedWeight) else leaf for _, leaf in leaves(self.params)
        )
        tensors = {tensor.data_ptr(): tensor.nbytes for tensor in held}
        return sum(tensors.values())


def compile_config(
    config: ModelConfig,
    mesh: Mesh,
    communicator: Communicator | None = None,
    *,
    family: Family | None = None,
    **kind: Any,
) -> Program:
    """Compile the model that a configuration describes; reads no weights.

    Args:
        config: of any family.
        mesh, communicator, kind: as of `compile_model`.
        family: another use of the configuration than generating text: see Family.

    Raises:
        PlacementError: the model does not fit the mesh.
    """
    family = family or Family.of(config)
    function, tree = partial(family.forward, config=config), family.parameters(config)
    layers = family.layers(config)
    return compile_model(function, tree, layers, mesh=mesh, communicator=communicator, **kind)


def open_model(
    name: str, load_format: str = "auto", *, progress: HubProgress | None = None
) -> Checkpoint:
    """What a model's name stands for: see `resolve_model`, and `find_config` for "dummy" weights.

    Raises:
        CheckpointError: there is no such model, or it is damaged, or of no known kind.
    """
    if load_format == "dummy":
        return DummyCheckpoint(name)
    return open_checkpoint(resolve_model(name, progress=progress))


def build(
    checkpoint: Checkpoint | str,
    mesh: Mesh,
    *,
    dtype: str = "float32",
    kv_dtype: str = "auto",
    device: str = "cpu",
    quantize: str = "none",
    progress: LoadProgress | None = None,
    communicator: Communicator | None = None,
    family: Family | None = None,
    fields: Mapping[str, Tensor] | None = None,
    tokens: int | None = None,
    **compiled: Any,
) -> Model:
    """Compile a checkpoint's model and read its weights.

    Args:
        checkpoint: opened by `open_checkpoint`, or a name as `open_model` takes it.
        mesh: as this rank sees it.
        dtype: of weights and activations; "float32" or "bfloat16".
        kv_dtype: of KV pages: "auto", that of activations, or "float8": see EngineConfig.
        device: a torch device.
        quantize: which matrices are packed, and how: see EngineConfig.
        progress: called after every tensor.
        communicator: of the mesh, where it has more than one rank.
        family: another use of the model than generating text: see Family.
        fields: of the batch that only this use has: see Bucket.
        tokens: of the steps, of all ranks together; None: any number.
        compiled: batch and costs, as of `compile_model`.

    Raises:
        CheckpointError: tensors are missing, unknown or misshapen, or the weights do not fit into
            the memory that there is; before memory is taken.
        PlacementError: the model does not fit the mesh.
    """
    if dtype not in _DTYPES:
        raise ConfigError("dtype", dtype, f"one of {', '.join(_DTYPES)}")
    if kv_dtype not in KV_DTYPES:
        raise ConfigError("kv_dtype", kv_dtype, f"one of {', '.join(KV_DTYPES)}")
    if quantize not in ("none", "auto", *_BITS):
        raise ConfigError("quantize", quantize, f"one of none, auto, {', '.join(_BITS)}")
    if not isinstance(mesh, Mesh):
        raise ConfigError("mesh", mesh, "a Mesh: Mesh.single(), Mesh.of(tp=2)")
    if isinstance(checkpoint, str):
        checkpoint = open_model(checkpoint)
    config = checkpoint.config
    family = family or Family.of(config)
    tree = family.parameters(config)
    bucket = Bucket(tokens=tokens, rows=tokens or 1, dtype=_DTYPES[dtype], fields=fields or {})
    program = compile_config(config, mesh, communicator, family=family, bucket=bucket, **compiled)
    _check_tensors(checkpoint, tree, family)
    kind: dict[str, Any] = {"dtype": _DTYPES[dtype], "device": _device(device)}
    packing = _packing(checkpoint, quantize, **kind)
    _must_be_here(kind["device"])
    _must_fit(checkpoint, tree, program, packing, kind)
    params = _load(checkpoint, tree, program, kind, packing, progress or _silent)
    held = program.held_layers
    parts = _cached(config, mesh, family)
    if kv_dtype == "float8":
        kind["dtype"] = kernels.EIGHT_BITS
    kv = KVSpec(layers=family.layers(config), parts=parts, held=held, **kind)
    return Model(config=config, step=program, params=params, kv=kv)


def _device(name: str) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ConfigError("device", name, "a torch device, such as cpu or cuda") from error


def _must_be_here(device: torch.device) -> None:
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device", str(device), "cpu: torch finds no GPU on this machine")


def _must_fit(
    checkpoint: Checkpoint,
    tree: Tree,
    program: Program,
    packing: Callable[[Parameter], int | None],
    kind: Mapping[str, Any],
) -> None:
    """Raise CheckpointError where no memory of the device's size could hold this rank's weights."""
    device, needed = kind["device"], 0.0
    for path, leaf in _parameters(tree):
        size, bits = program.param_bytes.get(path, 0), packing(leaf)
        needed += size if bits is None else size * bits / 8 / kind["dtype"].itemsize
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type == "cuda":
        total = torch.cuda.mem_get_info(device)[1]
    if needed > total:
        raise CheckpointError(
            checkpoint.path,
            f"a rank's weights take {needed / 1e9:,.0f} GB, {device} has {total / 1e9:,.0f} GB; "
            "share the model on a mesh of more ranks (`tokenspeed shard` says what each holds), or "
            "choose a narrower dtype or quantize",
        )


def page_size(shape: ModelConfig, config: EngineConfig) -> int:
    """Tokens of a page: as many as are asked for, or those that the better kernel takes."""
    asked = config.page_size is not None or config.prefill_chunk < _LARGE_PAGE
    if asked or not isinstance(shape, DeepseekConfig):
        return config.page_tokens
    device = torch.device(config.device)
    problem = kernels.Problem(
        "mla_decode",
        device.type,
        config.dtype,
        capability(device),
        page_size=config.page_tokens,
        latent=shape.latent,
        rope=shape.rope,
        kv_dtype=NARROW[0] if config.kv_dtype == "float8" else None,
    )
    mine, other = (
        kernels.registry.explain(one).backend
        for one in (problem, attrs.evolve(problem, page_size=_LARGE_PAGE))
    )
    return config.page_tokens if mine == other else _LARGE_PAGE


def default_pages(model: Model, config: EngineConfig) -> int:
    """KV pages for `slots` average requests, within a share of the memory that is free now."""
    context = min(config.context_max or model.config.context_max, model.config.context_max)
    tokens = max(context, config.slots * min(context, _AVERAGE_REQUEST_TOKENS))
    page_bytes = model.kv.token_bytes * config.page_tokens
    fitting = int(_free_bytes(model.kv.device) * _MEMORY_SHARE) // page_bytes
    return max(1, min(-(-tokens // config.page_tokens) * len(model.kv.groups.windows), fitting))


def host_pages(model: Model, config: EngineConfig) -> int:
    """Pages of the host tier: as many as are asked for, or as fit into the memory for them.

    Raises:
        ConfigError: the memory has no room for a page, or for more than can be numbered.
    """
    if config.host_memory_gb is None:
        return config.host_pages
    page_bytes = model.kv.token_bytes * config.page_tokens
    pages = int(config.host_memory_gb * 1e9) // page_bytes
    if not 1 <= pages <= HOST_PAGES_MAX:
        raise ConfigError(
            "host_memory_gb",
            config.host_memory_gb,
            f"{page_bytes / 1e9:g} to {HOST_PAGES_MAX * page_bytes / 1e9:g}: a page of this model "
            f"takes {page_bytes:,} bytes, and there may be 1 to {HOST_PAGES_MAX:,}",
        )
    return pages


def in_cache_groups(model: Model, config: EngineConfig) -> Model:
    """The model with the cache groups of its layers, so that pages behind windows are given back.

    Where some layers see all, and a setting has no form for pages that go, it is as if all did.

    Raises:
        ConfigError: the engine has no form of a setting for a model whose every layer slides.
    """
    groups = CacheGroups.of(model.config.layer_windows)
    window = groups.windows[-1]
    wrong = next(
        (entry for entry in _WITHOUT_WINDOWS if getattr(config, entry[0]) != entry[1]), None
    )
    traced = wrong == _TRACE and groups.windows == (window,) and not config.drafts_max
    if not window or wrong is None or traced:
        return attrs.evolve(model, kv=attrs.evolve(model.kv, groups=groups))
    if len(groups.windows) > 1:
        return model
    name, none = wrong
    gone = f"pages that slide out of the model's window of {window} tokens are not followed there"
    raise ConfigError(name, getattr(config, name), f"{none}: {gone}")


def context_max(model: Model, config: EngineConfig, pages: int) -> int:
    """Tokens of the longest request: what the model was made for, and what the pool can hold.

    Of a group that slides the pool need not hold more than a window at once.
    """
    most = min(config.context_max or model.config.context_max, model.config.context_max)
    windows = model.kv.groups.windows
    beside = sum(_pages_within(window, config.page_tokens) for window in windows if window)
    full = windows.count(0)
    if beside <= pages and not full:
        return most
    held = max(pages // len(windows), (pages - beside) // full if full else 0)
    return min(most, held * config.page_tokens)


def _pages_within(tokens: int, page_size: int) -> int:
    """That as many tokens in a row may lie in."""
    return 1 if tokens == 1 else (tokens - 2) // page_size + 2


def _free_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _cached(config: ModelConfig, mesh: Mesh, family: Family) -> tuple[tuple[int, ...], ...]:
    """What this rank keeps of a token in a layer: the shape of each part."""
    parts = []
    for shape, lies in family.cached(config):
        index = shard_slice(Source("KV", shape), lies, mesh, ("kv",))
        parts.append(tuple(one.stop - one.start for one in index))
    return tuple(parts)


def _check_tensors(checkpoint: Checkpoint, tree: Tree, family: Family) -> None:
    wanted = {s.name: s.shape for _, leaf in _parameters(tree) for s in leaf.sources}
    held = checkpoint.tensors
    config = checkpoint.config
    problems = [
        f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in held
    ]
    problems += [
        f"unknown: {name} {list(held[name].shape)}"
        for name in held
        if name not in wanted and not family.unused(config, name)
    ]
    problems += [
        f"misshapen: {name} is {list(held[name].shape)}, expected {list(shape)}"
        for name, shape in wanted.items()
        if name in held and held[name].shape != shape
    ]
    problems += checkpoint.flaws()
    if problems:
        raise CheckpointError(
            checkpoint.path, f"{len(problems)} tensors are wrong:\n  " + "\n  ".join(problems[:40])
        )


def _parameters(tree: Tree) -> list[tuple[Path, Parameter]]:
    return [(path, leaf) for path, leaf in leaves(tree) if isinstance(leaf, Parameter)]


def _load(
    checkpoint: Checkpoint,
    tree: Tree,
    program: Program,
    kind: dict[str, Any],
    packing: Callable[[Parameter], int | None],
    progress: LoadProgress,
) -> Tree:
    """Fill the tree. A parameter that occurs twice on one rank alike is one tensor, read once."""
    counter = _Counter(checkpoint, tree, program, progress)
    arena = Arena(kind["device"])
    shared: dict[Any, Tensor | PackedWeight] = {}
    filled: dict[Path, Tensor | PackedWeight] = {}
    for path, leaf in leaves(tree):
        if isinstance(leaf, Constant):
            filled[path] = leaf.make().to(kind["device"])
            continue
        if not program.holds(path):
            filled[path] = torch.empty(0, **kind)
            continue
        lies = program.param_layouts.get(path, REPLICATED)
        bits = packing(leaf)
        key = (attrs.evolve(leaf, bits_min=None), bits, lies.within(program.mesh))
        if key not in shared:
            make, dtype = arena.zeros, kind["dtype"]
            if bits is not None:  # this one will go, as soon as it is packed
                make, dtype = partial(torch.empty, device=kind["device"]), torch.float32
            target = allocate(leaf, lies, program.mesh, path, make, dtype)
            joined, row = target.flatten(0, 1) if leaf.stacked else target, 0
            for source, part in own_sources(leaf, lies, program.mesh, path):
                rows = part[0].stop - part[0].start
                checkpoint.read_into(joined[row : row + rows], source.name, part)
                row += rows
                counter.read(source)
            if bits is not None and target.shape[1] % kernels.GROUP == 0:
                packed = kernels.pack(target, bits)
                shared[key] = attrs.evolve(packed, data=arena.keep(packed.data))
            elif bits is not None:
                shared[key] = arena.keep(target.to(leaf.dtype or kind["dtype"]))
            else:
                shared[key] = target
        filled[path] = shared[key]
    return _assembled(tree, filled, ())


def _packing(
    checkpoint: Checkpoint, quantize: str, dtype: torch.dtype, device: torch.device
) -> Callable[[Parameter], int | None]:
    """The bits that a parameter is packed into, or None.

    Raises:
        ConfigError: packed weights are asked for where nothing multiplies by them.
    """
    if quantize in _BITS and device.type != "cpu":
        raise ConfigError("quantize", quantize, f"auto or none on {device}: only a CPU computes so")
    as_held = quantize == "auto" and device.type == "cpu" and dtype == torch.bfloat16

    def bits(leaf: Parameter) -> int | None:
        if leaf.bits_min is None or (quantize not in _BITS and not as_held):
            return None
        held = [checkpoint.tensors[source.name].bits for source in leaf.sources]
        if as_held and None in held:
            return None
        wanted = max(n or 0 for n in held) if as_held else _BITS[quantize]
        return 4 if max(wanted, leaf.bits_min) <= 4 else 8

    return bits


def _assembled(tree: Tree, filled: dict[Path, Tensor | PackedWeight], at: Path) -> Tree:
    if isinstance(tree, dict):
        return {key: _assembled(branch, filled, (*at, key)) for key, branch in tree.items()}
    if isinstance(tree, list):
        return [_assembled(branch, filled, (*at, index)) for index, branch in enumerate(tree)]
    return filled[at]


@final
class _Counter:
    """Reports the bytes of tensors that are done with, of those that this rank reads from."""

    def __init__(
        self, checkpoint: Checkpoint, tree: Tree, program: Program, report: LoadProgress
    ) -> None:
        names = {
            source.name
            for path, leaf in _parameters(tree)
            if program.holds(path)
            for source, _ in own_sources(
                leaf, program.param_layouts.get(path, REPLICATED), program.mesh, path
            )
        }
        self._sizes = {name: checkpoint.tensors[name].size_bytes for name in names}
        self._total = sum(self._sizes.values())
        self._done, self._report = 0, report

    def read(self, source: Source) -> None:
        self._done += self._sizes.pop(source.name, 0)
        self._report(self._done, self._total)


def _silent(_done: int, _total: int) -> None:
    """The progress of nobody watching."""

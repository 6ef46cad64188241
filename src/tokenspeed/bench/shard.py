"""A configuration on a mesh, without weights: what `tokenspeed shard` prints.

Rule: flags in, a report out; what is counted, and how, is said in `tokenspeed.spmd.report`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tokenspeed import models
from tokenspeed.errors import ConfigError
from tokenspeed.kernels import EIGHT_BITS
from tokenspeed.spmd.cost import Costs
from tokenspeed.spmd.report import AXES, Report, batch_of, parse_links, parse_mesh, report, rows_of
from tokenspeed.spmd.trace import Bucket

__all__ = ["measure"]


def measure(
    model: str,
    mesh: str,
    tokens: int | None,
    dtype: str,
    links: Sequence[str] = (),
    *,
    kv_dtype: str = "auto",
) -> Report:
    """Compile a configuration for a mesh and a step, and say what it does.

    Args:
        model: a folder with a config.json, such a file, a GGUF file, the default model, or the name
            of a shape that is shipped.
        mesh: as `tp=4,ep=4`; along dp and ep ranks have rows of their own.
        tokens: of the step, of all ranks together; None: 32 for each rank that has its own rows.
        dtype: of parameters and activations.
        links: as `dp=10,50`: latency in microseconds and 10^9 bytes/s.
        kv_dtype: of KV pages: "auto", that of activations, or "float8".

    Raises:
        CheckpointError: there is no such model.
        ConfigError: a flag cannot be used.
        PlacementError: the model does not fit the mesh.
    """
    axes, given = parse_mesh(mesh), parse_links(links)
    names = [name for name, _ in axes.axes]
    if not set(names) <= set(AXES):
        raise ConfigError(
            "mesh", mesh, f"axes among {', '.join(AXES)}: no model here names another"
        )
    if not set(given) <= set(names):
        raise ConfigError("link", " ".join(links), f"axes of the mesh {axes}")
    counts = rows_of(axes, tokens)
    bucket = Bucket(tokens=counts[0], rows=counts[1], dtype=getattr(torch, dtype))
    costs = Costs(given).on(axes)
    config = models.find_config(model)
    batch = batch_of(axes)
    return report(
        model,
        axes,
        lambda seen: models.compile_config(config, seen, bucket=bucket, batch=batch, costs=costs),
        models.Family.of(config).cached(config),
        bucket.dtype if kv_dtype == "auto" else EIGHT_BITS,
    )

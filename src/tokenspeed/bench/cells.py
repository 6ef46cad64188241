"""Cells of a bench of this GPU, one after the other, between the ceilings of the same run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, final

import torch
from attrs import frozen

from tokenspeed.bench.gpu import copy_gb_s, matmul_tflop_s
from tokenspeed.bench.machine import machine
from tokenspeed.bench.report import Measured, Report
from tokenspeed.errors import ConfigError

__all__ = ["Rates", "Tell", "chosen", "reported"]

Cell = TypeVar("Cell")

Tell = Callable[[str, int, int], None]
"""Called with (what is measured, done, total)."""


@final
@frozen(kw_only=True)
class Rates:
    """What a large copy and a large product have, before any cell is measured."""

    copy_gb_s: float
    matmul_tflop_s: float


def chosen(cells: Mapping[str, Cell], names: Sequence[str]) -> dict[str, Cell]:
    """The cells of these names; without any, all.

    Raises:
        ConfigError: a name is unknown, or there is no CUDA device.
    """
    for name in names:
        if name not in cells:
            raise ConfigError("cell", name, f"one of {', '.join(cells)}")
    if not torch.cuda.is_available():
        raise ConfigError("device", "cpu", "a CUDA device: this measures GPU kernels")
    return {name: cells[name] for name in names or cells}


def reported(
    cells: Mapping[str, Cell],
    run: Callable[[Cell, Rates], Measured],
    tell: Tell,
    *,
    floor: str,
    error_max: float,
) -> Report:
    """Measure cells, each with the memory of the one before given back.

    Args:
        cells: by name.
        run: measures one of them.
        tell: is told before each, and when all are done.
        floor, error_max: see Report.
    """
    rates = Rates(copy_gb_s=copy_gb_s(), matmul_tflop_s=matmul_tflop_s())
    found: dict[str, Measured] = {}
    for done, (name, cell) in enumerate(cells.items()):
        tell(name, done, len(cells))
        found[name] = run(cell, rates)
        torch.cuda.empty_cache()
    tell("done", len(cells), len(cells))
    return Report(
        floor=floor,
        error_max=error_max,
        machine=machine(),
        copy_gb_s=rates.copy_gb_s,
        matmul_tflop_s=rates.matmul_tflop_s,
        matmul_after_tflop_s=matmul_tflop_s(),
        cells=found,
    )

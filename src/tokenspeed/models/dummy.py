"""A model without weights: random ones of the right shape, for work on performance.

Rule: an element depends on the seed, its tensor's name and its place alone, so that every rank has
its part of one and the same model. No tensor is ever made whole.
"""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import final

import torch
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor

from tokenspeed.config import TokenizerSource
from tokenspeed.models.checkpoint import Checkpoint, TensorInfo, huggingface_tokenizer
from tokenspeed.models.config import ModelConfig
from tokenspeed.models.families import Family, find_config
from tokenspeed.spmd.params import Parameter, leaves

__all__ = ["DummyCheckpoint"]

_PERIOD = 1_000_003
"""Random numbers there are; a prime, so that the rows of a matrix do not repeat."""


@final
class DummyCheckpoint(Checkpoint):
    """Seeded random weights for a configuration.

    Args:
        name: a checkpoint's folder, a `config.json`, or a shipped shape; see `find_config`.
        seed: of the random numbers.
    """

    def __init__(self, name: str | Path, seed: int = 0) -> None:
        self.path = Path(name)
        self.config = find_config(name)
        has_tokenizer = (self.path / "tokenizer.json").is_file()
        self.tokenizer = (
            huggingface_tokenizer(self.path) if has_tokenizer else _bytes_alone(self.config)
        )
        tree = Family.of(self.config).parameters(self.config)
        self.tensors = {
            source.name: TensorInfo(source.shape, math.prod(source.shape) * 2)
            for _, leaf in leaves(tree)
            if isinstance(leaf, Parameter)
            for source in leaf.sources
        }
        random = torch.Generator().manual_seed(seed)
        self._table = torch.randn(_PERIOD, generator=random)

    def read(self, name: str) -> Tensor:
        """See Checkpoint."""
        shape = self.tensors[name].shape
        whole = torch.empty(shape)
        self.read_into(whole, name, tuple(slice(0, size) for size in shape))
        return whole

    def read_into(self, target: Tensor, name: str, part: tuple[slice, ...]) -> None:
        """See Checkpoint. Gains are 1, biases 0, matrices such that sizes are kept."""
        shape = self.tensors[name].shape
        if len(shape) == 1:
            target.fill_(1.0 if name.endswith("weight") else 0.0)
            return
        rows, columns = part[0], part[-1]
        width = math.prod(shape[1:])
        start = zlib.crc32(name.encode()) + columns.start
        if columns.stop - columns.start == shape[-1]:  # whole rows are one run of numbers
            self._fill(target.flatten(), start + rows.start * width, width**-0.5)
            return
        for row in range(rows.start, rows.stop):
            self._fill(target[row - rows.start], start + row * width, width**-0.5)

    def _fill(self, target: Tensor, start: int, scale: float) -> None:
        """The numbers from `start` on, in a circle."""
        if self._table.device != target.device:
            self._table = self._table.to(target.device)
        done = 0
        while done < len(target):
            first = (start + done) % _PERIOD
            run = self._table[first : first + len(target) - done]
            torch.mul(run, scale, out=target[done : done + len(run)])
            done += len(run)


def _bytes_alone(config: ModelConfig) -> TokenizerSource:
    """A token for each byte, and for all other ids one that no text has."""
    own = sorted(ByteLevel.alphabet())[: config.vocab_size]
    rest = (f"<{index}>" for index in range(len(own), config.vocab_size))
    return TokenizerSource(vocab=(*own, *rest), pre="gpt-2")

"""Output tokens/s of the engine beside a peer: transformers' `generate`, or another server.

Rule: both sides in turn within every round, prompts that are new in each, medians over rounds,
ratios beside them. transformers runs in this process, on the same weights, and so does the engine;
beside another server, both are asked over HTTP.
Only tokens that somebody asked for count: a static batch that runs on for its longest member earns
nothing by that.

Scenarios:
    equal-1, equal-8   that many streams of one prompt and output length, all at once;
    staggered-8        8 requests of different prompt and output lengths that arrive one after the
                       other. The static batch takes, whenever it is idle, all that have arrived.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import attrs
import torch
from attrs import frozen
from rich.console import Console
from rich.table import Table

from tokenspeed import models
from tokenspeed.bench.http import HttpSide, served
from tokenspeed.bench.jobs import Job, timed
from tokenspeed.bench.machine import machine
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError
from tokenspeed.request import Request, SamplingParams

__all__ = ["Report", "Workload", "compare"]


@frozen(kw_only=True)
class Workload:
    """Sizes in tokens. Prompts are drawn from `seed`, so both sides see the same ones."""

    prompt_tokens: int = 64
    output_tokens: int = 64
    rounds: int = 3
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        for name in ("prompt_tokens", "output_tokens", "rounds"):
            if getattr(self, name) < 1:
                raise ConfigError(name, getattr(self, name), "at least 1")


@frozen
class Row:
    """Median output tokens/s of both sides in one scenario."""

    scenario: str
    engine: float
    peer: float

    @property
    def ratio(self) -> float:
        """The engine's rate over the peer's."""
        return self.engine / self.peer


@frozen
class Report:
    """All rows, and what they were measured on."""

    model: str
    peer: str
    machine: str
    dtype: str
    quantize: str
    workload: Workload
    rows: tuple[Row, ...]

    def table(self) -> Table:
        """For people."""
        title = f"{self.model}, {self.dtype}, quantize {self.quantize}; {self.machine}"
        table = Table("scenario", "tokenspeed tok/s", f"{self.peer} tok/s", "ratio", title=title)
        for row in self.rows:
            cells = (f"{row.engine:.1f}", f"{row.peer:.1f}", f"{row.ratio:.2f}")
            table.add_row(row.scenario, *cells)
        return table

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        rows = [{**attrs.asdict(row), "ratio": row.ratio} for row in self.rows]
        return {**attrs.asdict(self), "rows": rows}


Side = Callable[[Sequence[Job]], float]
"""Runs the jobs and returns the seconds from the first arrival to the last token."""


def compare(
    model: str,
    config: EngineConfig,
    workload: Workload,
    *,
    console: Console,
    peer: str = "transformers",
) -> Report:
    """Run every scenario `workload.rounds` times, each side in turn.

    Args:
        model: as for `serve`.
        config: of the engine; the prefix cache is off, for no prompt comes twice.
        workload: sizes.
        console: for what happens meanwhile.
        peer: "transformers", or the address of a server that has the same model.

    Raises:
        ConfigError: transformers is not installed, the checkpoint is none that it reads, or the
            peer is no address.
    """
    config = attrs.evolve(config, prefix_cache=False)
    other: HttpSide | _Transformers
    with console.status("loading both sides"):
        if peer == "transformers":
            other = _Transformers(models.resolve_model(model), config)
        else:
            other = HttpSide(peer)
        engine = Engine.from_pretrained(model, config=config)
    with engine:
        if isinstance(other, HttpSide):
            with served(engine) as url:
                rows = _measured(HttpSide(url).run, other.run, workload, engine, console)
        else:
            rows = _measured(_EngineSide(engine).run, other.run, workload, engine, console)
    return Report(model, peer, machine(), config.dtype, config.quantize, workload, rows)


def _measured(
    ours: Side, theirs: Side, workload: Workload, engine: Engine, console: Console
) -> tuple[Row, ...]:
    rows = []
    for name in _scenarios(workload, workload.seed, engine.vocab_size):
        seconds: dict[Side, list[float]] = {ours: [], theirs: []}
        for turn in range(workload.rounds):
            jobs = _scenarios(workload, workload.seed + turn, engine.vocab_size)[name]
            with console.status(f"{name}: round {turn + 1} of {workload.rounds}"):
                for side, times in seconds.items():
                    times.append(side(jobs))
        wanted = sum(job.output_tokens for job in jobs)
        own, other = (wanted / statistics.median(times) for times in seconds.values())
        rows.append(Row(name, own, other))
    return tuple(rows)


def _scenarios(workload: Workload, seed: int, vocab_size: int) -> dict[str, list[Job]]:
    rng = random.Random(seed)

    def prompt(tokens: int) -> tuple[int, ...]:
        return tuple(rng.randrange(vocab_size // 2, vocab_size) for _ in range(tokens))

    def equal(streams: int) -> list[Job]:
        return [
            Job(0.0, prompt(workload.prompt_tokens), workload.output_tokens) for _ in range(streams)
        ]

    shares = (0.25, 2.0, 0.5, 1.0, 0.25, 1.5, 0.5, 1.0)
    staggered = [
        Job(
            arrival_s=0.15 * i,
            prompt_ids=prompt(max(1, int(workload.prompt_tokens * shares[-1 - i]))),
            output_tokens=max(1, int(workload.output_tokens * share)),
        )
        for i, share in enumerate(shares)
    ]
    return {"equal-1": equal(1), "equal-8": equal(8), "staggered-8": staggered}


def _params(job: Job) -> SamplingParams:
    return SamplingParams(temperature=0, max_tokens=job.output_tokens, ignore_eos=True)


@frozen
class _EngineSide:
    engine: Engine

    def run(self, jobs: Sequence[Job]) -> float:
        return timed(jobs, self._read)

    def _read(self, job: Job) -> int:
        request = Request(prompt_ids=job.prompt_ids, params=_params(job))
        with self.engine.submit(request) as stream:
            return sum(len(delta.token_ids) for delta in stream)


class _Transformers:
    """transformers' `generate` with a static, left-padded batch."""

    def __init__(self, path: Path, config: EngineConfig) -> None:
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise ConfigError(
                "transformers", None, "it to be installed: pip install transformers"
            ) from error
        if config.threads is not None:
            torch.set_num_threads(config.threads)
        checkpoint = models.open_checkpoint(path)
        shape = checkpoint.config
        if not isinstance(shape, models.LlamaConfig):
            raise ConfigError("model", shape.architecture, "a model of Llama's shape for this peer")
        settings = LlamaConfig(
            vocab_size=shape.vocab_size,
            hidden_size=shape.hidden,
            intermediate_size=shape.ffn,
            num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads,
            head_dim=shape.head_dim,
            max_position_embeddings=shape.context_max,
            rms_norm_eps=shape.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
            tie_word_embeddings=shape.tied,
        )
        weights = {name: checkpoint.read(name) for name in checkpoint.tensors}
        if shape.tied:
            weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
        self._model: Any = LlamaForCausalLM(settings)
        self._model.load_state_dict(weights)
        self._model.to(getattr(torch, config.dtype)).train(False)

    def run(self, jobs: Sequence[Job]) -> float:
        queue = sorted(jobs, key=lambda job: job.arrival_s)
        start_s = time.perf_counter()
        while queue:
            time.sleep(max(0.0, start_s + queue[0].arrival_s - time.perf_counter()))
            now_s = time.perf_counter() - start_s
            batch = [job for job in queue if job.arrival_s <= now_s]
            queue = queue[len(batch) :]
            self._generate(batch)
        return time.perf_counter() - start_s

    def _generate(self, batch: Sequence[Job]) -> None:
        width = max(len(job.prompt_ids) for job in batch)
        rows = [[0] * (width - len(job.prompt_ids)) + list(job.prompt_ids) for job in batch]
        mask = [[0] * (width - len(j.prompt_ids)) + [1] * len(j.prompt_ids) for j in batch]
        tokens = max(job.output_tokens for job in batch)
        with torch.inference_mode():
            self._model.generate(
                torch.tensor(rows),
                attention_mask=torch.tensor(mask),
                do_sample=False,
                min_new_tokens=tokens,
                max_new_tokens=tokens,
                pad_token_id=0,
            )

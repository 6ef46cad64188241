"""Every model on every mesh equals the same model on one rank: logits of a prefill and of a decode.

Rule: the cases are tables. Threads of this process run some of them; processes with gloo, started
once and kept warm, run all. Ranks along dp and ep have rows of their own, as many tokens each after
padding, so ranks differ in what they pad.
"""

from __future__ import annotations

import itertools
import multiprocessing
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tiny
from tokenspeed import models
from tokenspeed.errors import ContractError
from tokenspeed.plan import StepPlan
from tokenspeed.spmd import (
    Communicator,
    Costs,
    Link,
    Mesh,
    ProcessGroups,
    Program,
    ThreadGroups,
)
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.report import batch_of

PROMPTS = [[3, 9, 27, 81, 50], [4, 8, 16, 32, 64, 33, 66], [7, 11, 13], [2, 90, 41, 6, 5, 30]]
TOKENS = 32
"""Of a step, of all ranks together, padded."""
PAGE, PAGES, SPARE = 4, 8, 8

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "deepseek_v3": tiny.DEEPSEEK,
    "deepseek_v2": {
        **tiny.DEEPSEEK,
        "model_type": "deepseek_v2",
        "q_lora_rank": None,
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
    },
}
MESHES: list[dict[str, int]] = [
    {"tp": 2},
    {"tp": 4},
    {"ep": 2},
    {"ep": 4},
    {"dp": 2, "ep": 2},
    {"pp": 2},
    {"tp": 2, "pp": 2},
    {"ep": 2, "tp": 2},
]
_ALL_BANDWIDTH = {axis: Link(0.0, 1e3) for axis in ("dp", "tp", "ep", "pp")}
_SLOW: dict[str, float] = {"memory_bytes_per_s": 1e9, "begin_s": 0.0}
LINKS = {
    "usual": Costs(),
    "bandwidth": Costs(_ALL_BANDWIDTH),
    "usual, slow modules": Costs(**_SLOW),
    "bandwidth, slow modules": Costs(_ALL_BANDWIDTH, **_SLOW),
}
"""With links that only bandwidth matters on, tokens are cut and sent wherever they can be; beside
slow modules collectives are begun early."""


def cases(*of: str) -> list[tuple[str, dict[str, int], str]]:
    """(model, axes, links); beside slow modules only what has something to begin early."""
    return [
        (model, axes, links)
        for model, axes, links in itertools.product(of, MESHES, LINKS)
        if "slow" not in links or ("deepseek" in model and "ep" in axes)
    ]


def case_name(value: Any) -> str:
    return name(value) if isinstance(value, dict) else str(value)


def sequences(mesh: Mesh) -> list[int]:
    """Which prompts a rank has: they are dealt out along the axes of the batch.

    Four ranks leave one prompt out, so that the last of them has no row at all.
    """
    at = 0
    for axis, _ in batch_of(mesh).axes:
        at = at * mesh.size(axis) + mesh.coordinate(axis)
    parts = batch_of(mesh).parts(mesh)
    return list(range(len(PROMPTS) - (parts == 4)))[at::parts]


def plan_of(step: int, fed: list[list[int]], contexts: list[int]) -> StepPlan:
    rows, pages = len(fed), PAGES // len(PROMPTS)
    delta = [(row, i, pages * row + i) for row in range(rows) for i in range(pages)]
    return StepPlan(
        step=step,
        slots=np.arange(rows, dtype=np.int32),
        query_start=np.cumsum([0, *map(len, fed)]).astype(np.int32),
        token_ids=np.array([token for one in fed for token in one], np.int32),
        context_lens=np.array(contexts, np.int32),
        sampled=np.ones(rows, np.bool_),
        page_delta=np.array(delta if step == 0 else [], np.int32).reshape(-1, 3),
    )


@torch.inference_mode()
def logits_on(
    folder: Path,
    mesh: Mesh,
    links: str,
    communicator: Communicator | None = None,
    device: str = "cpu",
) -> tuple[Tensor, Program]:
    """This rank's rows [its prompts * 2, vocab] of a prefill and a decode."""
    batch = batch_of(mesh)
    model = models.build(
        models.open_checkpoint(folder),
        mesh,
        device=device,
        communicator=communicator,
        tokens=TOKENS,
        batch=batch,
        costs=LINKS[links],
    )
    own = TOKENS // batch.parts(mesh)
    kv = model.kv.allocate(PAGES + SPARE, PAGE)
    slots = Slots(len(PROMPTS), PAGES, PAGE, model.kv)
    spare = torch.arange(PAGES, PAGES + SPARE, dtype=torch.int32, device=device)
    prompts = [PROMPTS[i] for i in sequences(mesh)]
    lengths = [len(prompt) for prompt in prompts]
    found = []
    for plan in (
        plan_of(0, prompts, [0] * len(prompts)),
        plan_of(1, [[70 + length] for length in lengths], lengths),
    ):
        slots.patch(plan)
        logits, kv = model.step(model.params, slots.batch(plan).padded(own, spare), kv)
        found.append(logits.cpu())
    return torch.cat(found), model.step


def checkpoint(folder: Path, model: str) -> Path:
    """Four heads of each kind, so that four ranks can share them."""
    return tiny.write(folder, num_key_value_heads=4, **MODELS[model])


def rows_of(alone: Tensor, mesh: Mesh) -> Tensor:
    """Of one rank's rows, those that a rank of the mesh has."""
    own = sequences(mesh)
    return torch.cat([alone[: len(PROMPTS)][own], alone[len(PROMPTS) :][own]])


def name(axes: dict[str, int]) -> str:
    return str(Mesh.of(**axes))


@pytest.mark.parametrize(("model", "axes", "links"), cases("llama", "deepseek_v3"), ids=case_name)
def test_threads_equal_one_rank(
    tmp_path: Path, model: str, axes: dict[str, int], links: str
) -> None:
    folder, mesh = checkpoint(tmp_path, model), Mesh.of(**axes)
    alone, _ = logits_on(folder, Mesh.single(), links)
    with ThreadPoolExecutor(mesh.ranks) as pool:
        communicators = ThreadGroups.of(mesh, timeout_s=20)
        results = list(pool.map(lambda c: logits_on(folder, c.mesh, links, c), communicators))
    for communicator, (logits, _) in zip(communicators, results, strict=True):
        own = rows_of(alone, communicator.mesh)
        torch.testing.assert_close(logits, own, atol=1e-5, rtol=1e-5)
    made = [one for _, program in results for one in program.collectives]
    sent = model == "deepseek_v3" and "ep" in axes and links.startswith("bandwidth")
    assert ("all_to_all" in {one.op for one in made}) >= sent
    early = {one.op for one in made if one.started is not None}
    assert bool(early) == ("slow" in links)
    assert ("all_to_all" in early) == (sent and "slow" in links)


def test_a_batch_is_padded_with_what_nobody_has(tmp_path: Path) -> None:
    model = models.build(models.open_checkpoint(tiny.write(tmp_path)), Mesh.single())
    slots = Slots(len(PROMPTS), PAGES, PAGE, model.kv)
    batch = slots.batch(plan_of(0, [[1, 2, 3]], [0]))
    padded = batch.padded(9, torch.tensor([10, 12], dtype=torch.int32))
    assert padded.token_ids.tolist() == [1, 2, 3, 0, 0, 0, 0, 0, 0]
    assert padded.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 5]
    assert padded.groups[0].locations.tolist() == [0, 1, 2, 40, 41, 42, 43, 48, 49]
    attention = padded.groups[0].attention
    assert attention.query_start.tolist() == [0, 3, 9]
    assert attention.context_lens.tolist() == [0, 0]
    assert attention.page_table.tolist() == [[0, 0], [10, 12]]
    assert padded.sampled_rows.tolist() == [2]
    assert batch.padded(3, torch.tensor([10])) is batch
    for tokens in (2, 12):
        with pytest.raises(ContractError, match="expected 3 to 11"):
            batch.padded(tokens, torch.tensor([10, 12]))


# --- processes ------------------------------------------------------------------------------------


def _rank(rank: int, jobs: Any, results: Any) -> None:
    """A process that runs what it is given until it is given None."""
    torch.set_num_threads(1)
    while (job := jobs.get()) is not None:
        port, folder, axes, links = job
        mesh = Mesh(axes, rank)
        dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=mesh.ranks)
        try:
            logits, _ = logits_on(folder, mesh, links, ProcessGroups(mesh))
            results.put((rank, logits.numpy(), None))
        except Exception as error:
            results.put((rank, None, f"{type(error).__name__}: {error}"))
        finally:
            dist.destroy_process_group()


@contextmanager
def warm(count: int, rank: Callable[[int, Any, Any], None]) -> Iterator[tuple[list[Any], Any]]:
    """So many ranks that are started once: their queues, and the one they answer on."""
    context = multiprocessing.get_context("spawn")
    jobs, results = [context.Queue() for _ in range(count)], context.Queue()
    ranks = [
        context.Process(target=rank, args=(number, queue, results), daemon=True)
        for number, queue in enumerate(jobs)
    ]
    for process in ranks:
        process.start()
    yield jobs, results
    for queue in jobs:
        queue.put(None)
    for process in ranks:
        process.join(30)
        assert process.exitcode == 0


@pytest.fixture(scope="module")
def processes() -> Iterator[tuple[list[Any], Any]]:
    """Four of them."""
    with warm(4, _rank) as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize(("model", "axes", "links"), cases(*MODELS), ids=case_name)
def test_processes_equal_one_rank(
    tmp_path: Path,
    processes: tuple[list[Any], Any],
    model: str,
    axes: dict[str, int],
    links: str,
) -> None:
    folder, mesh = checkpoint(tmp_path, model), Mesh.of(**axes)
    alone, _ = logits_on(folder, Mesh.single(), links)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    jobs, answers = processes
    for queue in jobs[: mesh.ranks]:
        queue.put((port, folder, mesh.axes, links))
    for rank, logits, error in [answers.get(timeout=120) for _ in range(mesh.ranks)]:
        assert error is None
        own = rows_of(alone, mesh.at(rank)).numpy()
        np.testing.assert_allclose(logits, own, atol=1e-5, rtol=1e-5)

"""What runs on gloo runs on NCCL, a GPU a rank: model on mesh, and a decode step as a CUDA graph.

Rule: skipped where there are fewer than two GPUs. Two processes are started once; each job says
what both are to do, and what they answer is compared with one rank on one GPU. float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import pytest
import torch
import torch.distributed as dist

import tiny
from test_ranks import LINKS, MODELS, checkpoint, logits_on, name, rows_of, warm
from tokenspeed import models
from tokenspeed.bench.mesh import captured, decode
from tokenspeed.config import EngineConfig
from tokenspeed.ranks import connect, device_of
from tokenspeed.spmd import KV, Communicator, Mesh
from tokenspeed.spmd.replay import fill, lasting, underived
from tokenspeed.spmd.report import batch_of

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")

MESHES: list[dict[str, int]] = [{"tp": 2}, {"ep": 2}, {"pp": 2}, {"dp": 2}]


def _rank(rank: int, jobs: Any, results: Any) -> None:
    """A process that runs what it is given until it is given None."""
    device = device_of(EngineConfig(device="cuda"), rank)
    while (job := jobs.get()) is not None:
        what, meeting, axes, folder, links = job
        mesh = Mesh(axes, rank)
        try:
            communicator = connect(mesh, device, meeting, None)
            results.put((rank, what(folder, mesh, links, communicator, device), None))
        except Exception as error:
            results.put((rank, None, f"{type(error).__name__}: {error}"))
        finally:
            dist.destroy_process_group()


@pytest.fixture(scope="module")
def gpus() -> Iterator[tuple[list[Any], Any]]:
    with warm(2, _rank) as found:
        yield found


def on_both(gpus: Any, what: Any, folder: Path, axes: Any, links: str, meeting: Path) -> list[Any]:
    """What each rank answers, in their order."""
    jobs, answers = gpus
    for queue in jobs:
        queue.put((what, str(meeting), axes, folder, links))
    found = sorted((answers.get(timeout=120) for _ in jobs), key=lambda answer: answer[0])
    assert [error for _, _, error in found] == [None, None]
    return [answer for _, answer, _ in found]


def _logits(
    folder: Path, mesh: Mesh, links: str, communicator: Communicator, device: str
) -> tuple[Any, list[str]]:
    found, program = logits_on(folder, mesh, links, communicator, device)
    return found.numpy(), [one.op for one in program.collectives]


@pytest.mark.parametrize("links", LINKS)
@pytest.mark.parametrize("axes", MESHES, ids=name)
@pytest.mark.parametrize("model", MODELS)
def test_gpus_equal_one_gpu(
    tmp_path: Path, gpus: Any, model: str, axes: dict[str, int], links: str
) -> None:
    folder, mesh = checkpoint(tmp_path, model), Mesh.of(**axes)
    alone, _ = logits_on(folder, Mesh.single(), links, device="cuda:0")
    found = on_both(gpus, _logits, folder, mesh.axes, links, tmp_path / "ranks")
    for rank, (logits, ops) in enumerate(found):
        own = rows_of(alone, mesh.at(rank)).numpy()
        np.testing.assert_allclose(logits, own, atol=2e-5, rtol=2e-5)
        assert bool(ops) == (
            "dp" not in axes and (model.startswith("deepseek") or "ep" not in axes)
        )


def _in_a_graph(
    folder: Path, mesh: Mesh, links: str, communicator: Communicator, device: str
) -> tuple[Any, Any, list[tuple[str, bool]]]:
    """A step without a graph and one as the replay of another step's: other tokens, and one more
    of each row cached."""
    batch_lies = batch_of(mesh) if links == "own" else batch_of(Mesh.single())
    rows = 8 // batch_lies.parts(mesh)
    model = models.build(
        models.open_checkpoint(folder),
        mesh,
        device=device,
        communicator=communicator,
        tokens=8,
        batch=batch_lies,
        costs=LINKS["usual, slow modules"],
    )
    with torch.inference_mode():
        first, kv = decode(model, rows, 40)
        for own in kv.pages:
            for part in own:
                part.copy_(torch.randn(part.shape, generator=torch.Generator().manual_seed(7)))
        pages = kv.pages
        fixed = lasting(first, first.groups[0].attention.page_table.shape[1])
        logits, replay = captured(lambda: model.step(model.params, underived(fixed), KV(pages))[0])
        later, _ = decode(model, rows, 41)
        later = attrs.evolve(later, token_ids=later.token_ids.flip(0) + 5)
        wanted, _ = model.step(model.params, underived(later), KV(pages))
        fill(fixed, later)
        logits.fill_(float("nan"))
        replay()
        found = [(one.op, one.started is not None) for one in model.step.collectives]
        return logits.cpu().numpy(), wanted.cpu().numpy(), found


@pytest.mark.parametrize("rows", ["own", "all"])
@pytest.mark.parametrize("axes", [{"tp": 2}, {"ep": 2}], ids=name)
@pytest.mark.parametrize("model", ["llama", "deepseek_v3"])
def test_a_decode_step_with_its_collectives_is_a_cuda_graph(
    tmp_path: Path, gpus: Any, model: str, axes: dict[str, int], rows: str
) -> None:
    changes = {**MODELS[model], **(tiny.ON_TRITON if model == "deepseek_v3" else {})}
    folder = tiny.write(tmp_path, num_key_value_heads=4, **changes)
    mesh = Mesh.of(**axes)
    found = on_both(gpus, _in_a_graph, folder, mesh.axes, rows, tmp_path / "ranks")
    for replayed, wanted, ops in found:
        assert np.isfinite(wanted).all()
        np.testing.assert_allclose(replayed, wanted, atol=1e-5, rtol=1e-5)
        assert bool(ops) == (model == "deepseek_v3" or "tp" in axes)
        assert any(early for _, early in ops) == (model == "deepseek_v3" and "ep" in axes)

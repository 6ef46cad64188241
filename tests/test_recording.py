"""Calls of CPU kernels that are written down and made again: the same results, or no recording."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import tiny
from stepping import Feed, Stepper
from tokenspeed import kernels, models
from tokenspeed.errors import ContractError, KernelError
from tokenspeed.kernels.cpu import library, recording
from tokenspeed.spmd import Executor, Mesh

pytestmark = pytest.mark.skipif(library.library_path() is None, reason="_cpu is not built")

WIDTH = 64
Link = Callable[[Tensor, Tensor], Tensor]
NAMES = ("norm", "sum", "twice", "gated", "linear", "turned", "taken")


def links(dtype: torch.dtype) -> dict[str, Link]:
    """Functions of x[tokens, WIDTH] and an id a token, which may follow each other in any order."""
    random = torch.Generator().manual_seed(0)
    norm = torch.randn(WIDTH, generator=random).to(dtype)
    wide = kernels.pack(torch.randn((2 * WIDTH, WIDTH), generator=random), 4)
    flat = kernels.pack(torch.randn((WIDTH, WIDTH), generator=random), 8)
    bias = torch.randn(2 * WIDTH, generator=random).to(dtype)
    table = torch.randn((9, WIDTH // 2), generator=random)

    def twice(x: Tensor, _ids: Tensor) -> Tensor:
        normed, total = kernels.add_rms_norm(x, x, norm, 1e-5)
        return kernels.add_rms_norm(normed, total, norm, 1e-5)[0]

    def turned(x: Tensor, ids: Tensor) -> Tensor:
        heads = x.view(len(x), 2, -1)
        q, k = kernels.rope(heads, heads[:, 1:], ids, table)
        return kernels.rope(k, q, ids, table)[1].view(x.shape)

    return {
        "norm": lambda x, _: kernels.rms_norm(x, norm, 1e-5),
        "sum": lambda x, _: kernels.add_rms_norm(x, x, norm, 1e-5)[1],
        "twice": twice,
        "gated": lambda x, _: kernels.silu_mul(kernels.linear(x, wide, bias)),
        "linear": lambda x, _: kernels.linear(x, flat),
        "turned": turned,
        "taken": lambda x, ids: kernels.embedding(ids, x),
    }


@given(
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.lists(st.sampled_from(NAMES), min_size=1, max_size=8),
    st.integers(1, 5),
    st.integers(0, 2**31),
)
def test_a_chain_that_is_made_again_gives_what_it_gives_anew(
    dtype: torch.dtype, names: list[str], tokens: int, seed: int
) -> None:
    """Of new numbers in the old place; memory that a link drops serves a later one."""
    known, random = links(dtype), torch.Generator().manual_seed(seed)
    x, ids = torch.empty((tokens, WIDTH), dtype=dtype), torch.empty(tokens, dtype=torch.int64)

    def chain() -> Tensor:
        made = x
        for name in names:
            made = known[name](made, ids)
        return made

    found: kernels.Recording | str | None = None
    for _ in range(3):
        x.copy_(torch.randn(x.shape, generator=random))
        ids.copy_(torch.randint(tokens, ids.shape, generator=random))
        if found is None:
            result, found = kernels.record(chain, kernels.Workspace())
            assert isinstance(found, kernels.Recording)
            assert len(found) >= len(names)
        else:
            result.fill_(float("nan"))
            found.replay()
        assert torch.equal(result, chain())


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "an operation": lambda x: x + 1,
    "a copy": lambda x: x.t().contiguous(),
    "a change": lambda x: x.mul_(2),
    "a look": lambda x: x[0, 0].item(),
    "an index": lambda x: x[torch.tensor([0])],
    "a filled one": lambda x: torch.zeros(3),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_would_be_left_out_is_a_reason_not_to_record(what: str) -> None:
    x = torch.ones((2, WIDTH))
    made, found = kernels.record(
        lambda: (kernels.silu_mul(x), REFUSED[what](x)), kernels.Workspace()
    )
    assert isinstance(found, str)
    assert "is none of the recorded kernels" in found
    assert torch.equal(made[0], kernels.silu_mul(torch.ones((2, WIDTH))))


def test_what_does_not_fit_is_not_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recording, "WORKSPACE_BYTES", 4096)
    x = torch.randn(8, 2 * WIDTH)
    made, found = kernels.record(
        lambda: [kernels.silu_mul(x) for _ in range(3)], kernels.Workspace()
    )
    assert found == "2048 bytes do not fit into the workspace"
    assert all(torch.equal(one, kernels.silu_mul(x)) for one in made)


def test_an_id_that_is_no_row_is_said_and_spoils_its_token_alone() -> None:
    table, ids = torch.randn(5, WIDTH), torch.tensor([4, 0])
    with pytest.raises(ContractError, match="ids is -1 somewhere; expected 0 to 4"):
        kernels.embedding(torch.tensor([0, -1]), table)
    made, found = kernels.record(lambda: kernels.embedding(ids, table), kernels.Workspace())
    assert isinstance(found, kernels.Recording)
    ids[0] = 5
    found.replay()
    assert made[0].isnan().all()
    assert torch.equal(made[1], table[0])


def test_a_function_that_cannot_be_written_down_is_said() -> None:
    with pytest.raises(KernelError, match="ts_cpu_replay cannot be written down"):
        library.number("replay")


# --- steps ----------------------------------------------------------------------------------------

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 8}


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def packed(request: Any, tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    """A model whose every matrix is packed."""
    folder = tiny.write(tmp_path_factory.mktemp("packed"), **SHAPE)
    checkpoint = models.open_checkpoint(folder)
    return models.build(checkpoint, Mesh.single(), dtype=request.param, quantize="int4")


def stepper(model: models.Model, **kind: Any) -> Stepper:
    executor = Executor(model, slots=3, pages=24, page_size=8, context_max=64, **kind)
    return Stepper(executor, 8, 8)


def decoded(steps: Stepper, slots: list[int]) -> list[list[int]]:
    """What they say in 20 steps to prompts of 5, 6 ... tokens."""
    for slot in slots:
        steps.join(slot, list(range(3 + slot, 8 + 2 * slot)))
    steps.generate(slots, 20)
    return [steps.output(slot) for slot in slots]


def recorded(steps: Stepper) -> list[int]:
    known = steps.executor._step._recorded.items()
    return sorted(rows for (rows, _threads), found in known if found is not None)


def test_recorded_steps_say_what_steps_say(packed: models.Model) -> None:
    """Together and alone: what a row says does not depend on the others, nor on the recording."""
    plain, replayed = stepper(packed), stepper(packed)
    plain.executor._step._recorder = None
    wanted = decoded(plain, [0, 1, 2])
    assert decoded(replayed, [0, 1, 2]) == wanted
    assert recorded(replayed) == [3]
    assert recorded(plain) == []
    alone = stepper(packed)
    assert [decoded(alone, [slot])[0] for slot in (2, 0)] == [wanted[2], wanted[0]]
    assert recorded(alone) == [1]
    assert decoded(replayed, [1]) == [wanted[1]]
    assert decoded(replayed, [2, 0]) == [wanted[2], wanted[0]]
    assert recorded(replayed) == [1, 2, 3]


def test_overlapped_steps_are_recorded_too(packed: models.Model) -> None:
    steps = stepper(packed, overlap=1)
    wanted = decoded(stepper(packed), [1])
    steps.join(1, list(range(4, 10)))
    _, pending = steps.launch(Feed(1, 6))
    for _ in range(19):
        _, after = steps.launch(Feed(1, from_device=True))
        steps.ids[1].append(0)  # not known yet
        before, pending = pending, after
        steps.ids[1][-1] = int(before.result().token_ids[0])
    steps.ids[1].append(int(pending.result().token_ids[0]))
    assert [steps.output(1)] == wanted
    assert recorded(steps) == [1]
    steps.executor.close()


def test_another_number_of_threads_is_another_recording(packed: models.Model) -> None:
    steps, threads = stepper(packed), torch.get_num_threads()
    wanted = decoded(steps, [0])
    torch.set_num_threads(threads + 1)
    try:
        assert decoded(steps, [0]) == wanted
    finally:
        torch.set_num_threads(threads)
    assert list(steps.executor._step._recorded) == [(1, threads), (1, threads + 1)]


def test_whoever_is_to_run_an_op_runs_it(packed: models.Model) -> None:
    """A recording is of the kernels that were chosen then."""
    steps = stepper(packed)
    wanted = decoded(steps, [0])
    with kernels.registry.using(rms_norm="reference"):
        assert len(decoded(steps, [0])[0]) == 20
        assert recorded(steps) == []
    assert decoded(steps, [0]) == wanted
    assert recorded(steps) == [1]


def test_what_cannot_be_recorded_runs_as_it_is(tmp_path: Path, caplog: Any) -> None:
    caplog.set_level("DEBUG", "tokenspeed.executor")
    checkpoint = models.open_checkpoint(tiny.write(tmp_path))
    steps = stepper(models.build(checkpoint, Mesh.single(), dtype="float32"))
    wanted = decoded(steps, [0, 1])
    assert recorded(steps) == [2]
    with kernels.registry.using(linear="cpu"):
        assert decoded(steps, [0, 1]) == wanted
        assert recorded(steps) == []
    [told] = [record.message for record in caplog.records if "not recorded" in record.message]
    assert told.endswith("is none of the recorded kernels"), "once, not a step"

"""The executor alone, fed by hand: the same ids whatever the plan, and failures that stay put."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from attrs import evolve

import tiny
from models_here import needs_reference, needs_smollm2, reference
from stepping import GREEDY, Feed, Stepper
from tokenspeed import models
from tokenspeed.config import DEFAULT_MODEL
from tokenspeed.errors import StepError
from tokenspeed.plan import FROM_DEVICE
from tokenspeed.spmd import Executor, Mesh

PAGE_SIZE = 16


def stepper(model: models.Model, *, slots: int = 5, slot_pages: int = 8, **kind: Any) -> Stepper:
    executor = Executor(
        model,
        slots=slots,
        pages=slots * slot_pages,
        page_size=PAGE_SIZE,
        context_max=slot_pages * PAGE_SIZE,
        **kind,
    )
    return Stepper(executor, slot_pages, PAGE_SIZE)


@pytest.fixture(scope="module")
def smollm2() -> models.Model:
    checkpoint = models.open_checkpoint(models.resolve_model(DEFAULT_MODEL))
    return models.build(checkpoint, Mesh.single(), dtype="float32")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> models.Model:
    folder = tiny.write(tmp_path_factory.mktemp("tiny"))
    return models.build(models.open_checkpoint(folder), Mesh.single())


def expected(records: list[dict[str, Any]]) -> list[list[int]]:
    return [record["output_ids"] for record in records]


@needs_smollm2
@needs_reference
def test_reference_ids_alone_and_from_the_device(smollm2: models.Model) -> None:
    records = reference()
    steps = stepper(smollm2)
    for slot, record in enumerate(records):
        steps.join(slot, record["prompt_ids"])
        steps.generate([slot], 1)
        while len(steps.output(slot)) < len(record["output_ids"]):
            steps.run(Feed(slot, from_device=True))
    assert [steps.output(slot) for slot in range(5)] == expected(records)


@needs_smollm2
@needs_reference
def test_reference_ids_in_chunks_mixed_with_decode(smollm2: models.Model) -> None:
    records = reference()
    steps = stepper(smollm2)
    for slot, record in enumerate(records):  # the earlier ones decode while the later ones prefill
        steps.join(slot, record["prompt_ids"])
        steps.generate(list(range(slot + 1)), min(4 * (slot + 1), 20), chunk=16)
    for slot, record in enumerate(records):
        steps.generate([slot], len(record["output_ids"]), chunk=16)
    got = [steps.output(slot)[: len(r["output_ids"])] for slot, r in enumerate(records)]
    assert got == expected(records)


@needs_smollm2
@needs_reference
def test_reference_ids_batched_with_overlap(smollm2: models.Model) -> None:
    records = reference()
    steps = stepper(smollm2, overlap=1)
    for slot, record in enumerate(records):
        steps.join(slot, record["prompt_ids"])
    ahead = steps.launch(*(Feed(slot, 10**6) for slot in range(5)))
    for _ in range(max(len(record["output_ids"]) for record in records) - 1):
        following = [Feed(slot, from_device=True) for slot in range(5)]
        launched = steps.launch(*following)  # before the CPU has seen the previous tokens
        steps.commit(ahead[0], ahead[1].result())
        ahead = launched
    steps.commit(ahead[0], ahead[1].result())
    steps.executor.close()
    got = [steps.output(slot)[: len(r["output_ids"])] for slot, r in enumerate(records)]
    assert got == expected(records)


@needs_smollm2
@needs_reference
def test_bfloat16_stays_near_float32(smollm2: models.Model) -> None:
    """Teacher-forced on the reference: the same best token except where float32 was nearly tied."""
    checkpoint = models.open_checkpoint(smollm2_path())
    rough = stepper(models.build(checkpoint, Mesh.single(), dtype="bfloat16"))
    agreed = total = 0
    for slot, record in enumerate(reference()):
        rough.join(slot, record["prompt_ids"])
        rough.generate([slot], 1)
        for token in record["output_ids"]:
            agreed += rough.ids[slot][-1] == token
            total += 1
            rough.ids[slot][-1] = token
            rough.run(Feed(slot))
    assert agreed / total > 0.95, f"{agreed} of {total}"


def smollm2_path() -> Path:
    return models.resolve_model(DEFAULT_MODEL)


@pytest.mark.parametrize("overlap", [0, 1])
def test_every_schedule_gives_the_same_ids(small: models.Model, overlap: int) -> None:
    prompts = [[5, 9, 33, 70, 2, 81, 14][: 3 + slot] * 6 for slot in range(4)]
    alone = stepper(small)
    for slot, prompt in enumerate(prompts):
        alone.join(slot, prompt)
        alone.generate([slot], 12)
    together = stepper(small, overlap=overlap)
    for slot, prompt in enumerate(prompts):
        together.join(slot, prompt)
    together.generate(list(range(4)), 12, chunk=5)
    assert [together.output(s) for s in range(4)] == [alone.output(s) for s in range(4)]


def test_a_slot_is_reused_by_another_request(small: models.Model) -> None:
    steps = stepper(small, slots=2)
    steps.join(0, [3, 4, 5])
    steps.generate([0], 5)
    first = steps.output(0)
    steps.join(0, [60, 61, 62, 63])
    steps.generate([0], 5)
    steps.join(0, [3, 4, 5])
    steps.generate([0], 5)
    assert steps.output(0) == first


def test_the_plan_may_be_overwritten_after_launch(small: models.Model) -> None:
    wanted = stepper(small)
    wanted.join(0, [7, 8, 9])
    want = wanted.run(Feed(0, 3)).token_ids.tolist()
    steps = stepper(small, overlap=1)
    steps.join(0, [7, 8, 9])
    plan = steps.plan(Feed(0, 3))
    pending = steps.executor.launch(plan)
    for array in (plan.slots, plan.query_start, plan.token_ids, plan.context_lens, plan.page_delta):
        array.fill(1)
    plan.sampled.fill(False)
    assert pending.result().token_ids.tolist() == want
    steps.executor.close()


@pytest.mark.parametrize("overlap", [0, 1])
def test_a_step_that_raises_poisons_nothing(small: models.Model, overlap: int) -> None:
    steps = stepper(small, overlap=overlap)
    steps.join(0, [10, 11, 12])
    steps.generate([0], 3)
    steps.join(1, [20, 21])
    bad = steps.plan(Feed(1, 2))
    failing = steps.executor.launch(evolve(bad, token_ids=np.array([20, 10**6], np.int32)))
    with pytest.raises(StepError, match=f"step {bad.step}"):
        failing.result()
    steps.fed[1] = 0
    steps.generate([0, 1], 6)
    steps.executor.close()
    alone = stepper(small)
    for slot, prompt in ((0, [10, 11, 12]), (1, [20, 21])):
        alone.join(slot, prompt)
        alone.generate([slot], 6)
    assert [steps.output(0), steps.output(1)] == [alone.output(0), alone.output(1)]


def test_a_row_that_is_not_finite_fails_alone(small: models.Model) -> None:
    embedding = small.params["embed"]["weight"].clone()
    embedding[50] = float("nan")
    params = {**small.params, "embed": {"weight": embedding}}
    steps = stepper(evolve(small, params=params))
    steps.join(0, [10, 50, 12])
    steps.join(1, [20, 21])
    plan, pending = steps.launch(Feed(0, 3), Feed(1, 2))
    result = pending.result()
    assert set(result.failed) == {0}
    assert "not finite" in result.failed[0]
    alone = stepper(small)
    alone.join(1, [20, 21])
    assert alone.run(Feed(1, 2)).token_ids[0] == result.token_ids[1]
    assert plan.rows == 2


def test_nothing_sampled_gives_no_tokens(small: models.Model) -> None:
    steps = stepper(small)
    steps.join(0, list(range(3, 30)))
    assert steps.run(Feed(0, 20)).token_ids.tolist() == [-1]


def test_logprobs_come_for_the_rows_that_asked(small: models.Model) -> None:
    steps = stepper(small)
    steps.join(0, [3, 4], evolve(GREEDY, logprobs=2))
    steps.join(1, [5, 6])
    result = steps.run(Feed(1, 2), Feed(0, 2))
    assert set(result.logprobs) == {1}
    chosen, ids, values = result.logprobs[1]
    assert ids[0] == result.token_ids[1]
    assert values[0] == pytest.approx(chosen)


def test_from_device_reads_the_slots_own_token(small: models.Model) -> None:
    steps = stepper(small)
    for slot in (0, 1):
        steps.join(slot, [30 + slot, 40 + slot])
    steps.run(Feed(0, 2), Feed(1, 2))
    plan = steps.plan(Feed(1, from_device=True), Feed(0, from_device=True))
    assert plan.token_ids.tolist() == [FROM_DEVICE, FROM_DEVICE]
    steps.commit(plan, steps.executor.launch(plan).result())
    alone = stepper(small)
    for slot in (0, 1):
        alone.join(slot, [30 + slot, 40 + slot])
        alone.generate([slot], 2)
    assert [steps.output(0), steps.output(1)] == [alone.output(0), alone.output(1)]


@pytest.mark.parametrize("chunk", [1, 7, 16])
def test_chunks_give_the_logprobs_of_one_prefill(small: models.Model, chunk: int) -> None:
    ids = torch.randint(3, 96, (40,), generator=torch.Generator().manual_seed(1)).tolist()
    entries = []
    for size in (40, chunk):
        steps = stepper(small)
        steps.join(0, ids, evolve(GREEDY, logprobs=5))
        while steps.fed[0] < len(ids):
            result = steps.run(Feed(0, min(size, len(ids) - steps.fed[0])))
        entries.append(result.logprobs[0])
    (a, a_ids, a_top), (b, b_ids, b_top) = entries
    assert a_ids == b_ids
    np.testing.assert_allclose([a, *a_top], [b, *b_top], atol=1e-4)

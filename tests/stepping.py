"""Hand-written step plans: a small stand-in for the scheduler, for tests of the executor alone."""

from __future__ import annotations

import numpy as np
from attrs import define, field

from tokenspeed.plan import FROM_DEVICE, Joined, StepPlan, StepResult
from tokenspeed.request import SamplingParams
from tokenspeed.spmd import Executor, Pending

GREEDY = SamplingParams(temperature=0, max_tokens=64, seed=0)


@define
class Feed:
    """What a row feeds in a step: how many of its known tokens, or the device's own last token."""

    slot: int
    tokens: int = 1
    from_device: bool = False


@define
class Stepper:
    """Keeps the tokens of each slot and turns feeds into plans; a slot's pages run backwards."""

    executor: Executor
    slot_pages: int
    page_size: int
    ids: dict[int, list[int]] = field(factory=dict)
    fed: dict[int, int] = field(factory=dict)
    prompts: dict[int, int] = field(factory=dict)
    joining: list[Joined] = field(factory=list)
    deltas: list[tuple[int, int, int]] = field(factory=list)
    step: int = 0

    def join(self, slot: int, prompt: list[int], params: SamplingParams = GREEDY) -> None:
        self.ids[slot], self.fed[slot], self.prompts[slot] = list(prompt), 0, len(prompt)
        self.joining.append(Joined(slot=slot, params=params, prompt_ids=tuple(prompt)))
        last = (slot + 1) * self.slot_pages - 1
        self.deltas += [(slot, index, last - index) for index in range(self.slot_pages)]

    def plan(self, *feeds: Feed) -> StepPlan:
        tokens: list[int] = []
        starts, contexts, sampled = [0], [], []
        for feed in feeds:
            ids, at = self.ids[feed.slot], self.fed[feed.slot]
            piece = [FROM_DEVICE] if feed.from_device else ids[at : at + feed.tokens]
            assert piece, "nothing left to feed"
            tokens += piece
            starts.append(len(tokens))
            contexts.append(at)
            self.fed[feed.slot] = at + len(piece)
            sampled.append(self.fed[feed.slot] >= len(ids))
        made = StepPlan(
            step=self.step,
            slots=np.array([feed.slot for feed in feeds], np.int32),
            query_start=np.array(starts, np.int32),
            token_ids=np.array(tokens, np.int32),
            context_lens=np.array(contexts, np.int32),
            sampled=np.array(sampled, np.bool_),
            page_delta=np.array(self.deltas, np.int32).reshape(-1, 3),
            joined=tuple(self.joining),
        )
        self.step, self.joining, self.deltas = self.step + 1, [], []
        return made

    def launch(self, *feeds: Feed) -> tuple[StepPlan, Pending]:
        plan = self.plan(*feeds)
        return plan, self.executor.launch(plan)

    def commit(self, plan: StepPlan, result: StepResult) -> None:
        assert result.step == plan.step
        for row, slot in enumerate(plan.slots.tolist()):
            assert (result.token_ids[row] >= 0) == plan.sampled[row]
            if plan.sampled[row]:
                self.ids[slot].append(int(result.token_ids[row]))

    def run(self, *feeds: Feed) -> StepResult:
        plan, pending = self.launch(*feeds)
        result = pending.result()
        self.commit(plan, result)
        return result

    def generate(self, slots: list[int], tokens: int, *, chunk: int = 10**6) -> None:
        """Feed prompts in chunks and decode until every slot has `tokens` new ones."""
        while True:
            feeds = []
            for slot in slots:
                left = len(self.ids[slot]) - self.fed[slot]
                if len(self.ids[slot]) - self.prompts[slot] < tokens:
                    feeds.append(Feed(slot, min(chunk, left)))
            if not feeds:
                return
            self.run(*feeds)

    def output(self, slot: int) -> list[int]:
        return self.ids[slot][self.prompts[slot] :]

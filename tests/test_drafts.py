"""Guesses by n-grams: the longest match among the latest, looked up in the text alone."""

from __future__ import annotations

import time

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed._core import Scheduler

GRAM, PLACES_MAX, MATCH_MAX = 3, 4, 32
"""Tokens that must match, places that are compared, and up to what a longer match is better."""

TEXTS = st.lists(st.integers(0, 2), max_size=40)
ONE = np.zeros(1, np.int64)


def slow(ids: list[int], tokens_max: int) -> list[int]:
    """The same by looking at everything."""
    end = len(ids)
    places = [p for p in range(end - 1, GRAM - 1, -1) if ids[p - GRAM : p] == ids[end - GRAM :]]
    if end < GRAM or not places:
        return []

    def match(place: int) -> int:
        return max(n for n in range(GRAM, min(place, MATCH_MAX) + 1)
                   if ids[place - n : place] == ids[end - n :])  # fmt: skip

    best = max(places[:PLACES_MAX], key=match)
    text = list(ids)
    for _ in range(tokens_max):
        text.append(text[best + len(text) - end])
    return text[end:]


class Writer:
    """One request, whose tokens are told, and what is planned behind each."""

    def __init__(self, prompt: list[int], tokens_max: int = 5) -> None:
        self.scheduler = Scheduler(
            page_size=16, pages=8192, slots=1, step_tokens=60_000, context_max=60_000,
            draft_tokens=tokens_max,
        )  # fmt: skip
        self.scheduler.submit(0, np.array(prompt, np.int32), 1000)
        self.planned: list[int] = []
        self._plan()

    def _plan(self) -> None:
        plan = self.scheduler.plan()
        assert plan is not None
        self._step, self._drafts = plan.step, int(plan.drafts[0])
        self.planned = plan.token_ids[len(plan.token_ids) - self._drafts :].tolist()

    def say(self, token: int) -> list[int]:
        """What is guessed behind it; the drafts before it were wrong, or right and dropped."""
        tokens = np.array([token, *[-1] * self._drafts], np.int32)
        self.scheduler.commit(self._step, tokens, np.zeros(1, np.bool_))
        self.guesses = self.scheduler.guess(ONE)
        self._plan()
        assert len(self.planned) == self.guesses
        return self.planned


@given(prompt=TEXTS, output=TEXTS, tokens_max=st.integers(0, 6))
def test_guesses_are_those_of_a_search_through_the_text(
    prompt: list[int], output: list[int], tokens_max: int
) -> None:
    text = [0, *prompt]
    writer = Writer(text, tokens_max)
    for token in output:
        text.append(token)
        assert writer.say(token) == slow(text, tokens_max)


def test_a_period_goes_on() -> None:
    assert Writer([7, 1, 2, 1, 2]).say(1) == [2, 1, 2, 1, 2]


def test_the_longest_of_several_matches_wins() -> None:
    text = [5, 1, 2, 3, 8, 6, 1, 2, 3, 9, 5, 1, 2]
    assert Writer(text, 1).say(3) == [8]


def test_a_new_end_says_nothing() -> None:
    assert Writer([1, 2, 3]).say(4) == []
    assert Writer([1]).say(1) == []


def test_many_runs_and_one_run_many_times_are_found() -> None:
    ids = np.random.default_rng(1).permutation(50_000).tolist()
    assert Writer([*ids, *ids[:20]]).say(ids[20]) == ids[21:26]
    assert Writer([3] * 50_000).say(3) == [3] * 5


def test_the_cost_of_a_step_is_that_of_its_tokens() -> None:
    """Of the first guess that of the prompt: some milliseconds for 50,000 tokens."""
    writer = Writer(np.random.default_rng(1).integers(0, 50_000, 50_000).tolist())
    writer.say(1)
    spent_s = []
    for token in range(50):
        start_s = time.thread_time()
        writer.scheduler.guess(ONE)
        spent_s.append(time.thread_time() - start_s)
        writer.say(token)
    assert sorted(spent_s)[25] < 1e-4, "a guess looks at the whole prompt"

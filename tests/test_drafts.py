"""Guesses by n-grams: the longest match among the latest, looked up in the text alone."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.text.drafts import GRAM, MATCH_MAX, PLACES_MAX, NgramDrafter

TEXTS = st.lists(st.integers(0, 2), max_size=40)


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


@given(prompt=TEXTS, output=TEXTS, tokens_max=st.integers(0, 6))
def test_guesses_are_those_of_a_search_through_the_text(
    prompt: list[int], output: list[int], tokens_max: int
) -> None:
    drafter = NgramDrafter(prompt)
    for at, token in enumerate(output):
        assert drafter.guess(tokens_max) == slow(prompt + output[:at], tokens_max)
        drafter.extend([token])
    assert drafter.guess(tokens_max) == slow(prompt + output, tokens_max)


def test_a_period_goes_on() -> None:
    assert NgramDrafter([7, 1, 2, 1, 2, 1]).guess(5) == [2, 1, 2, 1, 2]


def test_the_longest_of_several_matches_wins() -> None:
    text = [5, 1, 2, 3, 8, 6, 1, 2, 3, 9, 5, 1, 2, 3]
    assert NgramDrafter(text).guess(1) == [8]


def test_a_new_end_says_nothing() -> None:
    assert NgramDrafter([1, 2, 3, 4]).guess(4) == []
    assert NgramDrafter([]).guess(4) == []

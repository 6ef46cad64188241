"""Drafts without a model: what followed the last time that the text ended as it does now.

Rule: a drafter only guesses. Whatever it says, the output is the one of no drafts; a wrong guess
costs a row's positions, a right one saves a step.

Text is looked up in the request's own context (prompt lookup: Saxena, 2023; Yang et al., "Inference
with reference", 2023). Runs of `GRAM` tokens are hashed to where they ended last, and each place to
the one before it, so that a token costs the same whatever the context: one entry, and a comparison
with the `PLACES_MAX` latest places, of which the longest match wins.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import final

__all__ = ["GRAM", "NgramDrafter"]

GRAM = 3
"""Tokens that must match before anything is guessed."""

PLACES_MAX = 4
"""Earlier places that are compared with the end."""

MATCH_MAX = 32
"""Tokens up to which a longer match is a better one."""

Gram = tuple[int, ...]


@final
class NgramDrafter:
    """Guesses for one request; it sees each token once.

    Args:
        prompt_ids: the text so far.
    """

    def __init__(self, prompt_ids: Sequence[int]) -> None:
        self._ids: list[int] = []
        self._ended: dict[Gram, int] = {}  # where a run ended last: the index after it
        self._before: dict[int, int] = {}  # of such a place, the one before it
        self.extend(prompt_ids)

    def extend(self, token_ids: Sequence[int]) -> None:
        """The text goes on with these."""
        ids = self._ids
        for token in token_ids:
            end = len(ids)  # a run is entered when something follows it
            if end >= GRAM:
                gram = tuple(ids[end - GRAM :])
                earlier = self._ended.get(gram)
                if earlier is not None:
                    self._before[end] = earlier
                self._ended[gram] = end
            ids.append(token)

    def guess(self, tokens_max: int) -> list[int]:
        """What may come next, at most so many tokens; none if the end of the text is new."""
        ids = self._ids
        place = self._ended.get(tuple(ids[-GRAM:])) if len(ids) >= GRAM else None
        best, longest = None, 0
        for _ in range(PLACES_MAX):
            if place is None:
                break
            length = self._match(place)
            if length > longest:
                best, longest = place, length
            place = self._before.get(place)
        if best is None:
            return []
        out: list[int] = []
        for at in range(best, best + tokens_max):  # of a period, the guesses go on themselves
            out.append(ids[at] if at < len(ids) else out[at - len(ids)])
        return out

    def _match(self, place: int) -> int:
        """How many tokens before a place are those at the end of the text, up to MATCH_MAX."""
        ids, end = self._ids, len(self._ids)
        most = min(place, MATCH_MAX)
        return next((n for n in range(GRAM, most) if ids[place - 1 - n] != ids[end - 1 - n]), most)

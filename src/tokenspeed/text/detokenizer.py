"""Ids to text as they come, cut at stop strings.

Rule: what is handed out is final. An incomplete character waits for its other bytes, and text that
could still become a stop string waits until it cannot; nothing else waits. Cost is O(1) a token.
"""

from __future__ import annotations

import codecs
from typing import final

from attrs import frozen

from tokenspeed.text.tokenizer import Tokenizer

__all__ = ["Detokenizer", "Piece"]


@final
@frozen
class Piece:
    """What a token released.

    Attributes:
        text: characters that are final now.
        tokens: pushed tokens whose text is out entirely with this piece, oldest first.
        stopped: a stop string was found; the text ends before it.
    """

    text: str
    tokens: int
    stopped: bool = False


@final
class Detokenizer:
    """The text of one sequence.

    Args:
        tokenizer: gives the bytes of each id.
        stop: the text ends before the first of these.
        skip_special: special tokens have no text.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: tuple[str, ...] = (), *, skip_special: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._stop = stop
        self._skip = frozenset(tokenizer.special) if skip_special else frozenset()
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""
        self._waiting = 0
        self.stopped = False

    def push(self, token_id: int) -> Piece:
        """Take the next id."""
        data = b"" if token_id in self._skip else self._tokenizer.piece(token_id)
        self._held += self._decoder.decode(data)
        self._waiting += 1
        return self._release()

    def flush(self) -> str:
        """The end of the sequence: what still waits, unless a stop string ended it."""
        if self.stopped:
            return ""
        self._held += self._decoder.decode(b"", final=True)
        at = self._match()
        text, self._held, self._waiting = self._held[:at], "", 0
        return text

    def _release(self) -> Piece:
        at = self._match()
        if at is not None:
            self.stopped = True
            text, self._held = self._held[:at], ""
            return Piece(text, self._take_waiting(), stopped=True)
        keep = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        text = self._held[: len(self._held) - keep]
        self._held = self._held[len(text) :]
        # getstate holds the bytes of an incomplete character.
        whole = not self._held and not self._decoder.getstate()[0]
        return Piece(text, self._take_waiting() if whole else 0)

    def _take_waiting(self) -> int:
        tokens, self._waiting = self._waiting, 0
        return tokens

    def _match(self) -> int | None:
        """Where the first stop string in the held text starts, or None."""
        found = [at for stop in self._stop if (at := self._held.find(stop)) >= 0]
        return min(found, default=None)


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that `stop` starts with."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if stop.startswith(text[-length:]):
            return length
    return 0

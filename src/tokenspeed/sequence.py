"""A live request as the engine follows it: what has been sampled, and what is yet to be told.

Rule: ids and log-probabilities are withheld until their text is whole, and leave with it.
"""

from __future__ import annotations

from collections import deque
from typing import Self, final

from attrs import define, field

from tokenspeed.request import Delta, FinishReason, Request, TokenLogprob, Usage
from tokenspeed.stream import Stream
from tokenspeed.text import Detokenizer, Tokenizer

__all__ = ["LiveSequence"]


@final
@define(eq=False)
class LiveSequence:
    """The engine's own record of a live request.

    Attributes:
        stop_ids: ids that end it.
        cached_tokens: of the prompt, found in the prefix cache when it first ran.
    """

    number: int
    request: Request
    stream: Stream
    detokenizer: Detokenizer
    stop_ids: frozenset[int]
    cached_tokens: int = 0
    output_ids: list[int] = field(factory=list)
    withheld_ids: deque[int] = field(factory=deque)
    withheld_logprobs: deque[TokenLogprob] = field(factory=deque)

    @property
    def hints(self) -> tuple[str, int, bool, int]:
        """Its session's key, microseconds to keep, whether it supersedes; its priority."""
        session, priority = self.request.session, self.request.priority
        if session is None:
            return ("", 0, False, priority)
        return (session.key, round(session.ttl_s * 1e6), session.supersedes, priority)

    @classmethod
    def start(cls, number: int, request: Request, stream: Stream, tokenizer: Tokenizer) -> Self:
        """A request that has said nothing yet."""
        params = request.params
        ends = () if params.ignore_eos else tokenizer.eos_ids
        return cls(
            number=number,
            request=request,
            stream=stream,
            detokenizer=Detokenizer(tokenizer, params.stop),
            stop_ids=frozenset((*ends, *params.stop_token_ids)),
        )

    def take(
        self, token: int, logprobs: tuple[float, tuple[int, ...], tuple[float, ...]] | None
    ) -> None:
        """It says this token; with log-probabilities, if they are asked for: see StepResult."""
        self.output_ids.append(token)
        self.withheld_ids.append(token)
        if logprobs is not None:
            chosen, ids, values = logprobs
            top = tuple(zip(ids, values, strict=True))
            self.withheld_logprobs.append(TokenLogprob(token, chosen, top))

    def delta(self, text: str, tokens: int) -> Delta:
        """A piece of text with the tokens behind it."""
        logprobs = self.withheld_logprobs
        return Delta(
            text=text,
            token_ids=tuple(self.withheld_ids.popleft() for _ in range(tokens)),
            logprobs=tuple(logprobs.popleft() for _ in range(min(tokens, len(logprobs)))),
        )

    def last(self, text: str, reason: FinishReason, error: str | None) -> Delta:
        """The delta that ends it: this text, whatever was withheld, and the usage."""
        if not self.detokenizer.stopped:
            text += self.detokenizer.flush()
        rest = self.delta(text, len(self.withheld_ids))
        return Delta(
            text=rest.text,
            token_ids=rest.token_ids,
            logprobs=rest.logprobs,
            finish_reason=reason,
            usage=self._usage(),
            error=error,
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=len(self.request.prompt_ids),
            completion_tokens=len(self.output_ids),
            cached_tokens=self.cached_tokens,
        )

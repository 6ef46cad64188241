"""What a model can serve: a request is held against it, and settled, before it is queued.

Rule: nothing is decided here that depends on who else is there.
"""

from __future__ import annotations

import secrets
from typing import final

import attrs
from attrs import frozen

from tokenspeed.errors import RequestError
from tokenspeed.request import Request

__all__ = ["Bounds"]


@final
@frozen
class Bounds:
    """Of the requests that an engine takes.

    Attributes:
        vocab_size: token ids lie below it.
        context_max: prompt and output tokens of a request together.
    """

    vocab_size: int
    context_max: int

    def settle(self, request: Request) -> Request:
        """The request with a seed and a length.

        Raises:
            RequestError: it can never be served; names the field.
        """
        self._check_ids(request)
        params = request.params
        room = self.context_max - len(request.prompt_ids)
        if room < 1 or (params.max_tokens or 1) > room:
            raise RequestError(
                "max_tokens" if room >= 1 else "prompt",
                f"the prompt has {len(request.prompt_ids)} tokens and max_tokens is "
                f"{params.max_tokens}; together they may be at most {self.context_max}: shorten "
                "one of them",
                code="context_length_exceeded",
            )
        seed = secrets.randbits(62) if params.seed is None else params.seed
        settled = attrs.evolve(params, seed=seed, max_tokens=params.max_tokens or room)
        return attrs.evolve(request, params=settled)

    def _check_ids(self, request: Request) -> None:
        prompt, params, last = request.prompt_ids, request.params, self.vocab_size - 1
        if not prompt:
            raise RequestError("prompt", "prompt: got no tokens; expected at least one")
        bad = next((t for t in prompt if not 0 <= t <= last), None)
        if bad is not None:
            raise RequestError("prompt", f"prompt: got token id {bad}; expected 0 to {last}")
        for name, ids in (
            ("logit_bias", params.logit_bias),
            ("stop_token_ids", params.stop_token_ids),
        ):
            if any(not 0 <= t <= last for t in ids):
                raise RequestError(name, f"{name}: token ids must lie in 0 to {last}")

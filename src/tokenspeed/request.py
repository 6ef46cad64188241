"""A request, what it asks of the sampler, and what comes back: frozen values without behaviour.

Rule: nothing here knows text, tensors or time; ids are vocabulary indices, counts are tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

from attrs import field, frozen

from tokenspeed.errors import RequestError

__all__ = [
    "LOGPROBS_MAX",
    "PRIORITY_MAX",
    "SESSION_NAME_MAX",
    "STOP_MAX",
    "Completion",
    "Delta",
    "FinishReason",
    "Request",
    "SamplingParams",
    "Session",
    "TokenLogprob",
    "Usage",
    "session_key",
    "shown",
]

FinishReason = Literal["stop", "length", "abort", "error"]

LOGPROBS_MAX = 20
PRIORITY_MAX = 100
STOP_MAX = 4
SESSION_NAME_MAX = 256
SESSION_TTL_MAX_S = 30 * 24 * 3600.0
_SEED_MAX = 2**63 - 1

_Validator = Callable[[Any, Any, Any], None]


def _strings(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(values)


def _ids(values: Iterable[int]) -> tuple[int, ...]:
    return tuple(values)


def shown(value: object) -> str:
    """A value for a message: huge integers cannot even be printed."""
    if isinstance(value, int) and value.bit_length() > 64:
        return f"an integer of {value.bit_length()} bits"
    return repr(value)[:64]


def _number(
    low: float, high: float, *, integer: bool = False, optional: bool = False
) -> _Validator:
    """A validator: a finite number (never a bool) within [low, high]."""
    kind = "an integer" if integer else "a number"

    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if optional and value is None:
            return
        number = isinstance(value, int if integer else (int, float)) and not isinstance(value, bool)
        # Comparing is exact for integers of any size and false for NaN; math.isfinite overflows.
        if not number or not low <= value <= high:
            raise RequestError(
                attribute.name,
                f"{attribute.name}: got {shown(value)}; expected {kind} from {low:g} to {high:g}",
            )

    return check


@frozen(kw_only=True)
class SamplingParams:
    """How the tokens of one sequence are chosen. Raises RequestError naming the field.

    Attributes:
        temperature: 0 is greedy; otherwise logits are divided by it. 0 to 2.
        top_p: keep the smallest set of tokens with at least this probability. (0, 1].
        top_k: keep this many tokens; 0 keeps all.
        min_p: drop tokens below this share of the most probable one. [0, 1].
        seed: makes the sequence repeatable: its random numbers depend on (seed, position) alone,
            not on what else is in the batch. None draws a seed when the request is submitted.
        presence_penalty: subtracted once from the logit of each token already generated. [-2, 2].
        frequency_penalty: subtracted per occurrence among the generated tokens. [-2, 2].
        repetition_penalty: divides (or, if negative, multiplies) logits of tokens in the prompt or
            the output; 1 is off (Keskar et al., 2019, section 4.1).
        logit_bias: token id -> added to its logit before everything else. [-100, 100].
        max_tokens: generate at most this many tokens; None: as many as the context holds.
        min_tokens: stop tokens are not sampled before this many tokens.
        stop: the text ends before the first of these strings.
        stop_token_ids: ids that end the sequence, beside the model's own end tokens.
        ignore_eos: the model's own end tokens do not end the sequence.
        logprobs: None for none; k >= 0: the log-probability of the chosen token and of the k most
            probable ones, of the model's own distribution (before temperature and penalties).
    """

    temperature: float = field(default=1.0, validator=_number(0.0, 2.0))
    top_p: float = field(default=1.0, validator=_number(1e-6, 1.0))
    top_k: int = field(default=0, validator=_number(0, 2**31 - 1, integer=True))
    min_p: float = field(default=0.0, validator=_number(0.0, 1.0))
    seed: int | None = field(
        default=None, validator=_number(-_SEED_MAX, _SEED_MAX, integer=True, optional=True)
    )
    presence_penalty: float = field(default=0.0, validator=_number(-2.0, 2.0))
    frequency_penalty: float = field(default=0.0, validator=_number(-2.0, 2.0))
    repetition_penalty: float = field(default=1.0, validator=_number(1e-2, 10.0))
    logit_bias: Mapping[int, float] = field(factory=dict)
    max_tokens: int | None = field(
        default=None, validator=_number(1, 2**31 - 1, integer=True, optional=True)
    )
    min_tokens: int = field(default=0, validator=_number(0, 2**31 - 1, integer=True))
    stop: tuple[str, ...] = field(default=(), converter=_strings)
    stop_token_ids: tuple[int, ...] = field(default=(), converter=_ids)
    ignore_eos: bool = False
    logprobs: int | None = field(
        default=None, validator=_number(0, LOGPROBS_MAX, integer=True, optional=True)
    )

    @logit_bias.validator
    def _check_logit_bias(self, _attribute: Any, value: Mapping[int, float]) -> None:
        if len(value) > 1024:
            raise RequestError("logit_bias", f"logit_bias: got {len(value)} entries; at most 1024")
        for token, bias in value.items():
            if not -100 <= bias <= 100:
                raise RequestError(
                    "logit_bias", f"logit_bias[{token}]: got {shown(bias)}; expected -100 to 100"
                )

    @stop.validator
    def _check_stop(self, _attribute: Any, value: tuple[str, ...]) -> None:
        if len(value) > STOP_MAX or not all(isinstance(s, str) and s for s in value):
            raise RequestError(
                "stop",
                f"stop: got {len(value)} entries; expected up to {STOP_MAX} non-empty strings",
            )


def _name(_instance: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or not 1 <= len(value) <= SESSION_NAME_MAX:
        raise RequestError(
            attribute.name,
            f"{attribute.name}: got {shown(value)}; expected a string of 1 to {SESSION_NAME_MAX} "
            "characters",
        )


def session_key(owner: str, name: str) -> str:
    """What the scheduler knows a session by: the owner's length tells where the name begins."""
    return f"{len(owner)}:{owner}{name}"


@frozen(kw_only=True)
class Session:
    """The session that a request is a turn of. It decides what leaves the cache first, no more.

    Attributes:
        name: the same in all of its turns.
        owner: whose session it is: those of different owners have nothing to do with each other,
            whatever their names.
        ttl_s: once the turn has ended, its cached pages go after everybody else's for so long, if
            the engine's `session_pages_max` leaves room for all of them. 0: by what is learned.
        supersedes: the turn before is of no use any more: it is aborted if it still waits or runs,
            and what it alone had cached goes first.
    """

    name: str = field(validator=_name)
    ttl_s: float = field(default=0.0, validator=_number(0.0, SESSION_TTL_MAX_S))
    supersedes: bool = False
    owner: str = ""

    @property
    def key(self) -> str:
        """Of no other session."""
        return session_key(self.owner, self.name)


@frozen(kw_only=True)
class Request:
    """One sequence to generate.

    Attributes:
        prompt_ids: the prompt, at least one id.
        params: how to sample.
        salt: requests share cached pages only with requests of the same salt.
        session: that it is a turn of, or None.
        priority: lower comes earlier, as in vLLM: for each step that it is lower, a request goes
            ahead of 16 that arrived before it, and of no more. -100 to 100.
    """

    prompt_ids: tuple[int, ...] = field(converter=_ids)
    params: SamplingParams = field(factory=SamplingParams)
    salt: str = ""
    session: Session | None = None
    priority: int = field(default=0, validator=_number(-PRIORITY_MAX, PRIORITY_MAX, integer=True))


@frozen
class TokenLogprob:
    """A chosen token, its log-probability, and the most probable alternatives, best first."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@frozen(kw_only=True)
class Usage:
    """Tokens of one sequence. `cached_tokens` of the prompt came from the prefix cache."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0


@frozen(kw_only=True)
class Delta:
    """What one step added to a sequence; the last one has a finish reason and the usage.

    Attributes:
        text: whole characters; an incomplete UTF-8 tail or a possible stop string waits.
        token_ids: the ids behind this delta (those of withheld text come with their text).
        logprobs: one entry an id, where asked for.
        finish_reason: None until the last delta.
        usage: with the last delta.
        error: with finish reason "error": what happened; with "abort": why, unless its reader
            wished it or the engine ends.
    """

    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    error: str | None = None


@frozen(kw_only=True)
class Completion:
    """A finished sequence: all of its deltas joined."""

    text: str
    token_ids: tuple[int, ...]
    finish_reason: FinishReason
    usage: Usage
    logprobs: tuple[TokenLogprob, ...] = ()

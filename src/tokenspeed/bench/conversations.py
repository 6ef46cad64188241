"""Conversations to replay: recorded ones of coding agents, or generated ones of the same form.

Rule: a prompt is a list of blocks of 64 tokens, each named by what it and all before it hold, so
that two prompts share a prefix exactly as far as their lists are equal. No text is needed, and none
is here. Names are numbers that no two conversations share.

A recording is a line of JSON a session (gzip or plain), in the compact form of the coding-agent
traces: of `requests`, each has `t` (seconds since the start of its list), `in` and `out` (tokens),
`think_time` (seconds since the answer before), `api_time`, `stop`, and the prompt's blocks as
`h = [kept, [[first, count], ...]]`: so many of the request before, then runs of consecutive names.
A request with `requests` of its own is a nested conversation that starts at its `t`.
"""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from attrs import frozen
from numpy.typing import NDArray

from tokenspeed.errors import ConfigError

__all__ = ["BLOCK", "Conversation", "Turn", "generate", "live_blocks", "read"]

BLOCK = 64
"""Tokens."""

Names = NDArray[np.int32]


@frozen(eq=False)
class Turn:
    """A request of a conversation.

    Attributes:
        at_s: when it came, since the start of the conversation, when it was recorded.
        think_s: between the answer before and this request: a tool ran, or a person read.
        kept: leading blocks of the turn before that this prompt begins with.
        fresh: the blocks after them.
        blocks: of the prompt, both together.
        answer_blocks: that are generated.
        awaits_tool: the answer calls a tool.
    """

    at_s: float
    think_s: float
    kept: int
    fresh: Names
    answer_blocks: int
    awaits_tool: bool

    @property
    def blocks(self) -> int:
        """See the class."""
        return self.kept + len(self.fresh)


@frozen(eq=False)
class Conversation:
    """Turns, of which each waits for the answer to the one before."""

    start_s: float
    turns: tuple[Turn, ...]


def read(path: Path, gap_s: float, sessions_max: int | None) -> list[Conversation]:
    """A recording's conversations, one session beginning every `gap_s`.

    Raises:
        ConfigError: the file cannot be read, or a line has another form; it is named.
    """
    found: list[Conversation] = []
    base = 0
    for number, session in enumerate(_lines(path)):
        if sessions_max is not None and number >= sessions_max:
            break
        try:
            conversations, base = _session(session, number * gap_s, base)
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise ConfigError(f"{path}:{number + 1}", repr(error), "a recorded session") from error
        found += conversations
    if not found:
        raise ConfigError("trace", str(path), "at least one session with requests")
    return found


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as lines:
            for number, line in enumerate(lines, 1):
                try:
                    yield msgspec.json.decode(line, type=dict[str, Any])
                except msgspec.MsgspecError as error:
                    raise ConfigError(f"{path}:{number}", line[:80], "an object of JSON") from error
    except (OSError, UnicodeDecodeError, EOFError) as error:
        raise ConfigError("trace", str(path), f"a file that can be read: {error}") from error


def _session(session: dict[str, Any], start_s: float, base: int) -> tuple[list[Conversation], int]:
    """A session's conversations, and the first name that is free after it."""
    found: list[Conversation] = []
    highest = 0
    pending = [(start_s, session["requests"])]
    while pending:
        begins_s, requests = pending.pop(0)
        nested = [r for r in requests if isinstance(r.get("requests"), list)]
        pending += [(begins_s + r["t"], r["requests"]) for r in nested]
        turns = list(_turns(requests, base))
        if turns:
            found.append(Conversation(begins_s + turns[0].at_s, tuple(turns)))
            highest = max(highest, *(int(t.fresh.max(initial=0)) for t in turns))
    return found, max(base, highest + 1)


def _turns(requests: Sequence[dict[str, Any]], base: int) -> Iterator[Turn]:
    answered_s = 0.0
    length = 0
    for request in requests:
        if "h" not in request or request["in"] < BLOCK:
            continue
        kept, runs = request["h"]
        if not 0 <= kept <= length:
            raise ValueError(f"keeps {kept} blocks of {length}")
        fresh = [np.arange(first, first + count) for first, count in runs]
        names = np.concatenate([np.empty(0, np.int64), *fresh]).astype(np.int32) + base
        at_s = float(request["t"])
        think_s = request.get("think_time")
        yield Turn(
            at_s=at_s,
            think_s=max(0.0, at_s - answered_s) if think_s is None else float(think_s),
            kept=kept,
            fresh=names,
            answer_blocks=max(1, -(-int(request["out"]) // BLOCK)),
            awaits_tool=_calls_tool(request),
        )
        answered_s = at_s + float(request.get("api_time") or 0.0)
        length = kept + len(names)


def _calls_tool(request: dict[str, Any]) -> bool:
    stop = request.get("stop")
    return stop == "tool_use" or (not stop and "tool_use" in request.get("output_types", ()))


def generate(sessions: int, gap_s: float) -> list[Conversation]:
    """Conversations whose figures are like the recorded ones', the same in every run.

    Four of five turns call a tool, which answers in some ten seconds at the pace of its session;
    people take a minute or an hour. A prompt begins with 200 to 400 blocks and grows with each turn
    by a few, now and then by many; one turn in forty goes back to a shorter prefix.
    """
    rng = np.random.default_rng(4)
    found, base = [], 0
    for number in range(sessions):
        turns: list[Turn] = []
        pace_s = rng.lognormal(2.0, 0.7)
        at_s, length, awaits = 0.0, 0, False
        for at in range(int(rng.geometric(1 / 60))):
            think_s = rng.lognormal(np.log(pace_s), 0.8) if awaits else rng.lognormal(4.5, 1.6)
            kept = int(length * rng.uniform(0.1, 0.5)) if rng.random() < 1 / 40 else length
            new = int(rng.integers(200, 400)) if at == 0 else 1 + int(rng.lognormal(2.2, 1.3))
            fresh = np.arange(base, base + new, dtype=np.int32)
            awaits = bool(rng.random() < 0.8)
            at_s += think_s if at else 0.0
            answer = 1 + int(rng.lognormal(1.0, 0.8))
            turns.append(Turn(at_s, think_s if at else 0.0, kept, fresh, answer, awaits))
            base, length = base + new, kept + new
        found.append(Conversation(number * gap_s, tuple(turns)))
    return found


def live_blocks(conversations: Sequence[Conversation]) -> float:
    """Blocks of the last prompts of all conversations under way: the mean over requests.

    A conversation is under way from its first request to its last, by the recorded times.
    """
    arrivals = sorted(
        (c.start_s + turn.at_s - c.turns[0].at_s, number, at)
        for number, c in enumerate(conversations)
        for at, turn in enumerate(c.turns)
    )
    live, total, seen = 0, 0, [0] * len(conversations)
    for _, number, at in arrivals:
        turns = conversations[number].turns
        live += turns[at].blocks - seen[number]
        seen[number] = turns[at].blocks
        total += live
        if at + 1 == len(turns):
            live -= seen[number]
    return total / len(arrivals)

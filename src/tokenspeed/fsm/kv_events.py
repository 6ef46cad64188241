"""`tokenspeed monitor`: an engine's KV events, checked against the page rules of the spec.

Rule: an adapter says what an engine reports, in the vocabulary below; `KVMonitor` alone judges. It
reports what must be wrong and nothing that only may be: where events are missing (a gap, a line
that cannot be read, a subscriber that came late) it forgets what it cannot know any more.

    EVENTS ─ decode ─► record ─ Adapter.read ─► Batch, Publish, Evict, Clear
                                                  └─ KVMonitor ─► Violation

The rules, by the invariants' names:

    OneCopyPerKey    a key is stored again only after it was evicted
    FreeUnique       a key is evicted once a store; twice is a double free
    AccountingExact  what is evicted was stored; no more pages are stored than there are
    NoDangling       a key's parent is there when it is stored, and is not evicted before it
    KeyInjective     a key stands for the same parent, tokens and fields for ever
    ContentMatches   a key stands for as many tokens as its page holds
    EpochMatch       a batch that comes late or twice does nothing
    SequenceGap      no batch is missing

An adapter is a policy and one function. This is a whole one:

    class Ours:
        policy = Policy()

        def read(self, record: Any) -> Iterator[Event]:
            yield Batch(record["n"])
            for kind, key, *rest in record["pages"]:
                if kind == "+":
                    parent, tokens = rest
                    yield Publish(key, parent, tuple(tokens))
                else:
                    yield Evict(key)
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, final

import msgspec
from attrs import asdict, define, field, frozen

from tokenspeed.errors import ConfigError

__all__ = [
    "DEVICE",
    "Adapter",
    "BadLine",
    "Batch",
    "Clear",
    "Event",
    "Evict",
    "KVMonitor",
    "Policy",
    "Publish",
    "Report",
    "Violation",
    "messages",
    "monitor",
]

DEVICE = "GPU"
"""The place of pages whose place an engine does not name."""

KEPT_MAX = 100
"""Violations and bad lines that a report spells out; all are counted."""


# --- The vocabulary -------------------------------------------------------------------------------


@frozen
class Batch:
    """What follows on this line is one batch of one source.

    Attributes:
        number: position in the source's sequence, from 0; None if the engine does not number.
        source: who speaks: a rank with caches of its own.
    """

    number: int | None = None
    source: str = ""


@frozen
class Publish:
    """A page may be found by its key from here on.

    Attributes:
        key: the engine's name of the page's content and of all that precedes it.
        parent: the key of the page before; None for the first.
        tokens: what the page holds; None if the engine does not say, and then nothing that the key
            stands for is compared.
        fields: what else the key stands for (LoRA, salt, media), by name.
        size: tokens that a page holds; None if the engine does not say.
        place: the memory that the page lies in; each has keys of its own.
    """

    key: Hashable
    parent: Hashable | None
    tokens: tuple[object, ...] | None
    fields: Mapping[str, object] = field(factory=dict)
    size: int | None = None
    place: str = DEVICE


@frozen
class Evict:
    """A page that was published is not to be found any more."""

    key: Hashable
    place: str = DEVICE


@frozen
class Clear:
    """All pages of a place are evicted at once."""

    place: str = DEVICE


Event = Batch | Publish | Evict | Clear


@frozen
class Policy:
    """What an engine promises. What it does not promise is counted apart, not held against it.

    Attributes:
        one_copy: a key is stored again only after it was evicted. Otherwise each store is a copy of
            its own, and each eviction takes one away.
        leaves_first: a key is evicted after all keys that were stored under it. The order within
            one line is free.
    """

    one_copy: bool = True
    leaves_first: bool = True


class Adapter(Protocol):
    """An engine's events in our vocabulary. See the module's docstring for a whole one."""

    @property
    def policy(self) -> Policy:
        """What the engine promises."""

    def read(self, record: Any) -> Iterable[Event]:
        """The events of one line of JSON, or of one MessagePack value, decoded.

        Raises:
            ValueError, LookupError, TypeError: the record is none of the engine's; the message says
                why. The line is then counted as bad, and none of its events is applied.
        """


@frozen
class Violation:
    """A rule that the events on a line break.

    Attributes:
        line: from 1; in a MessagePack file the number of the value.
        rule: the invariant's name.
        sentence: what happened, in words.
        allowed: the engine's policy permits it, though the spec does not.
    """

    line: int
    rule: str
    sentence: str
    allowed: bool = False


# --- The judge ------------------------------------------------------------------------------------


@define
class _Resident:
    """A key that is stored: since which line, in how many copies, under which parent."""

    line: int
    copies: int
    parent: Hashable | None


@define
class _Pool:
    """The pages of one place. `partial`: pages may be stored that we have not heard of."""

    partial: bool
    resident: dict[Hashable, _Resident] = field(factory=dict)
    gone: dict[Hashable, int] = field(factory=dict)
    children: Counter[Hashable] = field(factory=Counter)
    told: dict[Hashable, tuple[int, Publish]] = field(factory=dict)
    pages: int = 0

    def empty(self, line: int) -> None:
        """Everything is evicted."""
        self.gone |= dict.fromkeys(self.resident, line)
        self.resident.clear()
        self.children.clear()
        self.pages = 0
        self.partial = False

    def lose(self) -> None:
        """Something was missed: only what a key stands for is certain."""
        self.resident.clear()
        self.gone.clear()
        self.children.clear()
        self.pages = 0
        self.partial = True


@define
class _Source:
    """A speaker: the number that its next batch must have, and its pools."""

    partial: bool
    expected: int | None = None
    pools: dict[str, _Pool] = field(factory=dict)

    def pool(self, place: str) -> _Pool:
        if place not in self.pools:
            self.pools[place] = _Pool(self.partial)
        return self.pools[place]

    def lose(self) -> None:
        self.partial = True
        for pool in self.pools.values():
            pool.lose()


@final
class KVMonitor:
    """Follows caches by their events. Memory is proportional to the distinct keys heard of.

    Example:
        >>> monitor = KVMonitor(Policy())
        >>> monitor.feed(1, [Publish("a", None, (1, 2)), Publish("b", "z", (3, 4))])[0].rule
        'NoDangling'

    Args:
        policy: what the engine promises.
        pages: how many pages the device has, if known.
    """

    def __init__(self, policy: Policy, pages: int | None = None) -> None:
        self._policy = policy
        self._pages = pages
        self._sources: dict[str, _Source] = {}
        self._lost = False
        self._line = 0
        self._found: list[Violation] = []

    def feed(self, line: int, events: Iterable[Event]) -> list[Violation]:
        """Follow the events of one line; what is wrong with them, in order."""
        self._line, self._found = line, []
        source = self._source("")
        evicted: list[tuple[_Pool, Hashable]] = []
        for event in events:
            match event:
                case Batch():
                    source = self._source(event.source)
                    if not self._begin(source, event):
                        break
                case Publish():
                    self._publish(source.pool(event.place), event)
                case Evict():
                    pool = source.pool(event.place)
                    self._evict(pool, event.key)
                    evicted.append((pool, event.key))
                case Clear():
                    source.pool(event.place).empty(line)
        for pool, key in evicted:
            self._no_orphans(pool, key)
        return self._found

    def lose(self) -> None:
        """A line could not be read: whatever it said is missed."""
        self._lost = True
        for source in self._sources.values():
            source.lose()
            source.expected = None

    def _source(self, name: str) -> _Source:
        if name not in self._sources:
            self._sources[name] = _Source(self._lost)
        return self._sources[name]

    def _say(self, rule: str, sentence: str, promised: bool = True) -> None:
        self._found.append(Violation(self._line, rule, sentence, allowed=not promised))

    def _begin(self, source: _Source, batch: Batch) -> bool:
        """Whether the batch is to be followed."""
        number, expected = batch.number, source.expected
        if number is None:
            return True
        who = f" of source {batch.source}" if batch.source else ""
        if number == 0:  # the engine starts, or starts again: a new incarnation, with empty caches
            source.pools.clear()
            source.partial = False
        elif expected is None:
            source.lose()
        elif number < expected:
            self._say(
                "EpochMatch",
                f"batch {number}{who} comes late or twice; {expected} was next. It is ignored",
            )
            return False
        elif number > expected:
            missing = f"{expected} to {number - 1}" if number - 1 > expected else f"{expected}"
            self._say("SequenceGap", f"batch {number}{who} comes; missing: {missing}")
            source.lose()
        source.expected = number + 1
        return True

    def _publish(self, pool: _Pool, event: Publish) -> None:
        key, name = event.key, _show(event.key)
        self._same_meaning(pool, event)
        there = pool.resident.get(key)
        if there is not None:
            self._say(
                "OneCopyPerKey",
                f"{name} is stored again; it is there since line {there.line}",
                self._policy.one_copy,
            )
            if self._policy.one_copy:
                return
            there.copies += 1
        else:
            self._parent_is_there(pool, event)
            pool.resident[key] = _Resident(self._line, 1, event.parent)
            pool.gone.pop(key, None)
            pool.children[event.parent] += 1
        pool.pages += 1
        if event.place == DEVICE and self._pages is not None and pool.pages > self._pages:
            self._say(
                "AccountingExact",
                f"{name} is stored in page {pool.pages} of {self._pages}: more than there are",
            )

    def _same_meaning(self, pool: _Pool, event: Publish) -> None:
        """What the key stands for is what it stood for, and fills its page."""
        name = _show(event.key)
        if event.tokens is None:
            return
        if event.size is not None and len(event.tokens) != event.size:
            self._say(
                "ContentMatches",
                f"{name} is stored for {len(event.tokens)} tokens; its page holds {event.size}",
            )
        line, before = pool.told.get(event.key, (self._line, event))
        change = _difference(before, event)
        if change:
            self._say("KeyInjective", f"{name} stands for another page since line {line}: {change}")
        pool.told[event.key] = (self._line, event)

    def _parent_is_there(self, pool: _Pool, event: Publish) -> None:
        parent = event.parent
        if parent is None or parent in pool.resident:
            return
        if parent in pool.gone:
            why = f"was evicted at line {pool.gone[parent]}"
        elif pool.partial:
            return
        else:
            why = "was never stored"
        self._say("NoDangling", f"{_show(event.key)} is stored under {_show(parent)}, which {why}")

    def _evict(self, pool: _Pool, key: Hashable) -> None:
        name, there = _show(key), pool.resident.get(key)
        if there is not None:
            there.copies -= 1
            pool.pages -= 1
            if there.copies == 0:
                del pool.resident[key]
                self._gone(pool, key)
                pool.children[there.parent] -= 1
        elif key in pool.gone:
            self._say(
                "FreeUnique", f"{name} is evicted again; it is gone since line {pool.gone[key]}"
            )
        elif pool.partial:
            self._gone(pool, key)
        else:
            self._say("AccountingExact", f"{name} is evicted; it was never stored")

    def _gone(self, pool: _Pool, key: Hashable) -> None:
        """No copy is left, unless there may be some that we have not heard of."""
        if self._policy.one_copy or not pool.partial:
            pool.gone[key] = self._line

    def _no_orphans(self, pool: _Pool, key: Hashable) -> None:
        """At the end of a line, nothing is left under a key that it evicted."""
        left = pool.children[key]
        if key in pool.gone and left:
            keys = "1 key" if left == 1 else f"{left} keys"
            self._say(
                "NoDangling",
                f"{_show(key)} is evicted; {keys} stored under it stayed",
                self._policy.leaves_first,
            )


def _show(key: Hashable) -> str:
    """A key for a sentence; digests are bytes."""
    return f"key {key.hex() if isinstance(key, bytes) else key}"


def _difference(before: Publish, after: Publish) -> str:
    """The first thing in which two meanings of a key differ; empty if there is none."""
    one = {"parent": before.parent, "tokens": before.tokens, **before.fields}
    two = {"parent": after.parent, "tokens": after.tokens, **after.fields}
    for name in one | two:
        if one.get(name) != two.get(name):
            return f"{name} was {one.get(name)!r} and is {two.get(name)!r}"
    return ""


# --- The command ----------------------------------------------------------------------------------


@frozen
class BadLine:
    """A line that could not be read, and why."""

    line: int
    reason: str


@frozen
class Report:
    """What a file of events says about its engine.

    Attributes:
        lines: lines, or MessagePack values, in the file; blank ones apart.
        events: events that were followed.
        violations: the first `KEPT_MAX` that the policy does not allow, in order.
        counts: rule -> how often it was broken.
        allowed: rule -> how often the spec's rule was broken as the policy allows.
        bad: the first `KEPT_MAX` lines that could not be read.
        bad_lines: how many there were.
    """

    lines: int
    events: int
    violations: tuple[Violation, ...]
    counts: Mapping[str, int]
    allowed: Mapping[str, int]
    bad: tuple[BadLine, ...]
    bad_lines: int

    @property
    def exit_status(self) -> int:
        """0 if every rule holds, 1 if not. That nothing could be read is an error, not a report."""
        return 1 if self.violations else 0

    def json(self) -> dict[str, Any]:
        """For programs; `result` and `violated` as in `tokenspeed check`."""
        first = self.violations[0].rule if self.violations else None
        result = {"result": "invariant" if first else "ok", "violated": first}
        found = [{"line": v.line, "rule": v.rule, "sentence": v.sentence} for v in self.violations]
        return {**result, **asdict(self), "violations": found}


def monitor(
    path: Path, adapter: Adapter, *, policy: Policy | None = None, pages: int | None = None
) -> Report:
    """Check a file of events: NDJSON, or MessagePack values one after the other.

    Args:
        path: the file; which of the two it is, its first byte says.
        adapter: how to read a record; `kv_adapters.ADAPTERS` has some by name.
        policy: judge by this instead of the adapter's; `Policy()` is the spec's own rules.
        pages: how many pages the device has; None leaves that unchecked.

    Raises:
        ConfigError: not one line could be read.
        OSError: the file cannot be opened.
    """
    judge = KVMonitor(policy or adapter.policy, pages)
    violations: list[Violation] = []
    bad: list[BadLine] = []
    counts, allowed = Counter[str](), Counter[str]()
    lines = events = bad_lines = 0
    for line, raw, decode in _records(path):
        lines += 1
        try:  # whole, before any of it is followed
            batch = list(adapter.read(decode(raw)))
        except (
            ValueError, LookupError, TypeError, RecursionError, msgspec.MsgspecError
        ) as error:  # fmt: skip
            bad_lines += 1
            if len(bad) < KEPT_MAX:
                bad.append(BadLine(line, f"{type(error).__name__}: {error}"))
            judge.lose()
            continue
        events += sum(not isinstance(event, Batch) for event in batch)
        for found in judge.feed(line, batch):
            (allowed if found.allowed else counts)[found.rule] += 1
            if not found.allowed and len(violations) < KEPT_MAX:
                violations.append(found)
    if lines == bad_lines:
        why = f"line {bad[0].line}: {bad[0].reason}" if bad else "it is empty"
        raise ConfigError("EVENTS", str(path), f"events that the adapter can read; {why}")
    return Report(lines, events, tuple(violations), counts, allowed, tuple(bad), bad_lines)


def _records(path: Path) -> Iterator[tuple[int, bytes, Callable[[bytes], Any]]]:
    """(number, bytes, decoder) of each record. Text begins in ASCII, a MessagePack batch beyond."""
    with path.open("rb") as file:
        text = file.peek(1)[:1] < b"\x80"
        pieces = file if text else messages(file.read())
        decode = msgspec.json.decode if text else msgspec.msgpack.decode
        for line, raw in enumerate(pieces, 1):
            if raw.strip() or not text:
                yield line, raw, decode


def messages(data: bytes) -> Iterator[bytes]:
    """The MessagePack values of a file; what is cut off at its end is the last."""
    at = 0
    while at < len(data):
        end = min(_end(data, at), len(data))
        yield data[at:end]
        at = end


# Bytes that follow the head of a value: by head, and by the width of the count that comes first.
_FIXED = {0xC0: 0, 0xC2: 0, 0xC3: 0, 0xCA: 4, 0xCB: 8, 0xCC: 1, 0xCD: 2, 0xCE: 4, 0xCF: 8}
_FIXED |= {0xD0: 1, 0xD1: 2, 0xD2: 4, 0xD3: 8, 0xD4: 2, 0xD5: 3, 0xD6: 5, 0xD7: 9, 0xD8: 17}
_BYTES = {0xC4: 1, 0xC5: 2, 0xC6: 4, 0xD9: 1, 0xDA: 2, 0xDB: 4}
_VALUES = {0xDC: (2, 1), 0xDD: (4, 1), 0xDE: (2, 2), 0xDF: (4, 2)}


def _end(data: bytes, at: int) -> int:
    """Where the value that begins at `at` ends: past the end of `data` if that is cut off."""
    pending = 1
    while pending and at < len(data):
        head, at, pending = data[at], at + 1, pending - 1
        if head < 0x80 or head >= 0xE0:
            continue
        if head < 0x90:
            pending += 2 * (head & 0x0F)
        elif head < 0xA0:
            pending += head & 0x0F
        elif head < 0xC0:
            at += head & 0x1F
        elif head in _FIXED:
            at += _FIXED[head]
        elif head in _BYTES:
            width = _BYTES[head]
            at += width + int.from_bytes(data[at : at + width], "big")
        elif head in _VALUES:
            width, each = _VALUES[head]
            pending += each * int.from_bytes(data[at : at + width], "big")
            at += width
        else:  # extensions are in no engine's events: what follows has no known length
            return len(data)
    return at

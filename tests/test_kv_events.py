"""The KV monitor: right streams pass, each wrong one is named by its rule, and nothing is guessed.

A simulated cache makes right streams, larger than a hand would write. Each mutation of one breaks
one rule, and that rule must be named; where lines are lost, nothing may be blamed for it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec
import pytest
from attrs import evolve
from hypothesis import given
from hypothesis import strategies as st

from tokenspeed.errors import ConfigError
from tokenspeed.fsm.kv_adapters import ADAPTERS, VLLM
from tokenspeed.fsm.kv_events import (
    Batch,
    Clear,
    Event,
    Evict,
    KVMonitor,
    Policy,
    Publish,
    Report,
    Violation,
    messages,
    monitor,
)

PAGE_SIZE = 2
Lines = list[list[Event]]


# --- A cache that is right ------------------------------------------------------------------------


class Cache:
    """A tree of pages that evicts leaves; a key is the number of its content."""

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self.numbers: dict[tuple[int, ...], int] = {}
        self.here: dict[tuple[int, ...], int] = {}  # content -> last use
        self.clock = 0

    def key(self, content: tuple[int, ...]) -> int | None:
        return self.numbers.setdefault(content, 100 + len(self.numbers)) if content else None

    def use(self, tokens: Sequence[int]) -> Iterator[Event]:
        """Find or store every page of a prompt, the used pages safe from eviction."""
        self.clock += 1
        for end in range(PAGE_SIZE, min(len(tokens), self.pages * PAGE_SIZE) + 1, PAGE_SIZE):
            content = tuple(tokens[:end])
            if content not in self.here:
                if len(self.here) == self.pages:
                    yield self.evict()
                key = self.key(content)
                parent = self.key(content[:-PAGE_SIZE])
                yield Publish(key, parent, content[-PAGE_SIZE:], size=PAGE_SIZE)
            self.here[content] = self.clock

    def evict(self) -> Evict:
        leaves = {c for c in self.here if all(d[: len(c)] != c or d == c for d in self.here)}
        oldest = min(leaves, key=lambda content: (self.here[content], content))
        del self.here[oldest]
        return Evict(self.numbers[oldest])

    def clear(self) -> Clear:
        self.here.clear()
        return Clear()


@st.composite
def streams(draw: st.DrawFn) -> tuple[Lines, int]:
    """The lines of a right cache, numbered, and how many pages it has."""
    cache = Cache(draw(st.integers(2, 5)))
    prompts = st.lists(st.integers(0, 1), min_size=2, max_size=10)
    lines: Lines = []
    drawn = draw(st.lists(st.one_of(prompts, prompts, prompts, st.none()), min_size=4))
    for prompt in drawn * 2:  # what was evicted comes again
        events = [cache.clear()] if prompt is None else list(cache.use(prompt))
        lines += [[Batch(len(lines)), *events]]
    return lines, cache.pages


def judge(lines: Lines, policy: Policy | None = None, pages: int | None = None) -> list[Violation]:
    watch = KVMonitor(policy or Policy(), pages)
    return [found for number, line in enumerate(lines, 1) for found in watch.feed(number, line)]


def rules(found: Sequence[Violation]) -> set[str]:
    return {violation.rule for violation in found}


@given(streams())
def test_a_right_stream_is_accepted(stream: tuple[Lines, int]) -> None:
    lines, pages = stream
    assert judge(lines, pages=pages) == []


# --- Mutations ------------------------------------------------------------------------------------

Place = tuple[int, int]
Flat = list[tuple[Place, Event]]


def flat(lines: Lines) -> Flat:
    return [((i, j), event) for i, line in enumerate(lines) for j, event in enumerate(line)]


def edit(lines: Lines, place: Place, events: list[Event]) -> Lines:
    """The stream with other events at one place."""
    i, j = place
    return [*lines[:i], [*lines[i][:j], *events, *lines[i][j + 1 :]], *lines[i + 1 :]]


def drop_a_removal(lines: Lines, events: Flat) -> Iterator[Lines]:
    """Of a key that is stored again, before everything is cleared."""
    for n, (place, event) in enumerate(events):
        if isinstance(event, Evict):
            for _, later in events[n:]:
                if isinstance(later, Clear):
                    break
                if isinstance(later, Publish) and later.key == event.key:
                    yield edit(lines, place, [])
                    break


def duplicate_a_store(lines: Lines, events: Flat) -> Iterator[Lines]:
    for place, event in events:
        if isinstance(event, Publish):
            yield edit(lines, place, [event, event])


def duplicate_a_removal(lines: Lines, events: Flat) -> Iterator[Lines]:
    for place, event in events:
        if isinstance(event, Evict):
            yield edit(lines, place, [event, event])


def remove_what_never_was(lines: Lines, events: Flat) -> Iterator[Lines]:
    for place, event in events:
        if isinstance(event, Evict):
            yield edit(lines, place, [event, Evict(-1)])


def stored_before(events: Flat) -> Iterator[tuple[Place, Publish]]:
    seen = set()
    for place, event in events:
        if isinstance(event, Publish):
            if event.key in seen:
                yield place, event
            seen.add(event.key)


def change_the_tokens(lines: Lines, events: Flat) -> Iterator[Lines]:
    for place, event in stored_before(events):
        yield edit(lines, place, [evolve(event, tokens=(7, 7))])


def change_a_field(lines: Lines, events: Flat) -> Iterator[Lines]:
    for place, event in stored_before(events):
        yield edit(lines, place, [evolve(event, fields={"lora_id": 1})])


def change_the_size(lines: Lines, events: Flat) -> Iterator[Lines]:
    for place, event in events:
        if isinstance(event, Publish):
            yield edit(lines, place, [evolve(event, size=PAGE_SIZE + 1)])


def orphan_a_child(lines: Lines, events: Flat) -> Iterator[Lines]:
    """Leave out a store that another is stored under next."""
    for (place, event), (_, child) in pairwise(events):
        if isinstance(event, Publish) and isinstance(child, Publish) and child.parent == event.key:
            yield edit(lines, place, [])


def evict_a_parent(lines: Lines, events: Flat) -> Iterator[Lines]:
    """Before its child, and on a line of its own."""
    for (i, j), event in events:
        if isinstance(event, Publish) and event.parent is not None:
            number, *rest = lines[i]
            early, late = rest[:j], rest[j:]
            split: Lines = [[number, *early], [Evict(event.parent)], late]
            yield [*lines[:i], *split, *lines[i + 1 :]]


def drop_a_batch(lines: Lines, events: Flat) -> Iterator[Lines]:
    for i in range(1, len(lines) - 1):
        yield [*lines[:i], *lines[i + 1 :]]


def replay_a_batch(lines: Lines, events: Flat) -> Iterator[Lines]:
    for i in range(1, len(lines)):
        yield [*lines[: i + 1], lines[i], *lines[i + 1 :]]


MUTATIONS: dict[Callable[[Lines, Flat], Iterator[Lines]], str] = {
    drop_a_removal: "OneCopyPerKey",
    duplicate_a_store: "OneCopyPerKey",
    duplicate_a_removal: "FreeUnique",
    remove_what_never_was: "AccountingExact",
    change_the_tokens: "KeyInjective",
    change_a_field: "KeyInjective",
    change_the_size: "ContentMatches",
    orphan_a_child: "NoDangling",
    evict_a_parent: "NoDangling",
    drop_a_batch: "SequenceGap",
    replay_a_batch: "EpochMatch",
}


@pytest.mark.parametrize("mutate", MUTATIONS, ids=lambda mutate: mutate.__name__)
def test_each_mutation_is_named_by_its_rule(mutate: Any) -> None:
    tried = 0

    @given(streams())
    def every_one_is_named(stream: tuple[Lines, int]) -> None:
        nonlocal tried
        lines, _ = stream
        mutants = mutate(lines, flat(lines))
        for mutant in mutants:
            tried += 1
            assert MUTATIONS[mutate] in rules(judge(mutant))

    every_one_is_named()
    assert tried > 50


@given(streams())
def test_one_page_too_few_is_seen(stream: tuple[Lines, int]) -> None:
    lines, pages = stream
    held = peak = 0
    for _, event in flat(lines):
        held = 0 if isinstance(event, Clear) else held
        held += isinstance(event, Publish) - isinstance(event, Evict)
        peak = max(peak, held)
    assert peak <= pages
    if peak:
        assert rules(judge(lines, pages=peak - 1)) == {"AccountingExact"}


@given(streams(), st.data())
def test_what_was_missed_is_blamed_on_nobody(
    stream: tuple[Lines, int], data: st.DataObject
) -> None:
    lines, pages = stream
    missed = data.draw(st.sets(st.integers(0, len(lines) - 1), max_size=len(lines) - 1))
    kept = [line for i, line in enumerate(lines) if i not in missed]
    assert rules(judge(kept, pages=pages)) <= {"SequenceGap"}
    watch = KVMonitor(Policy(), pages)
    for i, line in enumerate(lines):
        if i in missed:
            watch.lose()
        else:
            assert watch.feed(i, line) == []


@given(
    st.lists(st.tuples(st.integers(0, 3), st.booleans()), max_size=40), st.sets(st.integers(0, 40))
)
def test_copies_are_counted_where_the_engine_keeps_them(
    moves: list[tuple[int, bool]], missed: set[int]
) -> None:
    """An engine that stores a key as often as it likes, heard in part or in full."""
    policy = Policy(one_copy=False, leaves_first=False)
    watch, copies = KVMonitor(policy), dict[int, int]()
    for i, (key, store) in enumerate(moves):
        if not store and not copies.get(key):
            continue
        copies[key] = copies.get(key, 0) + (1 if store else -1)
        if i in missed:
            watch.lose()
        else:
            found = watch.feed(i, [Publish(key, None, (key,)) if store else Evict(key)])
            assert all(violation.allowed for violation in found)
            assert bool(found) <= (store and copies[key] > 1)
    if not missed & set(range(len(moves))):
        for key, count in copies.items():
            found = watch.feed(99, [Evict(key)] * (count + 1))
            assert [v.rule for v in found if not v.allowed] in (["FreeUnique"], ["AccountingExact"])


# --- Sources and restarts -------------------------------------------------------------------------


def test_sources_and_places_have_keys_of_their_own() -> None:
    page = Publish(1, None, (5,))
    one: list[Event] = [Batch(0, "rank 0"), page, evolve(page, place="CPU")]
    two: list[Event] = [Batch(0, "rank 1"), page]
    assert judge([one, two, [Batch(1, "rank 0"), Evict(1)], [Batch(1, "rank 1"), Evict(1)]]) == []


def test_a_clear_leaves_other_places_alone() -> None:
    lines: Lines = [[Publish(1, None, (5,), place="CPU"), Clear()], [Evict(1, "CPU")]]
    assert judge(lines) == []


def test_a_restart_begins_with_empty_caches() -> None:
    page = Publish(1, None, (5,))
    again = evolve(page, tokens=(6,))
    assert judge([[Batch(0), page], [Batch(1)], [Batch(0), again]]) == []


def test_one_who_comes_late_does_not_guess() -> None:
    lines: Lines = [[Batch(7), Publish(2, 1, (5,)), Evict(9)], [Batch(8), Evict(9)]]
    assert [v.rule for v in judge(lines)] == ["FreeUnique"]


def test_the_order_within_a_line_is_free() -> None:
    pages: list[Event] = [Publish(1, None, (5,)), Publish(2, 1, (6,))]
    assert judge([pages, [Evict(1), Evict(2)]]) == []
    found = judge([pages, [Evict(1)], [Evict(2)]])
    assert [v.sentence for v in found] == ["key 1 is evicted; 1 key stored under it stayed"]


# --- Files, and what vLLM writes ------------------------------------------------------------------

STORED = {"type": "BlockStored", "block_hashes": [11, 12], "parent_block_hash": None,
          "token_ids": [1, 2, 3, 4], "block_size": 2, "lora_id": None, "medium": "GPU"}  # fmt: skip
CHILD = {**STORED, "block_hashes": [13], "parent_block_hash": 12, "token_ids": [5, 6]}
REMOVED = {"type": "BlockRemoved", "block_hashes": [13], "medium": "GPU"}
CLEARED = {"type": "AllBlocksCleared"}


def array(event: dict[str, Any]) -> list[Any]:
    return list(event.values())


def batch(*events: Any, seq: int | None = None, rank: int | None = None) -> dict[str, Any]:
    numbered = {} if seq is None else {"seq": seq}
    return {"ts": 1.5, "events": list(events), "data_parallel_rank": rank, **numbered}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def pack(path: Path, *records: Any) -> Path:
    path.write_bytes(b"".join(map(msgspec.msgpack.encode, records)))
    return path


def strict(path: Path, pages: int | None = None) -> Report:
    return monitor(path, VLLM(), policy=Policy(), pages=pages)


OBJECTS = (batch(STORED, CHILD, seq=0), batch(REMOVED, CHILD, seq=1), batch(CLEARED, seq=2))
ARRAYS = tuple(
    ["kv", seq, [1.5, list(map(array, events)), 0]]
    for seq, events in enumerate([(STORED, CHILD), (REMOVED, CHILD), (CLEARED,)])
)
FRAMES = tuple(
    ["", seq.to_bytes(8, "big"), msgspec.msgpack.encode(record)]
    for seq, (_, _, record) in enumerate(ARRAYS)
)
BARE = (STORED, array(CHILD), REMOVED, array(CHILD), array(CLEARED))


@pytest.mark.parametrize("records", [OBJECTS, ARRAYS, BARE], ids=["objects", "arrays", "bare"])
@pytest.mark.parametrize("put", [write, pack])
def test_every_form_says_the_same(tmp_path: Path, records: Any, put: Any) -> None:
    report = strict(put(tmp_path / "events", *records), pages=3)
    assert (report.events, report.exit_status, report.bad) == (6, 0, ())
    few = strict(tmp_path / "events", pages=2)
    assert few.counts == {"AccountingExact": 2}
    assert few.exit_status == 1


def test_frames_as_they_came_over_the_wire(tmp_path: Path) -> None:
    assert strict(pack(tmp_path / "events", *FRAMES)).events == 6
    gap = strict(pack(tmp_path / "events", FRAMES[0], FRAMES[2]))
    assert [v.sentence for v in gap.violations] == ["batch 2 of source rank 0 comes; missing: 1"]


BAD_STREAMS: dict[str, tuple[list[Any], str, int, str]] = {
    # what happens -> records, rule, line, in the sentence
    "stored twice": ([batch(STORED), batch(STORED)], "OneCopyPerKey", 2, "since line 1"),
    "removed, never stored": ([batch(STORED), batch(REMOVED)], "AccountingExact", 2, "key 13"),
    "removed twice": (
        [batch(STORED, CHILD, REMOVED), batch(REMOVED)], "FreeUnique", 2, "gone since line 1"),
    "child without its parent": ([batch(CHILD)], "NoDangling", 1, "key 12, which was never stored"),
    "child after its parent": (
        [batch(STORED), batch({**REMOVED, "block_hashes": [12]}), batch(CHILD)],
        "NoDangling", 3, "was evicted at line 2"),
    "parent before its child": (
        [batch(STORED, CHILD), batch({**REMOVED, "block_hashes": [11]})],
        "NoDangling", 2, "1 key stored under it stayed"),
    "other tokens": (
        [batch(STORED, CLEARED), batch({**STORED, "token_ids": [1, 2, 3, 9]})],
        "KeyInjective", 2, "tokens was (3, 4) and is (3, 9)"),
    "another adapter": (
        [batch(STORED, CLEARED), batch({**STORED, "lora_id": 4})],
        "KeyInjective", 2, "lora_id was None and is 4"),
    "another salt": (
        [batch({**STORED, "extra_keys": [["a"], None]}, CLEARED),
         batch({**STORED, "extra_keys": [["b"], None]})],
        "KeyInjective", 2, "extra_keys"),
    "too many tokens": (
        [batch({**STORED, "token_ids": [1, 2, 3, 4, 5]})], "ContentMatches", 1, "for 3 tokens"),
    "a batch missed": (
        [batch(STORED, seq=0), batch(CHILD, seq=4)], "SequenceGap", 2, "missing: 1 to 3"),
    "a batch again": (
        [batch(STORED, seq=0), batch(CHILD, seq=1), batch(CHILD, seq=1)],
        "EpochMatch", 3, "2 was next"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_STREAMS)
def test_a_bad_stream_is_reported(tmp_path: Path, name: str) -> None:
    records, rule, line, words = BAD_STREAMS[name]
    report = strict(write(tmp_path / "events", *records))
    assert (report.violations[0].rule, report.violations[0].line) == (rule, line)
    assert words in report.violations[0].sentence
    told = report.json()
    assert (told["result"], told["violated"], report.exit_status) == ("invariant", rule, 1)
    assert json.loads(json.dumps(told))["violations"][0]["line"] == line


def test_what_an_engine_does_not_promise_is_counted_apart(tmp_path: Path) -> None:
    path = write(tmp_path / "events", batch(STORED), batch(STORED), batch(CHILD))
    report = monitor(path, ADAPTERS["vllm"])
    assert (report.exit_status, report.counts, report.allowed) == (0, {}, {"OneCopyPerKey": 2})
    assert monitor(path, ADAPTERS["sglang"]).counts == {"OneCopyPerKey": 2}


def test_groups_and_placeholders(tmp_path: Path) -> None:
    """Groups of layers have pages of their own; an offloaded page may come without its tokens."""
    group = {**STORED, "group_idx": 1}
    host = {**STORED, "token_ids": [], "medium": "CPU"}
    path = write(tmp_path / "events", batch(STORED, group, host), batch({**host, "lora_id": 1}))
    assert strict(path).counts == {"OneCopyPerKey": 2}


# --- Another engine, in 30 lines ------------------------------------------------------------------


class Numbered:
    """One event a line, numbered; pages in a list, by memory level; the shape of TensorRT-LLM."""

    policy = Policy(leaves_first=False)
    levels = ("GPU", "CPU")

    def read(self, record: Any) -> Iterator[Event]:
        yield Batch(record["event_id"])
        data = record["data"]
        if data["type"] == "stored":
            parent = data["parent_hash"]
            for block in data["blocks"]:
                tokens = tuple(token["token_id"] for token in block["tokens"])
                fields = {"lora": block.get("lora_id")}
                place = self.levels[block["cache_level"]]
                yield Publish(block["block_hash"], parent, tokens, fields, place=place)
                parent = block["block_hash"]
        elif data["type"] == "removed":
            for key in data["block_hashes"]:
                yield Evict(key)


def numbered(number: int, kind: str, **data: Any) -> dict[str, Any]:
    return {"event_id": number, "data": {"type": kind, **data}}


def block(key: int, *tokens: int) -> dict[str, Any]:
    ids = [{"token_id": token} for token in tokens]
    return {"block_hash": key, "tokens": ids, "cache_level": 0}


def test_another_adapter_is_a_policy_and_a_function(tmp_path: Path) -> None:
    good = [
        numbered(0, "created"),
        numbered(1, "stored", parent_hash=None, blocks=[block(5, 1, 2), block(6, 3, 4)]),
        numbered(2, "removed", block_hashes=[5]),
    ]
    late = numbered(3, "stored", parent_hash=5, blocks=[block(7, 8, 9)])
    report = monitor(write(tmp_path / "events", *good), Numbered())
    assert (report.counts, report.allowed) == ({}, {"NoDangling": 1})
    assert monitor(write(tmp_path / "events", *good, late), Numbered()).counts == {"NoDangling": 1}
    bad = monitor(write(tmp_path / "events", *good, {"event": 1}), Numbered()).bad
    assert [line.line for line in bad] == [4]


# --- Lines that cannot be read --------------------------------------------------------------------

BAD_LINES = ['{"ts": 1', '{"ts": 1}', '{"type": "BlockMoved"}', "[1, [[[]]]]", "7", '"x"',
             json.dumps(batch({**STORED, "block_hashes": [[1]]})),
             json.dumps(batch({**STORED, "extra_keys": [None]}))]  # fmt: skip


@pytest.mark.parametrize("text", BAD_LINES)
def test_a_bad_line_is_named_and_taken_for_a_gap(tmp_path: Path, text: str) -> None:
    path = tmp_path / "events"
    before, after = json.dumps(batch(STORED, seq=0)), json.dumps(batch(REMOVED, seq=2))
    path.write_text(f"{before}\n\n{text}\n{after}\n")
    report = strict(path)
    assert (report.lines, report.bad_lines, report.bad[0].line) == (3, 1, 3)
    assert report.exit_status == 0
    assert report.json()["bad"][0]["reason"]


@pytest.mark.parametrize("content", ["", "{}\n[]\n", "no events\n"])
def test_a_file_without_events_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "events"
    path.write_text(content)
    with pytest.raises(ConfigError, match="EVENTS"):
        strict(path)


def test_nothing_of_a_bad_line_is_followed(tmp_path: Path) -> None:
    half = batch(STORED, {"type": "BlockMoved"})
    report = strict(write(tmp_path / "events", half, batch(STORED)))
    assert (report.bad_lines, report.violations, report.events) == (1, (), 2)


PLAIN = st.none() | st.booleans() | st.floats() | st.text() | st.binary()
VALUES = st.recursive(
    PLAIN | st.integers(-(2**63), 2**64 - 1),
    lambda inner: st.lists(inner, max_size=40) | st.dictionaries(st.text(), inner, max_size=20),
)


@given(VALUES)
def test_messages_are_told_apart(value: Any) -> None:
    """A file of MessagePack values is cut where they end, whatever they hold."""
    one, other = msgspec.msgpack.encode(value), msgspec.msgpack.encode([1, 2, 3])
    assert list(messages(one + other + one)) == [one, other, one]


def test_messages_of_every_width() -> None:
    for value in (b"x" * 2**16, "x" * 2**16, [0] * 2**16, dict.fromkeys(range(2**16), 0)):
        one = msgspec.msgpack.encode(value)
        assert list(messages(one + one)) == [one, one]


def test_a_file_cut_short_loses_its_last_message_alone(tmp_path: Path) -> None:
    whole = pack(tmp_path / "events", *ARRAYS).read_bytes()
    last = len(msgspec.msgpack.encode(ARRAYS[-1]))
    for cut in range(1, last):
        (tmp_path / "events").write_bytes(whole[:-cut])
        report = strict(tmp_path / "events")
        assert (report.lines, report.bad_lines, report.violations) == (3, 1, ())

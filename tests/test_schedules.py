"""Random schedules on tiny pools: whatever comes, everybody ends and every page comes back.

Rule: a schedule is its seed. Requests share prefixes and salts, are turns of sessions that want
their pages kept, are aborted, and want more than the pool has. Steps complete when they like, up to
two of them late; with a host tier, copies end late, in any order, and badly. Every cell that a step
reads is checked (`scheduling.World`), and of some schedules the whole trace, by the specification.
"""

from __future__ import annotations

import json
import random
import time
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path

import pytest

from scheduling import World
from tokenspeed.fsm.trace import read_trace, validate

SPECS = Path(__file__).resolve().parents[1] / "specs"


def schedule(
    seed: int, actions: int = 40, window: int = 0, full_groups: int = 0, window_groups: int = 1
) -> World:
    """Run one to its end.

    Args:
        seed: which.
        actions: until nothing new comes.
        window: tokens that one sees; then requests may be longer than the pool. 0: all.
        full_groups, window_groups: cache groups that see all, and that have the window.
    """
    chance = random.Random(seed)
    page_size, slots = chance.randint(1, 4), chance.randint(1, 4)
    prefix_cache = chance.random() < 0.9
    groups = full_groups + window_groups
    world = World(
        page_size=page_size, slots=slots, pages=chance.randint(4, 16) * groups,
        step_tokens=max(page_size, slots) + chance.randint(0, 8), overlap=chance.randint(0, 2),
        session_pages_max=chance.randint(0, 8), prefix_cache=prefix_cache,
        host_pages=chance.choice([0, 1, 3, 8, 40]) if prefix_cache and not window else 0,
        draft_tokens=chance.choice([0, 0, 1, 4]), window=window,
        full_groups=full_groups, window_groups=window_groups,
    )  # fmt: skip
    world.late = chance.random() < 0.5
    for _ in range(actions):
        chance.choice(ACTIONS)(world, chance)
    world.finish()
    return world


def submit(world: World, chance: random.Random) -> None:
    pages, page_size, window = (world.config[name] for name in ("pages", "page_size", "window"))
    full, sliding = (world.config[name] for name in ("full_groups", "window_groups"))
    spare = pages - sliding * ((window - 2) // page_size + 2) if window else -1
    room = pages // (full + sliding) * page_size
    if spare >= 0:
        room = max(room, spare // full * page_size) if full else 60
    max_tokens = chance.randint(1, min(16, room))
    prompt = [chance.randint(0, 1)] * chance.randint(1, 24) + [chance.randint(0, 3)]
    world.submit(
        prompt[: room - max_tokens + 1], max_tokens, chance.choice(["", "", "", "tenant"]),
        stop_after=chance.choice([10**9, chance.randint(1, 6)]),
        **({} if chance.random() < 0.5 else hints(chance)),
    )  # fmt: skip


def hints(chance: random.Random) -> dict[str, object]:
    return {
        "session": chance.choice("ab"),
        "keep_us": chance.choice([0, 2_000_000]),
        "supersedes": chance.random() < 0.3,
        "priority": chance.choice([0, 0, -1, 1]),
    }


def sessions(world: World, chance: random.Random) -> None:
    """Time passes, or a session ends."""
    if chance.random() < 0.8:
        world.scheduler.advance(1_000_000 * len(world.plans))
    else:
        world.scheduler.end_session(chance.choice("ab"))


def abort(world: World, chance: random.Random) -> None:
    if world.clients:
        world.abort(chance.choice(sorted(world.clients)))


def clear(world: World, chance: random.Random) -> None:
    if chance.random() < 0.2:
        world.clear_cache()


def launch(world: World, _: random.Random) -> None:
    world.launch()


def commit(world: World, _: random.Random) -> None:
    if world.launched:
        world.commit()


def acknowledge(world: World, chance: random.Random) -> None:
    if world.copies:
        copies = chance.sample(world.copies, chance.randint(1, len(world.copies)))
        world.acknowledge(*copies, good=chance.random() < 0.8)


def propose(world: World, chance: random.Random) -> None:
    """For anybody, right or wrong."""
    for number in world.clients:
        if chance.random() < 0.7:
            world.propose(number, chance.randint(0, 4), chance.randint(0, 2))


def turns(world: World, chance: random.Random) -> None:
    for _ in range(chance.randint(1, 5)):
        propose(world, chance)
        world.turn()


ACTIONS = (
    submit, submit, submit, abort, clear, sessions, acknowledge, launch, launch, commit, commit,
    turns, propose,
)  # fmt: skip


COUNTED = (
    "preemptions", "evictions", "prefix_hits", "stores", "loads", "copies_failed", "drafts",
    "drafts_accepted",
)  # fmt: skip


GROUPED = ("evictions", "prefix_hits", "drafts", "drafts_accepted")


def run(seeds: Iterable[int], judged_every: int, folder: Path) -> Counter[str]:
    """What happened in all of them together; of one in so many the whole trace is judged."""
    seen: Counter[str] = Counter(dict.fromkeys(COUNTED, 0))
    for seed in seeds:
        try:
            world = schedule(seed)
        except AssertionError as error:
            error.add_note(f"schedule({seed})")
            raise
        stats = world.scheduler.stats()
        seen.update({name: getattr(stats, name) for name in COUNTED})
        seen["requests"] += len(world.clients)
        seen["aborted"] += sum(client.aborted for client in world.clients.values())
        if seed % judged_every == 0:
            seen["judged"] += 1
            header, steps = read_trace(world.write_trace(folder / "trace"))
            assert validate(SPECS, header, steps) is None, f"schedule({seed})"
    return seen


def test_random_schedules_end_with_every_page_back(tmp_path: Path) -> None:
    seen = run(range(200), 10, tmp_path)
    assert min(seen.values()) >= 5, "the schedules no longer lead everywhere"


@pytest.mark.parametrize("window", [2, 3, 5, 8])
def test_random_schedules_with_a_window_end_with_every_page_back(
    tmp_path: Path, window: int
) -> None:
    seen = Counter[str]()
    for seed in range(60):
        world = schedule(seed, window=window)
        stats = world.scheduler.stats()
        judged = seed % 15 == 0 and not world.config["draft_tokens"]  # no specification has both
        steps = world.scheduler.trace() if not judged else []
        if judged:
            header, read = read_trace(world.write_trace(tmp_path / "trace"))
            assert validate(SPECS, header, read) is None, f"schedule({seed}, window={window})"
            steps = [(step.action, 0, 0, 0, "") for step in read]
        seen.update(action for action, *_ in steps)
        pool = world.config["pages"] * world.config["page_size"]
        seen["beyond the pool"] += sum(
            len(client.prompt) + len(client.output) - 1 > pool for client in world.clients.values()
        )
        seen["hits"] += stats.prefix_hits
    wanted = ("Slide", "Evict", "Publish", "hits", "beyond the pool")
    assert min(seen[name] for name in wanted) > 20, seen


@pytest.mark.parametrize(("full", "sliding"), [(1, 1), (0, 2), (2, 1), (1, 3)])
@pytest.mark.parametrize("window", [2, 5])
def test_random_schedules_with_cache_groups_end_with_every_page_back(
    full: int, sliding: int, window: int
) -> None:
    seen = Counter[str]()
    for seed in range(40):
        world = schedule(seed, window=window, full_groups=full, window_groups=sliding)
        stats = world.scheduler.stats()
        seen.update({name: getattr(stats, name) for name in GROUPED})
        seen["slides"] += sum(action == "Slide" for action, *_ in world.scheduler.trace())
    assert min(seen[name] for name in (*GROUPED, "slides")) > 10, seen


@pytest.mark.parametrize("seed", [375, 1362, 1787])
def test_nobody_is_let_in_by_a_step_that_nobody_hears_of(seed: int) -> None:
    """Copies held the pages that were counted as good as free: no row, no plan, a table unsaid."""
    schedule(seed)


@pytest.mark.slow
def test_ten_thousand_random_schedules(
    tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    start_s = time.process_time()
    seen = run(range(10_000), 50, tmp_path)
    cpu_s = round(time.process_time() - start_s, 1)
    record_property("schedules", json.dumps({"schedules": 10_000, **seen, "cpu_s": cpu_s}))
    assert min(seen.values()) >= 50

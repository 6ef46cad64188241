"""Behaviours in plain sentences: what happened to whom, and what it collides with.

Rule: a sentence is read off a step and the two states around it, never out of the spec. An action
of our lifecycle has its wording in `TEMPLATES`; of any other it is said which variables it changed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence

from attrs import frozen

from tokenspeed.fsm.generated import OWNS
from tokenspeed.fsm.steps import Step, called, differences, named, spoken
from tokenspeed.fsm.values import Value, ordered

__all__ = ["CHANGES_MAX", "TEMPLATES", "collides", "is_lifecycle", "sentences"]

CHANGES_MAX = 4
"""Changes that a sentence of a spec that is not ours names; it counts the others."""

TEMPLATES = {
    "Submit": "{it.request} is submitted and becomes {it.to}",
    "Admit": "{it.request} is admitted from {it.was} with {it.taken} from the prefix cache",
    "Acquire": "page {it.page} is given to {it.request}",
    "Schedule": "the plan takes in {it.tokens} {it.access}",
    "Launch": "the plan for {it.launched} is launched, {it.flying}",
    "Complete": "the oldest step comes back for {it.completed}: {it.moves}",
    "Publish": "{it.request} publishes {it.published}",
    "Preempt": "{it.request} is preempted in {it.was} and gives back {it.given}",
    "Abort": "{it.request} is aborted in {it.was} and becomes {it.to}",
    "Release": "{it.request} becomes {it.to} and gives back {it.given}",
    "Evict": "page {it.page} is evicted from the prefix cache",
}
"""Action -> its sentence, of a `Deed`."""

_VARIABLES = {"st", "tab", "planned", "page", "content", "plan", "inflight"}


def is_lifecycle(state: Mapping[str, Value]) -> bool:
    """Does a state have the variables of specs/Lifecycle.tla that sentences speak of?"""
    return state.keys() >= _VARIABLES


def sentences(steps: Sequence[Step]) -> tuple[str, ...]:
    """One sentence a step, without its number.

    Args:
        steps: a behaviour, the initial state first.

    Example:
        >>> old = Step("", (), {"tmState": "init", "msgs": frozenset()})
        >>> new = Step("TMCommit", (), {"tmState": "done", "msgs": frozenset({"Commit"})})
        >>> sentences([old, new])[1]
        'TMCommit; tmState becomes "done", msgs gains "Commit"'
    """
    told = [_initially(step.state) for step in steps[:1]]
    for before, step in itertools.pairwise(steps):
        told.append(" ".join([_told(before, step), *collides(before, step)]))
    return tuple(told)


def collides(before: Step, step: Step) -> tuple[str, ...]:
    """What a step of our lifecycle newly gets in the way of, as clauses `while ...`."""
    if not is_lifecycle(step.state):
        return ()
    old = _touches(before.state)
    known = {**_collisions(before.state, old), **_dangling(before.state, before.state)}
    found = {**_collisions(step.state, old), **_dangling(before.state, step.state)}
    new = [text for key, text in found.items() if key not in known]
    return tuple(f"{'while' if at == 0 else 'and'} {text}" for at, text in enumerate(new))


def _told(before: Step, step: Step) -> str:
    if step.action == "stutter":
        return "nothing changes any more"
    if step.action in TEMPLATES and is_lifecycle(step.state):
        return TEMPLATES[step.action].format(it=Deed(before.state, step))
    found = list(_became(before, step))
    more = [f"{len(found) - CHANGES_MAX} more changes"] if len(found) > CHANGES_MAX else []
    said = ", ".join(found[:CHANGES_MAX] + more) or "nothing changes"
    return f"{called(step)}; {said}"


def _initially(state: Mapping[str, Value]) -> str:
    if is_lifecycle(state):
        pages = {p: state["page"][p]["kind"] for p in _names(state["page"])}
        return f"initially {_grouped(state['st'].items)}; {_grouped(pages)}"
    found = [f"{name} = {spoken(value)}" for name, value in state.items()]
    more = [f"{len(found) - CHANGES_MAX} more variables"] if len(found) > CHANGES_MAX else []
    return f"initially {', '.join(found[:CHANGES_MAX] + more)}"


def _became(before: Step, step: Step) -> Iterator[str]:
    """What changed, each in a few words."""
    for path, old, new in differences(before, step):
        place = path[0] + "".join(f"[{named(key)}]" for key in path[1:])
        if isinstance(old, frozenset) and isinstance(new, frozenset):
            gains, loses = ordered(new - old), ordered(old - new)
            words = [f"gains {_listed([*map(spoken, gains)])}"] if gains else []
            words += [f"loses {_listed([*map(spoken, loses)])}"] if loses else []
            yield f"{place} {' and '.join(words)}"
        elif isinstance(old, tuple) and isinstance(new, tuple) and new[:-1] == old and new:
            yield f"{place} ends in {spoken(new[-1])}"
        else:
            yield f"{place} becomes {spoken(new)}"


def _names(fn: Value) -> tuple[str, ...]:
    return ordered(frozenset(fn.items))


def _listed(words: Sequence[str]) -> str:
    """`r1, r2 and r3`."""
    *most, last = words or ["nothing"]
    return f"{', '.join(most)} and {last}" if most else last


def _grouped(kinds: Mapping[str, str]) -> str:
    """`r1 and r2 are New`."""
    groups: dict[str, list[str]] = {}
    for name in sorted(kinds):
        groups.setdefault(kinds[name], []).append(name)
    return ", ".join(
        f"{_listed(names)} {'is' if len(names) == 1 else 'are'} {kind}"
        for kind, names in groups.items()
    )


def _counted(number: int, noun: str) -> str:
    return f"{number or 'no'} {noun}{'' if number == 1 else 's'}"


# --- what a step of our lifecycle did -------------------------------------------------------------


@frozen
class Deed:
    """A step of our lifecycle in the words that `TEMPLATES` asks for."""

    before: Mapping[str, Value]
    step: Step

    @property
    def after(self) -> Mapping[str, Value]:
        """The state that it led to."""
        return self.step.state

    @property
    def request(self) -> str:
        """Whose step it is."""
        return str(self.step.args[0])

    @property
    def page(self) -> str:
        """The page that the action names, its last argument."""
        return str(self.step.args[-1])

    @property
    def was(self) -> str:
        """The request's state before."""
        return str(self.before["st"][self.request])

    @property
    def to(self) -> str:
        """The request's state after."""
        return str(self.after["st"][self.request])

    @property
    def taken(self) -> str:
        """Pages that a lookup found."""
        pages = self.after["tab"][self.request]
        return _listed([f"{p} ({spoken(self.after['page'][p]['key'])})" for p in pages])

    @property
    def given(self) -> str:
        """Pages that leave the request's table, and what becomes of each."""
        held = self.after["tab"][self.request]
        gone = [p for p in self.before["tab"][self.request] if p not in held]
        return _listed([f"{p} (now {self.after['page'][p]['kind']})" for p in gone])

    @property
    def tokens(self) -> str:
        """What is planned, by number."""
        work = self.after["plan"][self.request]
        first, last = work["from"] + 1, work["from"] + work["n"]
        numbers = f"number {first}" if first == last else f"numbers {first} to {last}"
        return f"{_counted(work['n'], 'token')} of {self.request} ({numbers})"

    @property
    def access(self) -> str:
        """Pages that the planned tokens touch."""
        work = self.after["plan"][self.request]
        writes, reads = ordered(work["writes"]), ordered(work["reads"])
        if writes == reads:
            return f"to write and read {_listed(writes)}"
        return f"to write {_listed(writes)} and read {_listed(reads)}"

    @property
    def launched(self) -> str:
        """Whom the step that left is for."""
        return _batch(self.after["inflight"][-1])

    @property
    def flying(self) -> str:
        """How many steps are out now."""
        return f"{_counted(len(self.after['inflight']), 'step')} in flight"

    @property
    def completed(self) -> str:
        """Whom the step that came back is for."""
        return _batch(self.before["inflight"][0])

    @property
    def moves(self) -> str:
        """What became of each of them."""
        said = []
        for name in _workers(self.before["inflight"][0]):
            was, to = self.before["st"][name], self.after["st"][name]
            said.append(f"{name} stays {to}" if was == to else f"{name} goes from {was} to {to}")
        return ", ".join(said) or "nobody moves"

    @property
    def published(self) -> str:
        """The page that others can find now, and by what."""
        old, new = self.before["page"], self.after["page"]
        found = [p for p in _names(new) if new[p] != old[p] and new[p]["kind"] == "Shared"]
        return _listed([f"{p} as {spoken(new[p]['key'])}" for p in found])


def _workers(work: Value) -> list[str]:
    return [name for name in _names(work) if work[name]["n"] > 0]


def _batch(work: Value) -> str:
    return _listed(_workers(work) or ["nobody"])


# --- what it collides with ------------------------------------------------------------------------


def _touches(state: Mapping[str, Value]) -> dict[tuple[str, str], str]:
    """(request, page) -> `a launched step of r1 still writes p1`, the gravest that there is."""
    if not is_lifecycle(state):
        return {}
    found: dict[tuple[str, str], str] = {}
    for verb in ("reads", "writes"):
        for how, work in [("planned", state["plan"])] + [
            ("launched", w) for w in state["inflight"]
        ]:
            for name in _names(work):
                for p in ordered(work[name][verb]):
                    found[name, p] = f"a {how} step of {name} still {verb} {p}"
    return found


def _collisions(
    state: Mapping[str, Value], old: Mapping[tuple[str, str], str]
) -> dict[tuple[str, ...], str]:
    """What should not be in a state, each under what makes it the same in the next one.

    Args:
        old: what was touched before the step: then the news is the page, not the touch.
    """
    page, tab = state["page"], state["tab"]
    holders = {p: [r for r in _names(tab) if p in tab[r]] for p in _names(page)}
    found: dict[tuple[str, ...], str] = {}
    for (r, p), touch in _touches(state).items():
        wrong = _misplaced(r, page[p]["kind"], holders[p], writes=" writes " in touch)
        if wrong:
            found["touched", r, p] = touch if (r, p) in old else f"{p} is {wrong}"
    for p in _names(page):
        found |= dict(_misjudged(p, page[p], holders[p], state["content"][p]))
    for r in _names(tab):
        for p in dict.fromkeys(tab[r]):
            if tab[r].count(p) > 1:
                found["twice", r, p] = f"{p} is twice in the table of {r}"
        if tab[r] and "Pages" not in OWNS.get(state["st"][r], ("Pages",)):
            found["kept", r] = f"{r} still holds {_listed(tab[r])}"
    for p, q in ((p, q) for p in _names(page) for q in _names(page) if p < q):
        if page[p]["kind"] == page[q]["kind"] == "Shared" and page[p]["key"] == page[q]["key"]:
            found["copies", p, q] = f"{p} and {q} are both cached as {spoken(page[p]['key'][1:])}"
    return found


def _misplaced(request: str, kind: str, holders: Sequence[str], *, writes: bool) -> str:
    """Where a page is that a step of a request touches and should not; empty if it may."""
    others = [name for name in holders if name != request]
    if kind == "Free":
        return "free"
    if others and (writes or request not in holders):
        return f"held by {_listed(others)}"
    return "" if request in holders else f"not held by {request}"


def _misjudged(
    p: str, record: Value, holders: Sequence[str], content: Value
) -> Iterator[tuple[tuple[str, ...], str]]:
    """Where a page's record says something else than the tables and the page itself."""
    kind, references = record["kind"], record["ref"]
    if kind == "Free" and holders:
        yield ("free", p), f"{p} is Free and in the table of {_listed(holders)}"
    if kind == "Exclusive" and len(holders) != 1:
        where = f"the tables of {_listed(holders)}" if holders else "no table"
        yield ("exclusive", p), f"{p} is Exclusive and in {where}"
    if kind == "Shared" and references != len(holders):
        counts, tables = _counted(references, "reference"), _counted(len(holders), "table")
        yield ("counted", p), f"{p} counts {counts} and is in {tables}"
    if kind == "Shared" and content != record["key"][1:]:
        holds = spoken(content) if content else "nothing"
        yield ("content", p), f"{p} is cached as {spoken(record['key'][1:])} and holds {holds}"


def _dangling(
    before: Mapping[str, Value], after: Mapping[str, Value]
) -> dict[tuple[str, ...], str]:
    """Pages that continue a prefix which was cached before and is not now."""
    keys = {p: after["page"][p]["key"] for p in _names(after["page"])}
    lost = {before["page"][p]["key"] for p in keys if before["page"][p]["kind"] == "Shared"}
    lost -= {key for p, key in keys.items() if after["page"][p]["kind"] == "Shared"}
    return {
        ("dangling", p): f"{p} is cached as {spoken(key[1:])}, which continues {spoken(gone[1:])}"
        for p, key in keys.items()
        for gone in sorted(lost, key=len)
        if after["page"][p]["kind"] == "Shared" and key[: len(gone)] == gone
    }

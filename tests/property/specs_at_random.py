"""Small specifications at random, well typed, over every construct that has a value.

Rule: what is drawn is decided by the seed alone. A case is an action of its own: it starts in the
same state as the others, takes two steps, and never meets them, so that one model holds many.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

__all__ = ["action", "module"]

VARIABLES = {"n": "int", "s": "set", "f": "fn", "q": "seq", "r": "rec"}

HEAD = r"""---- MODULE Fuzz ----
EXTENDS Integers, Sequences, FiniteSets
VARIABLES case, step, n, s, f, q, r
A == {"u", "v"}
Max(S) == CHOOSE x \in S : \A y \in S : y <= x
Pick(test, yes, no) == IF test THEN yes ELSE no
Twice(x) == x + x
Cut(e) == IF Len(e) > 2 THEN SubSeq(e, 1, 2) ELSE e
Init == /\ case \in 0..%(last)d /\ step = 0 /\ n = 1 /\ s = {0, 2} /\ q = <<2>>
        /\ f = [a \in A |-> IF a = "u" THEN 1 ELSE 3] /\ r = [x |-> 1, y |-> FALSE]
Begin(i) == case = i /\ step < 2 /\ step' = step + 1 /\ UNCHANGED case
Go(i) == Begin(i) /\ UNCHANGED <<n, s, f, q, r>>
Wait(i) == Go(i) /\ step = 0
Grows == \A i \in 0..%(last)d : (case = i /\ step = 0) ~> (case = i /\ n > 1)
"""


def module(actions: list[str], last: str, invariant: str) -> str:
    """A module of some actions and one more, whose second step is the last of all that is done.

    Args:
        invariant: of the state after that step.
    """
    at = len(actions)
    lines = [HEAD % {"last": at}]
    lines += [f"C{i} ==\n  /\\ Begin({i})\n{text}" for i, text in enumerate(actions)]
    lines.append(f"C{at} ==\n  /\\ Begin({at}) /\\ step = 1\n{last}")
    lines.append(f"W{at} == Wait({at})")
    lines.append("Next == " + " \\/ ".join([*(f"C{i}" for i in range(at)), f"W{at}", f"C{at}"]))
    lines.append("Fair == Init /\\ [][Next]_step /\\ \\A i \\in {0, 1} : WF_step(Go(i))")
    lines.append(f"Inv == case = {at} /\\ step = 2 =>\n  {invariant}\n====\n")
    return "\n".join(lines)


def action(seed: int, *, partial: bool = False) -> tuple[str, str]:
    """The conjuncts of an action, and a predicate.

    Args:
        partial: it may well apply what has no value.
    """
    draw = _Draw(random.Random(seed), partial)
    text = draw.action()
    draw.assigned.clear()
    return text, draw.expr("bool", 3)


class _Draw:
    def __init__(self, dice: random.Random, partial: bool) -> None:
        self.dice = dice
        self.partial = partial
        self.assigned: set[str] = set()
        self.scope: list[tuple[str, str]] = []
        self.count = 0

    # --- actions ----------------------------------------------------------------------------------

    def action(self) -> str:
        names = list(VARIABLES)
        self.dice.shuffle(names)
        lines = []
        while names:
            if self.dice.random() < 0.2:
                lines.append(self.expr("bool", 2))
            together = [names.pop() for _ in range(min(len(names), self.dice.randint(1, 2)))]
            lines.append(self.change(together, 2))
            self.assigned |= set(together)
        return "\n".join(f"  /\\ {line}" for line in lines)

    def change(self, names: list[str], depth: int) -> str:  # noqa: PLR0911  a return a form
        """Something that says what the primes of these variables are."""
        if depth == 0 or self.dice.random() < 0.4:
            return "(" + " /\\ ".join(self.assign(name) for name in names) + ")"
        again: Callable[[], str] = lambda: self.change(names, depth - 1)  # noqa: E731
        form = self.dice.choice(["if", "case", "or", "exists", "let", "call", "unchanged", "guard"])
        test = self.expr("bool", 1)
        match form:
            case "if":
                return f"(IF {test} THEN {again()} ELSE {again()})"
            case "case":
                second = self.expr("bool", 1)
                arms = f"{test} -> {again()} [] {second} -> {again()}"
                return f"(CASE {arms}{self.other(again)})"
            case "or":
                return f"({again()} \\/ ({test} /\\ {again()}))"
            case "exists":
                members = self.small()
                with self.bound("int") as name:
                    return f"(\\E {name} \\in {members} : {again()})"
            case "let":
                value = self.expr("int", 2)
                with self.bound("int") as name:
                    return f"(LET {name} == {value} IN {again()})"
            case "guard":
                return f"({test} /\\ {again()})"
            case "call":
                value = self.expr("int", 1)
                with self.bound("int") as name:
                    return f"(LET op{name}({name}) == {again()} IN op{name}({value}))"
        return f"UNCHANGED <<{', '.join(names)}>>"

    def assign(self, name: str) -> str:
        kind = VARIABLES[name]
        value = self.expr(kind, 3)
        if kind == "int":
            value = f"({value}) % 8"
            if self.dice.random() < 0.3:
                return f"{name}' \\in {self.small()}"
        elif kind == "seq":
            value = f"Cut({value})"
        elif kind == "set" and self.dice.random() < 0.2:
            return f"{name}' \\in SUBSET ({value} \\cap 0..2)"
        return f"{name}' = {value}"

    def small(self) -> str:
        """A set of at most three numbers, so that the graph stays small."""
        return self.dice.choice(
            [f"({self.expr('set', 2)} \\cap 0..2)", "1..2", f"{{0, {self.digit(1)}}}"]
        )

    # --- expressions ------------------------------------------------------------------------------

    @contextmanager
    def bound(self, kind: str) -> Iterator[str]:
        self.count += 1
        self.scope.append((f"x{self.count}", kind))
        yield self.scope[-1][0]
        self.scope.pop()

    def expr(self, kind: str, depth: int) -> str:
        leaves = [name for name, of in self.scope if of == kind]
        leaves += [name for name, of in VARIABLES.items() if of == kind]
        leaves += [f"{name}'" for name in sorted(self.assigned) if VARIABLES[name] == kind]
        if depth == 0 or self.dice.random() < 0.15:
            return self.fill(self.dice.choice(leaves + self.literals(kind)), kind, 0)
        forms = [*_FORMS[kind], *_ANY, *(_PARTIAL[kind] if self.partial else ())]
        return self.fill(self.dice.choice(forms), kind, depth - 1)

    def fill(self, form: str, kind: str, depth: int) -> str:
        """`form` with each hole filled, and `$x` named."""
        outside, *inside = form.split("¦")
        outer = self.holes(outside, kind, depth)
        with self.bound(inside[0] if inside else "hidden") as name:
            inner = self.holes(inside[1], kind, depth) if inside else ""
        return (outer + inner).replace("$x", name)

    def holes(self, form: str, kind: str, depth: int) -> str:
        def filled(hole: re.Match[str]) -> str:
            want = hole[1].replace("same", kind)
            return self.digit(depth) if want == "digit" else self.expr(want, depth)

        return _HOLE.sub(filled, form)

    def digit(self, depth: int) -> str:
        return f"(({self.expr('int', depth)}) % 8)"

    def other(self, value: Callable[[], str]) -> str:
        return "" if self.partial else f" [] OTHER -> {value()}"

    def literals(self, kind: str) -> list[str]:
        digits = [str(self.dice.randint(0, 4))] if kind == "int" else []
        return digits + _LITERALS[kind]


_LITERALS = {
    "int": ["r.x", 'f["u"]', "Len(q)", "Cardinality(s)"],
    "bool": ["TRUE", "FALSE", "r.y", "n > 1", "2 \\in s"],
    "set": ["{}", "{1, 3}", "(0..2)", "DOMAIN q"],
    "atom": ['"u"', '"v"'],
    "seq": ["<<>>", "<<1>>", "<<0, 5>>"],
    "fn": ["[$x \\in A |-> 2]"],
    "rec": ["[x |-> 2, y |-> TRUE]"],
}
_HOLE = re.compile(r"<(int|bool|set|atom|seq|fn|rec|same|digit)>")
# `<kind>` is an expression of that kind, `<same>` of the kind wanted, `<digit>` a number from 0
# to 7; `outside¦kind¦inside` binds $x inside.
_ANY = [
    "(IF <bool> THEN <same> ELSE <same>)",
    "(CASE <bool> -> <same> [] <bool> -> <same> [] OTHER -> <same>)",
    "Pick(<bool>, <same>, <same>)",
    "(LET $x == <int> IN ¦int¦<same>)",
    "(LET $x == <set> IN ¦set¦<same>)",
]
_FORMS = {
    "int": [
        "(<int> + <int>)", "(<int> - <int>)", "(n * <digit>)", "(<int> \\div 3)", "(<int> % 3)",
        "(-<int>)", "f[<atom>]", "<rec>.x", "Cardinality(<set>)", "Len(<seq>)", "Twice(<int>)",
        "Max(<set> \\cup {0})", "<<<int>, <bool>>>[1]", "[r EXCEPT !.x = <int>].x",
        "(2 ^ (<digit>))", "(LET g$x($x) == ¦int¦<int> + $x IN g$x(2) - g$x(n))",
        "Cardinality({$x \\in <set> : ¦int¦<bool>})",
    ],
    "bool": [
        "(<int> < <int>)", "(<int> >= <int>)", "(<int> = <int>)", "(<set> # <set>)",
        "(<int> \\in <set>)", "(<int> \\notin <set>)", "(<set> \\subseteq <set>)",
        "(<bool> /\\ <bool>)", "(<bool> \\/ <bool>)", "(~<bool>)", "(<bool> => <bool>)",
        "(<bool> <=> <bool>)", "(\\A $x \\in <set> : ¦int¦<bool>)",
        "(\\E $x \\in <set> : ¦int¦<bool>)", "(\\E $x \\in A : ¦atom¦<bool>)",
        "(\\A $x, $xy \\in <set> : ¦int¦$x < $xy \\/ <bool>)", "(<seq> = <seq>)", "(<fn> = <fn>)",
        "(<rec> = <rec>)", "<rec>.y", "(<atom> = <atom>)", "(<int> \\in Nat)", "(<int> \\in Int)",
        "(<fn> \\in [A -> <set>])", "(<set> \\in SUBSET (<set>))", "(<seq> \\in Seq(<set>))",
        "(<rec> \\in [x : <set>, y : BOOLEAN])", "(<<<int>, <bool>>> \\in (<set>) \\X {TRUE})",
        "({$x \\in <set> : ¦int¦<bool>} = {})",
        "(\\E $x \\in SUBSET (<set> \\cap 0..2) : ¦set¦<bool>)", "(<int> \\in 0..<int>)",
    ],
    "set": [
        "{<digit>, <digit>}", "(<set> \\cup <set>)", "(<set> \\cap <set>)", "(<set> \\ <set>)",
        "{$x \\in <set> : ¦int¦<bool>}", "{<digit> : $x \\in 0..2}",
        "{ ($x + <digit>) % 8 : $x \\in s}",
        "((<digit>)..(<digit>))", "(DOMAIN <seq>)", "(UNION {<set>, <set>})",
        "{f[$x] % 8 : $x \\in A}",
        "(UNION {{$x, <digit>} : $x \\in 1..2})", "{$x[1] % 8 : $x \\in (s \\X BOOLEAN)}",
    ],
    "atom": ["(CHOOSE $x \\in A : $x # <atom>)"],
    "seq": [
        "<<<digit>>>", "<<<digit>, <digit>>>", "Append(Cut(<seq>), <digit>)",
        "(Cut(<seq>) \\o Cut(<seq>))", "Tail(Append(Cut(<seq>), 1))", "SubSeq(Append(q, 1), 1, 1)",
        "[$x \\in 1..2 |-> <digit>]", "[$x \\in DOMAIN q |-> (q[$x] + <digit>) % 8]",
        "[<seq> EXCEPT ![1] = <digit>]", "[<seq> EXCEPT ![<int>] = (@ + 1) % 8]",
    ],
    "fn": [
        "[$x \\in A |-> ¦atom¦<digit>]", "[<fn> EXCEPT ![<atom>] = <digit>]",
        "[<fn> EXCEPT ![<atom>] = (@ + 1) % 8, ![\"u\"] = (@ + <digit>) % 8]",
    ],
    "rec": [
        "[x |-> <digit>, y |-> <bool>]", "[<rec> EXCEPT !.x = <digit>]",
        "[<rec> EXCEPT !.y = ~@, !.x = (@ + 1) % 8]",
    ],
}  # fmt: skip
_PARTIAL: dict[str, list[str]] = {
    "int": [
        "Head(<seq>)", "<seq>[<int>]", "(<int> \\div <int>)", "(<int> % <int>)",
        "(CHOOSE $x \\in <set> : ¦int¦<bool>)", "(CASE <bool> -> <int> [] <bool> -> <int>)",
        "(2147483647 - <int> + <int>)",
    ],
    "bool": ["(CASE <bool> -> <bool>)"], "set": [], "atom": ["(CHOOSE $x \\in A : <bool>)"],
    "seq": ["Tail(<seq>)"], "fn": [], "rec": [],
}  # fmt: skip

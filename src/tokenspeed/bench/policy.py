"""What a latency budget costs: the real scheduler on a synthetic machine, in virtual time.

Rule: nothing is clocked here. A machine says how long each step takes, so that a run is repeated
bit by bit from its seed, and hours of it take seconds.

Users decode throughout; whose answer is complete asks again, its prompt cached, and goes ahead.
Long prompts come two at a time, and the next two when these are prefilled and the users have been
alone for a while. Reported are the time between two tokens of a user, and the prompts' tokens per
second from when they come to when they are prefilled. Beside them stands the best fixed chunk: the
most prefill tokens a step, always the same, whose 99th percentile is no more than 1.1 budgets.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, final

import numpy as np
from attrs import asdict, frozen
from numpy.typing import NDArray
from rich.table import Table

from tokenspeed._core import Plan, Scheduler
from tokenspeed.errors import ConfigError

__all__ = ["H100_8B", "Machine", "Report", "Simulation", "Workload", "measure", "parse_floors"]

Tokens = NDArray[np.int32]
Tell = Callable[[str, int, int], None]
"""Called with (what is measured, done, total)."""

SLACK = 1.1
"""Of a budget: what 99 % of the times between tokens keep to."""

CHUNKS = tuple(range(16, 8192 + 1, 4))
"""Fixed chunks that are tried, in tokens."""

PAGE = 16
USERS_PRIORITY = -100
"""Who asks again does not wait for the long prompts."""


@frozen(kw_only=True)
class Machine:
    """How long a step takes: a sum, as for a memory-bound decode beside a compute-bound prefill.

    Attributes:
        fixed_us: of any step: the weights are read once.
        row_us: a row, whatever it does.
        read_us: a token of KV that a decoding row reads.
        token_us: a prefilled token.
        pair_us: a prefilled token and one that it attends to.
        noise: standard deviation of the time, as a share of it.
    """

    fixed_us: float
    row_us: float
    read_us: float
    token_us: float
    pair_us: float
    noise: float = 0.0

    def step_us(self, plan: Plan) -> float:
        """What a plan takes, without noise."""
        tokens = np.diff(plan.query_start).astype(np.float64)
        contexts = plan.context_lens.astype(np.float64)
        decodes = tokens == 1
        pairs = tokens * contexts + tokens * tokens / 2
        return float(
            self.fixed_us
            + self.row_us * tokens.size
            + self.read_us * contexts[decodes].sum()
            + self.token_us * tokens[~decodes].sum()
            + self.pair_us * pairs[~decodes].sum()
        )


H100_8B = Machine(
    fixed_us=2600, row_us=8, read_us=0.023, token_us=16, pair_us=0.001, noise=0.03
)  # fmt: skip
"""About an 8B model with 32 layers of 4096 and 8 KV heads of 128, all FP8, on one H100: 8 GB of
weights and 64 KiB of KV a token at 3 TB/s, 16 GFLOP a token and 0.5 MFLOP a pair at 1 and 0.5
PFLOP/s."""


@final
class Simulation:
    """A scheduler, a machine that takes its time, and whoever waits for tokens.

    Args:
        scheduler: driven by this alone.
        machine: what it runs on.
        seed: of the noise.

    Attributes:
        now_us: the virtual time.
        between_us: of each token but the first of each request: how long after the one before.
    """

    def __init__(self, scheduler: Scheduler, machine: Machine, seed: int = 0) -> None:
        self.scheduler = scheduler
        self.now_us = 0.0
        self.between_us: list[float] = []
        self._ended: list[int] = []
        self._machine = machine
        self._random = np.random.default_rng(seed)
        self._launched: deque[Plan] = deque()
        self._last_us: dict[int, float] = {}
        self._requests = 0

    @property
    def decoding(self) -> int:
        """Requests that have a token and wait for the next."""
        return len(self._last_us)

    def submit(self, prompt: Tokens, max_tokens: int, priority: int = 0) -> int:
        """A request's number."""
        number = self._requests
        self._requests += 1
        self.scheduler.submit(number, prompt, max_tokens, priority=priority)
        return number

    def step(self) -> Plan | None:
        """Fill the pipeline and complete the oldest step; None if there is none."""
        while (plan := self.scheduler.plan()) is not None:
            self._launched.append(plan)
        if not self._launched:
            return None
        plan = self._launched.popleft()
        noise = 1 + self._machine.noise * self._random.standard_normal()
        took_us = self._machine.step_us(plan) * max(noise, 0.5)
        self.now_us += took_us
        rows = plan.slots.size
        done = self.scheduler.commit(
            plan.step, np.zeros(rows, np.int32), np.zeros(rows, np.bool_), round(took_us)
        )
        self._hand_on(plan.numbers[done.accepted])
        for number, _ in done.finished:
            del self._last_us[number]
            self._ended.append(number)
        return plan

    def take_ended(self) -> list[int]:
        """Numbers of the requests that have ended since the last call."""
        ended, self._ended = self._ended, []
        return ended

    def _hand_on(self, numbers: NDArray[np.int64]) -> None:
        for number in numbers.tolist():
            before_us = self._last_us.get(number)
            self._last_us[number] = self.now_us
            if before_us is not None:
                self.between_us.append(self.now_us - before_us)


# --- the comparison -------------------------------------------------------------------------------


@frozen(kw_only=True)
class Workload:
    """What comes.

    Attributes:
        users, context: that decode, and the tokens of the prompt of each.
        answer: tokens that a user gets before it asks again.
        prompts, prompt_tokens: that come beside them.
        pause_steps: between two prompts and the next two.
        overlap: steps launched ahead.
        seed: of prompts and noise.
    """

    users: int = 16
    context: int = 2000
    answer: int = 400
    prompts: int = 6
    prompt_tokens: int = 51200
    pause_steps: int = 300
    overlap: int = 1
    seed: int = 0

    def __attrs_post_init__(self) -> None:
        for name in ("users", "context", "answer", "prompts", "prompt_tokens"):
            if getattr(self, name) < 2:
                raise ConfigError(name, getattr(self, name), "at least 2")


@frozen(kw_only=True)
class Outcome:
    """Milliseconds between two tokens of a user, and prefilled tokens a second."""

    p50_ms: float
    p99_ms: float
    prefill_per_s: float


@frozen(kw_only=True)
class Row:
    """One floor: what the budget made of it, and the best fixed chunk if one meets it.

    Attributes:
        floor: tokens/s that every user keeps.
        chunk: prefill tokens of a step.
    """

    floor: float
    budget_ms: float
    budgeted: Outcome
    chunk: int | None
    fixed: Outcome | None

    @property
    def share(self) -> float | None:
        """Of the prefill rate of the fixed chunk."""
        if self.fixed is None:
            return None
        return self.budgeted.prefill_per_s / self.fixed.prefill_per_s


@frozen(kw_only=True)
class Report:
    """All floors, on one machine."""

    machine: Machine
    workload: Workload
    rows: tuple[Row, ...]

    def table(self) -> Table:
        """For people."""
        table = Table(
            "floor", "budget ms", "p50 ms", "p99 ms", "/ budget", "tok/s", "chunk", "p99 ms",
            "tok/s", "share", title="at a budget, and with the best fixed chunk", box=None,
        )  # fmt: skip
        for row in self.rows:
            ours, fixed, share = row.budgeted, row.fixed, row.share
            cells = [
                f"{row.floor:g}", f"{row.budget_ms:.1f}", f"{ours.p50_ms:.2f}",
                f"{ours.p99_ms:.2f}", f"{ours.p99_ms / row.budget_ms:.2f}",
                f"{ours.prefill_per_s:,.0f}",
            ]  # fmt: skip
            if fixed is not None and share is not None:
                cells += [
                    str(row.chunk), f"{fixed.p99_ms:.2f}", f"{fixed.prefill_per_s:,.0f}",
                    f"{share:.0%}",
                ]  # fmt: skip
            table.add_row(*cells)
        return table

    def as_json(self) -> dict[str, Any]:
        """For programs."""
        rows = [{**asdict(row), "share": row.share} for row in self.rows]
        return {**asdict(self), "rows": rows}


def parse_floors(text: str) -> tuple[float, ...]:
    """Rates with commas between them. Raises ConfigError."""
    try:
        floors = tuple(float(word) for word in text.split(","))
    except ValueError:
        floors = ()
    if not floors or not all(0.02 <= floor <= 10_000 for floor in floors):
        raise ConfigError("floors", text, "tokens/s from 0.02 to 10000, with commas between them")
    return floors


def measure(
    floors: Sequence[float], tell: Tell, workload: Workload, machine: Machine = H100_8B
) -> Report:
    """Run every floor with its budget, and search its best fixed chunk.

    Args:
        floors: tokens/s that every user keeps.
        tell: called as runs end.
    """
    rows = tuple(_row(floor, workload, machine, tell) for floor in floors)
    return Report(machine=machine, workload=workload, rows=rows)


def _row(floor: float, workload: Workload, machine: Machine, tell: Tell) -> Row:
    runs = len(CHUNKS).bit_length() + 1
    budget_us = 1e6 / floor
    what = f"{floor:g} tok/s"
    tell(what, 0, runs)
    budgeted = _run(workload, machine, chunk=CHUNKS[-1], budget_us=round(budget_us))
    low, high, best = 0, len(CHUNKS), None  # low chunks meet the budget, high ones do not
    for done in range(1, runs):
        tell(what, done, runs)
        if low < high:
            middle = (low + high) // 2
            found = _run(workload, machine, chunk=CHUNKS[middle])
            meets = found.p99_ms * 1e3 <= SLACK * budget_us
            low, high = (middle + 1, high) if meets else (low, middle)
            best = (CHUNKS[middle], found) if meets else best
    tell(what, runs, runs)
    return Row(
        floor=floor, budget_ms=budget_us / 1e3, budgeted=budgeted,
        chunk=best and best[0], fixed=best and best[1],
    )  # fmt: skip


def _run(workload: Workload, machine: Machine, *, chunk: int, budget_us: int = 0) -> Outcome:
    """All prompts beside the users, with prefill of at most `chunk` a step."""
    longest = max(workload.prompt_tokens + 1, workload.context + workload.answer)
    scheduler = Scheduler(
        page_size=PAGE, pages=2 * (workload.users + 2) * (longest // PAGE + 1),
        slots=workload.users + 2, waiting_max=workload.users + 2,
        step_tokens=workload.users + chunk, context_max=longest, overlap=workload.overlap,
        itl_budget_us=budget_us,
    )  # fmt: skip
    crowd = _Crowd(Simulation(scheduler, machine, workload.seed), workload)
    while crowd.run.decoding < workload.users:
        crowd.turn()
    crowd.run.between_us.clear()
    waited_us = sum(crowd.prefill(min(2, left)) for left in range(workload.prompts, 0, -2))
    p50_us, p99_us = np.percentile(crowd.run.between_us, (50, 99))
    return Outcome(
        p50_ms=float(p50_us) / 1e3, p99_ms=float(p99_us) / 1e3,
        prefill_per_s=1e6 * workload.prompts * workload.prompt_tokens / waited_us,
    )  # fmt: skip


@final
class _Crowd:
    """Users who ask again and again, and long prompts beside them."""

    def __init__(self, run: Simulation, workload: Workload) -> None:
        self.run = run
        self._workload = workload
        self._random = np.random.default_rng(workload.seed)
        self._users: dict[int, Tokens] = {}
        for _ in range(workload.users):
            self._ask(self._prompt(workload.context))

    def _prompt(self, tokens: int) -> Tokens:
        return self._random.integers(0, 1 << 20, tokens, np.int32)

    def _ask(self, prompt: Tokens) -> None:
        number = self.run.submit(prompt, self._workload.answer, USERS_PRIORITY)
        self._users[number] = prompt

    def turn(self) -> list[int]:
        """A step, after which whoever is done asks again; the requests that ended."""
        self.run.step()
        ended = self.run.take_ended()
        for number in ended:
            if number in self._users:
                self._ask(self._users.pop(number))
        return ended

    def prefill(self, prompts: int) -> float:
        """So many prompts, and a pause; microseconds from their arrival to their end."""
        start_us = self.run.now_us
        tokens = self._workload.prompt_tokens
        left = {self.run.submit(self._prompt(tokens), 1) for _ in range(prompts)}
        while left:
            left.difference_update(self.turn())
        took_us = self.run.now_us - start_us
        for _ in range(self._workload.pause_steps):
            self.turn()
        return took_us

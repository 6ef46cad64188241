"""The step loop: one thread that plans, launches, commits and hands on. The only clock.

Rule: one loop, whatever the overlap: *apply commands, fill the pipeline, await the oldest step,
commit it, hand its text on*. The scheduler decides when, the lifecycle whether, the executor
computes; this file only carries values between them. A failing step ends the requests that were in
it, never the thread.

    submit ─► inbox ─► scheduler.plan() ─► executor.launch(plan) ─► pending.result()
                             ▲                                           │
    Stream ◄─ Delta ◄── detokenizer ◄── scheduler.commit(result) ◄───────┘
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import Counter, deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar, final

import numpy as np
from numpy.typing import NDArray

from tokenspeed._core import QueueFull, Scheduler
from tokenspeed.config import EngineConfig
from tokenspeed.errors import EngineStopped, OverloadedError, RankLost, StepError
from tokenspeed.fsm.kv_log import KVLog
from tokenspeed.plan import PLANNED, Joined, StepPlan, StepResult
from tokenspeed.ranks import LedExecutor
from tokenspeed.request import Delta, FinishReason, Request
from tokenspeed.sequence import LiveSequence
from tokenspeed.spmd import Executor, Pending
from tokenspeed.stats import Health
from tokenspeed.stream import Stream, deliver, running_loop
from tokenspeed.text import Tokenizer

__all__ = ["StepLoop"]

log = logging.getLogger("tokenspeed.engine")

T = TypeVar("T")
Numbers = NDArray[np.int64]

STEP_STUCK_S = 120.0
"""A step that takes longer makes the engine report itself dead."""


@final
class StepLoop:
    """Open requests, and the thread that takes them through their steps once `start` is called.

    Attributes:
        prompt_tokens, generation_tokens, finished: counters; `finished` by reason.
    """

    def __init__(
        self,
        config: EngineConfig,
        scheduler: Scheduler,
        tokenizer: Tokenizer,
        kv_log: KVLog | None,
    ) -> None:
        self.prompt_tokens = 0
        self.generation_tokens = 0
        self.finished: Counter[str] = Counter()
        self._config = config
        self._scheduler = scheduler
        self._tokenizer = tokenizer
        self._kv_log = kv_log
        self._wake = threading.Condition()
        self._failure: BaseException | None = None
        self._sequences: dict[int, LiveSequence] = {}
        self._launched: deque[tuple[StepPlan, Numbers, Pending]] = deque()
        self._outbox: list[tuple[Stream, Delta]] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._open = 0
        self._numbers = itertools.count()
        self._draining = False
        self._closing = False
        self._step_started_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="tokenspeed-engine", daemon=True)

    def start(self, executor: Executor | LedExecutor) -> None:
        """Begin to turn; the executor is nobody else's from now on."""
        self._executor = executor
        self._thread.start()

    # --- any thread -----------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queue a request that is within the model's bounds; see `Engine.submit`."""
        slots, waiting_max = self._config.slots, self._config.waiting_max
        with self._wake:
            if self._failure is not None or self._closing or self._draining:
                raise EngineStopped(self.health().reason)
            if self._open >= slots + waiting_max:
                raise OverloadedError(
                    f"{self._open} requests are running or waiting, the most that "
                    "--slots and --waiting-max allow; try again later"
                )
            self._open += 1
            number = next(self._numbers)
            stream = Stream(number, self._abort, running_loop())
            self._inbox.append(lambda: self._enter(number, request, stream))
            self._wake.notify()
        return stream

    def _abort(self, number: int) -> None:
        with self._wake:
            self._inbox.append(lambda: self._cancel(number))
            self._wake.notify()

    def ask(self, question: Callable[[], T]) -> Future[T]:
        """Have the thread call something between two steps.

        Raises:
            EngineStopped: the loop has ended, or is about to.
        """
        done: Future[T] = Future()

        def answer() -> None:
            try:
                done.set_result(question())
            except Exception as error:  # whoever asked is told; the loop goes on
                done.set_exception(error)

        with self._wake:
            if self._failure is not None or self._closing:
                raise EngineStopped(self.health().reason)
            self._inbox.append(answer)
            self._wake.notify()
        return done

    def lose(self, error: BaseException) -> None:
        """End with an error as soon as the step under way is over."""
        with self._wake:
            self._failure = error
            self._wake.notify_all()

    def health(self) -> Health:
        """What the loop is doing, from any thread."""
        if self._failure is not None:
            return Health(live=False, ready=False, reason=f"the engine failed: {self._failure!r}")
        if self._closing:
            return Health(live=False, ready=False, reason="the engine is closed")
        started_s = self._step_started_s
        busy_s = 0.0 if started_s is None else time.monotonic() - started_s
        if busy_s > STEP_STUCK_S:
            return Health(live=False, ready=False, reason=f"a step has taken {busy_s:.0f} s")
        if self._draining:
            return Health(live=True, ready=False, reason=f"draining; {self._open} requests left")
        return Health(live=True, ready=True, reason=f"{self._open} requests open")

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for the open ones; true when none is left."""
        with self._wake:
            self._draining = True
            return self._wake.wait_for(
                lambda: self._open == 0 or self._failure is not None, timeout_s
            )

    def close(self, wait_s: float | None = None) -> None:
        """Abort what is open and end the thread; wait so long for it. Again: nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(wait_s)
        if self._kv_log is not None:
            self._kv_log.close(time.time())

    # --- everything below runs on the loop's own thread -------------------------------------------

    def _run(self) -> None:
        try:
            while self._obey():
                self._turn()
        except RankLost as error:
            log.error("%s", error)
            self._failure = error
        except BaseException as error:  # every reader learns of it below
            log.exception("the engine loop failed")
            self._failure = error
        reason: FinishReason = "abort" if self._failure is None else "error"
        with self._wake:
            self._closing = True
            for command in self._inbox:
                command()
            self._inbox.clear()
        for sequence in list(self._sequences.values()):
            why = None if self._failure is None else repr(self._failure)
            self._end(sequence, reason, error=why)
        self._post()

    def _obey(self) -> bool:
        """Apply the commands that have come; wait for one if there is nothing to do."""
        if not self._launched and self._scheduler.idle():
            self._step_started_s = None
        with self._wake:
            self._wake.wait_for(
                lambda: self._closing or self._inbox or self._launched
                or not self._scheduler.idle() or self._failure is not None
            )  # fmt: skip
            if self._closing:
                return False
            if self._failure is not None:
                raise self._failure
            commands = list(self._inbox)
            self._inbox.clear()
        self._scheduler.advance(time.monotonic_ns() // 1000)
        for command in commands:
            command()
        return True

    def _turn(self) -> None:
        """One turn: fill the pipeline, then commit the oldest step."""
        self._acknowledge(wait=False)
        while len(self._launched) <= self._config.overlap and self._launch():
            pass
        if self._launched:
            plan, numbers, pending = self._launched.popleft()
            self._commit(plan, numbers, pending)
        else:
            self._acknowledge(wait=True)
        if self._kv_log is not None:
            self._kv_log.tell(time.time())
        self._post()

    def _acknowledge(self, *, wait: bool) -> None:
        """Tell the scheduler of the copies that have ended."""
        for tickets, good in self._executor.copied(wait=wait):
            self._scheduler.acknowledge(tickets, good)

    def _launch(self) -> bool:
        native = self._scheduler.plan()
        if native is None:
            return False
        joined = []
        for (slot, number), cached in zip(
            native.joined.tolist(), native.cached.tolist(), strict=True
        ):
            sequence = self._sequences[number]
            if not sequence.output_ids:
                sequence.cached_tokens = cached
            joined.append(
                Joined(
                    slot=slot,
                    params=sequence.request.params,
                    prompt_ids=sequence.request.prompt_ids,
                    output_ids=tuple(sequence.output_ids),
                )
            )
        carried = {name: getattr(native, name) for name in PLANNED}
        plan = StepPlan(joined=tuple(joined), **carried)
        self._executor.copy(plan)
        if not plan.rows:
            return True
        self._step_started_s = self._step_started_s or time.monotonic()
        self._launched.append((plan, native.numbers, self._executor.launch(plan)))
        return True

    def _commit(self, plan: StepPlan, numbers: Numbers, pending: Pending) -> None:
        try:
            result = pending.result()
        except StepError as error:
            log.error("step %d failed: %s", plan.step, error)
            result = StepResult.failing(plan, str(error))
        now_s, started_s = time.monotonic(), self._step_started_s
        took_us = 0 if result.failed or started_s is None else round(1e6 * (now_s - started_s))
        self._step_started_s = now_s  # the next one is under way, or about to be planned
        stop, run_start = np.zeros(plan.rows, np.bool_), plan.run_start.tolist()
        for row, number in enumerate(numbers.tolist()):
            sequence = self._sequences.get(number)
            if sequence is None:
                continue  # ended while this step was in flight; the lifecycle drops its result
            if row in result.failed:
                self._scheduler.abort(number)
                self._end(sequence, "error", error=result.failed[row])
            elif plan.sampled[row]:
                run = range(run_start[row], run_start[row + 1])
                stop[row] = self._accept_run(sequence, run, result)
        self._scheduler.commit(plan.step, result.token_ids, stop, took_us)
        if self._config.drafts_max:
            self._scheduler.guess(numbers)

    def _enter(self, number: int, request: Request, stream: Stream) -> None:
        params = request.params
        sequence = LiveSequence.start(number, request, stream, self._tokenizer)
        self._sequences[number] = sequence
        if self._closing:
            return
        self.prompt_tokens += len(request.prompt_ids)
        max_tokens = params.max_tokens
        assert max_tokens is not None, "settled by Bounds"
        prompt = np.asarray(request.prompt_ids, np.int32)
        if request.session is not None and request.session.supersedes:
            self._supersede(request.session.key, number)
        try:
            self._scheduler.submit(number, prompt, max_tokens, request.salt, *sequence.hints)
        except (ValueError, QueueFull) as error:  # what the door let through by mistake
            log.exception("request %d was refused by the scheduler", number)
            self._end(sequence, "error", error=str(error))

    def _supersede(self, session_key: str, number: int) -> None:
        for other in list(self._sequences.values()):
            of = other.request.session
            if of is not None and of.key == session_key and other.number != number:
                self._cancel(other.number, why="a later turn of its session superseded it")

    def _cancel(self, number: int, *, why: str | None = None) -> None:
        sequence = self._sequences.get(number)
        if sequence is not None:
            self._scheduler.abort(number)
            self._end(sequence, "abort", error=why)

    def _accept_run(self, sequence: LiveSequence, run: range, result: StepResult) -> bool:
        """Take the tokens of a run; true if the sequence stops there: what follows is dropped."""
        for at in run:
            if result.token_ids[at] < 0:
                break
            if self._accept(sequence, at, result):
                result.token_ids[at + 1 : run.stop] = -1
                return True
        return False

    def _accept(self, sequence: LiveSequence, at: int, result: StepResult) -> bool:
        """Take a sampled token into the sequence; true if it ends there."""
        token = int(result.token_ids[at])
        self.generation_tokens += 1
        sequence.take(token, result.logprobs.get(at))
        if token in sequence.stop_ids:
            self._end(sequence, "stop")
            return True
        piece = sequence.detokenizer.push(token)
        if piece.stopped:
            self._end(sequence, "stop", text=piece.text)
            return True
        if len(sequence.output_ids) == sequence.request.params.max_tokens:
            self._end(sequence, "length", text=piece.text)
            return False  # the scheduler counts too
        if piece.tokens:
            self._outbox.append((sequence.stream, sequence.delta(piece.text, piece.tokens)))
        return False

    def _end(
        self,
        sequence: LiveSequence,
        reason: FinishReason,
        *,
        text: str = "",
        error: str | None = None,
    ) -> None:
        self._outbox.append((sequence.stream, sequence.last(text, reason, error)))
        self.finished[reason] += 1
        del self._sequences[sequence.number]
        with self._wake:
            self._open -= 1
            self._wake.notify_all()

    def _post(self) -> None:
        """Hand the step's deltas on."""
        outbox, self._outbox = self._outbox, []
        deliver(outbox)

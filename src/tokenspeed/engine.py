"""The engine: one thread that plans, launches, commits and hands on. The only clock.

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
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar, final

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed import models
from tokenspeed._core import QueueFull
from tokenspeed.bounds import Bounds
from tokenspeed.config import DEFAULT_MODEL, EngineConfig
from tokenspeed.errors import (
    ConfigError,
    EngineStopped,
    OverloadedError,
    RankLost,
    RequestError,
    StepError,
)
from tokenspeed.fsm.kv_log import make_kv_log
from tokenspeed.fsm.replay import make_scheduler
from tokenspeed.plan import PLANNED, Joined, StepPlan, StepResult
from tokenspeed.ranks import LOST_JOIN_S, Leader, build_on_mesh, make_executor
from tokenspeed.request import (
    Completion,
    Delta,
    FinishReason,
    Request,
    SamplingParams,
    Session,
    session_key,
)
from tokenspeed.sequence import LiveSequence
from tokenspeed.spmd import Pending
from tokenspeed.stats import Cleared, Health, Stats
from tokenspeed.stream import Prompt, Stream, completion, deliver, join, running_loop, several
from tokenspeed.text import ChatEncoder, Tokenizer

__all__ = ["Engine", "Progress"]

log = logging.getLogger("tokenspeed.engine")

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) while an engine starts; bytes for weights, steps for warm-up."""

T = TypeVar("T")
Numbers = NDArray[np.int64]

STEP_STUCK_S = 120.0
"""A step that takes longer makes the engine report itself dead."""


@final
class Engine:
    """Generates text with one model. Make one with `from_pretrained`; close it, or use `with`.

    All methods may be called from any thread; those that return a Stream or are coroutines may be
    called on any event loop.
    """

    def __init__(
        self,
        model: models.Model,
        tokenizer: Tokenizer,
        chat: ChatEncoder | None,
        config: EngineConfig,
        *,
        model_name: str,
        model_path: str,
        leader: Leader | None = None,
    ) -> None:
        self.config = config
        self.model_name = model_name
        self.model_path = model_path
        self.tokenizer = tokenizer
        self.chat_encoder = chat
        self.loaded: models.Loaded | None = None
        self.vocab_size = model.config.vocab_size
        model = models.in_cache_groups(model, config)
        self.pages = config.pages or models.default_pages(model, config)
        self.context_max = models.context_max(model, config, self.pages)
        self._bounds = Bounds(self.vocab_size, self.context_max)
        host_pages = models.host_pages(model, config)
        self._scheduler = make_scheduler(
            config.trace_lifecycle,
            config.record_scheduler,
            page_size=config.page_size,
            pages=self.pages,
            slots=config.slots,
            waiting_max=config.slots + config.waiting_max,  # the door counts both; see submit
            step_tokens=config.prefill_chunk,
            context_max=self.context_max,
            overlap=config.overlap,
            prefix_cache=config.prefix_cache,
            itl_budget_us=config.itl_budget_us,
            session_pages_max=config.kept_pages_max(self.pages),
            host_pages=host_pages,
            draft_tokens=config.drafts_max,
            **model.kv.groups.settings,
        )
        self._kv_log = make_kv_log(config.kv_events, self._scheduler, time.time())
        self._wake = threading.Condition()
        self._failure: BaseException | None = None
        self._leader = leader
        self._executor = make_executor(
            leader,
            self._lose,
            model,
            slots=config.slots,
            pages=self.pages,
            page_size=config.page_size,
            context_max=self.context_max,
            overlap=config.overlap,
            eos_ids=tokenizer.eos_ids,
            host_pages=host_pages,
        )
        self._sequences: dict[int, LiveSequence] = {}
        self._launched: deque[tuple[StepPlan, Numbers, Pending]] = deque()
        self._outbox: list[tuple[Stream, Delta]] = []
        self._inbox: deque[Callable[[], None]] = deque()
        self._open = 0
        self._numbers = itertools.count()
        self._draining = False
        self._closing = False
        self._prompt_tokens = 0
        self._generation_tokens = 0
        self._finished: Counter[str] = Counter()
        self._step_started_s: float | None = None
        self._thread = threading.Thread(target=self._run, name="tokenspeed-engine", daemon=True)
        self._thread.start()

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = DEFAULT_MODEL,
        *,
        config: EngineConfig | None = None,
        progress: Progress | None = None,
        **settings: Any,
    ) -> Self:
        """Load a model and start the engine.

        Args:
            model: a GGUF file, a Hugging Face directory, a hub id, or the default model's name.
            config: every setting at once; or give settings by name (`dtype="float32"`).
            progress: called with (phase, done, total) during download, weights and warm-up.

        Raises:
            ConfigError: a setting is wrong, before weights are read.
            CheckpointError: the model is missing, corrupt or unknown, before memory is taken.
        """
        report = progress or (lambda _phase, _done, _total: None)
        config = attrs.evolve(config or EngineConfig(), **settings)
        if config.device != "cpu" and not torch.cuda.is_available():
            raise ConfigError("device", config.device, "cpu: torch finds no CUDA device here")
        checkpoint = models.open_model(str(model), config.load_format, progress=report)
        tokenizer = Tokenizer.from_source(checkpoint.tokenizer)
        chat = ChatEncoder.from_source(tokenizer, checkpoint.tokenizer)
        peak, started_s = models.PeakMemory(), time.monotonic()
        built, leader = build_on_mesh(checkpoint, config, partial(report, "weights"))
        seconds, path = time.monotonic() - started_s, str(checkpoint.path)
        names = {"model_name": str(model), "model_path": path}
        engine = cls(built, tokenizer, chat, config, leader=leader, **names)
        engine.loaded = models.Loaded(built.weights_bytes, seconds, peak.peak_bytes)
        try:
            engine._warm_up(report)
        except BaseException:
            engine.close()
            raise
        return engine

    # --- requests -------------------------------------------------------------------------------

    def submit(self, request: Request) -> Stream:
        """Queue a request and return its stream; in an event loop, the stream is that loop's.

        Raises:
            RequestError: the request can never be served; names the field.
            OverloadedError: `slots + waiting_max` requests are open already.
            EngineStopped: the engine drains, has closed, or has failed.
        """
        request = self._bounds.settle(request)
        with self._wake:
            if self._failure is not None or self._closing or self._draining:
                raise EngineStopped(self.health().reason)
            if self._open >= self.config.slots + self.config.waiting_max:
                raise OverloadedError(
                    f"{self._open} requests are running or waiting, the most that "
                    "--slots and --waiting-max allow; try again later"
                )
            self._open += 1
            number = next(self._numbers)
            stream = Stream(number, self._abort, running_loop())
            self._inbox.append(lambda: self._start(number, request, stream))
            self._wake.notify()
        return stream

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Generate from a prompt (text, or token ids), yielding deltas; leaving early aborts."""
        with self.submit(self._request(prompt, params)) as stream:
            yield from stream

    async def astream(
        self, prompt: Prompt, params: SamplingParams | None = None
    ) -> AsyncIterator[Delta]:
        """`stream` for an event loop."""
        async with self.submit(self._request(prompt, params)) as stream:
            async for delta in stream:
                yield delta

    def generate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """Generate for each prompt, batched together, in their order. Raises StepError."""
        streams = [self.submit(self._request(p, params)) for p in several(prompts)]
        try:
            return [completion(join(list(stream))) for stream in streams]
        finally:
            for stream in streams:
                stream.abort()

    async def agenerate(
        self, prompts: Prompt | Sequence[Prompt], params: SamplingParams | None = None
    ) -> list[Completion]:
        """`generate` for an event loop."""
        streams = [self.submit(self._request(p, params)) for p in several(prompts)]
        try:
            return [completion(join([delta async for delta in stream])) for stream in streams]
        finally:
            for stream in streams:
                stream.abort()

    def encode_chat(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        """The prompt ids of a conversation, by the model's chat template.

        Args:
            messages: `{"role": ..., "content": ...}` each, oldest first.

        Raises:
            RequestError: the model has no chat template, or the template refuses the messages.
        """
        if self.chat_encoder is None:
            raise RequestError("messages", f"{self.model_name} has no chat template; send a prompt")
        return self.chat_encoder.encode_chat(messages, tokens_max=self.context_max)

    def _request(self, prompt: Prompt, params: SamplingParams | None) -> Request:
        ids = self.tokenizer.encode(prompt, special=True) if isinstance(prompt, str) else prompt
        return Request(prompt_ids=tuple(ids), params=params or SamplingParams())

    def _abort(self, number: int) -> None:
        with self._wake:
            self._inbox.append(lambda: self._cancel(number))
            self._wake.notify()

    def clear_cache(self) -> Cleared:
        """Evict the cached pages that no request holds. Waits for the step under way.

        Raises:
            EngineStopped: the engine has closed, or has failed.
        """
        return Cleared(*self._ask(self._scheduler.clear_cache).result())

    def end_session(self, name: str, owner: str = "") -> bool:
        """No next turn of a session will come: what it has cached goes first. False: not known.

        Raises:
            EngineStopped: the engine has closed, or has failed.
        """
        key = session_key(owner, name)
        return self._ask(lambda: self._scheduler.end_session(key)).result()

    def prefetch_session(self, session: Session) -> int | None:
        """The next turn of a session is near: pages of the last one that come back from the host.

        They come while nobody waits, as far as there are pages that nobody is promised, wants or
        has asked to be kept, and are kept for `session.ttl_s`, until the turn comes, or until the
        session ends. None: not known.

        Raises:
            RequestError: `ttl_s` is 0.
            EngineStopped: the engine has closed, or has failed.
        """
        if session.ttl_s == 0:
            raise RequestError("ttl_s", "ttl_s: got 0; expected how long pages are to be kept")
        keep_us = max(1, round(1e6 * session.ttl_s))
        return self._ask(lambda: self._scheduler.prefetch(session.key, keep_us)).result()

    def _ask(self, question: Callable[[], T]) -> Future[T]:
        """Have the engine's thread call something between two steps."""
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

    # --- state ----------------------------------------------------------------------------------

    def stats(self) -> Stats:
        """Counters and gauges, O(1); safe from any thread."""
        native = self._scheduler.stats()
        named_alike = (field.name for field in attrs.fields(Stats))
        counts = {name: getattr(native, name) for name in named_alike if hasattr(native, name)}
        return Stats(
            requests_running=native.running,
            requests_waiting=native.waiting,
            prefix_cache_queries=native.prefix_queries,
            prefix_cache_hits=native.prefix_hits,
            prefix_cache_hits_host=native.prefix_hits_host,
            host_stores=native.stores,
            host_loads=native.loads,
            host_prefetches=native.prefetches,
            host_copies_failed=native.copies_failed,
            prompt_tokens=self._prompt_tokens,
            generation_tokens=self._generation_tokens,
            requests_finished=dict(self._finished),
            transitions=self._scheduler.transitions(),
            **counts,
        )

    @property
    def lost(self) -> RankLost | None:
        """Why the mesh cannot go on; None: it can, or there is no mesh. From any thread."""
        return None if self._leader is None else self._leader.lost

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

    def close(self) -> None:
        """Abort what is open, stop the thread, free the model. Repeated calls do nothing."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread is not threading.current_thread():
            self._thread.join(None if self.lost is None else LOST_JOIN_S)
        if self._kv_log is not None:
            self._kv_log.close(time.time())
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _lose(self, error: RankLost) -> None:
        with self._wake:
            self._failure = error
            self._wake.notify_all()

    def _warm_up(self, report: Progress) -> None:
        report("warm-up", 0, 1)
        prompt = [0] * min(8, self.context_max - 1)
        self.generate([prompt], SamplingParams(temperature=0, max_tokens=1))
        report("warm-up", 1, 1)

    # --- the loop: everything below runs on the engine's thread ---------------------------------

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
        while len(self._launched) <= self.config.overlap and self._launch():
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
        if self.config.drafts_max:
            self._scheduler.guess(numbers)

    def _start(self, number: int, request: Request, stream: Stream) -> None:
        params = request.params
        sequence = LiveSequence.start(number, request, stream, self.tokenizer)
        self._sequences[number] = sequence
        if self._closing:
            return
        self._prompt_tokens += len(request.prompt_ids)
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
        self._generation_tokens += 1
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
        self._finished[reason] += 1
        del self._sequences[sequence.number]
        with self._wake:
            self._open -= 1
            self._wake.notify_all()

    def _post(self) -> None:
        """Hand the step's deltas on."""
        outbox, self._outbox = self._outbox, []
        deliver(outbox)

"""The engine: one model, loaded, and what may be asked of it from any thread.

Rule: nothing here computes or decides. Requests are checked against what the model can serve, and
handed to the step loop (`loop.py`); questions about its state are asked between two steps.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Self, final

import attrs
import torch

from tokenspeed import models
from tokenspeed.bounds import Bounds
from tokenspeed.config import DEFAULT_MODEL, EngineConfig
from tokenspeed.errors import ConfigError, RankLost, RequestError
from tokenspeed.fsm.kv_log import make_kv_log
from tokenspeed.fsm.replay import make_scheduler
from tokenspeed.loop import StepLoop
from tokenspeed.ranks import LOST_JOIN_S, Leader, build_on_mesh, make_executor
from tokenspeed.request import Completion, Delta, Request, SamplingParams, Session, session_key
from tokenspeed.stats import Cleared, Health, Stats
from tokenspeed.stream import Prompt, Stream, completion, join, several
from tokenspeed.text import ChatEncoder, Tokenizer

__all__ = ["Engine", "Progress", "warm_ups"]

Progress = Callable[[str, int, int], None]
"""Called with (phase, done, total) while an engine starts: bytes of weights, batches of warm-up."""

WARM_TOKENS = 4
"""Of each request of warm-up: by the third all of a batch have come in, and decode together."""


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
            page_size=config.page_tokens,
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
        kv_log = make_kv_log(config.kv_events, self._scheduler, time.time())
        self._loop = StepLoop(config, self._scheduler, tokenizer, kv_log)
        self._leader = leader
        self._executor = make_executor(
            leader,
            self._loop.lose,
            model,
            slots=config.slots,
            pages=self.pages,
            page_size=config.page_tokens,
            context_max=self.context_max,
            overlap=config.overlap,
            eos_ids=tokenizer.eos_ids,
            host_pages=host_pages,
            graphs=config.cuda_graphs,
        )
        self._loop.start(self._executor)

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
        config = attrs.evolve(config, page_size=models.page_size(checkpoint.config, config))
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
        return self._loop.submit(self._bounds.settle(request))

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

    def clear_cache(self) -> Cleared:
        """Evict the cached pages that no request holds. Waits for the step under way.

        Raises:
            EngineStopped: the engine has closed, or has failed.
        """
        return Cleared(*self._loop.ask(self._scheduler.clear_cache).result())

    def end_session(self, name: str, owner: str = "") -> bool:
        """No next turn of a session will come: what it has cached goes first. False: not known.

        Raises:
            EngineStopped: the engine has closed, or has failed.
        """
        key = session_key(owner, name)
        return self._loop.ask(lambda: self._scheduler.end_session(key)).result()

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
        return self._loop.ask(lambda: self._scheduler.prefetch(session.key, keep_us)).result()

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
            prompt_tokens=self._loop.prompt_tokens,
            generation_tokens=self._loop.generation_tokens,
            requests_finished=dict(self._loop.finished),
            transitions=self._scheduler.transitions(),
            **counts,
        )

    @property
    def lost(self) -> RankLost | None:
        """Why the mesh cannot go on; None: it can, or there is no mesh. From any thread."""
        return None if self._leader is None else self._leader.lost

    def health(self) -> Health:
        """What the loop is doing, from any thread."""
        return self._loop.health()

    def drain(self, timeout_s: float) -> bool:
        """Take no more requests and wait for the open ones; true when none is left."""
        return self._loop.drain(timeout_s)

    def close(self) -> None:
        """Abort what is open, stop the thread, free the model. Repeated calls do nothing."""
        self._loop.close(None if self.lost is None else LOST_JOIN_S)
        self._executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _warm_up(self, report: Progress) -> None:
        """Serve requests of our own before anybody comes; a GPU's leave nothing in the cache."""
        batches = warm_ups(self.config, self.context_max)
        for done, lengths in enumerate(batches):
            report("warm-up", done, len(batches))
            params = SamplingParams(
                temperature=0 if done == 0 else 1,
                top_p=0.9,
                top_k=50,
                max_tokens=1 if done == 0 else min(WARM_TOKENS, self.context_max - max(lengths)),
                ignore_eos=True,
            )
            token = done % self.vocab_size  # of its own: nothing of a batch is cached
            self.generate([[token] * length for length in lengths], params)
        if len(batches) > 1:
            self.clear_cache()
        report("warm-up", len(batches), len(batches))


def warm_ups(config: EngineConfig, context_max: int) -> list[list[int]]:
    """What an engine serves while it starts: batches of prompts, by their lengths in tokens.

    A GPU compiles kernels for each kind of step when the first one comes, and captures the decode
    steps of each bucket of rows then: seconds that nobody should wait for while others are served.
    The buckets that are powers of two come first here, and a prompt that fills a step.
    """
    short = [min(8, context_max - 1)]
    if config.device == "cpu":
        return [short]
    full = [min(config.prefill_chunk, context_max - 1)]
    return [short, full, *([1] * (1 << i) for i in range(config.slots.bit_length()))]

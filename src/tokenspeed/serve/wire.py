"""JSON bodies to frozen requests: OpenAI's chat and completions.

Rule: nothing is coerced and nothing ignored in silence. A body is strict JSON (msgspec: no NaN, no
overflow, no invalid UTF-8); cattrs structures it without conversions; what is wrong is a
RequestError that names the field as its sender wrote it (`messages[2].content`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, get_args, get_origin

import attrs
import cattrs
import msgspec
from attrs import frozen
from cattrs import AttributeValidationNote, IterableValidationNote

from tokenspeed.errors import RequestError
from tokenspeed.request import (
    LOGPROBS_MAX,
    PRIORITY_MAX,
    STOP_MAX,
    SamplingParams,
    Session,
    shown,
)

__all__ = [
    "CHOICES_MAX", "ChatRequest", "CompletionRequest", "Message", "PrefetchRequest", "decode",
]  # fmt: skip

CHOICES_MAX = 8
MESSAGES_MAX = 4096
ITEMS_MAX, KEYS_MAX = 4096, 1024
"""Entries of an array, and of an object; checked before any of them is looked at."""
ROLES = ("system", "developer", "user", "assistant", "tool")

T = TypeVar("T", bound=attrs.AttrsInstance)


@frozen(kw_only=True)
class Message:
    """One turn. `content` is a string, a list of text parts, or null for an empty one."""

    role: str
    content: Any = None
    name: str | None = None


@frozen(kw_only=True)
class StreamOptions:
    """`include_usage`: a last chunk carries the usage."""

    include_usage: bool | None = None


@frozen(kw_only=True)
class _Common:
    """What both protocols share; None is the default of SamplingParams."""

    model: str
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    n: int | None = None
    seed: int | None = None
    stop: Any = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    cache_salt: str | None = None
    session_id: str | None = None
    session_ttl_s: float | None = None
    session_supersede: bool | None = None
    priority: int | None = None

    @property
    def choices(self) -> int:
        """Sequences for each prompt."""
        return 1 if self.n is None else self.n

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with its usage."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def session(self, owner: str = "") -> Session | None:
        """The session that this is a turn of. Raises RequestError."""
        if self.session_id is None:
            for name in ("session_ttl_s", "session_supersede"):
                if getattr(self, name) is not None:
                    raise RequestError(name, f"{name}: only with session_id")
            return None
        return _session(
            name=self.session_id,
            ttl_s=self.session_ttl_s or 0.0,
            supersedes=bool(self.session_supersede),
            owner=owner,
        )

    def _params(self, *, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        given = {name: value for name in _PLAIN if (value := getattr(self, name)) is not None}
        return SamplingParams(
            **given,
            max_tokens=max_tokens,
            logprobs=logprobs,
            stop=_stop(self.stop),
            stop_token_ids=tuple(self.stop_token_ids or ()),
            logit_bias=_logit_bias(self.logit_bias or {}),
        )

    def check(self) -> None:
        """Bounds that belong to the protocol rather than to the sampler."""
        _within("n", self.choices, 1, CHOICES_MAX)
        if self.stream_options is not None and not self.stream:
            raise RequestError("stream_options", "stream_options: only with stream: true")
        if len(self.stop_token_ids or ()) > 64:
            raise RequestError("stop_token_ids", "stop_token_ids: at most 64")
        _within("priority", self.priority or 0, -PRIORITY_MAX, PRIORITY_MAX)
        if len(self.cache_salt or "") > 256:
            raise RequestError("cache_salt", "cache_salt: at most 256 characters")
        self.session()


_PLAIN = (
    "temperature", "top_p", "top_k", "min_p", "seed", "presence_penalty", "frequency_penalty",
    "repetition_penalty", "min_tokens", "ignore_eos",
)  # fmt: skip


@frozen(kw_only=True)
class ChatRequest(_Common):
    """POST /v1/chat/completions."""

    messages: list[Message]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def params(self) -> SamplingParams:
        """What the engine is asked for. Raises RequestError."""
        if self.top_logprobs is not None:
            _within("top_logprobs", self.top_logprobs, 0, LOGPROBS_MAX)
            if not self.logprobs:
                raise RequestError("top_logprobs", "top_logprobs: only with logprobs: true")
        if self.max_completion_tokens is not None:
            _within("max_completion_tokens", self.max_completion_tokens, 1, 2**31 - 1)
        limit = (
            self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens
        )
        return self._params(
            max_tokens=limit, logprobs=(self.top_logprobs or 0) if self.logprobs else None
        )

    def conversation(self) -> list[dict[str, Any]]:
        """The messages for a chat template. Raises RequestError."""
        if not 1 <= len(self.messages) <= MESSAGES_MAX:
            raise RequestError(
                "messages", f"messages: got {len(self.messages)}; expected 1 to {MESSAGES_MAX}"
            )
        return [_turn(message, at) for at, message in enumerate(self.messages)]


@frozen(kw_only=True)
class CompletionRequest(_Common):
    """POST /v1/completions."""

    prompt: Any
    logprobs: int | None = None
    echo: bool | None = None

    def params(self) -> SamplingParams:
        """What the engine is asked for. Raises RequestError."""
        limit = 16 if self.max_tokens is None else self.max_tokens
        return self._params(max_tokens=limit, logprobs=self.logprobs)

    def prompts(self) -> list[str] | list[list[int]]:
        """One or several prompts, as text or as ids. Raises RequestError."""
        prompt = self.prompt
        if isinstance(prompt, str):
            return [prompt]
        if not isinstance(prompt, list) or not prompt:
            raise RequestError("prompt", "prompt: expected a string, strings, or token ids")
        if all(_is_int(item) for item in prompt):
            return [prompt]
        if len(prompt) * self.choices > CHOICES_MAX:
            raise RequestError("prompt", f"prompt: prompts times n may be at most {CHOICES_MAX}")
        for at, item in enumerate(prompt):
            whole = isinstance(item, str) or (
                isinstance(item, list) and item and all(_is_int(i) for i in item)
            )
            if not whole or type(item) is not type(prompt[0]):
                raise RequestError(
                    f"prompt[{at}]", f"prompt[{at}]: expected text or token ids, alike"
                )
        return prompt

    def check(self) -> None:
        """See _Common.check."""
        super().check()
        if self.echo:
            raise RequestError("echo", "echo: the prompt is not repeated here; send echo: false")


UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "audio": (None,),
    "best_of": (None, 1),
    "function_call": (None, "none"),
    "functions": (None, []),
    "modalities": (None, ["text"]),
    "prediction": (None,),
    "reasoning_effort": (None,),
    "response_format": (None, {"type": "text"}),
    "suffix": (None, ""),
    "tool_choice": (None, "none", "auto"),
    "tools": (None, []),
    "web_search_options": (None,),
}
"""Fields of the protocol that are not served here -> the values that ask for nothing."""

TOLERATED = {
    "metadata", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier",
    "store", "user", "verbosity",
}  # fmt: skip
"""Fields that do not change what is generated."""


@frozen(kw_only=True)
class PrefetchRequest:
    """How long what is fetched for a session's next turn is kept for it, in seconds."""

    session_ttl_s: float = 60.0

    def session(self, name: str, owner: str) -> Session:
        """The session that is meant. Raises RequestError."""
        if self.session_ttl_s == 0:
            raise RequestError("session_ttl_s", "session_ttl_s: got 0; expected more")
        return _session(name=name, ttl_s=self.session_ttl_s, owner=owner)


def _session(**given: Any) -> Session:
    """A session; what is wrong with it goes by the names of the protocol."""
    try:
        return Session(**given)
    except RequestError as error:
        field = {"name": "session_id", "ttl_s": "session_ttl_s"}[str(error.field)]
        message = field + error.message.removeprefix(str(error.field))
        raise RequestError(field, message) from error


def decode(body: bytes, kind: type[T]) -> T:
    """A body as a request of this kind.

    Raises:
        RequestError: it is not strict JSON, or a field is missing, unknown, of a wrong type or out
            of bounds.
    """
    try:
        raw = msgspec.json.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise RequestError(None, f"the body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise RequestError(None, "the body is nested too deeply") from error
    if not isinstance(raw, dict):
        raise RequestError(None, f"the body must be an object; got {_json_type(raw)}")
    known = {attribute.name for attribute in attrs.fields(kind)}
    for name, value in raw.items():
        if name in UNSUPPORTED and name not in known:
            if not any(type(value) is type(v) and value == v for v in UNSUPPORTED[name]):
                raise RequestError(name, f"{name}: not supported by this server; leave it out")
        elif name not in known and name not in TOLERATED:
            raise RequestError(name[:64], f"{name[:64]}: unknown field; leave it out")
    try:
        request = _converter.structure({k: v for k, v in raw.items() if k in known}, kind)
    except cattrs.BaseValidationError as error:
        raise _first(error, "") from error
    if isinstance(request, _Common):
        request.check()
    return request


# --- structuring without conversions --------------------------------------------------------------


def _json_type(value: Any) -> str:
    names = {bool: "a boolean", int: "a number", float: "a number", str: "a string"}
    names |= {list: "an array", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _strict(expected: str, accepts: tuple[type, ...], *, boolean: bool = False) -> Any:
    def structure(value: Any, _type: Any) -> Any:
        if not isinstance(value, accepts) or (isinstance(value, bool) and not boolean):
            raise TypeError(f"expected {expected}; got {_json_type(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise TypeError(f"expected {expected}; got {value}")
        return value

    return structure


def _array(value: Any, kind: Any) -> Any:
    if not isinstance(value, list):
        raise TypeError(f"expected an array; got {_json_type(value)}")
    if len(value) > ITEMS_MAX:
        raise TypeError(f"got {len(value)} entries; expected at most {ITEMS_MAX}")
    (element,) = get_args(kind)
    entries = []
    for at, item in enumerate(value):  # not cattrs' own loop, which gathers an error an entry
        try:
            entries.append(_lists.structure(item, element))
        except Exception as error:
            error.add_note(IterableValidationNote(f"entry {at}", at, element))
            raise cattrs.IterableValidationError("", [error], kind) from error
    return entries


def _object(value: Any, kind: Any) -> Any:
    if not isinstance(value, dict):
        raise TypeError(f"expected an object; got {_json_type(value)}")
    if len(value) > KEYS_MAX:
        raise TypeError(f"got {len(value)} entries; expected at most {KEYS_MAX}")
    known = {attribute.name for attribute in attrs.fields(kind)} if attrs.has(kind) else value
    strange = [k for k, v in value.items() if k not in known and v not in (None, [], "", False)]
    if strange:
        raise TypeError(f"{strange[0][:64]!r} is not supported; leave it out")
    return _plain.structure(value, kind)


def _scalars(converter: cattrs.Converter) -> cattrs.Converter:
    converter.register_structure_hook(int, _strict("an integer", (int,)))
    converter.register_structure_hook(float, _strict("a number", (int, float)))
    converter.register_structure_hook(str, _strict("a string", (str,)))
    converter.register_structure_hook(bool, _strict("a boolean", (bool,), boolean=True))
    return converter


def _origin(kind: Any) -> Any:
    return get_origin(kind)


# cattrs takes any iterable for a list and any mapping for an object; the outer two want JSON's.
_plain = _scalars(cattrs.Converter())
_lists = _scalars(cattrs.Converter())
_lists.register_structure_hook(Message, _object)
_converter = _scalars(cattrs.Converter())
_converter.register_structure_hook_func(lambda kind: _origin(kind) is list, _array)
_converter.register_structure_hook_func(
    lambda kind: _origin(kind) is dict or kind is StreamOptions, _object
)


def _first(error: BaseException, path: str) -> RequestError:
    """The first leaf of cattrs' tree of errors, with its path."""
    if isinstance(error, RequestError):
        return error
    children: Sequence[BaseException] = getattr(error, "exceptions", ())
    if children:
        return _first(children[0], path + _step(children[0], path))
    if isinstance(error, KeyError):
        missing = f"{path}.{error.args[0]}" if path else str(error.args[0])
        return RequestError(missing, f"{missing}: required, and missing")
    return RequestError(path or None, f"{path}: {error}")


def _step(error: BaseException, path: str) -> str:
    for note in getattr(error, "__notes__", ()):
        if isinstance(note, IterableValidationNote):
            return f"[{note.index}]" if isinstance(note.index, int) else f".{note.index}"
        if isinstance(note, AttributeValidationNote) and not isinstance(error, KeyError):
            return f".{note.name}" if path else note.name
    return ""


# --- fields with more than one form ---------------------------------------------------------------


def _within(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise RequestError(name, f"{name}: got {shown(value)}; expected {low} to {high}")


def _stop(value: Any) -> tuple[str, ...]:
    if value is None:
        return ()
    stops = [value] if isinstance(value, str) else value
    if not isinstance(stops, list) or len(stops) > STOP_MAX:
        raise RequestError("stop", f"stop: expected a string or up to {STOP_MAX} strings")
    if not all(isinstance(s, str) and 0 < len(s) <= 256 for s in stops):
        raise RequestError("stop", "stop: expected strings of 1 to 256 characters")
    return tuple(stops)


def _logit_bias(value: Mapping[str, float]) -> dict[int, float]:
    out = {}
    for key, bias in value.items():
        if not (key.isascii() and key.isdigit() and len(key) < 10):
            raise RequestError("logit_bias", f"logit_bias: {key[:20]!r} is no token id")
        out[int(key)] = bias
    return out


def _turn(message: Message, at: int) -> dict[str, Any]:
    where = f"messages[{at}]"
    if message.role not in ROLES:
        raise RequestError(f"{where}.role", f"{where}.role: expected one of {', '.join(ROLES)}")
    role = "system" if message.role == "developer" else message.role
    return {"role": role, "content": _content(message.content, f"{where}.content")}


def _content(content: Any, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise RequestError(where, f"{where}: expected a string or text parts")
    texts = []
    for at, part in enumerate(content):
        text = part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None
        if not isinstance(text, str):
            raise RequestError(
                f"{where}[{at}]", f'{where}[{at}]: expected {{"type": "text", "text"}}'
            )
        texts.append(text)
    return "".join(texts)

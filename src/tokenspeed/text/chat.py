"""A conversation to prompt ids, by the model's own chat template.

Rule: the template is a stranger's program: it runs in a sandbox, with a bound on what it may print
and how long. What people wrote stays text: a special token's spelling inside a message is not that
token.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, final

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from tokenspeed.config import TokenizerSource
from tokenspeed.errors import CheckpointError, RequestError
from tokenspeed.text.tokenizer import Tokenizer

__all__ = ["ChatEncoder", "ChatTemplate"]

SOURCE_MAX = 256 * 1024
OUTPUT_MAX = 64 * 1024 * 1024
RENDER_MAX_S = 2.0

Message = Mapping[str, Any]


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox: no attributes that start with an underscore, no mutation, no long ranges."""

    intercepted_binops = frozenset(("*", "**"))

    def call_binop(
        self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any
    ) -> Any:
        sized = isinstance(left, (str, list, tuple)) or isinstance(right, (str, list, tuple))
        if operator == "**" or (sized and max(_size(left), 1) * max(_size(right), 1) > SOURCE_MAX):
            raise jinja2.exceptions.SecurityError(f"{operator} with these operands is too large")
        return super().call_binop(context, operator, left, right)


def _size(value: Any) -> int:
    return len(value) if isinstance(value, (str, list, tuple)) else int(value)


def _refuse(message: str) -> None:
    raise jinja2.exceptions.TemplateError(message)


def _now(form: str) -> str:
    return datetime.now(tz=UTC).strftime(form)


def _to_json(value: Any, indent: int | None = None) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


@final
class ChatTemplate:
    """A Jinja chat template.

    Args:
        source: its text.
        bos, eos: texts of the special tokens that it may print.

    Raises:
        CheckpointError: it is too large, or no template.
    """

    def __init__(self, source: str, bos: str = "", eos: str = "") -> None:
        if len(source) > SOURCE_MAX:
            raise CheckpointError(
                "chat_template", f"{len(source)} characters; at most {SOURCE_MAX}"
            )
        environment = _Environment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            undefined=jinja2.ChainableUndefined,
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_refuse, strftime_now=_now)
        self._tokens = {"bos_token": bos, "eos_token": eos}
        try:
            self._template = environment.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError("chat_template", f"not a template: {error}") from error

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> str:
        """The conversation as text.

        Args:
            messages: `{"role", "content"}` each; content is a string.
            add_generation_prompt: end with the opening of the model's own turn.

        Raises:
            RequestError: the template refuses the messages, or prints too much for too long.
        """
        deadline_s = time.monotonic() + RENDER_MAX_S
        parts: list[str] = []
        size = 0
        try:
            for part in self._template.generate(
                messages=list(messages), add_generation_prompt=add_generation_prompt, **self._tokens
            ):
                parts.append(part)
                size += len(part)
                if size > OUTPUT_MAX or time.monotonic() > deadline_s:
                    raise RequestError("messages", "the chat template prints too much for too long")
        except RequestError:
            raise
        except Exception as error:  # a stranger's program may raise anything
            raise RequestError("messages", f"the chat template refuses this: {error}") from error
        return "".join(parts)


@final
class ChatEncoder:
    """A chat template with its tokenizer."""

    def __init__(self, template: ChatTemplate, tokenizer: Tokenizer) -> None:
        self._template = template
        self._tokenizer = tokenizer
        texts = sorted(tokenizer.special.values(), key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, texts)) or r"(?!)")

    @classmethod
    def from_source(cls, tokenizer: Tokenizer, source: TokenizerSource) -> ChatEncoder | None:
        """The checkpoint's own template, or None if it has none."""
        if source.chat_template is None:
            return None
        bos = tokenizer.special.get(-1 if source.bos_id is None else source.bos_id, "")
        eos = tokenizer.special.get(source.eos_ids[0], "") if source.eos_ids else ""
        return cls(ChatTemplate(source.chat_template, bos, eos), tokenizer)

    def encode_chat(
        self,
        messages: Sequence[Message],
        *,
        add_generation_prompt: bool = True,
        tokens_max: int | None = None,
    ) -> list[int]:
        """Prompt ids of a conversation. Content may be a string or a list of text parts.

        The template's own special tokens are tokens; their spellings inside a message are text. For
        that, such a spelling is masked by a private character while the template runs.
        """
        masks: dict[str, str] = {}
        masked = [self._mask(_plain(m, at), masks) for at, m in enumerate(messages)]
        text = self._template.render(masked, add_generation_prompt=add_generation_prompt)
        if not masks:
            return self._tokenizer.encode(text, special=True, tokens_max=tokens_max)
        return self._encode_masked(text, masks)

    def _mask(self, message: dict[str, Any], masks: dict[str, str]) -> dict[str, Any]:
        def hide(found: re.Match[str]) -> str:
            # Unassigned private-use characters; one a spelling.
            return masks.setdefault(found.group(), chr(0x10F000 + len(masks)))

        return {
            key: self._special.sub(hide, value) if isinstance(value, str) else value
            for key, value in message.items()
        }

    def _encode_masked(self, text: str, masks: Mapping[str, str]) -> list[int]:
        ids: list[int] = []
        at = 0
        for found in self._special.finditer(text):
            ids += self._plain_ids(text[at : found.start()], masks)
            ids += self._tokenizer.encode(found.group(), special=True)
            at = found.end()
        return ids + self._plain_ids(text[at:], masks)

    def _plain_ids(self, text: str, masks: Mapping[str, str]) -> list[int]:
        for spelling, mask in masks.items():
            text = text.replace(mask, spelling)
        return self._tokenizer.encode(text, special=False) if text else []


def _plain(message: Message, index: int) -> dict[str, Any]:
    """The message with its content as one string."""
    content = message.get("content")
    if isinstance(content, list):
        parts = [part.get("text") for part in content if part.get("type") == "text"]
        if len(parts) != len(content):
            raise RequestError(f"messages[{index}].content", "only text parts are supported")
        content = "".join(map(str, parts))
    return {**message, "content": "" if content is None else content}

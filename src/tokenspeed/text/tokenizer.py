"""Text to ids and back, by the checkpoint's own tables.

Rule: the same ids as the model was trained on, or a refusal. A GGUF names its pre-tokenizer instead
of containing it; what that name means stands in `PRE_TOKENIZERS`, and another name is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, final

import tokenizers
from tokenizers import AddedToken, Regex, models, pre_tokenizers

from tokenspeed.config import TokenizerSource
from tokenspeed.errors import CheckpointError, RequestError

__all__ = ["PRE_TOKENIZERS", "Tokenizer"]

_CONTROL, _USER_DEFINED = 3, 4

_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")


def _split(pattern: str) -> Any:
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def _byte_level() -> Any:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


def _digits() -> Any:
    # Every numeric character stands alone, then GPT-2's own expression.
    return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), _byte_level()])


PRE_TOKENIZERS: dict[str, Callable[[], Any]] = {
    "gpt-2": _byte_level,
    "smollm": _digits,
    "llama-bpe": lambda: _split(_LLAMA3),
    "qwen2": lambda: _split(_QWEN2),
}
"""GGUF's `tokenizer.ggml.pre` -> how text is split before merging."""


def _bytes_of_alphabet() -> dict[str, int]:
    """GPT-2's printable stand-in for each byte, and back (Radford et al., 2019)."""
    kept = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in kept]
    table = {chr(b): b for b in kept}
    table.update({chr(256 + i): b for i, b in enumerate(others)})
    return table


_ALPHABET = _bytes_of_alphabet()


@final
class Tokenizer:
    """Byte-level BPE without a normaliser. Make one with `from_source`.

    Attributes:
        vocab_size: ids are 0 to vocab_size - 1.
        bos_id, eos_ids: as the checkpoint says.
        special: id -> text of the special tokens.
        piece_bytes_max: bytes of the longest token.
    """

    def __init__(self, inner: Any, source: TokenizerSource) -> None:
        self._inner = inner
        self._plain = tokenizers.Tokenizer.from_str(inner.to_str())
        self._plain.encode_special_tokens = True
        self.vocab_size = inner.get_vocab_size(with_added_tokens=True)
        self.bos_id = source.bos_id
        self.eos_ids = source.eos_ids
        added = inner.get_added_tokens_decoder()
        self.special = {i: token.content for i, token in added.items() if token.special}
        self._added: dict[int, str] = {i: token.content for i, token in added.items()}
        self._pieces: dict[int, bytes] = {}
        self.piece_bytes_max = max(len(self.piece(i)) for i in range(self.vocab_size))

    @classmethod
    def from_source(cls, source: TokenizerSource) -> Tokenizer:
        """Build it from a `tokenizer.json` or from a GGUF's tables.

        Raises:
            CheckpointError: the file is broken, or the pre-tokenizer is unknown.
        """
        if source.json_path is None:
            return cls(_from_tables(source), source)
        try:
            text = source.json_path.read_text(encoding="utf-8")
            if json.loads(text).get("model", {}).get("type") != "BPE":
                raise CheckpointError(source.json_path, "expected a byte-level BPE tokenizer")
            inner = tokenizers.Tokenizer.from_str(text)
        except CheckpointError:
            raise
        except Exception as error:  # the library raises bare Exceptions
            raise CheckpointError(source.json_path, f"not a tokenizer: {error}") from error
        inner.no_truncation()
        inner.no_padding()
        return cls(inner, source)

    def encode(self, text: str, *, special: bool, tokens_max: int | None = None) -> list[int]:
        """Ids of a text; nothing is added at its ends.

        Args:
            text: any Unicode.
            special: whether a special token's text in it means that token. False for text from
                outside, which must not be able to end a turn.
            tokens_max: refuse, before the work, a text that cannot have so few.

        Raises:
            RequestError: the text has more than `tokens_max` tokens even if all are of the longest.
        """
        if tokens_max is not None and len(text.encode()) > tokens_max * self.piece_bytes_max:
            raise RequestError(
                "prompt",
                f"the prompt has {len(text)} characters; at most {tokens_max} tokens fit",
                code="context_length_exceeded",
            )
        inner: Any = self._inner if special else self._plain
        ids: list[int] = inner.encode(text, add_special_tokens=False).ids
        return ids

    def decode(self, ids: Sequence[int], *, skip_special: bool = False) -> str:
        """Text of some ids; bytes that are no UTF-8 become U+FFFD."""
        kept = (i for i in ids if not (skip_special and i in self.special))
        return b"".join(map(self.piece, kept)).decode("utf-8", "replace")

    def piece(self, token_id: int) -> bytes:
        """The bytes that a token stands for; none for an id without a token."""
        found = self._pieces.get(token_id)
        if found is None:
            found = self._pieces[token_id] = self._bytes(token_id)
        return found

    def _bytes(self, token_id: int) -> bytes:
        if token_id in self._added:
            return self._added[token_id].encode()
        text: str | None = self._inner.id_to_token(token_id)
        if text is None:
            return b""
        if all(char in _ALPHABET for char in text):
            return bytes(_ALPHABET[char] for char in text)
        return text.encode()


def _from_tables(source: TokenizerSource) -> Any:
    make = PRE_TOKENIZERS.get(source.pre)
    if make is None:
        known = ", ".join(PRE_TOKENIZERS)
        raise CheckpointError("tokenizer.ggml.pre", f"got {source.pre!r}; known are {known}")
    vocab = {text: i for i, text in enumerate(source.vocab)}
    merges = []
    for line in source.merges:
        left, gap, right = line.partition(" ")
        if not gap:
            raise CheckpointError("tokenizer.ggml.merges", f"got {line!r}; expected two pieces")
        merges.append((left, right))
    inner: Any = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=merges, fuse_unk=False))
    inner.pre_tokenizer = make()
    for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
        texts = [t for t, k in zip(source.vocab, source.kinds, strict=False) if k == kind]
        tokens = [AddedToken(t, special=special, normalized=False) for t in texts]
        (inner.add_special_tokens if special else inner.add_tokens)(tokens)
    return inner

"""Law: whatever JSON arrives, decoding ends in a request or a RequestError, and nothing else."""

from __future__ import annotations

import json
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tokenspeed.errors import RequestError
from tokenspeed.serve.wire import ChatRequest, CompletionRequest, decode

NUMBERS = st.one_of(
    st.integers(),
    st.integers(0, 4000).map(lambda power: 10**power),
    st.integers(0, 4000).map(lambda power: -(10**power)),
    st.floats(allow_nan=False, allow_infinity=False),
)
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.text(max_size=8))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
MESSAGES = [{"role": "user", "content": "x"}]


def taken(body: bytes, kind: type[ChatRequest | CompletionRequest]) -> bool:
    """Is it a request? False: it was refused, as it must be."""
    try:
        asked = decode(body, kind)
        asked.params()
        if isinstance(asked, ChatRequest):
            asked.conversation()
        else:
            asked.prompts()
    except RequestError:
        return False
    return True


@pytest.mark.parametrize("kind", [ChatRequest, CompletionRequest])
@settings(max_examples=200, deadline=None)
@given(data=st.data())
def test_any_value_in_any_field_is_taken_or_refused(kind: Any, data: st.DataObject) -> None:
    names = [a.name for a in attrs.fields(kind)] + ["tools", "user", "best_of", "response_format"]
    body: dict[str, Any] = {"model": "m", "messages": MESSAGES, "prompt": "x"}
    del body["prompt" if kind is ChatRequest else "messages"]
    assert taken(json.dumps(body).encode(), kind)
    body |= data.draw(st.dictionaries(st.sampled_from(names), VALUES, max_size=3))
    taken(json.dumps(body).encode(), kind)


@settings(max_examples=200, deadline=None)
@given(VALUES)
def test_any_json_is_taken_or_refused(value: Any) -> None:
    assert not taken(json.dumps(value).encode(), ChatRequest)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=64))
def test_any_bytes_are_refused(body: bytes) -> None:
    assert not taken(body, ChatRequest)

"""The adapters that `tokenspeed monitor` knows by name: how engines report their KV pages.

Rule: an adapter reads and does not judge; what a record does not say is None, never guessed.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, final

import msgspec
from attrs import frozen

from tokenspeed.fsm.kv_events import DEVICE, Adapter, Batch, Clear, Event, Evict, Policy, Publish

__all__ = [
    "ADAPTERS",
    "VLLM",
    "AllBlocksCleared",
    "BlockRemoved",
    "BlockStored",
    "EventBatch",
]


class BlockStored(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    """Pages of a prefix one after the other, the first under `parent_block_hash`."""

    block_hashes: list[Any]
    parent_block_hash: Any
    token_ids: list[Any]
    block_size: int
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[Any] | None = None
    group_idx: int | None = None


class BlockRemoved(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    """Pages that are not to be found any more."""

    block_hashes: list[Any]
    medium: str | None = None
    group_idx: int | None = None


class AllBlocksCleared(msgspec.Struct, tag="AllBlocksCleared"):
    """No page is to be found any more."""


class EventBatch(msgspec.Struct, omit_defaults=True):
    """What happened at `ts`. `seq` is what recorders add: on the wire it travels beside this."""

    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None
    seq: int | None = None


_TAGS: dict[str, type[msgspec.Struct]] = {
    "BlockStored": BlockStored,
    "BlockRemoved": BlockRemoved,
    "AllBlocksCleared": AllBlocksCleared,
}


_PROMISED = Policy(one_copy=False, leaves_first=False)


@final
@frozen
class VLLM:
    """vLLM's `vllm.distributed.kv_events`, and engines that speak the same.

    A record is a batch, a bare event, or the three frames of a message (topic, sequence number,
    batch). Batches and events may be objects (with the tag in `type`) or arrays (with the tag
    first). vLLM does not deduplicate: several pages may hold one key, and each reports its own
    store and removal. Its order of eviction is not documented. Hence the policy.
    """

    policy: Policy = _PROMISED

    def read(self, record: Any) -> Iterator[Event]:
        """See `Adapter.read`."""
        number: int | None = None
        match record:
            case [str() | bytes(), int() | bytes() as seq, bytes() | dict() | list() as payload]:
                number = int.from_bytes(seq, "big") if isinstance(seq, bytes) else seq
                record = msgspec.msgpack.decode(payload) if isinstance(payload, bytes) else payload
            case {"type": _} | [str(), *_]:
                record = {"ts": 0.0, "events": [record]}
        if isinstance(record, list):
            record = dict(zip(EventBatch.__struct_fields__, record, strict=False))
        batch = msgspec.convert(record, EventBatch)
        rank = batch.data_parallel_rank
        yield Batch(batch.seq if number is None else number, "" if rank is None else f"rank {rank}")
        for event in batch.events:
            yield from self._event(event)

    def _event(self, event: Any) -> Iterator[Event]:
        if isinstance(event, list) and event and event[0] in _TAGS:
            names = _TAGS[event[0]].__struct_fields__
            event = {"type": event[0], **dict(zip(names, event[1:], strict=False))}
        match msgspec.convert(event, BlockStored | BlockRemoved | AllBlocksCleared):
            case BlockStored() as stored:
                yield from self._stored(stored)
            case BlockRemoved() as removed:
                for name in removed.block_hashes:
                    yield Evict(_key(name, removed.group_idx), removed.medium or DEVICE)
            case AllBlocksCleared():
                yield Clear()

    def _stored(self, event: BlockStored) -> Iterator[Event]:
        """One event stores a run of pages, each under the one before."""
        size, tokens, count = event.block_size, event.token_ids, len(event.block_hashes)
        parent = event.parent_block_hash
        before = None if parent is None else _key(parent, event.group_idx)
        if event.extra_keys is not None and len(event.extra_keys) != count:
            raise ValueError(f"extra_keys: got {len(event.extra_keys)}; expected one a block hash")
        for i, name in enumerate(event.block_hashes):
            # The last page takes what is left, so that a wrong number of tokens shows.
            own = tokens[i * size : (i + 1) * size if i + 1 < count else None]
            key = _key(name, event.group_idx)
            fields = {"lora_id": event.lora_id, "lora_name": event.lora_name}
            extra = event.extra_keys[i] if event.extra_keys else None
            yield Publish(
                key,
                before,
                tuple(own) if tokens else None,
                {**fields, "extra_keys": extra},
                size,
                event.medium or DEVICE,
            )
            before = key


def _key(name: object, group: int | None) -> Hashable:
    """A block hash, apart for each group of layers that has pages of its own."""
    if not isinstance(name, int | str | bytes):
        raise ValueError(f"block hash: got {name!r}; expected a number, a text or bytes")
    return name if group is None else (group, name)


ADAPTERS: Mapping[str, Adapter] = {
    "vllm": VLLM(),
    # The same schema over a radix tree: one node a key, and only leaves are evicted.
    "sglang": VLLM(Policy()),
    "tokenspeed": VLLM(Policy()),  # our own, from `kv_log`
}

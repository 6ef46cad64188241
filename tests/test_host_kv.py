"""The host's pages of KV: what comes back is what was stored, or the copy has failed."""

from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from tokenspeed.spmd.host import HostKV
from tokenspeed.spmd.kv import LayerKV

NOTHING = np.empty((0, 3), np.int64)


def layers() -> tuple[LayerKV, ...]:
    """Three layers of eight pages; bfloat16, so that nothing is rounded on the way unseen."""
    torch.manual_seed(0)
    return tuple(
        (torch.randn(8, 4, 2, 16).to(torch.bfloat16), torch.randn(8, 4, 2, 16).to(torch.bfloat16))
        for _ in range(3)
    )


def ended(host: HostKV) -> dict[int, bool]:
    return {
        ticket: good
        for tickets, flags in host.ended(wait=True)
        for ticket, good in zip(tickets.tolist(), flags.tolist(), strict=True)
    }


def test_what_comes_back_is_what_was_stored_and_in_any_page() -> None:
    pages = layers()
    before = [part.clone() for layer in pages for part in layer]
    host = HostKV(pages, 4)
    host.start(np.array([[10, 1, 3], [11, 2, 0]]), NOTHING)
    assert ended(host) == {10: True, 11: True}
    host.start(NOTHING, np.array([[12, 7, 3], [13, 1, 0]]))
    assert ended(host) == {12: True, 13: True}
    for was, part in zip(before, (part for layer in pages for part in layer), strict=True):
        assert torch.equal(part[7], was[1])
        assert torch.equal(part[1], was[2])
        assert torch.equal(part[[0, 2, 3, 4, 5, 6]], was[[0, 2, 3, 4, 5, 6]])
    host.close()


def test_a_page_that_changed_on_the_host_is_not_loaded(caplog: pytest.LogCaptureFixture) -> None:
    pages = layers()
    host = HostKV(pages, 4)
    host.start(np.array([[0, 1, 3], [1, 2, 0]]), NOTHING)
    ended(host)
    host._bytes[3][5] ^= 1
    before = pages[0][0][6].clone()
    with caplog.at_level(logging.ERROR):
        host.start(NOTHING, np.array([[2, 6, 3], [3, 7, 0]]))
        assert ended(host) == {2: False, 3: True}
    assert "host page 3" in caplog.text
    assert torch.equal(pages[0][0][6], before), "nothing of it reached the device"
    assert torch.equal(pages[2][1][7], pages[2][1][2])
    host.close()


def test_a_copy_that_raises_has_failed_and_the_next_is_made(
    caplog: pytest.LogCaptureFixture,
) -> None:
    host = HostKV(layers(), 4)
    host.start(np.array([[0, 99, 0]]), NOTHING)
    assert ended(host) == {0: False}
    host.start(np.array([[1, 0, 0]]), NOTHING)
    assert ended(host) == {1: True}
    assert "1 copies between device and host failed" in caplog.text
    host.close()


def test_nothing_under_way_is_nothing_to_wait_for() -> None:
    host = HostKV(layers(), 1)
    assert host.ended(wait=True) == []
    host.close()

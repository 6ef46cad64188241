"""Other packages' attention, asked on our tensors: what they are given means what ours means.

None of them is installed here. In their places stand functions that take what their documentation
names and compute it token by token, so that a page, a length or a part in the wrong place shows.
"""

from __future__ import annotations

import importlib.machinery
import sys
from collections.abc import Callable
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from tokenspeed.bench import kernels as latent_bench
from tokenspeed.bench import ops, peers
from tokenspeed.bench.report import Measured, Report, Timing, tried
from tokenspeed.kernels import AttentionPlan, mla_decode, mla_decode_plan, paged_attention

SCALE = 0.11


def attend(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
    """q[n, H, d] of a row over all of its keys[L, K, d] and values[L, K, e]; the last query sees
    the last key."""
    groups = q.shape[1] // keys.shape[1]
    keys, values = (x.repeat_interleave(groups, 1) for x in (keys, values))
    scores = torch.einsum("qhd,khd->hqk", q, keys) * scale
    own = torch.arange(len(keys) - len(q), len(keys))[:, None]
    scores = scores.masked_fill(torch.arange(len(keys)) > own, -torch.inf)
    return torch.einsum("hqk,khe->qhe", scores.softmax(-1), values)


def gathered(pages: Tensor, listed: Tensor, length: int) -> Tensor:
    return pages[listed.long()].flatten(0, 1)[:length]


class InferLatent:
    """flashinfer.mla.BatchMLAPagedAttentionWrapper."""

    def __init__(self, workspace: Tensor) -> None:
        assert workspace.dtype == torch.uint8

    def plan(
        self, qo_indptr: Tensor, kv_indptr: Tensor, kv_indices: Tensor, kv_len_arr: Tensor,
        num_heads: int, head_dim_ckv: int, head_dim_kpe: int, page_size: int, causal: bool,
        sm_scale: float, q_data_type: torch.dtype, kv_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        assert (num_heads, head_dim_ckv, head_dim_kpe, page_size) == (3, 16, 8, 4)
        assert q_data_type == kv_data_type == torch.float32
        self.rows = (qo_indptr.tolist(), kv_indptr.tolist(), kv_indices, kv_len_arr.tolist())
        self.scale = sm_scale

    def run(self, q_nope: Tensor, q_pe: Tensor, ckv: Tensor, kpe: Tensor) -> Tensor:
        starts, pages, listed, lens = self.rows
        q, every, out = torch.cat((q_nope, q_pe), -1), torch.cat((ckv, kpe), -1), []
        for row, length in enumerate(lens):
            keys = gathered(every, listed[pages[row] : pages[row + 1]], length)[:, None]
            own = q[starts[row] : starts[row + 1]]
            out.append(attend(own, keys, keys[..., :16], self.scale))
        return torch.cat(out)


class InferPaged:
    """flashinfer.BatchPrefillWithPagedKVCacheWrapper."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert (workspace.dtype, kv_layout) == (torch.uint8, "NHD")

    def plan(
        self, qo_indptr: Tensor, paged_kv_indptr: Tensor, paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor, num_qo_heads: int, num_kv_heads: int, head_dim_qk: int,
        page_size: int, *, causal: bool, q_data_type: torch.dtype,
    ) -> None:  # fmt: skip
        assert causal
        assert (num_qo_heads, num_kv_heads, head_dim_qk, page_size) == (4, 2, 8, 4)
        self.rows = (qo_indptr.tolist(), paged_kv_indptr.tolist(), paged_kv_indices)
        self.last = paged_kv_last_page_len.tolist()

    def run(self, q: Tensor, kv: tuple[Tensor, Tensor]) -> Tensor:
        starts, pages, listed = self.rows
        out = []
        for row, last in enumerate(self.last):
            own = listed[pages[row] : pages[row + 1]]
            keys, values = (gathered(x, own, (len(own) - 1) * 4 + last) for x in kv)
            out.append(attend(q[starts[row] : starts[row + 1]], keys, values, 8**-0.5))
        return torch.cat(out)


def flash_3(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, qv: Tensor | None = None,
    cache_seqlens: Tensor, page_table: Tensor, softmax_scale: float | None = None, causal: bool,
) -> Tensor:  # fmt: skip
    """flash_attn_interface.flash_attn_with_kvcache; qv looks at the values."""
    assert causal
    out = []
    for own, table, length in zip(range(len(q)), page_table, cache_seqlens.tolist(), strict=True):
        used = table[: -(-length // k_cache.shape[1])]
        keys, values = (gathered(x, used, length) for x in (k_cache, v_cache))
        query = q[own]
        if qv is not None:
            query, keys = torch.cat((query, qv[own]), -1), torch.cat((keys, values), -1)
        out.append(attend(query, keys, values, softmax_scale or q.shape[-1] ** -0.5))
    return torch.stack(out)


def flash_2(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, *, cache_seqlens: Tensor, causal: bool
) -> Tensor:
    """flash_attn.flash_attn_with_kvcache, without pages."""
    assert causal
    rows = zip(q, k_cache, v_cache, cache_seqlens.tolist(), strict=True)
    return torch.stack([attend(a, k[:n], v[:n], a.shape[-1] ** -0.5) for a, k, v, n in rows])


def flash_mla(
    q: Tensor, k_cache: Tensor, block_table: Tensor, cache_seqlens: Tensor, head_dim_v: int,
    metadata: str, splits: str, *, softmax_scale: float, causal: bool,
) -> tuple[Tensor, str]:  # fmt: skip
    """flash_mla.flash_mla_with_kvcache."""
    assert (metadata, splits, causal) == ("metadata of 6 rows", "splits", True)
    lens = cache_seqlens.tolist()
    rows = zip(q, block_table, lens, strict=True)
    keys = [gathered(k_cache, t[: -(-n // k_cache.shape[1])], n) for _, t, n in rows]
    made = [
        attend(own, key, key[..., :head_dim_v], softmax_scale)
        for own, key in zip(q, keys, strict=True)
    ]
    return torch.stack(made), "lse"


@pytest.fixture
def packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them, as if they were installed."""

    def metadata(_lens: Tensor, rows: int, kv_heads: int) -> tuple[str, str]:
        assert kv_heads == 1
        return f"metadata of {rows} rows", "splits"

    known: dict[str, dict[str, Any]] = {
        "flashinfer": {
            "mla": SimpleNamespace(BatchMLAPagedAttentionWrapper=InferLatent),
            "BatchPrefillWithPagedKVCacheWrapper": InferPaged,
        },
        "flash_attn_interface": {"flash_attn_with_kvcache": flash_3},
        "flash_attn": {"flash_attn_with_kvcache": flash_2},
        "flash_mla": {"get_mla_metadata": metadata, "flash_mla_with_kvcache": flash_mla},
    }
    for name, members in known.items():
        module = ModuleType(name)
        module.__spec__ = importlib.machinery.ModuleSpec(name, None)
        vars(module).update(members)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(peers, "WORKSPACE_BYTES", 1)


def randoms(*shapes: tuple[int, ...]) -> list[Tensor]:
    random = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=random) for shape in shapes]


def table(*rows: list[int]) -> Tensor:
    return torch.tensor(rows, dtype=torch.int32)


@pytest.mark.usefixtures("packages")
def test_latent_attention_is_asked_of_each_in_its_words() -> None:
    q, pages = randoms((6, 3, 24), (9, 4, 24))
    plan = mla_decode_plan(
        table([0, 2, 4, 6])[0], table([9, 4, 2])[0], table([5, 1, 8], [3, 0, 0], [7, 0, 0]),
        page_size=4, heads=3, q_len_max=2, latent=16, rope=8,
    )  # fmt: skip
    wanted, _ = mla_decode(q, pages, plan, SCALE)
    asked = peers.latent([(q, pages, plan)] * 2, SCALE)
    assert list(asked) == ["flashinfer", "flash_attn_3", "flash_mla"]
    for make in asked.values():
        calls = make()
        assert len(calls) == 2
        made = calls[1]()
        made = (made[0] if isinstance(made, tuple) else made).reshape(wanted.shape)
        torch.testing.assert_close(made, wanted)


@pytest.mark.usefixtures("packages")
def test_attention_is_asked_of_each_in_its_words() -> None:
    q, k, v = randoms((4, 4, 8), (9, 4, 2, 8), (9, 4, 2, 8))
    plan = AttentionPlan(
        query_start=table([0, 2, 4])[0],
        context_lens=table([7, 6])[0],
        page_table=table([5, 1, 8], [3, 0, 2]),
        page_size=4,
    )
    wanted = paged_attention(q, k, v, plan)
    one, other = (x[plan.page_table.long()].flatten(1, 2)[:, :9] for x in (k, v))
    asked = peers.attention([(q, k, v, plan, (one, other))])
    assert list(asked) == ["flashinfer", "flash_attn_3", "flash_attn_2"]
    for make in asked.values():
        [call] = make()
        torch.testing.assert_close(call().reshape(wanted.shape), wanted)


def test_who_is_not_installed_is_not_asked() -> None:
    assert peers.latent([], SCALE).keys() <= {"flashinfer", "flash_attn_3", "flash_mla"}
    assert "flash_mla" not in peers.attention([])


def fails(*_: Any) -> Any:
    raise ValueError("pages of 64 alone\nand more")


@pytest.mark.parametrize(
    ("make", "compare", "clock"),
    [
        (fails, lambda _: 0.0, lambda _: 1.0),
        (lambda: [print], fails, lambda _: 1.0),
        (lambda: [print], lambda _: 0.0, fails),
    ],
)
def test_who_fails_fails_alone_and_it_is_said(
    make: Callable[[], Any], compare: Callable[[Any], float], clock: Callable[[Any], float]
) -> None:
    found = tried(make, compare, clock)
    assert found == Timing(failed="ValueError: pages of 64 alone")
    assert tried(lambda: [print], lambda _: 0.5, lambda _: 7.0) == Timing(us=7.0, error=0.5)
    cell = Measured(op="rope", floor_us=1.0, bytes=1, flops=1, times={"peer": found})
    report = Report(
        floor="floor", error_max=1.0, machine="m", copy_gb_s=1.0, matmul_tflop_s=1.0,
        matmul_after_tflop_s=1.0, cells={"c": cell},
    )  # fmt: skip
    [*_, column] = report.table().columns
    assert list(column.cells) == ["failed: ValueError: pages of 64 alone"]
    assert not report.right(found)


def test_results_of_packages_are_compared_with_the_reference() -> None:
    """Rows and queries apart or not, and what comes beside a result is left out."""
    wanted = torch.arange(24.0).view(4, 2, 3)
    for made in (wanted, wanted.view(2, 2, 2, 3), (wanted.view(2, 2, 2, 3), "lse")):
        assert ops._error(ops._shaped(made, wanted), wanted) == 0
    assert ops._error(ops._shaped(wanted + 1, wanted), wanted) > 0.01
    assert latent_bench.ERROR_MAX < ops.ERROR_MAX

"""What the ops of a step take on this GPU, beside torch's way and the ceilings of the same run.

Rule: everything is measured in one run, on random data, in bfloat16, cold, by replays of a CUDA
graph; a peer that waits for the device is called instead. A backend's result is compared with the
reference before it is timed. The floor is what the bytes and the products of a cell take at the
rates that a large copy and a large product have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, final

import torch
from attrs import evolve, field, frozen
from torch import Tensor
from torch.nn import functional
from torch.nn.attention.bias import causal_lower_right

from tokenspeed import kernels
from tokenspeed.bench.cells import Rates, Tell, chosen, reported
from tokenspeed.bench.gpu import COLD_BYTES, eager_us, timed_us
from tokenspeed.bench.peers import Peers, attention
from tokenspeed.bench.report import Calls, Measured, Report, Timing, tried
from tokenspeed.kernels import (
    EIGHT_BITS,
    AttentionPlan,
    Draws,
    Problem,
    Routing,
    mla_decode_plan,
    registry,
)
from tokenspeed.kernels.contract import capability
from tokenspeed.kernels.cpu.mla import mla_prefill as torch_prefill
from tokenspeed.kernels.cpu.sampling import draw as torch_draw
from tokenspeed.kernels.mla import mla_problem
from tokenspeed.kernels.pages import kv_dtype

__all__ = ["CELLS", "measure"]

PAGE = 16
HEADS, KV_HEADS, DIM = 32, 8, 128
LATENT, ROPE, NOPE = 512, 64, 128
EXPERTS, CHOSEN, HIDDEN, FFN = 64, 6, 2048, 1408
VOCAB = 128_256
ERROR_MAX = 1e-2
"""||out - reference|| / ||reference|| in bfloat16; of ids, the share that differs."""


@final
@frozen(kw_only=True)
class Work:
    """One cell, ready to run. calls: each with other data; bytes, flops: of one call; peers: other
    ways to the same, and `waiting` those of them that cannot be captured; packages: other packages,
    whose results are compared."""

    op: str
    problem: Problem
    calls: Calls
    bytes: int
    flops: int = 0
    peers: dict[str, Calls] = field(factory=dict)
    waiting: frozenset[str] = frozenset()
    packages: Peers = field(factory=dict)


def _problem(op: str, dtype: str = "bfloat16") -> Problem:
    return Problem(op, "cuda", dtype, capability=capability(torch.device("cuda", 0)))


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def _ints(values: Sequence[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device="cuda")


def _sdpa(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    bias = causal_lower_right(q.shape[2], keys.shape[2]) if q.shape[2] > 1 else None
    return functional.scaled_dot_product_attention(q, keys, values, bias, enable_gqa=True)


def _attention(batch: int, queries: int, context: int, kv: torch.dtype = torch.bfloat16) -> Work:
    """Rows of so many queries behind so many cached tokens; the peer has its keys in one piece, and
    in bfloat16."""
    length = context + queries
    wide = -(-length // PAGE)
    token_bytes = 2 * KV_HEADS * DIM * kv.itemsize
    row_bytes = wide * PAGE * token_bytes
    sets = max(2, -(-COLD_BYTES // (batch * row_bytes)))
    k, v = (_random(sets * batch * wide, PAGE, KV_HEADS, DIM).to(kv) for _ in range(2))
    order = torch.randperm(len(k), device="cuda").to(torch.int32).view(sets, batch, wide)
    calls, peer, given = [], [], []
    for at, own in enumerate(order):
        q = _random(batch * queries, HEADS, DIM)
        plan = AttentionPlan(
            query_start=_ints([queries * row for row in range(batch + 1)]),
            context_lens=_ints([context] * batch),
            page_table=own.contiguous(),
            page_size=PAGE,
            counts=(queries,) * batch,
        )
        calls.append(partial(kernels.paged_attention, q, k, v, plan))
        mine = slice(at * batch * wide, (at + 1) * batch * wide)
        one, other = (
            x[mine].bfloat16().view(batch, wide * PAGE, KV_HEADS, DIM)[:, :length] for x in (k, v)
        )
        folded = q.view(batch, queries, HEADS, DIM).transpose(1, 2)
        peer.append(partial(_sdpa, folded, one.transpose(1, 2), other.transpose(1, 2)))
        given.append((q, k, v, plan, (one, other)))
    seen = queries * context + queries * (queries + 1) // 2
    return Work(
        op="paged_attention",
        problem=evolve(_problem("paged_attention"), kv_dtype=kv_dtype(torch.bfloat16, kv)),
        calls=calls,
        bytes=batch * (length * token_bytes + queries * HEADS * DIM * 4),
        flops=4 * batch * seen * HEADS * DIM,
        peers={"torch sdpa": peer},
        packages=attention(given) if kv == torch.bfloat16 else {},
    )


def _latent(queries: int, context: int, heads: int = 16) -> Work:
    """One row of latent attention, expanded."""
    length = context + queries
    wide = -(-length // PAGE)
    pages, up = _random(2 * wide, PAGE, LATENT + ROPE), _random(heads, 2 * NOPE, LATENT) / 16
    calls, peer = [], []
    for table in torch.randperm(2 * wide, device="cuda").to(torch.int32).view(2, 1, wide):
        plan = mla_decode_plan(
            _ints([0, queries]), _ints([length]), table.contiguous(), page_size=PAGE, heads=heads,
            q_len_max=queries,
        )  # fmt: skip
        given = (_random(queries, heads, NOPE + ROPE), pages, up, plan, 192**-0.5)
        calls.append(partial(kernels.mla_prefill, *given))
        peer.append(partial(torch_prefill, *given))
    seen = queries * context + queries * (queries + 1) // 2
    expanding = 2 * length * heads * 2 * NOPE * LATENT
    q = torch.empty(1, heads, 1, dtype=torch.bfloat16, device="cuda")
    return Work(
        op="mla_prefill",
        problem=mla_problem(q, pages, plan, "mla_prefill"),
        calls=calls,
        bytes=length * (LATENT + ROPE) * 2 + queries * heads * (2 * NOPE + ROPE) * 2,
        flops=2 * seen * heads * (2 * NOPE + ROPE) + expanding,
        peers={"torch": peer},
    )


def _grouped(x: Tensor, experts: Tensor, weights: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Experts by torch's product of groups."""
    tokens, chosen = experts.shape
    ordered, order = experts.flatten().sort(stable=True)
    every = torch.arange(1, len(gate_up) + 1, device="cuda")
    ends = torch.searchsorted(ordered, every).to(torch.int32)
    wide = functional.grouped_mm(x[order // chosen], gate_up.transpose(1, 2), offs=ends)
    gate, up = wide.chunk(2, dim=-1)
    made = functional.grouped_mm(functional.silu(gate) * up, down.transpose(1, 2), offs=ends)
    out = torch.empty_like(made).index_copy_(0, order, made).view(tokens, chosen, -1)
    return torch.bmm(weights[:, None], out.float()).squeeze(1).to(x.dtype)


def _experts(tokens: int) -> Work:
    """DeepSeek-V2-Lite's: 64 experts, 6 a token."""
    gate_up = _random(EXPERTS, 2 * FFN, HIDDEN) / HIDDEN**0.5
    down = _random(EXPERTS, HIDDEN, FFN) / FFN**0.5
    given = []
    for _ in range(8):
        experts = torch.rand(tokens, EXPERTS, device="cuda").topk(CHOSEN).indices
        weights = torch.rand(tokens, CHOSEN, device="cuda")
        given.append((_random(tokens, HIDDEN), experts, weights, gate_up, down))
    read = sum(len(set(one[1].flatten().tolist())) for one in given) / len(given)
    by_torch = hasattr(functional, "grouped_mm")
    return Work(
        op="moe_mlp",
        problem=_problem("moe_mlp"),
        calls=[partial(kernels.moe_mlp, *one) for one in given],
        bytes=int(read * 3 * HIDDEN * FFN * 2) + 4 * tokens * HIDDEN,
        flops=6 * tokens * CHOSEN * HIDDEN * FFN,
        peers={"torch grouped_mm": [partial(_grouped, *one) for one in given]} if by_torch else {},
    )


def _through(op: str, *given: Any) -> Any:
    with registry.using(**{op: "reference"}):
        return getattr(kernels, op)(*given)


def _plain(op: str, given: list[tuple[Any, ...]], size: int, dtype: str = "bfloat16") -> Work:
    """An op whose reference is torch's way."""
    run = getattr(kernels, op)
    return Work(
        op=op,
        problem=_problem(op, dtype),
        calls=[partial(run, *one) for one in given],
        bytes=size,
        peers={"torch": [partial(_through, op, *one) for one in given]},
    )


def _route(tokens: int) -> Work:
    """DeepSeek-V3's: 256 experts in 8 groups, 8 of them from 4."""
    how = Routing(
        scoring="sigmoid", chosen=8, groups=8, groups_chosen=4, normalised=True, scale=2.5
    )
    bias = torch.randn(256, device="cuda") / 8
    given = [(torch.randn(tokens, 256, device="cuda"), bias, how) for _ in range(8)]
    return _plain("moe_route", given, tokens * 4 * (256 + 3 * 8), "float32")


def _draw(rows: int, top_k: int, top_p: float) -> Work:
    columns = (torch.rand(rows).tolist(), [0.8] * rows, [top_k] * rows, [top_p] * rows, [0] * rows)
    draws = Draws(torch.tensor(columns, dtype=torch.float64, device="cuda"))
    given = [(_random(rows, VOCAB) * 3, draws) for _ in range(4)]
    return Work(
        op="draw",
        problem=_problem("draw"),
        calls=[partial(kernels.draw, *one) for one in given],
        bytes=rows * VOCAB * 2,
        peers={"torch": [partial(torch_draw, *one) for one in given]},
        waiting=frozenset({"torch"}),
    )


def _argmax(rows: int) -> Work:
    return _plain("argmax", [(_random(rows, VOCAB),) for _ in range(8)], rows * VOCAB * 2)


def _rope(tokens: int, interleaved: bool) -> Work:
    angles = torch.rand(8192, DIM // 2, device="cuda")
    table = torch.cat((angles.cos(), angles.sin()), dim=1)
    at = torch.randint(8192, (tokens,), device="cuda")
    given = [
        (_random(tokens, HEADS, DIM), _random(tokens, KV_HEADS, DIM), at, table, interleaved)
        for _ in range(8)
    ]
    return _plain("rope", given, tokens * (HEADS + KV_HEADS) * DIM * 4 + tokens * DIM * 4)


def _norm(tokens: int) -> Work:
    given = [(_random(tokens, 4096), _random(tokens, 4096), _random(4096), 1e-5) for _ in range(8)]
    return _plain("add_rms_norm", given, tokens * 4096 * 8)


CELLS: dict[str, Callable[[], Work]] = {
    **{
        f"decode_b{batch}_{kibi}K": partial(_attention, batch, 1, kibi * 1024 - 1)
        for batch, kibi in ((1, 64), (4, 64), (8, 8), (64, 2), (256, 1))
    },
    **{
        f"decode_b{batch}_{kibi}K_fp8": partial(_attention, batch, 1, kibi * 1024 - 1, EIGHT_BITS)
        for batch, kibi in ((1, 64), (8, 8), (64, 2))
    },
    "verify_b8_q4_8K": partial(_attention, 8, 4, 8192 - 4),
    "prefill_4K": partial(_attention, 1, 4096, 0),
    "prefill_512_behind_16K": partial(_attention, 1, 512, 16384),
    "prefill_512_behind_16K_fp8": partial(_attention, 1, 512, 16384, EIGHT_BITS),
    "latent_prefill_4K": partial(_latent, 4096, 0),
    "latent_prefill_512_behind_16K": partial(_latent, 512, 16384),
    **{f"experts_t{tokens}": partial(_experts, tokens) for tokens in (1, 4, 8, 16, 64, 512, 4096)},
    **{f"route_t{tokens}": partial(_route, tokens) for tokens in (1, 64, 4096)},
    "draw_r1": partial(_draw, 1, 50, 0.9),
    "draw_r64": partial(_draw, 64, 50, 0.9),
    "draw_r64_unfiltered": partial(_draw, 64, 0, 1.0),
    "argmax_r64": partial(_argmax, 64),
    "rope_t64": partial(_rope, 64, False),
    "rope_t4096": partial(_rope, 4096, False),
    "rope_t4096_interleaved": partial(_rope, 4096, True),
    "norm_t64": partial(_norm, 64),
    "norm_t4096": partial(_norm, 4096),
}
"""By name: what is done, for how many rows or tokens, behind how many cached ones."""


def measure(names: Sequence[str], tell: Tell) -> Report:
    """Time every backend that supports them on cells, by name; none means all.

    Raises:
        ConfigError: a name is unknown, or there is no CUDA device.
    """
    return reported(chosen(CELLS, names), _measured, tell, floor="floor", error_max=ERROR_MAX)


def _measured(make: Callable[[], Work], rates: Rates) -> Measured:
    work = make()
    return Measured(
        op=work.op,
        floor_us=max(work.bytes / rates.copy_gb_s / 1e3, work.flops / rates.matmul_tflop_s / 1e6),
        bytes=work.bytes,
        flops=work.flops,
        times=_times(work),
    )


def _times(work: Work) -> dict[str, Timing]:
    with registry.using(**{work.op: "reference"}):
        expected = work.calls[0]()
    found: dict[str, Timing] = {}
    for name in registry.offering(work.op):
        if name == "reference" or registry.refusal(work.problem, name) is not None:
            continue
        with registry.using(**{work.op: name}):
            error = _error(work.calls[0](), expected)
            found[name] = Timing(us=timed_us(work.calls), error=error)
    for name, calls in work.peers.items():
        run = eager_us if name in work.waiting else timed_us
        found[name] = Timing(us=run(calls))

    def compare(calls: Calls) -> float:
        return _error(_shaped(calls[0](), expected), expected)

    for name, make in work.packages.items():
        found[name] = tried(make, compare, timed_us)
    return found


def _shaped(made: Any, like: Any) -> Any:
    """What a package gives, its rows and their queries not apart."""
    return (made[0] if isinstance(made, tuple) else made).reshape(like.shape)


def _error(got: Any, wanted: Any) -> float:
    """The worst of an op's results; the order of experts means nothing."""
    if isinstance(wanted, tuple):
        return max(_error(*pair) for pair in zip(got, wanted, strict=True))
    if not wanted.is_floating_point():
        got, wanted = (x.view(len(x), -1).sort().values for x in (got, wanted))
        return float((got != wanted).double().mean())
    got, wanted = got.double(), wanted.double()
    return float((got - wanted).norm() / wanted.norm().clamp_min(1e-30))

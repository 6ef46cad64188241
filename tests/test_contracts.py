"""What breaks an op's contract is refused in its words; how its tensors lie means nothing.

One good call of each op stands here. It is broken in every way that a contract forbids, and asked
again with each of its tensors strided, of every backend.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import attrs
import pytest
import torch
from torch import Tensor

from strategies import ON_GPU, moved, tensor
from tokenspeed import kernels
from tokenspeed.errors import ContractError
from tokenspeed.kernels import AttentionPlan, Draws, PackedWeight, Routing, registry
from tokenspeed.kernels.contract import OPS

FLOAT = torch.float32
Call = dict[str, Any]


def floats(seed: int, *shape: int) -> Tensor:
    return tensor(seed, *shape, dtype=FLOAT)


def ints(*values: Any, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.tensor(values, dtype=dtype)


def attention_plan() -> AttentionPlan:
    """A row of two queries behind three tokens, one of one behind none, one without queries."""
    return AttentionPlan(
        query_start=ints(0, 2, 3, 3, dtype=torch.int32),
        context_lens=ints(3, 0, 2, dtype=torch.int32),
        page_table=ints([4, 1, 2], [0, 9, 9], [9, 9, 9], dtype=torch.int32),
        page_size=2,
    )


def latent_plan(**changes: Any) -> kernels.MlaPlan:
    given: Call = {
        "query_start": ints(0, 2, 3, 3, dtype=torch.int32),
        "kv_lens": ints(5, 1, 2, dtype=torch.int32),
        "page_table": ints([4, 1, 2], [0, 9, 9], [9, 9, 9], dtype=torch.int32),
        **{"page_size": 2, "heads": 3, "q_len_max": 2, "latent": 16, "rope": 16},
    }
    return kernels.mla_decode_plan(**given | changes)


GOOD: dict[str, Callable[[], Call]] = {
    "embedding": lambda: {"ids": ints(2, 0, 4, 4), "weight": floats(0, 5, 6)},
    "linear": lambda: {"x": floats(0, 3, 32), "weight": floats(1, 5, 32), "bias": floats(2, 5)},
    "linear_packed": lambda: {
        "x": floats(0, 3, 32),
        "weight": kernels.pack(floats(1, 5, 32), 4),
        "bias": floats(2, 5),
    },
    "rms_norm": lambda: {"x": floats(0, 3, 6), "weight": floats(1, 6), "eps": 1e-5},
    "add_rms_norm": lambda: {
        "x": floats(0, 3, 6), "residual": floats(2, 3, 6), "weight": floats(1, 6), "eps": 1e-5,
    },
    "rope": lambda: {
        "q": floats(0, 3, 4, 8), "k": floats(1, 3, 2, 8), "positions": ints(5, 0, 2),
        "cos_sin": floats(2, 6, 8),
    },
    "silu_mul": lambda: {"x": floats(0, 3, 6)},
    "argmax": lambda: {"x": floats(0, 3, 6)},
    "finite": lambda: {"x": floats(0, 3, 6)},
    "draw": lambda: {
        "scores": floats(0, 2, 6),
        "draws": Draws(ints([0.2, 0.7], [1, 2], [0, 3], [1, 0.9], [0, 0.1], dtype=torch.float64)),
    },
    "kv_write": lambda: {
        "k_pages": floats(0, 3, 2, 2, 8), "v_pages": floats(1, 3, 2, 2, 4),
        "k": floats(2, 3, 2, 8), "v": floats(3, 3, 2, 4), "locations": ints(5, 0, 3),
    },
    "paged_attention": lambda: {
        "q": floats(0, 3, 4, 8), "k_pages": floats(1, 5, 2, 2, 8), "v_pages": floats(2, 5, 2, 2, 8),
        "plan": attention_plan(), "window": None,
    },
    "mla_decode": lambda: {
        "q": floats(0, 3, 3, 32), "kv_pages": floats(1, 5, 2, 32), "plan": latent_plan(),
        "scale": 0.3,
    },
    "mla_prefill": lambda: {
        "q": floats(0, 3, 3, 20), "kv_pages": floats(1, 5, 2, 32), "up": floats(2, 3, 9, 16),
        "plan": latent_plan(), "scale": 0.3,
    },
    "moe_route": lambda: {
        "logits": floats(0, 3, 6), "bias": floats(1, 6),
        "routing": Routing(scoring="sigmoid", chosen=2, groups=3, groups_chosen=2),
    },
    "moe_mlp": lambda: {
        "x": floats(0, 3, 6), "experts": ints([0, 2], [1, -1], [2, 1]), "weights": floats(1, 3, 2),
        "gate_up": floats(2, 3, 8, 6), "down": floats(3, 3, 6, 4),
    },
}  # fmt: skip


def ask(op: str, given: Call) -> Any:
    return getattr(kernels, op.removesuffix("_packed"))(**given)


def test_every_op_has_a_good_call() -> None:
    assert set(GOOD) == set(OPS)
    for op, given in GOOD.items():
        ask(op, given())


def apart(x: Tensor) -> Tensor:
    """The same, with something else between its elements."""
    return torch.stack((x, torch.ones_like(x)), dim=-1)[..., 0]


def beside(x: Tensor) -> Tensor:
    """The same, its rows apart."""
    return torch.cat((x, torch.ones_like(x)), dim=-1)[..., : x.shape[-1]]


Change = tuple[str, str, Callable[[Any], Any], str]


def part(name: str, value: Any) -> Callable[[Any], Any]:
    """Of a plan or the like, one field another."""
    return lambda own: attrs.evolve(own, **{name: value})


def int32(*values: Any) -> Tensor:
    return ints(*values, dtype=torch.int32)


def strange_draws() -> list[tuple[str, Tensor]]:
    found = []
    strange = {"u": 1.0, "temperature": 0.0, "top_k": -1.0, "top_p": 0.0, "min_p": math.nan}
    for at, (name, value) in enumerate(strange.items()):
        table = GOOD["draw"]()["draws"].table.clone()
        table[at, 1] = value
        found.append((name, table))
    return found


BROKEN: list[Change] = [
    ("embedding", "ids", lambda x: x.int(), r"ids is torch.int32 on cpu; expected torch.int64"),
    ("embedding", "ids", lambda x: x[None], r"ids is \[1, 4\]; expected shape \[T\]"),
    ("embedding", "ids", lambda x: x + 1, "ids is 5 somewhere; expected 0 to 4"),
    ("embedding", "ids", lambda x: x - 1, "ids is -1 somewhere"),
    ("linear", "x", lambda x: x[:, 1:], r"x is \[3, 31\]; expected shape \[T, 32\]"),
    ("linear", "x", lambda x: x.long(), "weight is torch.float32"),
    ("linear", "x", lambda x: x.bfloat16(), "weight is torch.float32"),
    ("linear", "weight", lambda x: x[0], r"weight is \[32\]; expected shape \[O, I\]"),
    ("linear", "bias", lambda x: x[1:], r"bias is \[4\]"),
    ("linear", "bias", lambda x: x.double(), "bias is torch.float64"),
    ("linear_packed", "x", lambda x: x[:, 1:], r"x is \[3, 31\]; expected shape \[T, 32\]"),
    ("linear_packed", "x", lambda x: x.long(), "x is torch.int64"),
    ("linear_packed", "bias", lambda x: x[1:], r"bias is \[4\]"),
    ("linear_packed", "weight", part("rows", 17), r"weight.data is \[320\]; expected .*\[640\]"),
    ("linear_packed", "weight", part("columns", 64), r"weight.data is \[320\]"),
    ("linear_packed", "weight", part("bits", 8), r"weight.data is \[320\]"),
    ("rms_norm", "x", lambda x: x[0], r"x is \[6\]; expected shape \[T, D\]"),
    ("rms_norm", "weight", lambda x: x[1:], r"weight is \[5\]; expected shape \[6\]"),
    ("rms_norm", "weight", lambda x: x.bfloat16(), "weight is torch.bfloat16"),
    ("rms_norm", "x", lambda x: x.int(), "floating-point"),
    ("add_rms_norm", "residual", lambda x: x[1:], r"residual is \[2, 6\]; expected shape \[3, 6\]"),
    ("add_rms_norm", "residual", lambda x: x.double(), "residual is torch.float64"),
    ("add_rms_norm", "weight", lambda x: x[1:], "weight"),
    ("rope", "q", lambda x: x[..., 1:], "an even head dim"),
    ("rope", "q", lambda x: x[0], r"expected shape \[T, H, d\]"),
    ("rope", "k", lambda x: x[1:], r"k is \[2, 2, 8\]; expected shape \[3, K, 8\]"),
    ("rope", "k", lambda x: x.double(), "k is torch.float64"),
    ("rope", "positions", lambda x: x[1:], r"positions is \[2\]"),
    ("rope", "positions", lambda x: x.int(), "positions is torch.int32"),
    ("rope", "positions", lambda x: x + 1, "positions is 6 somewhere; expected 0 to 5"),
    ("rope", "positions", lambda x: -x, "positions is -5 somewhere"),
    ("rope", "cos_sin", lambda x: x[:, 2:], r"cos_sin is \[6, 6\]"),
    ("rope", "cos_sin", lambda x: x.bfloat16(), "cos_sin is torch.bfloat16"),
    ("silu_mul", "x", lambda x: x[:, 1:], "an even number of columns"),
    ("silu_mul", "x", lambda x: x.int(), "floating-point"),
    ("argmax", "x", lambda x: x[:, :0], "at least one column"),
    ("argmax", "x", lambda x: x[0], r"expected shape \[R, V\]"),
    ("finite", "x", lambda x: x[0], r"expected shape \[R, V\]"),
    ("draw", "scores", lambda x: x[:, :0], "at least one column"),
    ("draw", "scores", lambda x: x[:1], r"draws.table is \[5, 2\]; expected shape \[5, 1\]"),
    *(("draw", "draws", part("table", table), f"{name} is") for name, table in strange_draws()),
    ("draw", "draws", lambda x: Draws(x.table.float()), "draws.table is torch.float32"),
    ("kv_write", "k", lambda x: x[:, :1], "v is"),
    ("kv_write", "v", lambda x: x[1:], r"v is \[2, 2, 4\]; expected shape \[3, 2, e\]"),
    ("kv_write", "v", lambda x: x[..., :3], "v_pages is"),
    ("kv_write", "k_pages", lambda x: x[..., :7], "k_pages is"),
    ("kv_write", "v_pages", lambda x: x[1:], r"v_pages is \[2, 2, 2, 4\]; expected shape \[3, 2,"),
    ("kv_write", "v_pages", lambda x: x.bfloat16(), "v_pages is torch.bfloat16"),
    ("kv_write", "locations", lambda x: x + 1, "locations is 6 somewhere; expected 0 to 5"),
    ("kv_write", "locations", lambda x: x - 1, "locations is -1 somewhere"),
    ("kv_write", "locations", lambda x: x.int(), "locations is torch.int32"),
    ("kv_write", "locations", lambda x: x[[1, 0, 1]], "0 more than once; expected distinct"),
    ("kv_write", "k_pages", torch.Tensor.half, "k_pages is torch.float16; .* or torch.float8_e4"),
    ("kv_write", "v_pages", lambda x: x.to(torch.float8_e4m3fn), "v_pages is torch.float8_e4m3fn"),
    ("kv_write", "k_pages", apart, "pages in one piece"),
    ("kv_write", "k_pages", lambda x: torch.cat((x, x), 1)[:, :2], "pages in one piece"),
    ("paged_attention", "q", lambda x: x[:, :3], "a multiple of 2 key heads"),
    ("paged_attention", "q", lambda x: x[..., 1:], "k_pages is"),
    ("paged_attention", "q", lambda x: x[1:], "plan.query_start is .* at most 2 tokens"),
    ("paged_attention", "k_pages", torch.Tensor.half, "k_pages is torch.float16"),
    ("paged_attention", "k_pages", lambda x: x[:, :1], r"expected shape \[pages, 2, K, 8\]"),
    ("paged_attention", "v_pages", lambda x: x[1:], "v_pages is"),
    ("paged_attention", "v_pages", lambda x: x.double(), "v_pages is torch.float64"),
    ("paged_attention", "window", lambda _: 0, "window is 0; expected None or at least 1"),
    ("paged_attention", "plan", part("query_start", int32(1, 2, 3, 3)), "0 first"),
    ("paged_attention", "plan", part("query_start", int32(0, 3, 2, 3)), "nothing less"),
    ("paged_attention", "plan", part("query_start", int32(0, 3)), r"expected shape \[4\]"),
    ("paged_attention", "plan", part("query_start", ints(0, 2, 3, 3)), "torch.int64"),
    (
        "paged_attention",
        "plan",
        part("context_lens", int32(5, 0, 2)),
        "0 to what a row of page_tab",
    ),
    ("paged_attention", "plan", part("context_lens", int32(-1, 0, 2)), "0 to what a row"),
    ("paged_attention", "plan", part("page_table", int32([4, 1, 5], [0] * 3, [0] * 3)), "5 some"),
    ("paged_attention", "plan", part("page_table", int32([4, -1, 2], [0] * 3, [0] * 3)), "-1 some"),
    ("paged_attention", "plan", part("page_table", int32([4, 1, 2])), "plan.page_table is"),
    ("mla_decode", "q", lambda x: x[1:], "plan.query_start is .* at most 2 tokens"),
    ("mla_decode", "kv_pages", lambda x: x[1:], "plan.page_table is 4 somewhere; expected 0 to 3"),
    ("mla_prefill", "kv_pages", lambda x: x[1:], "plan.page_table is 4 somewhere"),
    ("mla_prefill", "q", lambda x: x[1:], "at most 2 tokens"),
    ("moe_route", "logits", lambda x: x.double(), "logits is torch.float64"),
    ("moe_route", "bias", lambda x: x[1:], r"bias is \[5\]"),
    ("moe_route", "bias", lambda x: x.bfloat16(), "bias is torch.bfloat16"),
    ("moe_route", "routing", part("scoring", "tanh"), "expected softmax or sigmoid"),
    ("moe_route", "routing", part("groups", 4), "groups of equal size"),
    ("moe_route", "routing", part("groups_chosen", 4), "groups of equal size"),
    ("moe_route", "routing", part("chosen", 5), "as many of 6 experts as are chosen"),
    ("moe_route", "routing", part("chosen", 0), "as are chosen"),
    ("moe_mlp", "experts", lambda x: x + 1, "experts is 3 somewhere; expected -1 to 2"),
    ("moe_mlp", "experts", lambda x: x - 1, "experts is -2 somewhere"),
    ("moe_mlp", "experts", lambda x: x.int(), "experts is torch.int32"),
    ("moe_mlp", "weights", lambda x: x[:, :1], r"weights is \[3, 1\]; expected shape \[3, 2\]"),
    ("moe_mlp", "weights", lambda x: x.bfloat16(), "weights is torch.bfloat16"),
    ("moe_mlp", "gate_up", lambda x: x[:, 1:], "gate_up is"),
    ("moe_mlp", "gate_up", lambda x: x.bfloat16(), "gate_up is torch.bfloat16"),
    ("moe_mlp", "down", lambda x: x[:, 1:], "down is"),
]


@pytest.mark.parametrize(
    ("op", "name", "change", "words"),
    BROKEN,
    ids=[f"{at}-{one[0]}" for at, one in enumerate(BROKEN)],
)
def test_what_breaks_a_contract_is_refused_in_its_words(
    op: str, name: str, change: Callable[[Any], Any], words: str
) -> None:
    given = GOOD[op]()
    with pytest.raises(ContractError, match=f"^{op}: .*{words}"):
        ask(op, given | {name: change(given[name])})


def test_every_op_is_broken_in_some_way() -> None:
    assert {op for op, *_ in BROKEN} == set(OPS)


def answers(op: str, backend: str, given: Call) -> list[Tensor]:
    """What an op gives, or has written."""
    given = {name: moved(value, backend) for name, value in given.items()}
    with registry.using(**{op: backend}):
        made = ask(op, given)
    made = (given["k_pages"], given["v_pages"]) if op == "kv_write" else made
    return [one.cpu() for one in (made if isinstance(made, tuple) else (made,))]


PAIRS = [(op, name) for op in OPS for name in registry.offering(op) if name != "cuda_sm90"]


@pytest.mark.parametrize(("op", "backend"), PAIRS)
@pytest.mark.parametrize("lie", [apart, beside])
def test_how_tensors_lie_means_nothing(
    op: str, backend: str, lie: Callable[[Tensor], Tensor]
) -> None:
    if ON_GPU and backend in ("cpu", "native"):
        pytest.skip("not of this machine")
    wanted = answers(op, backend, GOOD[op]())
    for name, value in GOOD[op]().items():
        if isinstance(value, AttentionPlan | kernels.MlaPlan):
            dense = "query_start", "page_table"
            strided: Any = attrs.evolve(value, **{one: lie(getattr(value, one)) for one in dense})
        elif isinstance(value, Draws):
            strided = Draws(lie(value.table))
        elif isinstance(value, Tensor) and (op, name[1:], lie) != ("kv_write", "_pages", apart):
            strided = lie(value)
        else:
            continue
        got = answers(op, backend, GOOD[op]() | {name: strided})
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, msg=lambda told, of=name: f"{of}: {told}")


def test_a_packed_weight_is_one_block_of_bytes() -> None:
    given = GOOD["linear_packed"]()
    weight = given["weight"]
    broken = PackedWeight(weight.data.view(torch.int8), weight.rows, weight.columns, weight.bits)
    with pytest.raises(ContractError, match=r"weight\.data is torch\.int8"):
        ask("linear_packed", given | {"weight": broken})


WALL = 4096
NOWHERE = (-(2**30), -1, 9, 1 << 30)
"""Values of a page, a place or a length that none is."""


def walled(x: Tensor, wall: float) -> Tensor:
    """The same in the middle of memory that holds something else."""
    whole = torch.full((3, *x.shape), wall, dtype=x.dtype)
    whole[1] = x
    return whole[1]


def changed(x: Tensor, value: int) -> Tensor:
    """The same, its first element another."""
    other = x.clone()
    other.view(-1)[0] = value
    return other


STRANGE: list[tuple[str, str, Callable[[Any, int], Any]]] = [
    ("rope", "positions", changed),
    ("kv_write", "locations", changed),
    ("paged_attention", "plan", lambda p, n: attrs.evolve(p, page_table=changed(p.page_table, n))),
    ("paged_attention", "plan", lambda p, n: attrs.evolve(p, context_lens=int32(n, 0, 2))),
    ("paged_attention", "plan", lambda p, n: attrs.evolve(p, query_start=int32(0, 2, n, n))),
    ("mla_decode", "plan", lambda p, n: attrs.evolve(p, page_table=changed(p.page_table, n))),
    ("mla_decode", "plan", lambda p, n: attrs.evolve(p, kv_lens=int32(n, 1, 2))),
    ("mla_decode", "plan", lambda p, n: attrs.evolve(p, query_start=int32(0, 2, n, n))),
    ("mla_prefill", "plan", lambda p, n: attrs.evolve(p, page_table=changed(p.page_table, n))),
    ("mla_prefill", "plan", lambda p, n: attrs.evolve(p, kv_lens=int32(n, 1, 2))),
    ("mla_prefill", "plan", lambda p, n: attrs.evolve(p, query_start=int32(0, 2, n, n))),
    ("moe_mlp", "experts", changed),
]


@pytest.mark.skipif("triton" not in registry.names, reason="Triton runs in another process")
@pytest.mark.parametrize("value", NOWHERE)
@pytest.mark.parametrize(
    ("op", "name", "change"), STRANGE, ids=[f"{i}-{one[0]}" for i, one in enumerate(STRANGE)]
)
def test_triton_stays_within_its_tensors_whatever_their_values_are(
    monkeypatch: pytest.MonkeyPatch,
    op: str,
    name: str,
    change: Callable[[Any, int], Any],
    value: int,
) -> None:
    """Where nobody can look at them before: what lies around the tensors is neither read, then
    there would be a NaN, nor written."""
    given = GOOD[op]()
    given[name] = change(given[name], value)
    walls = {
        key: walled(x, math.nan) if x.is_floating_point() else x
        for key, x in given.items()
        if isinstance(x, Tensor)
    }
    given |= walls
    problem = kernels.Problem(op, "cuda" if ON_GPU else "cpu", "float32")
    rope = {"interleaved": False} if op == "rope" else {}
    with registry.using(**{op: "triton"}):
        run = registry.find(problem)
    around: list[Tensor] = []

    def within_walls(*shape: Any, dtype: torch.dtype, device: Any = None) -> Tensor:
        dims = shape[0] if isinstance(shape[0], tuple | torch.Size) else shape
        size = math.prod(dims)
        around.append(torch.full((size + 2 * WALL,), 7, dtype=dtype, device=device))
        return around[-1][WALL : WALL + size].view(dims)

    monkeypatch.setattr(torch, "empty", within_walls)
    made = run(*(moved(x, "triton") for x in {**given, **rope}.values()))
    monkeypatch.undo()
    for x in around:
        assert bool((x[:WALL] == 7).all() and (x[-WALL:] == 7).all()), "nothing beside is written"
    known = [x for x in (made if isinstance(made, tuple) else (made,)) if x is not None]
    assert not any(bool(x[2].isnan().any()) for x in known)

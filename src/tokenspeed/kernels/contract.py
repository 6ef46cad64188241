"""What an op promises: signature, shapes, meaning. Rule: a backend keeps all of it or says why not.

Shapes: T tokens of all rows of a step one after the other, R rows, D hidden, H query heads, K
key/value heads, d head dim. Pages are [pages, page_size, K, d]; position p of a row lies in page
`page_table[row, p // page_size]` at offset `p % page_size`. Results have the dtype of `x` (or `q`);
sums are taken in float32 at least. Tensors of an op lie on one device and have the dtype of `x` (or
`q`, `k`, `scores`) where nothing else is said; they may be strided. Pages may be float8_e4m3fn as
well: what is written is rounded to the nearest (ties to even, at most 448), and read as it is. On a
CPU values out of bounds are refused. On a GPU looking at them would wait for it: there nothing is
read or written out of bounds: what does not exist is as if it were some other one, zeros, or left
out; of `embedding` torch's own assertion fails. A token that no row of a plan has
may get any result.

    embedding(ids int64[T], weight[V, D]) -> [T, D]
    linear(x[T, I], weight[O, I], bias[O] | None) -> [T, O]
    linear_packed(x[T, I], weight, bias[O] | None) -> [T, O]
        with a PackedWeight; x may be rounded to 8 bits, with a scale for each 32 columns of a token
    rms_norm(x[T, D], weight[D], eps) -> x / sqrt(mean(x^2) + eps) * weight
    add_rms_norm(x[T, D], residual[T, D], weight[D], eps) -> (rms_norm(s), s), s = x + residual
    rope(q[T, H, d], k[T, K, d], positions int64[T], cos_sin float32[context, d], interleaved)
            -> (q, k)
        the halves (a, b) of a head become (a cos - b sin, b cos + a sin); where `interleaved`, its
        even and odd elements do; Su et al., 2021
    silu_mul(x[T, 2F]) -> silu(x[:, :F]) * x[:, F:]
    argmax(x[R, V]) -> int64[R]
        the first index of each row's largest element; no element is a NaN
    finite(x[R, V]) -> bool[R]
        whether all elements of a row are
    draw(scores[R, V], draws) -> int64[R]
        a token of each row: of exp(score / temperature), divided by its sum, keep the tokens that
        pass top-k, top-p (Holtzman et al., 2020) and min-p, each judged before the others: the k
        most probable; those before which less than p has come, best first; those of at least min_p
        times the largest. Of equal tokens the one with the lower id is the better one. What is
        drawn is the first id, in the order of ids, at which the sum of what is kept exceeds u of
        the whole. No score is a NaN, and one is finite. A row's token depends on that row alone
    kv_write(k_pages, v_pages, k[T, K, d], v[T, K, e], locations int64[T]) -> None
        location = page * page_size + offset. Pages lie in one piece, or are columns of such pages.
        Locations are distinct, for tokens are written in no order: a CPU refuses equal ones, on a
        GPU each number there is that of one of these tokens, and which one is not promised.
    paged_attention(q[T, H, d], k_pages, v_pages, plan, window) -> [T, H, d]
        softmax(q k / sqrt(d)) v over positions 0..p of the row, p the query's own (causal), or over
        the last `window` of these where it is a number (Beltagy et al., 2020); heads share keys in
        groups of H / K (Ainslie et al., 2023). Pages that no query of the row sees are not read.
    mla_decode(q[T, H, C + E], kv_pages[pages, page_size, C + E], plan, scale)
            -> (out[T, H, C], lse float32[T, H])
        softmax(scale q k) v with keys k and values v = k[:C]: multi-head latent attention in its
        absorbed form (DeepSeek-AI, 2024), C latent and E rotary columns, one key head. Query j of a
        row's n sees its keys 0 .. kv_len - n + j (causal, bottom-right). lse is the natural
        logarithm of the sum of exp(scale q k); a query that sees nothing has out 0 and lse -inf.
        scale is above 0.
        What lies in pages behind a row's keys is never used, even if it is NaN.
    mla_prefill(q[T, H, N + E], kv_pages[pages, page_size, C + E], up[H, N + V, C], plan, scale)
            -> [T, H, V]
        the same attention without absorbing: a key's latent c gives each head the key (up[:N] c,
        then its rotary columns) and the value up[N:] c. Queries and pages as in mla_decode; a query
        that sees nothing has the result 0. Cheaper than mla_decode for rows of many queries.
    moe_route(logits float32[T, G], bias float32[G] | None, routing)
            -> (experts int64[T, k], weights float32[T, k])
        scores = sigmoid(logits) or softmax(logits). Experts are chosen by scores + bias, from the
        best groups alone, where the experts stand in groups: a group is as good as its best expert
        or, with a bias, its best two together. Weights are the scores of the chosen, divided by
        their sum where `routing.normalised`, times `routing.scale`; DeepSeek-AI, 2024. The order of
        the chosen means nothing.
    moe_mlp(x[T, D], experts int64[T, k], weights float32[T, k], gate_up[G, 2F, D], down[G, D, F])
            -> [T, D]
        the sum over a token's experts e of weight * (down[e] silu_mul(gate_up[e] x)); an expert of
        -1 adds nothing. The sum over experts is taken in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast, final

import torch
from attrs import field, frozen
from torch import Tensor

__all__ = [
    "OPS",
    "AttentionPlan",
    "Backend",
    "Draws",
    "MlaPlan",
    "Problem",
    "Routing",
    "capability",
]

T = TypeVar("T")

OPS = (
    "embedding",
    "linear",
    "linear_packed",
    "rms_norm",
    "add_rms_norm",
    "rope",
    "silu_mul",
    "argmax",
    "finite",
    "draw",
    "kv_write",
    "paged_attention",
    "mla_decode",
    "mla_prefill",
    "moe_route",
    "moe_mlp",
)


@frozen(kw_only=True, eq=False)
class _Plan:
    """What a step says once and every layer reads."""

    _derived: dict[Any, Any] = field(factory=dict, init=False)

    def once(self, derive: Callable[..., T], *of: Hashable) -> T:
        """What a backend derives from the plan: computed by the first layer, then kept.

        Args:
            derive: called as `derive(plan, *of)`.
            of: hashable; what layers differ in, their window say.
        """
        if (derive, of) not in self._derived:
            self._derived[derive, of] = derive(self, *of)
        return cast(T, self._derived[derive, of])


def _dense(x: Tensor) -> Tensor:
    """Numbers of a plan lie beside each other."""
    return x.contiguous()


@final
@frozen(kw_only=True, eq=False)
class AttentionPlan(_Plan):
    """What `paged_attention` needs of a step. Made once, used by every layer.

    Attributes:
        query_start: int32[R + 1]; row i has the queries [query_start[i], query_start[i + 1]).
        context_lens: int32[R]; cached tokens before the row's first query.
        page_table: int32[R, n]; entries past a row's last page mean nothing, and with a window
            those of pages wholly behind the window of the row's first query mean nothing.
        page_size: tokens in a page.
        counts: queries of each row, as query_start has them, where the CPU knows them; None: who
            needs them there reads query_start, which waits for a GPU, and no CUDA graph is made so.
    """

    query_start: Tensor = field(converter=_dense)
    context_lens: Tensor = field(converter=_dense)
    page_table: Tensor = field(converter=_dense)
    page_size: int
    counts: tuple[int, ...] | None = None


@final
@frozen(kw_only=True, eq=False)
class MlaPlan(_Plan):
    """What `mla_decode` and `mla_prefill` need of a step. Made once by `mla_decode_plan`, then used
    by every layer.

    A plan serves one stream at a time. In a CUDA graph it is made inside the capture, so that each
    replay plans from what the tensors hold then.

    Attributes:
        query_start: int32[R + 1]; row i has the queries [query_start[i], query_start[i + 1]).
        kv_lens: int32[R]; keys of a row, those of its own queries included.
        page_table: int32[R, n]; entries past a row's last page mean nothing.
        page_size: tokens in a page.
        heads: H.
        latent: C, columns of a key that are its value.
        rope: E, the other columns.
        q_len_max: no row has more queries.
    """

    query_start: Tensor = field(converter=_dense)
    kv_lens: Tensor = field(converter=_dense)
    page_table: Tensor = field(converter=_dense)
    page_size: int
    heads: int
    latent: int
    rope: int
    q_len_max: int


@final
@frozen(kw_only=True)
class Routing:
    """How `moe_route` chooses experts.

    Attributes:
        scoring: "softmax" or "sigmoid" of the logits.
        chosen: experts of a token.
        groups, groups_chosen: the experts stand in so many groups, of which so many may be chosen
            from.
        normalised: the weights of the chosen are divided by their sum.
        scale: and multiplied by this.
    """

    scoring: str
    chosen: int
    groups: int = 1
    groups_chosen: int = 1
    normalised: bool = False
    scale: float = 1.0


@final
@frozen(eq=False)
class Draws:
    """How `draw` chooses, of each row.

    Attributes:
        table: float64[5, R], whose rows the properties name.
    """

    table: Tensor

    @property
    def u(self) -> Tensor:
        """float64[R]; in [0, 1), where in the distribution the token lies."""
        return self.table[0]

    @property
    def temperature(self) -> Tensor:
        """float64[R]; above 0."""
        return self.table[1]

    @property
    def top_k(self) -> Tensor:
        """float64[R]; whole numbers, 0 for no such filter."""
        return self.table[2]

    @property
    def top_p(self) -> Tensor:
        """float64[R]; above 0, and 1 or more for no such filter."""
        return self.table[3]

    @property
    def min_p(self) -> Tensor:
        """float64[R]; 0 to 1."""
        return self.table[4]

    def of(self, rows: Tensor) -> Draws:
        """Those of some rows, given by number or by a mask."""
        return Draws(self.table[:, rows])


def capability(device: torch.device) -> tuple[int, int] | None:
    """Of a CUDA device, as (9, 0); None of another."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@final
@frozen
class Problem:
    """What selection looks at: never a batch size, so that an answer serves a whole run.

    Attributes:
        op: one of OPS.
        device: "cpu", "cuda" ...
        dtype: of the activations, as torch names it ("float32", "bfloat16").
        capability: of a CUDA device, as (9, 0).
        heads, q_len, page_size, latent, rope: of `mla_decode` and `mla_prefill`; q_len is rounded
            up to a power of two. None for other ops.
        kv_dtype: of the pages that an op reads or writes, if it is another one.
    """

    op: str
    device: str
    dtype: str
    capability: tuple[int, int] | None = None
    heads: int | None = None
    q_len: int | None = None
    page_size: int | None = None
    latent: int | None = None
    rope: int | None = None
    kv_dtype: str | None = None


@final
@frozen(kw_only=True)
class Backend:
    """A set of functions that keep the contract, for the problems that it supports.

    Attributes:
        name: short, as in `TOKENSPEED_KERNELS`.
        priority: the supported backend with the highest one runs, unless costs are known.
        functions: op -> function; ops may be missing.
        supports: None, or the reason why a problem is not for this backend.
        kv_dtypes: of pages, beside that which it computes in.
        cost_us: microseconds of a nominal step, for `mla_decode` 8 rows of 16,384 keys each; None
            where they were never measured. If the backend with the highest priority knows its
            cost, the cheapest of those that know theirs runs.
    """

    name: str
    priority: int
    functions: dict[str, Callable[..., Any]]
    supports: Callable[[Problem], str | None]
    cost_us: Callable[[Problem], float | None] = lambda _problem: None
    kv_dtypes: tuple[str, ...] = ()

    def lacks(self, problem: Problem) -> str | None:
        """Why this backend cannot run the problem, or None."""
        if problem.op not in self.functions:
            return f"has no {problem.op}"
        if problem.kv_dtype is not None and problem.kv_dtype not in self.kv_dtypes:
            return f"takes pages of {problem.dtype}, not {problem.kv_dtype}"
        return self.supports(problem)

"""What `mla_decode` takes on this GPU, beside what loading its keys alone takes.

Rule: everything is measured in one run, on random data. Each call of a CUDA graph has other queries
and other pages than the last, together more than the L2 holds, so that keys come from memory; the
median of nine replays counts, divided by the calls. Plans are made before: they cost a step once,
not each layer. Before a backend, or a package that is a peer, is timed its result is compared with
the reference, in float64, from memory that held NaN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import final

import torch
from attrs import evolve, frozen
from torch import Tensor

from tokenspeed.bench.cells import Rates, Tell, chosen, reported
from tokenspeed.bench.gpu import COLD_BYTES, timed_us
from tokenspeed.bench.peers import latent
from tokenspeed.bench.report import Calls, Measured, Report, Timing, tried
from tokenspeed.errors import ConfigError
from tokenspeed.kernels import MlaPlan, mla_decode, mla_decode_plan, registry
from tokenspeed.kernels.cuda.mla import load_only, unsupported
from tokenspeed.kernels.mla import mla_problem
from tokenspeed.kernels.pages import EIGHT_BITS, rounded

__all__ = ["CELLS", "Cell", "measure"]

PAGE, WIDTH, LATENT = 64, 576, 512
SCALE = 192**-0.5
ERROR_MAX = 2e-3


@final
@frozen
class Cell:
    """One shape. lens: keys of each row; shared: all have the same pages; narrow: of 8 bits."""

    lens: tuple[int, ...]
    q_len: int
    heads: int
    shared: bool = False
    narrow: bool = False

    @property
    def kv_dtype(self) -> torch.dtype:
        """What pages hold."""
        return EIGHT_BITS if self.narrow else torch.bfloat16

    @property
    def key_bytes(self) -> int:
        """What must come from memory, in whole pages."""
        pages = [-(-length // PAGE) for length in self.lens]
        read = max(pages) if self.shared else sum(pages)
        return read * PAGE * WIDTH * self.kv_dtype.itemsize

    @property
    def flops(self) -> int:
        """Of both products; a query's unseen keys, a few, are counted too."""
        return 2 * self.q_len * self.heads * sum(self.lens) * (WIDTH + LATENT)

    @property
    def bytes_moved(self) -> int:
        """Keys, queries and results, each once."""
        return self.key_bytes + 2 * self.q_len * self.heads * len(self.lens) * (WIDTH + LATENT)


def _even(batch: int, q_len: int, heads: int, kibi: int) -> Cell:
    return Cell((kibi * 1024,) * batch, q_len, heads)


_RAGGED8 = (65536, 30011, 20480, 12001, 8192, 4097, 2048, 1023)
_SHAPES = (
    *((4, 1, 16, 64), (8, 1, 16, 64), (16, 1, 16, 64), (4, 4, 16, 64), (8, 4, 16, 64)),
    *((16, 4, 16, 64), (1, 1, 16, 64), (1, 4, 16, 16), (16, 4, 16, 4), (64, 1, 16, 4)),
    *((8, 4, 32, 64), (16, 2, 32, 16), (8, 1, 128, 16), (64, 1, 128, 4), (64, 2, 128, 16)),
    *((1, 1, 128, 16), (8, 4, 64, 64)),
)
_WIDE = {
    **{f"b{b}_q{q}_h{h}_{kibi}K": _even(b, q, h, kibi) for b, q, h, kibi in _SHAPES},
    "ragged8_q4_h16": Cell(_RAGGED8, 4, 16),
    "ragged4_q4_h16": Cell((4641, 45118, 1730, 1696), 4, 16),
    "shared8_q1_h16_64K": Cell((65536,) * 8, 1, 16, shared=True),
    "shared8_q4_h16_64K": Cell((65536,) * 8, 4, 16, shared=True),
}
CELLS = {**_WIDE, **{f"{name}_fp8": evolve(cell, narrow=True) for name, cell in _WIDE.items()}}
"""By name: sequences, query tokens, heads, KV length; pages of bfloat16, or of float8_e4m3fn."""


Call = tuple[Tensor, Tensor, MlaPlan]


def measure(names: Sequence[str], backends: Sequence[str], tell: Tell) -> Report:
    """Time backends on cells, both by name; none of one means all, and of backends peers too.

    Raises:
        ConfigError: a name is unknown, or there is no CUDA device.
    """
    runners = list(backends or (name for name in registry.names if name != "reference"))
    for name in runners:
        if name not in registry.names:
            raise ConfigError("backend", name, f"one of {', '.join(registry.names)}")
    cells = chosen(CELLS, names)
    pools = {
        narrow: _pool([cell for cell in cells.values() if cell.narrow == narrow])
        for narrow in (False, True)
    }

    def run(cell: Cell, _rates: Rates) -> Measured:
        return _measured(cell, pools[cell.narrow], runners, with_peers=not backends)

    return reported(cells, run, tell, floor="load only", error_max=ERROR_MAX)


def _sets(cell: Cell) -> int:
    return max(2, -(-COLD_BYTES // cell.key_bytes))


def _pool(cells: Sequence[Cell]) -> Tensor:
    """Pages for any of the cells, whose pages hold the same dtype."""
    size = max((_sets(cell) * cell.key_bytes for cell in cells), default=0)
    dtype = cells[0].kv_dtype if cells else torch.bfloat16
    pages = -(-size // (PAGE * WIDTH * dtype.itemsize))
    pool = torch.empty(pages, PAGE, WIDTH, dtype=dtype, device="cuda")
    for at in range(0, pages, 4096):
        part = pool[at : at + 4096]
        part.copy_(rounded(torch.randn(part.shape, device="cuda"), dtype))
    return pool


def _calls(cell: Cell, pool: Tensor) -> list[Call]:
    columns = -(-max(cell.lens) // PAGE)
    count = 1 if cell.shared else len(cell.lens)
    lens = torch.tensor(cell.lens, dtype=torch.int32, device="cuda")
    starts = torch.arange(len(cell.lens) + 1, dtype=torch.int32, device="cuda") * cell.q_len
    order = torch.randperm(len(pool), device="cuda").to(torch.int32)
    calls, at = [], 0
    for _ in range(_sets(cell)):
        table = torch.zeros(count, columns, dtype=torch.int32, device="cuda")
        for row in range(count):
            pages = -(-cell.lens[row] // PAGE)
            table[row, :pages] = order[at : at + pages]
            at += pages
        if cell.shared:
            table = table.expand(len(cell.lens), columns).contiguous()
        plan = mla_decode_plan(
            starts, lens, table, page_size=PAGE, heads=cell.heads, q_len_max=cell.q_len
        )
        tokens = cell.q_len * len(cell.lens)
        q = torch.randn(tokens, cell.heads, WIDTH, device="cuda").to(torch.bfloat16)
        calls.append((q, pool, plan))
    return calls


def _measured(cell: Cell, pool: Tensor, backends: Sequence[str], *, with_peers: bool) -> Measured:
    calls = _calls(cell, pool)
    problem = mla_problem(*calls[0][:3])
    floor = None
    if unsupported(problem) is None:
        floor = timed_us([partial(load_only, *call) for call in calls])
    found: dict[str, Timing] = {}
    for name in backends:
        if registry.refusal(problem, name) is not None:
            continue
        own = [partial(mla_decode, *call, SCALE) for call in calls]
        with registry.using(mla_decode=name):
            found[name] = Timing(error=_error(cell, calls[-1], own), us=timed_us(own))
    for name, make in latent(calls, SCALE).items() if with_peers else ():
        found[name] = tried(make, partial(_error, cell, calls[-1]), timed_us)
    return Measured(
        op="mla_decode", floor_us=floor, bytes=cell.bytes_moved, flops=cell.flops, times=found
    )


def _error(cell: Cell, call: Call, calls: Calls) -> float:
    """||out - reference|| / ||reference|| in float64 of the last of calls, the worst of three rows.

    What it gives is [tokens, heads, latent], perhaps with rows and their queries apart, or that and
    what does not matter here.
    """
    q, pool, plan = call
    # What is allocated next lies where these lay.
    torch.full((*q.shape[:2], LATENT), float("nan"), dtype=q.dtype, device="cuda")
    torch.full((300, 64, LATENT), float("nan"), device="cuda")
    made = calls[-1]()
    out = (made[0] if isinstance(made, tuple) else made).reshape(*q.shape[:2], LATENT)
    worst = 0.0
    for row in sorted({0, 1, len(cell.lens) - 1} & set(range(len(cell.lens)))):
        mine = slice(row * cell.q_len, (row + 1) * cell.q_len)
        pages = pool[plan.page_table[row, : -(-cell.lens[row] // PAGE)]].double()
        alone = mla_decode_plan(
            torch.tensor([0, cell.q_len], dtype=torch.int32, device="cuda"),
            plan.kv_lens[row : row + 1],
            torch.arange(len(pages), dtype=torch.int32, device="cuda")[None],
            page_size=PAGE,
            heads=cell.heads,
            q_len_max=cell.q_len,
        )
        with registry.using(mla_decode="reference"):
            wanted, _ = mla_decode(q[mine].double(), pages, alone, SCALE)
        error = float((out[mine].double() - wanted).norm() / wanted.norm())
        # NaN compares with nothing.
        worst = error if not error <= worst else worst
    return worst

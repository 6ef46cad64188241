"""What `bench kernels` and `bench ops` print: times by backend and by peer, beside a floor.

Rule: a result that is wrong, or that somebody failed to give, is said where its time would stand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, final

from attrs import asdict, field, frozen
from rich.table import Table

__all__ = ["Calls", "Measured", "Report", "Timing", "tried"]

Calls = Sequence[Callable[[], Any]]
"""The same on other data each."""


@final
@frozen(kw_only=True)
class Timing:
    """Microseconds a call, and how far its result is from the reference.

    Attributes:
        us: 0 where it failed.
        error: None where it was not compared.
        failed: why there is no time.
    """

    us: float = 0.0
    error: float | None = None
    failed: str | None = None


@final
@frozen(kw_only=True)
class Measured:
    """One cell.

    Attributes:
        op: that was called.
        floor_us: what nobody is faster than; None where that is not known.
        bytes, flops: of one call, at the least.
        times: by backend, or by peer.
    """

    op: str
    floor_us: float | None
    bytes: int
    flops: int
    times: dict[str, Timing] = field(factory=dict)


@final
@frozen(kw_only=True)
class Report:
    """What a run found, with the ceilings of the same run.

    Attributes:
        floor: what the floor of its cells is.
        error_max: beyond, a result is wrong.
        matmul_after_tflop_s: of the same product once all cells are done: where arithmetic counts a
            GPU is limited by its power.
    """

    floor: str
    error_max: float
    machine: str
    copy_gb_s: float
    matmul_tflop_s: float
    matmul_after_tflop_s: float
    cells: dict[str, Measured]

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return asdict(self)

    def right(self, timing: Timing) -> bool:
        """Whether it is a time of the right result, as far as that was compared."""
        # NaN compares with nothing.
        return timing.failed is None and (timing.error is None or timing.error <= self.error_max)

    def table(self) -> Table:
        """A row a cell; in brackets, times the floor."""
        names = sorted({name for cell in self.cells.values() for name in cell.times})
        title = (
            f"bf16, us; copy {self.copy_gb_s:.0f} GB/s read and written, "
            f"matmul {self.matmul_tflop_s:.0f}, then {self.matmul_after_tflop_s:.0f} TFLOP/s; "
            f"{self.machine}"
        )
        rows = Table("cell", self.floor, *names, title=title, title_justify="left")
        for name, cell in self.cells.items():
            floor = "-" if cell.floor_us is None else f"{cell.floor_us:.1f}"
            rows.add_row(name, floor, *(self._shown(cell, other) for other in names))
        return rows

    def _shown(self, cell: Measured, name: str) -> str:
        if name not in cell.times:
            return "-"
        timing = cell.times[name]
        if timing.failed is not None:
            return f"failed: {timing.failed}"
        ratio = "" if not cell.floor_us else f" ({timing.us / cell.floor_us:.2f}x)"
        wrong = "" if self.right(timing) else f" WRONG {timing.error:.1e}"
        return f"{timing.us:.1f}{ratio}{wrong}"


def tried(
    make: Callable[[], Calls],
    compare: Callable[[Calls], float],
    clock: Callable[[Calls], float],
) -> Timing:
    """What a peer's calls take. Somebody else's package may fail in any way, and fails alone.

    Args:
        make: the calls, with whatever is planned before.
        compare: the error of what they give.
        clock: microseconds a call.
    """
    try:
        calls = make()
        error = compare(calls)
        return Timing(us=clock(calls), error=error)
    except Exception as error:
        words = str(error).strip().splitlines() or [""]
        return Timing(failed=f"{type(error).__name__}: {words[0]}"[:100])

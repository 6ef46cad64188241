"""Requests that come at their time, whoever answers them.

Rule: every request has a thread of its own, and one that fails fails the measurement.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from attrs import frozen

__all__ = ["Job", "timed"]


@frozen
class Job:
    """One request: when it arrives, what it says, how much it wants."""

    arrival_s: float
    prompt_ids: tuple[int, ...]
    output_tokens: int


def timed(jobs: Sequence[Job], answer: Callable[[Job], int]) -> float:
    """Seconds from the first arrival to the last token.

    Args:
        jobs: in order of arrival.
        answer: reads one to its end and returns the tokens that came.

    Raises:
        RuntimeError: one failed, or ended early.
    """
    failed: list[Exception] = []

    def read(job: Job) -> None:
        try:
            tokens = answer(job)
            if tokens != job.output_tokens:
                raise RuntimeError(f"gave {tokens} tokens of {job.output_tokens}")
        # Whatever ends the thread: the caller raises it.
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=read, args=(job,)) for job in jobs]
    start_s = time.perf_counter()
    for job, thread in zip(jobs, threads, strict=True):
        time.sleep(max(0.0, start_s + job.arrival_s - time.perf_counter()))
        thread.start()
    for thread in threads:
        thread.join()
    taken_s = time.perf_counter() - start_s
    if failed:
        raise RuntimeError(str(failed[0])) from failed[0]
    return taken_s

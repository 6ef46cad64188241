"""The executor: StepPlan in, StepResult out.

Rule: it keeps what a plan only patches (page tables, last tokens, sampler states, KV) and decides
nothing. Steps run in the order of their launch. A step that raises is that step's StepError; the
changes it announced are applied first, so the next step finds everything in place.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol, final

import attrs
import numpy as np
import torch
from numpy.typing import NDArray

from tokenspeed import kernels
from tokenspeed.errors import StepError
from tokenspeed.plan import StepPlan, StepResult
from tokenspeed.spmd.batch import Slots
from tokenspeed.spmd.compile import Program
from tokenspeed.spmd.host import Ended, HostKV
from tokenspeed.spmd.kv import KVSpec
from tokenspeed.spmd.params import Tree
from tokenspeed.spmd.replay import DecodeSteps, recorder
from tokenspeed.spmd.sampling import Logprobs, SamplerState, sample

__all__ = ["CompiledModel", "Executor", "Pending"]


Rows = NDArray[Any]


class ModelShape(Protocol):
    """What the executor asks of a model's configuration."""

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        ...


class CompiledModel(Protocol):
    """What the executor runs: see `tokenspeed.models.Model`."""

    @property
    def config(self) -> ModelShape:
        """Its shape."""
        ...

    @property
    def step(self) -> Program:
        """The compiled program."""
        ...

    @property
    def params(self) -> Tree:
        """This rank's tensors."""
        ...

    @property
    def kv(self) -> KVSpec:
        """What a token takes in the cache."""
        ...


@final
class Pending:
    """A launched step."""

    def __init__(self, future: Future[StepResult]) -> None:
        self._future = future

    def result(self) -> StepResult:
        """Wait for the step.

        Raises:
            StepError: the step raised; the executor goes on.
        """
        return self._future.result()

    @property
    def done(self) -> bool:
        """Whether `result` would return at once."""
        return self._future.done()

    def then(self, call: Callable[[Future[StepResult]], None]) -> None:
        """Call this when the step is over, before the next one runs; at once if it is over."""
        self._future.add_done_callback(call)


@final
class Executor:
    """Runs the steps of one model.

    Args:
        model: compiled, with its parameters.
        slots: requests that run at once.
        pages, page_size: of the KV pool; one page is `page_size` tokens.
        context_max: tokens of the longest request.
        overlap: steps launched beyond the one whose result is awaited. At 0 `launch` computes.
        eos_ids: the model's end tokens, kept from requests that have not reached `min_tokens`.
        host_pages: of the second home of cached pages; 0: there is none.
        graphs: decode steps are replayed from CUDA graphs (see replay.py), where the whole model is
            on one GPU. Takes one page more.
    """

    def __init__(
        self,
        model: CompiledModel,
        *,
        slots: int,
        pages: int,
        page_size: int,
        context_max: int,
        overlap: int = 0,
        eos_ids: Sequence[int] = (),
        host_pages: int = 0,
        graphs: bool = False,
    ) -> None:
        device = model.kv.device
        self._device = device
        # What launches kernels by the current device is called from several threads.
        on_gpu = device.type == "cuda"
        self._on_device = torch.cuda.device(device) if on_gpu else contextlib.nullcontext()
        records = recorder(model.step, device, page_size, graphs=graphs)
        spare = pages if records is not None and records.pads else None
        kept = model.kv.allocate(pages + (spare is not None), page_size).pages
        pages_max = math.ceil(context_max / page_size)
        self._step = DecodeSteps(model.step.step, model.params, kept, pages_max, records)
        self._host = HostKV(kept, host_pages) if host_pages else None
        self._slots = Slots(slots, pages_max, page_size, model.kv, spare)
        self._sampler = SamplerState(slots, model.config.vocab_size, device, eos_ids)
        self._worker = (
            ThreadPoolExecutor(1, thread_name_prefix="tokenspeed-step") if overlap else None
        )

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step. The plan's arrays are copied: the caller may reuse their memory."""
        plan = attrs.evolve(
            plan,
            slots=plan.slots.copy(),
            query_start=plan.query_start.copy(),
            token_ids=plan.token_ids.copy(),
            context_lens=plan.context_lens.copy(),
            sampled=plan.sampled.copy(),
            drafts=plan.drafts.copy(),
            page_delta=plan.page_delta.copy(),
        )
        if self._worker is not None:
            return Pending(self._worker.submit(self._run, plan))
        future: Future[StepResult] = Future()
        try:
            future.set_result(self._run(plan))
        except StepError as error:
            future.set_exception(error)
        return Pending(future)

    def copy(self, plan: StepPlan) -> None:
        """Start the copies of a plan, beside the steps. The plan's arrays are copied."""
        if self._host is not None and (len(plan.stores) or len(plan.loads)):
            self._host.start(plan.stores, plan.loads)

    def copied(self, *, wait: bool = False) -> list[Ended]:
        """(tickets, which of them are good) of copies that have ended since the last call.

        Args:
            wait: if none has, for the next that is under way.
        """
        return [] if self._host is None else self._host.ended(wait=wait)

    def close(self) -> None:
        """Finish the launched steps and copies, and end their threads."""
        if self._host is not None:
            self._host.close()
        if self._worker is not None:
            self._worker.shutdown()

    @torch.inference_mode()
    def _run(self, plan: StepPlan) -> StepResult:
        try:
            with self._on_device:
                self._slots.patch(plan)
                for joined in plan.joined:
                    self._sampler.join(joined)
                return self._compute(plan)
        except Exception as error:
            raise StepError(f"step {plan.step}: {type(error).__name__}: {error}") from error

    def _compute(self, plan: StepPlan) -> StepResult:
        logits = self._step(plan, self._slots)
        rows = np.flatnonzero(plan.sampled)
        run_start = plan.run_start
        token_ids = np.full(run_start[-1], -1, np.int32)
        if not len(rows):
            return StepResult(step=plan.step, token_ids=token_ids)
        counts = plan.drafts[rows] + 1
        finite = kernels.finite(logits).cpu().numpy()
        spoilt = np.repeat(rows, counts)[~finite]
        failed = {int(row): "the logits were not finite" for row in spoilt}
        if failed:
            logits = torch.where(torch.from_numpy(finite).to(self._device)[:, None], logits, 0)
        logprobs = self._sample(plan, logits, rows, run_start[rows], token_ids)
        return StepResult(step=plan.step, token_ids=token_ids, logprobs=logprobs, failed=failed)

    def _sample(
        self, plan: StepPlan, logits: torch.Tensor, rows: Rows, results: Rows, token_ids: Rows
    ) -> dict[int, Logprobs]:
        """Fill in a run for each sampled row, one token of all of them after the other.

        A row goes on as long as what it drew is what was guessed, so that each token is drawn from
        the state, and with the number, that it has without drafts. The distribution is the one that
        follows the guesses: so a run is what would have been sampled token by token.

        Args:
            rows: that are sampled.
            results: of each, where its run begins in token_ids.
            token_ids: int32[rows + drafts], which is written.
        """
        logprobs: dict[int, Logprobs] = {}
        drafts = plan.drafts[rows]
        at = np.cumsum(drafts + 1) - (drafts + 1)  # of each row, the logits of its next token
        feeds = plan.query_start[1:][rows] - drafts  # and where its next draft is fed
        for drawn in range(int(drafts.max()) + 1):
            where = torch.from_numpy(at.astype(np.int64)).to(self._device)
            slots = plan.slots[rows].astype(np.int64)
            every = len(rows) == len(logits)
            sampled = sample(self._sampler, logits if every else logits[where], slots)
            self._slots.remember(torch.from_numpy(slots).to(self._device), sampled.token_ids)
            token_ids[results] = chosen = sampled.token_ids.cpu().numpy()
            logprobs |= {int(results[i]): entry for i, entry in sampled.logprobs.items()}
            more = np.flatnonzero(drafts > drawn)
            more = more[plan.token_ids[feeds[more]] == chosen[more]]
            if not len(more):
                break
            rows, drafts, results, at, feeds = (
                rows[more], drafts[more], results[more] + 1, at[more] + 1, feeds[more] + 1,
            )  # fmt: skip
        return logprobs

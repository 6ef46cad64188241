"""Who runs what. Rule: by support, then cost, then priority; a choice is made once a problem.

Overrides, strongest first: the context manager `using`, the engine's setting `kernels`, then the
environment variable `TOKENSPEED_KERNELS`, both as "paged_attention=reference,rope=cpu". Third
parties add backends by an entry point in the group `tokenspeed.kernels` that gives a `Backend`; one
that cannot be loaded is logged and left out, one that fails when it is asked what it supports
supports nothing.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, TypeVar, final

from attrs import frozen
from torch import Tensor

from tokenspeed.errors import ConfigError, KernelError
from tokenspeed.kernels.contract import OPS, Backend, Problem, capability
from tokenspeed.kernels.cpu import BACKEND as CPU
from tokenspeed.kernels.cpu import NATIVE
from tokenspeed.kernels.cuda import BACKEND as CUDA
from tokenspeed.kernels.pages import kv_dtype
from tokenspeed.kernels.reference import BACKEND as REFERENCE
from tokenspeed.kernels.triton import BACKENDS as TRITON

__all__ = ["Choice", "Registry", "registry"]

T = TypeVar("T")

log = logging.getLogger("tokenspeed.kernels")


@cache
@final
@frozen
class Choice:
    """Why a backend runs a problem: the others with their reasons, best first."""

    problem: Problem
    backend: str
    rejected: tuple[tuple[str, str], ...]


@final
class Registry:
    """The known backends and the choices made among them."""

    def __init__(self, backends: tuple[Backend, ...]) -> None:
        self._backends = sorted(backends, key=lambda b: -b.priority)
        self._forced: dict[str, str] = {}
        self._chosen: dict[object, Callable[..., Any]] = {}
        self.changes = 0
        """How often it may have become another one who runs a problem."""
        self.failed: dict[str, str] = {}
        """Plugins that were left out, with the reason."""

    @property
    def names(self) -> tuple[str, ...]:
        """Backends, best first."""
        return tuple(backend.name for backend in self._backends)

    def offering(self, op: str) -> tuple[str, ...]:
        """Backends that have the op, for some problems at least, best first."""
        return tuple(backend.name for backend in self._backends if op in backend.functions)

    def add(self, backend: Backend) -> None:
        """Register one more backend.

        Raises:
            ConfigError: its name is taken, or it has functions that are no ops.
        """
        unknown = sorted(backend.functions.keys() - set(OPS))
        if backend.name in self.names or unknown:
            raise ConfigError(
                "backend", backend.name, f"a new name, and ops among {', '.join(OPS)}"
            )
        self._backends = sorted((*self._backends, backend), key=lambda b: -b.priority)
        self._choose_anew()

    def discover(self) -> None:
        """Add the backends of installed packages; one that fails is logged and left out."""
        for entry in importlib.metadata.entry_points(group="tokenspeed.kernels"):
            try:
                self.add(entry.load())
            # A stranger's code: whatever it raises, the engine goes on without it.
            except Exception as error:
                self.failed[entry.name] = f"{type(error).__name__}: {error}"
                log.exception("the kernel backend %s failed to load", entry.name)

    def override(self, where: str, text: str) -> None:
        """From here on these ops run on these backends: "rope=reference,linear=cpu".

        Raises:
            ConfigError: there is no such op or backend; names `where`.
        """
        words = [word.strip().partition("=") for word in text.split(",") if word.strip()]
        for op, _, name in words:
            self._check(where, op, name)
        self._forced |= {op: name for op, _, name in words}
        self._choose_anew()

    def of(self, op: str, x: Tensor, pages: Tensor | None = None) -> Callable[..., Any]:
        """The function that runs an op on tensors like `x`, and on pages like these.

        Raises:
            KernelError: no backend supports it; says what each one lacks.
        """
        # This is asked many times a step: the device's hash is cheaper than a problem's.
        held = x.dtype if pages is None else pages.dtype
        key = (op, x.device, x.dtype, held)
        found = self._chosen.get(key)
        if found is None:
            dtype = str(x.dtype).removeprefix("torch.")
            problem = Problem(
                op, x.device.type, dtype, capability(x.device), kv_dtype=kv_dtype(x.dtype, held)
            )
            found = self._chosen[key] = self.find(problem)
        return found

    def find(self, problem: Problem) -> Callable[..., Any]:
        """The function that runs a problem. Raises KernelError, as `of`."""
        found = self._chosen.get(problem)
        if found is None:
            name = self.explain(problem).backend
            if name == "reference" and problem.device != "cpu" and problem.op not in self._forced:
                log.warning(
                    "%s runs on the reference, slowly: see `tokenspeed kernels --explain`", problem
                )
            backend = next(b for b in self._backends if b.name == name)
            found = self._chosen[problem] = backend.functions[problem.op]
        return found

    def explain(self, problem: Problem) -> Choice:
        """Who runs a problem, and why not the others. Raises KernelError if nobody does."""
        reasons: dict[str, str] = {}
        forced = self._forced.get(problem.op)
        able: list[Backend] = []
        for backend in self._backends:
            reason = _asked(backend.lacks, problem, "does not say what it supports")
            if reason is None and forced not in (None, backend.name):
                reason = f"{forced} is asked for"
            if reason is None:
                able.append(backend)
            reasons[backend.name] = reason or ""
        if not able:
            told = "; ".join(f"{name} {reason}" for name, reason in reasons.items())
            raise KernelError(
                f"no backend runs {problem.op} on {problem.device}, {problem.dtype}: {told}"
            )
        costs = {backend.name: _asked(backend.cost_us, problem, None) for backend in able}
        chosen = _cheapest(able[0].name, costs)
        for name, cost in costs.items():
            reasons[name] = _loses(chosen, costs[chosen], cost)
        rejected = tuple((name, reason) for name, reason in reasons.items() if name != chosen)
        return Choice(problem, chosen, rejected)

    def refusal(self, problem: Problem, name: str) -> str | None:
        """Why the backend of this name cannot run a problem, whoever else can; None if it can."""
        return next(b for b in self._backends if b.name == name).lacks(problem)

    @contextmanager
    def using(self, **backends: str) -> Iterator[None]:
        """Within it, these ops run on these backends: `using(rope="reference")`."""
        for op, name in backends.items():
            self._check("using", op, name)
        before = dict(self._forced)
        self._forced.update(backends)
        self._choose_anew()
        try:
            yield
        finally:
            self._forced = before
            self._choose_anew()

    def _choose_anew(self) -> None:
        self._chosen.clear()
        self.changes += 1

    def _check(self, where: str, op: str, name: str) -> None:
        if op not in OPS or name not in self.names:
            raise ConfigError(
                where, f"{op}={name}", f"op=backend with op in {OPS} and backend in {self.names}"
            )


def _asked(
    question: Callable[[Problem], T | None], problem: Problem, otherwise: T | None
) -> T | None:
    """What a backend answers."""
    try:
        return question(problem)
    # A stranger's code: whatever it raises, another backend runs the step.
    except Exception:
        log.exception("a kernel backend failed to say what it makes of %s", problem)
        return otherwise


def _cheapest(first: str, costs: dict[str, float | None]) -> str:
    """Of backends, best first: `first`, unless its cost is known and one's is lower."""
    known = {name: cost for name, cost in costs.items() if cost is not None}
    return min(known, key=lambda name: known[name]) if first in known else first


def _loses(chosen: str, least: float | None, cost: float | None) -> str:
    if least is None or cost is None:
        return f"{chosen} has the higher priority"
    return f"takes {cost:.0f} us for a nominal step, {chosen} {least:.0f}"


registry = Registry((REFERENCE, CPU, NATIVE, CUDA, *TRITON))
"""The process's registry."""
registry.discover()
registry.override("TOKENSPEED_KERNELS", os.environ.get("TOKENSPEED_KERNELS", ""))

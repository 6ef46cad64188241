"""The ranks of a mesh as processes: rank 0 leads, the others follow.

Rule: rank 0 alone has the server, the tokenizer, the scheduler and the clock. Each plan goes to all
other ranks before it is launched, so all executors run the same plans in the same order, each on
its part of the weights and of the KV, and sample the same tokens from the same whole logits. That
they did is compared: a digest of plans and tokens every `DIGEST_STEPS` steps.

Why plans and not events: the scheduler is deterministic, so ranks that ran it on broadcast events
would make these very plans, each at the cost of rank 0, and every call of the scheduler would have
to be an event. A plan is one value of a few hundred bytes. Why a socket beside the process group:
it closes when a process ends, whatever that was doing, so both sides notice at once, also while
idle and while a collective hangs; a broadcast notices at its timeout.

    rank 0   Leader ── Hello, Sizes, Plan ... End ──► follow()   rank 1 ...
                    ◄─ Introduction, Ready, Digest ─

Ranks are started by rank 0 on its own machine, or by torchrun, whose environment variables say so.
A rank that ends, fails or computes something else is `RankLost`: rank 0 says which, once; every
other rank ends when its socket closes.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from datetime import timedelta
from pathlib import Path
from queue import Queue
from typing import Any, final

import attrs
import torch
import torch.distributed as dist
from msgspec import structs
from torch.distributed import FileStore, PrefixStore, Store  # type: ignore[attr-defined]
from torch.distributed.rendezvous import rendezvous

from tokenspeed import models
from tokenspeed.config import EngineConfig
from tokenspeed.errors import ConfigError, RankLost, StepError
from tokenspeed.kernels import registry
from tokenspeed.plan import StepPlan, StepResult
from tokenspeed.spmd import Executor, Mesh, Pending, ProcessGroups
from tokenspeed.spmd.host import Ended
from tokenspeed.spmd.messages import (
    Channel,
    Digest,
    End,
    Failed,
    Hello,
    Introduction,
    Message,
    Plan,
    Ready,
    Sizes,
)
from tokenspeed.spmd.report import parse_mesh

__all__ = [
    "LOST_JOIN_S",
    "Leader",
    "LedExecutor",
    "build_on_mesh",
    "check_gpus",
    "connect",
    "device_of",
    "follow",
    "make_executor",
    "started_to_follow",
]

DIGEST_STEPS = 32
START_S = 300.0
"""How long a rank may take until it introduces itself: it imports torch."""
COLLECTIVE_S = 600.0
GRACE_S = 1.0
"""One lost rank breaks the collectives of all: so long we look for the one that was first."""
END_S = 5.0
LOST_JOIN_S = 3.0
"""What a collective gets to return once a rank is lost; some never do."""

_ADDRESS, _TOKEN = "TOKENSPEED_LEADER", "TOKENSPEED_LEADER_TOKEN"


def _by_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ


def started_to_follow() -> bool:
    """Whether torchrun made this process another rank than 0: then it is to `follow`."""
    return _by_torchrun() and int(os.environ["RANK"]) > 0


@final
class _Tally:
    """A digest of what a rank was told to compute, and of what it sampled."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def told(self, plan: StepPlan) -> bytes:
        """What `add` wants of a plan, whose arrays are the caller's again when it is launched."""
        arrays = (plan.slots, plan.query_start, plan.token_ids, plan.page_delta)
        return hashlib.blake2b(b"".join(array.tobytes() for array in arrays)).digest()

    def add(self, told: bytes, result: StepResult) -> Digest | None:
        """Count a step that is over; at every `DIGEST_STEPS`th, what is to be compared."""
        self._hash.update(told)
        self._hash.update(result.token_ids.tobytes())
        if (result.step + 1) % DIGEST_STEPS:
            return None
        return Digest(result.step, self._hash.digest())


@final
class Leader:
    """Rank 0's end of the mesh. Starts the other ranks, unless torchrun has, and greets them.

    Args:
        config: with a mesh of several ranks.
        checkpoint: what the ranks are to load.

    Attributes:
        mesh: as rank 0 sees it.
        communicator: of the mesh, once its ranks have met.
        device: that rank 0 computes on.
        lost: why the mesh cannot go on; None: it can.

    Raises:
        ConfigError: torchrun started another number of ranks, or this is not its rank 0; or there
            are fewer GPUs here than ranks.
        RankLost: a rank ended, or did not come.
    """

    def __init__(self, config: EngineConfig, checkpoint: str) -> None:
        self.mesh = parse_mesh(config.mesh)
        check_gpus(config, self.mesh)
        self.device = device_of(config, int(os.environ.get("LOCAL_RANK", "0")))
        self.lost: RankLost | None = None
        self.communicator: ProcessGroups | None = None
        self._config = config
        self._lock = threading.Lock()
        self._told: Callable[[RankLost], None] = lambda _lost: None
        self._closing = False
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._channels: dict[int, Channel] = {}
        self._ready: Queue[int | None] = Queue()
        self._digests: dict[int, tuple[int, bytes, int]] = {}
        self._folder: Path | None = None
        try:
            self._gather(checkpoint)
        except BaseException:
            self.close()
            raise

    def _gather(self, checkpoint: str) -> None:
        torchrun, token = _by_torchrun(), secrets.token_hex(16)
        host, store = "127.0.0.1", None
        if torchrun:
            host, store = os.environ["MASTER_ADDR"], _torchrun_store(self.mesh)
        with socket.create_server((host, 0)) as door:
            address = f"{host}:{door.getsockname()[1]}"
            if store is not None:
                store.set(_ADDRESS, f"{address} {token}")
            else:
                self._folder = Path(tempfile.mkdtemp(prefix="tokenspeed-"))
                for rank in range(1, self.mesh.ranks):
                    self._children[rank] = _spawn(rank, address, token)
            self._accept(door, token)
        meeting = None if self._folder is None else str(self._folder / "ranks")
        self._tell(Hello(checkpoint, attrs.asdict(self._config), meeting))
        for rank, channel in self._channels.items():
            threading.Thread(target=self._listen, args=(rank, channel), daemon=True).start()
        self.communicator = self._connected(meeting, store)

    def _connected(self, meeting: str | None, store: Store | None) -> ProcessGroups:
        """Join the process group; a rank that ends meanwhile is not waited for."""
        joined: Future[ProcessGroups] = Future()

        def join() -> None:
            try:
                joined.set_result(connect(self.mesh, self.device, meeting, store))
            except Exception as error:  # raised again below
                joined.set_exception(error)

        threading.Thread(target=join, daemon=True).start()
        while not wait([joined], timeout=0.1).done:
            if self.lost is not None:
                raise self.lost
        return joined.result()

    def _accept(self, door: socket.socket, token: str) -> None:
        door.settimeout(0.2)
        deadline_s = time.monotonic() + START_S
        while len(self._channels) < self.mesh.ranks - 1:
            for rank, child in self._children.items():
                if child.poll() is not None:
                    raise self._loss(rank, f"ended as it started ({_status(child)})")
            if time.monotonic() > deadline_s:
                missing = set(range(1, self.mesh.ranks)) - self._channels.keys()
                raise self._loss(min(missing), f"did not start within {START_S:.0f} s")
            try:
                connection, _ = door.accept()
            except TimeoutError:
                continue
            connection.settimeout(END_S)
            channel = Channel(connection)
            first = channel.receive(bytes_max=4096)
            if not isinstance(first, Introduction) or not hmac.compare_digest(first.token, token):
                channel.close()
                continue
            connection.settimeout(None)
            self._channels[first.rank] = channel

    def await_executors(self, sizes: Sizes, told: Callable[[RankLost], None]) -> None:
        """Have every other rank make its executor; waits until all have loaded.

        Args:
            sizes: of the executors.
            told: called, from any thread, with what `lost` becomes.

        Raises:
            RankLost: one could not load its part.
        """
        self._told = told
        self._tell(sizes)
        for _ in self._channels:
            if self._ready.get() is None:
                assert self.lost is not None
                raise self.lost

    def send(self, plan: StepPlan) -> None:
        """Have every other rank launch a plan."""
        if self.lost is not None:
            raise self.lost
        self._tell(Plan.of(plan))

    def _tell(self, message: Message) -> None:
        for channel in self._channels.values():
            channel.send(message)  # who is gone is noticed by who listens to it

    def blame(self, error: StepError) -> RankLost:
        """Why a step of rank 0 failed: a rank that was lost, or rank 0 itself."""
        deadline_s = time.monotonic() + 3 * GRACE_S
        while self.lost is None and time.monotonic() < deadline_s:
            time.sleep(0.02)
        self._lose(0, f"failed ({error})")
        assert self.lost is not None
        return self.lost

    def compare(self, rank: int, digest: Digest) -> None:
        """Count a rank's digest of a step; all are to be alike."""
        with self._lock:
            first, value, seen = self._digests.pop(digest.step, (rank, digest.value, 0))
            if seen + 1 < self.mesh.ranks:
                self._digests[digest.step] = (first, value, seen + 1)
        if value != digest.value:
            self._lose(rank, f"has not sampled what rank {first} has, by step {digest.step}")

    def _listen(self, rank: int, channel: Channel) -> None:
        while (message := channel.receive()) is not None:
            if isinstance(message, Ready):
                self._ready.put(rank)
            elif isinstance(message, Digest):
                self.compare(rank, message)
            elif isinstance(message, Failed):
                time.sleep(GRACE_S)
                self._lose(rank, f"failed ({message.why})")
        if not self._closing:
            child = self._children.get(rank)
            self._lose(rank, "is gone" if child is None else f"has ended ({_status(child)})")

    def _loss(self, rank: int, what: str) -> RankLost:
        return RankLost(
            f"rank {rank} of the mesh {self.mesh} {what}: no rank can go on without the others; "
            "start the server again"
        )

    def _lose(self, rank: int, what: str) -> None:
        with self._lock:
            if self.lost is not None or self._closing:
                return
            self.lost = self._loss(rank, what)
        for child in self._children.values():
            child.kill()  # where one rank has left a collective, this is what ends it for rank 0
        self._ready.put(None)
        self._told(self.lost)
        if self.communicator is not None:
            self.communicator.abort()

    def close(self) -> None:
        """End the other ranks."""
        self._closing = True
        self._tell(End())
        deadline_s = time.monotonic() + END_S
        if dist.is_initialized() and (self.lost is None or self.device == "cpu"):
            # All ranks leave together: NCCL may wait for the others, but is not waited for.
            leaving = threading.Thread(target=dist.destroy_process_group, daemon=True)
            leaving.start()
            leaving.join(END_S)
        for child in self._children.values():
            try:
                child.wait(max(0.0, deadline_s - time.monotonic()) if self.lost is None else 0.1)
            except subprocess.TimeoutExpired:
                child.kill()
                child.wait()
        for channel in self._channels.values():
            channel.close()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)


@final
class LedExecutor:
    """The executors of all ranks as one: what `Executor` does, on each of them."""

    def __init__(self, own: Executor, leader: Leader) -> None:
        self._own, self._leader, self._tally = own, leader, _Tally()

    def launch(self, plan: StepPlan) -> Pending:
        """Start a step on every rank. Where rank 0 runs ahead, so do the others: a plan is there.

        Raises:
            RankLost: a rank is gone; or the result raises it, also where the step failed: on one
                rank alone, as far as rank 0 can know, so that its KV is no longer the others'.
        """
        self._leader.send(plan)
        told, checked = self._tally.told(plan), Future[StepResult]()

        def check(own: Future[StepResult]) -> None:
            try:
                checked.set_result(self._checked(told, own.result()))
            except StepError as error:
                checked.set_exception(self._leader.blame(error))
            except Exception as error:  # whoever awaits the step is told
                checked.set_exception(error)

        self._own.launch(plan).then(check)
        return Pending(checked)

    def _checked(self, told: bytes, result: StepResult) -> StepResult:
        if self._leader.lost is not None:  # what a collective gives that was aborted is no result
            raise self._leader.lost
        digest = self._tally.add(told, result)
        if digest is not None:
            self._leader.compare(0, digest)
        return result

    def copy(self, plan: StepPlan) -> None:
        """See Executor; there is no host tier on a mesh, so there is nothing to copy."""
        self._own.copy(plan)

    def copied(self, *, wait: bool = False) -> list[Ended]:
        """See Executor."""
        return self._own.copied(wait=wait)

    def close(self) -> None:
        """Finish, and end the other ranks."""
        self._own.close()
        self._leader.close()


def build_on_mesh(
    checkpoint: models.Checkpoint, config: EngineConfig, progress: Callable[[int, int], None]
) -> tuple[models.Model, Leader | None]:
    """This rank's part of a model, and who leads the others, if the mesh has any.

    Raises:
        ConfigError, RankLost: see Leader.
        CheckpointError, PlacementError: see `models.build`.
    """
    mesh = parse_mesh(config.mesh)
    registry.override("kernels", config.kernels)
    if config.threads is not None or mesh.ranks > 1:
        _set_threads(config, mesh)
    if mesh.ranks > 1:
        _must_cut(checkpoint.config, mesh, config.mesh)  # what does not fit starts no rank
    leader = Leader(config, str(checkpoint.path)) if mesh.ranks > 1 else None
    try:
        if leader is None:
            return _built(checkpoint, mesh, config, config.device, progress=progress), None
        kind = {"communicator": leader.communicator, "progress": progress}
        return _built(checkpoint, mesh, config, leader.device, **kind), leader
    except BaseException:
        if leader is not None:
            leader.close()
        raise


def _built(
    checkpoint: models.Checkpoint, mesh: Mesh, config: EngineConfig, device: str, **kind: Any
) -> models.Model:
    """A rank's part, as the settings say: on every rank alike."""
    return models.build(
        checkpoint,
        mesh,
        dtype=config.dtype,
        kv_dtype=config.kv_dtype,
        quantize=config.quantize,
        device=device,
        **kind,
    )


def _must_cut(config: models.ModelConfig, mesh: Mesh, given: str) -> None:
    """Raise PlacementError, or ConfigError for an axis whose ranks would all do the same."""
    program = models.compile_config(config, mesh)
    cut = {axis for lies in program.param_layouts.values() for axis, _ in lies.axes} | {"pp"}
    if any(size > 1 and axis not in cut for axis, size in mesh.axes):
        axes = ", ".join(sorted(cut))
        raise ConfigError("mesh", given, f"axes along which {config.architecture} is cut: {axes}")


def make_executor(
    leader: Leader | None,
    told: Callable[[RankLost], None],
    model: models.Model,
    *,
    eos_ids: Sequence[int],
    slots: int,
    pages: int,
    page_size: int,
    context_max: int,
    **kind: int,
) -> Executor | LedExecutor:
    """The executor of one rank, or the executors of all as one, when all have loaded.

    Args:
        leader: of the mesh, if there is one.
        told: called, from any thread, with why a rank is lost.
        model: rank 0's part.
        eos_ids, slots, pages, page_size, context_max, kind: as of `Executor`.

    Raises:
        RankLost: a rank could not load its part.
    """
    sizes = Sizes(slots, pages, page_size, context_max, tuple(eos_ids))
    own = _executor(model, sizes, **kind)
    if leader is None:
        return own
    try:
        leader.await_executors(sizes, told)
    except BaseException:
        leader.close()
        raise
    return LedExecutor(own, leader)


def _executor(model: models.Model, sizes: Sizes, **kind: Any) -> Executor:
    settings: dict[str, Any] = structs.asdict(sizes)
    return Executor(model, **settings, **kind)


def follow() -> int:
    """Be a rank that is told what to compute, until rank 0 says that it is over; the exit status.

    Ends the process, with a message and status 1, when rank 0 is gone, whatever is under way.
    """
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to all ranks alike: rank 0 drains first
        signal.signal(number, signal.SIG_IGN)
    rank = int(os.environ["RANK"])
    store = _torchrun_store(None) if _by_torchrun() else None
    if store is None:
        address, token = os.environ[_ADDRESS], os.environ[_TOKEN]
    else:
        address, token = store.get(_ADDRESS).decode().split()
    host, _, port = address.rpartition(":")
    channel = Channel(socket.create_connection((host, int(port))))
    channel.send(Introduction(rank, token))
    inbox: Queue[Message] = Queue()
    threading.Thread(target=_receive, args=(channel, rank, inbox), daemon=True).start()
    try:
        _compute(rank, channel, inbox, store)
    except Exception as error:  # rank 0 says it, or has ended: then the receiver ends this one
        channel.send(Failed(f"{type(error).__name__}: {error}"))
        time.sleep(END_S)
        return 1
    return 0


def _receive(channel: Channel, rank: int, inbox: Queue[Message]) -> None:
    while (message := channel.receive()) is not None:
        inbox.put(message)
        if isinstance(message, End):
            return
    sys.stderr.write(f"error: rank 0 is gone; rank {rank} ends\n")
    sys.stderr.flush()
    os._exit(1)  # the main thread may be in a collective that never returns


def _compute(rank: int, channel: Channel, inbox: Queue[Message], store: Store | None) -> None:
    hello = inbox.get()
    assert isinstance(hello, Hello), hello
    config = EngineConfig(**hello.config)
    mesh = parse_mesh(config.mesh).at(rank)
    device = device_of(config, int(os.environ["LOCAL_RANK"]))
    registry.override("kernels", config.kernels)
    _set_threads(config, mesh)
    communicator = connect(mesh, device, hello.meeting, store)
    checkpoint = models.open_model(hello.checkpoint, config.load_format)
    model = _built(checkpoint, mesh, config, device, communicator=communicator)
    sizes = inbox.get()
    if isinstance(sizes, End):
        return
    assert isinstance(sizes, Sizes), sizes
    executor = _executor(models.in_cache_groups(model, config), sizes)
    tally = _Tally()
    channel.send(Ready())
    while isinstance(message := inbox.get(), Plan):
        plan = message.restored()
        digest = tally.add(tally.told(plan), executor.launch(plan).result())
        if digest is not None:
            channel.send(digest)
    executor.close()
    dist.destroy_process_group()


def _set_threads(config: EngineConfig, mesh: Mesh) -> None:
    """Share the cores of this machine among its ranks, unless `threads` says how many to use."""
    here = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.ranks))
    torch.set_num_threads(config.threads or max(1, torch.get_num_threads() // here))


def _spawn(rank: int, address: str, token: str) -> subprocess.Popen[bytes]:
    env = {**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), _ADDRESS: address}
    env |= {_TOKEN: token}
    # Nothing is left to do then, and taking an interpreter with torch apart takes seconds.
    code = "import os; from tokenspeed.ranks import follow; os._exit(follow())"
    return subprocess.Popen([sys.executable, "-c", code], env=env, stdin=subprocess.DEVNULL)


def _status(child: subprocess.Popen[bytes]) -> str:
    try:
        status = child.wait(GRACE_S)
    except subprocess.TimeoutExpired:
        return "its connection closed"
    return f"killed by signal {-status}" if status < 0 else f"exit status {status}"


def check_gpus(config: EngineConfig, mesh: Mesh) -> None:
    """Raise ConfigError where a mesh on GPUs has more ranks on this machine than it has GPUs."""
    here, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", mesh.ranks)), torch.cuda.device_count()
    if config.device != "cpu" and here > gpus:
        have = f"this machine has {gpus} GPU{'' if gpus == 1 else 's'}"
        raise ConfigError("mesh", str(mesh), f"at most a rank a GPU: {have}")


def device_of(config: EngineConfig, local_rank: int) -> str:
    """What a rank computes on, by its number on this machine; a GPU is made the current one."""
    if config.device == "cpu":
        return "cpu"
    torch.cuda.set_device(local_rank)
    return f"cuda:{local_rank}"


def _torchrun_store(mesh: Mesh | None) -> Store:
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if mesh is not None and (rank or ranks != mesh.ranks):
        given = f"{mesh}, on rank {rank} of {ranks} that torchrun started"
        raise ConfigError("mesh", given, "as many ranks; rank 0 leads, others call ranks.follow()")
    store: Store = next(rendezvous("env://", rank, ranks))[0]
    return store


def connect(mesh: Mesh, device: str, meeting: str | None, store: Store | None) -> ProcessGroups:
    """Join the process group, and make those of the axes. All ranks call it at once.

    Args:
        mesh: as this rank sees it.
        device: of this rank, as `device_of` gives it.
        meeting: a file where the ranks of one machine meet, or None.
        store: where they meet otherwise.
    """
    if store is None:
        assert meeting is not None
        store = FileStore(meeting, mesh.ranks)
        for library in ("GLOO", "NCCL"):  # nobody beyond this machine connects
            os.environ.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    dist.init_process_group(
        "gloo" if device == "cpu" else "nccl",
        store=PrefixStore("tokenspeed", store),
        rank=mesh.rank,
        world_size=mesh.ranks,
        timeout=timedelta(seconds=COLLECTIVE_S),
        device_id=None if device == "cpu" else torch.device(device),
    )
    return ProcessGroups(mesh)

"""A mesh of two processes serves as one rank does, and ends as one when either of them does."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tiny
from serving import TEXT
from tokenspeed import ranks
from tokenspeed.config import EngineConfig
from tokenspeed.engine import Engine
from tokenspeed.errors import ConfigError, EngineStopped, PlacementError, RankLost, StepError
from tokenspeed.plan import PLANNED, Joined, StepPlan
from tokenspeed.request import SamplingParams
from tokenspeed.spmd.messages import Plan, decoded, encoded

two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="two GPUs are needed")

PROMPTS = [[7 * i % 90 + 3 for i in range(40)], [5, 9, 33, 70], [7 * i % 90 + 3 for i in range(29)]]
SIZES = {"pages": 48, "page_size": 4, "slots": 3, "prefill_chunk": 24}
PARAMS = [
    SamplingParams(temperature=0, max_tokens=40, ignore_eos=True),
    SamplingParams(temperature=0.8, top_p=0.9, seed=3, max_tokens=40, repetition_penalty=1.2),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.letters(tiny.write(tmp_path_factory.mktemp("llama")))


def outputs(engine: Engine) -> list[tuple[int, ...]]:
    return [tuple(one.token_ids) for params in PARAMS for one in engine.generate(PROMPTS, params)]


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[tuple[int, ...]]:
    with Engine.from_pretrained(folder, dtype="float32", **SIZES) as engine:
        return outputs(engine)


on_devices = pytest.mark.parametrize(
    ("device", "overlap"),
    [("cpu", 1), *(pytest.param("cuda", n, marks=two_gpus) for n in (0, 1))],
)


@contextmanager
def two_ranks(
    folder: Path, device: str, overlap: int
) -> Iterator[tuple[str, subprocess.Popen[str], int]]:
    """`tokenspeed serve --mesh tp=2`: the URL, rank 0, and the process id of rank 1."""
    sizes = [word for name, n in SIZES.items() for word in ("--" + name.replace("_", "-"), str(n))]
    command = [sys.executable, "-m", "tokenspeed", "serve", str(folder), "--mesh", "tp=2",
               "--device", device, "--overlap", str(overlap), "--port", "0",
               "--dtype", "float32", *sizes]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        lines = []
        for line in process.stderr:
            lines.append(line)
            if line.startswith("ready at "):
                break
        assert any(line.startswith("ready at ") for line in lines), "".join(lines)
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        (follower,) = map(int, children)
        yield lines[-1].split()[-1], process, follower
    finally:
        process.kill()
        process.wait()
        process.stderr.close()


def gone(pid: int, within_s: float) -> bool:
    deadline_s = time.monotonic() + within_s
    while time.monotonic() < deadline_s:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except FileNotFoundError:
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@on_devices
def test_two_ranks_serve_the_ids_of_one_until_one_of_them_is_killed(
    folder: Path, device: str, overlap: int, expected: list[tuple[int, ...]]
) -> None:
    """It is killed when it has left rank 0 alone in a collective, which on NCCL never ends."""
    with two_ranks(folder, device, overlap) as (url, process, follower):
        body = {"model": str(folder), "temperature": 0, "max_tokens": 40, "ignore_eos": True}
        with httpx.Client(base_url=url, timeout=60) as client:
            for prompt, ids in zip(PROMPTS, expected, strict=False):
                answer = client.post(TEXT, json={**body, "prompt": prompt})
                assert answer.status_code == 200, answer.text
                assert answer.json()["choices"][0]["text"] == "".join(chr(33 + i) for i in ids)
            assert client.get("/health").status_code == 200
            os.kill(follower, signal.SIGSTOP)
            with ThreadPoolExecutor(1) as pool:
                asked = pool.submit(
                    httpx.post, url + TEXT, json={**body, "prompt": [3]}, timeout=60
                )
                while client.get("/health").json()["reason"] == "0 requests open":
                    time.sleep(0.01)
                time.sleep(0.5)
                os.kill(follower, signal.SIGKILL)
                killed_s = time.monotonic()
                assert asked.result().status_code >= 500
            while (health := client.get("/health")).status_code == 200:
                assert time.monotonic() < killed_s + 10
            said = r"rank 1 of the mesh tp=2 has ended \(killed by signal 9\)"
            assert re.search(said, health.json()["reason"]), health.text
            assert client.post(TEXT, json={**body, "prompt": [3]}).status_code == 503
        assert process.wait(10) == 1
        assert time.monotonic() < killed_s + 10
        assert process.stderr is not None
        rest = process.stderr.read()
        assert len(re.findall(said, rest)) == 1, rest
        assert "Traceback" not in rest


@on_devices
def test_a_follower_ends_when_rank_0_is_killed(folder: Path, device: str, overlap: int) -> None:
    with two_ranks(folder, device, overlap) as (_, process, follower):
        process.kill()
        assert process.stderr is not None
        assert gone(follower, within_s=10)
        assert "error: rank 0 is gone; rank 1 ends" in process.stderr.read()


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        {"mesh": "pp=2"},
        {"mesh": "tp=2", "speculate": "ngram"},
        {"mesh": "pp=2", "overlap": 1},
        pytest.param({"mesh": "tp=2", "device": "cuda"}, marks=two_gpus),
        pytest.param({"mesh": "pp=2", "device": "cuda", "overlap": 1}, marks=two_gpus),
    ],
)
def test_samples_and_guesses_are_those_of_one_rank(
    folder: Path, expected: list[tuple[int, ...]], chosen: dict[str, Any]
) -> None:
    with Engine.from_pretrained(folder, dtype="float32", **SIZES, **chosen) as engine:
        assert outputs(engine) == expected  # by 120 steps and more: digests are compared
        assert engine.lost is None
    assert engine._leader is not None
    assert [child.returncode for child in engine._leader._children.values()] == [0]


@pytest.mark.slow
def test_a_rank_that_samples_something_else_is_found_by_its_digest(folder: Path) -> None:
    with Engine.from_pretrained(folder, dtype="float32", mesh="tp=2", **SIZES) as engine:
        engine._executor._tally._hash.update(b"as if rank 0 had sampled another token")
        with pytest.raises(StepError, match="has not sampled what rank") as caught:
            engine.generate([PROMPTS[1]] * 2, PARAMS[0])
        assert "RankLost" in str(caught.value)
        assert not engine.health().live
        with pytest.raises(EngineStopped, match="has not sampled what rank"):
            engine.generate(PROMPTS, PARAMS[0])


@pytest.mark.slow
def test_torchrun_starts_the_ranks_as_well(folder: Path, expected: list[tuple[int, ...]]) -> None:
    sizes = [word for name, n in SIZES.items() for word in ("--" + name.replace("_", "-"), str(n))]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
               "-m", "tokenspeed", "serve", str(folder), "--mesh", "tp=2", "--port", "0",
               "--dtype", "float32", *sizes]  # fmt: skip
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stderr is not None
    try:
        line = next(line for line in process.stderr if line.startswith("ready at "))
        body = {"model": str(folder), "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 40}
        answer = httpx.post(line.split()[-1] + TEXT, json={**body, "ignore_eos": True}, timeout=60)
        assert answer.json()["choices"][0]["text"] == "".join(chr(33 + i) for i in expected[0])
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        process.stderr.close()


@pytest.mark.parametrize(
    ("chosen", "words"),
    [
        ({"mesh": "dp=2"}, "mesh: got 'dp=2'; expected sizes of tp, ep, pp"),
        ({"mesh": "tp"}, "mesh: got 'tp'; expected sizes of tp, ep, pp"),
        ({"mesh": "tp=0"}, "mesh: got 'tp=0'"),
        ({"mesh": "tp=2", "host_pages": 8}, "host_pages: got 8; expected 0 on a mesh"),
        ({"mesh": "tp=2", "host_memory_gb": 1.0}, "host_memory_gb: got 1.0; expected None on a"),
        ({"mesh": "tp=2", "device": "cuda:1"}, "device: got 'cuda:1'; expected cpu or cuda"),
    ],
)
def test_what_a_mesh_cannot_do_is_refused_by_name(chosen: dict[str, object], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineConfig(**chosen)
    assert str(caught.value).startswith(words)


def test_a_model_that_the_mesh_cannot_cut_leaves_no_process(folder: Path) -> None:
    """Two heads of keys for three ranks, no experts to deal out: said before a rank is started."""
    before = children()
    with pytest.raises(PlacementError, match="3"):
        Engine.from_pretrained(folder, dtype="float32", mesh="tp=3", **SIZES)
    with pytest.raises(
        ConfigError, match="got 'ep=2'; expected axes along which llama is cut: pp, tp"
    ):
        Engine.from_pretrained(folder, dtype="float32", mesh="ep=2", **SIZES)
    assert not [pid for pid in children() - before if not gone(pid, within_s=0.1)]


def children() -> set[int]:
    """Processes that this one has started: of other tests in it, too."""
    return set(map(int, Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()))


def test_there_is_a_gpu_for_each_rank(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"mesh: got 'tp=2'; .* a rank a GPU: .* 1 GPU$"):
        Engine.from_pretrained(folder, mesh="tp=2", device="cuda", **SIZES)


def test_a_rank_that_ends_as_ranks_meet_is_not_waited_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 0 is in the rendezvous by then, which waits for ten minutes."""
    code = """
import os, socket
from tokenspeed.spmd.messages import Channel, Introduction
host, _, port = os.environ["TOKENSPEED_LEADER"].rpartition(":")
channel = Channel(socket.create_connection((host, int(port))))
channel.send(Introduction(1, os.environ["TOKENSPEED_LEADER_TOKEN"]))
channel.receive()
os._exit(3)
"""

    def spawn(rank: int, address: str, token: str) -> subprocess.Popen[bytes]:
        names = {"TOKENSPEED_LEADER": address, "TOKENSPEED_LEADER_TOKEN": token}
        return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **names})

    monkeypatch.setattr(ranks, "_spawn", spawn)
    with pytest.raises(RankLost, match=r"rank 1 .* has ended \(exit status 3\)"):
        Engine.from_pretrained(folder, dtype="float32", mesh="tp=2", **SIZES)


def arrays(dtype: type, *shape: int) -> st.SearchStrategy[np.ndarray]:
    low, high = (0, 1) if dtype is np.bool_ else (-(2**31), 2**31 - 1)
    size = int(np.prod(shape))
    numbers = st.lists(st.integers(low, high), min_size=size, max_size=size)
    return numbers.map(lambda found: np.array(found, dtype).reshape(shape))


@st.composite
def plans(draw: st.DrawFn) -> StepPlan:
    rows, tokens, changes = (draw(st.integers(0, 4)) for _ in range(3))
    ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
    params = st.builds(
        SamplingParams,
        temperature=st.floats(0, 2),
        seed=st.none() | st.integers(1 - 2**63, 2**63 - 1),
        logit_bias=st.dictionaries(st.integers(0, 2**31 - 1), st.floats(-100, 100), max_size=3),
        stop=st.lists(st.text(min_size=1), max_size=2).map(tuple),
        stop_token_ids=ids,
    )
    joined = st.builds(
        Joined, slot=st.integers(0, 4095), params=params, prompt_ids=ids, output_ids=ids
    )
    return StepPlan(
        step=draw(st.integers(0, 2**40)),
        slots=draw(arrays(np.int32, rows)),
        query_start=draw(arrays(np.int32, rows + 1)),
        token_ids=draw(arrays(np.int32, tokens)),
        context_lens=draw(arrays(np.int32, rows)),
        sampled=draw(arrays(np.bool_, rows)),
        page_delta=draw(arrays(np.int32, changes, 3)),
        joined=draw(st.lists(joined, max_size=2).map(tuple)),
    )


@settings(max_examples=40)
@given(plans())
def test_a_plan_comes_as_it_went(plan: StepPlan) -> None:
    message = decoded(encoded(Plan.of(plan)))
    assert isinstance(message, Plan)
    came = message.restored()
    assert (came.step, came.joined) == (plan.step, plan.joined)
    for name in PLANNED[1:]:
        one, other = getattr(came, name), getattr(plan, name)
        assert one.dtype == other.dtype, name
        assert one.shape == other.shape, name
        assert (one == other).all(), name

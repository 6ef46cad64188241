"""The command line: click commands of a few lines each.

Rule: flags become a validated config before anything is read or downloaded; what a person sees goes
to the terminal through rich, what a program reads goes to stdout as JSON; rooms that need torch are
imported by the commands that need them, so that `--help` and `check` start at once.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import logging
import platform
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import attrs
import click
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

import tokenspeed
from tokenspeed.config import (
    DEFAULT_MODEL,
    DTYPES,
    KV_DTYPES,
    LOAD_FORMATS,
    QUANTIZE,
    EngineConfig,
    ServeConfig,
)
from tokenspeed.errors import TokenSpeedError
from tokenspeed.fsm import codegen as fsm_codegen
from tokenspeed.fsm import commands as fsm_commands
from tokenspeed.request import SamplingParams

if TYPE_CHECKING:
    from tokenspeed.bench.serve import Workload
    from tokenspeed.engine import Engine

__all__ = ["main"]

_screen = Console(stderr=True)


def _room(name: str) -> Any:
    """A module that needs torch."""
    return importlib.import_module(name)


def _engine_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that make an EngineConfig; their names are its fields."""
    defaults = {a.name: a.default for a in attrs.fields(EngineConfig)}
    options = [
        click.option("--dtype", type=click.Choice(DTYPES), help="weights, activations"),
        click.option("--kv-dtype", type=click.Choice(KV_DTYPES), help="of KV pages"),
        click.option("--quantize", type=click.Choice(QUANTIZE), help="matrices of few bits"),
        click.option("--device", help="cpu, cuda, cuda:1 ..."),
        click.option("--mesh", help="ranks that share the model: tp=2"),
        click.option("--page-size", type=int, help="tokens in a KV page  [default: by kernel]"),
        click.option("--pages", type=int, help="KV pages  [default: by memory]"),
        click.option("--slots", type=int, help="requests that run at once"),
        click.option("--waiting-max", type=int, help="may wait; then 429"),
        click.option("--prefill-chunk", type=int, help="input tokens of one step"),
        click.option("--context-max", type=int, help="tokens of a request  [default: the model's]"),
        click.option("--overlap", type=int, help="steps launched ahead, 0 or 1"),
        click.option("--host-pages", type=int, help="KV pages of host memory behind the cache"),
        click.option("--host-memory-gb", type=float, help="the same as memory, in 10^9 bytes"),
        click.option("--speculate", type=click.Choice(["ngram"]), help="verify guessed tokens"),
        click.option(
            "--draft-tokens", type=int, help="guesses of a request in a step  [default: 4]"
        ),
        click.option("--cuda-graphs/--no-cuda-graphs", help="replay GPU steps"),
        click.option("--prefix-cache/--no-prefix-cache", help="share prefix KV"),
        click.option("--itl-budget-ms", type=float, help="most time between two tokens of a user"),
        click.option("--tps-floor", type=float, help="the same as tokens/s that a user keeps"),
        click.option("--session-pages-max", type=int, help="kept for sessions  [default: half]"),
        click.option("--threads", type=int, help="torch's CPU threads"),
        click.option(
            "--load-format", type=click.Choice(LOAD_FORMATS), help="dummy: random weights"
        ),
        click.option("--trace-lifecycle", help="each step of the lifecycle, as NDJSON"),
        click.option("--kv-events", help="write the prefix cache's events here, as vLLM's NDJSON"),
        click.option("--record-scheduler", help="write the scheduler's calls, for replay"),
    ]
    for option in reversed(options):
        command = option(command)
    for parameter in command.__click_params__:  # type: ignore[attr-defined]
        if parameter.name in defaults:
            parameter.default = defaults[parameter.name]
            parameter.show_default = defaults[parameter.name] not in (None, "")
    return command


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar for each phase of starting up."""
    tasks: dict[str, TaskID] = {}
    columns = (
        TextColumn("{task.description:>10}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_screen, transient=not _screen.is_terminal) as bars:

        def report(phase: str, done: int, total: int) -> None:
            if phase not in tasks:
                tasks[phase] = bars.add_task(phase, total=total)
            bars.update(tasks[phase], completed=done, total=total)

        yield report


def _follow(config: EngineConfig) -> None:
    """Where torchrun made this another rank than 0, be that, and end."""
    if config.mesh and _room("tokenspeed.ranks").started_to_follow():
        sys.exit(_room("tokenspeed.ranks").follow())


def _load(model: str, config: EngineConfig) -> Engine:
    with _progress() as report:
        return tokenspeed.Engine.from_pretrained(model, config=config, progress=report)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(tokenspeed.__version__, prog_name="tokenspeed")
@click.option("-v", "--verbose", is_flag=True, help="log what the engine does")
def cli(verbose: bool) -> None:
    """TokenSpeed: LLM inference whose request lifecycle is generated from its TLA+ spec."""
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )


@cli.command()
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--host", default="127.0.0.1", show_default=True, help="address to bind")
@click.option("--port", type=int, default=8000, show_default=True, help="0 takes a free one")
@click.option("--api-key-file", help="file with one accepted key a line")
@click.option("--no-auth", is_flag=True, help="serve beyond loopback without a key, on purpose")
@click.option("--drain-s", type=float, default=30.0, show_default=True, help="grace on SIGTERM")
@_engine_options
def serve(
    model: str,
    host: str,
    port: int,
    api_key_file: str | None,
    no_auth: bool,
    drain_s: float,
    **settings: Any,
) -> None:
    """Serve MODEL: a GGUF file, or a Hugging Face directory or id  [default: SmolLM2-135M]."""
    server = ServeConfig(
        host=host, port=port, api_key_file=api_key_file, no_auth=no_auth, drain_s=drain_s
    )
    config = EngineConfig(**settings)
    _follow(config)
    room = _room("tokenspeed.serve")
    room.check(server)
    engine = _load(model, config)
    try:
        sys.exit(room.run(engine, server, on_ready=lambda url: _ready(engine, url)))
    finally:
        engine.close()


def _ready(engine: Engine, url: str) -> None:
    """The last lines before serving: where, and something to paste."""
    body = {"model": engine.model_name, "messages": [{"role": "user", "content": "Say hello."}]}
    if engine.loaded is not None:
        _screen.print(str(engine.loaded), highlight=False)
    _screen.print(
        f"{engine.model_name}: context {engine.context_max} tokens, "
        f"{engine.pages} pages of {engine.config.page_tokens}, {engine.config.dtype}, "
        f"{engine.config.device}",
        highlight=False,
    )
    _screen.print(
        f"curl {url}/v1/chat/completions -H 'content-type: application/json' "
        f"-d '{json.dumps(body)}'",
        highlight=False,
        soft_wrap=True,
    )
    _screen.print(f"[bold green]ready[/] at [bold]{url}[/]", highlight=False)


@cli.command()
@click.argument("message")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--system", help="a system message before yours")
@click.option("--temperature", type=float, default=0.0, show_default=True)
@click.option("--max-tokens", type=int, default=512, show_default=True)
@_engine_options
def chat(
    message: str,
    model: str,
    system: str | None,
    temperature: float,
    max_tokens: int,
    **settings: Any,
) -> None:
    """Answer MESSAGE, word by word."""
    params = SamplingParams(temperature=temperature, max_tokens=max_tokens)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": message})
    config = EngineConfig(**settings)
    _follow(config)
    with _load(model, config) as engine:
        for delta in engine.stream(engine.encode_chat(messages), params):
            click.echo(delta.text, nl=False)
        click.echo()


@cli.command()
def env() -> None:
    """What a bug report needs: versions, machine, devices."""
    torch = _room("torch")
    table = Table(show_header=False, box=None)
    rows = {
        "tokenspeed": tokenspeed.__version__,
        "python": platform.python_version(),
        "machine": f"{platform.machine()} {platform.system()} {platform.release()}",
        "torch": f"{torch.__version__}, {torch.get_num_threads()} threads",
        "cuda": _cuda(torch),
        "compiler": shutil.which("c++") or "none",
    }
    for name in ("triton", "tokenizers", "safetensors", "gguf", "starlette", "hypercorn"):
        rows[name] = _version(name)
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _cuda(torch: Any) -> str:
    if not torch.cuda.is_available():
        return "none"
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


@cli.command()
@click.option("--explain", help='a problem, as "mla_decode b=8 q=4 h=16 kv=65536 dtype=bf16"')
def kernels(explain: str | None) -> None:
    """Which backend runs each op on this machine, and why not the others."""
    listing = _room("tokenspeed.kernels.listing")
    Console().print(listing.explained(explain) if explain else listing.table(), highlight=False)


@cli.command()
@click.argument("model")
@click.option("--mesh", default="", help="axes and their sizes, as tp=4,ep=4  [default: one rank]")
@click.option("--tokens", type=int, help="of a step, of all ranks together  [default: 32 each]")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--kv-dtype", type=click.Choice(KV_DTYPES), default="auto", show_default=True)
@click.option("--link", "links", multiple=True, help="AXIS=µs,GB/s  [default: NVLink and network]")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout instead of the table")
def shard(
    model: str,
    mesh: str,
    tokens: int | None,
    dtype: str,
    kv_dtype: str,
    links: tuple[str, ...],
    as_json: bool,
) -> None:
    """What each layer of MODEL sends on a mesh, what that costs, and what a rank holds.

    MODEL is a folder with a config.json, such a file, a GGUF file, the default model, or the name
    of a shape that is shipped; no weights are read.
    """
    measure = _room("tokenspeed.bench.shard").measure
    found = measure(model, mesh, tokens, dtype, links, kv_dtype=kv_dtype)
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))
    else:
        # A pipe has no width of its own; 80 columns would cut the numbers off.
        Console(width=None if sys.stdout.isatty() else 110).print(found.table(), highlight=False)


@cli.command()
@click.option("--check", "only_check", is_flag=True, help="write nothing; fail if a file is stale")
def codegen(only_check: bool) -> None:
    """Print the C++ lifecycle and the Python mirror from specs/Lifecycle.tla (in a checkout)."""
    sys.exit(fsm_codegen.main(check=only_check))


cli.add_command(fsm_commands.check)
cli.add_command(fsm_commands.monitor)
cli.add_command(fsm_commands.replay)


@cli.group()
def bench() -> None:
    """Measure, side by side and in one run."""


@bench.command("serve")
@click.option("--model", default=DEFAULT_MODEL, show_default=True)
@click.option("--peer", default="transformers", show_default=True, help="or http://host:port")
@click.option("--rounds", type=int, default=3, show_default=True, help="the median counts")
@click.option("--prompt-tokens", type=int, default=64, show_default=True)
@click.option("--output-tokens", type=int, default=64, show_default=True)
@click.option("--json", "json_path", type=click.Path(path_type=Path), help="also write JSON here")
@_engine_options
def bench_serve(
    model: str,
    peer: str,
    rounds: int,
    prompt_tokens: int,
    output_tokens: int,
    json_path: Path | None,
    **settings: Any,
) -> None:
    """Output tokens/s beside transformers' generate, or another server with the same model."""
    room = _room("tokenspeed.bench.serve")
    sizes = {"prompt_tokens": prompt_tokens, "output_tokens": output_tokens, "rounds": rounds}
    workload: Workload = room.Workload(**sizes)
    report = room.compare(model, EngineConfig(**settings), workload, console=_screen, peer=peer)
    Console().print(report.table())
    text = json.dumps(report.as_json(), indent=2)
    if json_path is not None:
        json_path.write_text(text + "\n")
    click.echo(text)


@bench.command("quality")
@click.argument("model", default=DEFAULT_MODEL)
@click.option("--text", help="a file to predict, in UTF-8  [default: this project's README]")
@click.option("--tokens", default=8192, show_default=True, type=click.IntRange(2), help="at most")
@click.option("--window", default=512, show_default=True, help="tokens that see each other")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_quality(model: str, text: str | None, tokens: int, window: int, as_json: bool) -> None:
    """Perplexity of a fixed text in float32, bfloat16, 8 and 4 bits, and with KV in 8."""
    room = _room("tokenspeed.bench.quality")
    with _progress() as report:
        found = room.measure(model, text, tokens, window, report)
    _screen.print(found.table())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


@bench.command("scheduler")
@click.option("--rows", type=int, multiple=True, help="of a step  [default: 1 16 64 256 1024]")
@click.option("--contexts", type=int, multiple=True, help="tokens  [default: 1024 51200]")
@click.option("--steps", type=int, help="clocked of each")
@click.option("--prompt-tokens", type=int, help="of a prompt that is admitted, or waits")
@click.option("--repeats", type=int, help="admissions; the median counts")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_scheduler(as_json: bool, **settings: Any) -> None:
    """CPU time of the control plane alone: steps, admission, waiting prompts, stats, memory."""
    room = _room("tokenspeed.bench.scheduler")
    given = {name: value for name, value in settings.items() if value not in (None, ())}
    sizes = room.Sizes(**given)
    with _progress() as report:
        found = room.measure(sizes, report)
    _screen.print(found.table())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


@bench.command("sessions")
@click.option("--trace", type=click.Path(path_type=Path), help="recorded sessions  [generated]")
@click.option("--sessions", type=int, help="at most so many  [all, or 200 generated]")
@click.option("--gap-s", type=float, default=120.0, show_default=True, help="between two starts")
@click.option("--shares", default=".125,.25,.5,1", show_default=True, help="pools, of what is live")
@click.option(
    "--hosts", default="0,1", show_default=True, help="host tiers, as multiples of a pool"
)
@click.option("--plot", type=click.Path(path_type=Path), help="write hits by pool here, as SVG")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_sessions(
    trace: Path | None,
    sessions: int | None,
    gap_s: float,
    shares: str,
    hosts: str,
    plot: Path | None,
    as_json: bool,
) -> None:
    """Cache hits with and without session hints: conversations replayed in virtual time."""
    room = _room("tokenspeed.bench.sessions")
    sizes = room.parse_sizes("shares", shares, 0.001), room.parse_sizes("hosts", hosts, 0)
    with _progress() as report:
        found = room.measure(*room.workload(trace, gap_s, sessions), *sizes, report)
    _screen.print(found.table())
    if plot is not None:
        plot.write_text(room.plot(found), encoding="utf-8")
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


@bench.command("policy")
@click.option("--floors", default="30,70,200", show_default=True, help="tokens/s that users keep")
@click.option("--users", type=int, help="that decode")
@click.option("--prompts", type=int, help="that come beside them")
@click.option("--prompt-tokens", type=int, help="of each")
@click.option("--overlap", type=int, help="steps launched ahead")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_policy(floors: str, as_json: bool, **settings: int | None) -> None:
    """Long prompts beside decoding users, in virtual time: a latency budget and fixed chunks."""
    room = _room("tokenspeed.bench.policy")
    given = {name: value for name, value in settings.items() if value is not None}
    rates = room.parse_floors(floors)
    workload = room.Workload(**given)
    with _progress() as report:
        found = room.measure(rates, report, workload)
    _screen.print(found.table())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


@bench.command("mesh")
@click.argument("model", required=False)
@click.option("--mesh", default="tp=2", show_default=True, help="axes and their sizes")
@click.option("--device", default="cpu", show_default=True, help="cpu, or cuda: a GPU a rank")
@click.option("--dtype", type=click.Choice(DTYPES), default="bfloat16", show_default=True)
@click.option("--rows", default=32, show_default=True, help="of the step, of all ranks together")
@click.option("--context", default=1024, show_default=True, help="cached tokens of each row")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_mesh(model: str | None, as_json: bool, **settings: Any) -> None:
    """Collectives between the ranks of a mesh here, by size, and a decode step of MODEL, if given.

    MODEL is a configuration, or the name of a shape that is shipped; weights are random.
    """
    found = _room("tokenspeed.bench.mesh").measure(model, **settings)
    _screen.print(found.table())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


@bench.command("kernels")
@click.option("--cell", "cells", multiple=True, help="b4_q1_h16_64K ...  [default: all]")
@click.option("--backend", "backends", multiple=True, help="cuda_sm90 ...  [default: all]")
@click.option("--plot", type=click.Path(dir_okay=False, path_type=Path), help="a roofline, as SVG")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_kernels(
    cells: tuple[str, ...], backends: tuple[str, ...], plot: Path | None, as_json: bool
) -> None:
    """Latent attention on this GPU, by backend, beside what loading the keys alone takes."""
    room = _room("tokenspeed.bench.kernels")
    with _progress() as report:
        found = room.measure(cells, backends, report)
    if plot is not None:
        plot.write_text(_room("tokenspeed.bench.roofline").plot(found))
    _screen.print(found.table())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


@bench.command("ops")
@click.option("--cell", "cells", multiple=True, help="decode_b8_8K ...  [default: all]")
@click.option("--json", "as_json", is_flag=True, help="JSON on stdout; the table is on stderr")
def bench_ops(cells: tuple[str, ...], as_json: bool) -> None:
    """The other ops of a step on this GPU, beside torch and what memory and products allow."""
    with _progress() as report:
        found = _room("tokenspeed.bench.ops").measure(cells, report)
    _screen.print(found.table())
    if as_json:
        click.echo(json.dumps(found.as_json(), indent=2))


def main() -> None:
    """Entry point: errors of ours are one line and exit status 2, never a traceback."""
    try:
        cli(standalone_mode=False)
    except TokenSpeedError as error:
        _screen.print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        sys.exit(2)
    except click.exceptions.Abort:
        sys.exit(130)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)

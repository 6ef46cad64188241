"""`tokenspeed check`, `monitor`, `replay`: the spec against models, engines and what they recorded.

Rule: progress and prose go to stderr, JSON to stdout; 0 means that what was asked holds, 1 that it
does not, 2 that the question could not be put.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import attrs
import click
from click.core import ParameterSource
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenspeed.errors import ConfigError, SpecError, TokenSpeedError
from tokenspeed.fsm.check import Report, Settings, simulate
from tokenspeed.fsm.check import check as check_model
from tokenspeed.fsm.conform import conform
from tokenspeed.fsm.explain import collides, sentences
from tokenspeed.fsm.graph import read_state_graph
from tokenspeed.fsm.kv_adapters import ADAPTERS
from tokenspeed.fsm.kv_events import monitor as monitor_events
from tokenspeed.fsm.manifest import Recorded, read_manifest, specs_directory, write_manifest
from tokenspeed.fsm.model import load_model
from tokenspeed.fsm.museum import Museum, guards, read_museum, try_exhibit, try_guard
from tokenspeed.fsm.pictures import graph_dot, graph_svg, refuse_large, sequence_svg, sequence_text
from tokenspeed.fsm.replay import play
from tokenspeed.fsm.runtime import Replayed, refuse_others
from tokenspeed.fsm.runtime import replay as follow
from tokenspeed.fsm.steps import Step, changes
from tokenspeed.fsm.trace import read_trace, validate

__all__ = ["check", "monitor", "replay"]

STEPS_TOLD_MAX = 200
"""Steps of a behaviour that a person is told; of a longer one, its two ends."""

_screen = Console(stderr=True)
_path = click.Path(path_type=Path)  # whether it can be read is said in JSON, too
_file = click.Path(path_type=Path, dir_okay=False)


@click.command()
@click.argument("spec", type=_path, required=False)
@click.option("--config", type=_path, help="the .cfg  [default: beside SPEC, same name]")
@click.option("--json", "as_json", is_flag=True, help="the report as JSON on stdout")
@click.option("--workers", type=click.IntRange(1), default=1, show_default=True, help="threads")
@click.option("--memory-mb", type=click.IntRange(16), default=4096, show_default=True)
@click.option("--states-max", type=click.IntRange(1), help="stop after that many states")
@click.option(
    "--engine", type=click.Choice(["auto", "compiled", "interpreter"]), default="auto",
    show_default=True,
)  # fmt: skip
@click.option("--simulate", "walks", type=click.IntRange(1), help="random behaviours, not all")
@click.option("--depth", type=click.IntRange(1), default=100, show_default=True, help="of a walk")
@click.option("--seed", type=click.IntRange(0), default=1, show_default=True, help="of the walks")
@click.option("--runtime", is_flag=True, help="drive the real control plane through all states")
@click.option("--replay", is_flag=True, help="ask the real control plane for the counterexample")
@click.option("--sequence", type=_file, help="draw the counterexample here, as SVG")
@click.option("--svg", type=_file, help="draw the state graph here, if it is small")
@click.option("--dot", type=_file, help="write the state graph here, for Graphviz")
@click.option("--trace", type=_path, help="judge a trace of serve --trace-lifecycle")
@click.option("--museum", is_flag=True, help="put known bugs back, and find every one")
@click.option("--record", is_flag=True, help="write what is found into the manifest")
@click.option("--slow/--no-slow", default=True, show_default=True, help="the large models too")
def check(
    spec: Path | None,
    config: Path | None,
    as_json: bool,
    walks: int | None,
    depth: int,
    seed: int,
    slow: bool,
    record: bool,
    museum: bool,
    trace: Path | None,
    sequence: Path | None,
    svg: Path | None,
    dot: Path | None,
    runtime: bool,
    replay: bool,
    **settings: Any,
) -> None:
    """Model check SPEC; without one, every model of the manifest."""
    how = Settings(**settings)
    modes = {"--trace": trace, "--museum": museum, "--runtime": runtime, "--simulate": walks}
    of_one = {"--replay": replay, "--sequence": sequence, "--svg": svg, "--dot": dot}
    with _answered(as_json, lambda error: _json(_failed(error))):
        _refuse_idle(_given(modes), _given(of_one), spec, config, record)
        _refuse_settings(_given(modes), spec)
        _refuse_missing({"SPEC": spec, "--config": config, "--trace": trace})
        _refuse_unwritable({"--sequence": sequence, "--svg": svg, "--dot": dot}, as_json)
        if trace is not None:
            sys.exit(_judge(trace, as_json))
        if museum:
            sys.exit(_visit_museum(how, as_json))
        if spec is None and runtime:
            sys.exit(_drive(_with_graph(), how, as_json=as_json, record=record))
        if spec is None:
            sys.exit(_check_all(how, as_json=as_json, slow=slow, record=record))
        config = config or spec.with_suffix(".cfg")
        _refuse_missing({"--config": config})
        if runtime:
            only = (config.stem, spec, config, None)
            sys.exit(_drive([only], how, as_json=as_json, record=False))
        if replay:  # before the search, whose counterexample would be lost
            refuse_others(load_model(spec, config).evaluator.variables)
        with _watch(spec.stem) as progress:
            if walks is None:
                report = check_model(spec, config, how, progress)
            else:
                report = simulate(
                    spec, config, walks=walks, depth=depth, seed=seed, progress=progress
                )
        replayed = None
        if replay and report.trace:
            replayed = follow(load_model(spec, config).evaluator, report.trace)
    if as_json:
        out = _json(report) | ({"replay": attrs.asdict(replayed)} if replayed else {})
        _print_json(out)
    _tell(report)
    _draw_sequence(spec, report, sequence)
    _draw_graph(spec, config, how, report, svg, dot)
    if replay:
        _tell_replay(report, replayed)
    sys.exit({"ok": 0, "error": 2}.get(report.result, 1))


def _about(error: TokenSpeedError) -> dict[str, Any]:
    return {"result": "error", "violated": str(error)}


@contextmanager
def _answered(
    as_json: bool, said: Callable[[TokenSpeedError], dict[str, Any]] = _about
) -> Iterator[None]:
    """Whatever ends a command before it has a report is its report, for programs too."""
    try:
        yield
    except TokenSpeedError as error:
        if as_json:
            _print_json(said(error))
        raise


def _failed(error: TokenSpeedError) -> Report:
    """The report of a check that has seen no state."""
    return Report("error", 0, 0, 0, 0.0, {}, violated=str(error))


def _given(options: Mapping[str, object]) -> list[str]:
    return [name for name, value in options.items() if value]


def _refuse_idle(
    modes: list[str], of_one: list[str], spec: Path | None, config: Path | None, record: bool
) -> None:
    """Refuse options that would do nothing.

    Raises:
        ConfigError: two questions at once, or an option that the question has no use for.
    """
    if len(modes) > 1:
        raise ConfigError("mode", " ".join(modes), "one of them")
    if config is not None and spec is None:
        raise ConfigError("--config", str(config), "a SPEC before it, which it configures")
    if spec is not None and modes in (["--trace"], ["--museum"]):
        raise ConfigError(
            "SPEC", str(spec), f"none with {modes[0]}, which is about specs/Lifecycle"
        )
    if spec is None and modes == ["--simulate"]:
        raise ConfigError("--simulate", "no SPEC", "a check of one SPEC")
    if of_one and (spec is None or modes == ["--runtime"]):
        raise ConfigError(", ".join(of_one), "given", "a check of one SPEC, without --runtime")
    if modes == ["--simulate"] and {"--svg", "--dot"} & {*of_one}:
        raise ConfigError("--simulate", "random behaviours", "all states; leave it out to draw")
    if record and (spec is not None or modes not in ([], ["--runtime"])):
        raise ConfigError("--record", "given", "a check of the whole manifest, without SPEC")


def _refuse_missing(given: Mapping[str, Path | None]) -> None:
    """Refuse what is to be read and is not there.

    Raises:
        ConfigError: it is no file.
    """
    for option, path in given.items():
        if path is not None and (path.is_dir() or not path.exists()):
            raise ConfigError(option, str(path), "a file that exists; name one")


def _refuse_unwritable(given: Mapping[str, Path | None], as_json: bool) -> None:
    """Refuse before the search what could not be written after it.

    Raises:
        ConfigError: a file cannot be opened, or stdout is wanted twice.
    """
    here = [option for option, path in given.items() if path == Path("-")]
    if len(here) + as_json > 1:
        wants = ", ".join([*here, *["--json"] * as_json])
        raise ConfigError(wants, "stdout", "one of them there; name a file")
    for option, path in given.items():
        if path is None or option in here:
            continue
        there = path.exists()
        with _writing(option, path):
            path.open("ab").close()
            if not there:
                path.unlink()


@contextmanager
def _writing(option: str, path: Path) -> Iterator[None]:
    """What cannot be written is an error with its reason."""
    try:
        yield
    except OSError as error:
        expected = f"a file that can be written, but: {error.strerror}"
        raise ConfigError(option, str(path), expected) from error


def _print_json(value: object) -> None:
    """The report, to stdout.

    Raises:
        ConfigError: it cannot be written; nothing more is tried there.
    """
    try:
        click.echo(json.dumps(value, indent=2))
    except BrokenPipeError:
        raise  # who reads it has had enough
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        expected = f"a file that can be written, but: {error.strerror}"
        raise ConfigError("--json", "stdout", expected) from error


_SEARCH = {"--workers", "--memory-mb", "--states-max", "--engine"}
_WALKS = {"--depth", "--seed"}
_MANIFEST = {"--slow"}


def _refuse_settings(modes: list[str], spec: Path | None) -> None:
    """Refuse what was set for another question than the one that is put.

    Raises:
        ConfigError: it would change nothing.
    """
    context = click.get_current_context()
    given = {
        max(each.opts, key=len)
        for each in context.command.params
        if context.get_parameter_source(str(each.name)) is not ParameterSource.DEFAULT
    }
    used = set() if {*modes} & {"--simulate", "--trace"} else {*_SEARCH}
    used |= _WALKS if "--simulate" in modes else set()
    used |= _MANIFEST if spec is None and not modes else set()
    idle = sorted(given & (_SEARCH | _WALKS | _MANIFEST) - used)
    if idle:
        question = modes[0] if modes else "a check of one SPEC" if spec else "the manifest"
        raise ConfigError(", ".join(idle), "given", f"none of it with {question}; leave it out")


def _write(option: str, path: Path, text: str) -> None:
    """A drawing, to a file or, as `-`, to stdout.

    Raises:
        ConfigError: it cannot be written.
    """
    with _writing(option, path), click.open_file(str(path), "w", encoding="utf-8") as file:
        file.write(text)


def _draw_sequence(spec: Path, report: Report, path: Path | None) -> None:
    """The counterexample, if there is one."""
    if path is not None and report.trace:
        title = f"{spec.stem}: {report.violated}"
        _write("--sequence", path, sequence_svg(report.trace, title, report.loop))
    elif path is not None:
        _screen.print("no counterexample, so nothing was drawn", style="yellow")


def _draw_graph(
    spec: Path, config: Path, how: Settings, report: Report, svg: Path | None, dot: Path | None
) -> None:
    """The states that a check has seen, as the pictures that are asked for."""
    if svg is None and dot is None:
        return
    if svg is not None:
        refuse_large(report.distinct)
    graph = read_state_graph(spec, config, how, report)
    if svg is not None:
        title = f"{spec.stem}: {report.violated or report.result}"
        _write("--svg", svg, graph_svg(graph, title))
    if dot is not None:
        _write("--dot", dot, graph_dot(graph))


Driven = tuple[str, Path, Path, str | None]
"""A model to drive the runtime through: name, spec, configuration, the graph that is recorded."""


def _with_graph() -> list[Driven]:
    specs = specs_directory()
    models = [model for model in read_manifest(specs) if model.graph]
    return [(m.name, specs / m.spec, specs / m.config, m.graph) for m in models]


def _drive(models: list[Driven], how: Settings, *, as_json: bool, record: bool) -> int:
    """The real control plane through every state of some models."""
    rows, bad = [], 0
    graphs: dict[str, str] = {}
    for name, spec, config, graph in models:
        with _screen.status(f"driving through {name}"):
            found = conform(spec, config, how)
        differs = str(found.divergence or "")
        graphs[name] = found.graph or graph or ""
        if not differs and not record and graph not in (None, found.graph):
            differs = f"graph {found.graph}, recorded {graph}"
        bad += bool(differs)
        counts = {"states": found.states, "steps": found.steps, "refused": found.refused}
        rows.append({"name": name, **counts, "graph": found.graph, "differs": differs or None})
        _screen.print(
            f"[bold]{name}[/] {found.states:,} states, {found.steps:,} steps taken, "
            f"{found.refused:,} refused: "
            + (f"[red]{escape(differs)}[/]" if differs else "[green]as the spec[/]"),
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    if record:
        specs = specs_directory()
        kept = read_manifest(specs)
        write_manifest(specs, [attrs.evolve(m, graph=graphs.get(m.name)) for m in kept])
    if as_json:
        _print_json(rows)
    return 1 if bad else 0


def _tell_replay(report: Report, found: Replayed | None) -> None:
    """What the real control plane made of a counterexample, if there is one."""
    if found is None:
        _screen.print("no counterexample, so nothing was replayed", style="yellow")
        return
    said = f"the runtime took {found.steps} steps as told"
    end = "all of them" if report.loop is None else "once round the loop"
    text = f"{said}, then {found.why}" if found.why else f"{said}: {end}"
    _screen.print(f"[bold]{escape(text)}[/]", highlight=False, soft_wrap=True)


def _check_all(how: Settings, *, as_json: bool, slow: bool, record: bool) -> int:
    directory = specs_directory()
    kept: list[Recorded] = []
    table = Table("model", "result", "generated", "distinct", "depth", "CPU s", "", box=None)
    rows, bad = [], 0
    with _watch("") as progress:
        for model in read_manifest(directory):
            if model.slow and not slow:
                kept.append(model)
                continue
            report = _recorded(directory, model, how, progress)
            kept.append(model.found(report))
            differs = model.differs(report)
            bad += bool(differs)
            rows.append({"name": model.name, **_json(report), "differs": differs or None})
            counts = [f"{n:,}" for n in (report.generated, report.distinct, report.depth)]
            verdict = (
                "as recorded"
                if not differs
                else "recorded"
                if record
                else f"[red]{escape(differs)}[/]"
            )
            table.add_row(model.name, report.result, *counts, f"{report.seconds:.2f}", verdict)
    if record:
        write_manifest(directory, kept)
    _screen.print(table)
    _screen.print(f"{len(rows) - bad} of {len(rows)} models as recorded")
    if as_json:
        _print_json(rows)
    return 1 if bad and not record else 0


def _recorded(
    directory: Path, model: Recorded, how: Settings, progress: Callable[[dict[str, int]], None]
) -> Report:
    try:
        return check_model(directory / model.spec, directory / model.config, how, progress)
    except SpecError as error:  # the others are checked all the same
        return _failed(error)


def _judge(path: Path, as_json: bool) -> int:
    """Is a recorded run a behaviour of the spec?"""
    header, steps = read_trace(path)
    rejected = validate(specs_directory(), header, steps)
    verdict = "accepted" if rejected is None else escape(str(rejected))
    _screen.print(f"{len(steps):,} steps: {verdict}", highlight=False, soft_wrap=True)
    if as_json:
        why = rejected and {
            "line": rejected.line,
            "action": rejected.step.action,
            "why": rejected.why,
        }
        result = "ok" if rejected is None else "trace"
        _print_json({"result": result, "steps": len(steps), "rejected": why})
    return 0 if rejected is None else 1


def _visit_museum(how: Settings, as_json: bool) -> int:
    """Every exhibit by the property that it names, then every guard by any."""
    specs = specs_directory()
    museum = read_museum(specs)
    rows: list[dict[str, object]] = []
    missed = 0
    for exhibit in museum.exhibits:
        with _watch(exhibit.id) as progress:
            report = try_exhibit(specs, exhibit, how, progress)
        found = report.violated == exhibit.property
        missed += not found
        mark = "[green]found[/]" if found else f"[red]missed: {escape(str(report.violated))}[/]"
        _screen.print(f"[bold]{exhibit.id}[/] {mark}  {exhibit.story}", highlight=False)
        _screen.print(f"  reported as {', '.join(exhibit.bugs)}", style="dim", highlight=False)
        if exhibit.cpp:
            _screen.print(f"  in C++: {exhibit.cpp}", style="dim", highlight=False)
        _screen.print(f"  {_path_of(report)}", highlight=False, soft_wrap=True)
        last = sentences(report.trace)[-1:] or ("nothing was violated",)
        _screen.print(f"  {escape(last[0])}\n", highlight=False, soft_wrap=True)
        rows.append({"id": exhibit.id, "found": found, **_json(report)})
    guarded = _delete_guards(specs, museum, how)
    missed += sum(row["violated"] is None and row["reason"] is None for row in guarded)
    if as_json:
        _print_json(rows + guarded)
    return 1 if missed else 0


def _delete_guards(specs: Path, museum: Museum, how: Settings) -> list[dict[str, object]]:
    """Who misses each guard, or why nobody does."""
    rows: list[dict[str, object]] = []
    for name, judged in museum.guards.items():
        for guard in guards(specs / name):
            with _watch(guard.name) as progress:
                killed = try_guard(specs, museum, name, guard, how, progress)
            reason = judged.survivors.get(guard.name)
            said = f"breaks {killed.violated}" if killed else reason or "[red]is not missed[/]"
            text = f"without {escape(guard.name)}: {said}"
            _screen.print(text, highlight=False, soft_wrap=True)
            violated = killed and killed.violated
            rows.append({"spec": name, "guard": guard.name, "violated": violated, "reason": reason})
    return rows


def _path_of(report: Report) -> str:
    """A counterexample in one line."""
    labels = [step.label for step in report.trace[1:]]
    if report.loop is not None:
        labels.insert(report.loop, "(for ever:")
        labels.append(")")
    return " > ".join(labels)


@contextmanager
def _watch(name: str) -> Iterator[Callable[[dict[str, int]], None]]:
    """A line that moves while states are counted."""
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[said]}"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=_screen, transient=True) as bars:
        task = bars.add_task(f"checking {name}", total=None, said="compiling")

        def progress(counts: dict[str, int]) -> None:
            seen, left = counts.get("distinct", 0), counts.get("queue", 0)
            elapsed = bars.tasks[0].elapsed or 1.0
            rate = counts["generated"] / max(elapsed, 0.01)
            said = f"{seen:,} states, {left:,} to go, {rate:,.0f} steps/s"
            bars.update(task, total=seen + left or None, completed=seen, said=said)

        yield progress


def _tell(report: Report) -> None:
    """The verdict in a few lines, and the counterexample."""
    colour = {"ok": "green", "error": "yellow"}.get(report.result, "red")
    _screen.print(
        f"[bold {colour}]{report.result}[/]"
        + (f": {escape(report.violated)}" if report.violated else ""), highlight=False,
    )  # fmt: skip
    states = f", {report.distinct:,} distinct, depth {report.depth}" if report.distinct else ""
    _screen.print(
        f"{report.generated:,} generated{states}, {report.seconds:.2f} CPU s ({report.engine})",
        highlight=False,
    )
    if report.dead and report.result == "ok":
        _screen.print(f"never happened: {', '.join(report.dead)}", style="yellow")
    for note in report.notes:
        _screen.print(escape(note), style="yellow", highlight=False)
    _tell_behaviour(report)


def _tell_behaviour(report: Report) -> None:
    """Each step in a sentence, red where it collides, and below it what it changed."""
    before: Step | None = None
    end = STEPS_TOLD_MAX // 2
    left_out = range(end, len(report.trace) - end)
    for number, (step, sentence) in enumerate(
        zip(report.trace, sentences(report.trace), strict=True)
    ):
        if number in left_out:
            before = step
            if number == left_out.start:
                _screen.print(f"      {len(left_out):,} steps are left out; --json has them")
            continue
        colour = " red" if before and collides(before, step) else ""
        text = f"{number:>4}  [bold{colour}]{escape(sentence)}[/]"
        _screen.print(text, highlight=False, soft_wrap=True)
        if before:
            _screen.print(f"        [cyan]{escape(step.label)}[/]", highlight=False, soft_wrap=True)
        for path, old, new in changes(before, step) if before else ():
            text = f"        [dim]{escape(path)}: {escape(old)} ->[/] [bold]{escape(new)}[/]"
            _screen.print(text, highlight=False, soft_wrap=True)
        before = step
    if report.loop is not None:
        _screen.print(f"      and back to step {report.loop}, for ever")
    if len(report.trace) > 1 and not left_out:
        diagram = sequence_text(report.trace, report.loop)
        _screen.print(f"\n{escape(diagram)}", highlight=False, soft_wrap=True)


def _json(report: Report) -> dict[str, Any]:
    """The report for programs, each step of its trace with its sentence."""
    plain = report.json()
    steps = zip(plain["trace"], sentences(report.trace), strict=True)
    return {**plain, "trace": [{**step, "sentence": sentence} for step, sentence in steps]}


@click.command()
@click.argument("events", type=_path)
@click.option("--adapter", type=click.Choice(sorted(ADAPTERS)), default="vllm", show_default=True)
@click.option("--pages", type=click.IntRange(1), help="pages of the device, where known")
@click.option("--json", "as_json", is_flag=True, help="the report as JSON on stdout")
def monitor(events: Path, adapter: str, pages: int | None, as_json: bool) -> None:
    """Check an engine's KV EVENTS (NDJSON or MessagePack) against the page rules."""
    with _answered(as_json):
        _refuse_missing({"EVENTS": events})
        report = monitor_events(events, ADAPTERS[adapter], pages=pages)
    if as_json:
        _print_json(report.json())
    for violation in report.violations:
        said = f"line {violation.line}: {violation.rule}: {violation.sentence}"
        _screen.print(escape(said), highlight=False, soft_wrap=True)
    for bad in report.bad:
        said = f"line {bad.line} could not be read: {bad.reason}"
        _screen.print(escape(said), style="yellow", highlight=False, soft_wrap=True)
    _screen.print(f"{report.events:,} events in {report.lines:,} lines", highlight=False)
    sys.exit(report.exit_status)


@click.command()
@click.argument("recording", type=_path)
@click.option("--check", "checking", is_flag=True, help="recompute who holds which page, each time")
@click.option("--json", "as_json", is_flag=True, help="the report as JSON on stdout")
def replay(recording: Path, checking: bool, as_json: bool) -> None:
    """Ask a fresh scheduler what RECORDING (of serve --record-scheduler) asked, and compare."""
    columns = (TextColumn("replaying"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    bars = Progress(*columns, TimeElapsedColumn(), console=_screen, transient=True)
    with _answered(as_json), bars:
        _refuse_missing({"RECORDING": recording})
        task = bars.add_task("", total=None)
        done = play(
            recording,
            check=checking,
            progress=lambda read, total: bars.update(task, completed=read, total=total),
        )
    if as_json:
        result = "ok" if done.difference is None else "differs"
        _print_json({"result": result, **attrs.asdict(done)})
    for note in done.notes:
        _screen.print(escape(note), style="yellow", highlight=False, soft_wrap=True)
    verdict = "the same answers" if done.difference is None else escape(str(done.difference))
    _screen.print(f"{done.calls:,} calls: {verdict}", highlight=False, soft_wrap=True)
    sys.exit(0 if done.difference is None else 1)

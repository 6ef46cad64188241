"""`tokenspeed check`: model checking from the command line.

Rule: progress and prose go to stderr, JSON to stdout; 0 means that what was asked holds, 1 that it
does not, 2 that the question could not be put.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from tokenspeed.errors import ConfigError, SpecError
from tokenspeed.fsm.check import Report, Settings, simulate
from tokenspeed.fsm.check import check as check_model
from tokenspeed.fsm.manifest import Recorded, read_manifest, specs_directory, write_manifest

__all__ = ["check"]

_screen = Console(stderr=True)
_path = click.Path(path_type=Path, exists=True, dir_okay=False)


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
    **settings: Any,
) -> None:
    """Model check SPEC; without one, every model of the manifest."""
    how = Settings(**settings)
    if spec is None:
        sys.exit(_check_all(how, as_json=as_json, slow=slow, record=record))
    config = config or spec.with_suffix(".cfg")
    if not config.exists():
        raise ConfigError("--config", str(config), "a configuration that exists; name one")
    with _watch(spec.stem) as progress:
        if walks is None:
            report = check_model(spec, config, how, progress)
        else:
            report = simulate(spec, config, walks=walks, depth=depth, seed=seed, progress=progress)
    if as_json:
        click.echo(json.dumps(report.json(), indent=2))
    _tell(report)
    sys.exit({"ok": 0, "error": 2}.get(report.result, 1))


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
            rows.append({"name": model.name, **report.json(), "differs": differs or None})
            counts = [f"{n:,}" for n in (report.generated, report.distinct, report.depth)]
            verdict = (
                "as recorded" if not differs else "recorded" if record else f"[red]{differs}[/]"
            )
            table.add_row(model.name, report.result, *counts, f"{report.seconds:.2f}", verdict)
    if record:
        write_manifest(directory, kept)
    _screen.print(table)
    _screen.print(f"{len(rows) - bad} of {len(rows)} models as recorded")
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    return 1 if bad and not record else 0


def _recorded(
    directory: Path, model: Recorded, how: Settings, progress: Callable[[dict[str, int]], None]
) -> Report:
    try:
        return check_model(directory / model.spec, directory / model.config, how, progress)
    except SpecError as error:  # the others are checked all the same
        return Report("error", 0, 0, 0, 0.0, {}, violated=str(error))


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
        + (f": {report.violated}" if report.violated else ""), highlight=False,
    )  # fmt: skip
    _screen.print(
        f"{report.generated:,} generated, {report.distinct:,} distinct, depth {report.depth}, "
        f"{report.seconds:.2f} CPU s ({report.engine})",
        highlight=False,
    )
    if report.dead and report.result == "ok":
        _screen.print(f"never happened: {', '.join(report.dead)}", style="yellow")
    for note in report.notes:
        _screen.print(note, style="yellow", highlight=False)
    for number, step in enumerate(report.trace):
        _screen.print(f"{number:>4}  {step.label or 'initially'}", highlight=False)
    if report.loop is not None:
        _screen.print(f"      and back to step {report.loop}, for ever")

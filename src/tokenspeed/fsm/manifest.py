"""The recorded models: which spec, which configuration, what the checker finds there.

Rule: `manifest.json` is the record that `tokenspeed check` is held against; its paths are relative
to the directory it lies in.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import attrs
import cattrs
from attrs import frozen

from tokenspeed.errors import ConfigError
from tokenspeed.fsm.check import Report

__all__ = ["Recorded", "read_manifest", "specs_directory", "write_manifest"]


@frozen
class Recorded:
    """One model and what is expected of it.

    Attributes:
        result: `ok`, or `invariant`, `liveness` or `deadlock` for a model that must fail.
        violated: the property that a model that must fail breaks.
        slow: more than a few seconds; `make test` leaves it to `make test-slow`.
        runtime: the engine has what the model says; if not, the model runs ahead of it.
        graph: `Graph.digest` of what can be seen of it: the compiled model's, the mirror's and the
            runtime's, which tests compare.
    """

    name: str
    spec: str
    config: str
    result: str
    generated: int
    distinct: int
    depth: int
    violated: str | None = None
    slow: bool = False
    runtime: bool = True
    graph: str | None = None

    def differs(self, report: Report) -> str:
        """What a check found otherwise; empty if it found what is recorded."""
        out = []
        for name in ("result", "generated", "distinct", "depth", "violated"):
            want, got = getattr(self, name), getattr(report, name)
            if want != got:
                out.append(f"{name} {got}, recorded {want}")
        return "; ".join(out)

    def found(self, report: Report) -> Recorded:
        """The record with what a check found."""
        return attrs.evolve(
            self, result=report.result, generated=report.generated, distinct=report.distinct,
            depth=report.depth, violated=report.violated,
        )  # fmt: skip


def write_manifest(directory: Path, models: list[Recorded]) -> None:
    """Replace the record; fields at their defaults are left out."""

    def default(attribute: attrs.Attribute[Any], value: object) -> bool:
        return attribute.default == value

    rows = [attrs.asdict(m, filter=lambda a, v: not default(a, v)) for m in models]
    text = json.dumps({"models": rows}, indent=2) + "\n"
    (directory / "manifest.json").write_text(text, encoding="utf-8")


def specs_directory() -> Path:
    """Where the specifications lie: in an installed package, or in a checkout.

    Raises:
        ConfigError: in neither; the installation is damaged.
    """
    package = Path(__file__).resolve().parents[1]
    for root in (package / "specs", package.parents[1] / "specs"):
        if (root / "manifest.json").is_file():
            return root
    raise ConfigError("specs", str(package), "specs/manifest.json in the package or the checkout")


def read_manifest(directory: Path) -> list[Recorded]:
    """The recorded models of a directory.

    Raises:
        ConfigError: the file does not have the form above.
    """
    path = directory / "manifest.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["models"]
        return cattrs.structure(found, list[Recorded])
    except (KeyError, ValueError, cattrs.BaseValidationError) as error:
        raise ConfigError(str(path), error, 'a list of models under "models"') from error

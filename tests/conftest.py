"""What every test runs under: one thread of torch, Hypothesis without a clock, and figures printed.

Rule: a test that fails here fails everywhere, so examples are drawn from a fixed seed; where a
scheduler was in it, the report names the recording that replays it.
"""

from __future__ import annotations

import os
from collections.abc import Generator

import pytest
from hypothesis import HealthCheck, settings

import scheduling

# Read when torch is first imported, which no conftest does. On two cores a second thread slows down
# tensors this small, and it changes the order of float sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Triton's interpreter takes a second for what others do in a millisecond: it gets fewer EXAMPLES.
settings.register_profile(
    "tokenspeed",
    deadline=None,
    derandomize=True,
    max_examples=int(os.environ.get("EXAMPLES", "100")),
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("tokenspeed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured: a figure is for a reader, since no test may depend on a clock."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.line(f"{name}: {value}")


@pytest.fixture(scope="session", autouse=True)
def _recordings(tmp_path_factory: pytest.TempPathFactory) -> None:
    scheduling.recordings = tmp_path_factory.mktemp("recordings")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item,
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    report = yield
    if report.when == "call" and report.failed:
        path = scheduling.recording(item.nodeid)
        if path.exists():
            report.sections.append(("what the scheduler was asked", f"tokenspeed replay {path}"))
    return report

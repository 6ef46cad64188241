"""What every test runs under: one thread of torch, Hypothesis without a clock, and figures printed.

Rule: a test that fails here fails everywhere, so examples are drawn from a fixed seed.
"""

from __future__ import annotations

import os

import pytest
from hypothesis import HealthCheck, settings

# Read when torch is first imported, which no conftest does. On two cores a second thread slows down
# tensors this small, and it changes the order of float sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "tokenspeed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tokenspeed")


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print what tests measured: a figure is for a reader, since no test may depend on a clock."""
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.line(f"{name}: {value}")

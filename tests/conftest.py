"""What every test runs under: one thread of torch, and Hypothesis without a clock.

Rule: a test that fails here fails everywhere, so examples are drawn from a fixed seed.
"""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings

# Read when torch is first imported, which no conftest does. On two cores a second thread slows down
# tensors this small, and it changes the order of float sums.
os.environ.setdefault("OMP_NUM_THREADS", "1")

settings.register_profile(
    "tokenspeed", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("tokenspeed")

"""What every test gets: one thread, reproducible examples, and no GPU tests where there is no GPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, settings

# Tensors here are small and the suite runs in several processes, which would fight over the cores.
torch.set_num_threads(1)

# No deadline: a shared machine may stop for a second at any time. `suite` draws the same examples each time, so a
# failure belongs to the change and not to luck; `make soak` draws new ones.
_patient = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow], "print_blob": True}
settings.register_profile("suite", derandomize=True, **_patient)
settings.register_profile("soak", derandomize=False, max_examples=300, **_patient)
settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

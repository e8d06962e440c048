"""What every test gets: one thread, reproducible examples, and a GPU only where it is a test of one."""

from __future__ import annotations

import os

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


def pytest_addoption(parser: pytest.Parser) -> None:
    """Golden files are written anew on request; the diff is to be read."""
    parser.addoption("--update-golden", action="store_true", help="write tests/kernels/golden anew")


def pytest_configure(config: pytest.Config) -> None:
    """All tests but those marked `gpu` (`make test-gpu`) see the same machine everywhere: one without a GPU."""
    if config.getoption("markexpr") != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked `gpu` where torch sees none."""
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a GPU"))

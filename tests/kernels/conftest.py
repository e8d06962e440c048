"""Golden files of kernels: what is generated, compared with what was."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from .harness import agrees_with_golden


@pytest.fixture
def golden(pytestconfig: pytest.Config) -> Callable[[str, str], None]:
    """`golden(name, text)`: the text is that of `golden/NAME.py`."""
    return lambda name, text: agrees_with_golden(name, text, pytestconfig.getoption("--update-golden"))

"""`pytest benchmarks/ --budget_s 540`: how long the iterations of one model may take."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--budget_s", type=float, default=540, help="seconds for the iterations of one model")

"""The runs that the laws of placement compare, made once per session of tests."""

import os

import pytest
from launched_runs import Runs, made_once


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """All launched runs; with pytest-xdist one worker makes them for all."""
    base = tmp_path_factory.getbasetemp()
    together = "PYTEST_XDIST_WORKER" in os.environ
    return made_once((base.parent if together else base) / "launched_runs")

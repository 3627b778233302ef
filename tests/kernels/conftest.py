"""Kernels are tested on several threads."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture(autouse=True)
def several_threads() -> Iterator[None]:
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)

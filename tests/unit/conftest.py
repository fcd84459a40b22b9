"""What several unit tests share."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def thread_counts() -> Iterator[None]:
    """Puts the number of threads back after a test that changes it."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def no_gradients() -> Iterator[None]:
    """The mode in which a server computes."""
    with torch.inference_mode():
        yield

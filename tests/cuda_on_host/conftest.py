"""What the tests of CUDA sources share."""

from collections.abc import Iterator

import pytest
import torch

from tests.cuda_host import KERNELS, KINDS, build


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """The reference runs on small tensors beside a program with work of its own: more threads would only wait."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", autouse=True)
def _built(request: pytest.FixtureRequest) -> None:
    """All kinds of a test module's `SOURCE`, a file of kernels/cuda or a path: its tests find them."""
    if source := getattr(request.module, "SOURCE", None):
        build(*((KERNELS / source, kind) for kind in KINDS))

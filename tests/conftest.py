"""Marks tests by the folder they are in; skips what the machine lacks, with the reason."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

FOLDERS = ("unit", "dist", "e2e", "slurm", "browser", "cuda_on_host")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """tests/<folder>/ carries the mark of that name."""
    here = Path(__file__).parent
    for item in items:
        folder = item.path.relative_to(here).parts[0]
        if folder in FOLDERS:
            item.add_marker(getattr(pytest.mark, folder))


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real data that ONEMESH_DATA names."""
    folder = os.environ.get("ONEMESH_DATA")
    if not folder:
        pytest.skip("ONEMESH_DATA is not set: it names the folder of real data")
    return Path(folder)

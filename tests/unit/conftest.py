"""What several unit tests share."""

from collections.abc import Iterator
from pathlib import Path

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


@pytest.fixture
def a_folder_with_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Works in one, with files of rows and an adapter."""
    monkeypatch.chdir(tmp_path)
    for name in ("rows.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("{}\n")
    (tmp_path / "adapter").mkdir()

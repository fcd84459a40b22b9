"""CUDA kernels with a line changed, which their tests must notice."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests import cuda_host


def plant(monkeypatch: pytest.MonkeyPatch, folder: Path, changed: str, old: str, new: str) -> None:
    """From now on kernels are built from a copy in `folder`; in file `changed` what stands once as `old` is `new`."""
    for path in cuda_host.KERNELS.iterdir():
        if path.suffix in (".cu", ".cuh", ".h"):
            shutil.copy(path, folder / path.name)
    text = (folder / changed).read_text()
    assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {changed}"
    (folder / changed).write_text(text.replace(old, new))
    monkeypatch.setattr(cuda_host, "KERNELS", folder)

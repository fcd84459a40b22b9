"""The CUDA backend as a whole on the host executor: the ops and sources of the library, compiled by g++."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from tests.cuda_backend import CHECKS
from tests.cuda_host import CACHE, HOST, KERNELS, ROOT, compile_with, digest, headers, once

TORCH = Path(torch.__file__).parent
FLAGS = [
    *("-std=c++17", "-O2", "-fPIC", "-DONEMESH_CUDA_ON_HOST", "-fno-strict-aliasing", "-Wno-unknown-pragmas"),
    *(f"-I{HOST}", f"-I{KERNELS}", f"-isystem{TORCH / 'include'}", "-DTORCH_TARGET_VERSION=0x020d000000000000"),
]


def compiled(source: Path) -> Path:
    """The object file of a source of the library or of the executor."""
    included = [*headers(), *KERNELS.glob("*.hpp")]
    name = f"{source.stem}-{digest([source, *included, *FLAGS, torch.__version__])}.o"
    command = ["g++", *FLAGS, "-x", "c++", "-c", str(source), "-o"]
    return once(CACHE / name, lambda to: compile_with([*command, str(to)]))


@pytest.fixture(scope="module")
def library() -> Path:
    """Its ops take tensors on the CPU."""
    sources = [HOST / "executor.cpp", *sorted(KERNELS.glob("*.cpp")), *sorted(KERNELS.glob("*.cu"))]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compiled, sources))
    links = [f"-L{TORCH / 'lib'}", "-ltorch_cpu", "-lc10", "-Wl,-z,defs"]
    command = ["g++", "-shared", *map(str, objects), *links, "-o"]
    return once(CACHE / f"host-{digest(o.name for o in objects)}.so", lambda to: compile_with([*command, str(to)]))


@pytest.mark.parametrize("check", CHECKS)
def test_the_backend_as_a_whole(check, library):
    """Python, the registered ops, launchers and kernels; each check says in `tests.cuda_backend` what it holds."""
    command = [sys.executable, "-m", "tests.cuda_backend", str(library), check]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr

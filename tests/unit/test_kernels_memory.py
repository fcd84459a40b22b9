"""Keeping freed memory: what it saves, in page faults."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FAULTS = """
import resource, sys, torch
from kernels.memory import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def step():
    a = torch.ones(1 << 20)  # 4 MB
    return [a + i for i in range(3)]
for _ in range(15):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(what: str) -> int:
    """glibc starts with this threshold; where it moves it to depends on what else was freed, so here it stays."""
    command, environment = (
        [sys.executable, "-c", FAULTS, what],
        {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(128 << 10)},
    )
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library than glibc")
def test_the_pages_of_a_step_are_not_faulted_in_again():
    assert faults("keep") < 3000  # 0, or 1024 for each time that the heap still grows by a block
    assert faults("plain") > 5000  # else the test measures nothing

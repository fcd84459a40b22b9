"""Keeping freed memory: what it saves, in page faults. Areas: tensors that share memory, and huge pages."""

import mmap
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kernels.memory import Area
from serve.paged import KvCache
from tests.backends import backend
from tests.models import BIASED, RandomWeights
from tests.unit.test_decoder import our_model

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


def flags(address: int) -> list[str]:
    """Of the mapping that holds this address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if "-" in first and not first.endswith(":"):
            low, high = (int(x, 16) for x in first.split("-"))
            inside = low <= address < high
        elif inside and first == "VmFlags:":
            return line.split()[1:]
    raise AssertionError(f"{address:x} isn't mapped")


def test_tensors_of_an_area_stand_side_by_side_at_cache_lines():
    area = Area(block_bytes=1000)
    first, second = area.take(1), area.take(900)
    assert (first.dtype, len(first), len(second)) == (torch.uint8, 1, 900)
    assert second.data_ptr() - first.data_ptr() == 64
    third, large = area.take(300), area.take(5000)
    memories = {x.untyped_storage().data_ptr() for x in (first, second, third, large)}
    assert len(memories) == 3  # the third doesn't fit, the large one is alone
    assert area.take(10).untyped_storage().data_ptr() == third.untyped_storage().data_ptr()
    for x in (first, third, large):
        assert x.data_ptr() % (2 << 20) == 0
    assert len(area.take(0)) == 0


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="no /proc/self/smaps")
def test_an_area_asks_for_huge_pages():
    if not Path("/sys/kernel/mm/transparent_hugepage").exists():
        pytest.skip("a kernel without transparent huge pages")
    x = Area().take(10)
    assert "hg" in flags(x.data_ptr())
    # a new mapping: torch.empty may return memory that packed weights of an earlier test asked huge pages for
    with mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE) as plain:
        address = torch.frombuffer(plain, dtype=torch.uint8).data_ptr()
        assert "hg" not in flags(address + 4096)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_an_area_have_their_shapes_and_nothing_in_common(dtype):
    area = Area(block_bytes=1 << 16)
    shapes = [(3, 5, 2, 7), (1, 1, 1, 1), (0, 4, 2, 2), (40, 16, 3, 64)]
    tensors = [area.empty(shape, dtype).fill_(i) for i, shape in enumerate(shapes)]
    for i, (x, shape) in enumerate(zip(tensors, shapes, strict=True)):
        assert (tuple(x.shape), x.dtype) == (shape, dtype)
        assert x.is_contiguous()
        assert x.numel() == 0 or x.data_ptr() % 64 == 0
        assert (x == i).all()


@pytest.mark.skipif(not Path("/sys/kernel/mm/transparent_hugepage").exists(), reason="no transparent huge pages")
def test_a_cache_is_on_huge_pages_and_its_layers_apart():
    decoder = our_model(RandomWeights(BIASED), torch.float32)
    cache = KvCache.allocate(decoder, num_pages=9, page_size=8)
    layers = cache.keys + cache.values
    assert len(layers) == 2 * BIASED.num_layers
    for i, pages in enumerate(layers):
        assert pages.shape == (9, 8, BIASED.num_kv_heads, BIASED.head_dim)
        assert "hg" in flags(pages.data_ptr())
        pages.fill_(i)
    assert all((pages == i).all() for i, pages in enumerate(layers))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_in_an_area_is_the_same_weight(dtype):
    ops, area = backend("compiled", dtype), Area(block_bytes=1 << 16)
    x = torch.randn(5, 41, generator=torch.Generator().manual_seed(0)).to(dtype)
    for n in (50, 1, 500):
        w = torch.randn(n, 41, generator=torch.Generator().manual_seed(n)).to(dtype)
        one, other = (ops.pack((n, 41), dtype, lambda a, b, w=w: w[a:b], *place) for place in ((area,), ()))
        assert torch.equal(one.data.view(torch.uint8), other.data.view(torch.uint8))
        assert torch.equal(ops.linear(x, one), ops.linear(x, other))

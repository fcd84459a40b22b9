"""nvcc compiles every kernel for every target, within the claimed limits and to the claimed instructions."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from kernels import cuda_layout, cuda_roofline
from tests.cuda_cubins import ARCHITECTURES, CLAIMS, Cubin, claim_for, cubins, every_cubin, release, table, warps_per_sm
from tests.cuda_host import KERNELS, ROOT

SOURCES = sorted(KERNELS.glob("*.cu"))


def problems(cubin: Cubin) -> list[str]:
    """Where a compiled kernel differs from what is claimed."""
    claim = claim_for(cubin.kernel)
    found = []
    if cubin.spilled_bytes or cubin.count("LDL|STL"):
        found.append(f"{cubin.spilled_bytes} bytes spilled, {cubin.count('LDL|STL')} accesses to local memory")
    if cubin.registers > claim.registers:
        found.append(f"{cubin.registers} registers of {claim.registers}")
    if (warps := warps_per_sm(cubin)) < claim.warps:
        found.append(f"{warps} warps per SM, not {claim.warps}")
    return found + [f"no {opcode}" for opcode in claim.has if not cubin.count(opcode)]


@pytest.fixture(scope="module")
def compiled() -> list[Cubin]:
    return every_cubin()


def test_every_kernel_is_as_claimed(compiled):
    assert {c.architecture for c in compiled} == set(ARCHITECTURES)
    assert {f"{c.kernel} on {c.architecture}": problems(c) for c in compiled if problems(c)} == {}
    names = {c.kernel for c in compiled}
    assert [claim.kernel for claim in CLAIMS if not any(re.fullmatch(claim.kernel, n) for n in names)] == []


def test_every_target_has_every_kernel(compiled):
    by_target = [{c.kernel for c in compiled if c.architecture == a} for a in ARCHITECTURES]
    assert all(names == by_target[0] for names in by_target)


def test_a_broken_claim_is_noticed(compiled):
    cubin = next(c for c in compiled if c.kernel == "whole_mma<__half, 64>")
    worse = dataclasses.replace(cubin, registers=255, spilled_bytes=8, instructions={"LDL": 1, "HMMA.16816.F32": 3})
    text = "; ".join(problems(worse))
    for part in ("8 bytes spilled", "255 registers", "warps per SM", "no LDGSTS", "no LDSM"):
        assert part in text


def test_the_table_in_the_docs_is_that_of_these_sources(compiled):
    """Up to the numbers of another nvcc's choices."""
    written = (ROOT / "docs" / "benchmarks" / "cuda_resources.md").read_text()
    if f"\n{release()}, not run" not in written:
        pytest.skip(f"the table was written with another nvcc than {release()}")
    assert written == table()


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_no_source_knows_torch(source: Path):
    """Each is compiled alone (`cubins`); none includes a header of torch or leaves a PTX line outside of ptx.cuh."""
    assert cubins(source)
    for path in (source, *KERNELS.glob("*.cuh"), KERNELS / "kernels.h"):
        text = path.read_text()
        assert not re.search(r"#include.*(torch|ATen|c10)", text), path
        assert path.name == "ptx.cuh" or "asm" not in text, path
        assert path.name == "launch.cuh" or not re.search(r"<<<|__shared__", text), path


def test_the_model_and_the_lists_have_the_numbers_of_the_sources():
    """What `cuda_layout` and `cuda_roofline` repeat of the constants of kernels/cuda."""
    text = "".join(path.read_text() for path in (*SOURCES, *KERNELS.glob("*.cuh"), KERNELS / "kernels.h"))
    for line in (
        f"constexpr int FEW_ROWS = {cuda_roofline.FEW[0]}, FEW_COLUMNS = {cuda_roofline.FEW[1]}, "
        f"FEW_LIMIT = {cuda_roofline.FEW_LIMIT};",
        f"constexpr int MANY = sizeof(T) == 2 ? {cuda_roofline.MANY[0]} : 64;",
        f"DEPTH = {2 * cuda_roofline.DEPTH} / sizeof(T);",
        f"constexpr int THREADS = {cuda_roofline.THREADS}, LANES = {cuda_roofline.MERGE_LANES};",
        f"constexpr int SIDE = (sizeof(T) == 2 ? {cuda_layout.GRADIENT_ROWS} : 32) / "
        f"(D > {cuda_roofline.WIDE_HEAD} ? 2 : 1);",
        f"constexpr int STREAMED = SIDE<T, D> < {cuda_roofline.STREAMED} ? ",
        f"constexpr int LISTED = {cuda_layout.GRADIENT_ROWS}, ",
        f"constexpr int ROWS = {cuda_layout.ITEM_ROWS}, COLUMNS = {cuda_roofline.FEW[1]};",
        f"constexpr int MOST_ADAPTERS = {cuda_layout.MOST_ADAPTERS};",
    ):
        assert line in text, line


def test_the_roofline_page_is_that_of_the_model():
    assert (ROOT / "docs" / "benchmarks" / "cuda_roofline.md").read_text() == cuda_roofline.page()

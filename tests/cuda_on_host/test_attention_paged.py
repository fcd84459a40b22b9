"""Paged attention on the host executor: against the reference, whatever the shapes, and row-invariant bit for bit."""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cuda_layout import SPLIT_PAIRS, CudaLayout, heads_of
from kernels.reference import check_kv_index, merge_attention, working_dtype
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, mutant, seeded

SOURCE = "attention_paged.cu"
CPU = torch.device("cpu")
INVALID = 1 << 40
"""An entry of a block table that nobody may use."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """Chunks over random pages: `chunks` are (queries, keys, prefix entries)."""

    chunks: tuple[tuple[int, int, int], ...]
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 64
    page_size: int = 16
    kv_index: tuple[int, ...] | None = None
    window: int | None = None
    softcap: float = 0.0
    alibi: bool = False
    dtype: torch.dtype = torch.bfloat16
    split_pairs: int = SPLIT_PAIRS

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def index(self) -> tuple[int, ...]:
        return check_kv_index(self.heads, self.kv_heads, self.kv_index)

    def draw(self, seed: int, *shape: int) -> Tensor:
        return draw(seed, *shape).to(self.dtype)

    @property
    def slopes(self) -> Tensor | None:
        return 2.0 ** -torch.arange(1, self.heads + 1) if self.alibi else None


@dataclass(frozen=True)
class Inputs:
    """Queries, caches with NaN in every slot that isn't used, and the layout with invalid unused entries."""

    q_TNH: Tensor
    keys: Tensor
    values: Tensor
    layout: CudaLayout


@functools.lru_cache(maxsize=2)
def inputs(case: Case) -> Inputs:
    """Key i of chunk b is a function of (b, i) alone, a query of (b, position): chunks may be cut anywhere."""
    size, shape = case.page_size, (case.kv_heads, case.head_dim)
    needs = [(-(-keys // size), -(-prefix // size)) for _, keys, prefix in case.chunks]
    count = sum(a + b for a, b in needs) + 2
    pages = torch.randperm(count, generator=torch.Generator().manual_seed(len(case.chunks))).tolist()
    keys_cache = torch.full((count * size, *shape), torch.nan, dtype=case.dtype)
    values_cache = keys_cache.clone()
    tables, prefix_tables, queries = [], [], []
    for b, ((num_queries, num_keys, prefix), (used, prefix_used)) in enumerate(zip(case.chunks, needs, strict=True)):
        tables.append([pages.pop() for _ in range(used)])
        prefix_tables.append([pages.pop() for _ in range(prefix_used)])
        for table, length, seed in ((tables[-1], num_keys, 100 + b), (prefix_tables[-1], prefix, 200 + b)):
            i = torch.arange(length)
            slots = torch.tensor(table, dtype=torch.int64)[i // size] * size + i % size
            keys_cache[slots] = case.draw(seed, 400, *shape)[:length] * 2
            values_cache[slots] = case.draw(seed + 1000, 400, *shape)[:length]
        all_queries = case.draw(300 + b, 400, case.heads, case.head_dim) * 2
        queries.append(all_queries[num_keys - num_queries : num_keys])
    width, prefix_width = (max(map(len, t)) + 1 for t in (tables, prefix_tables))
    layout = CudaLayout.build(
        [c[0] for c in case.chunks],
        [c[1] for c in case.chunks],
        torch.tensor([t + [INVALID] * (width - len(t)) for t in tables]),
        page_size=size,
        prefix_lengths=[c[2] for c in case.chunks],
        prefix_tables=torch.tensor([t + [INVALID] * (prefix_width - len(t)) for t in prefix_tables]),
    )
    paged = (count, size, *shape)
    return Inputs(torch.cat(queries), keys_cache.view(paged), values_cache.view(paged), layout)


def attend(case: Case, *, kind: str = "plain", orders: Sequence[tuple[int, int]] = (FORWARD,)) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernel, the same bits in every order."""
    x = inputs(case)
    heads = heads_of(case.index, case.kv_heads, CPU)
    work = x.layout.work(case.window or 0, heads.group, case.split_pairs)
    values = {
        "out": torch.full_like(x.q_TNH, torch.nan),
        "lse": torch.full(x.q_TNH.shape[:2], torch.nan),
        "q": x.q_TNH,
        "key_cache": x.keys,
        "value_cache": x.values,
        "chunks": x.layout.chunks,
        "block_table": x.layout.block_table_BM,
        "prefix_table": x.layout.prefix_table_BM,
        "head_starts": heads.starts,
        "heads": heads.order,
        "slopes": case.slopes,
        "whole": work.whole,
        "split": work.split,
        "merges": work.merges,
        "partials": torch.full((work.partial_rows * case.heads * (case.head_dim + 2),), torch.nan),
        "partial_rows": work.partial_rows,
        "num_whole": len(work.whole),
        "num_split": len(work.split),
        "num_merges": len(work.merges),
        "max_split_queries": work.max_split_queries,
        "table_width": x.layout.block_table_BM.shape[1],
        "prefix_width": x.layout.prefix_table_BM.shape[1],
        "num_heads": case.heads,
        "num_kv_heads": case.kv_heads,
        "head_dim": case.head_dim,
        "page_size": case.page_size,
        "window": case.window or 0,
        "scale": case.scale,
        "softcap": case.softcap,
        "dtype": DTYPES[case.dtype],
    }
    first, *others = call(SOURCE, "attention_paged", values, kind=kind, orders=orders)
    for other in others:
        assert other["out"].equal(first["out"]) and other["lse"].equal(first["lse"])
    return first["out"], first["lse"]


def spec(case: Case, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`; with a cap or slopes the same with these two steps added."""
    x = inputs(case)
    q, keys, values = x.q_TNH.to(dtype), x.keys.to(dtype), x.values.to(dtype)
    if not case.softcap and not case.alibi:
        return reference.attention_paged(
            q, keys, values, x.layout, kv_index=case.index, window=case.window, scale=case.scale
        )
    work = working_dtype(dtype)
    outs, lses = [], []
    for b, (num_queries, num_keys, _) in enumerate(case.chunks):
        rows = slice(x.layout.query_starts[b], x.layout.query_starts[b + 1])
        i, j = torch.arange(num_keys - num_queries, num_keys)[:, None], torch.arange(num_keys)[None]
        parts = []
        for is_prefix in (True, False):
            slots = x.layout.slots(b, prefix=is_prefix)
            k, v = (t.flatten(0, 1)[slots][:, list(case.index)].to(work) for t in (keys, values))
            scores = torch.einsum("tnh,snh->nts", q[rows].to(work), k) * case.scale
            if case.softcap:
                scores = case.softcap * torch.tanh(scores / case.softcap)
            if not is_prefix:
                if case.slopes is not None:
                    scores = scores + case.slopes.to(work)[:, None, None] * (j - i)
                hidden = (j > i) | (i - j >= case.window if case.window else False)
                scores = scores.masked_fill(hidden, -torch.inf)
            lse = scores.logsumexp(-1)
            out = torch.einsum("nts,snh->tnh", torch.exp(scores - lse[..., None]).nan_to_num(0), v)
            parts.append((out.to(dtype), lse.T))
        out, lse = merge_attention(parts)
        outs.append(out)
        lses.append(lse)
    return torch.cat(outs), torch.cat(lses)


def check(case: Case, *, kind: str = "plain", orders: Sequence[tuple[int, int]] = (FORWARD,)) -> None:
    (out, lse), plain, exact = attend(case, kind=kind, orders=orders), spec(case, case.dtype), spec(case, torch.float64)
    assert_as_plain(out, plain[0], exact[0])
    # Scores are float32 sums of float32 or 16-bit products, a key at a time.
    assert (lse.double() - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max() + 1e-5


RAGGED = ((1, 1, 0), (1, 47, 0), (3, 200, 0), (40, 130, 0), (70, 70, 0), (1, 129, 20), (20, 65, 3), (1, 33, 130))
SMALL = ((1, 70, 0), (18, 40, 5))

CASES = {
    "ragged": Case(chunks=RAGGED),
    "head 128": Case(chunks=RAGGED, head_dim=128, heads=3, kv_heads=1),
    "float16": Case(chunks=RAGGED, dtype=torch.float16),
    "uneven heads": Case(chunks=RAGGED, heads=5, kv_heads=3, kv_index=(2, 0, 0, 2, 2)),
    "one head each": Case(chunks=SMALL, heads=3, kv_heads=3, page_size=1),
    "many heads on one": Case(chunks=SMALL, heads=24, kv_heads=1, page_size=7),
    "window": Case(chunks=(*RAGGED, (2, 390, 0)), window=50, page_size=8),
    "window of one": Case(chunks=SMALL, window=1),
    "soft cap": Case(chunks=SMALL, softcap=3.0),
    "alibi": Case(chunks=RAGGED, alibi=True, page_size=33),
    "all of them": Case(chunks=RAGGED, alibi=True, softcap=5.0, window=100, heads=6, kv_heads=2),
    "float32": Case(chunks=RAGGED, dtype=torch.float32),
    "float32, all of them": Case(
        chunks=RAGGED,
        dtype=torch.float32,
        head_dim=40,
        alibi=True,
        softcap=5.0,
        window=100,
        heads=3,
        kv_heads=2,
        kv_index=(1, 1, 0),
    ),
    "head 80": Case(chunks=RAGGED, head_dim=80),
    "head 256": Case(chunks=SMALL, head_dim=256),
    "odd head": Case(chunks=SMALL, head_dim=5, page_size=3, dtype=torch.float16),
}


@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name):
    check(CASES[name], orders=ORDERS[:3])


@pytest.mark.parametrize("name", ["ragged", "head 128", "window", "uneven heads", "alibi", "float32", "head 80"])
def test_a_chunk_split_or_whole_has_the_same_bits(name):
    for chunks in (RAGGED, SMALL):
        case = replace(CASES[name], chunks=chunks)
        split, whole = attend(case), attend(replace(case, split_pairs=0))
        assert split[0].equal(whole[0]) and split[1].equal(whole[1])


@pytest.mark.parametrize("name", ["ragged", "head 128", "window", "float32", "odd head", "all of them"])
def test_a_row_doesnt_depend_on_its_company(name):
    """One request's last queries: alone one by one, in chunks, all at once, with others, in other pages."""
    case = CASES[name]
    keys, prefix = 150, 40
    at_once = attend(replace(case, chunks=((keys, keys, prefix),)))
    for first, page_size in ((keys - 1, 16), (keys - 7, 5), (64, 64), (1, 16)):
        chunks = ((keys - first, keys, prefix), *RAGGED[:3])
        out, lse = attend(replace(case, chunks=chunks, page_size=page_size))
        assert out[: keys - first].equal(at_once[0][first:]) and lse[: keys - first].equal(at_once[1][first:])


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    orders = (FORWARD, seeded(5))
    for name in ("ragged", "head 128", "window", "uneven heads", "float32", "odd head"):
        check(replace(CASES[name], chunks=((1, 150, 0), (18, 40, 5), (2, 64, 0))), kind=kind, orders=orders)


def test_shapes_that_no_kernel_takes():
    with pytest.raises(AssertionError, match=r"\[1\]"):
        attend(Case(chunks=SMALL, head_dim=257))


MMA, SHARED = "attention_mma.cuh", "attention.cuh"
MUTANTS = {
    "a buffer is filled while others read": (MMA, "    __syncthreads();  // before this buffer is filled again\n", ""),
    "a tile is used before it is there": (
        MMA,
        "    ptx::cp_async_wait<1>();\n    __syncthreads();",
        "    ptx::cp_async_wait<2>();\n    __syncthreads();",
    ),
    "a position too many": (SHARED, "if (key >= length) return -1;", "if (key > length) return -1;"),
    "parts that start where a chunk does": (
        MMA,
        "if (t % PART_TILES != PART_TILES - 1 &&",
        "if (t % PART_TILES != 0 &&",
    ),
}
"""Line -> what stands there instead: parity, sanitizers or row-invariance must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "SOURCE", mutant(tmp_path, "attention_paged.cu", *MUTANTS[name]))
    case = replace(CASES["ragged"], chunks=((2, 200, 0), (60, 150, 0), (30, 47, 3)))

    def verify() -> None:
        check(case, orders=ORDERS[:3])
        assert attend(case)[0].equal(attend(replace(case, split_pairs=0))[0])

    with pytest.raises(AssertionError):
        verify()

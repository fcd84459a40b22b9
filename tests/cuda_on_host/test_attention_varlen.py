"""Causal attention inside packed documents on the host executor: the kernels of paged attention without pages."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.cuda_layout import heads_of, packed_work
from kernels.documents import Documents
from kernels.reference import check_kv_index
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, seeded

SOURCE = "attention_paged.cu"
CPU = torch.device("cpu")
BOUNDS = (0, 1, 66, 66, 200, 230)
"""Documents of 1, 65, 0, 134 and 30 rows."""


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    documents: Documents | tuple[int, ...],
    *,
    kv_index: tuple[int, ...] | None = None,
    window: int | None = None,
    kind: str = "plain",
    orders: tuple[tuple[int, int], ...] = (FORWARD,),
) -> tuple[Tensor, Tensor]:
    """(out, lse) of the kernel with scale 0.2, the same bits in every order."""
    num_kv_heads = k.shape[1]
    heads = heads_of(check_kv_index(q.shape[1], num_kv_heads, kv_index), num_kv_heads, CPU)
    work = packed_work(Documents.of(documents, len(q), len(k)), window or 0, heads.group, CPU)
    values = {
        "out": torch.full_like(q, torch.nan),
        "lse": torch.full(q.shape[:2], torch.nan),
        "q": q,
        "key_cache": k,
        "value_cache": v,
        "chunks": work.chunks,
        "head_starts": heads.starts,
        "heads": heads.order,
        "whole": work.whole,
        "num_whole": len(work.whole),
        "num_heads": q.shape[1],
        "num_kv_heads": num_kv_heads,
        "head_dim": q.shape[2],
        "page_size": 1,
        "window": window or 0,
        "scale": 0.2,
        "dtype": DTYPES[q.dtype],
    }
    first, *others = call(SOURCE, "attention_paged", values, kind=kind, orders=orders)
    assert all(r["out"].equal(first["out"]) and r["lse"].equal(first["lse"]) for r in others)
    return first["out"], first["lse"]


RING = Documents(
    query_bounds=(0, 1, 66, 66, 130, 140, 145),
    key_bounds=(0, 70, 70, 75, 205, 215, 224),
    offsets=(80, 0, 3, -20, 5, 300),
)
"""One that sees all keys, one without keys, one without queries, one whose first 20 see none, one that sees some more
than its own, one that with a window sees none."""

CASES = {
    "heads of 64": {"heads": 4, "kv_heads": 2, "head_dim": 64},
    "heads of 128": {"heads": 3, "kv_heads": 1, "head_dim": 128},
    "heads of 24": {"heads": 2, "kv_heads": 2, "head_dim": 24},
    "uneven": {"heads": 5, "kv_heads": 2, "head_dim": 64, "kv_index": (1, 0, 0, 1, 1)},
    "window": {"heads": 4, "kv_heads": 2, "head_dim": 64, "window": 40},
}


def check(name: str, dtype: torch.dtype, kind: str, orders: tuple[tuple[int, int], ...]) -> None:
    case = dict(CASES[name])
    heads, kv_heads, head_dim = (case.pop(n) for n in ("heads", "kv_heads", "head_dim"))
    q = draw(1, BOUNDS[-1], heads, head_dim).to(dtype)
    k, v = draw(2, 2, BOUNDS[-1], kv_heads, head_dim).to(dtype)
    out, lse = attend(q, k, v, BOUNDS, kind=kind, orders=orders, **case)
    plain, _ = reference.attention_varlen(q, k, v, BOUNDS, scale=0.2, **case)
    exact = reference.attention_varlen(q.double(), k.double(), v.double(), BOUNDS, scale=0.2, **case)
    assert_as_plain(out, plain, exact[0])
    assert (lse.double() - exact[1]).abs().max() <= 1e-5 * exact[1].abs().max() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", CASES)
def test_as_the_reference(name, dtype):
    check(name, dtype, "plain", ORDERS[:3])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "window"), [(64, None), (64, 40), (24, 40), (128, None)])
def test_queries_and_keys_that_differ_in_number(head_dim, window, dtype):
    q, k, v = draw(1, 145, 4, head_dim).to(dtype), *draw(2, 2, 224, 2, head_dim).to(dtype)
    out, lse = attend(q, k, v, RING, window=window, orders=ORDERS[:3])
    plain, _ = reference.attention_varlen(q, k, v, RING, scale=0.2, window=window)
    exact = reference.attention_varlen(q.double(), k.double(), v.double(), RING, scale=0.2, window=window)
    assert_as_plain(out, plain, exact[0])
    empty = exact[1].isneginf()
    assert lse.isneginf().equal(empty) and bool(empty.any()) and not out[empty].any()
    assert (lse.double() - exact[1])[~empty].abs().max() <= 1e-5 * exact[1][~empty].abs().max() + 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_offset_beyond_all_keys_is_like_any_other(dtype):
    q, k, v = draw(1, 40, 2, 64).to(dtype), *draw(2, 2, 90, 1, 64).to(dtype)
    ours = attend(q, k, v, Documents(query_bounds=(0, 40), key_bounds=(0, 90), offsets=(90,)))
    more = attend(q, k, v, Documents(query_bounds=(0, 40), key_bounds=(0, 90), offsets=(1 << 29,)))
    assert all(a.equal(b) for a, b in zip(ours, more, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_document_doesnt_depend_on_its_neighbours(dtype):
    q, k, v = draw(3, 3, 230, 2, 64).to(dtype)
    together = attend(q, k, v, BOUNDS)
    for start, stop in ((1, 66), (66, 200)):
        alone = attend(q[start:stop], k[start:stop], v[start:stop], (0, stop - start))
        assert all(a.equal(t[start:stop]) for a, t in zip(alone, together, strict=True))


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    check("window", torch.bfloat16, kind, (FORWARD, seeded(3)))
    check("heads of 24", torch.float32, kind, (FORWARD,))
    for dtype in (torch.bfloat16, torch.float32):
        q, k, v = draw(1, 145, 2, 64).to(dtype), *draw(2, 2, 224, 1, 64).to(dtype)
        attend(q, k, v, RING, window=40, kind=kind, orders=(FORWARD, seeded(3)))

"""Rows of an embedding and their gradient, on the host executor, against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, plant, seeded

SOURCE = "embedding.cu"
NUM_IDS = 20
Orders = Sequence[tuple[int, int]]


def ids_of(rows: int) -> Tensor:
    """Some stand often; the last of the table don't occur."""
    ids = torch.randint(0, NUM_IDS - 3, (rows,), generator=torch.Generator().manual_seed(rows))
    ids[::2] = 5
    return ids


def gathered(weight: Tensor, ids: Tensor, kind: str = "plain", orders: Orders = (FORWARD,), shift: int = 0) -> Tensor:
    values = {"out": torch.full((len(ids), weight.shape[1]), 7.0, dtype=weight.dtype), "weight": weight, "ids": ids}
    values |= {"rows": len(ids), "width": weight.shape[1], "num_ids": len(weight), "dtype": DTYPES[weight.dtype]}
    first, *others = call(SOURCE, "embedding", values, kind=kind, orders=orders, shift={"weight": shift})
    assert all(other["out"].equal(first["out"]) for other in others)
    return first["out"]


def gradient(grad: Tensor, ids: Tensor, kind: str = "plain", orders: Orders = (FORWARD,), shift: int = 0) -> Tensor:
    """Rows of ids that don't occur keep the NaN that stood there."""
    width = grad.shape[1]
    rising, places = ids.sort(stable=True)
    values = {"out": torch.full((NUM_IDS, width), torch.nan, dtype=grad.dtype), "grad": grad, "ids": rising}
    values |= {"places": places, "rows": len(ids), "width": width, "num_ids": NUM_IDS, "dtype": DTYPES[grad.dtype]}
    first, *others = call(SOURCE, "embedding_grad", values, kind=kind, orders=orders, shift={"grad": shift})
    for other in others:
        assert other["out"].nan_to_num(9e4).equal(first["out"].nan_to_num(9e4))
    return first["out"]


def check(rows: int, width: int, dtype: torch.dtype, *, kind: str = "plain", orders: Orders = (FORWARD,)) -> None:
    weight, ids, grad = draw(1, NUM_IDS, width).to(dtype), ids_of(rows), draw(2, rows, width).to(dtype)
    assert gathered(weight, ids, kind, orders).equal(weight[ids])
    got = gradient(grad, ids, kind, orders)
    used = torch.zeros(NUM_IDS, dtype=torch.bool).index_fill(0, ids, True)
    assert got[~used].isnan().all()

    def spec(dtype: torch.dtype) -> Tensor:
        leaf = weight.to(dtype).requires_grad_()
        (found,) = torch.autograd.grad(reference.embedding(ids, leaf), leaf, grad.to(dtype))
        return found[used]

    assert_as_plain(got[used], spec(torch.float32).to(dtype), spec(torch.float64))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (9, 7), (40, 64), (30, 1100), (5, 2048)])
def test_as_the_reference(rows, width, dtype):
    check(rows, width, dtype, orders=ORDERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_is_the_sum_of_its_tokens_in_order(dtype):
    """Bit for bit: in float32 one by one, rounded once; whatever the other ids, wherever the gradient lies."""
    grad, ids = draw(3, 60, 48).to(dtype), ids_of(60)
    got = gradient(grad, ids)
    for id in ids.unique():
        total = torch.zeros(48)
        for row in grad[ids == id].float():
            total = total + row
        assert got[id].equal(total.to(dtype))
        assert gradient(grad[ids == id], ids[ids == id], shift=dtype.itemsize)[id].equal(got[id])


def test_ids_that_the_table_doesnt_have():
    """NaN in their rows, and nothing added anywhere; none of it reads outside."""
    ids = torch.tensor([4, -1, NUM_IDS, 1 << 40, -(1 << 40), 4])
    weight, grad = draw(1, NUM_IDS, 24), draw(2, 6, 24)
    for kind in ("plain", "asan"):
        out = gathered(weight, ids, kind)
        assert out[[0, 5]].equal(weight[[4, 4]]) and out[1:5].isnan().all()
        got = gradient(grad, ids, kind)
        assert got[4].equal(grad[0] + grad[5]) and got[torch.arange(NUM_IDS) != 4].isnan().all()


def test_no_rows_and_no_columns():
    for rows, width in ((0, 8), (3, 0)):
        assert gathered(draw(1, NUM_IDS, width), ids_of(rows)).shape == (rows, width)
        gradient(draw(1, rows, width), ids_of(rows))


MUTANTS = {
    "every place of an id has its row": ("embedding.cu", " || (first && a.ids[first - 1] == id)", ""),
    "rows in another order": ("embedding.cu", "a.places[i] * a.width", "i * a.width"),
    "only the first block of columns": ("embedding.cu", "int64_t(blockIdx.y) * THREADS + ", ""),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])
    with pytest.raises(AssertionError):
        check(40, 1100, torch.bfloat16, orders=ORDERS[:3])


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    for dtype in DTYPES:
        check(9, 37, dtype, kind=kind, orders=(FORWARD, seeded(3)))
        check(5, 64, dtype, kind=kind)

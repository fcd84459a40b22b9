"""The merge of attention over two sets of keys and its gradients, on the host executor, against the reference."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels import reference
from kernels.reference import working_dtype
from tests.cuda_host import DTYPES, FORWARD, ORDERS, assert_as_plain, call, draw, plant, seeded

SOURCE = "attention_merge.cu"
PARTS = ("first", "first_lse", "second", "second_lse")
Orders = Sequence[tuple[int, int]]


def inputs(rows: int, heads: int, head_dim: int, dtype: torch.dtype) -> dict[str, Tensor]:
    """Shares of all sizes; of the last pairs neither, one or the other part saw no key."""
    found = {name: draw(i, rows, heads, head_dim).to(dtype) for i, name in enumerate(("first", "second", "grad_out"))}
    found |= {name: draw(5 + i, rows, heads) * 4 for i, name in enumerate(("first_lse", "second_lse", "grad_lse"))}
    for name, row in (("first", -1), ("second", -1), ("first", -2), ("second", -3)):
        if rows >= 4:
            found[name][row] = 0
            found[f"{name}_lse"][row] = -torch.inf
    return found


def run(op: str, x: dict[str, Tensor], results: dict[str, Tensor], kind: str, orders: Orders) -> list[Tensor]:
    """The results, the same bits in every order; they held NaN before."""
    rows, heads, head_dim = x["first"].shape
    values = x | {name: torch.full_like(like, torch.nan) for name, like in results.items()}
    values |= {"pairs": rows * heads, "head_dim": head_dim, "dtype": DTYPES[x["first"].dtype]}
    first, *others = call(SOURCE, op, values, kind=kind, orders=orders)
    assert all(other[name].equal(first[name]) for other in others for name in results)
    return [first[name] for name in results]


def merged(x: dict[str, Tensor], kind: str = "plain", orders: Orders = (FORWARD,)) -> list[Tensor]:
    parts = {name: x[name] for name in PARTS}
    return run("attention_merge", parts, {"out": x["first"], "lse": x["first_lse"]}, kind, orders)


def gradients(x: dict[str, Tensor], kind: str = "plain", orders: Orders = (FORWARD,)) -> list[Tensor]:
    return run("attention_merge_grad", x, {f"grad_{name}": x[name] for name in PARTS}, kind, orders)


def spec(x: dict[str, Tensor], dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    """(out, lse) and the gradients of the parts, where both parts saw keys: elsewhere autograd's are NaN."""
    x = {name: t.to(working_dtype(dtype) if "lse" in name else dtype) for name, t in x.items()}
    parts = [x[name].requires_grad_() for name in PARTS]
    results = reference.merge_attention([(parts[0], parts[1]), (parts[2], parts[3])])
    seeds = (x["grad_out"], x.get("grad_lse", torch.zeros_like(results[1])))
    return [y.detach() for y in results], list(torch.autograd.grad(results, parts, seeds))


def check(
    rows: int, heads: int, head_dim: int, dtype: torch.dtype, *, kind: str = "plain", orders: Orders = (FORWARD,)
) -> None:
    x = inputs(rows, heads, head_dim, dtype)
    seen = ~(x["first_lse"].isneginf() & x["second_lse"].isneginf())
    for given in (x, {name: t for name, t in x.items() if name != "grad_lse"}):
        (plain, plain_grads), (exact, exact_grads) = spec(given, dtype), spec(given, torch.float64)
        got, grads = merged(given, kind, orders), gradients(given, kind, orders)
        assert not got[0][~seen].any() and got[1][~seen].isneginf().all()
        assert not any(grad[~seen].any() for grad in grads)
        for ours, theirs, wanted in zip(got + grads, plain + plain_grads, exact + exact_grads, strict=True):
            assert_as_plain(ours[seen], theirs[seen], wanted[seen])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("rows", "heads", "head_dim"), [(7, 5, 64), (20, 3, 128), (5, 2, 256), (6, 1, 37), (1, 1, 1), (4, 17, 8)]
)
def test_as_the_reference(rows, heads, head_dim, dtype):
    check(rows, heads, head_dim, dtype, orders=ORDERS)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_row_alone_has_its_bits(dtype):
    x = inputs(9, 3, 40, dtype)
    whole = merged(x) + gradients(x)
    for row in (0, 4, 8):
        one = {name: t[row : row + 1] for name, t in x.items()}
        assert all(a.equal(b[row : row + 1]) for a, b in zip(merged(one) + gradients(one), whole, strict=True))


def test_no_rows():
    x = inputs(0, 3, 16, torch.float32)
    assert [y.shape for y in merged(x) + gradients(x)] == [y.shape for y in (x["first"], x["first_lse"])] * 3


MUTANTS = {
    "neither part saw a key": ("attention_merge.cu", "none ? 0.f : a / sum", "a / sum"),
    "half of the lanes' products": ("attention_merge.cu", "int distance = LANES / 2", "int distance = LANES / 4"),
    "the gradient of lse is forgotten": ("attention_merge.cu", "a.grad_lse ? a.grad_lse[pair] : 0.f", "0.f"),
}
"""What stands there instead: these cases must notice."""


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mutant_is_noticed(name, tmp_path, monkeypatch):
    plant(monkeypatch, tmp_path, *MUTANTS[name])
    with pytest.raises(AssertionError):
        check(7, 5, 64, torch.float32)


@pytest.mark.parametrize("kind", ["asan", "tsan"])
def test_sanitizers(kind):
    for dtype in DTYPES:
        check(5, 3, 37, dtype, kind=kind, orders=(FORWARD, seeded(5)))
        check(4, 3, 64, dtype, kind=kind)

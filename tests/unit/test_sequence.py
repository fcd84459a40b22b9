"""How tokens fall on ranks, and tensors that the backward pass makes again."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor

from parallel.comm import Group, Launch
from parallel.recompute import made_again
from parallel.sequence import Split
from tests.kept import a_layer_keeps, formula, needs_cpu_kernels
from tests.training import layout


@pytest.mark.parametrize("ranks", [1, 2, 5])
@pytest.mark.parametrize("tokens", [0, 1, 2, 4, 11])
def test_every_token_and_row_is_some_ranks_in_order(tokens: int, ranks: int) -> None:
    rows = torch.arange(tokens)[torch.arange(tokens) % 3 != 1]
    splits = [Split.of(tokens, Group("tensor", rank, tuple(range(ranks)))) for rank in range(ranks)]
    assert sum(splits[0].sizes) == tokens
    assert max(splits[0].sizes) - min(splits[0].sizes) <= 1
    x = torch.arange(tokens) * 10
    shares = x.split(splits[0].sizes)
    chosen = [share[split.local(rows)] for share, split in zip(shares, splits, strict=True)]
    assert torch.equal(torch.cat(chosen), x[rows])
    assert [len(part) for part in chosen] == list(splits[0].of_rows(rows).sizes)
    assert [split.size for split in splits] == list(splits[0].sizes)


def test_made_once_for_all_who_saved_it_and_let_go() -> None:
    x = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    made: list[weakref.ref[Tensor]] = []

    def make() -> Tensor:
        made.append(weakref.ref(value := x.detach().sin()))
        return value

    y = x.sin()
    with made_again((y, make)):
        total = (y[1:] @ torch.ones(3, 2, dtype=torch.float64)).square().sum() + y.square().sum() + y.cos().sum()
    kept = weakref.ref(y.untyped_storage())
    del y
    gc.collect()
    assert kept() is None, "what is made again isn't kept"
    expected = torch.autograd.functional.jacobian(
        lambda x: (x.sin()[1:].sum(1).square() * 2).sum() + x.sin().square().sum() + x.sin().cos().sum(), x
    )
    (found,) = torch.autograd.grad(total, x, retain_graph=True)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    assert len(made) == 1
    assert made[0]() is None
    (again,) = torch.autograd.grad(total, x)
    assert torch.equal(again, found)
    assert len(made) == 2


@needs_cpu_kernels
@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_a_layer_keeps(recompute: str) -> None:
    run = layout(recompute=recompute, dtype="float32")
    assert a_layer_keeps(Launch(), run) == formula(Launch(), run)

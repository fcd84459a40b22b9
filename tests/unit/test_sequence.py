"""How tokens fall on ranks, and tensors that the backward pass makes again."""

from __future__ import annotations

import functools
import gc
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kernels import dispatch
from parallel.comm import Group
from parallel.mesh import Mesh
from parallel.recompute import made_again
from parallel.sequence import Split
from tests.models import TINY, RandomWeights
from tests.training import layout, rows_of
from train.batches import Microbatch, pack
from train.model import build_model


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


def _tensors(thing: Any) -> list[Tensor]:
    """What a closure, a partial or a bound method holds."""
    if isinstance(thing, Tensor):
        return [thing]
    if isinstance(thing, functools.partial):
        parts = [thing.func, *thing.args]
    else:
        parts = [
            getattr(thing, "__self__", None),
            *(c.cell_contents for c in getattr(thing, "__closure__", None) or ()),
        ]
    held = [part for part in parts if callable(part) or isinstance(part, Tensor)]
    return [x for part in held if not isinstance(part, torch.nn.Module) for x in _tensors(part)]


@contextmanager
def _kept(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[int, int]]:
    """Address and bytes of the memory of all that autograd saves inside, or that is needed to make it again."""
    found: dict[int, int] = {}
    alive: list[Tensor] = []
    hooks = torch.autograd.graph.saved_tensors_hooks

    def counting(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> Any:
        def count(x: Tensor) -> Any:
            packed = pack(x)
            for part in [packed] if isinstance(packed, Tensor) else _tensors(packed.again.make):
                alive.append(part.detach())
                found[part.untyped_storage().data_ptr()] = part.untyped_storage().nbytes()
            return packed

        return hooks(count, unpack)

    with monkeypatch.context() as patched:
        patched.setattr(torch.autograd.graph, "saved_tensors_hooks", counting)
        with counting(Tensor.detach, lambda x: x):
            yield found


def _kept_bytes(layers: int, recompute: str, batch: Microbatch, monkeypatch: pytest.MonkeyPatch) -> int:
    run = layout(architecture=replace(TINY, num_layers=layers), recompute=recompute, dtype="float32")
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    model = build_model(run.config, RandomWeights(run.architecture), Mesh.single(), ops)
    with _kept(monkeypatch) as found:
        total = model.loss(batch, None, None, None)
    weights = {parameter.untyped_storage().data_ptr() for _, parameter in model.trainable()}
    assert total.requires_grad
    return sum(size for address, size in found.items() if address not in weights)


@pytest.mark.parametrize("recompute", ["none", "selective"])
def test_what_a_layer_keeps(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The table of `parallel.recompute`."""
    if not dispatch.select(torch.device("cpu"), torch.float32).name.startswith("cpu "):
        pytest.skip("the table is that of the C++ backend, which isn't built")
    batch = pack(rows_of(1, 7, TINY.vocab_size))
    sizes = [_kept_bytes(layers, recompute, batch, monkeypatch) for layers in (2, 3)]
    a = TINY
    heads = (a.num_heads + 2 * a.num_kv_heads) * a.head_dim + a.num_heads * a.head_dim + a.num_heads
    rest = {"none": 4 * a.width + 3 * a.ffn_width, "selective": 2 * a.width + 2 * a.ffn_width}
    assert sizes[1] - sizes[0] == batch.num_tokens * 4 * (heads + rest[recompute])

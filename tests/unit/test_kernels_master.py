"""Weights that train: packs that are kept are never stale, gradients added in place are those that autograd would add."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from conf.schema import OptimConf
from kernels import cpu_linear, dispatch
from kernels.master import Master, packs_kept, put_off
from kernels.ops import Ops, Packed, Part
from parallel.sharding import Spec, whole
from tests.backends import BACKENDS, backend
from train.optim import adamw

DTYPES = [torch.float32, torch.bfloat16]


def draw(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def products(ops: Ops, w: Tensor, dtype: torch.dtype) -> list[Tensor]:
    """All that is read of a pack: a linear, the gradient of its x, logits and their gradient, a row."""
    x = draw(7, 40, seed=1).to(dtype).requires_grad_()
    out = ops.linear(x, w)
    (grad,) = torch.autograd.grad(out.float().square().sum(), x)
    with torch.no_grad():
        held = ops.pack_master(w, dtype)
        logits = ops.linear(x, held, wide=True)
        if isinstance(held, Packed):  # as the loss does it for all of its chunks
            back = ops.linear(logits.to(dtype), held.transposed(), wide=True)
        else:
            back = ops.input_gradient(logits.to(dtype), held)
        return [out.detach(), grad, logits, back, ops.embedding(torch.tensor([3, 0]), w)]


def update(w: Master) -> None:
    w.grad = draw(*w.shape, seed=5)
    spec = Spec(name="w.weight", shape=tuple(w.shape), index=whole(tuple(w.shape)), owned=whole(tuple(w.shape)))
    adamw(OptimConf(lr=0.1), [(spec, w)]).step()


def load(w: Master) -> None:
    module = nn.Module()
    module.weight = w
    module.load_state_dict({"weight": draw(*w.shape, seed=6)})


CHANGES = {
    "in_place": lambda w: w.mul_(2),
    "an_element": lambda w: w[5].fill_(3.0),
    "through_a_view": lambda w: w.detach().view(-1).add_(1),
    "copy": lambda w: w.copy_(draw(*w.shape, seed=7)),
    "other_storage": lambda w: setattr(w, "data", draw(*w.shape, seed=8)),
    "optimizer": update,
    "load": load,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("name", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_change_of_a_weight_is_missed(name, dtype, change):
    ops, w = backend(name, dtype), Master(draw(50, 40, seed=2))
    with packs_kept([w]):
        before = products(ops, w, dtype)
        with torch.no_grad():
            CHANGES[change](w)
        after = products(ops, w, dtype)
    plain = products(ops, w.detach().clone().requires_grad_(), dtype)
    for old, new, expected in zip(before, after, plain, strict=True):
        assert torch.equal(new, expected) and new.dtype == expected.dtype
        assert change == "an_element" or not torch.equal(old, new)


@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_are_made_once_while_they_are_kept_and_freed_then(dtype, monkeypatch):
    ops, w = backend("compiled", dtype), Master(draw(50, 40, seed=2))
    made = []
    packed = cpu_linear._packed
    monkeypatch.setattr(cpu_linear, "_packed", lambda *a: made.append(a[0].shape) or packed(*a))
    with packs_kept([w, draw(2, 2, seed=3)]):
        expected = products(ops, w, dtype)
        for a, b in zip(products(ops, w, dtype), expected, strict=True):
            assert torch.equal(a, b)
        assert made == [(50, 40), (40, 50)]
    for a, b in zip(products(ops, w, dtype), expected, strict=True):
        assert torch.equal(a, b)
    assert len(made) == 6  # of the linear, and of what is held for several products, in both directions


@pytest.mark.parametrize("dtype", DTYPES)
def test_packs_made_ahead_are_those_of_the_weights_as_they_are_then(dtype, monkeypatch):
    ops, w = backend("compiled", dtype), Master(draw(50, 40, seed=2))
    with packs_kept([w], ahead=True):
        products(ops, w, dtype)
    update(w)
    with packs_kept([w], ahead=True):
        monkeypatch.setattr(cpu_linear, "_packed", lambda *_: pytest.fail("it was packed already"))
        found = products(ops, w, dtype)
    monkeypatch.undo()
    for a, b in zip(found, products(ops, w.detach().clone().requires_grad_(), dtype), strict=True):
        assert torch.equal(a, b)


def gradients(ops: Ops, w: Tensor, v: Tensor, dtype: torch.dtype, *, recompute: bool) -> Tensor:
    """Of two passes over w, each as an embedding, as part of two linears and with a plain use; w's gradient."""

    def block(x: Tensor) -> Tensor:
        a, b = ops.linears(x, (Part(w), Part(v)))
        return a.float().square().sum() + b.float().sum()

    for rows in (3, 70):
        ids = torch.randint(0, 50, (rows,), generator=torch.Generator().manual_seed(rows))
        x = ops.embedding(ids, w).to(dtype)
        loss = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        (loss + (w * 0.5).sum()).backward()
    assert w.grad is not None
    return w.grad


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("recompute", [False, True])
def test_gradients_added_in_place(dtype, recompute):
    """Only the order of summation is another; every pass ends in one call of the hooks, after its last gradient."""
    ops = backend("compiled", dtype)
    w, v = Master(draw(50, 40, seed=2)), Master(draw(9, 40, seed=3))
    plain = w.detach().clone().requires_grad_()
    expected = gradients(ops, plain, v.detach(), dtype, recompute=recompute)
    w.grad, v.grad = torch.zeros(50, 40), torch.zeros(9, 40)
    w.adds_gradients = v.adds_gradients = True
    place, seen = w.grad.data_ptr(), []
    w.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.clone()))
    found = gradients(ops, w, v, dtype, recompute=recompute)
    assert found.data_ptr() == place and found.layout == torch.strided
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))
    assert len(seen) == 2 and torch.equal(seen[1], found)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_sum_goes_on_where_the_pass_before_left_it(dtype):
    """Two passes leave the bits of one over the rows of both."""
    ops, w = backend("compiled", dtype), Master(draw(50, 40, seed=2))
    x, weight = draw(90, 40, seed=4).to(dtype), draw(90, 50, seed=5).to(dtype)
    w.adds_gradients, results = True, []
    for bounds in ((0, 90), (0, 30, 90)):
        w.grad = torch.zeros(50, 40)
        for first, last in itertools.pairwise(bounds):
            (ops.linear(x[first:last], w) * weight[first:last]).sum().backward()
        results.append(w.grad)
    assert torch.equal(*results)


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("compiled", torch.float32), ("compiled", torch.bfloat16), ("torch", torch.float32), ("exact", torch.float64)],
)
def test_gradients_put_off_have_the_bits_of_those_that_are_not(name, dtype, recompute, in_place):
    """Of two microbatches, the second one's inputs going backward before the first one's weights."""
    ops = dispatch.select(torch.device("cpu"), dtype) if name == "exact" else backend(name, dtype)
    stored = torch.float64 if dtype == torch.float64 else torch.float32
    start = [draw(50, 40, seed=2).to(stored), draw(9, 40, seed=3).to(stored), draw(40, 50, seed=4).to(stored)]

    def losses(weights: list[Master]) -> list[tuple[Tensor, Tensor]]:
        def block(x: Tensor) -> Tensor:
            a, b = ops.linears(x, (Part(weights[0]), Part(weights[1])))
            return ops.linear(a.square(), weights[2]).square().sum() + b.sum()

        inputs = [draw(rows, 40, seed=rows).to(dtype).requires_grad_() for rows in (3, 70)]
        return [(x, checkpoint(block, x, use_reentrant=False) if recompute else block(x)) for x in inputs]

    def fresh() -> list[Master]:
        weights = [Master(w.clone()) for w in start]
        for w in weights:
            w.grad, w.adds_gradients = torch.zeros_like(w, requires_grad=False), in_place
        return weights

    at_once, late, arrived = fresh(), fresh(), []
    expected, found = losses(at_once), losses(late)
    for _, loss in expected:
        loss.backward()
    queues = []
    for w in late:
        w.arrived = arrived.append
    for _, loss in found:
        with put_off(late) as queue:
            loss.backward()
        queues.append(queue)
    assert [len(queue) for queue in queues] == [3, 3]
    assert [w.left for w in late] == [2, 2, 2]
    assert not any(w.grad.any() for w in late)
    for queue in queues:
        while queue:
            queue.popleft()()
    assert len(arrived) == 6
    for (x, _), (y, _) in zip(expected, found, strict=True):
        assert torch.equal(x.grad, y.grad)
    for w, v in zip(at_once, late, strict=True):
        assert torch.equal(w.grad, v.grad)

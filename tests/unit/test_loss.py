"""The chunked cross-entropy in one process against torch's, gradients included; low precision stays close."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import REFERENCE
from kernels.master import Master, packs_kept
from parallel import loss
from parallel.comm import Group
from parallel.loss import cross_entropy


def inputs(rows: int, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, 12, generator=generator, dtype=torch.float64)
    weight = torch.randn(53, 12, generator=generator, dtype=torch.float64)
    target = torch.randint(0, 53, (rows,), generator=generator)
    return hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


@pytest.mark.parametrize("rows", [0, 1, 16, 17, 100])
def test_value_and_gradients(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loss, "ROWS", 16)  # several chunks
    hidden, weight, target = inputs(rows)
    ours = cross_entropy(hidden, weight, target, first_row=0, tensor=Group("tensor"), ops=REFERENCE)
    theirs = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-12)
    found = torch.autograd.grad(ours * 0.5, (hidden, weight))
    expected = torch.autograd.grad(theirs * 0.5, (hidden, weight))
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-12)


def test_the_gradient_of_a_master_that_gathers_its_own() -> None:
    """Two passes; `.grad` is what autograd adds up but for a rounding, and its hook is called once a pass."""
    hidden, weight, target = inputs(40, torch.float32)
    results = []
    for adds in (False, True):
        master = Master(weight.detach())
        master.grad, master.adds_gradients, calls = torch.ones_like(master), adds, []
        master.register_post_accumulate_grad_hook(calls.append)
        with packs_kept([master]):
            for _ in range(2):
                total = cross_entropy(hidden, master, target, first_row=0, tensor=Group("tensor"), ops=REFERENCE)
                (total * 0.3).backward()
        assert len(calls) == 2
        results.append(master.grad)
    torch.testing.assert_close(*results, rtol=3e-7, atol=1e-7)


def test_passes_under_way_at_once_share_no_memory() -> None:
    """As in GPipe: two forward passes, then their backward passes."""
    hidden, weight, target = inputs(40, torch.float32)
    master, gathered = Master(weight.detach()), []
    master.grad, master.adds_gradients = torch.zeros_like(master), True
    with packs_kept([master]):
        for order in ((0, 1), (1, 0), (0, 1)):
            master.grad.zero_()
            halves = [
                cross_entropy(hidden[part], master, target[part], first_row=0, tensor=Group("tensor"), ops=REFERENCE)
                for part in (slice(0, 15), slice(15, 40))
            ]
            for i in order:
                halves[i].backward()
            gathered.append(master.grad.clone())
    whole = cross_entropy(hidden, weight, target, first_row=0, tensor=Group("tensor"), ops=REFERENCE)
    (expected,) = torch.autograd.grad(whole, weight)
    for found in gathered:
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_is_as_close_as_a_plain_one() -> None:
    hidden, weight, target = inputs(64)
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    plain = torch.nn.functional.cross_entropy((low[0] @ low[1].T).float(), target, reduction="sum")
    ours = cross_entropy(low[0], low[1], target, first_row=0, tensor=Group("tensor"), ops=REFERENCE)
    assert abs(ours.double() - exact) <= 2 * abs(plain.double() - exact) + 1e-5 * exact

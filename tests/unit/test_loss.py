"""The chunked cross-entropy in one process against torch's, gradients included; low precision stays close."""

from __future__ import annotations

import pytest
import torch

from kernels.dispatch import REFERENCE
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


def test_bfloat16_is_as_close_as_a_plain_one() -> None:
    hidden, weight, target = inputs(64)
    exact = torch.nn.functional.cross_entropy(hidden @ weight.T, target, reduction="sum")
    low = [x.detach().bfloat16().requires_grad_() for x in (hidden, weight)]
    plain = torch.nn.functional.cross_entropy((low[0] @ low[1].T).float(), target, reduction="sum")
    ours = cross_entropy(low[0], low[1], target, first_row=0, tensor=Group("tensor"), ops=REFERENCE)
    assert abs(ours.double() - exact) <= 2 * abs(plain.double() - exact) + 1e-5 * exact

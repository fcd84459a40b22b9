"""The keys and values that a context rank sends, cut out of its tokens; and their gradients, put back."""

from __future__ import annotations

import torch
from torch import Tensor

from parallel.context.plan import Route


def tails(route: Route, k_TKH: Tensor, v_TKH: Tensor) -> Tensor:
    """[2, S, K, H]: keys and values of the tokens that other pieces need, contiguous."""
    rows = [slice(sent.start, sent.stop) for sent in route.sent]
    return torch.stack([torch.cat([x[some] for some in rows]) for x in (k_TKH, v_TKH)])


def add_tails(route: Route, grad_2TKH: Tensor, tails_2SKH: Tensor) -> None:
    """Adds the gradients of what was sent to those of the rank's keys and values, in place."""
    at = 0
    for sent in route.sent:
        grad_2TKH[:, sent.start : sent.stop] += tails_2SKH[:, at : at + len(sent)]
        at += len(sent)

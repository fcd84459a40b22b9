"""Runs any pipeline plan: computes, sends activations forward and gradients back, in the plan's order.

Sends are asynchronous and their buffers kept until the step ends; each pair of neighbouring stages exchanges
activations in one direction and gradients in the other, both in microbatch order, so nothing needs a tag.
Gradients of microbatches add up in the order of the plan's backward actions (0, 1, ..., m - 1 in every schedule).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from parallel import comm
from parallel.comm import Group, Pending
from parallel.pipeline.plan import Action

Forward = Callable[[int, Tensor | None], Tensor]
"""(microbatch, hidden [T, D] from the stage before or None on the first) -> hidden [T, D], or the loss on the last."""


@dataclass(frozen=True)
class Border:
    """What passes between two stages: hidden states one way, their gradients the other."""

    shapes: Sequence[tuple[int, int]]
    """[T, D] of each microbatch."""
    dtype: torch.dtype
    device: torch.device

    def receive(self, microbatch: int, pipeline: Group, source: int) -> Tensor:
        """The neighbour's tensor for this microbatch."""
        x = torch.empty(self.shapes[microbatch], dtype=self.dtype, device=self.device)
        comm.receive(x, pipeline, source)
        return x


def run(
    actions: Sequence[Action],
    pipeline: Group,
    forward: Forward,
    *,
    border: Border,
    scale: float = 1.0,
    before_last_backward: Callable[[], None] = lambda: None,
) -> list[Tensor]:
    """Executes this rank's `actions`; returns the detached losses by microbatch on the last stage, else [].

    `scale` multiplies the loss before the
    backward pass. `before_last_backward` is called before the last backward action: from then on a parameter's
    gradient is final once it has been accumulated.
    """
    inputs: dict[int, Tensor] = {}
    outputs: dict[int, Tensor] = {}
    losses: dict[int, Tensor] = {}
    sends: list[Pending] = []
    backwards_left = sum(action.kind == "B" for action in actions)
    for action in actions:
        m = action.microbatch
        if action.kind == "F":
            if not pipeline.is_first:
                inputs[m] = border.receive(m, pipeline, pipeline.rank - 1).requires_grad_()
            outputs[m] = forward(m, inputs.get(m))
            if pipeline.is_last:
                losses[m] = outputs[m].detach()
            else:
                sends.append(comm.send_start(outputs[m].detach().contiguous(), pipeline, pipeline.rank + 1))
            continue
        if backwards_left == 1:
            before_last_backward()
        backwards_left -= 1
        output = outputs.pop(m)
        if pipeline.is_last:
            torch.autograd.backward(output * scale)
        else:
            received = border.receive(m, pipeline, pipeline.rank + 1)
            if output.requires_grad:
                torch.autograd.backward(output, received)
        if not pipeline.is_first:
            grad = inputs.pop(m).grad
            assert grad is not None
            sends.append(comm.send_start(grad.contiguous(), pipeline, pipeline.rank - 1))
    for pending in sends:
        pending.wait()
    return [losses[m] for m in sorted(losses)]


def forward_only(pipeline: Group, forward: Forward, *, border: Border) -> list[Tensor]:
    """Runs the microbatches forward through the stages, in order; returns the last stage's outputs there, else []."""
    results: list[Tensor] = []
    sends: list[Pending] = []
    for m in range(len(border.shapes)):
        x = None if pipeline.is_first else border.receive(m, pipeline, pipeline.rank - 1)
        output = forward(m, x)
        if pipeline.is_last:
            results.append(output)
        else:
            sends.append(comm.send_start(output.contiguous(), pipeline, pipeline.rank + 1))
    for pending in sends:
        pending.wait()
    return results

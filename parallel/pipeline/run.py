"""Runs any pipeline plan: computes, sends activations forward and gradients back, in the plan's order.

A rank takes another one's messages in the order in which the plan sends them (`Plan.arrivals`), so nothing needs a tag;
one that comes before it is needed is kept. What the next action needs is asked for while the action before it computes;
on GPUs, where messages of a rank wait for each other, together with the sending of that action's result. Where the next
chunk is on the same rank its input is handed over without a copy.

    F  forward of a chunk; of its output stays what autograd saved and the node to begin the backward pass at
    B  whole backward
    I  backward without the weights of linears; what those gradients are products of is kept
    W  these products, added to the weights' gradients

What an I leaves out is what `kernels.master.put_off` names; norms, biases, the embedding, the head (whose gradient the
loss computes together with the logits') and adapters come with the I: they are small, or would keep more than they are.
A weight's gradients add up in the order of microbatches in every plan, so that all plans agree bitwise.
"""

from __future__ import annotations

import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge

from kernels.master import put_off
from parallel import comm
from parallel.comm import Group, Pending
from parallel.pipeline.plan import Action, Plan

Forward = Callable[[int, int, Tensor | None], Tensor]
"""(chunk, microbatch, hidden [T, D] from the chunk before or None on the model's first) -> hidden [T, D], or the loss
on the model's last chunk."""
Note = Callable[[Action, float, float], None]
"""Told of each action with the seconds, on `time.perf_counter`'s clock, when it began and ended computing."""
Pass = tuple[int, int]
"""(chunk, microbatch)."""


@dataclass(frozen=True)
class Border:
    """What passes between two stages: hidden states one way, their gradients the other."""

    shapes: Sequence[tuple[int, int]]
    """[T, D] of each microbatch."""
    dtype: torch.dtype
    device: torch.device

    def empty(self, microbatch: int) -> Tensor:
        """Room for this microbatch's tensor."""
        return torch.empty(self.shapes[microbatch], dtype=self.dtype, device=self.device)

    def receive(self, microbatch: int, pipeline: Group, source: int) -> Tensor:
        """The neighbour's tensor for this microbatch."""
        x = self.empty(microbatch)
        comm.receive(x, pipeline, source)
        return x


def run(
    plan: Plan,
    pipeline: Group,
    forward: Forward,
    *,
    border: Border,
    scale: float = 1.0,
    weights: Sequence[Iterable[Tensor]] = (),
    note: Note | None = None,
) -> list[Tensor]:
    """Executes this rank's actions; returns the detached losses by microbatch on the model's last stage, else [].

    plan: verified, for as many stages as the group has ranks. scale: multiplies the loss before the backward pass.
    weights: by chunk, those whose gradients an I may leave to its W; the others' come with the I. note: see `Note`;
    what is computed asynchronously (GPUs) isn't waited for.
    """
    assert plan.stages == pipeline.size, (plan.stages, pipeline.size)
    rank = _Rank(plan, pipeline, forward, border, scale, weights, note)
    for action in plan.actions[pipeline.rank]:
        rank.run(action)
    rank.mail.finish()
    return [loss for _, loss in sorted(rank.losses.items())]


@dataclass
class _Mail:
    """This rank's messages of one run."""

    plan: Plan
    pipeline: Group
    border: Border
    _needed: deque[tuple[Action, int]] = field(init=False)
    """Actions that still need a message, in the rank's order, and the rank that it comes from."""
    _arrivals: dict[int, deque[Action]] = field(init=False)
    """By sender the actions whose messages aren't asked for yet, in the order in which they come."""
    _asked: dict[int, deque[tuple[Action, Tensor, Pending]]] = field(default_factory=lambda: defaultdict(deque))
    """By sender, in the order in which they come."""
    _here: dict[Action, Tensor] = field(default_factory=dict)
    """What came before it was needed."""
    _in_turn: bool = field(init=False)
    """Whether messages wait for those that were begun before, as NCCL's do."""
    _local: dict[Action, Tensor] = field(default_factory=dict)
    """Results of this rank for itself."""
    _sent: dict[Action, Pending] = field(default_factory=dict)
    """Sends under way, by the action whose result they carry."""
    _at: int = 0
    """Place of the action after the one that runs."""

    def __post_init__(self) -> None:
        me = self.pipeline.rank
        self._in_turn = self.border.device.type != "cpu"
        sources = [(action, self.plan.source(me, action)) for action in self.plan.actions[me]]
        self._needed = deque((action, found[0]) for action, found in sources if found is not None and found[0] != me)
        self._arrivals = {sender: deque(actions) for sender, actions in self.plan.arrivals(me).items()}

    def take(self, action: Action) -> Tensor | None:
        """What the action needs of another chunk, None at the model's ends; then asks for the next message."""
        me = self.pipeline.rank
        self._at += 1
        source = self.plan.source(me, action)
        if source is None:
            return None
        if source[0] == me:
            return self._local.pop(action)
        self._ask()
        self._needed.popleft()
        while action not in self._here:
            arrived, x, pending = self._asked[source[0]].popleft()
            pending.wait()
            self._here[arrived] = x
        x = self._here.pop(action)
        if action.kind != "F" and (sent := self._sent.pop(Action("F", action.microbatch, action.chunk), None)):
            sent.wait()  # it has arrived, as its gradient shows; its buffer is free
        if not self._in_turn:
            self._ask()
        return x

    def _ask(self) -> None:
        """Asks for the message that is needed next, and for those that its sender sends before it."""
        if not self._needed:
            return
        needed, sender = self._needed[0]
        coming = self._arrivals[sender]
        while needed in coming:
            action = coming.popleft()
            x = self.border.empty(action.microbatch)
            self._asked[sender].append((action, x, comm.receive_start(x, self.pipeline, sender)))

    def send(self, action: Action, x: Tensor) -> None:
        """Sends an action's result [T, D] to where it is needed; nowhere at the model's ends."""
        target = self.plan.target(self.pipeline.rank, action)
        if target is None:
            return
        if target[0] == self.pipeline.rank:
            self._local[target[1]] = x
            return
        if self._in_turn and self._exchanges(x.contiguous(), target[0]):
            return
        pending = comm.send_start(x.contiguous(), self.pipeline, target[0])
        if pending.work is not None:
            self._sent[action] = pending

    def _exchanges(self, x: Tensor, to: int) -> bool:
        """Sends x and asks for what the very next action needs, if that is its sender's next message; else neither."""
        row = self.plan.actions[self.pipeline.rank]
        if not self._needed or self._at == len(row) or self._needed[0][0] != row[self._at]:
            return False
        action, sender = self._needed[0]
        if not self._arrivals[sender] or self._arrivals[sender][0] != action:
            return False
        y = self.border.empty(self._arrivals[sender].popleft().microbatch)
        self._asked[sender].append((action, y, comm.exchange_start(x, to, y, sender, self.pipeline)))
        return True

    def finish(self) -> None:
        """Waits until everything is sent."""
        for pending in self._sent.values():
            pending.wait()


@dataclass
class _Rank:
    """What a rank keeps between its actions."""

    plan: Plan
    pipeline: Group
    forward: Forward
    border: Border
    scale: float
    weights: Sequence[Iterable[Tensor]]
    note: Note | None
    inputs: dict[Pass, Tensor] = field(default_factory=dict)
    """Leaves, whose gradients go back."""
    outputs: dict[Pass, GradientEdge] = field(default_factory=dict)
    """Where backward passes begin; none where nothing needs a gradient."""
    put_off: dict[Pass, deque[Callable[[], None]]] = field(default_factory=dict)
    losses: dict[int, Tensor] = field(default_factory=dict)
    mail: _Mail = field(init=False)

    def __post_init__(self) -> None:
        self.mail = _Mail(self.plan, self.pipeline, self.border)

    def run(self, action: Action) -> None:
        """Waits for what the action needs, runs it and sends its result."""
        key = (action.chunk, action.microbatch)
        received = self.mail.take(action)
        start = time.perf_counter()
        if action.kind == "F":
            result = self._forward(key, received)
        elif action.kind == "W":
            result = self._weights(key)
        elif action.kind == "I":
            with put_off(self.weights[action.chunk] if self.weights else ()) as self.put_off[key]:
                result = self._backward(key, received)
        else:
            result = self._backward(key, received)
        if self.note is not None:
            self.note(action, start, time.perf_counter())
        if result is not None:
            self.mail.send(action, result)

    def _forward(self, key: Pass, hidden: Tensor | None) -> Tensor | None:
        if hidden is not None and torch.is_grad_enabled():
            self.inputs[key] = hidden = hidden.detach().requires_grad_()
        output = self.forward(*key, hidden)
        if output.requires_grad:
            self.outputs[key] = get_gradient_edge(output)
        if self.plan.target(self.pipeline.rank, Action("F", key[1], key[0])) is not None:
            return output.detach()
        self.losses[key[1]] = output.detach()
        return None

    def _backward(self, key: Pass, grad: Tensor | None) -> Tensor | None:
        """The gradient of the chunk's input; None at the model's beginning."""
        if grad is None:
            loss = self.losses[key[1]]
            grad = torch.full_like(loss, self.scale)
        if (edge := self.outputs.pop(key, None)) is not None:
            torch.autograd.backward(edge, grad)
        return None if (hidden := self.inputs.pop(key, None)) is None else hidden.grad

    def _weights(self, key: Pass) -> None:
        products = self.put_off.pop(key)
        while products:
            products.popleft()()


def forward_only(pipeline: Group, forward: Callable[[int, Tensor | None], Tensor], *, border: Border) -> list[Tensor]:
    """Runs the microbatches forward through stages of one chunk, in order, for serving.

    forward: (microbatch, hidden [T, D] or None on the first stage) -> its output. Returns the last stage's outputs
    there, else [].
    """
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

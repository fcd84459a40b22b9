"""Gradients in flat buckets: accumulated in place, summed over replicas while the backward pass still runs.

Every parameter's `.grad` is a view into a bucket; backends may add to a master's themselves (`kernels.master`). A
bucket is summed over its group as soon as all its gradients have come as often as the step has microbatches and all
buckets before it were started (every rank thus starts them in the same order):

    reduce     group                      what it completes
    none       data + context             the sum over the rows of other ranks
    tensor     data + context + tensor    also the partial sums of replicated ones (LoRA; norms where tokens are split)

A ring all-reduce adds in an order that depends on the place in the buffer. So parameters that every tensor rank holds
whole have buckets of their own, laid out alike on all of them: their gradients agree bitwise.

What rarely occurs is added afterwards, in canonical order: KV heads that live on several tensor ranks (overlap),
tied embeddings (first and last stage), parameters replicated over pipeline stages.

A rank with both ends of a model with tied embeddings, as chunks of their own, gathers the head's gradient apart from
the embedding's and adds it at the end: one more gradient of that size, and the bits of two ranks with an end each.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from kernels.master import Master
from parallel import comm
from parallel.comm import Group, Pending
from parallel.mesh import Mesh
from parallel.sharding import Spec, whole

BUCKET_BYTES = 16 << 20
_SQUARED = 1 << 19
"""Elements whose squares are summed at a time: their float64 copies stay in the cache."""

Placed = tuple[Spec, nn.Parameter]


@dataclass
class _Bucket:
    flat: Tensor
    group: Group
    size: int
    """Number of parameters."""
    ready: int = 0
    """Gradients of microbatches that have come."""
    pending: Pending | None = None


@dataclass
class Gradients:
    """The buckets of one model's trainable parameters. Build it once; per step: zero, backward, finish."""

    mesh: Mesh
    placed: Sequence[Placed]
    """Trainable parameters with their placements."""
    overlapped: bool = True
    """False where gradients arrive after the backward pass (reparameterised prefixes)."""
    heads: Sequence[tuple[Placed, nn.Parameter]] = ()
    """(a parameter with a gradient of its own, the placed one that it is the memory of): `TiedHead`."""
    _buckets: list[_Bucket] = field(default_factory=list)
    _passes: int = 0
    _started: int = 0

    def __post_init__(self) -> None:
        # the backward pass finishes the last layers first, so buckets go from last to first
        for group, members in self._by_group():
            for run in _runs(list(reversed(members))):
                self._add_bucket(group, run)

    def _by_group(self) -> Iterable[tuple[Group, list[Placed]]]:
        placed = [*self.placed, *(head for head, _ in self.heads)]
        partial = [(s, p) for s, p in placed if s.reduce == "tensor"]
        uncut = [(s, p) for s, p in placed if s.reduce == "none" and s.index == whole(s.shape)]
        cut = [(s, p) for s, p in placed if s.reduce != "tensor" and s.index != whole(s.shape)]
        replicas = self.mesh.replicas
        groups = ((replicas, cut), (replicas, uncut), (self.mesh.replicas_tensor, partial))
        return [(group, members) for group, members in groups if members]

    def _add_bucket(self, group: Group, members: list[Placed]) -> None:
        flat = torch.zeros(sum(p.numel() for _, p in members), dtype=members[0][1].dtype, device=members[0][1].device)
        arrived = _hook(weakref.ref(self), len(self._buckets))
        at = 0
        for spec, parameter in members:
            # the fused optimizer walks parameter and gradient in memory order
            assert parameter.is_contiguous(), f"{spec.name} is a view with gaps"
            parameter.grad = flat[at : at + parameter.numel()].view_as(parameter)
            if isinstance(parameter, Master):
                parameter.adds_gradients = True
                parameter.arrived = arrived if self.overlapped else None
            at += parameter.numel()
            if self.overlapped:
                parameter.register_post_accumulate_grad_hook(_unless_put_off(arrived))
        self._buckets.append(_Bucket(flat, group, len(members)))

    def zero(self, passes: int) -> None:
        """Clears all gradients and readiness; call before a step's first backward. passes: microbatches of the step,
        each of which adds to every gradient once."""
        self._passes, self._started = passes, 0
        for bucket in self._buckets:
            bucket.flat.zero_()
            bucket.ready, bucket.pending = 0, None

    def arrived(self, index: int) -> None:
        """Counts a microbatch's gradient of a parameter of bucket `index`; starts the sums that are due."""
        self._buckets[index].ready += 1
        while self._started < len(self._buckets):
            first = self._buckets[self._started]
            if first.ready < first.size * self._passes:
                break
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        bucket.pending = comm.all_reduce_start(bucket.flat, bucket.group)
        self._started += 1

    def finish(self) -> None:
        """Completes every gradient: the sum over all tokens of the step, whole on every rank that holds it."""
        while self._started < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait()
        for (_, head), parameter in self.heads:
            assert parameter.grad is not None and head.grad is not None
            parameter.grad += head.grad
        self._sum_overlaps()
        for spec, parameter in self.placed:
            assert parameter.grad is not None
            if spec.tied:
                comm.all_reduce(parameter.grad, self.mesh.ends)
            if spec.pipeline_sum:
                comm.all_reduce(parameter.grad, self.mesh.pipeline)

    def _sum_overlaps(self) -> None:
        """One all-reduce of the full tensors of every KV parameter whose heads live on several ranks."""
        shared = [(spec, p) for spec, p in self.placed if spec.reduce == "overlap"]
        if not shared:
            return
        like = shared[0][1]
        flat = torch.zeros(sum(math.prod(spec.shape) for spec, _ in shared), dtype=like.dtype, device=like.device)
        fulls = [
            f.view(s.shape)
            for f, (s, _) in zip(flat.split([math.prod(s.shape) for s, _ in shared]), shared, strict=True)
        ]
        for full, (spec, parameter) in zip(fulls, shared, strict=True):
            assert parameter.grad is not None
            full[spec.index] = parameter.grad
        comm.all_reduce(flat, self.mesh.tensor)
        for full, (spec, parameter) in zip(fulls, shared, strict=True):
            assert parameter.grad is not None
            parameter.grad.copy_(full[spec.index])

    def norm(self, names: Sequence[str]) -> float:
        """Euclidean norm of the full gradient, in float64.

        names: of all `Spec.parts` of the whole model's trainable parameters in canonical order, the same on every
        rank. Each one's sum of squares is gathered over the model's ranks, then added in that order.
        """
        position = {name: i for i, name in enumerate(names)}
        squares = torch.zeros(len(names), dtype=torch.float64)
        for spec, parameter in self.placed:
            assert parameter.grad is not None
            for name, owned in spec.parts():
                if owned is not None:
                    own = [slice(o.start - i.start, o.stop - i.start) for o, i in zip(owned, spec.index, strict=True)]
                    squares[position[name]] += _sum_of_squares(parameter.grad[tuple(own)])
        comm.all_reduce(squares, self.mesh.model)
        return math.sqrt(math.fsum(squares.tolist()))

    def scale(self, factor: float) -> None:
        """Multiplies every gradient."""
        if factor == 1:
            return
        for bucket in self._buckets:
            bucket.flat.mul_(factor)


def _sum_of_squares(x: Tensor) -> Tensor:
    """In float64, a few elements at a time: copies of all of them would take four times the gradient's memory."""
    parts = x.reshape(-1).split(_SQUARED)
    return torch.stack([part.double().square().sum() for part in parts]).sum().cpu()


def _hook(gradients: weakref.ref[Gradients], index: int) -> Callable[[Tensor], None]:
    # a parameter's hooks are out of sight of Python's collector: a strong reference would keep the process groups
    # beyond `comm.stop`
    def arrived(_: Tensor) -> None:
        owner = gradients()
        if owner is not None:
            owner.arrived(index)

    return arrived


def _unless_put_off(arrived: Callable[[Tensor], None]) -> Callable[[Tensor], None]:
    def hook(parameter: Tensor) -> None:
        if not (isinstance(parameter, Master) and parameter.left):
            arrived(parameter)

    return hook


def _runs(members: list[Placed]) -> list[list[Placed]]:
    """Cuts the list into buckets of at least BUCKET_BYTES (but the last)."""
    runs: list[list[Placed]] = [[]]
    size = 0
    for spec, parameter in members:
        runs[-1].append((spec, parameter))
        size += parameter.nbytes
        if size >= BUCKET_BYTES:
            runs.append([])
            size = 0
    return [run for run in runs if run]

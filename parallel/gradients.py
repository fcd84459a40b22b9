"""Gradients in flat buckets: accumulated in place, summed over replicas while the backward pass still runs.

Every parameter's `.grad` is a view into a bucket; backends may add to a master's themselves (`kernels.master`). A
bucket is summed over its group as soon as the last of its gradients is final and all buckets before it were started
(every rank thus starts them in the same order):

    reduce     group                      what it completes
    none       data + context             the sum over the rows of other ranks
    tensor     data + context + tensor    also the partial sums of replicated factors (LoRA)

A ring all-reduce adds in an order that depends on the place in the buffer. So parameters that every tensor rank holds
whole have buckets of their own, laid out alike on all of them: their gradients agree bitwise.

What rarely occurs is added afterwards, in canonical order: KV heads that live on several tensor ranks (overlap),
tied embeddings (first and last stage), parameters replicated over pipeline stages.

With the optimizer's state shared out (`parallel.zero`) a rank needs the sums of its share alone: buckets over
data + context are reduce-scattered, and what is added over stages afterwards is added for the share. The others are
all-reduced as ever: replicated factors are small, overlapping KV heads lie differently on each tensor rank, and layers
of a prefix are no stretches of it.

A rank with both ends of a model with tied embeddings, as chunks of their own, gathers the head's gradient apart from
the embedding's and adds it at the end: one more gradient of that size, and the bits of two ranks with an end each.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise

import torch
from torch import Tensor, nn

from kernels.master import Master
from parallel import comm
from parallel.comm import Group, Pending
from parallel.mesh import Mesh
from parallel.sharding import Spec, whole
from parallel.zero import CHUNK, Strip, cut_shares, gather, stretches

BUCKET_BYTES = 16 << 20

Placed = tuple[Spec, nn.Parameter]


@dataclass(frozen=True)
class Kind:
    """Which parameters have buckets of their own, and over whom their gradients are summed."""

    name: str
    group: Group
    afterwards: Group | None = None
    """Who then adds up the sums."""
    scatters: bool = False
    """Whether a replica may get the sums of its share alone."""


@dataclass(frozen=True)
class Piece:
    """What this rank updates of a parameter; `tensor.grad` is final after `Gradients.finish`."""

    spec: Spec
    tensor: Tensor
    """The parameter itself, or a stretch of it as a view with one dimension."""
    stretch: tuple[int, int] | None = None
    """[start, stop) in the elements of this rank's block; None for all of them."""


@dataclass
class _Bucket:
    kind: Kind
    members: Sequence[Placed]
    flat: Tensor
    shares: tuple[int, ...]
    """Offsets of what each replica updates."""
    mine: tuple[int, int]
    """[start, stop) of this rank's share."""
    scattered: bool
    """Whether gradients are summed for the share alone."""
    ready: int = 0
    """Gradients of microbatches that have come."""
    pending: Pending | None = None

    @property
    def lengths(self) -> list[int]:
        """Elements of each parameter."""
        return [parameter.numel() for _, parameter in self.members]

    @property
    def summed(self) -> Tensor:
        """The part of `flat` that holds sums in the end."""
        return self.flat[slice(*self.mine)] if self.scattered else self.flat


@dataclass
class Gradients:
    """The buckets of one model's trainable parameters. Build it once; per step: zero, backward, finish.

    Then `pieces()` are to be updated, and `gather` makes the parameters whole again where pieces are shares.
    """

    mesh: Mesh
    placed: Sequence[Placed]
    """Trainable parameters with their placements."""
    overlapped: bool = True
    """False where gradients arrive after the backward pass (reparameterised prefixes)."""
    heads: Sequence[tuple[Placed, nn.Parameter]] = ()
    """(a parameter with a gradient of its own, the placed one that it is the memory of): `TiedHead`."""
    sharded: bool = False
    """Whether each replica updates a share of the parameters only (ZeRO stage 1)."""
    _buckets: list[_Bucket] = field(default_factory=list)
    _passes: int = 0
    _started: int = 0

    def __post_init__(self) -> None:
        # the backward pass finishes the last layers first, so buckets go from last to first
        for kind, run in buckets(self.placed, self.mesh):
            self._add_bucket(kind, run)
        for run in _runs([head for head, _ in self.heads]):
            self._add_bucket(Kind("head", self.mesh.replicas), run)

    def _add_bucket(self, kind: Kind, members: list[Placed]) -> None:
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
        replicas = self.mesh.replicas
        shares = cut_shares([p.numel() for _, p in members], replicas.size) if self.sharded else (0, flat.numel())
        rank = replicas.rank if self.sharded else 0
        scattered = self.sharded and kind.scatters
        self._buckets.append(_Bucket(kind, members, flat, shares, (shares[rank], shares[rank + 1]), scattered))

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
            if first.ready < len(first.members) * self._passes:
                break
            self._start_next()

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        if bucket.scattered:
            sizes = [stop - start for start, stop in pairwise(bucket.shares)]
            bucket.pending = comm.reduce_scatter_start(bucket.flat, bucket.kind.group, sizes)
        else:
            bucket.pending = comm.all_reduce_start(bucket.flat, bucket.kind.group)
        self._started += 1

    def finish(self) -> None:
        """Completes the gradients of all pieces: sums over all tokens of the step, the same on every rank with them."""
        while self._started < len(self._buckets):
            self._start_next()
        for bucket in self._buckets:
            assert bucket.pending is not None
            bucket.pending.wait()
        for (_, head), parameter in self.heads:
            assert parameter.grad is not None and head.grad is not None
            parameter.grad += head.grad
        self._sum_overlaps()
        for bucket in self._buckets:
            if bucket.kind.afterwards is not None:
                comm.all_reduce(bucket.summed, bucket.kind.afterwards)

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
        rank. Each one's sum of squares is gathered over the model's ranks, then added in that order. Of what is
        reduce-scattered the chunks' sums are told to the other replicas before (8 bytes for each `CHUNK`).
        """
        position = {name: i for i, name in enumerate(names)}
        squares = torch.zeros(len(names), dtype=torch.float64)
        for bucket, sums in zip(self._own, self._sums_of_squares(), strict=True):
            counted = [part for spec, parameter in bucket.members for part in _counted(spec, parameter)]
            for (name, chunks), of_chunks in zip(
                counted, sums.split([len(chunks) for _, chunks in counted]), strict=True
            ):
                if chunks:
                    squares[position[name]] += math.fsum(of_chunks.tolist())
        comm.all_reduce(squares, self.mesh.model)
        return math.sqrt(math.fsum(squares.tolist()))

    @property
    def _own(self) -> list[_Bucket]:
        """Those of placed parameters."""
        return [bucket for bucket in self._buckets if bucket.kind.name != "head"]

    def _sums_of_squares(self) -> list[Tensor]:
        """Of each bucket the sums of squares of its parameters' chunks, one parameter after another."""
        sums = [_sums_of_squares(bucket) for bucket in self._own]
        apart = [part for part, bucket in zip(sums, self._own, strict=True) if bucket.scattered]
        if not apart:
            return sums
        # zeros where another replica has the chunk: the sum is exact
        whole_again = iter(comm.all_reduce(torch.cat(apart), self.mesh.replicas).split([len(part) for part in apart]))
        return [next(whole_again) if bucket.scattered else part for part, bucket in zip(sums, self._own, strict=True)]

    def scale(self, factor: float) -> None:
        """Multiplies every gradient."""
        if factor == 1:
            return
        for bucket in self._buckets:
            bucket.summed.mul_(factor)

    def pieces(self) -> list[Piece]:
        """What this rank updates of each parameter, in the order of `placed`; an empty stretch where that is nothing.

        The tensors' `grad`s are views of the buckets: good for every step.
        """
        if not self.sharded:
            return [Piece(spec, parameter) for spec, parameter in self.placed]
        found: dict[int, Piece] = {}
        for bucket in self._own:
            for (spec, parameter), (first, last) in zip(
                bucket.members, stretches(bucket.lengths, bucket.mine), strict=True
            ):
                assert parameter.grad is not None
                part = parameter.detach().view(-1)[first:last]
                part.grad = parameter.grad.view(-1)[first:last]
                found[id(parameter)] = Piece(spec, part, (first, last))
        return [found[id(parameter)] for _, parameter in self.placed]

    def gather(self) -> None:
        """After the update: makes the parameters whole where pieces are shares; all-gathers them over the replicas."""
        if not self.sharded:
            return
        for bucket in self._own:
            gather(Strip.of([parameter for _, parameter in bucket.members]), bucket.shares, self.mesh.replicas)


def buckets(placed: Sequence[Placed], mesh: Mesh) -> list[tuple[Kind, list[Placed]]]:
    """The parameters of each bucket, in the order in which a backward pass fills them."""
    kinds = (
        Kind("cut", mesh.replicas, scatters=True),
        Kind("uncut", mesh.replicas, scatters=True),
        Kind("layers", mesh.replicas),
        Kind("overlap", mesh.replicas),
        Kind("partial", mesh.replicas_tensor),
        Kind("tied", mesh.replicas, mesh.ends, scatters=True),
        Kind("stages", mesh.replicas, mesh.pipeline, scatters=True),
        Kind("partial stages", mesh.replicas_tensor, mesh.pipeline),
    )
    found: list[tuple[Kind, list[Placed]]] = []
    for kind in kinds:
        members = [(spec, parameter) for spec, parameter in placed if _kind_of(spec) == kind.name]
        found += [(kind, run) for run in _runs(list(reversed(members)))]
    return found


def _kind_of(spec: Spec) -> str:
    if spec.pipeline_sum:
        return "partial stages" if spec.reduce == "tensor" else "stages"
    if spec.tied:
        return "tied"
    if spec.reduce != "none":
        return "partial" if spec.reduce == "tensor" else "overlap"
    if spec.layer_dim is not None:
        return "layers"
    return "uncut" if spec.index == whole(spec.shape) else "cut"


def _counted(spec: Spec, parameter: nn.Parameter) -> list[tuple[str, Sequence[Tensor]]]:
    """(name, chunks) of each part of the gradient that is summed as one in norms: what this rank counts of it, each
    chunk as one dimension; none where another rank does."""
    grad = parameter.grad
    assert grad is not None
    found: list[tuple[str, Sequence[Tensor]]] = []
    for name, owned in spec.parts():
        if owned is None:
            found.append((name, ()))
            continue
        own = [slice(o.start - i.start, o.stop - i.start) for o, i in zip(owned, spec.index, strict=True)]
        found.append((name, grad[tuple(own)].reshape(-1).split(CHUNK)))
    return found


def _sums_of_squares(bucket: _Bucket) -> Tensor:
    """float64 [chunks], on the CPU: one parameter after another, zero for chunks outside of a share."""
    zero = torch.zeros((), dtype=torch.float64, device=bucket.flat.device)
    first, last = bucket.mine
    sums = [torch.zeros(0, dtype=torch.float64, device=bucket.flat.device)]
    for at, (spec, parameter) in zip([0, *accumulate(bucket.lengths)], bucket.members, strict=False):
        for _, chunks in _counted(spec, parameter):
            for number, part in enumerate(chunks):
                held = not bucket.scattered or first <= at + number * CHUNK < last
                sums.append((part.double().square().sum() if held else zero)[None])
    return torch.cat(sums).cpu()


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

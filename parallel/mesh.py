"""The mesh: which rank does what, as a value that is built once and passed down.

Axes are (data, pipeline, context, tensor) with tensor innermost, so that the ranks of a tensor group are
neighbours on one host. For data=1 pipeline=1 context=2 tensor=2:

    rank            0     1     2     3
    tensor groups  [0     1]   [2     3]
    context groups [0,2]       [1,3]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product

from parallel import comm
from parallel.comm import Group, Traffic

AXES = ("data", "pipeline", "context", "tensor")


@dataclass(frozen=True)
class Mesh:
    """Every group this rank belongs to. Layers get the one `Group` they need, never the mesh."""

    data: Group = field(default_factory=lambda: Group("data"))
    pipeline: Group = field(default_factory=lambda: Group("pipeline"))
    context: Group = field(default_factory=lambda: Group("context"))
    tensor: Group = field(default_factory=lambda: Group("tensor"))
    ring: Group = field(default_factory=lambda: Group("ring"))
    """Those of the context axis that pass keys on: all of it but for `ulysses`."""
    ulysses: Group = field(default_factory=lambda: Group("ulysses"))
    """Those of the context axis that swap tokens for heads: neighbours on it."""
    replicas: Group = field(default_factory=lambda: Group("data+context"))
    """Ranks with the same parameters, hence those over which gradients are summed."""
    replicas_tensor: Group = field(default_factory=lambda: Group("data+context+tensor"))
    """`replicas` times tensor: for replicated factors whose gradients are partial on each tensor rank."""
    model: Group = field(default_factory=lambda: Group("pipeline+tensor"))
    """Ranks that together hold one copy of the model."""
    ends: Group = field(default_factory=lambda: Group("ends"))
    """First and last stage, which share tied embeddings; one rank elsewhere."""
    world: Group = field(default_factory=lambda: Group("world"))
    traffic: Traffic = field(default_factory=Traffic, compare=False, repr=False)

    @staticmethod
    def single() -> Mesh:
        """One process, all sizes 1, no process group needed."""
        return Mesh()

    @staticmethod
    def build(
        launch: comm.Launch, *, data: int = 1, pipeline: int = 1, context: int = 1, tensor: int = 1, ulysses: int = 1
    ) -> Mesh:
        """The mesh of this job; collective: every rank calls it with the same sizes.

        ulysses: divides `context`; ranks of so many neighbours on the context axis are one rank of its ring.

        Raises AssertionError when the sizes don't multiply to the number of ranks (`conf.check` told the user).
        """
        sizes = (data, pipeline, context, tensor)
        assert data * pipeline * context * tensor == launch.world_size, (sizes, launch.world_size)
        traffic = Traffic()
        here = _coordinates(launch.rank, sizes)

        def over(*axes: str) -> Group:
            return _build(axes, sizes, here, traffic)

        whole = over("context")
        ring, swapping = _context_groups(whole, context // ulysses, sizes, here, traffic)
        return Mesh(
            data=over("data"),
            pipeline=over("pipeline"),
            context=whole,
            ring=ring,
            ulysses=swapping,
            tensor=over("tensor"),
            replicas=over("data", "context"),
            replicas_tensor=over("data", "context", "tensor"),
            model=over("pipeline", "tensor"),
            ends=_ends(sizes, here, traffic),
            world=over(*AXES),
            traffic=traffic,
        )

    @property
    def label(self) -> str:
        """This rank's place for messages, e.g. `rank 3 tp1 pp0 cp1 dp0`."""
        groups = (self.tensor, self.pipeline, self.context, self.data)
        short = ("tp", "pp", "cp", "dp")
        places = " ".join(f"{name}{group.rank}" for name, group in zip(short, groups, strict=True))
        return f"rank {self.world.rank} {places}"


def _coordinates(rank: int, sizes: Sequence[int]) -> tuple[int, ...]:
    place: list[int] = []
    for size in reversed(sizes):
        place.append(rank % size)
        rank //= size
    return tuple(reversed(place))


def _rank(place: Sequence[int], sizes: Sequence[int]) -> int:
    rank = 0
    for at, size in zip(place, sizes, strict=True):
        rank = rank * size + at
    return rank


def _groups(sizes: Sequence[int], members: Callable[[tuple[int, ...]], list[tuple[int, ...]]]) -> list[list[int]]:
    """All distinct groups, in one order that every rank agrees on."""
    found: dict[tuple[int, ...], None] = {}
    for place in product(*(range(size) for size in sizes)):
        found[tuple(_rank(p, sizes) for p in members(place))] = None
    return [list(ranks) for ranks in found]


def _make(axis: str, groups: list[list[int]], me: int, traffic: Traffic) -> Group:
    mine = Group(axis, 0, (me,), None, traffic)
    for ranks in groups:
        handle = comm.new_handle(ranks)
        if me in ranks:
            mine = Group(axis, ranks.index(me), tuple(ranks), handle, traffic)
    return mine


def _context_groups(
    whole: Group, ring: int, sizes: Sequence[int], here: tuple[int, ...], traffic: Traffic
) -> tuple[Group, Group]:
    """The group of the ring and that of ulysses, out of the context group `whole`."""
    me, each = _rank(here, sizes), whole.size // ring
    alone = Group("ulysses" if each == 1 else "ring", 0, (me,), None, traffic)
    if each == 1:
        return whole, alone
    if ring == 1:
        return alone, whole
    groups = _groups(sizes, lambda place: [(*place[:2], at, place[3]) for at in range(whole.size)])
    rings = [ranks[first::each] for ranks in groups for first in range(each)]
    swaps = [ranks[first : first + each] for ranks in groups for first in range(0, whole.size, each)]
    return _make("ring", rings, me, traffic), _make("ulysses", swaps, me, traffic)


def _build(axes: Sequence[str], sizes: Sequence[int], here: tuple[int, ...], traffic: Traffic) -> Group:
    def members(place: tuple[int, ...]) -> list[tuple[int, ...]]:
        return list(
            product(
                *(range(size) if axis in axes else (at,) for axis, size, at in zip(AXES, sizes, place, strict=True))
            )
        )

    axis = "world" if len(axes) == len(AXES) else "+".join(axes)
    return _make(axis, _groups(sizes, members), _rank(here, sizes), traffic)


def _ends(sizes: Sequence[int], here: tuple[int, ...], traffic: Traffic) -> Group:
    last = sizes[1] - 1

    def members(place: tuple[int, ...]) -> list[tuple[int, ...]]:
        if place[1] not in (0, last) or last == 0:
            return [place]
        return [(place[0], stage, *place[2:]) for stage in (0, last)]

    return _make("ends", _groups(sizes, members), _rank(here, sizes), traffic)

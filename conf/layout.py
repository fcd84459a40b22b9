"""The layout of a launch: which degrees the mesh has, and how layers and rows fall on it."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

from conf.convert import show
from conf.schema import Architecture, Config, ParallelConf

Placement = Literal["loop", "vee"]
CHUNKED = ("interleaved", "zbv")
"""Schedules whose ranks hold several chunks of layers."""


def degrees(parallel: ParallelConf, serving: bool, world_size: int | None) -> tuple[ParallelConf, list[str]]:
    """Fills in the axis that takes the ranks left over (`data` in training, `tensor` in serving).

    Without a `world_size` (nothing is launched yet) that axis stays as it is.

    Returns:
        the layout, and why it does not fit the launch (empty if it does).
    """
    by_default = {"data": parallel.data or 1} if serving else {"tensor": parallel.tensor or 1}
    parallel = replace(parallel, **by_default)
    if world_size is None:
        return parallel, []
    axes = {axis: getattr(parallel, axis) for axis in ("data", "pipeline", "context", "tensor")}
    given = {axis: size for axis, size in axes.items() if size is not None}
    if min(given.values()) < 1:
        return parallel, []  # out of range, which is another rule's to say
    product = 1
    for size in given.values():
        product *= size
    ranks = "1 rank" if product == 1 else f"{product} ranks"
    formula = f"parallel.{' * '.join(f'{axis}={size}' for axis, size in given.items())} = {ranks}"
    if len(given) == 4:
        if product == world_size:
            return parallel, []
        start = f"start {ranks} (torchrun --nproc-per-node={product})"
        return parallel, [f"{formula} but the launch has {world_size}; {start} or change a degree"]
    missing = next(axis for axis in axes if axis not in given)
    if world_size % product:
        advice = f"not a multiple of {product}; start a multiple or change a degree"
        return parallel, [f"{formula} but the launch has {world_size}, {advice}"]
    return replace(parallel, **{missing: world_size // product}), []


def fits(parallel: ParallelConf, architecture: Architecture) -> list[str]:
    """Why a model cannot be cut like this; empty if it can."""
    problems: list[str] = []
    layers, stages = architecture.num_layers, parallel.stages
    chunks = chunks_per_rank(parallel)
    virtual = f"parallel.pipeline={parallel.pipeline} * parallel.virtual_stages={chunks} = {parallel.pipeline * chunks}"
    for unit in ("num_heads", "ffn_width", "vocab_size"):
        most, tensor = getattr(architecture, unit), parallel.tensor
        if tensor is not None and tensor > most:
            problems.append(f"parallel.tensor={tensor} exceeds the model's {unit}={most}; use parallel.tensor<={most}")
    problems += _context(parallel, architecture)
    if parallel.pipeline > layers:
        problems.append(
            f"parallel.pipeline={parallel.pipeline} exceeds the model's num_layers={layers}; "
            f"use parallel.pipeline<={layers}"
        )
    elif parallel.pipeline * chunks > layers:
        problems.append(
            f"{virtual} virtual stages exceed the model's num_layers={layers}; use fewer of one of them, "
            "or parallel.schedule=1f1b or zero_bubble with parallel.virtual_stages=1"
        )
    if stages != "auto" and chunks > 1 and len(stages) != parallel.pipeline * chunks:
        problems.append(
            f"parallel.stages={show(stages)} has {len(stages)} stages but {virtual}; "
            "give the layers of each virtual stage, in the model's order"
        )
    if stages != "auto" and chunks == 1 and len(stages) != parallel.pipeline:
        problems.append(
            f"parallel.stages={show(stages)} has {len(stages)} stages but "
            f"parallel.pipeline={parallel.pipeline}; give one number of layers per stage"
        )
    if stages != "auto" and sum(stages) != layers:
        problems.append(f"parallel.stages={show(stages)} adds up to {sum(stages)} but the model's num_layers={layers}")
    return problems


def _context(parallel: ParallelConf, architecture: Architecture) -> list[str]:
    """Why Ulysses cannot cut the heads of a tensor rank."""
    tensor, size = parallel.tensor or 1, parallel.ulysses_size
    heads, groups = architecture.num_heads, architecture.num_kv_heads
    fewest = heads // tensor
    if tensor <= groups:  # whole groups may be cut instead, which are less even
        fewest = min(fewest, groups // tensor * (heads // groups))
    if size <= fewest or tensor > heads:
        return []
    key = "parallel.context" if parallel.ulysses is None else "parallel.ulysses"
    each = f"the {fewest} query heads of a tensor rank" if tensor > 1 else f"the model's num_heads={heads}"
    fitting = max(degree for degree in range(1, fewest + 1) if parallel.context % degree == 0)
    advice = f"parallel.ulysses={fitting}, with rings of {parallel.context // fitting}, or parallel.context_method=ring"
    return [f"{key}={size} with context_method=ulysses exceeds {each}; use {advice}"]


def chunks_per_rank(parallel: ParallelConf) -> int:
    """`parallel.virtual_stages`, as set or by the schedule."""
    return parallel.virtual_stages or (2 if parallel.schedule in CHUNKED else 1)


def scheduled(parallel: ParallelConf) -> list[str]:
    """Why the schedule cannot have so many chunks of layers per rank; empty if it can."""
    schedule, chunks = parallel.schedule, chunks_per_rank(parallel)
    if schedule == "interleaved" and chunks == 1:
        return [
            "parallel.virtual_stages=1 leaves parallel.schedule=interleaved nothing to interleave; "
            "use parallel.virtual_stages>=2, or parallel.schedule=1f1b"
        ]
    if schedule == "zbv" and chunks != 2:
        return [
            f"parallel.virtual_stages={chunks} does not fit parallel.schedule=zbv, whose ranks hold 2 chunks; "
            "use parallel.virtual_stages=2, or parallel.schedule=interleaved"
        ]
    if schedule not in CHUNKED and chunks != 1:
        return [
            f"parallel.virtual_stages={chunks} does not fit parallel.schedule={schedule}, whose ranks hold 1 chunk; "
            "use parallel.virtual_stages=1, or parallel.schedule=interleaved"
        ]
    return []


def placement(parallel: ParallelConf) -> Placement:
    """How the schedule's plan places a rank's chunks in the model."""
    return "vee" if parallel.schedule == "zbv" else "loop"


def virtual_stages(pipeline: int, chunks: int, placement: Placement) -> list[tuple[int, ...]]:
    """By pipeline rank the virtual stages (places in the model) of its chunks, as in `parallel.pipeline.plan`."""
    if placement == "vee":
        return [(rank, 2 * pipeline - 1 - rank)[:chunks] for rank in range(pipeline)]
    return [tuple(range(rank, pipeline * chunks, pipeline)) for rank in range(pipeline)]


def balanced_stages(
    architecture: Architecture, pipeline: int, chunks: int = 1, placement: Placement = "loop"
) -> tuple[int, ...]:
    """Layers per virtual stage, in the order of the model: `pipeline * chunks` counts, each at least one.

    The heaviest rank, in weights read per token over its chunks, is as light as can be, and with that the heaviest
    virtual stage. The last one also runs the head, which weighs several layers in a small model; lookups are free.
    `placement` says which virtual stages a rank has, as in `parallel.pipeline.plan`.
    """
    a = architecture
    attention = a.width * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    layer = attention + 3 * a.width * a.ffn_width
    holders = {v: rank for rank, held in enumerate(virtual_stages(pipeline, chunks, placement)) for v in held}
    ranks = [holders[v] for v in range(pipeline * chunks)]
    return balanced(a.num_layers, layer, [0] * (len(ranks) - 1) + [a.vocab_size * a.width], ranks)


def balanced(layers: int, layer: float, extras: Sequence[float], ranks: Sequence[int]) -> tuple[int, ...]:
    """Layers per virtual stage, at least one each: the lightest heaviest rank, then the lightest heaviest stage.

    A further layer goes to the lightest rank with a stage that may still grow, the first of equals, and there to the
    lightest such stage. (That alone keeps ranks under their limit: if the lightest had no room, none would.)

    Args:
        layers: how many there are, at least one per virtual stage.
        layer: what one weighs, above 0.
        extras: what each virtual stage weighs besides its layers (embedding, head).
        ranks: the rank that holds each virtual stage, 0 and up.
    """
    of_rank = [[v for v, holder in enumerate(ranks) if holder == rank] for rank in range(max(ranks) + 1)]
    more = layers - len(ranks)
    rank_base = [sum(extras[v] + layer for v in stages) for stages in of_rank]
    rank_room = _rooms(rank_base, layer, more, lambda rooms: sum(rooms))
    stage_room = _rooms(
        [extra + layer for extra in extras],
        layer,
        more,
        lambda rooms: sum(
            min(room, sum(rooms[v] for v in stages)) for room, stages in zip(rank_room, of_rank, strict=True)
        ),
    )
    counts = [1] * len(ranks)
    weights = [extra + layer for extra in extras]
    for _ in range(more):
        open_stages = [[v for v in stages if counts[v] <= stage_room[v]] for stages in of_rank]
        rank = min(
            (rank for rank, stages in enumerate(open_stages) if stages),
            key=lambda rank: sum(weights[v] for v in of_rank[rank]),
        )
        lightest = min(open_stages[rank], key=lambda v: weights[v])
        counts[lightest] += 1
        weights[lightest] += layer
    return tuple(counts)


def _rooms(bases: Sequence[float], layer: float, more: int, holds: Callable[[Sequence[int]], int]) -> list[int]:
    """Layers that fit on each base under the lowest limit with which all `more` find room."""
    limits = sorted({base + layer * count for base in bases for count in range(more + 1)})
    low, high = bisect_left(limits, max(bases)), len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        rooms = [int((limits[middle] - base) / layer + 1e-9) for base in bases]
        low, high = (low, middle) if holds(rooms) >= more else (middle + 1, high)
    return [int((limits[low] - base) / layer + 1e-9) for base in bases]


def microbatches(config: Config) -> int:
    """Microbatches per data rank: as set, else 1, with a pipeline 2 x stages but at most the rows of a data rank."""
    parallel = config.parallel
    rows = -(-config.train.batch_size // (parallel.data or 1))
    return parallel.microbatches or (1 if parallel.pipeline == 1 else min(2 * parallel.pipeline, rows))

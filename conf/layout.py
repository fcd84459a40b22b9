"""The layout of a launch: which degrees the mesh has, and how layers and rows fall on it."""

from __future__ import annotations

from dataclasses import replace

from conf.convert import show
from conf.schema import Architecture, Config, ParallelConf


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
    if stages != "auto" and len(stages) != parallel.pipeline:
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


def balanced_stages(architecture: Architecture, pipeline: int) -> tuple[int, ...]:
    """Layers per stage such that the largest stage, in weights read per token, is as small as can be.

    The last stage also runs the head, which weighs several layers in a small model; lookups are free.
    Each stage gets a layer; each further one goes to the stage that is smallest then, the first of equals.
    """
    a = architecture
    attention = a.width * a.head_dim * 2 * (a.num_heads + a.num_kv_heads)
    layer = attention + 3 * a.width * a.ffn_width
    weights = [layer] * pipeline
    weights[-1] += a.vocab_size * a.width
    counts = [1] * pipeline
    for _ in range(a.num_layers - pipeline):
        smallest = weights.index(min(weights))
        weights[smallest] += layer
        counts[smallest] += 1
    return tuple(counts)


def microbatches(config: Config) -> int:
    """Microbatches per data rank: as set, else 1, with a pipeline 2 x stages but at most the rows of a data rank."""
    parallel = config.parallel
    rows = -(-config.train.batch_size // (parallel.data or 1))
    return parallel.microbatches or (1 if parallel.pipeline == 1 else min(2 * parallel.pipeline, rows))

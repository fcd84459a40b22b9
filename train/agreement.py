"""Whether the ranks of a data rank are about to compute on the same tokens: asked before every pass over the model.

Each of them makes the microbatches for itself, from its own files. Where these differ (a host with an older copy) the
ranks would otherwise wait for messages of other sizes, or train on a mixture without a word.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch

from conf.schema import ConfigError
from parallel import comm
from parallel.mesh import Mesh
from train.batches import Microbatch


def check(batches: Sequence[Microbatch], mesh: Mesh) -> None:
    """Collective over the world: gathers two integers a rank, and more only if they differ.

    batches: whole packs, before context ranks share them. Raises ConfigError, on every rank and with the same message,
    when ranks with one place on the data axis have different tokens, documents or targets.
    """
    world, data = mesh.world, mesh.data
    if world.size == data.size:
        return
    mine = torch.tensor([[data.rank, _digest(batches)]])
    found = comm.all_gather(mine, world, [1] * world.size, 0).tolist()
    expected: dict[int, int] = {}
    if all(expected.setdefault(place, digest) == digest for place, digest in found):
        return
    counts = torch.tensor([[batch.num_tokens, batch.num_targets] for batch in batches]).view(-1, 2)
    passes = comm.all_gather(torch.tensor([len(counts)]), world, [1] * world.size, 0).tolist()
    all_counts = comm.all_gather(counts, world, passes, 0).split(passes)
    places: dict[int, dict[int, list[int]]] = {}  # data rank -> digest -> ranks
    for rank, (place, digest) in zip(world.ranks, found, strict=True):
        places.setdefault(place, {}).setdefault(digest, []).append(rank)
    lines = [
        f"data rank {place}: " + ", but ".join(f"{_names(ranks)} {_counted(all_counts[ranks[0]])}" for ranks in sides)
        for place, by_digest in places.items()
        if len(sides := list(by_digest.values())) > 1
    ]
    raise ConfigError(
        f"ranks that share the rows of a step have different ones ({'; '.join(lines)}); "
        "give every host the same data.path and the same tokenizer"
    )


def _digest(batches: Sequence[Microbatch]) -> int:
    digest = 0
    for batch in batches:
        for x in (batch.ids_T, batch.cu_seqlens_B1, batch.target_rows, batch.row_T):
            digest = zlib.crc32(x.numpy().tobytes(), zlib.crc32(str(len(x)).encode(), digest))
    return digest


def _names(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]} has" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} have"


def _counted(counts: torch.Tensor) -> str:
    tokens, targets = ([str(count) for count in column] for column in counts.t().tolist())
    return f"microbatches of {' '.join(tokens)} tokens with {' '.join(targets)} targets"

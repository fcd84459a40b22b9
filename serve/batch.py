"""From a scheduler's plan to the tensors of one forward pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from kernels.dispatch import Ops
from kernels.paged import PagedLayout
from parallel.model.step import Segment
from serve.scheduler import Chunk


@dataclass(frozen=True)
class LoadedAdapter:
    """An adapter as the runner holds it: LoRA factors under `slot`, or a prefix in pages of the cache."""

    name: str
    slot: int | None = None
    """LoRA: where the decoder's linears keep it."""
    pages: tuple[int, ...] = ()
    """Prefix: its block table, pinned in the page pool."""
    length: int = 0
    """Prefix: its entries P; the adapter's requests start at position P."""


@dataclass(frozen=True)
class Batch:
    """T tokens of B chunks, packed in plan order."""

    id_T: Tensor
    """int64 token ids."""
    position_T: Tensor
    """int64 rotary positions, behind the prefix if there is one."""
    slot_T: Tensor
    """int64 flat cache slots."""
    layout: PagedLayout
    segments: tuple[Segment, ...]
    """Tokens of LoRA requests, one segment per adapter."""
    rows: Tensor
    """int64: the last token of each chunk that samples."""

    @property
    def num_tokens(self) -> int:
        """T."""
        return self.id_T.shape[0]


def build(
    chunks: Sequence[Chunk],
    used: Sequence[LoadedAdapter | None],
    ops: Ops,
    page_size: int,
    device: torch.device,
) -> Batch:
    """The batch of a plan's chunks, in which those of one adapter are adjacent. used: the adapter of each."""
    prefixes = [0 if adapter is None else adapter.length for adapter in used]
    layout = ops.paged_layout(
        [chunk.length for chunk in chunks],
        [chunk.end for chunk in chunks],
        [chunk.pages for chunk in chunks],
        page_size=page_size,
        prefix_lengths=prefixes,
        prefix_tables=[() if adapter is None else adapter.pages for adapter in used],
        device=device,
    )
    ids: list[int] = []
    positions: list[int] = []
    slots: list[int] = []
    rows: list[int] = []
    for chunk, prefix in zip(chunks, prefixes, strict=True):
        ids += chunk.tokens
        positions += range(chunk.start + prefix, chunk.end + prefix)
        slots += (chunk.pages[p // page_size] * page_size + p % page_size for p in range(chunk.start, chunk.end))
        if chunk.samples:
            rows.append(len(ids) - 1)
    return Batch(
        id_T=torch.tensor(ids, dtype=torch.int64, device=device),
        position_T=torch.tensor(positions, dtype=torch.int64, device=device),
        slot_T=torch.tensor(slots, dtype=torch.int64, device=device),
        layout=layout,
        segments=segments(chunks, used),
        rows=torch.tensor(rows, dtype=torch.int64, device=device),
    )


def segments(chunks: Sequence[Chunk], used: Sequence[LoadedAdapter | None]) -> tuple[Segment, ...]:
    """Tokens of the chunks that run with LoRA, those of one adapter together."""
    if not any(used):
        return ()
    found: list[Segment] = []
    start = 0
    pairs = zip(chunks, used, strict=True)
    for slot, members in groupby(pairs, key=lambda pair: None if pair[1] is None else pair[1].slot):
        stop = start + sum(chunk.length for chunk, _ in members)
        if slot is not None:
            found.append(Segment(start, stop, slot))
        start = stop
    return tuple(found)

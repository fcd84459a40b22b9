"""The paged KV cache of this rank, and attention over it: the serving counterpart of training's `DocumentAttend`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from conf.schema import Architecture
from kernels.dispatch import Ops
from kernels.memory import Area
from kernels.paged import PagedLayout
from parallel.model.attend import scoring
from parallel.model.decoder import Decoder, Stage
from parallel.model.step import Angles
from parallel.sharding import Cut


@dataclass(frozen=True)
class KvCache:
    """Keys and values of this stage's layers and this rank's KV heads, in pages that the scheduler hands out."""

    first_layer: int
    keys: tuple[Tensor, ...]
    """Per layer [P, S, K/tp, H] in the compute dtype; contents of unused slots are undefined."""
    values: tuple[Tensor, ...]

    @staticmethod
    def allocate(decoder: Decoder, *, num_pages: int, page_size: int) -> KvCache:
        """Reserves the pages for a stage's decoder; memory is touched only as they fill, on a CPU 2 MB at a time."""
        shape = (num_pages, page_size, decoder.here.num_kv_heads, decoder.architecture.head_dim)
        layers, area = range(decoder.stage.start, decoder.stage.stop), Area()

        def pages() -> tuple[Tensor, ...]:
            if decoder.device.type == "cpu":
                return tuple(area.empty(shape, decoder.dtype) for _ in layers)
            return tuple(torch.empty(shape, dtype=decoder.dtype, device=decoder.device) for _ in layers)

        return KvCache(decoder.stage.start, pages(), pages())

    def of(self, layer: int) -> tuple[Tensor, Tensor]:
        """Key and value pages of a global layer."""
        return self.keys[layer - self.first_layer], self.values[layer - self.first_layer]


def page_bytes(architecture: Architecture, here: Cut, stage: Stage, page_size: int, dtype: torch.dtype) -> int:
    """Bytes that one page takes on this rank, over its layers."""
    slot = 2 * here.num_kv_heads * architecture.head_dim * dtype.itemsize
    return (stage.stop - stage.start) * page_size * slot


@dataclass(frozen=True)
class PagedAttend:
    """Attention of one engine step: writes the new keys and values, then reads each request's pages."""

    architecture: Architecture
    here: Cut
    ops: Ops
    cache: KvCache
    layout: PagedLayout
    slot_T: Tensor
    """int64 [T]: flat cache slot of each token."""

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, angles: Angles) -> Tensor:
        """[T, N/tp, H] in q's dtype; q and k come without rotary, in the order of `rope.paired`."""
        keys, values = self.cache.of(layer)
        q_TNH = self.ops.rotary_write(q_TNH, k_TKH, v_TKH, *angles, keys, values, self.slot_T)
        how = scoring(self.architecture, self.here, layer)
        return self.ops.attention_paged(q_TNH, keys, values, self.layout, **how)[0]

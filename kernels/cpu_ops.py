"""The C++ backend: ops of `kernels.reference` for float32 and bfloat16 on CPUs, compiled once per instruction set.

`kernels/cpu/` has the sources. Where the library wasn't built (no compiler at installation), `load` returns None and
torch's kernels do all the work. Paged attention isn't differentiable.
`kernels.cpu_linear` has the linears.
"""

import functools
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import reference
from kernels.paged import PagedLayout

LIBRARY = Path(__file__).with_name("_cpu.so")


def load() -> str | None:
    """Loads the library; returns the instruction set it chose (ONEMESH_CPU_ISA forces one), None if it isn't built.

    Raises:
        RuntimeError: it is built, but doesn't load: for another torch or processor; or the forced one isn't there.
    """
    if not LIBRARY.is_file():
        return None
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise RuntimeError(f"{LIBRARY} doesn't load ({error}); build it again: make clean install") from None
    return torch.ops.onemesh.isa()


class CpuLayout(PagedLayout):
    """The layout with the chunks' numbers in one tensor, made once for all layers of a step."""

    @functools.cached_property
    def chunks(self) -> Tensor:
        """int64 [B, 4]: first query row, queries, keys without the prefix, prefix entries."""
        rows = itertools.pairwise(self.query_starts)
        each = zip(rows, self.kv_lengths, self.prefix_lengths, strict=True)
        numbers = [(start, stop - start, keys, prefix) for (start, stop), keys, prefix in each]
        return torch.tensor(numbers, dtype=torch.int64).view(-1, 4)


def attention_paged(
    q_TNH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    layout: PagedLayout,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`, row-invariant; needs a `CpuLayout`."""
    reference.check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    if not isinstance(layout, CpuLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    layout.check(q_TNH, key_cache_PSKH)
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None")
    if torch.is_grad_enabled() and q_TNH.requires_grad:
        raise ValueError("attention_paged has no gradients; use attention_varlen for training")
    heads = reference.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    return torch.ops.onemesh.attention_paged(
        q_TNH.contiguous(),
        key_cache_PSKH,
        value_cache_PSKH,
        layout.chunks,
        layout.block_table_BM.contiguous(),
        layout.prefix_table_BM.contiguous(),
        torch.tensor(heads, dtype=torch.int64),
        0 if window is None else window,
        scale,
    )

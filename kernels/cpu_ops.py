"""The C++ backend: ops of `kernels.reference` for float32 and bfloat16 on CPUs, compiled once per instruction set.

`kernels/cpu/` has the sources. Where the library wasn't built (no compiler at installation), `load` returns None and
torch's kernels do all the work. Paged attention and linears of packed weights aren't differentiable, the rest is.
"""

import functools
import itertools
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import cpu_rows, reference
from kernels.ops import Packed, Rows
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


PANEL = 48
"""Rows of a weight that stand together (`kernels/cpu/kernels.h`)."""
_STAGE_BYTES = 2 << 20  # larger ones leave holes in the heap between packed weights


def pack(shape: tuple[int, int], dtype: torch.dtype, rows: Rows) -> Packed:
    """The weight in the layout of `kernels/cpu/linear.cpp`, filled from about 2 MB of rows at a time."""
    n, k = shape
    data = torch.ops.onemesh.empty_packed(torch.empty(0, dtype=dtype), n, k)
    step = max(_STAGE_BYTES // max(k * dtype.itemsize * PANEL, 1), 1) * PANEL
    for first in range(0, n, step):
        torch.ops.onemesh.pack_rows(data, rows(first, min(first + step, n)).to(dtype).contiguous(), first)
    return Packed(data, shape)


def linear(
    x_TK: Tensor, w_NK: Tensor | Packed, bias_N: Tensor | None = None, *, plain: Callable[..., Tensor]
) -> Tensor:
    """`reference.linear`, row-invariant: of a packed weight here, without gradients, of another by `plain`."""
    if not isinstance(w_NK, Packed):
        return plain(x_TK, w_NK, bias_N)
    if x_TK.dim() != 2 or x_TK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"linear: x {tuple(x_TK.shape)} and w {w_NK.shape} must be [T, K] and [N, K]")
    if x_TK.requires_grad and torch.is_grad_enabled():
        raise ValueError("linear: a packed weight has no gradients; don't pack weights for training")
    return torch.ops.onemesh.linear(x_TK.contiguous(), w_NK.data, bias_N, w_NK.shape[0])


def embedding(ids_T: Tensor, w_VD: Tensor | Packed) -> Tensor:
    """`reference.embedding`, of a packed weight too."""
    if not isinstance(w_VD, Packed):
        return cpu_rows.embedding(ids_T, w_VD)
    return torch.ops.onemesh.packed_rows(ids_T.contiguous(), w_VD.data, w_VD.shape[0], w_VD.shape[1])


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

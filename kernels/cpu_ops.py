"""The C++ backend: ops of `kernels.reference` for float32 and bfloat16 on CPUs, compiled once per instruction set.

`kernels/cpu/` has the sources. Where the library wasn't built (no compiler at installation), `load` returns None and
torch's kernels do all the work. Paged attention isn't differentiable, the other ops are.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from torch import Tensor

from kernels import autograd, reference
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
        raise RuntimeError(f"{LIBRARY} doesn't load ({error}); build it again: make install") from None
    return torch.ops.onemesh.isa()


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _silu_gate(gate_TF, up_TF)
    return autograd.SiluGate.apply(gate_TF, up_TF, _silu_gate)


def _silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    if gate_TF.shape != up_TF.shape:
        raise ValueError(f"silu_gate: gate {tuple(gate_TF.shape)} and up {tuple(up_TF.shape)} must have one shape")
    return torch.ops.onemesh.silu_gate(gate_TF.contiguous(), up_TF.contiguous())


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rms_norm(x_TD, w_D, eps)
    return autograd.RmsNorm.apply(x_TD, w_D, eps, _rms_norm)


def _rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return torch.ops.onemesh.rms_norm(x_TD.contiguous(), w_D.contiguous(), eps)


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`reference.rotary`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rotary(x_TNH, cos_TH, sin_TH)
    return autograd.Rotary.apply(x_TNH, cos_TH, sin_TH, _rotary)


def _rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    return torch.ops.onemesh.rotary(x_TNH.contiguous(), cos_TH, sin_TH)


@dataclass(frozen=True, kw_only=True)
class CpuLayout(PagedLayout):
    """The layout with the chunks' numbers in one tensor, for all layers of a step."""

    chunks_B4: Tensor
    """int64 first query row, queries, keys without the prefix, prefix entries."""


def paged_layout(
    query_lengths: Sequence[int],
    kv_lengths: Sequence[int],
    block_tables: Sequence[Sequence[int]] | Tensor,
    *,
    page_size: int,
    prefix_lengths: Sequence[int] | None = None,
    prefix_tables: Sequence[Sequence[int]] | Tensor | None = None,
    device: torch.device | str = "cpu",
) -> CpuLayout:
    """`PagedLayout.build` as `attention_paged` reads it."""
    plain = PagedLayout.build(
        query_lengths,
        kv_lengths,
        block_tables,
        page_size=page_size,
        prefix_lengths=prefix_lengths,
        prefix_tables=prefix_tables,
        device=device,
    )
    chunks = zip(plain.query_starts, query_lengths, plain.kv_lengths, plain.prefix_lengths, strict=False)
    return CpuLayout(
        **{f.name: getattr(plain, f.name) for f in fields(plain)},
        chunks_B4=torch.tensor(list(chunks), dtype=torch.int64).view(-1, 4),
    )


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
    """`reference.attention_paged`, row-invariant; needs a layout of this module's `paged_layout`."""
    reference.check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    if not isinstance(layout, CpuLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    layout.check(q_TNH, key_cache_PSKH)
    heads = reference.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    return torch.ops.onemesh.attention_paged(
        q_TNH.contiguous(),
        key_cache_PSKH,
        value_cache_PSKH,
        layout.chunks_B4,
        layout.block_table_BM,
        layout.prefix_table_BM,
        torch.tensor(heads),
        window or 0,
        scale,
    )

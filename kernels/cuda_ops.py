"""The CUDA backend: ops of `kernels.reference` for float32, float16 and bfloat16 on NVIDIA GPUs.

`kernels/cuda/` has the sources, `ONEMESH_CUDA=1 make install` builds them. No GPU has run them: `docs/cuda.md` says
what is known. Where the library isn't built, `load` returns False and the reference does the work. Linears, the
embedding, log-softmax and the attention of training are torch's (or flash-attn's); its linears aren't row-invariant.
"""

import functools
import importlib
import importlib.util
import itertools
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from kernels import autograd, autograd_rows, reference
from kernels.cuda_layout import CudaLayout, heads_of, packed_work
from kernels.documents import Documents

LIBRARY = Path(__file__).with_name("_cuda.so")
SILU, GELU_TANH = 0, 1
"""Codes of activations (`kernels/cuda/kernels.h`)."""


def load() -> bool:
    """Loads the library; False if it isn't built.

    Raises:
        RuntimeError: it is built, but doesn't load: for another torch.
    """
    if not LIBRARY.is_file():
        return False
    try:
        torch.ops.load_library(LIBRARY)
    except OSError as error:
        raise RuntimeError(
            f"{LIBRARY} doesn't load ({error}); build it again: ONEMESH_CUDA=1 make clean install"
        ) from None
    return True


def rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    """`reference.rms_norm`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rms_norm(x_TD, w_D, eps)
    return autograd_rows.RmsNorm.apply(x_TD, w_D, eps, _rms_norm, autograd_rows.rms_norm_backward)


def _rms_norm(x_TD: Tensor, w_D: Tensor, eps: float) -> Tensor:
    return torch.ops.onemesh_cuda.rms_norm(x_TD.contiguous(), w_D.contiguous(), eps)


def add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`reference.add_rms_norm` in one pass, with a lean backward."""
    if not torch.is_grad_enabled():
        return _add_rms_norm(x_TD, delta_TD, w_D, eps)
    return autograd_rows.AddRmsNorm.apply(x_TD, delta_TD, w_D, eps, _add_rms_norm, autograd_rows.rms_norm_backward)


def _add_rms_norm(x_TD: Tensor, delta_TD: Tensor, w_D: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    normed, total = torch.ops.onemesh_cuda.add_rms_norm(x_TD.contiguous(), delta_TD.contiguous(), w_D.contiguous(), eps)
    return total, normed


def rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor) -> Tensor:
    """`reference.rotary`, row-invariant, with a lean backward."""
    if not torch.is_grad_enabled():
        return _rotary(x_TNH, cos_TH, sin_TH, False)
    return autograd_rows.Rotary.apply(x_TNH, cos_TH, sin_TH, _rotary)


def _rotary(x_TNH: Tensor, cos_TH: Tensor, sin_TH: Tensor, inverse: bool) -> Tensor:
    sin_TH = -sin_TH if inverse else sin_TH
    return torch.ops.onemesh_cuda.rotary(x_TNH.contiguous(), cos_TH.contiguous(), sin_TH.contiguous())


def rotary_write(
    q_TNH: Tensor,
    k_TKH: Tensor,
    v_TKH: Tensor,
    cos_TH: Tensor,
    sin_TH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    slots_T: Tensor,
) -> Tensor:
    """`reference.rotary_write` in one pass; the caches have the dtype of k and v. Not differentiable."""
    rows = (x.contiguous() for x in (q_TNH, k_TKH, v_TKH, cos_TH, sin_TH))
    return torch.ops.onemesh_cuda.rotary_write(*rows, key_cache_PSKH, value_cache_PSKH, slots_T.contiguous())


def silu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.silu_gate`, row-invariant, with a lean backward."""
    return _gate(autograd_rows.SILU, SILU, gate_TF, up_TF)


def gelu_gate(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    """`reference.gelu_gate`, row-invariant, with a lean backward."""
    return _gate(autograd_rows.GELU, GELU_TANH, gate_TF, up_TF)


def _gate(gate: autograd_rows.Gate, activation: int, gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    def forward(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
        return torch.ops.onemesh_cuda.gate(gate_TF.contiguous(), up_TF.contiguous(), activation)

    if not torch.is_grad_enabled():
        return forward(gate_TF, up_TF)
    return autograd_rows.Gated.apply(gate_TF, up_TF, forward, gate.backward)


def write_pages(
    key_cache_PSKH: Tensor, value_cache_PSKH: Tensor, k_TKH: Tensor, v_TKH: Tensor, slots_T: Tensor
) -> None:
    """`reference.write_pages`; the caches have the dtype of k and v."""
    torch.ops.onemesh_cuda.write_pages(
        key_cache_PSKH, value_cache_PSKH, k_TKH.contiguous(), v_TKH.contiguous(), slots_T.contiguous()
    )


def attention_paged(
    q_TNH: Tensor,
    key_cache_PSKH: Tensor,
    value_cache_PSKH: Tensor,
    layout: CudaLayout,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: reference.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_paged`, row-invariant; needs a `CudaLayout`. Not differentiable.

    Pages are int64 on the device and aren't looked at here: they have to exist.
    """
    reference.check_attention(q_TNH, key_cache_PSKH, value_cache_PSKH)
    if not isinstance(layout, CudaLayout):
        raise ValueError(f"layout must come from this backend's paged_layout, got {type(layout).__name__}")
    layout.check(q_TNH, key_cache_PSKH)
    reference.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    if torch.is_grad_enabled() and q_TNH.requires_grad:
        raise ValueError("attention_paged has no gradients; use attention_varlen for training")
    index = reference.check_kv_index(q_TNH.shape[1], key_cache_PSKH.shape[2], kv_index)
    heads = heads_of(index, key_cache_PSKH.shape[2], q_TNH.device)
    work = layout.work(window or 0, heads.group)
    return torch.ops.onemesh_cuda.attention_paged(
        q_TNH.contiguous(),
        key_cache_PSKH,
        value_cache_PSKH,
        layout.chunks,
        layout.block_table_BM.contiguous(),
        layout.prefix_table_BM.contiguous(),
        heads.starts,
        heads.order,
        _slopes(alibi_slopes, q_TNH.device),
        work.whole,
        work.split,
        work.merges,
        work.partial_rows,
        work.max_split_queries,
        window or 0,
        scale,
        soft_cap or 0.0,
    )


@functools.cache
def _has_flash_attn() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _slopes(alibi_slopes: reference.Slopes | None, device: torch.device) -> Tensor | None:
    return None if alibi_slopes is None else torch.as_tensor(alibi_slopes, dtype=torch.float32, device=device)


def attention_varlen(
    q_TNH: Tensor,
    k_SKH: Tensor,
    v_SKH: Tensor,
    documents: Sequence[int] | Tensor | Documents,
    *,
    kv_index: Sequence[int] | None = None,
    window: int | None = None,
    scale: float,
    soft_cap: float | None = None,
    alibi_slopes: reference.Slopes | None = None,
) -> tuple[Tensor, Tensor]:
    """`reference.attention_varlen`, row-invariant but by flash-attn, which is taken where it is installed and can.

    It can in 16 bits, with heads shared evenly, without cap and slopes. Where a gradient is asked for, or queries and
    keys differ in number, the reference works: flash-attn has no gradient of lse, and the kernels here no backward.
    """
    reference.check_attention(q_TNH, k_SKH, v_SKH)
    reference.check_options(q_TNH.shape[1], window, soft_cap, alibi_slopes)
    index = reference.check_kv_index(q_TNH.shape[1], k_SKH.shape[1], kv_index)
    wants_grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_TNH, k_SKH, v_SKH))
    if wants_grad or isinstance(documents, Documents):
        options = {"window": window, "soft_cap": soft_cap, "alibi_slopes": alibi_slopes}
        return reference.attention_varlen(q_TNH, k_SKH, v_SKH, documents, kv_index=index, scale=scale, **options)
    bounds = Documents.of(documents, q_TNH.shape[0], k_SKH.shape[0]).query_bounds
    is_plain = autograd.even_group(index, k_SKH.shape[1]) is not None and soft_cap is None and alibi_slopes is None
    if _has_flash_attn() and is_plain and q_TNH.dtype in (torch.float16, torch.bfloat16):
        return _flash_attention(q_TNH, k_SKH, v_SKH, bounds, window, scale)
    heads = heads_of(index, k_SKH.shape[1], q_TNH.device)
    work = packed_work(bounds, window or 0, heads.group, q_TNH.device)
    return torch.ops.onemesh_cuda.attention_varlen(
        q_TNH.contiguous(),
        k_SKH.contiguous(),
        v_SKH.contiguous(),
        work.chunks,
        heads.starts,
        heads.order,
        _slopes(alibi_slopes, q_TNH.device),
        work.whole,
        window or 0,
        scale,
        soft_cap or 0.0,
    )


def _flash_attention(
    q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, bounds: tuple[int, ...], window: int | None, scale: float
) -> tuple[Tensor, Tensor]:
    """(out [T, N, H], lse [T, N]) by flash-attn's varlen function."""
    longest = max((stop - start for start, stop in itertools.pairwise(bounds)), default=0)
    starts = torch.tensor(bounds, dtype=torch.int32, device=q_TNH.device)
    out_TNH, lse_NT, *_ = importlib.import_module("flash_attn").flash_attn_varlen_func(
        q_TNH,
        k_TKH,
        v_TKH,
        cu_seqlens_q=starts,
        cu_seqlens_k=starts,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=scale,
        causal=True,
        window_size=(-1 if window is None else window - 1, 0),
        return_attn_probs=True,  # what makes it return lse
    )
    return out_TNH, lse_NT.transpose(0, 1)

"""Chooses the backend once; everything else receives it as an `Ops` argument."""

import functools
from dataclasses import replace

import torch
from torch import Tensor

from kernels import (
    autograd_merge,
    cpu_attention,
    cpu_linear,
    cpu_loss,
    cpu_ops,
    cpu_rows,
    cuda_attention,
    cuda_linear,
    cuda_loss,
    cuda_ops,
    cuda_prefix,
    cuda_rows,
    invariance,
    reference,
    tiles,
    torch_ops,
)
from kernels.cuda_layout import CudaLayout
from kernels.memory import Area
from kernels.ops import Ops, Rows
from kernels.paged import PagedLayout
from kernels.replay import Recording

__all__ = ["REFERENCE", "Ops", "select", "torch_cpu"]


def unpacked(shape: tuple[int, int], dtype: torch.dtype, rows: Rows, area: Area | None = None) -> Tensor:
    """The weight as it is: for backends without a layout of their own."""
    return rows(0, shape[0]).to(dtype)


def rounded(w_NK: Tensor, dtype: torch.dtype) -> Tensor:
    """A master's values in the compute dtype: for backends without a layout of their own."""
    return w_NK.detach().to(dtype)


REFERENCE = Ops(
    name="reference",
    pack=unpacked,
    pack_master=rounded,
    linear=reference.linear,
    linears=reference.linears,
    input_gradient=reference.input_gradient,
    add_weight_gradient=reference.add_weight_gradient,
    embedding=reference.embedding,
    rms_norm=reference.rms_norm,
    add_rms_norm=reference.add_rms_norm,
    rotary_angles=reference.rotary_angles,
    rotary=reference.rotary,
    silu_gate=reference.silu_gate,
    gelu_gate=reference.gelu_gate,
    log_softmax=reference.log_softmax,
    log_sum_exp=reference.log_sum_exp,
    loss_gradient=reference.loss_gradient,
    attention_varlen=reference.attention_varlen,
    attention_varlen_backward=reference.attention_varlen_backward,
    attention_prefix=reference.attention_prefix,
    merge_attention=reference.merge_attention,
    write_pages=reference.write_pages,
    rotary_write=reference.rotary_write,
    paged_layout=PagedLayout.build,
    attention_paged=reference.attention_paged,
)


def torch_cpu(rule: invariance.RowRule) -> Ops:
    """The torch CPU backend that pads rows by this rule."""
    return Ops(
        name=f"torch-cpu ({rule.linears}; {rule.attention})",
        pack=unpacked,
        pack_master=rounded,
        linear=functools.partial(torch_ops.linear, product=rule.product, min_rows=rule.min_rows),
        linears=functools.partial(torch_ops.linears, product=rule.product, min_rows=rule.min_rows),
        input_gradient=reference.input_gradient,
        add_weight_gradient=functools.partial(torch_ops.add_weight_gradient, product=rule.product),
        embedding=reference.embedding,
        rms_norm=torch_ops.rms_norm,
        add_rms_norm=torch_ops.add_rms_norm,
        rotary_angles=reference.rotary_angles,
        rotary=torch_ops.rotary,
        silu_gate=torch_ops.silu_gate,
        gelu_gate=torch_ops.gelu_gate,
        log_softmax=reference.log_softmax,
        log_sum_exp=reference.log_sum_exp,
        loss_gradient=reference.loss_gradient,
        attention_varlen=torch_ops.attention_varlen,
        attention_varlen_backward=reference.attention_varlen_backward,
        attention_prefix=torch_ops.attention_prefix,
        merge_attention=autograd_merge.merge_attention,
        write_pages=torch_ops.write_pages,
        rotary_write=torch_ops.rotary_write,
        paged_layout=tiles.paged_layout,
        attention_paged=functools.partial(torch_ops.attention_paged, row_multiple=rule.row_multiple),
    )


def compiled(isa: str) -> Ops:
    """The C++ backend; nothing of a step is torch's but plain arithmetic."""
    return replace(
        REFERENCE,
        name=f"cpu {isa}",
        pack=cpu_linear.pack,
        pack_master=cpu_linear.pack_master,
        linear=cpu_linear.linear,
        linears=cpu_linear.linears,
        input_gradient=cpu_linear.input_gradient,
        add_weight_gradient=cpu_linear.add_weight_gradient,
        embedding=cpu_linear.embedding,
        log_sum_exp=cpu_loss.log_sum_exp,
        loss_gradient=cpu_loss.loss_gradient,
        rms_norm=cpu_rows.rms_norm,
        add_rms_norm=cpu_rows.add_rms_norm,
        rotary_angles=cpu_rows.rotary_angles,
        rotary=cpu_rows.rotary,
        silu_gate=cpu_rows.silu_gate,
        gelu_gate=cpu_rows.gelu_gate,
        write_pages=torch_ops.write_pages,
        rotary_write=cpu_rows.rotary_write,
        attention_varlen=cpu_attention.attention_varlen,
        attention_varlen_backward=cpu_attention.attention_varlen_backward,
        attention_prefix=cpu_attention.attention_prefix,
        merge_attention=autograd_merge.merge_attention,
        paged_layout=cpu_attention.CpuLayout.build,
        attention_paged=cpu_attention.attention_paged,
        record=Recording,
    )


CUDA = replace(
    REFERENCE,
    name="cuda",
    linear=cuda_linear.linear,
    linears=cuda_linear.linears,
    input_gradient=cuda_linear.input_gradient,
    add_weight_gradient=cuda_linear.add_weight_gradient,
    log_sum_exp=cuda_loss.log_sum_exp,
    loss_gradient=cuda_loss.loss_gradient,
    embedding=cuda_rows.embedding,
    rms_norm=cuda_rows.rms_norm,
    add_rms_norm=cuda_rows.add_rms_norm,
    rotary=cuda_rows.rotary,
    silu_gate=cuda_rows.silu_gate,
    gelu_gate=cuda_rows.gelu_gate,
    attention_varlen=cuda_attention.attention_varlen,
    attention_varlen_backward=cuda_attention.attention_varlen_backward,
    attention_prefix=cuda_prefix.attention_prefix,
    merge_attention=cuda_prefix.merge_attention,
    write_pages=cuda_rows.write_pages,
    rotary_write=cuda_rows.rotary_write,
    paged_layout=CudaLayout.build,
    attention_paged=cuda_attention.attention_paged,
)
"""The CUDA backend, once `cuda_ops.load` has loaded its library; `rotary_angles` and `log_softmax` are torch's."""


def select(device: torch.device, dtype: torch.dtype) -> Ops:
    """The backend for this device and compute dtype.

    CPU in float32 or bfloat16: the C++ kernels, if they were built; without them and in float16 the torch CPU backend,
    with the row rule measured here (some milliseconds). CUDA in these three: the CUDA kernels, if they were
    built. Everything else, float64 proofs among it: the reference.
    """
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return REFERENCE
    if device.type == "cuda":
        return CUDA if cuda_ops.load() else REFERENCE
    if device.type != "cpu":
        return REFERENCE
    isa = cpu_ops.load() if dtype != torch.float16 else None
    return torch_cpu(invariance.measure_row_rule(dtype)) if isa is None else compiled(isa)

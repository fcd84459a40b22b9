"""The set of functions that a backend offers."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kernels.paged import PagedLayout


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One backend: the functions of `kernels.reference`, with the same signatures and the same meaning.

    `name` says which backend it is; whoever selects it logs it once.
    """

    name: str
    linear: Callable[..., Tensor]
    embedding: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    rotary: Callable[..., Tensor]
    silu_gate: Callable[..., Tensor]
    log_softmax: Callable[..., Tensor]
    attention_varlen: Callable[..., tuple[Tensor, Tensor]]
    attention_prefix: Callable[..., tuple[Tensor, Tensor]]
    merge_attention: Callable[..., tuple[Tensor, Tensor]]
    write_pages: Callable[..., None]
    paged_layout: Callable[..., PagedLayout]
    attention_paged: Callable[..., tuple[Tensor, Tensor]]

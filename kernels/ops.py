"""The set of functions that a backend offers, and the form in which it may keep frozen weights."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged import PagedLayout

Rows = Callable[[int, int], Tensor]
"""Rows first .. last - 1 of a weight: a backend that packs asks for a few at a time."""


@dataclass(frozen=True)
class Packed:
    """A frozen weight in a backend's own layout; only that backend's `linear` and `embedding` read it."""

    data: Tensor
    shape: tuple[int, int]
    """[N, K] of the weight."""

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.data.dtype

    def to(self, dtype: torch.dtype) -> "Packed":
        """Itself: a packed weight has the compute dtype. Raises ValueError for another one."""
        if dtype != self.dtype:
            raise ValueError(f"a weight packed in {self.dtype} can't be used in {dtype}")
        return self


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One backend: the functions of `kernels.reference`, with the same signatures and the same meaning.

    `name` says which backend it is; whoever selects it logs it once.
    """

    name: str
    pack: Callable[[tuple[int, int], torch.dtype, Rows], Tensor | Packed]
    """A frozen weight [N, K] in the form that `linear` and `embedding` read fastest."""
    linear: Callable[..., Tensor]
    embedding: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary: Callable[..., Tensor]
    silu_gate: Callable[..., Tensor]
    gelu_gate: Callable[..., Tensor]
    log_softmax: Callable[..., Tensor]
    attention_varlen: Callable[..., tuple[Tensor, Tensor]]
    attention_prefix: Callable[..., tuple[Tensor, Tensor]]
    merge_attention: Callable[..., tuple[Tensor, Tensor]]
    write_pages: Callable[..., None]
    rotary_write: Callable[..., Tensor]
    paged_layout: Callable[..., PagedLayout]
    attention_paged: Callable[..., tuple[Tensor, Tensor]]

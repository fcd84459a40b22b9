"""The set of functions that a backend offers, and the form in which it may keep frozen weights."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.paged import PagedLayout
from kernels.replay import Recording

Rows = Callable[[int, int], Tensor]
"""Rows first .. last - 1 of a weight: a backend that packs asks for a few at a time."""


class Packed:
    """A frozen weight in a backend's own layout; only that backend's `linear` and `embedding` read it."""

    def __init__(self, data: Tensor, shape: tuple[int, int], transpose: "Callable[[Packed], Packed]") -> None:
        """`shape`: [N, K] of the weight. `transpose` makes the pack of its transpose."""
        self.data, self.shape = data, shape
        self._transpose = transpose

    @property
    def dtype(self) -> torch.dtype:
        """Of the elements."""
        return self.data.dtype

    def to(self, dtype: torch.dtype) -> "Packed":
        """Itself: a packed weight has the compute dtype. Raises ValueError for another one."""
        if dtype != self.dtype:
            raise ValueError(f"a weight packed in {self.dtype} can't be used in {dtype}")
        return self

    def transposed(self) -> "Packed":
        """The pack of the transpose, which gradients need: made anew each time.

        Kept, it would double the memory of the frozen weights; to make it takes about as long as to read and write it.
        """
        return self._transpose(self)


Weight = Tensor | Packed
"""A matrix [N, K] of a linear: in the compute dtype or, where it trains, as its master in float32."""


@dataclass(frozen=True, kw_only=True)
class LowRank:
    """The update `(x a^T) b^T` of rows start .. stop - 1 of a linear (LoRA, arXiv:2106.09685, sec. 4.1)."""

    start: int
    stop: int
    a_RK: Weight
    b_NR: Weight
    """Scale included."""
    x_TK: Tensor | None = None
    """What `a` multiplies, [stop - start, K]; the linear's own x if None (dropout makes it another)."""


@dataclass(frozen=True)
class Part:
    """One of several linears of the same x."""

    w_NK: Weight
    bias_N: Tensor | None = None
    updates: Sequence[LowRank] = ()


@dataclass(frozen=True, kw_only=True)
class Ops:
    """One backend: the functions of `kernels.reference`, with the same signatures and the same meaning.

    `name` says which backend it is; whoever selects it logs it once.
    """

    name: str
    pack: Callable[..., Tensor | Packed]
    """(shape, dtype, rows, area=None): a frozen weight [N, K] in the form that `linear` and `embedding` read fastest,
    in the memory of `area` if it is laid out anew; an area keeps its blocks until the last weight in them is gone."""
    pack_master: Callable[[Tensor, torch.dtype], Weight]
    """A weight that trains as several products of one pass read it fastest, in their dtype. Has no gradient."""
    linear: Callable[..., Tensor]
    linears: Callable[[Tensor, Sequence[Part]], tuple[Tensor, ...]]
    input_gradient: Callable[[Tensor, Weight], Tensor]
    add_weight_gradient: Callable[[Tensor, Tensor, Tensor], None]
    embedding: Callable[..., Tensor]
    rms_norm: Callable[..., Tensor]
    add_rms_norm: Callable[..., tuple[Tensor, Tensor]]
    rotary_angles: Callable[[Tensor, Tensor, float, torch.dtype], tuple[Tensor, Tensor]]
    rotary: Callable[..., Tensor]
    silu_gate: Callable[..., Tensor]
    gelu_gate: Callable[..., Tensor]
    log_softmax: Callable[..., Tensor]
    log_sum_exp: Callable[[Tensor], Tensor]
    loss_gradient: Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
    attention_varlen: Callable[..., tuple[Tensor, Tensor]]
    attention_varlen_backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    attention_prefix: Callable[..., tuple[Tensor, Tensor]]
    merge_attention: Callable[..., tuple[Tensor, Tensor]]
    write_pages: Callable[..., None]
    rotary_write: Callable[..., Tensor]
    paged_layout: Callable[..., PagedLayout]
    attention_paged: Callable[..., tuple[Tensor, Tensor]]
    record: Callable[[Callable[[], Tensor]], Recording] | None = None
    """Runs a function and keeps its kernel calls, where the backend can replay them."""

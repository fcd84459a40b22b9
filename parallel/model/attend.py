"""Attention of a training or evaluation step: packed documents, optionally behind a P-tuning v2 prefix."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypedDict

from torch import Tensor

from conf.schema import Architecture
from kernels.dispatch import Ops
from parallel.context.attention import ContextAttention
from parallel.model import alibi
from parallel.model.rope import paired
from parallel.model.step import Angles
from parallel.sharding import Cut


def window_of(architecture: Architecture, layer: int) -> int | None:
    """Sliding window of a layer (a query sees itself and the window - 1 tokens before it), None for all tokens."""
    if architecture.sliding_window is None:
        return None
    if architecture.window_layers is not None and not architecture.window_layers[layer]:
        return None
    return architecture.sliding_window


def uses_local_rope(architecture: Architecture, layer: int) -> bool:
    """Whether a layer's rotary frequencies have the base of windowed layers (Gemma 3) and not the model's."""
    return architecture.window_rope_theta is not None and window_of(architecture, layer) is not None


class Scoring(TypedDict):
    """What the attention ops take besides tensors, for queries and keys of one document."""

    kv_index: tuple[int, ...]
    window: int | None
    scale: float
    soft_cap: float | None
    alibi_slopes: tuple[float, ...] | None


def scoring(architecture: Architecture, here: Cut, layer: int) -> Scoring:
    """How this rank's heads score keys in a layer: the same in training and in serving."""
    return {
        "kv_index": here.kv_index,
        "window": window_of(architecture, layer),
        "scale": architecture.score_scale,
        "soft_cap": architecture.score_cap,
        "alibi_slopes": alibi.slopes(architecture.num_heads)[slice(*here.heads)] if architecture.alibi else None,
    }


@dataclass(frozen=True)
class DocumentAttend:
    """Causal attention inside each packed document; no token sees another document."""

    architecture: Architecture
    here: Cut
    ops: Ops
    cu_seqlens: Sequence[int]
    """Host integers [B + 1]; document b is tokens cu_seqlens[b] .. cu_seqlens[b + 1] - 1."""
    prefix: Sequence[tuple[Tensor, Tensor]] | None = None
    """Per local layer the prefix's keys and values [P, K/tp, H], seen by every token, without rotary."""
    first_layer: int = 0
    """Global number of this stage's first layer, where `prefix` starts."""
    context: ContextAttention | None = None
    """Where the tokens are a context rank's share of the documents: what attends instead."""

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, angles: Angles) -> Tensor:
        """[T, N/tp, H] in q's dtype; q and k come without rotary, in the order of `rope.paired`."""
        q_TNH, k_TKH = self.ops.rotary(q_TNH, *angles), self.ops.rotary(k_TKH, *angles)
        how = scoring(self.architecture, self.here, layer)
        if self.context is None:
            out, lse = self.ops.attention_varlen(q_TNH, k_TKH, v_TKH, self.cu_seqlens, **how)
        else:
            out, lse = self.context(self.ops, q_TNH, k_TKH, v_TKH, **how)
        if self.prefix is None:
            return out
        key, value = self.prefix[layer - self.first_layer]
        part = self.ops.attention_prefix(
            q_TNH,
            paired(key.to(q_TNH.dtype), self.architecture),
            value.to(q_TNH.dtype),
            kv_index=how["kv_index"],
            scale=how["scale"],
            soft_cap=how["soft_cap"],
        )
        return self.ops.merge_attention((part, (out, lse)))[0]

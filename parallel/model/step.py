"""What one forward pass of the decoder is about, as plain frozen data.

Training, evaluation and paged serving run the same decoder; they differ only in the `Step` they build.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from torch import Tensor

from parallel.randomness import DropoutKey
from parallel.sequence import Split

Angles = tuple[Tensor, Tensor]
"""cos and sin [T, H] of the tokens' rotary angles, in the working dtype."""


class Attend(Protocol):
    """Attention of this step's tokens; knows where keys and values are kept and who sees what."""

    def __call__(self, layer: int, q_TNH: Tensor, k_TKH: Tensor, v_TKH: Tensor, angles: Angles) -> Tensor:
        """Turns q and k by the angles and attends in global layer `layer` with local heads -> [T, N, H] in q's dtype.

        Rotary embedding is here because serving turns keys on their way into the cache.
        """
        ...


@dataclass(frozen=True)
class Segment:
    """Tokens [start, stop) of the step use the adapter in `slot`."""

    start: int
    stop: int
    slot: int


@dataclass(frozen=True)
class Step:
    """Arguments of `Decoder.forward` beside the tokens themselves."""

    position_T: Tensor
    """int64 [T]: rotary position of each token."""
    attend: Attend
    adapters: tuple[Segment, ...] = ()
    """Disjoint, ascending; tokens outside every segment use the plain model."""
    rows: Tensor | None = None
    """int64: tokens whose last hidden state is wanted, None for all; ascending where tokens are split."""
    dropout: DropoutKey | None = None
    """None in evaluation and serving: no dropout."""
    split: Split | None = None
    """How the tokens are shared out between the tensor regions (sequence parallelism); None: every rank has all."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass computes again (`parallel.recompute`); full keeps only each block's input."""

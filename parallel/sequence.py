"""Sequence parallelism: which of a step's tokens each tensor rank holds between the tensor regions.

There (norms, additions to the residual stream, what passes between stages) every token stands for itself, so each rank
of a tensor group keeps its share instead of a copy of all of them (arXiv:2205.05198, sec. 4.2.2, fig. 5):

    rank 0   x[0:4]  norm      attention of its heads,           + norm      mlp of its columns,        +
    rank 1   x[4:7]  norm  g   all 7 tokens              g-bar   + norm  g   all 7 tokens        g-bar  +
                      [4, D]          [7, D]                 [4, D]

`regions` has g and g-bar. Shares are contiguous and balanced, of any number of tokens: fewer than ranks, or none.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from parallel.comm import Group
from parallel.sharding import partition


@dataclass(frozen=True)
class Split:
    """Rows of a tensor over the ranks of a group: rank r holds rows offsets[r] .. offsets[r + 1] - 1."""

    offsets: tuple[int, ...]
    rank: int

    @staticmethod
    def of(tokens: int, tensor: Group) -> Split:
        """This rank's place in the balanced split of so many tokens."""
        return Split(partition(tokens, tensor.size), tensor.rank)

    @property
    def sizes(self) -> tuple[int, ...]:
        """Rows of each rank."""
        return tuple(stop - start for start, stop in pairwise(self.offsets))

    @property
    def size(self) -> int:
        """Rows of this rank."""
        return self.sizes[self.rank]

    def of_rows(self, rows_B: Tensor) -> Split:
        """How chosen rows, ascending int64 [B], fall on the ranks; waits for a device that holds them."""
        inner = torch.tensor(self.offsets[1:-1], dtype=rows_B.dtype, device=rows_B.device)
        return Split((0, *torch.searchsorted(rows_B, inner).tolist(), len(rows_B)), self.rank)

    def local(self, rows_B: Tensor) -> Tensor:
        """Those of ascending rows that this rank holds, counted from its first one: int64 [B_r]."""
        chosen = self.of_rows(rows_B).offsets
        return rows_B[chosen[self.rank] : chosen[self.rank + 1]] - self.offsets[self.rank]

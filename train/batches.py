"""From a dataset to the packed tensors of a microbatch: which rows, on which rank, in which order.

step rows      rows 17 3 8 21 5 11 2     order(...): from (seed, step) alone, the same for every layout
data ranks     [17 3 8 21] [5 11 2]      contiguous, balanced, the first ones larger
microbatches   [17 3][8 21] [5 11][2]    the same again inside each data rank
packing        [17 17 17 3 3]            one microbatch: its rows end to end, borders in cu_seqlens
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from parallel.context.plan import Plan
from parallel.sharding import partition
from train.data import Row

Item = TypeVar("Item")


def epoch_order(num_rows: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The permutation of the rows that epoch `epoch` (from 0) goes through: int64 [num_rows].

    A stable sort of raw Philox words keyed by (seed, epoch) (Salmon et al., SC 2011). Raw words and a stable
    sort are the same in every numpy version, which `Generator.permutation` does not promise.
    """
    key = np.array([seed % 2**64, epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(num_rows), kind="stable").astype(np.int64)


@dataclass(eq=False)
class StepOrder:
    """The rows of any step, from (seed, step) alone; keeps the permutations of the last step's epochs.

    Step s (from 1) takes positions (s - 1) * batch_size to s * batch_size of the endless sequence
    epoch 0, epoch 1, ...; a step may straddle epochs, and nothing needs replaying to resume at any step.
    """

    num_rows: int
    seed: int
    batch_size: int
    _epochs: dict[int, NDArray[np.int64]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        assert self.num_rows > 0 and self.batch_size > 0, (self.num_rows, self.batch_size)

    def rows(self, step: int) -> list[int]:
        """Row numbers of `step` (from 1), batch_size of them, in training order."""
        assert step >= 1, step
        first = (step - 1) * self.batch_size
        places = [divmod(first + i, self.num_rows) for i in range(self.batch_size)]
        needed = {epoch for epoch, _ in places}
        self._epochs = {
            epoch: self._epochs[epoch] if epoch in self._epochs else epoch_order(self.num_rows, self.seed, epoch)
            for epoch in needed
        }
        return [int(self._epochs[epoch][place]) for epoch, place in places]


def order(num_rows: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Row numbers of one step (from 1); see `StepOrder`, which is quicker over many steps."""
    return StepOrder(num_rows, seed, batch_size).rows(step)


def microbatches(rows: Sequence[Item], data_size: int, data_rank: int, count: int) -> list[list[Item]]:
    """The `count` microbatches of one data rank: a contiguous balanced partition of a partition.

    Counts need not divide; with fewer rows than ranks x count some lists are empty, and are still returned,
    because their rank takes part in the collectives.
    """
    ranks = partition(len(rows), data_size)
    own = rows[ranks[data_rank] : ranks[data_rank + 1]]
    borders = partition(len(own), count)
    return [list(own[start:stop]) for start, stop in pairwise(borders)]


@dataclass(frozen=True, kw_only=True, eq=False)
class Microbatch:
    """Packed rows of one forward pass. T tokens, B documents, M trained tokens; B and M may be 0, so may T.

    The hidden state of token target_rows[m] predicts target_ids[m], which is the next token of its document
    and a trained one; so a document's first token is never a target and no document sees another.
    """

    ids_T: torch.Tensor
    """int64 [T] token ids."""
    positions_T: torch.Tensor
    """int64 [T] position of each token in its document, from 0."""
    cu_seqlens_B1: torch.Tensor
    """int32 [B + 1] document borders: document b is tokens cu_seqlens[b]:cu_seqlens[b + 1]."""
    target_rows: torch.Tensor
    """int64 [M] ascending token numbers whose output is trained."""
    target_ids: torch.Tensor
    """int64 [M] the token each of them should predict."""
    row_T: torch.Tensor
    """int64 [T] the data row number of each token: keys dropout, so that no layout changes it."""
    max_seqlen: int
    """Tokens of the longest document (0 when empty)."""
    plan: Plan | None = None
    """How context ranks share the pack: of all its tokens only this rank's are here, but cu_seqlens and max_seqlen are
    those of the whole. None: all tokens are here."""

    @property
    def num_tokens(self) -> int:
        """T, known without a device synchronisation."""
        return self.ids_T.shape[0]

    @property
    def num_targets(self) -> int:
        """M, known without a device synchronisation."""
        return self.target_rows.shape[0]

    def to(self, device: torch.device) -> Microbatch:
        """The same microbatch on `device`."""
        return replace(
            self,
            ids_T=self.ids_T.to(device),
            positions_T=self.positions_T.to(device),
            cu_seqlens_B1=self.cu_seqlens_B1.to(device),
            target_rows=self.target_rows.to(device),
            target_ids=self.target_ids.to(device),
            row_T=self.row_T.to(device),
        )


def pack(rows: Sequence[Row]) -> Microbatch:
    """One microbatch that holds `rows` end to end; no rows give an empty one (T = 0, cu_seqlens = [0])."""
    lengths = np.array([len(row.ids) for row in rows], dtype=np.int64)
    borders = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    ids = np.concatenate([row.ids for row in rows] or [np.zeros(0, np.int32)]).astype(np.int64)
    trained = np.concatenate([row.targets for row in rows] or [np.zeros(0, np.bool_)])
    trained[borders[:-1]] = False
    (targets,) = np.nonzero(trained)
    numbers = np.array([row.index for row in rows], dtype=np.int64)
    return Microbatch(
        ids_T=torch.from_numpy(ids),
        positions_T=torch.from_numpy(np.arange(len(ids), dtype=np.int64) - np.repeat(borders[:-1], lengths)),
        cu_seqlens_B1=torch.from_numpy(borders.astype(np.int32)),
        target_rows=torch.from_numpy(targets - 1),
        target_ids=torch.from_numpy(ids[targets]),
        row_T=torch.from_numpy(np.repeat(numbers, lengths)),
        max_seqlen=int(lengths.max(initial=0)),
    )


def share(batch: Microbatch, plan: Plan, ring: int, ulysses: int) -> Microbatch:
    """What the rank at these places of the context axis holds of a pack: its tokens, in order, and their targets."""
    tokens = torch.cat([torch.arange(some.start, some.stop) for some in plan.share(ring, ulysses)])
    place = torch.full((batch.num_tokens,), -1)
    place[tokens] = torch.arange(len(tokens))
    rows = place[batch.target_rows]
    return replace(
        batch,
        ids_T=batch.ids_T[tokens],
        positions_T=batch.positions_T[tokens],
        row_T=batch.row_T[tokens],
        target_rows=rows[rows >= 0],
        target_ids=batch.target_ids[rows >= 0],
        plan=plan,
    )


def packs(rows: Sequence[Row], packing: bool) -> list[Microbatch]:
    """The forward passes of one microbatch: one of all rows (data.packing=true) or one a row.

    Never an empty list: a microbatch without rows is one empty pass.
    """
    return [pack(rows)] if packing or not rows else [pack([row]) for row in rows]

"""Which queries of a pack see which of its keys: an argument of `attention_varlen`."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Documents:
    """B documents whose queries and keys may differ in number, as in a step of ring attention (arXiv:2310.01889).

    Query i of document b (rows query_bounds[b] + i) sees the keys j of that document (rows key_bounds[b] + j) with
    `j <= i + offsets[b]`. Three queries and four keys:

        offset -1   offset 0    offset 1    offset 4: all keys
        0 0 0 0     1 0 0 0     1 1 0 0     1 1 1 1
        1 0 0 0     1 1 0 0     1 1 1 0     1 1 1 1
        1 1 0 0     1 1 1 0     1 1 1 1     1 1 1 1

    With a window those with `i + offsets[b] - j < window` alone.
    """

    query_bounds: tuple[int, ...]
    """[B + 1], from 0 to the rows of q."""
    key_bounds: tuple[int, ...]
    """[B + 1], from 0 to the rows of k and v."""
    offsets: tuple[int, ...]
    """[B]"""

    @classmethod
    def of(cls, documents: "Sequence[int] | Tensor | Documents", num_queries: int, num_keys: int) -> Self | "Documents":
        """Bounds `cu_seqlens` of causal documents, or what is already one; ValueError if it doesn't fit q and k."""
        if not isinstance(documents, Documents):
            bounds = tuple(documents.tolist() if isinstance(documents, Tensor) else documents)
            check_bounds("cu_seqlens", bounds, num_queries, "q")
            if num_keys != num_queries:
                raise ValueError(f"k has {num_keys} rows, q {num_queries}; pass Documents where they differ")
            return cls(query_bounds=bounds, key_bounds=bounds, offsets=(0,) * (len(bounds) - 1))
        check_bounds("query_bounds", documents.query_bounds, num_queries, "q")
        check_bounds("key_bounds", documents.key_bounds, num_keys, "k")
        if not len(documents.query_bounds) == len(documents.key_bounds) == len(documents.offsets) + 1:
            raise ValueError(
                f"query_bounds, key_bounds and offsets have {len(documents.query_bounds)}, {len(documents.key_bounds)} "
                f"and {len(documents.offsets)} entries; for B documents they have B + 1, B + 1 and B"
            )
        return documents

    @property
    def spans(self) -> list[tuple[slice, slice, int]]:
        """Rows of q, rows of k and offset of every document."""
        pairs = (itertools.pairwise(bounds) for bounds in (self.query_bounds, self.key_bounds))
        return [(slice(*q), slice(*k), offset) for q, k, offset in zip(*pairs, self.offsets, strict=True)]

    def table(self) -> Tensor:
        """int64 [B, 3]: queries, keys and offset of every document."""
        rows = [(q.stop - q.start, k.stop - k.start, offset) for q, k, offset in self.spans]
        return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


def check_bounds(name: str, bounds: Sequence[int], num_rows: int, rows: str) -> None:
    """ValueError unless the bounds rise from 0 to the number of rows."""
    if not bounds or bounds[0] != 0 or bounds[-1] != num_rows or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(f"{name}={list(bounds)} must rise from 0 to the {num_rows} packed tokens of {rows}")

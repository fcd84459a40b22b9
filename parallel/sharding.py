"""The sharding table: which block of every parameter each tensor rank holds. Declared once, here.

Loading, saving, resharding, adapter placement, gradient reduction and serving all read it. What is cut are
*units* (KV groups with their query heads, ffn columns, vocabulary rows), balanced and uneven where they don't
divide, so no padding exists anywhere. Where that balances the ranks better the query heads are cut instead and each
rank holds the KV heads its query heads read, so that a KV head may live on several ranks:

    9 query heads, 3 KV heads    tensor=2      tensor=3            tensor=4
    query heads                  0-4 | 5-8     0-2 | 3-5 | 6-8     0-2 | 3-4 | 5-6 | 7-8
    KV heads                     0-1 | 1-2     0   | 1   | 2       0   | 1   | 1-2 | 2
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from conf.schema import Architecture

Unit = Literal["heads", "kv_heads", "ffn", "vocab"]
Index = tuple[slice, ...]

# parameter (by the end of its Hugging Face name) -> (dim that is cut, unit it is cut in); all others are replicated
TABLE: dict[str, tuple[int, Unit]] = {
    "embed_tokens.weight": (0, "vocab"),
    "lm_head.weight": (0, "vocab"),
    "q_proj.weight": (0, "heads"),
    "q_proj.bias": (0, "heads"),
    "k_proj.weight": (0, "kv_heads"),
    "k_proj.bias": (0, "kv_heads"),
    "v_proj.weight": (0, "kv_heads"),
    "v_proj.bias": (0, "kv_heads"),
    "o_proj.weight": (1, "heads"),
    "gate_proj.weight": (0, "ffn"),
    "gate_proj.bias": (0, "ffn"),
    "up_proj.weight": (0, "ffn"),
    "up_proj.bias": (0, "ffn"),
    "down_proj.weight": (1, "ffn"),
}

# replicated, but each tensor rank meets them with its own heads alone: their gradients are partial sums
PER_HEAD = ("q_norm.weight", "k_norm.weight")


def partition(units: int, size: int) -> tuple[int, ...]:
    """Offsets (length size + 1) that cut `units` into `size` contiguous parts, the first ones one larger.

    >>> partition(10, 4)
    (0, 3, 6, 8, 10)
    """
    share, extra = divmod(units, size)
    return tuple(part * share + min(part, extra) for part in range(size + 1))


@dataclass(frozen=True, kw_only=True)
class Cut:
    """One tensor rank's ranges of units, each [start, stop) in the full model."""

    rank: int
    size: int
    heads: tuple[int, int]
    kv_heads: tuple[int, int]
    kv_heads_owned: tuple[int, int]
    """The part of `kv_heads` that no lower rank holds: what this rank writes to files and counts in norms."""
    ffn: tuple[int, int]
    vocab: tuple[int, int]
    kv_index: tuple[int, ...]
    """For each local query head, the local KV head it reads."""
    kv_overlap: bool
    """Whether some KV head lives on several ranks, whose gradients must then be added."""
    sequence: bool = False
    """Whether the rank has but a share of the tokens where parameters are replicated: their gradients are partial."""

    @property
    def num_heads(self) -> int:
        """Local query heads."""
        return self.heads[1] - self.heads[0]

    @property
    def num_kv_heads(self) -> int:
        """Local KV heads."""
        return self.kv_heads[1] - self.kv_heads[0]


def cut(architecture: Architecture, size: int, rank: int, *, sequence: bool = False) -> Cut:
    """The cut of tensor rank `rank` of `size`; `size` is at most the number of query heads.

    sequence: tokens are split over the ranks between the tensor regions (`parallel.sequence`).
    """
    cuts = [_head_ranges(architecture, size, r) for r in range(size)]
    heads, kv_heads = cuts[rank]
    first_owned = max([kv_heads[0], *(kv[1] for _, kv in cuts[:rank])])
    group = architecture.num_heads // architecture.num_kv_heads
    ffn, vocab = partition(architecture.ffn_width, size), partition(architecture.vocab_size, size)
    return Cut(
        rank=rank,
        size=size,
        heads=heads,
        kv_heads=kv_heads,
        kv_heads_owned=(min(first_owned, kv_heads[1]), kv_heads[1]),
        ffn=(ffn[rank], ffn[rank + 1]),
        vocab=(vocab[rank], vocab[rank + 1]),
        kv_index=tuple(head // group - kv_heads[0] for head in range(*heads)),
        kv_overlap=any(a[1][1] > b[1][0] for a, b in itertools.pairwise(cuts)),
        sequence=sequence,
    )


Range = tuple[int, int]


def _head_ranges(architecture: Architecture, size: int, rank: int) -> tuple[Range, Range]:
    """(query heads, KV heads) of a rank: whole KV groups while there are enough, unless cutting query heads leaves the
    fullest rank fewer of these and no more KV heads, of which the cache consists."""
    group = architecture.num_heads // architecture.num_kv_heads
    heads = list(itertools.pairwise(partition(architecture.num_heads, size)))
    kv = [(first // group, (last - 1) // group + 1) for first, last in heads]
    if size <= architecture.num_kv_heads:
        groups = list(itertools.pairwise(partition(architecture.num_kv_heads, size)))
        if _longest(kv) > _longest(groups) or _longest(heads) == group * _longest(groups):
            heads, kv = [(first * group, last * group) for first, last in groups], groups
    return heads[rank], kv[rank]


def _longest(ranges: Sequence[Range]) -> int:
    return max(last - first for first, last in ranges)


@dataclass(frozen=True, kw_only=True)
class Spec:
    """Where a rank's parameter sits in the full tensor of that name, and what its gradient still needs."""

    name: str
    """Full name in the file: Hugging Face's for the model, PEFT's for adapters."""
    shape: tuple[int, ...]
    """Full shape."""
    index: Index
    """This rank's block of the full tensor."""
    owned: Index | None
    """The part of `index` this rank writes to files and counts in norms; None when another rank does."""
    reduce: Literal["none", "tensor", "overlap"] = "none"
    """Over the tensor axis a gradient is already whole (none), a partial sum of a replicated parameter
    (tensor), or partial where KV heads live on several ranks (overlap)."""
    tied: bool = False
    """Held by the first and the last stage (tied embeddings): their gradients are added."""
    pipeline_sum: bool = False
    """Replicated on every pipeline stage, each with a partial gradient."""
    layer_dim: int | None = None
    """Dimension along which lie layers, hence the chunks of all pipeline ranks (prefixes)."""

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of this rank's block."""
        return tuple(s.stop - s.start for s in self.index)

    def parts(self) -> list[tuple[str, Index | None]]:
        """(name, what of it this rank owns) of what is summed as one in norms, in any layout: a tensor, or a layer's
        share of one that is cut by layers."""
        if self.layer_dim is None:
            return [(self.name, self.owned)]
        dim, layers = self.layer_dim, self.index[self.layer_dim]
        return [
            (f"{self.name}[{i:05}]", None if self.owned is None else with_dim(self.owned, dim, i, i + 1))
            for i in range(layers.start, layers.stop)
        ]


def whole(shape: Sequence[int]) -> Index:
    """The index of a full tensor."""
    return tuple(slice(0, size) for size in shape)


def with_dim(index: Index, dim: int, start: int, stop: int) -> Index:
    """`index` with dimension `dim` replaced by [start, stop)."""
    return (*index[:dim], slice(start, stop), *index[dim + 1 :])


def place(name: str, shape: Sequence[int], architecture: Architecture, here: Cut) -> Spec:
    """The block of parameter `name` (Hugging Face name, full `shape`) that the rank with cut `here` holds."""
    full = whole(shape)
    suffix = ".".join(name.rsplit(".", 2)[-2:])
    if suffix not in TABLE:
        partial = here.size > 1 and (here.sequence or suffix in PER_HEAD)
        reduce = "tensor" if partial else "none"
        return Spec(name=name, shape=tuple(shape), index=full, owned=full if here.rank == 0 else None, reduce=reduce)
    dim, unit = TABLE[suffix]
    width = architecture.head_dim if unit in ("heads", "kv_heads") else 1
    start, stop = getattr(here, unit)
    index = with_dim(full, dim, start * width, stop * width)
    if unit != "kv_heads":
        return Spec(name=name, shape=tuple(shape), index=index, owned=index)
    first, last = here.kv_heads_owned
    owned = with_dim(full, dim, first * width, last * width) if first < last else None
    reduce = "overlap" if here.kv_overlap else "none"
    return Spec(name=name, shape=tuple(shape), index=index, owned=owned, reduce=reduce)


def lora_specs(weight: Spec, rank: int, name_a: str, name_b: str, here: Cut) -> tuple[Spec, Spec]:
    """Placement of LoRA's A [rank, in] and B [out, rank] on a linear, derived from its weight's [out, in].

    The factor on the uncut side is replicated; since it meets only this rank's cut, its gradient is partial:

        weight cut along out (column): A replicated (partial gradient), B cut like the weight's rows
        weight cut along in  (row):    A cut like the weight's columns, B replicated (partial gradient)
    """
    out_width, in_width = weight.shape
    a = Spec(
        name=name_a,
        shape=(rank, in_width),
        index=(slice(0, rank), weight.index[1]),
        owned=None if weight.owned is None else (slice(0, rank), weight.owned[1]),
        reduce=weight.reduce,
    )
    b = Spec(
        name=name_b,
        shape=(out_width, rank),
        index=(weight.index[0], slice(0, rank)),
        owned=None if weight.owned is None else (weight.owned[0], slice(0, rank)),
        reduce=weight.reduce,
    )
    writer = here.rank == 0
    if here.size > 1 and not _is_cut(weight, 1):
        a = replace(a, owned=whole(a.shape) if writer else None, reduce="tensor")
    if not _is_cut(weight, 0) and here.size > 1:
        b = replace(b, owned=whole(b.shape) if writer else None, reduce="tensor")
    return a, b


def _is_cut(spec: Spec, dim: int) -> bool:
    entry = TABLE.get(".".join(spec.name.rsplit(".", 2)[-2:]))
    return entry is not None and entry[0] == dim

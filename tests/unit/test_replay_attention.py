"""Replays of attention over pages: the bits of plain calls, and what is checked anew each time."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from kernels.ops import Ops
from kernels.replay import Recording
from tests.backends import backend
from tests.replays import DTYPES, draw, num_calls

pytestmark = pytest.mark.usefixtures("no_gradients")


class Attending:
    """The paged attention of single queries, with the rotary embedding before it, over lengths that change."""

    SIZE, PAGES = 4, 400

    def __init__(self, ops: Ops, dtype: torch.dtype, count: int, window: int | None, kv_heads: int = 2) -> None:
        self.ops, self.count, self.heads, self.window = ops, count, (0, 1, 1, 0, 1)[: 5 if kv_heads > 1 else 1], window
        self.q, self.k, self.v = (draw(count, n, 16, dtype=dtype) for n in (len(self.heads), kv_heads, kv_heads))
        self.cos, self.sin = draw(count, 16), draw(count, 16)
        self.caches = [draw(self.PAGES, self.SIZE, kv_heads, 16, dtype=dtype) for _ in range(2)]
        self.slots = torch.zeros(count, dtype=torch.int64)
        table, prefix = torch.zeros(count, self.PAGES, dtype=torch.int64), torch.zeros(count, 9, dtype=torch.int64)
        self.layout = ops.paged_layout(
            [1] * count, [1] * count, table, page_size=self.SIZE, prefix_lengths=[0] * count, prefix_tables=prefix
        )

    def set(self, lengths: Sequence[int], prefixes: Sequence[int]) -> None:
        pages = iter(torch.randperm(self.PAGES).tolist())
        for b, (length, prefix) in enumerate(zip(lengths, prefixes, strict=True)):
            for table, count in ((self.layout.block_table_BM, length), (self.layout.prefix_table_BM, prefix)):
                own = [next(pages) for _ in range(-(-count // self.SIZE))]
                table[b, : len(own)] = torch.tensor(own, dtype=torch.int64)
                if table is self.layout.block_table_BM:
                    self.slots[b] = own[-1] * self.SIZE + (length - 1) % self.SIZE
            self.layout.chunks[b, 2:] = torch.tensor([length, prefix])  # type: ignore[attr-defined]

    def __call__(self) -> Tensor:
        q = self.ops.rotary_write(self.q, self.k, self.v, self.cos, self.sin, *self.caches, self.slots)
        more = {"kv_index": self.heads, "window": self.window, "scale": 0.3}
        return self.ops.attention_paged(q, *self.caches, self.layout, **more)[0] + q


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    "steps", [[(1,), (2,), (1400,), (600,)], [(3, 1, 700), (5, 600, 1)], [range(5, 25), (1,) * 20]]
)
def test_rotary_and_attention(dtype: torch.dtype, window: int | None, steps: Sequence[Sequence[int]]) -> None:
    """Short and long sequences, cut for the threads in different ways from replay to replay; the cache is as written."""
    steps = [list(step) for step in steps]
    attending = Attending(backend("compiled", dtype), dtype, len(steps[0]), window)
    recording: Recording | None = None
    for lengths, threads in zip(2 * steps, [1, 2, 3, 2, 1, 3, 2, 3], strict=False):
        torch.set_num_threads(threads)
        attending.set(lengths, [(3 * i) % 8 for i in range(len(lengths))])
        for x in (attending.q, attending.k, attending.v):
            x.copy_(torch.randn(x.shape))
        before = [cache.clone() for cache in attending.caches]
        expected = attending()
        written = [cache.clone() for cache in attending.caches]
        for cache, old in zip(attending.caches, before, strict=True):
            cache.copy_(old)
        if recording is None:
            recording = Recording(attending)
            assert num_calls(recording) == 1, "one call for both"
            for cache, old in zip(attending.caches, before, strict=True):
                cache.copy_(old)
        assert torch.equal(recording.replay(), expected)
        for cache, new in zip(attending.caches, written, strict=True):
            assert torch.equal(cache, new)
    assert recording is not None
    attending.slots[0] = (attending.slots[0] + 1) % (Attending.PAGES * Attending.SIZE)
    with pytest.raises(RuntimeError, match=r"slots\[0\]=\d+ is not that of the last key"):
        recording.replay()


@pytest.mark.parametrize("has_own", [False, True])
def test_slots_and_tables_are_checked_at_every_replay_for_every_layer(has_own: bool) -> None:
    """Layers that share their slots have them checked once, one with slots of its own has those checked."""
    ops, lengths = backend("compiled", torch.float32), [3, 1, 9]
    attending = Attending(ops, torch.float32, len(lengths), None)
    attending.set(lengths, [0, 2, 0])
    shared, own = attending.slots, attending.slots.clone()
    used = (shared, shared, own) if has_own else (shared, shared)
    rest = (attending.k, attending.v, attending.cos, attending.sin, *attending.caches)
    options = {"kv_index": attending.heads, "window": None, "scale": 0.3}

    def layers() -> Tensor:
        q = attending.q
        for slots in used:
            q = ops.rotary_write(q, *rest, slots)
            q = ops.attention_paged(q, *attending.caches, attending.layout, **options)[0]
        return q

    recording = Recording(layers)
    assert num_calls(recording) == len(used)
    table, num_slots = attending.layout.block_table_BM, Attending.PAGES * Attending.SIZE
    shifted = r"slots\[1\]=\d+ is not that of the last key"
    cases: list[tuple[Tensor, tuple[int, ...], int, str]] = [
        (table, (1, 0), Attending.PAGES, "block_table of chunk 1 names page 400 of 400"),
        (table, (1, 0), (int(table[1, 0]) + 1) % Attending.PAGES, shifted),
    ]
    for slots in used[1:]:
        cases += [
            (slots, (1,), (int(slots[1]) + 1) % num_slots, shifted),
            (slots, (1,), num_slots, rf"slots\[1\]={num_slots} of {num_slots} slots"),
            (slots, (1,), -1, r"slots\[1\]=-1 of"),
        ]
    for x, at, value, message in cases:
        before = int(x[at])
        x[at] = value
        for _ in range(2):
            with pytest.raises(RuntimeError, match=message):
                recording.replay()
        x[at] = before
        assert torch.equal(recording.replay(), layers())

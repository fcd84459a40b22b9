"""Decode steps that are recorded once and replayed: each request computes one token, and Python only says where.

A recording serves steps of one number of requests, with LoRA adapters in the same places. It is made when such a step
comes for the second time, and lasts until its block tables are too narrow or an adapter comes or goes.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from kernels.cpu_attention import CpuLayout
from kernels.dispatch import Ops
from kernels.replay import Recording
from serve.batch import Batch, LoadedAdapter, segments
from serve.scheduler import Chunk

MOST = 256
"""Recordings kept; the one that wasn't used for longest goes first."""
MOST_SEEN = 4096
"""Kinds of steps remembered; batches that mix adapters have very many."""

Compute = Callable[[Batch, Tensor | None], Tensor]
"""A stage's work: batch and hidden states of the stage before (None on the first) to hidden states or logits."""


class Replays:
    """The recordings of one rank."""

    def __init__(self, compute: Compute, ops: Ops, page_size: int) -> None:
        self._compute, self._ops, self._page_size = compute, ops, page_size
        self._seen: set[tuple[object, ...]] = set()
        self._steps: OrderedDict[tuple[object, ...], DecodeStep] = OrderedDict()

    @property
    def steps(self) -> tuple[DecodeStep, ...]:
        """What is recorded."""
        return tuple(self._steps.values())

    def run(
        self, chunks: Sequence[Chunk], used: Sequence[LoadedAdapter | None], hidden: Tensor | None
    ) -> Tensor | None:
        """The stage's result, valid until the next step; None for a step that is to be computed the plain way.

        used: the adapter of each chunk. hidden: [T, D] from the stage before, None on the first one.
        """
        if self._ops.record is None:
            return None
        key = (len(chunks), segments(chunks, used))
        step = self._steps.get(key)
        if step is not None and step.write(chunks, used):
            self._steps.move_to_end(key)
            return step.replay(hidden)
        if not all(map(_decodes, chunks)):
            return None
        if key not in self._seen:
            if len(self._seen) == MOST_SEEN:
                self._seen.clear()
            self._seen.add(key)
            return None
        with torch.inference_mode():
            step = DecodeStep(chunks, used, hidden, self._compute, self._ops, self._page_size)
        self._steps[key] = step
        if len(self._steps) > MOST:
            self._steps.popitem(last=False)
        return step.recording.output

    def forget(self) -> None:
        """Drops all recordings: the adapters that they know have changed."""
        self._seen.clear()
        self._steps.clear()


class DecodeStep:
    """A recording and the tensors that it reads."""

    def __init__(
        self,
        chunks: Sequence[Chunk],
        used: Sequence[LoadedAdapter | None],
        hidden: Tensor | None,
        compute: Compute,
        ops: Ops,
        page_size: int,
    ) -> None:
        """Computes the step and records it, with room for sequences of twice its lengths."""
        assert ops.record is not None
        count, self._page_size = len(chunks), page_size
        wide = 2 * max(len(chunk.pages) for chunk in chunks)
        prefixes = [() if adapter is None else adapter.pages for adapter in used]
        self._layout = ops.paged_layout(
            [1] * count,
            [chunk.end for chunk in chunks],
            torch.zeros(count, wide, dtype=torch.int64),
            page_size=page_size,
            prefix_lengths=[0 if adapter is None else adapter.length for adapter in used],
            prefix_tables=torch.zeros(count, max(map(len, prefixes)), dtype=torch.int64),
        )
        assert isinstance(self._layout, CpuLayout), "the backend that records has one"
        integers = torch.zeros(3, count, dtype=torch.int64)
        ids, positions, slots = integers
        self._batch = Batch(ids, positions, slots, self._layout, segments(chunks, used), torch.arange(count))
        # the same memory, which single integers are written to with the least ado
        self._ids, self._positions, self._slots = (_numbers(x) for x in integers)
        self._chunks = _numbers(self._layout.chunks.view(-1))  # four a chunk
        self._tables = self._layout.block_table_BM.numpy()
        self._prefix_tables = self._layout.prefix_table_BM.numpy()
        # whose pages the tables hold: kept, so that another object means other pages
        self._pages: list[tuple[int, ...] | None] = [None] * count
        self._used: list[LoadedAdapter | None] = [None] * count
        self._prefixes = [0] * count
        self._last_pages = [0] * count  # their first slots
        fits = self.write(chunks, used)
        assert fits
        self._hidden = None if hidden is None else hidden.clone()
        self.recording: Recording = ops.record(lambda: compute(self._batch, self._hidden))

    def write(self, chunks: Sequence[Chunk], used: Sequence[LoadedAdapter | None]) -> bool:
        """Puts the chunks into the tensors of the recording; False if one isn't a decoding request's, or if the block
        tables have no room for its pages.

        Most steps go on with the requests of the last one, and their tables stay as they are.
        """
        ids, positions, slots, numbers = self._ids, self._positions, self._slots, self._chunks
        for b, (chunk, adapter) in enumerate(zip(chunks, used, strict=True)):
            if not _decodes(chunk):
                return False
            if (chunk.pages is not self._pages[b] or adapter is not self._used[b]) and not self._put(b, chunk, adapter):
                return False
            start = chunk.start
            ids[b], positions[b], numbers[4 * b + 2] = chunk.tokens[0], start + self._prefixes[b], start + 1
            slots[b] = self._last_pages[b] + start % self._page_size
        return True

    def _put(self, b: int, chunk: Chunk, adapter: LoadedAdapter | None) -> bool:
        """Writes the block tables of a request that wasn't here, or has got a page; False if they are too narrow."""
        pages, prefix = chunk.pages, () if adapter is None else adapter.pages
        if len(pages) > self._tables.shape[1] or len(prefix) > self._prefix_tables.shape[1]:
            return False
        self._tables[b, : len(pages)], self._prefix_tables[b, : len(prefix)] = pages, prefix
        self._chunks[4 * b + 3] = self._prefixes[b] = 0 if adapter is None else adapter.length
        self._pages[b], self._used[b], self._last_pages[b] = pages, adapter, pages[-1] * self._page_size
        return True

    def replay(self, hidden: Tensor | None) -> Tensor:
        """The stage's result for what was written."""
        if hidden is not None:
            assert self._hidden is not None
            with torch.inference_mode():
                self._hidden.copy_(hidden)
        return self.recording.replay()


def _decodes(chunk: Chunk) -> bool:
    """Whether it is a request's newest token, to draw the next one from."""
    return chunk.samples and len(chunk.tokens) == 1


def _numbers(x: Tensor) -> memoryview:
    """The integers of a dense [N] int64 tensor."""
    return memoryview(x.numpy()).cast("B").cast("q")

"""A model of the CUDA kernels: bytes and floating-point operations per SM, from their sources, and what limits them.

    python -m kernels.cuda_roofline docs/benchmarks/cuda_roofline.md

writes the page. Nothing here is measured, and no time is derived: bytes are what has to pass between the SMs and memory
at least, operations what the kernel's instructions do, padding of tensor-core tiles included.
"""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from kernels.cuda_layout import (
    GRADIENT_ROWS,
    ITEM_ROWS,
    PART,
    SPLIT_PAIRS,
    WHOLE_PAIRS,
    CudaLayout,
    low_rank_items,
    packed_work,
)
from kernels.documents import Documents

CPU = torch.device("cpu")
TILE, ROWS, THREADS, MERGE_LANES = 32, 16, 128, 8
"""Keys per tile, rows of a warp's tensor-core tile, threads of a block of the row kernels, of a pair of a merge."""
FEW_LIMIT, FEW, MANY, DEPTH = 32, (16, 64), (128, 128), 32
"""Of linear.cu in 16 bits: rows up to which the small tile is taken, the two tiles, what a stage has of the depth."""
STREAMED, DELTA_PAIRS, WIDE_HEAD = 32, 4, 128
"""Of attention_varlen_grad.cu: queries that keys go over at a time, (query, head) per block of `row_delta`, the head
dim above which a block has half as many positions."""


@dataclass(frozen=True)
class Gpu:
    """Public peak figures of a GPU, dense, without sparsity."""

    name: str
    sms: int
    memory: float
    """TB/s."""
    tensor: float
    """TFLOP/s in bfloat16 on tensor cores."""
    scalar: float
    """TFLOP/s in float32 outside of them."""


GPUS = (
    Gpu("A100 SXM 80 GB", 108, 2.039, 312, 19.5),
    Gpu("H100 SXM", 132, 3.35, 989, 67),
    Gpu("B200", 148, 8.0, 2250, 75),
)


@dataclass(frozen=True)
class Shape:
    """A model's layer."""

    name: str
    width: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocabulary: int


SHAPES = (
    Shape("SmolLM2-135M", 576, 9, 3, 64, 1536, 49152),
    Shape("Llama-3-8B", 4096, 32, 8, 128, 14336, 128256),
)
GEMMA = Shape("Gemma-2-2B", 2304, 8, 4, 256, 9216, 256000)
"""For its heads' width alone."""


@dataclass(frozen=True)
class Cost:
    """What an op launches, in bfloat16."""

    kernel: str
    case: str
    blocks: int
    megabytes: float
    gigaflops: float
    on_tensor_cores: bool = False

    @property
    def intensity(self) -> float:
        """Operations per byte."""
        return 1e3 * self.gigaflops / self.megabytes

    def limit(self, gpu: Gpu) -> str:
        """Memory where the intensity lies below the GPU's ridge, else arithmetic."""
        peak = gpu.tensor if self.on_tensor_cores else gpu.scalar
        return "memory" if self.intensity < peak / gpu.memory else "arithmetic"


def row_kernels(s: Shape, tokens: int) -> Iterator[Cost]:
    """Every element once; 2 bytes each. Operations are counted as multiplications, additions and special functions."""
    case = f"{s.name}, {tokens} tokens"
    elements = tokens * s.width
    yield Cost("rms_norm + residual", case, tokens, 8e-6 * elements, 7e-9 * elements)
    elements = tokens * s.ffn
    blocks = -(-elements // (8 * THREADS))
    yield Cost("gate (SiLU)", case, blocks, 6e-6 * elements, 5e-9 * elements)
    elements, copied = tokens * (s.heads + s.kv_heads) * s.head_dim, tokens * s.kv_heads * s.head_dim
    blocks = -(-(elements + copied) // (16 * THREADS))
    megabytes = (4 * (elements + copied) + 8 * tokens * s.head_dim) / 1e6
    yield Cost("rotary + pages", case, blocks, megabytes, 3e-9 * elements)


def embedding(s: Shape, tokens: int) -> Iterator[Cost]:
    """Rows of as many different ids, with the ids; the gradient with where they stand, without clearing its table."""
    case, elements = f"{s.name}, {tokens} tokens", tokens * s.width
    blocks = tokens * -(-s.width // (8 * THREADS))
    yield Cost("embedding", case, blocks, (4 * elements + 8 * tokens) / 1e6, 0.0)
    yield Cost("embedding, gradient", case, blocks, (4 * elements + 16 * tokens) / 1e6, elements / 1e9)


def merge(s: Shape, tokens: int) -> Iterator[Cost]:
    """Of attention over a prefix with that over the documents: two parts to one, then one gradient to two."""
    case, pairs = f"{s.name}, {tokens} tokens", tokens * s.heads
    blocks, elements = -(-pairs * MERGE_LANES // THREADS), pairs * s.head_dim
    yield Cost("merge", case, blocks, (6 * elements + 12 * pairs) / 1e6, 3 * elements / 1e9)
    yield Cost("merge, gradients", case, blocks, (10 * elements + 20 * pairs) / 1e6, 6 * elements / 1e9)


def attention(s: Shape, chunks: list[tuple[int, int]], *, packed: bool = False) -> Cost:
    """Chunks (queries, keys), all alike. Each reads its keys and values from memory once, however many blocks do.

    packed: they are whole documents, in rows instead of pages.
    """
    queries, keys = chunks[0]
    group = s.heads // s.kv_heads
    is_split = not packed and queries * group <= SPLIT_PAIRS
    if packed:
        blocks, partial_rows = len(packed_work(_documents(chunks), 0, group, CPU).whole), 0
    else:
        pages = [[0] * -(-keys // 16)] * len(chunks)
        layout = CudaLayout.build([q for q, _ in chunks], [k for _, k in chunks], pages, page_size=16)
        work = layout.work(0, group)
        blocks, partial_rows = len(work.split) if is_split else len(work.whole), work.partial_rows
    if is_split:
        rows, seen = ROWS * len(chunks), -(-keys // TILE) * TILE
        products = rows * seen
    else:
        tiles = range(-(-queries * group // WHOLE_PAIRS))
        last = [keys - queries + (min((t + 1) * WHOLE_PAIRS, queries * group) - 1) // group for t in tiles]
        products = len(chunks) * WHOLE_PAIRS * sum((p // TILE + 1) * TILE for p in last)
    held = len(chunks) * keys * 2 * s.kv_heads * s.head_dim * 2
    moved = sum(q for q, _ in chunks) * s.heads * (2 * s.head_dim * 2 + 4)
    partials = 2 * partial_rows * s.heads * (s.head_dim + 2) * 4
    what = f"{len(chunks)} x {queries} queries, {keys} keys"
    return Cost(
        "attention, documents" if packed else "attention, split" if is_split else "attention, whole",
        f"{s.name}, {f'{len(chunks)} x {queries} tokens' if packed else what}",
        s.kv_heads * blocks,
        (held + moved + partials) / 1e6,
        4 * products * s.kv_heads * s.head_dim / 1e9,
        on_tensor_cores=True,
    )


def _documents(chunks: list[tuple[int, int]]) -> Documents:
    rows = sum(queries for queries, _ in chunks)
    return Documents.of((0, *itertools.accumulate(queries for queries, _ in chunks)), rows, rows)


def attention_gradients(s: Shape, documents: int, length: int) -> Cost:
    """Delta; dq with three products of every tile of queries and tile of keys that it sees; dk and dv with four."""
    entries = len(packed_work(_documents([(length, length)] * documents), 0, s.heads // s.kv_heads, CPU).query_tiles)
    side = GRADIENT_ROWS if s.head_dim <= WIDE_HEAD else GRADIENT_ROWS // 2
    tiles = entries * GRADIENT_ROWS // side
    rows, per_document = documents * length, tiles // documents
    numbers = 8 * rows * s.heads  # lse and delta, or the gradient of lse and delta
    of_q, of_k = 2 * rows * s.heads * s.head_dim, 2 * rows * s.kv_heads * s.head_dim
    delta, for_q, for_k = 2 * of_q + numbers, 3 * of_q + 2 * of_k + numbers, 2 * of_q + 4 * of_k + numbers
    seen_by_queries = sum(t + 1 for t in range(per_document)) * side**2
    streamed = -(-length // STREAMED)
    seen_by_keys = sum(streamed - t * side // STREAMED for t in range(per_document)) * STREAMED * side
    products = documents * s.heads * (3 * seen_by_queries + 4 * seen_by_keys)
    return Cost(
        "attention, gradients",
        f"{s.name}, {documents} x {length} tokens",
        -(-rows * s.heads // DELTA_PAIRS) + tiles * (s.heads + s.kv_heads),
        (delta + for_q + for_k) / 1e6,
        (2 * products + 2 * rows * s.heads) * s.head_dim / 1e9,
        on_tensor_cores=True,
    )


def _product(rows: int, columns: int, depth: int, tile: tuple[int, int]) -> tuple[int, int]:
    """(blocks, operations) of a product in tiles, those at its borders whole."""
    blocks = -(-rows // tile[0]) * -(-columns // tile[1])
    return blocks, 2 * blocks * tile[0] * tile[1] * -(-depth // DEPTH) * DEPTH


def linear(s: Shape, tokens: int) -> Iterator[Cost]:
    """The linear from the model's width to that of its ffn, every factor read once, and its gradients."""
    case, n, k = f"{s.name}, {tokens} tokens, {s.width} to {s.ffn}", s.ffn, s.width
    x, w, y = 2 * tokens * k, 2 * n * k, 2 * tokens * n
    blocks, operations = _product(tokens, n, k, FEW if tokens <= FEW_LIMIT else MANY)
    yield Cost("linear", case, blocks, (x + w + y) / 1e6, operations / 1e9, on_tensor_cores=True)
    if tokens <= FEW_LIMIT:
        return
    blocks, operations = _product(tokens, k, n, MANY)
    yield Cost("linear, gradient of x", case, blocks, (x + w + y) / 1e6, operations / 1e9, on_tensor_cores=True)
    blocks, operations = _product(n, k, tokens, MANY)
    megabytes = (x + y + 4 * w) / 1e6  # what is added to, in float32, is read and written
    yield Cost("linear, gradient of w", case, blocks, megabytes, operations / 1e9, on_tensor_cores=True)


def low_rank(s: Shape, segments: int, length: int, rank: int = 16) -> Cost:
    """Updates of that linear in segments of rows with an adapter each: both launches."""
    items = len(low_rank_items(tuple((i * length, (i + 1) * length) for i in range(segments)), CPU))
    rows, n, k = segments * length, s.ffn, s.width
    (inner, first), (outer, second) = (
        _product(ITEM_ROWS, columns, depth, FEW) for columns, depth in ((rank, k), (n, rank))
    )
    elements = rows * (k + 2 * rank + 2 * n) + segments * rank * (k + n)
    return Cost(
        "LoRA",
        f"{s.name}, {segments} adapters x {length} tokens, rank {rank}, {k} to {n}",
        items * (inner + outer),
        2 * elements / 1e6,
        items * (first + second) / 1e9,
        on_tensor_cores=True,
    )


def logits(s: Shape, rows: int) -> Iterator[Cost]:
    """Rows of float32 logits; a gradient in bfloat16. Operations as of the row kernels."""
    case, elements = f"{s.name}, {rows} x {s.vocabulary}", rows * s.vocabulary
    yield Cost("log_sum_exp", case, rows, 4e-6 * elements, 4e-9 * elements)
    yield Cost("loss_gradient", case, rows, 6e-6 * elements, 3e-9 * elements)


def draws(s: Shape, rows: int) -> Iterator[Cost]:
    """With top_p: the largest, the whole sum, two searches of four passes, the id; each row read from memory once.

    Log-probabilities: the largest, the whole sum, one search, two passes that collect. A pass takes 2 operations an
    element for its key, a weight 5; of a search's passes the first weighs all, but for a search that counts.
    """
    case, elements = f"{s.name}, {rows} x {s.vocabulary}", rows * s.vocabulary
    yield Cost("draw", case, rows, 4e-6 * elements, (11 * 2 + 3 * 5) * elements / 1e9)
    yield Cost("logprobs", case, rows, 4e-6 * elements, (8 * 2 + 5) * elements / 1e9)


def costs() -> Iterator[Cost]:
    """Decoding, prefill and training of two models."""
    for s in SHAPES:
        yield from row_kernels(s, 64)
        yield from row_kernels(s, 4096)
        yield attention(s, [(1, 512)] * 64)
        yield attention(s, [(1, 4096)] * 64)
        yield attention(s, [(1, 32768)])
        yield attention(s, [(512, 512)] * 8)
        yield attention(s, [(2048, 8192)])
        yield attention(s, [(512, 512)] * 8, packed=True)
        yield attention_gradients(s, 8, 512)
        yield attention_gradients(s, 2, 2048)
        yield from merge(s, 4096)
        yield from embedding(s, 4096)
        yield from linear(s, 1)
        yield from linear(s, 32)
        yield from linear(s, 4096)
        yield low_rank(s, 8, 1)
        yield low_rank(s, 1, 4096)
        yield from logits(s, 512)
        yield from draws(s, 64)
    yield attention_gradients(GEMMA, 8, 512)
    yield attention_gradients(GEMMA, 2, 2048)


def page() -> str:
    """The model in Markdown."""
    lines = [
        "# A roofline model of the CUDA kernels",
        "",
        "**A model, not a measurement**, by `python -m kernels.cuda_roofline docs/benchmarks/cuda_roofline.md`:",
        "no GPU has run these kernels, and no speed follows from this page. In bfloat16:",
        "",
        "- bytes: what has to pass between memory and the SMs at least; keys and values once per chunk, although every",
        "  block of a longer chunk reads them again (from the L2 cache, the model hopes), factors of a linear once,",
        "  although every tile reads its own; partial results both ways; launches of one op added up",
        "- operations: what the kernels execute; a tensor-core tile has 16 rows, used or not, and 32 keys; tiles of a",
        "  linear are 16 x 64 up to 32 rows, else 128 x 128; weights of draws are float64, counted as float32",
        "- per SM: the launch's sum divided by the SMs, which supposes that blocks spread evenly over them",
        "- limit: memory below the ridge (peak operations per byte of memory bandwidth), else arithmetic",
        "",
        f"A chunk is split where it has at most {SPLIT_PAIRS} pairs (query, head of a group), in parts of {PART} keys.",
        "",
        "| GPU (public peaks) | SMs | memory TB/s | tensor TFLOP/s | ridge | float32 TFLOP/s | ridge |",
        "|---|---|---|---|---|---|---|",
    ]
    for g in GPUS:
        ridges = f"{g.tensor} | {g.tensor / g.memory:.0f} | {g.scalar} | {g.scalar / g.memory:.0f}"
        lines.append(f"| {g.name} | {g.sms} | {g.memory} | {ridges} |")
    heads = " | ".join(f"{g.name.split()[0]}: KB, MFLOP per SM, limit" for g in GPUS)
    lines += [
        "",
        f"| kernel | case | blocks | MB | GFLOP | FLOP per byte | {heads} |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for c in costs():
        each = " | ".join(
            f"{1e3 * c.megabytes / g.sms:.1f}, {1e3 * c.gigaflops / g.sms:.2f}, {c.limit(g)}" for g in GPUS
        )
        sums = f"{c.megabytes:.2f} | {c.gigaflops:.3f} | {c.intensity:.1f}"
        lines.append(f"| {c.kernel} | {c.case} | {c.blocks} | {sums} | {each} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page())

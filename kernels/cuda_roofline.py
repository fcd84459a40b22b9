"""A model of the CUDA kernels: bytes and floating-point operations per SM, from their sources, and what limits them.

    python -m kernels.cuda_roofline docs/benchmarks/cuda_roofline.md

writes the page. Nothing here is measured, and no time is derived: bytes are what has to pass between the SMs and memory
at least, operations what the kernel's instructions do, padding of tensor-core tiles included.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kernels.cuda_layout import PART, SPLIT_PAIRS, WHOLE_PAIRS, CudaLayout

TILE, ROWS, THREADS = 32, 16, 128
"""Keys per tile, rows of a warp's tensor-core tile, threads of a block of the row kernels."""


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


SHAPES = (Shape("SmolLM2-135M", 576, 9, 3, 64, 1536), Shape("Llama-3-8B", 4096, 32, 8, 128, 14336))


@dataclass(frozen=True)
class Cost:
    """One launch (or two, with the merge) in bfloat16."""

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


def attention(s: Shape, chunks: list[tuple[int, int]]) -> Cost:
    """Chunks (queries, keys), all alike. Each reads its keys and values from memory once, however many blocks do."""
    queries, keys = chunks[0]
    group = s.heads // s.kv_heads
    is_split = queries * group <= SPLIT_PAIRS
    pages = [[0] * -(-keys // 16)] * len(chunks)
    layout = CudaLayout.build([q for q, _ in chunks], [k for _, k in chunks], pages, page_size=16)
    work = layout.work(0, group)
    blocks = s.kv_heads * (len(work.split) if is_split else len(work.whole))
    if is_split:
        rows, seen = ROWS * len(chunks), -(-keys // TILE) * TILE
        products = rows * seen
    else:
        tiles = range(-(-queries * group // WHOLE_PAIRS))
        last = [keys - queries + (min((t + 1) * WHOLE_PAIRS, queries * group) - 1) // group for t in tiles]
        products = len(chunks) * WHOLE_PAIRS * sum((p // TILE + 1) * TILE for p in last)
    held = len(chunks) * keys * 2 * s.kv_heads * s.head_dim * 2
    moved = sum(q for q, _ in chunks) * s.heads * (2 * s.head_dim * 2 + 4)
    partials = 2 * work.partial_rows * s.heads * (s.head_dim + 2) * 4
    return Cost(
        "attention, split" if is_split else "attention, whole",
        f"{s.name}, {len(chunks)} x {queries} queries, {keys} keys",
        blocks,
        (held + moved + partials) / 1e6,
        4 * products * s.kv_heads * s.head_dim / 1e9,
        on_tensor_cores=True,
    )


def costs() -> Iterator[Cost]:
    """Decoding and prefill of two models."""
    for s in SHAPES:
        yield from row_kernels(s, 64)
        yield from row_kernels(s, 4096)
        yield attention(s, [(1, 512)] * 64)
        yield attention(s, [(1, 4096)] * 64)
        yield attention(s, [(1, 32768)])
        yield attention(s, [(512, 512)] * 8)
        yield attention(s, [(2048, 8192)])


def page() -> str:
    """The model in Markdown."""
    lines = [
        "# A roofline model of the CUDA kernels",
        "",
        "**A model, not a measurement**, by `python -m kernels.cuda_roofline docs/benchmarks/cuda_roofline.md`:",
        "no GPU has run these kernels, and no speed follows from this page. In bfloat16:",
        "",
        "- bytes: what has to pass between memory and the SMs at least; keys and values once per chunk, although every",
        "  block of a longer chunk reads them again (from the L2 cache, the model hopes); partial results both ways",
        "- operations: what the kernels execute; a tensor-core tile has 16 rows, used or not, and 32 keys",
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

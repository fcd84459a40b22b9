"""Attention beside torch's: training on ragged documents, prefill and decoding over pages."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kernels import autograd, checks, cpu_attention, torch_ops
from kernels.bench import timing
from kernels.memory import Area
from kernels.replay import Recording


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Query heads, kv heads and head dim."""

    heads: int
    kv_heads: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.heads}/{self.kv_heads} x {self.head_dim}"

    def draw(self, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """Random q, k and v of so many rows."""
        q, k, v = (torch.randn(rows, n, self.head_dim) for n in (self.heads, self.kv_heads, self.kv_heads))
        return q.to(dtype), k.to(dtype), v.to(dtype)


SMOL, LARGE = Shape(heads=9, kv_heads=3, head_dim=64), Shape(heads=32, kv_heads=8, head_dim=128)
EVEN, RAGGED = (512,) * 8, (37, 800, 5, 300, 120, 1024, 60, 450)
PACKS = ((SMOL, EVEN), (SMOL, RAGGED), (LARGE, (512, 100, 700)))
PREFILLS = (
    (SMOL, ((512, 512),)),
    (SMOL, ((64, 64), (64, 1088), (200, 200), (300, 900))),
    (SMOL, ((2048, 2048),)),
    (LARGE, ((256, 1280), (100, 100))),
)
"""Queries and keys of every chunk: keys beyond the queries are cached context."""
DECODES = (
    (SMOL, (4096,)),
    (SMOL, (32768,)),
    (SMOL, (8192,) * 4),
    (LARGE, (4096,)),
    (LARGE, (16384,)),
    (Shape(heads=4, kv_heads=1, head_dim=64), (32768,)),
    (SMOL, tuple(range(200, 400, 6))[:32]),
)
PAGE = 16
_COLD_BYTES = 128 << 20  # of caches that take turns, so that keys come from memory


def _blocked(
    q: Tensor, k: Tensor, v: Tensor, queries: Sequence[int], keys: Sequence[int], scale: float
) -> list[Tensor]:
    """Torch's blocked attention document by document, the last query seeing all keys; with fewer queries by a mask."""
    outs, row, key = [], 0, 0
    heads = checks.check_kv_index(q.shape[1], k.shape[1], None)
    for m, n in zip(queries, keys, strict=True):
        parts = autograd.group_heads(q[row : row + m], k[key : key + n], v[key : key + n], heads)
        mask = None if m == n else torch.zeros(1, 1, m, n).masked_fill_(torch.ones(m, n).tril(n - m) == 0, -torch.inf)
        out, _ = autograd.blocked_attention(*parts, causal=mask is None, mask_BQS=mask, scale=scale)
        outs.append(autograd.ungroup_queries(out))
        row, key = row + m, key + n
    return outs


def _flops(shape: Shape, queries: Sequence[int], keys: Sequence[int]) -> float:
    """Of the two products of the forward, over the visible pairs alone."""
    pairs = sum(m * (n - m) + m * (m + 1) / 2 for m, n in zip(queries, keys, strict=True))
    return 4.0 * pairs * shape.heads * shape.head_dim


def training(dtype: torch.dtype) -> list[list[str]]:
    """Rows of the training table: forward, and forward with backward."""
    rows = []
    for shape, lengths in PACKS:
        q, k, v = (t.requires_grad_() for t in shape.draw(sum(lengths), dtype))
        grad, scale = torch.randn_like(q), shape.head_dim**-0.5
        bounds = [0, *itertools.accumulate(lengths)]

        def ours(q: Tensor = q, k: Tensor = k, v: Tensor = v, b: list[int] = bounds, s: float = scale) -> Tensor:
            return cpu_attention.attention_varlen(q, k, v, b, scale=s)[0]

        def theirs(q: Tensor = q, k: Tensor = k, v: Tensor = v, b: list[int] = bounds, s: float = scale) -> Tensor:
            return torch_ops.attention_varlen(q, k, v, b, scale=s)[0]

        def both(
            forward: Callable[[], Tensor], grad: Tensor = grad, leaves: tuple[Tensor, ...] = (q, k, v)
        ) -> tuple[Tensor, ...]:
            return torch.autograd.grad(forward(), leaves, grad)

        product, product_flops = timing.matrix_product(dtype)
        seconds = timing.interleaved(
            {
                "forward": ours,
                "torch forward": theirs,
                "both": lambda f=ours, both=both: both(f),
                "torch both": lambda f=theirs, both=both: both(f),
                "product": product,
            }
        )
        flops, peak = _flops(shape, lengths, lengths), product_flops / seconds["product"]
        backward = seconds["both"] - seconds["forward"]
        rows.append(
            [
                str(shape),
                " ".join(map(str, lengths)) if len(set(lengths)) > 1 else f"{len(lengths)} x {lengths[0]}",
                f"{seconds['forward'] * 1e3:.2f} / {seconds['torch forward'] * 1e3:.1f}",
                f"{seconds['torch forward'] / seconds['forward']:.1f}",
                f"{seconds['both'] * 1e3:.2f} / {seconds['torch both'] * 1e3:.1f}",
                f"{seconds['torch both'] / seconds['both']:.1f}",
                f"{flops / seconds['forward'] / 1e9:.0f} / {2.5 * flops / backward / 1e9:.0f} / {peak / 1e9:.0f}",
            ]
        )
    return rows


def _pages(shape: Shape, lengths: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, list[list[int]]]:
    """Caches with shuffled pages, in memory as a server's, and every request's."""
    counts = [-(-n // PAGE) for n in lengths]
    order = torch.randperm(sum(counts)).tolist()
    ends = list(itertools.accumulate(counts))
    tables = [order[end - count : end] for end, count in zip(ends, counts, strict=True)]
    size = (sum(counts), PAGE, shape.kv_heads, shape.head_dim)
    area = Area()
    key, value = (area.empty(size, dtype).fill_(0.1 * sign) for sign in (1, -1))  # quick to make, touches every page
    return key, value, tables


@torch.no_grad()
def prefill(dtype: torch.dtype) -> list[list[str]]:
    """Rows of the prefill table."""
    rows = []
    for shape, chunks in PREFILLS:
        queries, keys = [m for m, _ in chunks], [n for _, n in chunks]
        key, value, tables = _pages(shape, keys, dtype)
        layout = cpu_attention.CpuLayout.build(queries, keys, tables, page_size=PAGE)
        q, (_, k, v), scale = shape.draw(sum(queries), dtype)[0], shape.draw(sum(keys), dtype), shape.head_dim**-0.5
        seconds = timing.interleaved(
            {
                "ours": lambda a=(q, key, value, layout), s=scale: cpu_attention.attention_paged(*a, scale=s),
                "torch": lambda a=(q, k, v, queries, keys), s=scale: _blocked(*a, s),
            }
        )
        rows.append(
            [
                str(shape),
                ", ".join(f"{m} of {n}" for m, n in chunks),
                f"{seconds['ours'] * 1e3:.2f} / {seconds['torch'] * 1e3:.1f}",
                f"{seconds['torch'] / seconds['ours']:.1f}",
                f"{_flops(shape, queries, keys) / seconds['ours'] / 1e9:.0f}",
            ]
        )
    return rows


@torch.no_grad()
def decode(dtype: torch.dtype) -> list[list[str]]:
    """Rows of the decoding table: caches of several layers take turns, in a replay as a server's decoding steps are."""
    rows, read = [], timing.plain_read()
    for shape, lengths in DECODES:
        size = 2 * sum(lengths) * shape.kv_heads * shape.head_dim * dtype.itemsize
        layers = -(-_COLD_BYTES // size)
        caches = [_pages(shape, lengths, dtype) for _ in range(layers)]
        layout = cpu_attention.CpuLayout.build([1] * len(lengths), lengths, caches[0][2], page_size=PAGE)
        q, scale = shape.draw(len(lengths), dtype)[0], shape.head_dim**-0.5

        def ours(
            q: Tensor = q, caches: list = caches, layout: cpu_attention.CpuLayout = layout, s: float = scale
        ) -> Tensor:
            return [cpu_attention.attention_paged(q, key, value, layout, scale=s)[0] for key, value, _ in caches][-1]

        seconds = timing.interleaved({"ours": Recording(ours).replay, "read": read})
        rate, limit = layers * size / seconds["ours"], timing.read_bytes() / seconds["read"]
        rows.append(
            [
                str(shape),
                f"{len(lengths)} x {lengths[0]}" if len(set(lengths)) == 1 else f"{len(lengths)} x 200-400",
                f"{seconds['ours'] / layers * 1e6:.0f}",
                f"{rate / 1e9:.1f} / {limit / 1e9:.1f}",
                f"{100 * rate / limit:.0f}%",
            ]
        )
    return rows


TABLES: timing.Tables = {
    "training": (
        "Training, packed causal documents. torch: its blocked CPU attention, document by document. GFLOP/s of "
        "forward / backward / a square product of oneDNN in the same run, over the visible pairs alone",
        ["heads", "documents", "forward ms: ours / torch", "ratio", "both ms: ours / torch", "ratio", "GFLOP/s"],
        training,
    ),
    "prefill": (
        "Prefill over pages of 16 in random order; torch gets keys that lie in order",
        ["heads", "queries of keys", "ms: ours / torch", "ratio", "GFLOP/s"],
        prefill,
    ),
    "decode": (
        "Decoding over pages of 16 in random order, caches larger than the last cache level and on huge pages, layers "
        "replayed one behind the other, as in the server. GB/s of keys and values / of a plain read in the same run",
        ["heads", "requests", "us a layer", "GB/s", "share"],
        decode,
    ),
}

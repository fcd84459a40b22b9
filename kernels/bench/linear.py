"""Linears beside oneDNN's and torch's: a decoder's whole set at few rows, and every gradient at many."""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from kernels import cpu_linear
from kernels.bench import timing
from kernels.memory import Area
from kernels.ops import Packed
from kernels.replay import Recording

LAYER = ((960, 576), (576, 576), (3072, 576), (576, 1536))
"""[N, K] of a layer of SmolLM2-135M: q with k and v, o, gate with up, down."""
LAYERS, HEAD = 30, (49152, 576)
FEW, MANY, TOKENS = (1, 8, 16, 32, 64), (512, 2048), 4096
REPEATS = 9


def _draw(shapes: Sequence[tuple[int, int]], dtype: torch.dtype) -> list[Tensor]:
    return [(torch.randn(n, k) * 0.05).to(dtype) for n, k in shapes]


def _pack(weights: Sequence[Tensor]) -> list[Packed]:
    """In one area, as a decoder's are."""
    area = Area()
    return [
        cpu_linear.pack((w.shape[0], w.shape[1]), w.dtype, lambda first, last, w=w: w[first:last], area)
        for w in weights
    ]


def _sweeps(rows: int, weights: Sequence[Tensor], packed: Sequence[Packed]) -> Mapping[str, Callable[[], object]]:
    """One pass of all weights: by ours, replayed as decoding does it and called from Python; by oneDNN with weights in
    its own layout and by torch's linear, called from Python."""
    dtype = weights[0].dtype
    x = {k: torch.randn(rows, k).to(dtype) for k in {w.shape[1] for w in weights}}
    ordered = [torch.ops.mkldnn._reorder_linear_weight(w, rows) for w in weights]
    shapes = [(w.shape[0], w.shape[1]) for w in weights]
    raw = torch.ops.onemesh

    def ours() -> Tensor:
        out = x[shapes[0][1]]
        for (n, k), w in zip(shapes, packed, strict=True):
            out = raw.linears(x[k], [w.data], [None], [n], False, [], [], [])
        return out

    def onednn() -> None:
        for (_, k), w in zip(shapes, ordered, strict=True):
            torch.ops.mkldnn._linear_pointwise(x[k], w, None, "none", [], "")

    def plain() -> None:
        for (_, k), w in zip(shapes, weights, strict=True):
            torch.nn.functional.linear(x[k], w)

    return {"replayed": Recording(ours).replay, "ours": ours, "oneDNN": onednn, "torch": plain}


@torch.no_grad()
def few(dtype: torch.dtype) -> list[list[str]]:
    """Rows of the table of all decode linears."""
    shapes = [*LAYER * LAYERS, HEAD]
    weights = _draw(shapes, dtype)
    packed = _pack(weights)
    size, flops = sum(n * k for n, k in shapes) * dtype.itemsize, 2.0 * sum(n * k for n, k in shapes)
    read, (product, product_flops) = timing.plain_read(), timing.matrix_product(dtype)
    rows = []
    for count in FEW:
        sweeps = {**_sweeps(count, weights, packed), "read": read, "product": product}
        seconds = timing.interleaved(sweeps, repeats=REPEATS)
        rate, limit = size / seconds["replayed"], timing.read_bytes() / seconds["read"]
        speed, peak = flops * count / seconds["replayed"], product_flops / seconds["product"]
        rows.append(
            [
                str(count),
                " / ".join(f"{seconds[name] * 1e3:.2f}" for name in ("replayed", "ours", "oneDNN", "torch")),
                f"{seconds['oneDNN'] / seconds['replayed']:.2f}, {seconds['oneDNN'] / seconds['ours']:.2f}",
                f"{rate / 1e9:.1f} / {limit / 1e9:.1f}, {100 * rate / limit:.0f}%",
                f"{speed / 1e9:.0f} / {peak / 1e9:.0f}, {100 * speed / peak:.0f}%",
            ]
        )
    return rows


@torch.no_grad()
def many(dtype: torch.dtype) -> list[list[str]]:
    """Rows of the table of a layer's linears at many rows."""
    weights = _draw(LAYER, dtype)
    packed = _pack(weights)
    flops = 2.0 * sum(n * k for n, k in LAYER)
    rows = []
    for count in MANY:
        seconds = timing.interleaved(_sweeps(count, weights, packed), repeats=REPEATS)
        rows.append(_speeds(f"forward, {count} rows", flops * count, seconds))
    return rows


@torch.no_grad()
def gradients(dtype: torch.dtype) -> list[list[str]]:
    """Rows of the table of forward and both gradients from master weights, packing included."""
    rows = []
    for n, k in LAYER:
        x, dy = torch.randn(TOKENS, k).to(dtype), torch.randn(TOKENS, n).to(dtype)
        master, out = torch.randn(n, k) * 0.05, torch.zeros(n, k)
        w = master.to(dtype)

        def onednn(a: Tensor, b: Tensor) -> Tensor:
            return torch.ops.mkldnn._linear_pointwise(a, b, None, "none", [], "")

        shape, flops = f"{n} x {k}", 2.0 * TOKENS * n * k
        for name, functions in {
            "forward": (
                lambda x=x, m=master: cpu_linear.linear(x, m),
                lambda x=x, w=w: onednn(x, w),
                lambda x=x, w=w: torch.nn.functional.linear(x, w),
            ),
            "of x": (
                lambda dy=dy, m=master: cpu_linear.input_gradient(dy, m),
                lambda dy=dy, w=w: onednn(dy, w.t()),
                lambda dy=dy, w=w: dy @ w,
            ),
            "of w": (
                lambda out=out, dy=dy, x=x: cpu_linear.add_weight_gradient(out, dy, x),
                lambda dy=dy, x=x: onednn(dy.t(), x.t()),
                lambda dy=dy, x=x: dy.t() @ x,
            ),
        }.items():
            seconds = timing.interleaved(dict(zip(("ours", "oneDNN", "torch"), functions, strict=True)))
            rows.append(_speeds(f"{shape} {name}", flops, seconds))
    return rows


def _speeds(name: str, flops: float, seconds: Mapping[str, float]) -> list[str]:
    speeds = [f"{flops / seconds[key] / 1e9:.0f}" for key in ("ours", "oneDNN", "torch")]
    ratios = [f"{seconds[key] / seconds['ours']:.2f}" for key in ("oneDNN", "torch")]
    return [name, " / ".join(speeds), *ratios]


TABLES: timing.Tables = {
    "few": (
        "All linears of SmolLM2-135M and its head once, for some rows of x. Replayed: ours in one replay, as decoding "
        "does it; the others are 121 calls from Python. oneDNN: weights in its own layout for that number of rows. "
        "Read: the same run's plain read of memory. Product: a square one of oneDNN, near the peak",
        [
            "rows",
            "ms: replayed / ours / oneDNN / torch",
            "oneDNN : replayed, ours",
            "GB/s: replayed / read",
            "GFLOP/s: replayed / product",
        ],
        few,
    ),
    "many": (
        "A layer's linears at many rows, packed weights",
        ["", "GFLOP/s: ours / oneDNN / torch", "oneDNN : ours", "torch : ours"],
        many,
    ),
    "gradients": (
        f"Forward and both gradients at {TOKENS} rows, from master weights in float32: ours packs and rounds them at "
        "each call, and sums the weight's gradient in float32; the others get rounded weights",
        ["N x K", "GFLOP/s: ours / oneDNN / torch", "oneDNN : ours", "torch : ours"],
        gradients,
    ),
}

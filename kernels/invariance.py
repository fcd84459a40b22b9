"""Measures on this CPU how rows must be padded so that a row's bits don't depend on its company; checks it.

Libraries choose another kernel, with another order of summation, for a few rows: which counts are few depends
on the CPU, so the rule is data measured at start, not a constant (`docs/kernels.md` has the findings).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import autograd, tiles, torch_ops
from kernels.ops import Ops, Packed

_CANDIDATES = (2, 4, 8, 16, 32)
"""Least row counts tried. Not 1: a single row is a matrix-vector product, another kernel nearly everywhere."""


@dataclass(frozen=True, kw_only=True)
class RowRule:
    """How one dtype is computed on this CPU."""

    onednn: bool
    """Linears call oneDNN directly, else through torch."""
    min_rows: int
    """Least rows of a linear."""
    row_multiple: int
    """Attention products have a multiple of this many rows."""
    exact_linears: bool = True
    exact_attention: bool = True
    """Whether the probes agreed bitwise; False where no padding makes rows independent on this CPU."""

    @property
    def linears(self) -> str:
        """In words."""
        which = f"{'oneDNN' if self.onednn else 'torch'} linears of at least {self.min_rows} rows"
        return which + ("" if self.exact_linears else ", NOT row-invariant on this processor")

    @property
    def attention(self) -> str:
        """In words."""
        which = f"attention in multiples of {self.row_multiple}"
        return which + ("" if self.exact_attention else ", NOT row-invariant on this processor")

    @property
    def product(self) -> autograd.Product:
        """The matrix product of linears."""
        return autograd.onednn_linear if self.onednn else F.linear


def measure_row_rule(dtype: torch.dtype) -> RowRule:
    """oneDNN if it knows the dtype, and the smallest padding under which the probes agree bitwise.

    If no padding does, the largest candidate and says so: `check_row_invariance` then says what still differs.
    """
    onednn = _has_onednn(dtype)
    product = autograd.onednn_linear if onednn else F.linear
    min_rows = next((c for c in _CANDIDATES if _linear_agrees(dtype, product, c)), None)
    row_multiple = next((c for c in _CANDIDATES if c >= 4 and _attention_agrees(dtype, c)), None)
    return RowRule(
        onednn=onednn,
        min_rows=min_rows or _CANDIDATES[-1],
        row_multiple=row_multiple or _CANDIDATES[-1],
        exact_linears=min_rows is not None,
        exact_attention=row_multiple is not None,
    )


def _has_onednn(dtype: torch.dtype) -> bool:
    if not torch.backends.mkldnn.is_available():
        return False
    x_TK = _random(0, 2, 16, dtype=dtype)
    try:
        autograd.onednn_linear(x_TK, x_TK)
    except RuntimeError:  # no kernel for this dtype on this CPU
        return False
    return True


def _random(seed: int, *shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def cancelling_factors(n: int, k: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """x [rows, k] and w [n, k] whose products are sums of k/2 pairs +p, -p in scattered places: 0 (k even).

    What comes out is the rounding error of the sum, so that another order of summation shows even after
    rounding to bfloat16, which hides nearly all of them in ordinary data.
    """
    half = k // 2
    x_TK, w_NK = _random(n, rows, k, dtype=dtype), _random(k, n, k, dtype=dtype)
    x_TK[:, half : 2 * half] = x_TK[:, :half]
    w_NK[:, half : 2 * half] = -w_NK[:, :half]
    order = torch.randperm(k, generator=torch.Generator().manual_seed(n + k))
    return x_TK[:, order].contiguous(), w_NK[:, order].contiguous()


def _linear_agrees(dtype: torch.dtype, product: autograd.Product, min_rows: int) -> bool:
    for n, k in ((192, 576), (64, 1536), (54, 72), (8, 576), (16, 4096)):
        x_TK, w_NK = cancelling_factors(n, k, 80, dtype)
        expected = autograd.padded_linear(x_TK, w_NK, None, product, min_rows)
        for rows in (1, 2, 3, 5, 9, 17, 33, 64):
            got = autograd.padded_linear(x_TK[-rows:], w_NK, None, product, min_rows)
            if not torch.equal(got, expected[-rows:]):
                return False
    return True


def cancelling_cache(pages: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Keys and values [pages, 16, 2, 64]: key j + 64 repeats key j of each 128, its value is the opposite.

    The weighted values of whole pairs cancel, as in `cancelling_factors`.
    """
    count = pages * 16 // 128 + 1
    half_k, half_v = (_random(s, count, 64, 2, 64, dtype=dtype) for s in (4, 5))
    both = torch.cat((half_k, half_k), 1), torch.cat((half_v, -half_v), 1)
    keys, values = (t.flatten(0, 1)[: pages * 16].unflatten(0, (pages, 16)) for t in both)
    return keys, values


def _attention_agrees(dtype: torch.dtype, row_multiple: int) -> bool:
    """One request of 600 tokens as one chunk, and pieces of it, with 5 query heads on 2 kv heads."""
    q_TNH, caches = _random(0, 600, 5, 64, dtype=dtype), cancelling_cache(38, dtype)

    def attend(start: int, stop: int) -> tuple[Tensor, Tensor]:
        layout = tiles.paged_layout([stop - start], [stop], [range(38)], page_size=16)
        heads = (0, 0, 0, 1, 1)
        return torch_ops.attention_paged(
            q_TNH[start:stop], *caches, layout, kv_index=heads, scale=0.125, row_multiple=row_multiple
        )

    out, lse = attend(0, 600)
    pieces = [(0, 1), (1, 2), (2, 9), (9, 42), (127, 128), (254, 263), (256, 257), (300, 385), (511, 514), (590, 600)]
    for a, b in pieces:
        part = attend(a, b)
        if not (torch.equal(part[0], out[a:b]) and torch.equal(part[1], lse[a:b])):
            return False
    return True


@dataclass(frozen=True, kw_only=True)
class RowReport:
    """What `check_row_invariance` found."""

    checks: int
    """Comparisons made."""
    failures: tuple[str, ...]
    """One line per op and row count whose bits differ from those of the same rows in a larger batch."""


def check_row_invariance(ops: Ops, dtype: torch.dtype) -> RowReport:
    """Compares rows alone and in batches bitwise, for every op of the serving path, at this thread count.

    Takes well under a second. The threads of the batch and of the single rows are the caller's business:
    `torch.set_num_threads` before the call.
    """
    failures, checks = [], 0
    with torch.no_grad():
        for name, total, counts, compute in _cases(ops, dtype):
            expected = compute(0, total)
            for rows in counts:
                start = 7 * rows % (total + 1 - rows)
                checks += 1
                if not torch.equal(compute(start, start + rows), expected[start : start + rows]):
                    failures.append(f"{name}: rows {start}..{start + rows - 1} of {total}")
    return RowReport(checks=checks, failures=tuple(failures))


_Case = tuple[str, int, tuple[int, ...], Callable[[int, int], Tensor]]


def _cases(ops: Ops, dtype: torch.dtype) -> Iterator[_Case]:
    """(name, rows in the batch, row counts to compare, function of the first and one past the last row)."""
    counts = (1, 2, 3, 5, 8, 17, 33, 64)
    for n, k in ((576, 576), (192, 576), (576, 1536), (54, 72), (8, 576), (8, 8)):
        x, w = cancelling_factors(n, k, 130, dtype)
        yield f"linear {n}x{k}", 130, counts, lambda a, b, x=x, w=w: ops.linear(x[a:b], w)
        packed = ops.pack((n, k), dtype, lambda a, b, w=w: w[a:b])
        if isinstance(packed, Packed):
            yield f"packed linear {n}x{k}", 130, counts, lambda a, b, x=x, w=packed: ops.linear(x[a:b], w)
    for width in (576, 77):
        x, y = _random(0, 300, width, dtype=dtype), _random(1, 300, width, dtype=dtype)
        yield f"rms_norm {width}", 300, counts, lambda a, b, x=x, y=y: ops.rms_norm(x[a:b], y[0], 1e-5)
        for i, part in enumerate(("sum", "normed")):
            yield (
                f"add_rms_norm {width}: {part}",
                300,
                counts,
                lambda a, b, x=x, y=y, i=i: ops.add_rms_norm(x[a:b], y[a:b], y[0], 1e-5)[i],
            )
        yield f"silu_gate {width}", 300, counts, lambda a, b, x=x, y=y: ops.silu_gate(x[a:b], y[a:b])
        yield f"gelu_gate {width}", 300, counts, lambda a, b, x=x, y=y: ops.gelu_gate(x[a:b], y[a:b])
        heads, angle = x[:, : width // 2 * 2].unflatten(1, (-1, 2 if width % 4 else 4)), y[:, :4].float()
        cos, sin = (t[:, : heads.shape[-1]].contiguous() for t in (angle.cos(), angle.sin()))
        yield (
            f"rotary {width}",
            300,
            counts,
            lambda a, b, h=heads, c=cos, s=sin: ops.rotary(h[a:b], c[a:b], s[a:b]),
        )

        def rotated(a: int, b: int, h: Tensor = heads, c: Tensor = cos, s: Tensor = sin) -> Tensor:
            keys, values = h.new_zeros(2, b - a, 1, *h.shape[1:])
            q = ops.rotary_write(h[a:b], h[a:b], h[a:b], c[a:b], s[a:b], keys, values, torch.arange(b - a).flip(0))
            return torch.cat((q, keys[:, 0].flip(0), values[:, 0].flip(0)), -1)

        yield f"rotary_write {width}", 300, counts, rotated
        yield f"log_softmax {width}", 300, counts, lambda a, b, x=x: ops.log_softmax(x[a:b])
    caches = cancelling_cache(38, dtype)
    for heads in ((0, 0, 0, 1, 1, 1), (0, 1, 1)):
        q = _random(2, 600, len(heads), 64, dtype=dtype)

        def attend(start: int, stop: int, q: Tensor = q, heads: tuple[int, ...] = heads) -> Tensor:
            layout = ops.paged_layout([stop - start], [stop], [range(38)], page_size=16)
            out, lse = ops.attention_paged(q[start:stop], *caches, layout, kv_index=heads, scale=0.125)
            return torch.cat((out.float(), lse[..., None]), -1)

        yield f"attention_paged kv_index={heads}", 600, (1, 2, 7, 33, 257, 512), attend

        def behind_prefix(start: int, stop: int, q: Tensor = q, heads: tuple[int, ...] = heads) -> Tensor:
            layout = ops.paged_layout(
                [stop - start], [stop], [range(3, 38)], page_size=16, prefix_lengths=[40], prefix_tables=[range(3)]
            )
            out, lse = ops.attention_paged(q[start:stop], *caches, layout, kv_index=heads, window=100, scale=0.125)
            return torch.cat((out.float(), lse[..., None]), -1)

        yield f"attention_paged kv_index={heads}, prefix, window", 550, (1, 2, 7, 33, 257, 512), behind_prefix

"""Ops over rows against torch's own and against a plain copy of the same bytes, interleaved in one run."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import dispatch, reference
from kernels.bench import timing
from kernels.memory import keep_freed_memory
from kernels.ops import Ops

TOKENS, WIDTH, FFN, HEADS, HEAD_DIM, VOCAB = 2048, 768, 2048, 12, 64, 32768
ROUNDS = 21

Case = tuple[str, int, Callable[[], object], Callable[[], object]]
"""Name, bytes read and written at least, ours, torch's."""


def run() -> str:
    """Forward and backward of a training step's rows, then the calls of a decode step."""
    keep_freed_memory()  # as the server does: else page faults of fresh outputs cost more than the work
    tables = [f"{torch.get_num_threads()} threads, torch {torch.__version__}. Median of {ROUNDS} calls, in turn."]
    tables.append(
        f"\nTraining: {TOKENS} tokens, width {WIDTH}, ffn {FFN}, {HEADS} heads of {HEAD_DIM}, vocab {VOCAB}\n"
    )
    tables += [
        "| op | dtype | ours, ms | torch, ms | copy, ms | torch / ours | ours / copy |",
        "|---|---|---|---|---|---|---|",
    ]
    for dtype in (torch.float32, torch.bfloat16):
        ops = dispatch.select(torch.device("cpu"), dtype)
        for name, size, ours, theirs in _training(ops, dtype):
            a = torch.ones(size // 8)  # a copy reads half of the bytes and writes half
            b = torch.empty_like(a)
            t = timing.interleaved({"ours": ours, "torch": theirs, "copy": lambda a=a, b=b: b.copy_(a)}, repeats=ROUNDS)
            o, c = t["ours"], t["copy"]
            tables.append(
                f"| {name} | {str(dtype)[6:]} | {o * 1e3:.2f} | {t['torch'] * 1e3:.2f} | {c * 1e3:.2f} "
                f"| {t['torch'] / o:.1f} | {o / c:.2f} |"
            )
    tables += ["\nDecoding, bfloat16, SmolLM2's widths, microseconds a call:\n"]
    tables += ["| op | rows | ours | torch |", "|---|---|---|---|"]
    for rows in (1, 32):
        ops = dispatch.select(torch.device("cpu"), torch.bfloat16)
        with torch.inference_mode():
            for name, ours, theirs in _decoding(ops, rows):
                t = timing.interleaved(
                    {"ours": lambda f=ours: _repeat(f), "torch": lambda f=theirs: _repeat(f)}, repeats=ROUNDS
                )
                tables.append(f"| {name} | {rows} | {t['ours'] * 1e4:.1f} | {t['torch'] * 1e4:.1f} |")
    return "\n".join(tables)


def _repeat(function: Callable[[], object]) -> None:
    for _ in range(100):
        function()


def _training(ops: Ops, dtype: torch.dtype) -> Iterator[Case]:
    e = dtype.itemsize
    x, delta = (torch.randn(TOKENS, WIDTH).to(dtype).requires_grad_() for _ in range(2))
    w = torch.ones(WIDTH, dtype=dtype, requires_grad=True)
    gate, up = (torch.randn(TOKENS, FFN).to(dtype).requires_grad_() for _ in range(2))
    q = torch.randn(TOKENS, HEADS, HEAD_DIM).to(dtype).requires_grad_()
    angle = torch.randn(TOKENS, HEAD_DIM)
    cos, sin = angle.cos(), angle.sin()
    rows, ffn = TOKENS * WIDTH * e, TOKENS * FFN * e

    def torch_add_norm() -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.rms_norm(total, (WIDTH,), w, 1e-5)

    yield from _pair(
        "rms_norm",
        lambda: ops.rms_norm(x, w, 1e-5),
        lambda: F.rms_norm(x, (WIDTH,), w, 1e-5),
        (x, w),
        2 * rows,
        3 * rows,
    )
    yield from _pair(
        "add_rms_norm", lambda: ops.add_rms_norm(x, delta, w, 1e-5), torch_add_norm, (x, delta, w), 4 * rows, 4 * rows
    )
    yield from _pair(
        "silu_gate", lambda: ops.silu_gate(gate, up), lambda: F.silu(gate) * up, (gate, up), 3 * ffn, 5 * ffn
    )
    yield from _pair(
        "gelu_gate",
        lambda: ops.gelu_gate(gate, up),
        lambda: F.gelu(gate, approximate="tanh") * up,
        (gate, up),
        3 * ffn,
        5 * ffn,
    )
    turned = 2 * rows + 8 * TOKENS * HEAD_DIM
    yield from _pair(
        "rotary", lambda: ops.rotary(q, cos, sin), lambda: reference.rotary(q, cos, sin), (q,), turned, turned
    )
    ids, table = torch.randint(VOCAB, (TOKENS,)), torch.randn(VOCAB, WIDTH).to(dtype).requires_grad_()
    yield from _pair(
        "embedding",
        lambda: ops.embedding(ids, table),
        lambda: F.embedding(ids, table),
        (table,),
        2 * rows,
        rows + VOCAB * WIDTH * e,
    )


def _pair(
    name: str,
    ours: Callable[[], Tensor | tuple[Tensor, ...]],
    theirs: Callable[[], Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    forward_bytes: int,
    backward_bytes: int,
) -> Iterator[Case]:
    """The op and its backward, from the same gradients of all outputs."""

    def quiet(function: Callable[[], object]) -> Callable[[], object]:
        return torch.no_grad()(function)

    def backward(function: Callable[[], Tensor | tuple[Tensor, ...]]) -> Callable[[], object]:
        outs = function()
        outs = outs if isinstance(outs, tuple) else (outs,)
        grads = [torch.ones_like(out) for out in outs]
        return lambda: torch.autograd.grad(outs, inputs, grads, retain_graph=True)

    yield name, forward_bytes, quiet(ours), quiet(theirs)
    yield f"{name}, backward", backward_bytes, backward(ours), backward(theirs)


def _decoding(ops: Ops, rows: int) -> Iterator[tuple[str, Callable[[], object], Callable[[], object]]]:
    width, ffn, heads, kv_heads, head_dim = 576, 1536, 9, 3, 64
    x, delta = (torch.randn(rows, width).bfloat16() for _ in range(2))
    w = torch.ones(width).bfloat16()
    qkv = torch.randn(rows, (heads + 2 * kv_heads) * head_dim).bfloat16()
    q, k, v = (
        t.unflatten(1, (-1, head_dim)) for t in qkv.split([n * head_dim for n in (heads, kv_heads, kv_heads)], 1)
    )
    angle, slots = torch.randn(rows, head_dim), torch.randperm(640)[:rows]
    cos, sin = angle.cos(), angle.sin()
    cache = torch.zeros(2, 40, 16, kv_heads, head_dim).bfloat16()
    both = torch.randn(rows, 2 * ffn).bfloat16()
    gate, up = both[:, :ffn], both[:, ffn:]

    def torch_add_norm() -> tuple[Tensor, Tensor]:
        total = x + delta
        return total, F.rms_norm(total, (width,), w, 1e-5)

    yield "add_rms_norm", lambda: ops.add_rms_norm(x, delta, w, 1e-5), torch_add_norm
    yield (
        "rotary_write",
        lambda: ops.rotary_write(q, k, v, cos, sin, cache[0], cache[1], slots),
        lambda: reference.rotary_write(q, k, v, cos, sin, cache[0], cache[1], slots),
    )
    yield "silu_gate", lambda: ops.silu_gate(gate, up), lambda: F.silu(gate) * up

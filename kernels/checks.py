"""What every backend asks of its arguments, and the type it works in; the spec itself is `kernels.reference`."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from kernels.ops import LowRank, Weight

Slopes = Sequence[float] | Tensor
"""[N] of ALiBi (arXiv:2108.12409, sec. 3), positive: a query pays `slope * (i - j)` for a key that far behind it."""


def working_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, else float32: the type in which norms, softmax and rotary angles are computed."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def check_kv_index(num_heads: int, num_kv_heads: int, kv_index: Sequence[int] | None) -> tuple[int, ...]:
    """The kv head of every query head, `num_heads` entries; ValueError if it doesn't fit the shapes."""
    if kv_index is None:
        if num_heads % max(num_kv_heads, 1):
            raise ValueError(
                f"kv_index=None needs num_heads divisible by num_kv_heads, "
                f"got {num_heads} and {num_kv_heads}; pass kv_index"
            )
        return tuple(n * num_kv_heads // num_heads for n in range(num_heads))
    if len(kv_index) != num_heads or any(not 0 <= k < num_kv_heads for k in kv_index):
        raise ValueError(
            f"kv_index={tuple(kv_index)} must hold {num_heads} entries (q has {num_heads} heads) "
            f"in 0..{num_kv_heads - 1} (k has {num_kv_heads} heads)"
        )
    return tuple(kv_index)


def check_attention(q_TNH: Tensor, keys: Tensor, values: Tensor) -> None:
    """ValueError unless q, keys and values have one dtype and head dim, and keys and values one shape."""
    shapes = f"q {tuple(q_TNH.shape)}, keys {tuple(keys.shape)} and values {tuple(values.shape)}"
    if q_TNH.dim() != 3 or keys.shape != values.shape or keys.shape[-1] != q_TNH.shape[-1]:
        raise ValueError(f"attention: {shapes} must share the head dim, keys and values the whole shape")
    if not q_TNH.dtype == keys.dtype == values.dtype:
        raise ValueError(f"attention: q is {q_TNH.dtype}, keys {keys.dtype}, values {values.dtype}; use one dtype")


def check_options(num_heads: int, window: int | None, soft_cap: float | None, alibi_slopes: Slopes | None) -> None:
    """ValueError unless window >= 1, soft_cap > 0 and there is one slope per query head, each where it is given."""
    if window is not None and window < 1:
        raise ValueError(f"window={window} must be at least 1, or None")
    if soft_cap is not None and not 0 < soft_cap < math.inf:
        raise ValueError(f"soft_cap={soft_cap} must be positive, or None")
    if alibi_slopes is not None and len(alibi_slopes) != num_heads:
        raise ValueError(f"alibi_slopes has {len(alibi_slopes)} entries for the {num_heads} heads of q")


def contiguous_rows(x: Tensor) -> Tensor:
    """x [T, K] with contiguous rows, any distance apart: itself where it is so, else a copy."""
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def check_linear(x_TK: Tensor, w_NK: Weight, bias_N: Tensor | None, updates: Sequence[LowRank]) -> None:
    """ValueError unless the shapes fit, bias has the dtype of x, and updates rise without overlap."""
    if x_TK.dim() != 2 or len(w_NK.shape) != 2 or x_TK.shape[1] != w_NK.shape[1]:
        raise ValueError(f"linear: x {tuple(x_TK.shape)} and w {tuple(w_NK.shape)} must be [T, K] and [N, K]")
    if w_NK.dtype not in (x_TK.dtype, working_dtype(x_TK.dtype)):
        raise ValueError(f"linear: x is {x_TK.dtype}, w is {w_NK.dtype}; w must have that dtype or be its master")
    if bias_N is not None and (bias_N.dtype != x_TK.dtype or bias_N.shape != w_NK.shape[:1]):
        raise ValueError(
            f"linear: bias {tuple(bias_N.shape)} in {bias_N.dtype} must be [{w_NK.shape[0]}] in {x_TK.dtype}"
        )
    done = 0
    for update in updates:
        if not done <= update.start <= update.stop <= x_TK.shape[0]:
            raise ValueError(
                f"linear: update of rows {update.start} .. {update.stop} must lie in {done} .. {len(x_TK)}"
            )
        rank = update.a_RK.shape[0]
        if tuple(update.a_RK.shape) != (rank, x_TK.shape[1]) or tuple(update.b_NR.shape) != (w_NK.shape[0], rank):
            raise ValueError(
                f"linear: factors a {tuple(update.a_RK.shape)} and b {tuple(update.b_NR.shape)} must be "
                f"[R, {x_TK.shape[1]}] and [{w_NK.shape[0]}, R]"
            )
        done = update.stop

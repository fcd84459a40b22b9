"""Linears of the C++ backend: packed weights, low-rank updates, and both gradients by the same kernels.

A weight is multiplied in panels (`kernels/cpu/linear.cpp`). A frozen one is packed once (`pack`); a master weight in
float32 is packed, and rounded on the way, at every call, or once between two updates (`kernels.master`). The gradient
of x multiplies the packed transpose, the gradient of the weight is summed in float32 over rising rows.
"""

import itertools
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from kernels import checks, cpu_rows
from kernels.master import Master
from kernels.memory import Area
from kernels.ops import LowRank, Packed, Part, Rows, Weight
from kernels.reference import embedding_part

PANEL = 48
"""Rows of a weight that stand together (`kernels/cpu/kernels.h`)."""
_STAGE_BYTES = 2 << 20  # larger ones leave holes in the heap between packed weights
_TURNED_BYTES = 32 << 20  # of a transpose that is made for one product: glibc gives back what is larger each time


def pack(shape: tuple[int, int], dtype: torch.dtype, rows: Rows, area: Area | None = None) -> Packed:
    """The weight in the layout of `kernels/cpu/linear.cpp`, filled from about 2 MB of rows at a time."""
    n, k = shape
    if area is None:
        data = torch.ops.onemesh.empty_packed(torch.empty(0, dtype=dtype), n, k)
    else:
        per_unit = 4 // dtype.itemsize
        panels, units = -(-n // PANEL), -(-k // per_unit)
        data = area.take(panels * units * PANEL * 4).view(dtype).view(panels, units, PANEL, per_unit)
    step = max(_STAGE_BYTES // max(k * dtype.itemsize * PANEL, 1), 1) * PANEL
    for first in range(0, n, step):
        torch.ops.onemesh.pack_rows(data, rows(first, min(first + step, n)).to(dtype).contiguous(), first)
    return Packed(data, shape, _turn)


def _turn(packed: Packed) -> Packed:
    n, k = packed.shape
    return Packed(torch.ops.onemesh.turn(packed.data, n, k, 0, -(-k // PANEL)), (k, n), _turn)


def _packed(w_NK: Tensor, dtype: torch.dtype) -> Packed:
    """A plain weight whose rows or columns are contiguous, packed in `dtype`."""
    n, k = w_NK.shape
    data = torch.ops.onemesh.empty_packed(torch.empty(0, dtype=dtype), n, k)
    torch.ops.onemesh.pack_rows(data, w_NK, 0)
    return Packed(data, (n, k), _turn)


def pack_master(w_NK: Tensor, dtype: torch.dtype) -> Packed:
    """A weight that trains, rounded and packed for several products: those that it keeps, or new ones."""
    n, k = w_NK.shape

    def turn(packed: Packed) -> Packed:
        return Packed(_panels(w_NK, packed.dtype, True), (k, n), _turn)

    return Packed(_panels(w_NK, dtype, False), (n, k), turn)


def _panels(w_NK: Tensor, dtype: torch.dtype, transposed: bool) -> Tensor:
    def make() -> Tensor:
        plain = w_NK.detach().contiguous()
        return _packed(plain.t() if transposed else plain, dtype).data

    return w_NK.packed(dtype, transposed, make) if isinstance(w_NK, Master) else make()


def _forward(w: Weight, dtype: torch.dtype) -> Tensor:
    """The weight's panels in `dtype`."""
    return w.to(dtype).data if isinstance(w, Packed) else _panels(w, dtype, False)


def _backward(w: Weight, dtype: torch.dtype) -> Tensor:
    """The panels of its transpose."""
    return w.to(dtype).transposed().data if isinstance(w, Packed) else _panels(w, dtype, True)


def linear(
    x_TK: Tensor,
    w_NK: Weight,
    bias_N: Tensor | None = None,
    updates: Sequence[LowRank] = (),
    *,
    wide: bool = False,
) -> Tensor:
    """`reference.linear`, row-invariant: an element is one chain of multiply-adds in float32, its update's behind it.

    Differentiable in everything that isn't packed.
    """
    return linears(x_TK, (Part(w_NK, bias_N, updates),), wide=wide)[0]


def linears(x_TK: Tensor, parts: Sequence[Part], *, wide: bool = False) -> tuple[Tensor, ...]:
    """`reference.linears` in one call: the results are columns of one tensor."""
    for part in parts:
        checks.check_linear(x_TK, part.w_NK, part.bias_N, part.updates)
    x_TK = checks.contiguous_rows(x_TK)
    places: list[tuple[int, int, int]] = []
    factors: list[Weight] = []
    inputs: list[Tensor] = []
    for i, part in enumerate(parts):
        for update in part.updates:
            places.append((i, update.start, update.stop))
            factors.append(update.b_NR)
            x = x_TK[update.start : update.stop] if update.x_TK is None else update.x_TK
            inputs.append(linear(x, update.a_RK))
    biases, weights = [part.bias_N for part in parts], [part.w_NK for part in parts]
    if torch.is_grad_enabled():
        return _Linears.apply(x_TK, wide, places, len(parts), *biases, *weights, *factors, *inputs)
    return _linears(x_TK, wide, places, biases, weights, factors, inputs)


def _linears(
    x_TK: Tensor,
    wide: bool,
    places: Sequence[tuple[int, int, int]],
    biases: Sequence[Tensor | None],
    weights: Sequence[Weight],
    factors: Sequence[Weight],
    inputs: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Part i is x weights[i]^T + biases[i]; rows start .. stop of part i also get inputs[j] factors[j]^T, for every
    places[j] = (i, start, stop)."""
    widths = [w.shape[0] for w in weights]
    packed = [_forward(w, x_TK.dtype) for w in weights]
    b = [_forward(w, x_TK.dtype) for w in factors]
    numbers = list(itertools.chain.from_iterable(places))
    out = torch.ops.onemesh.linears(x_TK, packed, list(biases), widths, wide, list(inputs), b, numbers)
    return (out,) if len(widths) == 1 else out.split(widths, dim=1)


def _product(x_TK: Tensor, panels: Tensor, out_width: int, *, wide: bool = False) -> Tensor:
    return torch.ops.onemesh.sum_of_products([checks.contiguous_rows(x_TK)], [panels], out_width, wide)


def input_gradient(grad_TN: Tensor, w_NK: Weight) -> Tensor:
    """`reference.input_gradient`: in float32."""
    if not isinstance(w_NK, Packed):
        return _product(grad_TN, _backward(w_NK, grad_TN.dtype), w_NK.shape[1], wide=True)
    n, k = w_NK.shape
    panels, step = -(-k // PANEL), max(_TURNED_BYTES // (n * w_NK.dtype.itemsize * PANEL + 1), 1)
    out_TK = grad_TN.new_empty(len(grad_TN), k, dtype=torch.float32)
    for first in range(0, panels, step):
        turned = torch.ops.onemesh.turn(w_NK.data, n, k, first, min(first + step, panels))
        columns = slice(first * PANEL, min((first + step) * PANEL, k))
        out_TK[:, columns] = _product(grad_TN, turned, columns.stop - columns.start, wide=True)
    return out_TK


def add_weight_gradient(out_NK: Tensor, grad_TN: Tensor, x_TK: Tensor) -> None:
    """`reference.add_weight_gradient`, out in float32: chains with rising t that go on from what stands in out."""
    torch.ops.onemesh.weight_gradient(out_NK, checks.contiguous_rows(grad_TN), checks.contiguous_rows(x_TK), True)


def _weight_gradient(w_NK: Weight, grad_TN: Tensor, x_TK: Tensor) -> Tensor | None:
    """The gradient of a linear's weight, or None if it's put off."""
    if isinstance(w_NK, Master):
        return w_NK.gradient(partial(_weight_sum, w_NK), grad_TN, x_TK)
    return _weight_sum(w_NK, grad_TN, x_TK)


def _weight_sum(w_NK: Weight, grad_TN: Tensor, x_TK: Tensor) -> Tensor:
    if isinstance(w_NK, Master) and w_NK.adds_gradients:
        assert w_NK.grad is not None
        add_weight_gradient(w_NK.grad, grad_TN, x_TK)
        return w_NK.added()
    out_NK = torch.empty(w_NK.shape, dtype=torch.float32)
    torch.ops.onemesh.weight_gradient(out_NK, checks.contiguous_rows(grad_TN), checks.contiguous_rows(x_TK), False)
    return out_NK.to(w_NK.dtype)


class _Linears(torch.autograd.Function):
    """`_linears` of tensors `*biases, *weights, *factors, *inputs`."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TK: Tensor,
        wide: bool,
        places: Sequence[tuple[int, int, int]],
        parts: int,
        *tensors: Any,
    ) -> tuple[Tensor, ...]:
        """[T, N_i] in x.dtype, or float32."""
        biases, weights = tensors[:parts], tensors[parts : 2 * parts]
        factors, inputs = tensors[2 * parts : 2 * parts + len(places)], tensors[2 * parts + len(places) :]
        matrices = (*weights, *factors)
        # of what recomputation hands out in a saved tensor's place, a master isn't one any more
        ctx.kept = [m if isinstance(m, Packed | Master) else None for m in matrices]
        wants_weights = any(ctx.needs_input_grad[4 + parts : 4 + 2 * parts])
        used = x_TK if wants_weights else None
        ctx.save_for_backward(used, *inputs, *(m for m in matrices if isinstance(m, Tensor)))
        ctx.places, ctx.parts, ctx.dtype = places, parts, x_TK.dtype
        ctx.set_materialize_grads(False)
        return _linears(x_TK, wide, places, biases, weights, factors, inputs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of x: sum of dy_i w_i in one chain. Of weights and factors, in float32: dy^T x, dy^T h. Of inputs h: dy b."""
        parts, count = ctx.parts, len(ctx.places)
        x_TK, *rest = ctx.saved_tensors
        inputs, plain = rest[:count], iter(rest[count:])
        matrices = [kept if isinstance(kept, Packed) else _either(kept, next(plain)) for kept in ctx.kept]
        weights, factors = matrices[:parts], matrices[parts:]
        wants_x, _, _, _, *wants = ctx.needs_input_grad
        dtype = ctx.dtype
        dys = [None if grad is None else checks.contiguous_rows(grad.to(dtype)) for grad in grads]

        grad_x = _grad_x(dys, weights, dtype) if wants_x else None
        found: list[Tensor | None] = [None] * len(wants)
        for i, dy in enumerate(dys):
            if dy is not None and wants[i]:
                found[i] = dy.sum(0)
            if dy is not None and wants[parts + i]:
                found[parts + i] = _weight_gradient(weights[i], dy, x_TK)
        for j, (i, start, stop) in enumerate(ctx.places):
            if (dy := dys[i]) is None:
                continue
            dy = dy[start:stop]
            if wants[2 * parts + j]:
                found[2 * parts + j] = _weight_gradient(factors[j], dy, inputs[j])
            if wants[2 * parts + count + j]:
                found[2 * parts + count + j] = _product(dy, _backward(factors[j], dtype), inputs[j].shape[1])
        return grad_x, None, None, None, *found


def _either(master: Master | None, saved: Tensor) -> Tensor:
    return saved if master is None else master


_MOST_PRODUCTS = 4  # of one call


def _grad_x(dys: Sequence[Tensor | None], weights: Sequence[Weight], dtype: torch.dtype) -> Tensor | None:
    pairs = [(dy, _backward(w, dtype)) for dy, w in zip(dys, weights, strict=True) if dy is not None]
    total: Tensor | None = None
    for first in range(0, len(pairs), _MOST_PRODUCTS):
        some = pairs[first : first + _MOST_PRODUCTS]
        width = weights[0].shape[1]
        out = torch.ops.onemesh.sum_of_products([dy for dy, _ in some], [w for _, w in some], width, False)
        total = out if total is None else total + out
    return total


def embedding(ids_T: Tensor, w_VD: Weight, part: int | None = None) -> Tensor:
    """`reference.embedding`, of a packed weight too."""
    if isinstance(w_VD, Packed):
        return torch.ops.onemesh.packed_rows(ids_T.contiguous(), w_VD.data, *w_VD.shape, part)
    return cpu_rows.embedding(ids_T, w_VD) if part is None else embedding_part(cpu_rows.embedding, ids_T, w_VD, part)

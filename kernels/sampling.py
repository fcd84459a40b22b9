"""Draws tokens from rows of logits: what is drawn, how numpy does it, and the choice of the compiled form.

A row of float32 logits, its largest one finite, with temperature > 0, top_k, top_p, min_p and a number u in [0, 1):

    min_p    logits below  largest + temperature * ln(min_p)  are out
    top_k    of the rest, those below the k-th largest are out; what ties with it stays; k < 1 keeps all
    weight   of what is left: round(2^42 * exp((logit - largest) / temperature)), an integer
    order    falling logit, ties by rising id
    top_p    the tokens are kept up to the first at which the running sum of weights reaches top_p * their whole sum
    draw     the first token at which the running sum exceeds u * the sum of those kept

Integers add up to the same in any order, so a token depends neither on how a sum was cut (buckets, prefixes, vectors)
nor on batch and threads. A token 2^43 times less likely than the likeliest has weight 0. u counts in units of 2^-53.
Log-probabilities come from the same weights at temperature 1; they are within 1e-7 of the exact ones.

Compiled, a row is never sorted (`kernels/cpu/sampler.cpp`, `kernels/cuda/sampling.cu`); numpy sorts as far down as it
must.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kernels import cpu_ops, cuda_ops, cuda_sampling

FIRST_SORTED = 512
"""How many of the largest logits numpy sorts at first; each further attempt sorts 16 times as many."""
ONE = 2**42
"""Weight of the largest logit."""
_LOWEST = 33.0  # temperatures below the largest logit: weights are 0 from 30 on


@dataclass(frozen=True, kw_only=True)
class SamplingOps:
    """`draw` and `logprobs` of this module or their compiled forms: same arguments, same results.

    A weight may differ by 1 where exp is rounded otherwise.
    """

    name: str
    draw: Callable[..., Tensor]
    logprobs: Callable[..., tuple[Tensor, Tensor, Tensor]]
    device: str = "cpu"
    """Type of the device on which the logits must lie; all other tensors lie on the host."""


def select(device: torch.device) -> SamplingOps:
    """The compiled form for logits on this device, if its library was built, else that for the host or numpy's."""
    if device.type == "cuda" and cuda_ops.load():
        return SamplingOps(name="cuda", draw=cuda_sampling.draw, logprobs=cuda_sampling.logprobs, device="cuda")
    if cpu_ops.load() is None:
        return NUMPY
    return SamplingOps(name="compiled", draw=torch.ops.onemesh.draw, logprobs=torch.ops.onemesh.logprobs)


def draw(
    logits_BV: Tensor,
    rows_C: Tensor,
    temperature_C: Tensor,
    top_k_C: Tensor,
    top_p_C: Tensor,
    min_p_C: Tensor,
    u_C: Tensor,
) -> Tensor:
    """One token id [C] int64 for each of the chosen rows of float32 logits on the CPU.

    rows and top_k are int64, the rest float64. temperature 0 takes the largest logit, of equals the first. -1 where
    the row's largest logit is nan, infinite or -inf.
    """
    each = zip(*(t.tolist() for t in (temperature_C, top_k_C, top_p_C, min_p_C, u_C)), strict=True)
    logits = logits_BV.numpy()
    ids = [_draw(logits[row], *numbers) for row, numbers in zip(rows_C.tolist(), each, strict=True)]
    return torch.tensor(ids, dtype=torch.int64)


def logprobs(logits_BV: Tensor, rows_C: Tensor, ids_C: Tensor, num_top_C: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of rows of float32 logits: (of `ids` [C], ids [C, K] and values [C, K] of the largest).

    K is the largest entry of `num_top`. A row's largest come by falling value, ties by rising id; those of
    probability 0 are left out. What is missing up to K has id -1 and -inf. Values are float64. The rows' largest
    logits are finite.
    """
    width = max(num_top_C.tolist(), default=0)
    found = torch.empty(len(rows_C), dtype=torch.float64)
    top_ids = torch.full((len(rows_C), width), -1)
    top_values = torch.full((len(rows_C), width), -math.inf, dtype=torch.float64)
    logits = logits_BV.numpy()
    each = zip(rows_C.tolist(), ids_C.tolist(), num_top_C.tolist(), strict=True)
    for i, (row, id, num_top) in enumerate(each):
        row_V = logits[row]
        largest = float(row_V.max())
        norm = largest + math.log(float(_weights(row_V, largest, 1.0).sum()) / ONE)
        found[i] = float(row_V[id]) - norm
        order = _sorted_from(row_V, _kth_largest(row_V, num_top))[:num_top] if num_top else ()
        top = [(int(j), float(row_V[j]) - norm) for j in order if row_V[j] > -math.inf]
        for at, (j, value) in enumerate(top):
            top_ids[i, at], top_values[i, at] = j, value
    return found, top_ids, top_values


NUMPY = SamplingOps(name="numpy", draw=draw, logprobs=logprobs)

Row = NDArray[np.float32]


def _draw(row_V: Row, temperature: float, top_k: int, top_p: float, min_p: float, u: float) -> int:
    largest = float(row_V.max())
    if not math.isfinite(largest):  # numpy's max is nan if any element is
        return -1
    if temperature == 0:
        return int(row_V.argmax())
    floor = largest - _LOWEST * temperature
    if min_p > 0:
        floor = max(floor, largest + temperature * math.log(min_p))
    with np.errstate(over="ignore"):
        ids = np.flatnonzero(row_V >= np.float32(floor))
    if 0 < top_k < len(ids):
        ids = ids[row_V[ids] >= np.float32(_kth_largest(row_V[ids], top_k))]
    logits = row_V[ids]
    weights = _weights(logits, largest, temperature)
    total = int(weights.sum())
    if top_p < 1:
        least = min(max(math.ceil(top_p * float(total)), 1), total)
        total = _find(logits, weights, least - 1)[1]
    return int(ids[_find(logits, weights, int(u * 2.0**53) * total >> 53)[0]])


def _weights(logits: Row, largest: float, temperature: float) -> NDArray[np.int64]:
    return np.rint(np.exp((logits.astype(np.float64) - largest) * (1 / temperature)) * ONE).astype(np.int64)


def _find(logits: Row, weights: NDArray[np.int64], x: int) -> tuple[int, int]:
    """The first place in the order at which the running sum exceeds x (less than the whole sum), and that sum.

    Sorts ever longer prefixes. One holds either all or none of the tokens with equal logits.
    """
    count = FIRST_SORTED
    while True:
        order = _sorted_from(logits, _kth_largest(logits, count))
        sums = np.cumsum(weights[order])
        at = int(np.searchsorted(sums, x, side="right"))
        if at < len(order):
            return int(order[at]), int(sums[at])
        count *= 16


def _kth_largest(row_V: Row, k: int) -> float:
    k = min(k, len(row_V))
    return float(np.partition(row_V, len(row_V) - k)[len(row_V) - k])


def _sorted_from(row_V: Row, floor: float) -> NDArray[np.int64]:
    """Places of all logits >= floor, by falling logit, ties by rising place."""
    places = np.flatnonzero(row_V >= np.float32(floor))
    return places[np.argsort(-row_V[places], kind="stable")]

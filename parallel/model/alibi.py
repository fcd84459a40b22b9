"""Attention with linear biases (ALiBi, arXiv:2108.12409): how fast each head's scores fall with the distance."""

from __future__ import annotations

import functools
import itertools


@functools.cache
def slopes(num_heads: int) -> tuple[float, ...]:
    """`2^(-8 i / n)` for i = 1 .. n where the number of heads n is a power of two (sec. 3).

    Otherwise those of the power below, then every other one, from the first, of the power above, as the paper's code
    has it.
    """
    power = 1 << (num_heads.bit_length() - 1)
    own = [2 ** (-8 * i / power) for i in range(1, power + 1)]
    between = [2 ** (-4 * i / power) for i in range(1, 2 * power + 1, 2)]
    return tuple(itertools.chain(own, between[: num_heads - power]))

"""Rotary position embedding: the frequencies with their scalings, and which dimensions turn together.

Plain RoPE is arXiv:2104.09864; `linear` is position interpolation (arXiv:2306.15595); `llama3` is Meta's
piecewise scaling of Llama 3.1; `yarn` is arXiv:2309.00071 (NTK-by-parts, sec. 3.2, and the attention factor,
sec. 3.3). Frequencies are computed in float64 once a model and agree with transformers' to float32 rounding.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from conf.schema import Architecture, RopeScaling


def frequencies(architecture: Architecture, *, local: bool = False) -> tuple[Tensor, float]:
    """(float64 [H/2] angle per position, factor on cos and sin); local: with the base that windowed layers have.

    The angle of a pair of dimensions that isn't turned is 0, which leaves it as it is, to the bit.
    """
    half = torch.zeros(architecture.head_dim // 2, dtype=torch.float64)
    if architecture.alibi:
        return half, 1.0
    turned, factor = _turned(architecture, local)
    half[: len(turned)] = turned
    return half, factor


def paired(x_TNH: Tensor, architecture: Architecture) -> Tensor:
    """Queries or keys [T, N, H] with the dimensions that rotary turns together half a head apart, as `ops.rotary` has
    them; scores don't feel an order that both share. Of a head of width 8, of which 4 are turned as neighbours:

        given    0 1 2 3 4 5 6 7
        paired   0 2 4 5 1 3 6 7
    """
    width, head = architecture.rotary_dim or architecture.head_dim, architecture.head_dim
    if width == head and not architecture.rotary_interleaved:
        return x_TNH
    turned, rest = x_TNH.split((width, head - width), dim=-1)
    first, second = (turned[..., 0::2], turned[..., 1::2]) if architecture.rotary_interleaved else turned.chunk(2, -1)
    middle = (head - width) // 2
    return torch.cat((first, rest[..., :middle], second, rest[..., middle:]), dim=-1)


def _turned(architecture: Architecture, local: bool) -> tuple[Tensor, float]:
    width = architecture.rotary_dim or architecture.head_dim
    half = torch.arange(0, width, 2, dtype=torch.float64)
    if local:
        assert architecture.window_rope_theta is not None
        return architecture.window_rope_theta ** (-half / width), 1.0
    plain = architecture.rope_theta ** (-half / width)
    scaling = architecture.rope_scaling
    if scaling is None:
        return plain, 1.0
    if scaling.kind == "linear":
        return plain / scaling.factor, 1.0
    if scaling.kind == "llama3":
        return _llama3(plain, scaling), 1.0
    assert scaling.kind == "yarn", scaling.kind
    return _yarn(plain, scaling, architecture)


def _llama3(plain: Tensor, scaling: RopeScaling) -> Tensor:
    """Long wavelengths are interpolated, short ones kept, those between blended linearly."""
    original = scaling.original_max_positions
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    assert original is not None and low is not None and high is not None
    turns = original * plain / (2 * math.pi)
    blend = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * (blend + (1 - blend) / scaling.factor)


def _yarn(plain: Tensor, scaling: RopeScaling, architecture: Architecture) -> tuple[Tensor, float]:
    original = scaling.original_max_positions or architecture.max_positions
    base, width = architecture.rope_theta, architecture.head_dim

    def dim_of(turns: float) -> float:
        return width * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = dim_of(scaling.beta_fast or 32.0), dim_of(scaling.beta_slow or 1.0)
    if scaling.truncate is not False:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    ramp = torch.arange(width // 2, dtype=torch.float64)
    ramp = ((ramp - low) / max(high - low, 1e-3)).clamp(0, 1)
    return plain / scaling.factor * ramp + plain * (1 - ramp), _yarn_factor(scaling)


def _yarn_factor(scaling: RopeScaling) -> float:
    if scaling.attention_factor is not None:
        return scaling.attention_factor

    def mscale(weight: float) -> float:
        return 1.0 if scaling.factor <= 1 else 0.1 * weight * math.log(scaling.factor) + 1.0

    if scaling.mscale and scaling.mscale_all_dim:
        return mscale(scaling.mscale) / mscale(scaling.mscale_all_dim)
    return mscale(1.0)

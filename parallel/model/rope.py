"""Rotary position embedding: the frequencies, with the scalings of the Llama family.

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
    """(float64 [H/2] angle per position, factor on cos and sin); local: with the base that windowed layers have."""
    half = torch.arange(0, architecture.head_dim, 2, dtype=torch.float64)
    if local:
        assert architecture.window_rope_theta is not None
        return architecture.window_rope_theta ** (-half / architecture.head_dim), 1.0
    plain = architecture.rope_theta ** (-half / architecture.head_dim)
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

"""The rotary scaling of a GGUF file.

`linear` and `yarn` are metadata. Llama 3.1's piecewise scaling is only there as its result, one divisor per
frequency in `rope_freqs.weight`; its four parameters are recovered and must reproduce the divisors.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from conf.schema import ConfigError, RopeScaling
from parallel.model.gguf_file import GgufFile, read_rows


def read_gguf_rope(
    file: GgufFile, head_dim: int, max_positions: int, theta: float = 10000.0
) -> tuple[float, RopeScaling | None]:
    """(theta, scaling or None) of `file`; `theta` where it names none.

    Raises:
        ConfigError: a scaling that isn't supported, or one whose parameters can't be recovered.
    """
    fields, prefix = file.fields, f"{file.fields['general.architecture']}.rope."
    theta = file.number(f"{prefix}freq_base", theta)
    given = {
        key.removeprefix(f"{prefix}scaling."): value
        for key, value in fields.items()
        if key.startswith(f"{prefix}scaling.")
    }
    kind = given.pop("type", "none")
    given.pop("finetuned", None)
    if kind not in ("none", "linear", "yarn"):
        raise ConfigError(f"{file.path}: {prefix}scaling.type={kind!r} is not supported; supported are linear and yarn")
    if any(name.startswith("rope_factors_") for name in file.tensors):
        raise ConfigError(f"{file.path}: rope_factors_long/short (longrope) are not supported")
    if "rope_freqs.weight" in file.tensors:
        return theta, _llama3(file, theta, head_dim)
    factor = file.number(f"{prefix}scaling.factor", file.number(f"{prefix}scale_linear", 1.0))
    original = file.number(f"{prefix}scaling.original_context_length", max_positions)
    betas: dict[str, Any] = {
        name: file.number(key, 1.0)
        for name in ("beta_fast", "beta_slow")
        if (key := f"{prefix}scaling.yarn_{name}") in fields
    }
    for key in ("factor", "original_context_length", "yarn_beta_fast", "yarn_beta_slow"):
        given.pop(key, None)
    neutral = {
        "attn_factor": 1.0,
        "yarn_ext_factor": 1.0,
        "yarn_attn_factor": 1.0,
        "yarn_log_multiplier": 0.0,
    }
    for key, value in given.items():
        if value != neutral.get(key):
            raise ConfigError(f"{file.path}: {prefix}scaling.{key}={value} is not supported; remove it")
    if factor == 1.0:
        return theta, None
    if kind != "yarn":
        return theta, RopeScaling(kind="linear", factor=factor)
    return theta, RopeScaling(kind="yarn", factor=factor, original_max_positions=int(original), **betas)


def _llama3(file: GgufFile, theta: float, head_dim: int) -> RopeScaling:
    tensor = file.tensors["rope_freqs.weight"]
    if tensor.shape != (head_dim // 2,):
        raise ConfigError(f"{file.path}: rope_freqs.weight has shape {list(tensor.shape)}, not [{head_dim // 2}]")
    divisors = read_rows(file.path, tensor, range(head_dim // 2), (0, 1), torch.float64).numpy().ravel()
    turns = theta ** (-np.arange(0, head_dim, 2) / head_dim) / (2 * np.pi)
    for low, high, original in ((1.0, 4.0, 8192), *_solve(divisors, turns)):
        factor = float(np.float32(divisors.max()))
        blend = np.clip((original * turns - low) / (high - low), 0, 1)
        if np.allclose(1 / (blend + (1 - blend) / factor), divisors, rtol=1e-5):
            return RopeScaling(
                kind="llama3",
                factor=factor,
                low_freq_factor=low,
                high_freq_factor=high,
                original_max_positions=original,
            )
    raise ConfigError(f"{file.path}: rope_freqs.weight is not a Llama 3 scaling; other ones are not supported")


def _solve(divisors: np.ndarray, turns: np.ndarray) -> tuple[tuple[float, float, int], ...]:
    """(low, high, original context) from the blended divisors, with low = 1 since only ratios matter.

    A blended divisor d obeys 1/d = blend + (1 - blend) / factor, and blend is linear in the turns per position:
    blend = turns * original / (high - low) - low / (high - low).
    """
    factor = divisors.max()
    blended = (divisors > 1 + 1e-6) & (divisors < factor * (1 - 1e-6))
    if blended.sum() < 2:
        return ()
    blend = (1 / divisors[blended] - 1 / factor) / (1 - 1 / factor)
    slope, offset = np.polyfit(turns[blended], blend, 1)
    high = round(float(1 - 1 / offset), 3)
    return ((1.0, high, round(float(slope * (high - 1)))),) if high > 1 else ()

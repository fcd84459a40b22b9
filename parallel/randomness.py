"""Random numbers keyed by meaning, so that every layout, recompute and resume draws the same ones.

A dropout decision is a hash of (seed, step, data row, position in the row, layer and module, global feature):
nothing depends on how tokens are packed, in which microbatch they are, or how features are cut. The hash is the
32-bit finaliser of MurmurHash3 applied once per key, computed in int64 lanes.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


@dataclass(frozen=True)
class DropoutKey:
    """What identifies the tokens of a microbatch for dropout."""

    seed: int
    step: int
    row_T: Tensor
    """int64 [T]: number of the data row each token comes from."""
    position_T: Tensor
    """int64 [T]: position of the token in its row."""


def seed_of(seed: int, name: str) -> int:
    """A 63-bit seed for the initial values of parameter `name`."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def keep_mask(key: DropoutKey, site: str, first_feature: int, num_features: int, rate: float) -> Tensor:
    """bool [T, num_features]: which of the global features first_feature, first_feature + 1, ... are kept.

    `site` names the layer and module. Each entry is kept with probability 1 - rate.
    """
    base = seed_of(key.seed, f"dropout:{key.step}:{site}") & _MASK
    token_T = _mix(_mix(key.row_T ^ base) ^ key.position_T)
    feature = torch.arange(first_feature, first_feature + num_features, device=token_T.device)
    hashed = _mix(token_T[:, None] ^ (feature * 0x9E3779B9 & _MASK))
    return hashed >= int(rate * 2**32)


def _mix(x: Tensor) -> Tensor:
    """MurmurHash3's fmix32 on int64 lanes that hold 32-bit values."""
    x = x & _MASK
    x = (x ^ (x >> 16)) * 0x85EBCA6B & _MASK
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & _MASK
    return x ^ (x >> 16)

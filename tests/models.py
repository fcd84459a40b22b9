"""Small random models for tests: as weights of ours, and as transformers' own model with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import Architecture
from parallel.model.hf import parameter_shapes
from parallel.randomness import seed_of
from parallel.sharding import Index

TINY = Architecture(
    num_layers=5,
    width=72,
    num_heads=9,
    num_kv_heads=3,
    head_dim=8,
    ffn_width=100,
    vocab_size=101,
    max_positions=256,
    tied_embeddings=True,
)
"""Uneven on purpose: 9 heads, 3 KV groups, 100 ffn columns and 101 vocabulary rows divide by next to nothing."""

BIASED = replace(TINY, qkv_bias=True, output_bias=True, mlp_bias=True, tied_embeddings=False)


@dataclass(frozen=True)
class RandomWeights:
    """Weights by name and seed, in float64."""

    architecture: Architecture
    seed: int = 0

    def full(self, name: str) -> Tensor:
        """The whole parameter."""
        shape = parameter_shapes(self.architecture)[name]
        generator = torch.Generator().manual_seed(seed_of(self.seed, name))
        values = torch.randn(shape, generator=generator, dtype=torch.float64)
        if name.endswith("norm.weight"):
            return 1 + 0.1 * values
        return 0.1 * values

    def read(self, name: str, index: Index, dtype: torch.dtype) -> Tensor:
        """A block of it."""
        return self.full(name)[index].to(dtype).contiguous()

    def state(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """All parameters, for transformers' load_state_dict."""
        return {name: self.full(name).to(dtype) for name in parameter_shapes(self.architecture)}

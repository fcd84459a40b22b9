"""Small random models for tests: as weights of ours, and as transformers' own model with the same numbers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from conf.schema import Architecture, RopeScaling
from parallel.model.hf import parameter_shapes
from parallel.model.names import Place
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

QWEN3 = replace(TINY, head_dim=10, qk_norm=True)
GEMMA2 = replace(
    TINY,
    norm_offset=True,
    post_norms=True,
    activation="gelu_tanh",
    embedding_scale=TINY.width**0.5,
    attention_scalar=20.0,
    score_cap=2.0,
    logit_cap=1.5,
    sliding_window=7,
    window_layers=(True, False, True, False, True),
)
"""The caps are low enough for this model's scores and logits to feel them."""
GEMMA3 = replace(
    GEMMA2,
    qk_norm=True,
    score_cap=None,
    logit_cap=None,
    rope_theta=1e6,
    rope_scaling=RopeScaling(kind="linear", factor=8.0),
    window_rope_theta=1e4,
    window_layers=(True, True, False, True, True),
)

GLM = replace(TINY, norm_eps=1.5625e-7, qkv_bias=True, rotary_dim=4, rotary_interleaved=True, tied_embeddings=False)
GLM4 = replace(GLM, head_dim=12, rotary_dim=6, post_norms=True)
BAICHUAN = replace(TINY, num_kv_heads=9, norm_eps=1e-6, tied_embeddings=False, normalised_head=True)
BAICHUAN_13B = replace(BAICHUAN, alibi=True)

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
            return 0.1 * values + (not self.architecture.norm_offset)
        return 0.1 * values

    def read(self, name: str, index: Index, dtype: torch.dtype) -> Tensor:
        """A block of it."""
        return self.full(name)[index].to(dtype).contiguous()

    def state(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """All parameters, for transformers' load_state_dict of a Llama."""
        return {name: self.full(name).to(dtype) for name in parameter_shapes(self.architecture)}


def in_files(weights: Mapping[str, Tensor], places: Mapping[str, Place]) -> dict[str, Tensor]:
    """The tensors of a model's files, by their names there, out of parameters by ours."""
    files = {place.name: torch.empty(place.shape, dtype=weights[name].dtype) for name, place in places.items()}
    for name, place in places.items():
        values = weights[name]
        files[place.name][place.first_row : place.first_row + len(values)] = values
    return files

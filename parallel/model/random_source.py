"""Random weights whose every value depends only on the seed and the parameter's Hugging Face name.

Blocks of about a million values have generators of their own, so a rank draws little more than the block it keeps,
and any two layouts see the same full tensors.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema import Architecture
from parallel.model.hf import parameter_shapes, write_config
from parallel.model.ranges import block_ranges
from parallel.model.tokenizer import Tokenizer
from parallel.model.tokenizer_bytes import byte_tokenizer
from parallel.randomness import seed_of

_BLOCK = 2**20


class RandomSource:
    """A `Source` without files: norms are ones, biases and weights normal."""

    def __init__(self, architecture: Architecture, seed: int) -> None:
        """Describe the model; nothing is drawn yet."""
        self.architecture = architecture
        self._seed = seed
        self._shapes = parameter_shapes(architecture)

    @property
    def fingerprint(self) -> str:
        """Identity of the weights: the seed and the architecture."""
        return blake2b(f"{self._seed} {self.architecture}".encode(), digest_size=16).hexdigest()

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The config.json to write beside a saved model."""
        tokenizer = self.tokenizer()
        return {
            **write_config(self.architecture, None, "float32"),
            "bos_token_id": tokenizer.bos_id,
            "eos_token_id": tokenizer.eos_id,
        }

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all parameters, in canonical order."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of the parameter `name`."""
        return self._shapes[name]

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The block `full[index]` of parameter `name` as a new contiguous `dtype` tensor.

        The values are drawn in float32 and cast; their standard deviation is 1 / sqrt(inputs), twice that for q
        and k. Attention is then sharp enough for greedy answers to wander: with tied embeddings and small
        weights a random model repeats its last token for ever.
        """
        shape = self._shapes[name]
        ranges = block_ranges(shape, index)
        if name.endswith("norm.weight"):
            one = 0.0 if self.architecture.norm_offset else 1.0
            return torch.full([stop - start for start, stop in ranges], one, dtype=dtype)
        inputs = self.architecture.width if name.endswith(".bias") else shape[1]
        gain = 2.0 if ".q_proj." in name or ".k_proj." in name else 1.0
        return keyed_normal(seed_of(self._seed, name), shape, index, gain * inputs**-0.5, dtype)

    def tokenizer(self) -> Tokenizer:
        """The byte-level tokenizer."""
        return byte_tokenizer()


def keyed_normal(
    seed: int, shape: tuple[int, ...], index: tuple[slice, ...], deviation: float, dtype: torch.dtype
) -> Tensor:
    """`dtype` block `full[index]` of the normal tensor of `shape` that `seed` stands for (vectors and matrices).

    Drawn and scaled in float32 by Philox (doi:10.1145/2063384.2063405) with one key per range of
    rows.
    """
    ranges = block_ranges(shape, index)
    rows = ranges[0]
    width = math.prod(shape[1:])
    step = max(1, _BLOCK // max(1, width))
    out = torch.empty([stop - start for start, stop in ranges], dtype=dtype)
    for first in range(rows[0] // step * step, rows[1], step):
        generator = np.random.Generator(np.random.Philox(key=[seed, first // step]))
        height = min(step, shape[0] - first)
        values = generator.standard_normal((height, *shape[1:]), dtype=np.float32)
        begin, end = max(first, rows[0]), min(first + height, rows[1])
        part = torch.from_numpy(values)[(slice(begin - first, end - first), *index[1:])]
        out[begin - rows[0] : end - rows[0]].copy_(part.mul_(deviation))
    return out

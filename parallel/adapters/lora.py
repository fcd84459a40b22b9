"""Puts LoRA on the decoder's sharded linears; where each factor lies follows from the linear's own placement."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from parallel.adapters.peft import Adapter
from parallel.model.decoder import Decoder
from parallel.randomness import seed_of
from parallel.sharding import Spec, lora_specs
from parallel.tensor import Linear, Lora, master_dtype

Read = Callable[[Spec, torch.dtype], Tensor]


def install(decoder: Decoder, adapter: Adapter, slot: int, read: Read, *, trainable: bool) -> None:
    """Adds `adapter` in `slot` to this stage's linears; `read` supplies this rank's blocks of A and B.

    Factors are kept in float32 (float64 for proofs) and cast to the compute dtype where they are used, in training
    and in serving alike.
    """
    wanted = {module.module: module for module in adapter.modules}
    for linear in decoder.modules():
        if not isinstance(linear, Linear) or linear.name not in wanted:
            continue
        module = wanted[linear.name]
        specs = lora_specs(linear.specs["weight"], module.rank, module.name_a, module.name_b, decoder.here)
        stored = master_dtype(decoder.dtype)
        a, b = (nn.Parameter(read(spec, stored).to(decoder.device), requires_grad=trainable) for spec in specs)
        linear.adapters[str(slot)] = Lora(a, b, specs, scale=module.scale, rate=adapter.dropout, ops=decoder.ops)


def remove(decoder: Decoder, slot: int) -> None:
    """Takes the adapter in `slot` off again."""
    for linear in decoder.modules():
        if isinstance(linear, Linear) and str(slot) in linear.adapters:
            del linear.adapters[str(slot)]


def initial(seed: int) -> Read:
    """Start values as PEFT's default: A uniform in +-1/sqrt(in) (Kaiming, a=sqrt(5)), B zero; keyed by name."""

    def read(spec: Spec, dtype: torch.dtype) -> Tensor:
        if spec.name.endswith("lora_B.weight"):
            return torch.zeros(spec.local_shape, dtype=dtype)
        generator = torch.Generator().manual_seed(seed_of(seed, spec.name))
        full = torch.rand(spec.shape, generator=generator, dtype=torch.float32).mul_(2).sub_(1)
        return full[spec.index].to(dtype) / math.sqrt(spec.shape[1])

    return read

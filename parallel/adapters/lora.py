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

    Factors that train are kept in float32 (float64 for proofs) and cast to the compute dtype, B times the scale, where
    they are used; frozen ones are cast in the same way once.
    """
    wanted = {module.module: module for module in adapter.modules}
    for linear in decoder.modules():
        if not isinstance(linear, Linear) or linear.name not in wanted:
            continue
        module = wanted[linear.name]
        specs = lora_specs(linear.specs["weight"], module.rank, module.name_a, module.name_b, decoder.here)
        linear.adapters[str(slot)] = _lora(decoder, module.scale, adapter.dropout, specs, read, trainable)


def _lora(decoder: Decoder, scale: float, rate: float, specs: tuple[Spec, Spec], read: Read, trainable: bool) -> Lora:
    a, b = (read(spec, master_dtype(decoder.dtype)).to(decoder.device) for spec in specs)
    if trainable:
        return Lora(nn.Parameter(a), nn.Parameter(b), specs, scale=scale, rate=rate)
    packed = [
        decoder.ops.pack((t.shape[0], t.shape[1]), decoder.dtype, lambda first, last, t=t: t[first:last])
        for t in (a, b * scale)
    ]
    return Lora(packed[0], packed[1], specs, scale=1.0, rate=0.0)


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

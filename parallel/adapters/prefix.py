"""P-tuning v2: a trained prefix of keys and values in front of every document, in every layer (arXiv:2110.07602).

The file holds one row per virtual token, [P, layers * 2 * K * H], as PEFT's prefix tuning writes it; a rank keeps the
layers of its chunks and its KV heads. Keys carry no rotary; documents start at position P. With a reparameterisation
(arXiv:2101.00190, sec. 4.3) the prefix is `W2 tanh(W1 e + b1) + b2` of an embedding e while training, computed once a
step, and only the finished prefix goes into the adapter's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.schema import Architecture
from parallel.adapters.peft import PREFIX_NAME, Adapter, prefix_shape
from parallel.model.decoder import Decoder, Stage
from parallel.randomness import seed_of
from parallel.sharding import Cut, Index, Spec, whole
from parallel.tensor import master_dtype

Read = Callable[[Spec, torch.dtype], Tensor]
LayerPrefix = list[tuple[Tensor, Tensor]]


def prefix_spec(name: str, shape: tuple[int, ...], here: Cut, stage: Stage, first_dim: int) -> Spec:
    """Placement of a tensor with dims (layers, 2, K, H) from `first_dim` on."""

    def index(heads: tuple[int, int]) -> Index:
        cut = {first_dim: slice(stage.start, stage.stop), first_dim + 2: slice(*heads)}
        return tuple(cut.get(dim, part) for dim, part in enumerate(whole(shape)))

    first, last = here.kv_heads_owned
    return Spec(
        name=name,
        shape=shape,
        index=index(here.kv_heads),
        owned=index((first, last)) if first < last else None,
        reduce="overlap" if here.kv_overlap else "none",
        layer_dim=first_dim,
    )


class _Parameters(nn.Module):
    """Parameters that know their placements."""

    def __init__(self) -> None:
        super().__init__()
        self.specs: dict[str, Spec] = {}

    def add(self, field: str, spec: Spec, value: nn.Parameter) -> None:
        """Holds `value` as the attribute `field`."""
        self.specs[field] = spec
        setattr(self, field, value)


class _Chunk(_Parameters):
    """The layers of one chunk: their keys and values, or what makes them of the reparameterisation's inner state."""

    kv: nn.Parameter
    weight_out: nn.Parameter
    bias_out: nn.Parameter


class Prefix(_Parameters):
    """The prefix as trained or served on this rank. `forward()` gives [P, layers, 2, K/tp, H] of every chunk."""

    embedding: nn.Parameter
    weight_in: nn.Parameter
    bias_in: nn.Parameter

    def __init__(self, adapter: Adapter, decoders: Sequence[Decoder], read: Read, *, trainable: bool) -> None:
        """decoders: the rank's chunks."""
        super().__init__()
        first, last = decoders[0], decoders[-1]
        architecture, here = first.architecture, first.here
        self.stored, self.device, self.trainable = master_dtype(first.dtype), first.device, trainable
        shape = prefix_shape(adapter, architecture)
        self.file_specs = [prefix_spec(PREFIX_NAME, shape, here, decoder.stage, 1) for decoder in decoders]
        self.hidden = adapter.hidden if trainable else None
        self._read, self._writer = read, here.rank == 0 and first.stage.is_first
        self._cut = here.size > 1
        self._stages = sum(decoder.stage.stop - decoder.stage.start for decoder in decoders) < last.stage.num_layers
        self.chunks = nn.ModuleList()
        width, body = architecture.num_kv_heads * architecture.head_dim, shape[1:]
        if self.hidden is not None:
            self._own(self, "embedding", self._replicated("embedding.weight", (shape[0], width)))
            self._own(self, "weight_in", self._replicated("transform.0.weight", (self.hidden, width)))
            self._own(self, "bias_in", self._replicated("transform.0.bias", (self.hidden,)))
        for decoder, file_spec in zip(decoders, self.file_specs, strict=True):
            self.chunks.append(chunk := _Chunk())
            if self.hidden is None:
                self._own(chunk, "kv", file_spec)
                continue
            matrix = (*body, self.hidden)
            self._own(chunk, "weight_out", prefix_spec("transform.2.weight", matrix, here, decoder.stage, 0))
            self._own(chunk, "bias_out", prefix_spec("transform.2.bias", body, here, decoder.stage, 0))

    def _own(self, holder: _Parameters, field: str, spec: Spec) -> None:
        block = self._read(spec, self.stored).to(self.device)
        holder.add(field, spec, nn.Parameter(block, requires_grad=self.trainable))

    def _replicated(self, name: str, shape: tuple[int, ...]) -> Spec:
        full = whole(shape)
        owned = full if self._writer else None
        reduce = "tensor" if self._cut else "none"
        return Spec(name=name, shape=shape, index=full, owned=owned, reduce=reduce, pipeline_sum=self._stages)

    def forward(self) -> list[Tensor]:
        """By chunk [P, its layers, 2, K/tp, H] in the stored dtype."""
        chunks = [chunk for chunk in self.chunks if isinstance(chunk, _Chunk)]
        if self.hidden is None:
            return [chunk.kv for chunk in chunks]
        inner = torch.tanh(nn.functional.linear(self.embedding, self.weight_in, self.bias_in))
        return [torch.einsum("ph,lckdh->plckd", inner, chunk.weight_out) + chunk.bias_out for chunk in chunks]


@dataclass(frozen=True)
class StepPrefix:
    """A step's prefix: computed once, its gradient gathered over the microbatches and passed on once.

    Without a reparameterisation a leaf is the parameter itself.
    """

    computed: Sequence[Tensor]
    """By chunk."""
    leaves: Sequence[Tensor]

    @staticmethod
    def begin(prefix: Prefix) -> StepPrefix:
        """Computes the step's prefix."""
        computed = prefix()
        return StepPrefix(computed, [kv if kv.is_leaf else kv.detach().requires_grad_() for kv in computed])

    def layers(self, chunk: int, dtype: torch.dtype) -> LayerPrefix:
        """Keys and values [P, K/tp, H] of each layer of a chunk, in the compute dtype, for one forward pass."""
        kv = self.leaves[chunk].to(dtype)
        return [(kv[:, i, 0], kv[:, i, 1]) for i in range(kv.shape[1])]

    def end(self) -> None:
        """Hands the gathered gradients to the reparameterisation; after the step's last backward."""
        if self.leaves[0] is not self.computed[0]:
            torch.autograd.backward(self.computed, [leaf.grad for leaf in self.leaves])


def initial(seed: int, adapter: Adapter, architecture: Architecture) -> Read:
    """Start values, keyed by name: PEFT's (a standard normal embedding, torch's default for linears), sliced."""
    inputs = {"transform.0": architecture.num_kv_heads * architecture.head_dim, "transform.2": adapter.hidden}

    def read(spec: Spec, dtype: torch.dtype) -> Tensor:
        generator = torch.Generator().manual_seed(seed_of(seed, f"prefix.{spec.name}"))
        fan_in = inputs.get(spec.name.rsplit(".", 1)[0])
        if fan_in is None:
            full = torch.randn(spec.shape, generator=generator)
        else:
            full = torch.rand(spec.shape, generator=generator).mul_(2).sub_(1) / math.sqrt(fan_in)
        return full[spec.index].to(dtype).contiguous()

    return read

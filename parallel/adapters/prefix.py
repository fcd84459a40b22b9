"""P-tuning v2: a trained prefix of keys and values in front of every document, in every layer (arXiv:2110.07602).

The file holds one row per virtual token, [P, layers * 2 * K * H], as PEFT's prefix tuning writes it; a rank keeps its
layers and its KV heads. Keys carry no rotary; documents start at position P. With a reparameterisation
(arXiv:2101.00190, sec. 4.3) the prefix is `W2 tanh(W1 e + b1) + b2` of an embedding e while training, computed once a
step, and only the finished prefix goes into the adapter's file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
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
    )


class Prefix(nn.Module):
    """The prefix as trained or served on this rank. `forward()` gives [P, layers, 2, K/tp, H] of this stage."""

    kv: nn.Parameter
    embedding: nn.Parameter
    weight_in: nn.Parameter
    bias_in: nn.Parameter
    weight_out: nn.Parameter
    bias_out: nn.Parameter

    def __init__(self, adapter: Adapter, decoder: Decoder, read: Read, *, trainable: bool) -> None:
        super().__init__()
        architecture, here, stage = decoder.architecture, decoder.here, decoder.stage
        self.stored, self.device, self.trainable = master_dtype(decoder.dtype), decoder.device, trainable
        shape = prefix_shape(adapter, architecture)
        self.file_spec = prefix_spec(PREFIX_NAME, shape, here, stage, 1)
        self.specs: dict[str, Spec] = {}
        self.hidden = adapter.hidden if trainable else None
        self._read, self._writer = read, here.rank == 0 and stage.is_first
        self._cut = here.size > 1
        self._stages = not (stage.is_first and stage.is_last)
        if self.hidden is None:
            self._add("kv", self.file_spec)
            return
        width, body = architecture.num_kv_heads * architecture.head_dim, shape[1:]
        self._add("embedding", self._replicated("embedding.weight", (shape[0], width)))
        self._add("weight_in", self._replicated("transform.0.weight", (self.hidden, width)))
        self._add("bias_in", self._replicated("transform.0.bias", (self.hidden,)))
        self._add("weight_out", prefix_spec("transform.2.weight", (*body, self.hidden), here, stage, 0))
        self._add("bias_out", prefix_spec("transform.2.bias", body, here, stage, 0))

    def _add(self, field: str, spec: Spec) -> None:
        self.specs[field] = spec
        block = self._read(spec, self.stored).to(self.device)
        setattr(self, field, nn.Parameter(block, requires_grad=self.trainable))

    def _replicated(self, name: str, shape: tuple[int, ...]) -> Spec:
        full = whole(shape)
        owned = full if self._writer else None
        reduce = "tensor" if self._cut else "none"
        return Spec(name=name, shape=shape, index=full, owned=owned, reduce=reduce, pipeline_sum=self._stages)

    def forward(self) -> Tensor:
        """[P, layers of this stage, 2, K/tp, H] in the stored dtype."""
        if self.hidden is None:
            return self.kv
        inner = torch.tanh(nn.functional.linear(self.embedding, self.weight_in, self.bias_in))
        return torch.einsum("ph,lckdh->plckd", inner, self.weight_out) + self.bias_out


@dataclass(frozen=True)
class StepPrefix:
    """A step's prefix: computed once, its gradient gathered over the microbatches and passed on once.

    Without a reparameterisation the leaf is the parameter itself.
    """

    computed: Tensor
    leaf: Tensor

    @staticmethod
    def begin(prefix: Prefix) -> StepPrefix:
        """Computes the step's prefix."""
        computed = prefix()
        leaf = computed if computed.is_leaf else computed.detach().requires_grad_()
        return StepPrefix(computed, leaf)

    def layers(self, dtype: torch.dtype) -> LayerPrefix:
        """Keys and values [P, K/tp, H] of each local layer, in the compute dtype, for one forward pass."""
        kv = self.leaf.to(dtype)
        return [(kv[:, i, 0], kv[:, i, 1]) for i in range(kv.shape[1])]

    def end(self) -> None:
        """Hands the gathered gradient to the reparameterisation; after the step's last backward."""
        if self.leaf is not self.computed:
            assert self.leaf.grad is not None
            self.computed.backward(self.leaf.grad)


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

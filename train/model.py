"""The model of a run: the sharded decoder with what is trained on it, and one forward pass of a microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from conf.schema import Config
from kernels.dispatch import Ops
from parallel.adapters import lora, prefix
from parallel.adapters.peft import Adapter, from_tune
from parallel.adapters.prefix import Prefix, StepPrefix
from parallel.loss import cross_entropy
from parallel.mesh import Mesh
from parallel.model.attend import DocumentAttend
from parallel.model.decoder import Decoder, placed
from parallel.model.load import CPU, Weights, build_decoder
from parallel.model.step import Segment, Step
from parallel.pipeline.run import Border
from parallel.randomness import DropoutKey
from parallel.sharding import Spec
from train.batches import Microbatch

SLOT = 0  # of the adapter that is trained
Read = Callable[[Spec, torch.dtype], Tensor]


@dataclass(frozen=True)
class Model:
    """Decoder and adapter of this rank."""

    decoder: Decoder
    mesh: Mesh
    adapter: Adapter | None
    prefix: Prefix | None
    recompute: bool

    def trainable(self) -> list[tuple[Spec, nn.Parameter]]:
        """Every trainable parameter of this rank with its placement, in construction order."""
        own = [] if self.prefix is None else list(placed(self.prefix))
        return [(spec, p) for spec, p in [*self.decoder.placed(), *own] if p.requires_grad]

    def loss(
        self,
        batch: Microbatch,
        hidden: Tensor | None,
        step_prefix: StepPrefix | None,
        dropout: DropoutKey | None,
    ) -> Tensor:
        """This stage's part of a forward pass: hidden states [T, D], on the last stage the loss's sum.

        batch: the packed tokens, the same on every stage. hidden: [T, D] from the stage before, None on the first.
        """
        decoder = self.decoder
        attend = DocumentAttend(
            decoder.architecture,
            decoder.here,
            decoder.ops,
            batch.cu_seqlens_B1.tolist(),
            None if step_prefix is None else step_prefix.layers(decoder.dtype),
            decoder.stage.start,
        )
        offset = 0 if self.prefix is None or self.adapter is None else self.adapter.virtual_tokens
        uses_lora = self.adapter is not None and self.adapter.kind == "lora"
        step = Step(
            position_T=batch.positions_T + offset,
            attend=attend,
            adapters=(Segment(0, batch.num_tokens, SLOT),) if uses_lora else (),
            rows=batch.target_rows,
            dropout=dropout,
            recompute=self.recompute and torch.is_grad_enabled(),
        )
        x = decoder(batch.ids_T if hidden is None else hidden, step)
        if not decoder.stage.is_last:
            return x
        return cross_entropy(
            x,
            decoder.head_weight,
            batch.target_ids,
            first_row=decoder.here.vocab[0],
            tensor=decoder.tensor,
            ops=decoder.ops,
            cap=decoder.architecture.logit_cap,
        )

    def border(self, batches: Sequence[Microbatch]) -> Border:
        """The hidden states [T, D] of the microbatches between stages."""
        shapes = [(batch.num_tokens, self.decoder.architecture.width) for batch in batches]
        return Border(shapes, self.decoder.dtype, self.decoder.device)


def build_model(
    config: Config,
    weights: Weights,
    mesh: Mesh,
    ops: Ops,
    read_adapter: Read | None = None,
    device: torch.device = CPU,
) -> Model:
    """The model that `config` trains, on this rank.

    weights: the base model, or for full fine-tuning the checkpoint to go on from. read_adapter: blocks of a saved
    adapter's trainable parameters; None starts a new one from `train.seed`.
    """
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    stages = config.parallel.stages
    assert not isinstance(stages, str), "stages of an unchecked config"
    tune, architecture = config.tune, weights.architecture
    full = tune.kind == "full"
    decoder = build_decoder(weights, mesh, stages, dtype=dtype, ops=ops, trainable=full, packed=not full, device=device)
    recompute = config.parallel.recompute == "full"
    if full:
        return Model(decoder, mesh, None, None, recompute)
    adapter = from_tune(tune, architecture)
    if adapter.kind == "lora":
        lora.install(decoder, adapter, SLOT, read_adapter or lora.initial(config.train.seed), trainable=True)
        return Model(decoder, mesh, adapter, None, recompute)
    read = read_adapter or prefix.initial(config.train.seed, adapter, architecture)
    own = Prefix(adapter, decoder, read, trainable=True)
    return Model(decoder, mesh, adapter, own, recompute)

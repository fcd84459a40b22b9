"""The model of a run: the sharded decoder with what is trained on it, and one forward pass of a microbatch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from torch import Tensor, nn

from conf.layout import chunks_per_rank, placement, virtual_stages
from conf.schema import Config
from kernels.dispatch import Ops
from parallel.adapters import lora, prefix
from parallel.adapters.peft import Adapter, from_tune
from parallel.adapters.prefix import Prefix, StepPrefix
from parallel.context.attention import ContextAttention, Method
from parallel.loss import cross_entropy
from parallel.mesh import Mesh
from parallel.model.attend import DocumentAttend
from parallel.model.decoder import Decoder, TiedHead, placed
from parallel.model.load import CPU, Weights, build_chunks
from parallel.model.step import Segment, Step
from parallel.pipeline.run import Border
from parallel.randomness import DropoutKey
from parallel.sequence import Split
from parallel.sharding import Spec
from train.batches import Microbatch

SLOT = 0  # of the adapter that is trained
Read = Callable[[Spec, torch.dtype], Tensor]


@dataclass(frozen=True)
class Model:
    """Decoder, in chunks, and adapter of this rank."""

    chunks: Sequence[Decoder]
    """In the model's order; one but for schedules with virtual stages."""
    mesh: Mesh
    adapter: Adapter | None
    prefix: Prefix | None
    recompute: Literal["none", "selective", "full"]
    context_method: Method = "ring"

    @property
    def decoder(self) -> Decoder:
        """The first chunk, for what all chunks have in common: shape, cut, dtype, device."""
        return self.chunks[0]

    def placed(self) -> list[tuple[Spec, nn.Parameter]]:
        """Every parameter of the decoder on this rank with its placement, adapters included, in construction order."""
        return list(chain.from_iterable(chunk.placed() for chunk in self.chunks))

    def trainable(self) -> list[tuple[Spec, nn.Parameter]]:
        """Every trainable parameter of this rank with its placement, in construction order."""
        own = [] if self.prefix is None else list(placed(self.prefix))
        return [(spec, p) for spec, p in [*self.placed(), *own] if p.requires_grad]

    def tied_heads(self) -> list[tuple[tuple[Spec, nn.Parameter], nn.Parameter]]:
        """Of a trained head that shares another chunk's embedding: ((placement, head), embedding). None or one."""
        head, table = self.chunks[-1].lm_head, self.chunks[0].embed_tokens
        if not isinstance(head, TiedHead) or table is None or not isinstance(head.weight, nn.Parameter):
            return []
        assert isinstance(table.weight, nn.Parameter)
        return [((table.specs["weight"], head.weight), table.weight)] if head.weight.requires_grad else []

    def loss(
        self,
        batch: Microbatch,
        chunk: int,
        hidden: Tensor | None,
        step_prefix: StepPrefix | None,
        dropout: DropoutKey | None,
    ) -> Tensor:
        """A chunk's part of a forward pass: hidden states [T, D], on the model's last one the loss's sum.

        batch: the packed tokens, the same on every stage. hidden: [T, D] from the chunk before, None on the first. With
        sequence parallelism hidden states are this rank's share [T_r, D].
        """
        decoder = self.chunks[chunk]
        attend = DocumentAttend(
            decoder.architecture,
            decoder.here,
            decoder.ops,
            batch.cu_seqlens_B1.tolist(),
            None if step_prefix is None else step_prefix.layers(chunk, decoder.dtype),
            decoder.stage.start,
            context=self._context(batch),
        )
        split = self._split(batch)
        offset = 0 if self.prefix is None or self.adapter is None else self.adapter.virtual_tokens
        uses_lora = self.adapter is not None and self.adapter.kind == "lora"
        step = Step(
            position_T=batch.positions_T + offset,
            attend=attend,
            adapters=(Segment(0, batch.num_tokens, SLOT),) if uses_lora else (),
            rows=batch.target_rows,
            dropout=dropout,
            split=split,
            recompute=self.recompute if torch.is_grad_enabled() else "none",
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
            split=None if split is None else split.of_rows(batch.target_rows),
        )

    def _context(self, batch: Microbatch) -> ContextAttention | None:
        if batch.plan is None:
            return None
        return ContextAttention(batch.plan, self.context_method, self.mesh.ring, self.mesh.ulysses)

    def border(self, batches: Sequence[Microbatch]) -> Border:
        """The hidden states [T, D] of the microbatches between stages; of this rank's share, if tokens are split."""
        splits = [self._split(batch) for batch in batches]
        tokens = [
            batch.num_tokens if split is None else split.size for batch, split in zip(batches, splits, strict=True)
        ]
        shapes = [(count, self.decoder.architecture.width) for count in tokens]
        return Border(shapes, self.decoder.dtype, self.decoder.device)

    def _split(self, batch: Microbatch) -> Split | None:
        return Split.of(batch.num_tokens, self.decoder.tensor) if self.decoder.here.sequence else None


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
    parallel = config.parallel
    held = virtual_stages(parallel.pipeline, chunks_per_rank(parallel), placement(parallel))
    numbers = held[mesh.pipeline.rank]
    chunks = build_chunks(
        weights,
        mesh,
        stages,
        numbers,
        dtype=dtype,
        ops=ops,
        trainable=full,
        packed=not full,
        sequence=config.parallel.sequence,
        device=device,
    )
    recompute, method = config.parallel.recompute, config.parallel.context_method
    if full:
        return Model(chunks, mesh, None, None, recompute, method)
    adapter = from_tune(tune, architecture)
    if adapter.kind == "lora":
        for decoder in chunks:
            lora.install(decoder, adapter, SLOT, read_adapter or lora.initial(config.train.seed), trainable=True)
        return Model(chunks, mesh, adapter, None, recompute, method)
    read = read_adapter or prefix.initial(config.train.seed, adapter, architecture)
    own = Prefix(adapter, chunks, read, trainable=True)
    return Model(chunks, mesh, adapter, own, recompute, method)

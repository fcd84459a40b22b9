"""The decoder, written once: one process, any mesh, training and serving.

A pipeline stage is the same class with parts absent: the first stage embeds ids, the others take hidden states,
the last one ends in the final norm. Layer names never renumber. A rank with several chunks of layers holds a decoder
for each (`parallel.model.load.build_chunks`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from kernels.master import Master
from kernels.ops import Packed
from parallel.loss import capped
from parallel.model import rope
from parallel.model.attend import uses_local_rope
from parallel.model.block import Block
from parallel.model.step import Step
from parallel.sharding import Spec
from parallel.tensor import Build, Embedding, Norm, master_dtype


@dataclass(frozen=True)
class Stage:
    """Which part of the model a pipeline rank's chunk is: layers [start, stop), of `num_layers`."""

    start: int
    stop: int
    num_layers: int

    @property
    def is_first(self) -> bool:
        """Whether this stage embeds the ids."""
        return self.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage ends in the final norm and the head."""
        return self.stop == self.num_layers


class Head(nn.Module):
    """An untied output matrix, cut by vocabulary rows; `logits` and `loss` use its weight."""

    def __init__(self, build: Build) -> None:
        super().__init__()
        a = build.architecture
        self.normalises = a.normalised_head and build.trainable
        if a.normalised_head and not build.trainable:  # once and for all
            read = build.read
            build = replace(build, read=lambda spec, dtype: _unit_rows(read(spec, master_dtype(dtype))).to(dtype))
        spec, self.weight = build.matrix("lm_head.weight", a.vocab_size, a.width)
        self.specs = {"weight": spec}

    @property
    def rows(self) -> Tensor | Packed:
        """[V/tp, D]: what hidden states are multiplied with."""
        if not self.normalises:
            return self.weight
        assert isinstance(self.weight, Tensor)
        return _unit_rows(self.weight)


def _unit_rows(weight_VD: Tensor) -> Tensor:
    return nn.functional.normalize(weight_VD, dim=1)


class TiedHead(nn.Module):
    """The embedding of a rank's first chunk as the output matrix of its last one: the same memory.

    Where it trains its gradient is gathered apart from the embedding's and added to it at the end of a step
    (`Gradients`), as when two ranks hold the ends: so the bits are the same.
    """

    def __init__(self, embedding: Embedding) -> None:
        super().__init__()
        weight = embedding.weight
        self.weight = Master(weight.detach()) if isinstance(weight, Master) else weight

    @property
    def rows(self) -> Tensor | Packed:
        """[V/tp, D]: what hidden states are multiplied with."""
        return self.weight


class Decoder(nn.Module):
    """`forward(x, step)` runs this stage; `head_weight` is what logits and loss multiply the result with.

    tied_to: the embedding of this rank's first chunk, when this is its last one and the model's embeddings are tied.
    both_ends: whether the model's first and last stage lie on this rank, as chunks or as one.
    """

    def __init__(
        self, build: Build, stage: Stage, *, tied_to: Embedding | None = None, both_ends: bool = False
    ) -> None:
        super().__init__()
        self.stage, self.ops, self.dtype, self.device = stage, build.ops, build.dtype, build.device
        self.architecture, self.here, self.tensor = build.architecture, build.here, build.tensor
        self.local_rope = {
            layer: uses_local_rope(build.architecture, layer) for layer in range(stage.start, stage.stop)
        }
        self.rope: dict[bool, tuple[Tensor, float]] = {}
        for local in sorted(set(self.local_rope.values())):
            frequency, factor = rope.frequencies(build.architecture, local=local)
            self.rope[local] = frequency.to(build.device), factor
        tied = build.architecture.tied_embeddings
        holds_embedding = stage.is_first or (stage.is_last and tied and tied_to is None)
        self.embed_tokens = Embedding(build, "model.embed_tokens") if holds_embedding else None
        self.layers = nn.ModuleDict({str(i): Block(build, i) for i in range(stage.start, stage.stop)})
        self.norm = Norm(build, "model.norm") if stage.is_last else None
        self.lm_head: Head | TiedHead | None = Head(build) if stage.is_last and not tied else None
        if tied_to is not None:
            self.lm_head = TiedHead(tied_to)
        if tied and self.embed_tokens is not None and not both_ends:
            spec = self.embed_tokens.specs["weight"]
            self.embed_tokens.specs["weight"] = replace(spec, tied=True, owned=spec.owned if stage.is_first else None)

    @property
    def head_weight(self) -> Tensor | Packed:
        """[V/tp, D]: this rank's rows of the output matrix (the embedding's when tied); last stage only."""
        assert self.stage.is_last
        if self.lm_head is not None:
            return self.lm_head.rows
        assert self.embed_tokens is not None
        return self.embed_tokens.weight

    def forward(self, x: Tensor, step: Step) -> Tensor:
        """Runs this stage's layers.

        x: int64 ids [T] on the first stage, hidden states [T, D] on the others. Returns hidden states [T, D], or on
        the last stage the normed states of `step.rows` [rows, D]. With a split hidden states are this rank's share
        [T_r, D], and the rows those among them.
        """
        if self.stage.is_first:
            assert self.embed_tokens is not None
            x = self.embed_tokens(x, step.split)
        angles = {
            local: self.ops.rotary_angles(step.position_T, *rotary, self.dtype) for local, rotary in self.rope.items()
        }
        delta: Tensor | None = None  # of the last block, not yet added to x
        for number, layer in self.layers.items():
            turn = angles[self.local_rope[int(number)]]
            if step.recompute == "full":  # of the sum: one tensor a block is kept
                whole, nothing = _added(x, delta), None if delta is None else _nothing(delta)
                x, delta = checkpoint(layer, whole, nothing, turn, step, use_reentrant=False, preserve_rng_state=False)
            else:
                x, delta = layer(x, delta, turn, step)
        if self.norm is None:
            return _added(x, delta)
        if step.rows is not None:
            rows = step.rows if step.split is None else step.split.local(step.rows)
            x = self.ops.embedding(rows, x)
            delta = None if delta is None else self.ops.embedding(rows, delta)
        return self.norm(x, delta)[1]

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """[B, V/tp]: this rank's columns of the logits of normed states, in the working dtype; last stage only."""
        logits_BV = self.ops.linear(hidden_BD, self.head_weight, wide=True)
        return capped(logits_BV, self.architecture.logit_cap)

    def placed(self) -> Iterator[tuple[Spec, nn.Parameter]]:
        """Every parameter of this rank with its placement, adapters included, in construction order."""
        return placed(self)


def _added(x_TD: Tensor, delta_TD: Tensor | None) -> Tensor:
    return x_TD if delta_TD is None else x_TD + delta_TD


def _nothing(delta_TD: Tensor) -> Tensor:
    """A delta that changes no bit of a sum and takes no memory: the norm behind it rounds the gradient of the residual
    stream once, as it does without recomputation."""
    return delta_TD.new_full((1, 1), -0.0).expand_as(delta_TD)


def placed(module: nn.Module) -> Iterator[tuple[Spec, nn.Parameter]]:
    """Every (placement, parameter) below `module`; modules declare theirs in a dict `specs`; no packed ones."""
    for child in module.modules():
        for name, spec in getattr(child, "specs", {}).items():
            if isinstance(value := getattr(child, name), nn.Parameter):
                yield spec, value

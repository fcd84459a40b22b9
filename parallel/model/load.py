"""A rank's part of the decoder, read from model files: the same call in training and in serving."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Protocol

import torch
from torch import Tensor

from conf.schema import Architecture
from kernels.dispatch import Ops
from kernels.memory import Area
from parallel.mesh import Mesh
from parallel.model.decoder import Decoder, Stage
from parallel.sharding import Index, Spec, cut
from parallel.tensor import Build

CPU = torch.device("cpu")


class Weights(Protocol):
    """What a decoder is built from; `parallel.model.source` opens it."""

    @property
    def architecture(self) -> Architecture:
        """Shape of the model."""
        ...

    def read(self, name: str, index: Index, dtype: torch.dtype) -> Tensor:
        """The block `full[index]` of parameter `name`; reads only its bytes."""
        ...


def stage_of(stages: Sequence[int], number: int) -> Stage:
    """The layers of virtual stage `number` (a pipeline rank, where each has one) when stage i holds `stages[i]`."""
    ends = list(accumulate(stages))
    return Stage(ends[number] - stages[number], ends[number], ends[-1])


def build_decoder(
    weights: Weights,
    mesh: Mesh,
    stages: Sequence[int],
    *,
    dtype: torch.dtype,
    ops: Ops,
    trainable: bool,
    packed: bool = False,
    device: torch.device = CPU,
) -> Decoder:
    """This rank's decoder, where it has one chunk; as `build_chunks`."""
    numbers = [mesh.pipeline.rank]
    return build_chunks(
        weights, mesh, stages, numbers, dtype=dtype, ops=ops, trainable=trainable, packed=packed, device=device
    )[0]


def build_chunks(
    weights: Weights,
    mesh: Mesh,
    stages: Sequence[int],
    numbers: Sequence[int],
    *,
    dtype: torch.dtype,
    ops: Ops,
    trainable: bool,
    packed: bool = False,
    sequence: bool = False,
    device: torch.device = CPU,
) -> list[Decoder]:
    """This rank's decoders, one for each chunk of layers; reads only the bytes of its own blocks.

    stages: layers of each virtual stage, in the model's order. numbers: the virtual stages that this rank holds, in
    rising order (`Plan.virtual_stage`). packed: keep matrices in the layout that the backend multiplies fastest; only
    where they don't train. sequence: the steps split their tokens over the tensor ranks (`parallel.sequence`). Tied
    embeddings whose ends are chunks of this rank are read and stored once.
    """

    def read(spec: Spec, stored: torch.dtype) -> Tensor:
        return weights.read(spec.name, spec.index, stored)

    build = Build(
        architecture=weights.architecture,
        here=cut(weights.architecture, mesh.tensor.size, mesh.tensor.rank, sequence=sequence),
        tensor=mesh.tensor,
        ops=ops,
        device=device,
        dtype=dtype,
        trainable=trainable,
        packed=packed,
        area=Area(),
        read=read,
    )
    parts = [stage_of(stages, number) for number in numbers]
    both_ends = parts[0].is_first and parts[-1].is_last
    shared = both_ends and len(parts) > 1 and weights.architecture.tied_embeddings
    chunks: list[Decoder] = []
    for part in parts:
        tied_to = chunks[0].embed_tokens if shared and part.is_last else None
        chunks.append(Decoder(build, part, tied_to=tied_to, both_ends=both_ends))
    return chunks

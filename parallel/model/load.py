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


def stage_of(stages: Sequence[int], rank: int) -> Stage:
    """The layers of pipeline rank `rank` when stage i holds `stages[i]` layers."""
    ends = list(accumulate(stages))
    return Stage(ends[rank] - stages[rank], ends[rank], ends[-1])


def build_decoder(
    weights: Weights,
    mesh: Mesh,
    stages: Sequence[int],
    *,
    dtype: torch.dtype,
    ops: Ops,
    trainable: bool,
    packed: bool = False,
    sequence: bool = False,
    device: torch.device = CPU,
) -> Decoder:
    """This rank's decoder; reads only the bytes of its own blocks. `stages` are layers per pipeline stage.

    packed: keep matrices in the layout that the backend multiplies fastest; only where they don't train. sequence: the
    steps split their tokens over the tensor ranks (`parallel.sequence`).
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
    return Decoder(build, stage_of(stages, mesh.pipeline.rank))

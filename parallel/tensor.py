"""Tensor-parallel layers: linears cut by rows or columns, and the vocabulary-parallel embedding.

Scheme of Megatron-LM (arXiv:1909.08053, sec. 3): a column-parallel linear makes this rank's heads or ffn columns
from all tokens (`together` enters the region), a row-parallel one turns them into a partial sum that `regions.leave`
completes. Cuts may be uneven; weights hold exactly this rank's block.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from conf.schema import Architecture
from kernels.master import Master
from kernels.memory import Area
from kernels.ops import LowRank, Ops, Packed, Part, Weight
from parallel import regions
from parallel.comm import Group
from parallel.model.step import Segment, Step
from parallel.randomness import keep_mask
from parallel.recompute import Make, made_again
from parallel.sequence import Split
from parallel.sharding import Cut, Spec, place


@dataclass(frozen=True)
class Build:
    """Everything a layer needs to come into being on this rank."""

    architecture: Architecture
    here: Cut
    tensor: Group
    ops: Ops
    device: torch.device
    dtype: torch.dtype
    """Compute dtype; frozen weights are stored in it."""
    trainable: bool
    """Whether the model's own weights train (then they are stored in `master_dtype`)."""
    packed: bool
    """Whether matrices are kept in the backend's own layout: where nothing needs their gradients."""
    area: Area
    """Where packed matrices are laid out."""
    read: Callable[[Spec, torch.dtype], Tensor]
    """Returns the block of a parameter; reads nothing else."""

    def parameter(self, name: str, *shape: int) -> tuple[Spec, nn.Parameter]:
        """This rank's block of the model's parameter `name` with full `shape`."""
        spec = place(name, shape, self.architecture, self.here)
        stored = master_dtype(self.dtype) if self.trainable else self.dtype
        return spec, nn.Parameter(self.read(spec, stored).to(self.device), requires_grad=self.trainable)

    def matrix(self, name: str, *shape: int) -> tuple[Spec, nn.Parameter | Packed]:
        """As `parameter`, for the weight of a linear or an embedding, which may be packed."""
        if not self.packed:
            spec, parameter = self.parameter(name, *shape)
            return spec, Master(parameter.detach()) if self.trainable else parameter
        spec = place(name, shape, self.architecture, self.here)
        start, columns = spec.index[0].start, spec.index[1]

        def rows(first: int, last: int) -> Tensor:
            part = replace(spec, index=(slice(start + first, start + last), columns))
            return self.read(part, self.dtype).to(self.device)

        n, k = spec.local_shape
        weight = self.ops.pack((n, k), self.dtype, rows, self.area)
        return spec, weight if isinstance(weight, Packed) else nn.Parameter(weight, requires_grad=False)


def master_dtype(compute: torch.dtype) -> torch.dtype:
    """dtype in which trainable parameters and optimizer state live: float32, or float64 for proofs."""
    return torch.float64 if compute == torch.float64 else torch.float32


class Lora(nn.Module):
    """The low-rank update `scale * (x A^T) B^T` of one linear (LoRA, arXiv:2106.09685, sec. 4.1), as cut here."""

    def __init__(
        self,
        a_RK: nn.Parameter | Weight,
        b_NR: nn.Parameter | Weight,
        specs: tuple[Spec, Spec],
        *,
        scale: float,
        rate: float,
    ) -> None:
        """Factors that train are parameters; frozen ones may be in the backend's own layout, B with scale 1 then."""
        super().__init__()
        self.a_RK, self.b_NR = a_RK, b_NR
        self.specs = {"a_RK": specs[0], "b_NR": specs[1]}
        self.scale, self.rate = scale, rate

    def forward(self, x_TK: Tensor, segment: Segment, step: Step) -> LowRank:
        """What the segment's tokens of a linear's input x [T, K] add to its output."""
        x = None
        if self.rate > 0 and step.dropout is not None:
            first = self.specs["a_RK"].index[1].start
            keep = keep_mask(step.dropout, self.specs["a_RK"].name, first, x_TK.shape[1], self.rate)
            x = torch.where(keep, x_TK / (1 - self.rate), 0.0)[segment.start : segment.stop]
        b_NR = self.b_NR
        if self.scale != 1:
            assert isinstance(b_NR, Tensor), "a packed factor includes its scale"
            b_NR = b_NR * self.scale
        return LowRank(start=segment.start, stop=segment.stop, a_RK=self.a_RK, b_NR=b_NR, x_TK=x)


class Linear(nn.Module):
    """`y = x W^T (+ bias)` on this rank's block, with adapters.

    Column-parallel: x [T, K] inside the region (`together` enters it), y [T, N/tp]. Row-parallel: x [T, K/tp], y [T, N]
    summed over the tensor axis (one all-reduce of T * N elements; with a split one reduce-scatter to [T_r, N]), bias
    added once after it.
    """

    def __init__(self, build: Build, name: str, out_width: int, in_width: int, *, bias: bool, row: bool) -> None:
        super().__init__()
        self.ops, self.tensor, self.row, self.name = build.ops, build.tensor, row, name
        spec, self.weight = build.matrix(f"{name}.weight", out_width, in_width)
        self.specs = {"weight": spec}
        self.bias: nn.Parameter | None = None
        if bias:
            self.specs["bias"], self.bias = build.parameter(f"{name}.bias", out_width)
        self.adapters = nn.ModuleDict()

    def forward(self, x_TK: Tensor, step: Step) -> Tensor:
        """[T, K] -> [T, N], local or reduced as the class says."""
        part = self.part(x_TK, step)
        if not self.row:
            return self.ops.linear(x_TK, part.w_NK, part.bias_N, part.updates)
        y_TN = regions.leave(self.ops.linear(x_TK, part.w_NK, None, part.updates), self.tensor, step.split)
        return y_TN if part.bias_N is None else y_TN + part.bias_N

    def part(self, x_TK: Tensor, step: Step) -> Part:
        """What the kernel multiplies x with: weight, bias, and the adapters of this step."""
        updates = [
            self.adapters[str(segment.slot)](x_TK, segment, step)
            for segment in step.adapters
            if str(segment.slot) in self.adapters
        ]
        return Part(self.weight, None if self.bias is None else self.bias.to(x_TK.dtype), updates)


def together(linears: Sequence[Linear], x_TK: Tensor, again: Make, step: Step) -> tuple[Tensor, ...]:
    """Column-parallel linears of the same x in one kernel call: their outputs [T, N_i/tp].

    x: [T, K] replicated or, with a split, this rank's share [T_r, K]. That is gathered here (T * K elements) and, where
    weights need it for their gradients, once more in the backward pass: only the share is kept (arXiv:2205.05198,
    sec. 4.2.2). again: makes x; with selective recomputation it is called instead of keeping x.
    """
    assert not any(linear.row for linear in linears), "row-parallel linears are reduced one by one"
    tensor, split = linears[0].tensor, step.split
    inside_TK = regions.enter(x_TK, tensor, split)
    share = again if step.recompute == "selective" else x_TK.detach
    make = lambda: regions.gather(share(), tensor, split)  # noqa: E731
    keeps = step.recompute == "full" or (step.recompute == "none" and split is None)
    with made_again((inside_TK, None if keeps else make)):
        return linears[0].ops.linears(inside_TK, [linear.part(inside_TK, step) for linear in linears])


class Embedding(nn.Module):
    """Vocabulary-parallel embedding: each rank looks up the ids it holds, the rest are zeros, then a sum."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        architecture = build.architecture
        self.ops, self.tensor, self.dtype = build.ops, build.tensor, build.dtype
        self.start, _ = build.here.vocab
        # Gemma's own code rounds the factor to the compute dtype too
        self.scale = torch.tensor(architecture.embedding_scale, dtype=build.dtype).item()
        spec, self.weight = build.matrix(f"{name}.weight", architecture.vocab_size, architecture.width)
        self.specs = {"weight": spec}

    def forward(self, ids_T: Tensor, split: Split | None = None) -> Tensor:
        """int64 [T] -> [T, D] in the compute dtype, replicated (one all-reduce of T * D elements).

        With a split -> this rank's share [T_r, D] (one reduce-scatter).
        """
        if self.tensor.size == 1:
            x_TD = self.ops.embedding(ids_T, self.weight).to(self.dtype)
        else:
            x_TD = self.ops.embedding(ids_T, self.weight, self.start).to(self.dtype)
            x_TD = regions.leave(x_TD, self.tensor, split)
        return x_TD if self.scale == 1 else x_TD * self.scale


class Norm(nn.Module):
    """RMSNorm with a replicated weight; its gradient is whole on every tensor rank, unless it norms heads (q and k) or
    tokens are split: partial then."""

    def __init__(self, build: Build, name: str, width: int | None = None) -> None:
        """width: of what is normed; the residual stream's by default."""
        super().__init__()
        a = build.architecture
        self.ops, self.eps = build.ops, a.norm_eps
        spec, self.weight = build.parameter(f"{name}.weight", width or a.width)
        self.specs = {"weight": spec}
        self.adds_one = a.norm_offset and build.trainable
        if a.norm_offset and not build.trainable:  # once and for all, and rounded once
            exact = build.read(spec, master_dtype(build.dtype)).to(build.device)
            self.weight.data = (exact + 1).to(build.dtype)

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(x, norm(x)), or with a delta (x + delta, norm(x + delta)): [T, D] each, in x's dtype."""
        if delta_TD is None:
            return x_TD, self.again(x_TD)
        return self.ops.add_rms_norm(x_TD, delta_TD, self._factor(x_TD.dtype), self.eps)

    def again(self, x_TD: Tensor) -> Tensor:
        """The second result of `forward` from its first, bitwise."""
        return self.ops.rms_norm(x_TD, self._factor(x_TD.dtype), self.eps)

    def _factor(self, dtype: torch.dtype) -> Tensor:
        return (self.weight + 1 if self.adds_one else self.weight).to(dtype)

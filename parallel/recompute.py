"""What the backward pass computes again instead of finding it kept, tensor by tensor.

    a layer keeps, per token     none                              selective
    residual stream              x, twice: 2 D                     x, twice: 2 D
    norms' outputs               h, twice: 2 D                     norm(x)
    attention's inputs           q, k (turned), v: (N + 2 K) H     the same
    its output, log-sum-exp      out: N H; lse: N                  the same
    feed-forward                 gate, up, their product: 3 F      gate, up: 2 F; multiplied again

Heads and columns are a tensor rank's own. With split tokens the first two lines are of its share alone: what is
gathered from the shares isn't kept, it is gathered again. `full` keeps a layer's input alone and runs the layer again
(`Decoder`).

`selective` follows Korthikanti et al. (arXiv:2205.05198, sec. 5): compute again what is large and cheap. What they
name, the core of attention, is never kept here, because its backward pass needs only the log-sum-exp; so this is about
what is left that takes no matrix product. (Turning q and k again would spare nothing: they are as large before.)
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor

Make = Callable[[], Tensor]
"""Makes a tensor again, bitwise; what it needs must be kept anyway."""


@dataclass(eq=False)
class _Again:
    """Stands for a tensor in autograd's graph. Made at the first use of a backward pass, let go after the last."""

    make: Make
    uses: int = 0
    left: int = 0
    value: Tensor | None = None

    def take(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.make()
            self.left = self.uses
        value = self.value
        self.left -= 1
        if self.left == 0:
            self.value = None
        return value


@dataclass(frozen=True)
class _View:
    again: _Again
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def take(self) -> Tensor:
        return self.again.take().as_strided(self.shape, self.stride, self.offset)


def made_again(*pairs: tuple[Tensor, Make | None]) -> AbstractContextManager[object]:
    """Inside, functions that save one of the tensors, or a view of it, for their backward pass save how to make it.

    pairs: tensors, each the only one in its memory and laid out as `make` will lay it out, and their `make`; with None
    the tensor is kept as usual. A `make` that communicates is called by every rank of a group, for each pass once, at
    the first function that needs it.
    """
    found = {x.untyped_storage().data_ptr(): _Again(make) for x, make in pairs if make is not None and x.numel()}
    if not found:
        return nullcontext()

    def pack(x: Tensor) -> Tensor | _View:
        again = found.get(x.untyped_storage().data_ptr())
        if again is None:
            return x.detach()  # itself would refer to the function that saves it
        again.uses += 1
        return _View(again, tuple(x.shape), x.stride(), int(x.storage_offset()))

    def unpack(kept: Tensor | _View) -> Tensor:
        return kept.take() if isinstance(kept, _View) else kept

    return torch.autograd.graph.saved_tensors_hooks(pack, unpack)

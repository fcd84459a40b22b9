"""Weights that train: float32 masters, and what a backend may keep beside them while a step runs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn


class Master(nn.Parameter):
    """The weight [N, K] of a linear or an embedding, in the dtype in which it is updated.

    It is a parameter like any other, and a backend may treat it so. Two things are offered to one that can use them;
    both are off until someone who knows the whole step asks for them.
    """

    adds_gradients = False
    """Whether a backward pass may add to `.grad` itself, where products leave their sums, and return `added()`.

    Only for gradients that are gathered in `.grad`: `torch.autograd.grad` would be told nothing.
    """
    _room: Tensor | None = None
    _kept: dict[tuple[torch.dtype, bool], tuple[tuple[int, int], Tensor]] | None = None
    _wanted: dict[tuple[torch.dtype, bool], Callable[[], Tensor]] | None = None

    def packed(self, dtype: torch.dtype, transposed: bool, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes of the values as they are now: the weight, or its transpose, in a backend's layout.

        Inside `packs_kept` it is made once, and again after every change that torch counts (`Tensor._version`) or
        that moves the values elsewhere.
        """
        if self._kept is None:
            return make()
        now = (self._version, self.data_ptr())
        found = self._kept.get((dtype, transposed))
        if found is None or found[0] != now:
            self._kept[dtype, transposed] = found = (now, make())
            self._wanted = {**(self._wanted or {}), (dtype, transposed): make}
        return found[1]

    def pack_ahead(self) -> None:
        """Makes what was asked for when packs were last kept."""
        for (dtype, transposed), make in (self._wanted or {}).items():
            self.packed(dtype, transposed, make)

    def take_room(self) -> Tensor:
        """Memory for a gradient of all rows, of any values: inside `packs_kept` what was given back before.

        Fresh memory of a head's size costs more in page faults than the products of a few hundred rows.
        """
        room, self._room = self._room, None
        return torch.empty_like(self, requires_grad=False) if room is None else room

    def give_back(self, room: Tensor) -> None:
        """Leaves what `take_room` gave to the next microbatch."""
        if self._kept is not None:
            self._room = room

    def added(self) -> Tensor:
        """A gradient without entries: autograd adds nothing to `.grad`, and counts its arrival as any other's."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, layout=torch.sparse_coo)


@contextmanager
def packs_kept(weights: Iterable[Tensor], *, ahead: bool = False) -> Iterator[None]:
    """While it lasts, the masters among `weights` keep their packs: for the passes between two updates.

    ahead: all that were kept the last time are made at once. They then lie together; made one by one between the
    tensors of a forward pass they would leave holes in the heap.

    A pack and one of the transpose have the weight's number of elements each, in the compute dtype. They are freed at
    the end, before anything changes the weights: a change through `.data` is one that torch doesn't count. So is the
    room for a gradient.
    """
    masters = [weight for weight in weights if isinstance(weight, Master)]
    for master in masters:
        master._kept = {}
    try:
        if ahead:
            for master in masters:
                master.pack_ahead()
        yield
    finally:
        for master in masters:
            master._kept = master._room = None

"""Weights that train: float32 masters, and what a backend may keep beside them while a step runs."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn


class Master(nn.Parameter):
    """The weight [N, K] of a linear or an embedding, in the dtype in which it is updated.

    It is a parameter like any other, and a backend may treat it so. Three things are offered to one that can use them;
    all are off until someone who knows the whole step asks for them.
    """

    adds_gradients = False
    """Whether a backward pass may add to `.grad` itself, where products leave their sums, and return `added()`.

    Only for gradients that are gathered in `.grad`: `torch.autograd.grad` would be told nothing.
    """
    arrived: Callable[[Tensor], None] | None = None
    """Told of this weight whenever a gradient that was put off has been added to `.grad`."""
    left = 0
    """Gradients that were put off and aren't added yet. Autograd's hooks are called when one is put off, too."""
    _put_off: deque[Callable[[], None]] | None = None
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

    def gradient(self, product: Callable[[Tensor, Tensor], Tensor], grad_TN: Tensor, x_TK: Tensor) -> Tensor | None:
        """What a linear's backward pass returns for this weight: `product(grad, x)`, or None inside `put_off`."""
        if self._put_off is None:
            return product(grad_TN, x_TK)
        self._put_off.append(partial(self._add, product, grad_TN.detach(), x_TK.detach()))  # without their graphs
        self.left += 1
        return None

    @torch.no_grad()
    def _add(self, product: Callable[[Tensor, Tensor], Tensor], grad_TN: Tensor, x_TK: Tensor) -> None:
        """Does what autograd would have done with the product."""
        gradient = product(grad_TN, x_TK)
        if gradient.layout != torch.sparse_coo:  # else `added`
            self.grad = gradient if self.grad is None else self.grad.add_(gradient)
        self.left -= 1
        if self.arrived is not None:
            self.arrived(self)

    def added(self) -> Tensor:
        """A gradient without entries: autograd adds nothing to `.grad`, and counts its arrival as any other's."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device, layout=torch.sparse_coo)


@contextmanager
def put_off(weights: Iterable[Tensor]) -> Iterator[deque[Callable[[], None]]]:
    """While it lasts, backward passes compute no gradients of the masters among `weights` that are used in linears.

    Gives the queue in which they leave them, to be called later from first to last, each once: with no gradient
    needed, each adds to a weight's `.grad` what the backward pass would have added. Until then it keeps the inputs of
    the linear and the gradients of its results alive, [T, K] and [T, N] each.

    The other gradients (of inputs, norms, biases, embeddings, low-rank factors) come as ever. It is on the weights, not
    in a context of Python's, because on GPUs backward passes run in another thread.
    """
    later: deque[Callable[[], None]] = deque()
    masters = [weight for weight in weights if isinstance(weight, Master)]
    for master in masters:
        master._put_off = later
    try:
        yield later
    finally:
        for master in masters:
            master._put_off = None


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

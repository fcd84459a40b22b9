"""Pipeline schedules as data: which microbatch each rank runs forward or backward, and when. Without torch.

A rank holds `chunks` chunks of layers; each chunk is a virtual stage, a position in the model. Two placements:

    loop  chunk c of rank r is virtual stage c * stages + r: activations always travel to the next rank and wrap
          around from the last rank to the first one (Narayanan et al., arXiv:2104.04473, sec. 2.2)
    vee   chunk 0 of rank r is virtual stage r, chunk 1 is 2 * stages - 1 - r: activations travel down the ranks
          and up again, so the first rank has both ends of the model and the last rank hands its chunk 0's result
          to its own chunk 1 without a message (Qi et al., arXiv:2401.10241, sec. 6)

With one chunk a virtual stage is a rank. The backward of a (microbatch, chunk) is either one action "B" or two:
"I", the gradient of the chunk's input, which the virtual stage before waits for, and any time after it "W", the
gradients of its weights, for which nobody waits (arXiv:2401.10241, sec. 2).

Every rank adds the gradients of a chunk in the order of microbatches 0..m-1, so all schedules agree bitwise.

Messages of one rank to another arrive in the order they were sent (`arrivals`), which need not be the order in
which they are used: between two ranks that are neighbours in two places of the model, one may be overtaken by the
next. A rank that needs a message takes the ones before it too and keeps them. So nobody needs tags, and no order
of actions is wrong as long as somebody can always go on.
`schedules` makes plans, `verify` proves that they run, `timeline` says when, `show` draws them.
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Literal

Kind = Literal["F", "B", "I", "W"]
Placement = Literal["loop", "vee"]
KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


class PlanError(ValueError):
    """A plan that would hang, lose a microbatch or mix up messages; the text says where."""


@dataclass(frozen=True, slots=True)
class Action:
    """One pass of one microbatch through one chunk of the rank that runs it.

    "F" is the forward, "B" the whole backward, "I" the gradient of the input alone, "W" those of the weights.
    """

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        """`F3`, or `F3/1` when it is not the rank's first chunk."""
        return f"{self.kind}{self.microbatch}" + (f"/{self.chunk}" if self.chunk else "")


@dataclass(frozen=True)
class Plan:
    """A whole schedule; `actions[rank]` is what that rank does, in order."""

    stages: int
    chunks: int
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]
    placement: Placement = "loop"

    def virtual_stage(self, rank: int, action: Action) -> int:
        """The position in the model, 0 .. stages * chunks - 1, of the chunk that the action runs."""
        if self.placement == "vee" and action.chunk == 1:
            return 2 * self.stages - 1 - rank
        return action.chunk * self.stages + rank

    def place(self, virtual_stage: int) -> tuple[int, int]:
        """The (rank, chunk) that holds a virtual stage; the inverse of `virtual_stage`."""
        chunk, rank = divmod(virtual_stage, self.stages)
        return (self.stages - 1 - rank if self.placement == "vee" and chunk == 1 else rank), chunk

    def source(self, rank: int, action: Action) -> tuple[int, Action] | None:
        """The (rank, action) whose result the action needs; None if no other chunk's.

        A forward needs the same microbatch's forward of the virtual stage before, a B or I the B or I of the one
        after, whichever the plan has there. The loss end's backward starts from its own forward and a W from its
        own I: they have no source here. The source is of the same rank where a vee turns, and with one stage.
        """
        return self._neighbour(rank, action, -1 if action.kind == "F" else 1)

    def target(self, rank: int, action: Action) -> tuple[int, Action] | None:
        """The (rank, action) that needs the action's result; None where the model ends or begins, and for a W."""
        return self._neighbour(rank, action, 1 if action.kind == "F" else -1)

    def arrivals(self, rank: int) -> dict[int, tuple[Action, ...]]:
        """Other rank -> the actions of `rank` that its messages are for, in the order in which it sends them."""
        found: dict[int, tuple[Action, ...]] = {}
        for sender, row in enumerate(self.actions):
            targets = [self.target(sender, action) for action in row] if sender != rank else []
            mine = tuple(target[1] for target in targets if target is not None and target[0] == rank)
            if mine:
                found[sender] = mine
        return found

    def _neighbour(self, rank: int, action: Action, step: int) -> tuple[int, Action] | None:
        other = self.virtual_stage(rank, action) + step
        if action.kind == "W" or not 0 <= other < self.stages * self.chunks:
            return None
        holder, chunk = self.place(other)
        if action.kind == "F":
            return holder, Action("F", action.microbatch, chunk)
        part = Action("I", action.microbatch, chunk)
        return holder, part if (holder, part) in self._split else Action("B", action.microbatch, chunk)

    @property
    def forwards(self) -> "Plan":
        """The plan without its backwards; its ranks still agree on the order of messages."""
        rows = tuple(tuple(action for action in row if action.kind == "F") for row in self.actions)
        return replace(self, actions=rows)

    @cached_property
    def _split(self) -> frozenset[tuple[int, Action]]:
        """Every (rank, I): the backwards that are split."""
        return frozenset(
            (rank, action) for rank, row in enumerate(self.actions) for action in row if action.kind == "I"
        )

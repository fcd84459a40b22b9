"""When the actions of a plan run, what share of the time is idle, and how many activations wait. Without torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from parallel.pipeline.plan import Action, Kind, Plan, PlanError

Cost = float | tuple[float, ...]
"""The time of a pass through a chunk: one for all, or one per virtual stage, in the order of the model."""

RELEASED: Mapping[str, tuple[Kind, ...]] = MappingProxyType({"weight": ("B", "W"), "input": ("B", "I")})
"""Until which gradient -> the actions that compute it."""


@dataclass(frozen=True, slots=True)
class Costs:
    """Times of a chunk's passes in one unit of the caller's; a whole backward ("B") takes input + weight."""

    forward: Cost = 1.0
    input: Cost = 1.0
    weight: Cost = 1.0
    message: float = 0.0
    """From the end of an action until its result is at another rank; the sender doesn't wait."""

    def of(self, kind: Kind, virtual_stage: int) -> float:
        """The time of an action of this kind on this virtual stage."""
        parts = {"F": (self.forward,), "B": (self.input, self.weight), "I": (self.input,), "W": (self.weight,)}
        return sum(cost[virtual_stage] if isinstance(cost, tuple) else cost for cost in parts[kind])

    def part(self, chunks: int) -> "Costs":
        """The costs of one of `chunks` equal chunks, given those of all; the time of a message stays.

        Raises ValueError for costs per virtual stage, which are already a chunk's.
        """
        whole = (self.forward, self.input, self.weight)
        if any(isinstance(cost, tuple) for cost in whole):
            raise ValueError(f"{self} are costs of virtual stages, which have no parts")
        forward, of_input, of_weights = (cost / chunks for cost in whole if not isinstance(cost, tuple))
        return Costs(forward, of_input, of_weights, self.message)


@dataclass(frozen=True, slots=True)
class Span:
    """An action and when it runs, in the unit of the costs."""

    action: Action
    start: float
    end: float


UNIT = Costs()


def timeline(plan: Plan, costs: Costs = UNIT) -> tuple[tuple[Span, ...], ...]:
    """When every action of every rank runs if each rank starts it as early as it can.

    Sends never wait and receives block, so an action starts when the one before it on its rank has ended and its
    source's result has arrived. Raises PlanError on a deadlock.
    """
    spans: list[list[Span]] = [[] for _ in range(plan.stages)]
    ends: dict[tuple[int, Action], float] = {}
    progress = True
    while progress:
        progress = False
        for rank, row in enumerate(plan.actions):
            while len(spans[rank]) < len(row):
                action = row[len(spans[rank])]
                source = plan.source(rank, action)
                if source is not None and source not in ends:
                    break
                start = spans[rank][-1].end if spans[rank] else 0.0
                if source is not None:
                    start = max(start, ends[source] + (costs.message if source[0] != rank else 0.0))
                spans[rank].append(Span(action, start, start + costs.of(action.kind, plan.virtual_stage(rank, action))))
                ends[rank, action] = spans[rank][-1].end
                progress = True
    waiting = [
        _waiting(plan, rank, row[len(done)])
        for rank, (row, done) in enumerate(zip(plan.actions, spans, strict=True))
        if len(done) < len(row)
    ]
    if waiting:
        raise PlanError("deadlock: " + "; ".join(waiting))
    return tuple(tuple(row) for row in spans)


def bubble(plan: Plan, costs: Costs = UNIT) -> float:
    """The idle share, 0 to 1, of all ranks' time from the first action to the last."""
    return idle_share(timeline(plan, costs))


def idle_share(rows: tuple[tuple[Span, ...], ...]) -> float:
    """The share, 0 to 1, of all ranks' time from the first start to the last end that no span covers."""
    total = max(row[-1].end for row in rows) - min(row[0].start for row in rows)
    busy = sum(span.end - span.start for row in rows for span in row)
    return 1.0 - busy / (len(rows) * total) if total else 0.0


def in_flight(row: tuple[Action, ...], until: Literal["weight", "input"] = "weight") -> tuple[int, ...]:
    """After each action of a rank: how many (microbatch, chunk) pairs are kept there.

    A pair is kept from its F until its B, or until its W (`until="weight"`) or its I (`until="input"`): between
    the two only what the weights' gradients need must stay.
    """
    counts: list[int] = []
    for action in row:
        change = 1 if action.kind == "F" else -1 if action.kind in RELEASED[until] else 0
        counts.append((counts[-1] if counts else 0) + change)
    return tuple(counts)


def in_flight_peak(plan: Plan, until: Literal["weight", "input"] = "weight") -> tuple[int, ...]:
    """Per rank, the most (microbatch, chunk) pairs whose activations it must keep at one time."""
    return tuple(max(in_flight(row, until)) for row in plan.actions)


def _waiting(plan: Plan, rank: int, action: Action) -> str:
    source = plan.source(rank, action)
    assert source is not None, (rank, action)
    return f"rank {rank} waits before {action} for {source[1]} of rank {source[0]}"

"""Pipeline schedules as data: which microbatch each rank runs forward or backward, and when. Without torch.

A rank holds `chunks` chunks of layers. Chunk c of rank r is virtual stage `c * stages + r`, so activations
always travel to the next rank and wrap around from the last rank to the first one (Narayanan et al.,
arXiv:2104.04473, sec. 2.2). With one chunk a virtual stage is a rank. The same 4 ranks and 4 microbatches,
forward one unit and backward two:

    gpipe
    rank 0 | F0 F1 F2 F3 .. .. .. .. .. .. .. .. .. B0--- B1--- B2--- B3---
    rank 1 | .. F0 F1 F2 F3 .. .. .. .. .. .. B0--- B1--- B2--- B3---
    rank 2 | .. .. F0 F1 F2 F3 .. .. .. B0--- B1--- B2--- B3---
    rank 3 | .. .. .. F0 F1 F2 F3 B0--- B1--- B2--- B3---

    1f1b
    rank 0 | F0 F1 F2 F3 .. .. .. .. .. .. B0--- .. B1--- .. B2--- .. B3---
    rank 1 | .. F0 F1 F2 .. .. .. .. B0--- F3 B1--- .. B2--- .. B3---
    rank 2 | .. .. F0 F1 .. .. B0--- F2 B1--- F3 B2--- .. B3---
    rank 3 | .. .. .. F0 B0--- F1 B1--- F2 B2--- F3 B3---

Both waste the share (p - 1) / (m + p - 1) of the ranks' time. GPipe (Huang et al., arXiv:1811.06965) keeps m
microbatches in flight on every rank, 1F1B (PipeDream-Flush, Narayanan et al., arXiv:2006.09503) at most p - r
of them. Every rank runs its backwards in the order 0..m-1, so gradients are added in one order and schedules
agree bitwise.
"""

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

from conf.schema import ConfigError

Kind = Literal["F", "B"]


class PlanError(ValueError):
    """A plan that would hang, lose a microbatch or mix up messages; the text says where."""


@dataclass(frozen=True, slots=True)
class Action:
    """One forward ("F") or backward ("B") of one microbatch through one chunk of the rank that runs it."""

    kind: Kind
    microbatch: int
    chunk: int = 0

    def __str__(self) -> str:
        """`F3`, or `F3/1` when it is not the rank's first chunk."""
        return f"{self.kind}{self.microbatch}" + (f"/{self.chunk}" if self.chunk else "")


@dataclass(frozen=True, slots=True)
class Plan:
    """A whole schedule; `actions[rank]` is what that rank does, in order."""

    stages: int
    chunks: int
    microbatches: int
    actions: tuple[tuple[Action, ...], ...]

    def virtual_stage(self, rank: int, action: Action) -> int:
        """The position in the model, 0 .. stages * chunks - 1, of the chunk that the action runs."""
        return action.chunk * self.stages + rank

    def source(self, rank: int, action: Action) -> tuple[int, Action] | None:
        """The (rank, action) whose result the action needs; None if no other chunk's.

        A forward needs the same microbatch's forward of the virtual stage before, a backward the backward of
        the one after. The loss end's backward starts from its own forward, so it has no source here.
        """
        before = self.virtual_stage(rank, action) + (-1 if action.kind == "F" else 1)
        if not 0 <= before < self.stages * self.chunks:
            return None
        return before % self.stages, Action(action.kind, action.microbatch, before // self.stages)

    def target(self, rank: int, action: Action) -> tuple[int, Action] | None:
        """The (rank, action) that needs the action's result; None where the model ends or begins."""
        after = self.virtual_stage(rank, action) + (1 if action.kind == "F" else -1)
        if not 0 <= after < self.stages * self.chunks:
            return None
        return after % self.stages, Action(action.kind, action.microbatch, after // self.stages)


@dataclass(frozen=True, slots=True)
class Span:
    """An action and when it runs, in the units of the given forward and backward times."""

    action: Action
    start: float
    end: float


def gpipe(stages: int, microbatches: int) -> Plan:
    """All forwards, then all backwards (arXiv:1811.06965 sec. 2.3, fig. 2c)."""
    row = tuple(Action(kind, i) for kind in ("F", "B") for i in range(microbatches))
    return Plan(stages, 1, microbatches, (row,) * stages)


def one_f_one_b(stages: int, microbatches: int) -> Plan:
    """Warm-up forwards, one forward and one backward in turn, then the backwards left (arXiv:2104.04473 fig. 4).

    Rank r warms up with p - 1 - r forwards (all of them if there are fewer microbatches), so at most p - r
    microbatches are in flight there.
    """
    rows: list[tuple[Action, ...]] = []
    for rank in range(stages):
        warm_up = min(stages - 1 - rank, microbatches)
        row = [Action("F", i) for i in range(warm_up)]
        for i in range(microbatches - warm_up):
            row += [Action("F", warm_up + i), Action("B", i)]
        row += [Action("B", i) for i in range(microbatches - warm_up, microbatches)]
        rows.append(tuple(row))
    return Plan(stages, 1, microbatches, tuple(rows))


SCHEDULES: Mapping[str, Callable[[int, int], Plan]] = MappingProxyType({"gpipe": gpipe, "1f1b": one_f_one_b})


def make(schedule: str, stages: int, microbatches: int) -> Plan:
    """The verified plan of the named schedule (`gpipe` or `1f1b`).

    Raises ConfigError for an unknown name or for counts below one.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule} is not known; use one of {', '.join(SCHEDULES)}")
    for field, value in (("stages", stages), ("microbatches", microbatches)):
        if value < 1:
            raise ConfigError(f"{field}={value} is less than 1; use {field}>=1")
    plan = SCHEDULES[schedule](stages, microbatches)
    verify(plan)
    return plan


def verify(plan: Plan) -> None:
    """Proves that the plan can run: sends never wait, receives block and take each pair's messages in order.

    Raises PlanError for a missing, repeated or unknown action, a backward before its forward, backwards out
    of microbatch order (they would change the order in which gradients are added), a pair of ranks where
    messages are sent in another order than they are received, and a deadlock.
    """
    if len(plan.actions) != plan.stages:
        raise PlanError(f"a plan for {plan.stages} stages has actions for {len(plan.actions)} ranks")
    for rank in range(plan.stages):
        _verify_rank(plan, rank)
    _verify_messages(plan)
    timeline(plan)


def timeline(plan: Plan, forward: float = 1.0, backward: float = 2.0) -> tuple[tuple[Span, ...], ...]:
    """When every action of every rank runs, if messages take no time and each rank starts as early as it can.

    `forward` and `backward` are the times of one chunk, equal on all ranks. Raises PlanError on a deadlock.
    """
    seconds = {"F": forward, "B": backward}
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
                free = spans[rank][-1].end if spans[rank] else 0.0
                start = free if source is None else max(free, ends[source])
                spans[rank].append(Span(action, start, start + seconds[action.kind]))
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


def bubble(plan: Plan, forward: float = 1.0, backward: float = 2.0) -> float:
    """The idle share, 0 to 1, of all ranks' time from the first action to the last, for equal stages.

    For gpipe and 1f1b it is (p - 1) / (m + p - 1), as arXiv:2104.04473 sec. 2.2.1 derives it.
    """
    spans = timeline(plan, forward, backward)
    total = plan.stages * max(row[-1].end for row in spans)
    busy = sum(span.end - span.start for row in spans for span in row)
    return 1.0 - busy / total


def in_flight(row: tuple[Action, ...]) -> tuple[int, ...]:
    """After each action of a rank: how many (microbatch, chunk) pairs wait there for their backward."""
    counts: list[int] = []
    for action in row:
        counts.append((counts[-1] if counts else 0) + (1 if action.kind == "F" else -1))
    return tuple(counts)


def in_flight_peak(plan: Plan) -> tuple[int, ...]:
    """Per rank, the most (microbatch, chunk) pairs whose activations it must keep at one time."""
    return tuple(max(in_flight(row)) for row in plan.actions)


def _verify_rank(plan: Plan, rank: int) -> None:
    row = plan.actions[rank]
    wanted = {Action(k, i, c) for k in ("F", "B") for i in range(plan.microbatches) for c in range(plan.chunks)}
    seen = Counter(row)
    for action in row:
        if action not in wanted:
            limits = f"{plan.microbatches} microbatches and {plan.chunks} chunks"
            raise PlanError(f"rank {rank} has {action}, which a plan of {limits} does not know")
        if seen[action] > 1:
            raise PlanError(f"rank {rank} runs {action} {seen[action]} times")
    missing = sorted(map(str, wanted - seen.keys()))
    if missing:
        raise PlanError(f"rank {rank} never runs {', '.join(missing)}")
    place = {action: index for index, action in enumerate(row)}
    for chunk in range(plan.chunks):
        order = [a.microbatch for a in row if a.kind == "B" and a.chunk == chunk]
        for i in order:
            if place[Action("B", i, chunk)] < place[Action("F", i, chunk)]:
                raise PlanError(f"rank {rank} runs {Action('B', i, chunk)} before {Action('F', i, chunk)}")
        if order != sorted(order):
            raise PlanError(f"rank {rank} runs the backwards of chunk {chunk} in the order {order}, not 0..m-1")


def _verify_messages(plan: Plan) -> None:
    """Compares, for each ordered pair of ranks, the order of its sends with the order of its receives."""
    sent: dict[tuple[int, int], list[Action]] = {}
    received: dict[tuple[int, int], list[Action]] = {}
    for rank, row in enumerate(plan.actions):
        for action in row:
            target, source = plan.target(rank, action), plan.source(rank, action)
            if target is not None and target[0] != rank:
                sent.setdefault((rank, target[0]), []).append(target[1])
            if source is not None and source[0] != rank:
                received.setdefault((source[0], rank), []).append(action)
    for (source_rank, rank), arrivals in sent.items():
        for index, (arriving, expected) in enumerate(zip(arrivals, received[source_rank, rank], strict=True)):
            if arriving != expected:
                raise PlanError(
                    f"message {index} from rank {source_rank} to rank {rank} is sent for {arriving}, "
                    f"but rank {rank} receives it for {expected}"
                )


def _waiting(plan: Plan, rank: int, action: Action) -> str:
    source = plan.source(rank, action)
    assert source is not None, (rank, action)
    return f"rank {rank} waits before {action} for {source[1]} of rank {source[0]}"

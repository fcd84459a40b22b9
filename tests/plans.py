"""Pipeline plans for tests: written by hand, drawn at random, and run message by message."""

from collections import deque
from random import Random
from typing import cast

from hypothesis import strategies as st

from parallel.pipeline.plan import Action, Kind, Placement, Plan
from parallel.pipeline.schedules import SCHEDULES, make


def row(text: str) -> tuple[Action, ...]:
    """Actions from their short form: "F0 B0", "F0/1" for chunk 1."""
    actions: list[Action] = []
    for word in text.split():
        number, _, chunk = word[1:].partition("/")
        actions.append(Action(cast(Kind, word[0]), int(number), int(chunk or 0)))
    return tuple(actions)


def plan(rows: list[str], microbatches: int, chunks: int = 1, placement: Placement = "loop") -> Plan:
    return Plan(len(rows), chunks, microbatches, tuple(row(text) for text in rows), placement)


@st.composite
def made_plans(draw: st.DrawFn, most_stages: int = 8, most_microbatches: int = 20) -> tuple[str, Plan]:
    """(name, plan) of any schedule, stages, microbatches and up to four chunks."""
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    known = SCHEDULES[name]
    chunks = draw(st.integers(known.least_chunks, known.most_chunks or 4))
    return name, make(name, draw(st.integers(1, most_stages)), draw(st.integers(1, most_microbatches)), chunks)


def runs(plan: Plan, random: Random) -> bool:
    """Whether every rank gets to its end.

    Ranks take turns in a random order, each until it has to wait for a message; they take them as `Plan.arrivals`
    says and never wait to send. Nothing here comes from `timeline` or `verify`.
    """
    channels: dict[tuple[int, int], deque[Action]] = {}
    expected = [{sender: deque(row) for sender, row in plan.arrivals(r).items()} for r in range(plan.stages)]
    held: list[set[Action]] = [set() for _ in range(plan.stages)]
    done = [0] * plan.stages
    finished: list[set[Action]] = [set() for _ in range(plan.stages)]

    def step(rank: int) -> bool:
        if done[rank] == len(plan.actions[rank]):
            return False
        action = plan.actions[rank][done[rank]]
        needs, gives = plan.source(rank, action), plan.target(rank, action)
        if needs is not None and needs[0] == rank and needs[1] not in finished[rank]:
            return False
        if needs is not None and needs[0] != rank:
            channel = channels.setdefault((needs[0], rank), deque())
            while action not in held[rank]:
                if not channel:
                    return False
                message = channel.popleft()
                assert message == expected[rank][needs[0]].popleft()
                held[rank].add(message)
            held[rank].remove(action)
        done[rank] += 1
        finished[rank].add(action)
        if gives is not None and gives[0] != rank:
            channels.setdefault((rank, gives[0]), deque()).append(gives[1])
        return True

    ranks = list(range(plan.stages))
    moved = True
    while moved:
        moved = False
        random.shuffle(ranks)
        for rank in ranks:
            while step(rank):
                moved = True
    return done == [len(row) for row in plan.actions]

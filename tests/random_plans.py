"""Random pipeline plans that `verify` accepts: any order of actions that the rules leave open."""

from __future__ import annotations

from random import Random

from parallel.pipeline.plan import Action, Placement, Plan


def random_plan(seed: int, stages: int, chunks: int, microbatches: int, placement: Placement = "loop") -> Plan:
    """A run of all ranks in which the next action is drawn among those that could run; some backwards are split.

    Forwards of a chunk needn't be in the order of microbatches, gradients are.
    """
    random = Random(seed)
    passes = [(m, c) for c in range(chunks) for m in range(microbatches)]
    rows = [
        [Action(kind, *pair) for pair in passes for kind in random.choice(("FB", "FIW"))]  # type: ignore[arg-type]
        for _ in range(stages)
    ]
    plan = Plan(stages, chunks, microbatches, tuple(map(tuple, rows)), placement)  # for `source`
    done: list[list[Action]] = [[] for _ in range(stages)]
    while any(rows):
        rank, action = random.choice([(r, a) for r, row in enumerate(rows) for a in row if _can_run(plan, r, a, done)])
        rows[rank].remove(action)
        done[rank].append(action)
    return Plan(stages, chunks, microbatches, tuple(map(tuple, done)), placement)


def _can_run(plan: Plan, rank: int, action: Action, done: list[list[Action]]) -> bool:
    m, c, here = action.microbatch, action.chunk, done[rank]
    if action.kind != "F":
        if Action("I" if action.kind == "W" else "F", m, c) not in here:
            return False
        parts = {"B": "IW", "I": "I", "W": "W"}[action.kind]
        for i in range(m):
            if Action("B", i, c) not in here and not all(Action(part, i, c) in here for part in parts):  # type: ignore[arg-type]
                return False
    source = plan.source(rank, action)
    return source is None or source[1] in done[source[0]]

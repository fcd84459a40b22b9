"""Proves that a plan runs before anything is launched. Without torch."""

from collections import Counter

from parallel.pipeline.plan import KINDS, Action, Plan, PlanError
from parallel.pipeline.timeline import timeline

LISTED = 8
"""Missing actions that a message names."""


def verify(plan: Plan) -> None:
    """Proves that the plan can run where sends never wait and receives block, taking messages as `Plan.arrivals` says.

    Raises PlanError for a missing, repeated or unknown action, a backward before its forward or a W before its I,
    gradients out of microbatch order (they would be added in another order), and a deadlock. There is none if no
    action waits, through others, for itself: whatever arrives before a message was sent before it.
    """
    if len(plan.actions) != plan.stages:
        raise PlanError(f"a plan for {plan.stages} stages has actions for {len(plan.actions)} ranks")
    if plan.placement == "vee" and plan.chunks != 2:
        raise PlanError(f"a vee has 2 chunks per rank, not {plan.chunks}")
    for rank in range(plan.stages):
        _verify_rank(plan, rank)
    timeline(plan)


def _verify_rank(plan: Plan, rank: int) -> None:
    row = plan.actions[rank]
    pairs = [(i, c) for i in range(plan.microbatches) for c in range(plan.chunks)]
    known = {Action(kind, *pair) for kind in KINDS for pair in pairs}
    seen = Counter(row)
    for action in row:
        if action not in known:
            limits = f"{plan.microbatches} microbatches and {plan.chunks} chunks"
            raise PlanError(f"rank {rank} has {action}, which a plan of {limits} does not know")
        if seen[action] > 1:
            raise PlanError(f"rank {rank} runs {action} {seen[action]} times")
    missing: list[Action] = []
    for pair in pairs:
        forward, whole, of_input, of_weights = (Action(kind, *pair) for kind in KINDS)
        parts = [part for part in (of_input, of_weights) if part in seen]
        if whole in seen and parts:
            raise PlanError(f"rank {rank} runs {whole} and also {parts[0]}, a part of it")
        needed = (forward, of_input, of_weights) if parts else (forward, whole)
        missing += [action for action in needed if action not in seen]
    if missing:
        more = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        raise PlanError(f"rank {rank} never runs {', '.join(map(str, missing[:LISTED]))}{more}")
    _verify_order(plan, rank)


def _verify_order(plan: Plan, rank: int) -> None:
    """Each pair's actions follow each other, and the gradients of a chunk come in the order of microbatches."""
    row = plan.actions[rank]
    place = {action: index for index, action in enumerate(row)}
    for action in row:
        if action.kind == "F":
            continue
        needed = Action("I" if action.kind == "W" else "F", action.microbatch, action.chunk)
        if place[action] < place[needed]:
            raise PlanError(f"rank {rank} runs {action} before {needed}")
    for chunk in range(plan.chunks):
        for kinds, name in ((("B", "I"), "backwards"), (("B", "W"), "weight gradients")):
            order = [a.microbatch for a in row if a.kind in kinds and a.chunk == chunk]
            if order != sorted(order):
                raise PlanError(f"rank {rank} runs the {name} of chunk {chunk} in the order {order}, not 0..m-1")


def held_peak(plan: Plan) -> tuple[int, ...]:
    """Per rank, the most messages that it keeps at one time because it took them on the way to a later one.

    Zero where every message is used in the order of `Plan.arrivals`, as in gpipe, 1f1b and zero_bubble.
    """
    return tuple(_held(plan, rank) for rank in range(plan.stages))


def _held(plan: Plan, rank: int) -> int:
    waiting = {sender: iter(actions) for sender, actions in plan.arrivals(rank).items()}
    held: set[Action] = set()
    most = 0
    for action in plan.actions[rank]:
        source = plan.source(rank, action)
        if source is None or source[0] == rank:
            continue
        while action not in held:
            held.add(next(waiting[source[0]]))
        held.remove(action)
        most = max(most, len(held))
    return most

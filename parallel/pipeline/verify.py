"""Proves that a plan runs before anything is launched. Without torch."""

from collections import Counter

from parallel.pipeline.plan import Action, Kind, Plan, PlanError
from parallel.pipeline.timeline import timeline

KINDS: tuple[Kind, ...] = ("F", "B", "I", "W")


def verify(plan: Plan) -> None:
    """Proves that the plan can run: sends never wait, receives block and take each pair's messages in order.

    Raises PlanError for a missing, repeated or unknown action, a backward before its forward or a W before its I,
    gradients out of microbatch order (they would be added in another order), a pair of ranks where messages are
    sent in another order than they are received, and a deadlock.
    """
    if len(plan.actions) != plan.stages:
        raise PlanError(f"a plan for {plan.stages} stages has actions for {len(plan.actions)} ranks")
    if plan.placement == "vee" and plan.chunks != 2:
        raise PlanError(f"a vee has 2 chunks per rank, not {plan.chunks}")
    for rank in range(plan.stages):
        _verify_rank(plan, rank)
    _verify_messages(plan)
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
        backward = {of_input, of_weights} if parts else {whole}
        missing += sorted(({forward} | backward) - seen.keys(), key=str)
    if missing:
        raise PlanError(f"rank {rank} never runs {', '.join(map(str, missing))}")
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

"""The bubbles of the papers in closed form, for equal stages and free messages. Without torch."""

from parallel.pipeline.plan import Plan
from parallel.pipeline.timeline import Costs


def bubble_formula(schedule: str, plan: Plan, costs: Costs) -> tuple[str, float] | None:
    """(formula, value) of the bubble of a named schedule's plan, None where no closed form holds.

    p stages, m microbatches, v chunks, and F, I, W the times of a chunk's passes:
    gpipe and 1f1b arXiv:2104.04473 sec. 2.1, interleaved sec. 2.2, zero_bubble (ZB-H1) arXiv:2401.10241 table 1;
    zbv at equal times: its last rank waits p - 1 chunks' forwards and nobody waits again.
    """
    p, m, v = plan.stages, plan.microbatches, plan.chunks
    if isinstance(costs.forward, tuple) or isinstance(costs.input, tuple) or isinstance(costs.weight, tuple):
        return None
    if costs.message:
        return None
    forward, of_input, of_weights = costs.forward, costs.input, costs.weight
    if schedule in ("gpipe", "1f1b"):
        return "(p-1)/(m+p-1)", (p - 1) / (m + p - 1)
    if schedule == "interleaved" and m >= p:
        return "(p-1)/(vm+p-1)", (p - 1) / (v * m + p - 1)
    if schedule == "zero_bubble" and m >= p and of_weights <= min(forward, of_input):
        idle = (p - 1) * (forward + of_input - of_weights)
        return "(p-1)(F+I-W)/(m(F+I+W)+(p-1)(F+I-W))", idle / (m * (forward + of_input + of_weights) + idle)
    if schedule == "zbv" and m >= 2 * p - 1 and forward == of_input == of_weights:
        return "(p-1)/(6m+p-1)", (p - 1) / (6 * m + p - 1)
    return None

"""The schedules: pure functions from counts to a plan. Without torch.

4 ranks and 4 microbatches, forward one unit and backward two:

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
of them.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from conf.schema import ConfigError
from parallel.pipeline.plan import Action, Plan
from parallel.pipeline.verify import verify


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

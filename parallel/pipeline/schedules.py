"""The schedules: pure functions from counts to a plan. Without torch.

p stages, m microbatches, v chunks per rank. 4 microbatches on 4 ranks, forward one unit and backward two:

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
of them. With the backward in two parts of one unit each:

    zero_bubble
    rank 0 | F0 F1 F2 F3 .. .. .. I0 W0 I1 W1 I2 W2 I3 W3
    rank 1 | .. F0 F1 F2 .. .. I0 F3 I1 W0 I2 W1 I3 W2 W3
    rank 2 | .. .. F0 F1 .. I0 F2 I1 F3 I2 W0 I3 W1 W2 W3
    rank 3 | .. .. .. F0 I0 F1 I1 F2 I2 F3 I3 W0 W1 W2 W3

On 2 ranks of two chunks, 2 and 3 microbatches, each action half as long:

    interleaved
    rank 0 | F0   F1   F0/1 F1/1 .... .... B0/1----- .... B1/1----- B0------- B1-------
    rank 1 | .... F0   F1   F0/1 B0/1----- F1/1 B1/1----- B0------- B1-------

    zbv
    rank 0 | F0   F1   F2   F0/1 I0/1 W0/1 F1/1 I1/1 W1/1 I0-- W0-- F2/1 I2/1 W2/1 I1-- W1-- I2-- W2--
    rank 1 | .... F0   F0/1 F1   F1/1 I0/1 W0/1 F2   I0-- W0-- F2/1 I1/1 W1/1 I1-- I2/1 I2-- W1-- W2/1 W2--
"""

import functools
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import cast

from conf.schema import ConfigError
from parallel.pipeline.plan import Action, Kind, Plan
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


def interleaved(stages: int, microbatches: int, chunks: int) -> Plan:
    """1F1B over several chunks per rank, placed in a loop (arXiv:2104.04473 sec. 2.2, fig. 4).

    Forwards go through the chunks in groups of p microbatches: all of a group through chunk 0, then through chunk 1,
    and so on; backwards likewise from the last chunk. Rank r warms up until its first backward can be there,
    (v - 1) * p + 2 * (p - 1 - r) forwards. Where p doesn't divide the microbatches the groups are larger, up to
    2p - 1: a smaller last group would wait for its own activations to come around, or for ever. With fewer
    microbatches than stages there is one group.
    """
    groups = max(1, microbatches // stages)
    size, larger = divmod(microbatches, groups)
    forwards: list[Action] = []
    backwards: list[Action] = []
    first = 0
    for group in range(groups):
        members = range(first, first + size + (group < larger))
        first = members.stop
        forwards += [Action("F", i, chunk) for chunk in range(chunks) for i in members]
        backwards += [Action("B", i, chunk) for chunk in reversed(range(chunks)) for i in members]
    rows: list[tuple[Action, ...]] = []
    for rank in range(stages):
        warm_up = min((chunks - 1) * (size + (larger > 0)) + 2 * (stages - 1 - rank), len(forwards))
        row = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            row += [forward, backward]
        rows.append((*row, *backwards[len(forwards) - warm_up :]))
    return Plan(stages, chunks, microbatches, tuple(rows))


def zero_bubble(stages: int, microbatches: int) -> Plan:
    """ZB-H1: 1F1B with the weight gradients later (Qi et al., arXiv:2401.10241, sec. 3.1, fig. 2).

    Forwards and input gradients come as in 1F1B. Rank r keeps r weight gradients back, which fill the time that
    it would wait at the end; so every rank holds up to p activations, what 1F1B's first rank does.
    """
    rows: list[tuple[Action, ...]] = []
    for rank in range(stages):
        warm_up = min(stages - 1 - rank, microbatches)
        row = [Action("F", i) for i in range(warm_up)]
        for i in range(microbatches):
            row += [Action("F", warm_up + i)] if warm_up + i < microbatches else []
            row += [Action("I", i)]
            row += [Action("W", i - rank)] if i >= rank else []
        row += [Action("W", i) for i in range(max(0, microbatches - rank), microbatches)]
        rows.append(tuple(row))
    return Plan(stages, 1, microbatches, tuple(rows))


def zbv(stages: int, microbatches: int) -> Plan:
    """ZB-V: two chunks per rank in a vee, backwards split (arXiv:2401.10241 sec. 6, fig. 6; arXiv:2405.15362).

    Where forward, input gradient and weight gradient take as long as each other, a rank that has begun never
    waits. Both ends of the model are on rank 0, so its first backward comes after p forwards of each chunk, and at
    most 2p chunks' activations are held: as many as 1F1B's first rank holds. Made for 2p - 1 microbatches at least;
    a plan of fewer is that one without the others.
    """
    made = max(microbatches, 2 * stages - 1)
    rows: list[tuple[Action, ...]] = []
    for rank in range(stages):
        row = _Row()
        row.add(2 * (stages - rank) - 1, "F0")
        row.add(rank, "F1 F0")
        row.add(stages - rank, "F1 I1 W1")
        left = made - row.done("F0")
        row.add(left, "F0 I0 W0 F1 I1 W1")
        row.add(made - row.done("F1"), "I0 W0 F1 I1 W1")
        row.add(rank, "I0 I1")
        row.add(stages - rank, "I0 W0")
        row.add(made - row.done("W1"), "W1")
        row.add(made - row.done("W0"), "W0")
        rows.append(tuple(action for action in row.actions if action.microbatch < microbatches))
    return Plan(stages, 2, microbatches, tuple(rows), "vee")


class _Row:
    """A rank's actions under construction; each pass of a chunk takes the next microbatch."""

    def __init__(self) -> None:
        self.actions: list[Action] = []
        self._done: Counter[str] = Counter()

    def done(self, word: str) -> int:
        return self._done[word]

    def add(self, times: int, pattern: str) -> None:
        """Appends a pattern such as "F0 I1" (a forward of chunk 0, an input gradient of chunk 1) some times."""
        for word in pattern.split() * times:
            self.actions.append(Action(cast(Kind, word[0]), self._done[word], int(word[1:])))
            self._done[word] += 1


@dataclass(frozen=True, slots=True)
class Schedule:
    """A named schedule: how to make it from (stages, microbatches, chunks), and which chunk counts it has."""

    plan: Callable[[int, int, int], Plan]
    least_chunks: int = 1
    most_chunks: int | None = 1


SCHEDULES: Mapping[str, Schedule] = MappingProxyType(
    {
        "gpipe": Schedule(lambda stages, microbatches, _: gpipe(stages, microbatches)),
        "1f1b": Schedule(lambda stages, microbatches, _: one_f_one_b(stages, microbatches)),
        "interleaved": Schedule(interleaved, 2, None),
        "zero_bubble": Schedule(lambda stages, microbatches, _: zero_bubble(stages, microbatches)),
        "zbv": Schedule(lambda stages, microbatches, _: zbv(stages, microbatches), 2, 2),
    }
)


@functools.lru_cache(maxsize=64)  # a run asks for the same few in every step
def make(schedule: str, stages: int, microbatches: int, chunks: int | None = None) -> Plan:
    """The verified plan of the named schedule; `chunks` per rank (virtual stages) default to the fewest it has.

    Raises ConfigError for an unknown name, counts below one, or chunks that the schedule doesn't have.
    """
    if schedule not in SCHEDULES:
        raise ConfigError(f"schedule={schedule} is not known; use one of {', '.join(SCHEDULES)}")
    known = SCHEDULES[schedule]
    chunks = known.least_chunks if chunks is None else chunks
    for field, value in (("stages", stages), ("microbatches", microbatches), ("chunks", chunks)):
        if value < 1:
            raise ConfigError(f"{field}={value} is less than 1; use {field}>=1")
    if known.most_chunks is not None and chunks > known.most_chunks:
        raise ConfigError(
            f"chunks={chunks} is more than schedule={schedule} has; use chunks={known.most_chunks} or "
            "schedule=interleaved"
        )
    if chunks < known.least_chunks:
        raise ConfigError(
            f"chunks={chunks} is less than schedule={schedule} has; use chunks>={known.least_chunks} or schedule=1f1b"
        )
    plan = known.plan(stages, microbatches, chunks)
    verify(plan)
    return plan

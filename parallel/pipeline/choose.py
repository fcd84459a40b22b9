"""Which schedule to run: predicts the step of each for given costs and takes the fastest that fits. Without torch.

What is trained decides. All weights: forward, input and weight gradient take about as long as each other, and
splitting the backward pays (arXiv:2401.10241). Adapters: the weights' gradients are those of the factors, next to
nothing, so there is nothing to fill a bubble with; zero_bubble is then no better than 1f1b, and only more chunks
per rank help (interleaved; zbv, in which p activations suffice):

    4 stages, 16 microbatches     gpipe   1f1b   interleaved 2   interleaved 4   zero_bubble   zbv
    bubble, all weights  (FULL)   15.8%  15.8%            8.6%            4.5%          5.9%   3.0%
    bubble, adapters (ADAPTERS)   15.8%  15.8%            8.6%            4.5%         15.8%   8.6%
    activations, most on a rank      16      4             5.5            4.75             4      4
"""

from collections.abc import Callable
from dataclasses import dataclass

from conf.schema import ConfigError
from parallel.pipeline.plan import Plan
from parallel.pipeline.schedules import SCHEDULES, make
from parallel.pipeline.timeline import Costs, idle_share, in_flight_peak, timeline

FULL = Costs(1.0, 1.0, 1.0)
"""Of a rank's layers, all of whose weights are trained: each pass does the same products."""
ADAPTERS = Costs(1.0, 1.0, 0.0)
"""Of a rank's layers, frozen but for low-rank factors."""

BY_SIMPLICITY = ("1f1b", "gpipe", "interleaved", "zero_bubble", "zbv")
"""1f1b before gpipe, whose bubble is the same and whose memory is larger."""
MARGIN = 0.01
"""Share of the step's time that a less simple schedule must save: predictions aren't better than that."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """What a schedule would do."""

    schedule: str
    chunks: int
    plan: Plan
    time: float
    """From the first action to the last, in the unit of the costs."""
    bubble: float
    """Idle share of all ranks' time, 0 to 1."""
    in_flight: float
    """Activations kept on the worst rank, in microbatches through all layers of a rank."""


def predictions(
    stages: int, microbatches: int, costs: Costs | Callable[[Plan], Costs], most_chunks: int = 4
) -> list[Prediction]:
    """Every schedule with every number of chunks up to `most_chunks`, the simple ones first.

    Args:
        costs: those of all layers of a rank, of which each of its chunks takes an equal part; or the costs of a
            plan's virtual stages, for layers that don't split evenly.
    """
    found: list[Prediction] = []
    for schedule in BY_SIMPLICITY:
        known = SCHEDULES[schedule]
        for chunks in range(known.least_chunks, min(known.most_chunks or most_chunks, most_chunks) + 1):
            plan = make(schedule, stages, microbatches, chunks)
            rows = timeline(plan, costs.part(chunks) if isinstance(costs, Costs) else costs(plan))
            end, kept = max(row[-1].end for row in rows), max(in_flight_peak(plan)) / chunks
            found.append(Prediction(schedule, chunks, plan, end, idle_share(rows), kept))
    return found


def choose(
    stages: int,
    microbatches: int,
    costs: Costs | Callable[[Plan], Costs],
    most_in_flight: float | None = None,
    most_chunks: int = 4,
) -> Prediction:
    """The fastest schedule within a bound on memory; of nearly equal ones (MARGIN) the simplest. Deterministic.

    Args:
        costs: as in `predictions`.
        most_in_flight: bound on `Prediction.in_flight`; None = no bound.
        most_chunks: bound on the chunks per rank, for instance the layers per rank.

    Raises:
        ConfigError: no schedule keeps within the bound, or a count is below one.
    """
    made = predictions(stages, microbatches, costs, most_chunks)
    fitting = [p for p in made if most_in_flight is None or p.in_flight <= most_in_flight]
    if not fitting:
        least = min(p.in_flight for p in made)
        raise ConfigError(
            f"most_in_flight={most_in_flight:g} is less than any schedule of stages={stages} and "
            f"microbatches={microbatches} needs; use most_in_flight>={least:g} or fewer stages"
        )
    best = fitting[0]
    for other in fitting[1:]:
        if other.time < best.time * (1.0 - MARGIN):
            best = other
    return best

"""Short training runs on random models and ragged random rows, under any layout, for parity tests."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema import (
    Architecture,
    Config,
    DataConf,
    ModelConf,
    OptimConf,
    ParallelConf,
    TrainConf,
    TuneConf,
)
from kernels import dispatch
from parallel import comm
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.pipeline.plan import Plan
from parallel.sharding import Spec, partition
from parallel.zero import Strip, gather
from tests.models import TINY, RandomWeights
from tests.ranks import on_ranks
from train.data import Row
from train.model import Model, build_model
from train.step import Trainer


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run: what, how long, under which layout."""

    data: int = 1
    pipeline: int = 1
    tensor: int = 1
    context: int = 1
    context_method: str = "ring"
    ulysses: int | None = None
    schedule: str = "1f1b"
    microbatches: int = 1
    stages: tuple[int, ...] | None = None
    virtual_stages: int = 1
    plan: Plan | None = None
    """Executed instead of the schedule's."""
    sequence: bool = False
    recompute: str = "none"
    packing: bool = True
    tune: TuneConf = field(default_factory=lambda: TuneConf(kind="full"))
    optim: OptimConf = field(default_factory=lambda: OptimConf(lr=1e-3, schedule="cosine", decay_steps=10))
    dtype: str = "float64"
    steps: int = 1
    batch_size: int = 7
    architecture: Architecture = TINY

    @property
    def ranks(self) -> int:
        """Ranks that the layout takes."""
        return self.data * self.pipeline * self.context * self.tensor

    @property
    def config(self) -> Config:
        """The resolved configuration."""
        stages = self.stages or tuple(
            stop - start
            for start, stop in pairwise(partition(self.architecture.num_layers, self.pipeline * self.virtual_stages))
        )
        return Config(
            model=ModelConf(dtype=self.dtype),  # pyright: ignore[reportArgumentType]
            parallel=ParallelConf(
                data=self.data,
                pipeline=self.pipeline,
                context=self.context,
                tensor=self.tensor,
                sequence=self.sequence,
                context_method=self.context_method,  # pyright: ignore[reportArgumentType]
                ulysses=self.ulysses,
                stages=stages,
                virtual_stages=self.virtual_stages,
                schedule=self.schedule,  # pyright: ignore[reportArgumentType]
                microbatches=self.microbatches,
                recompute=self.recompute,  # pyright: ignore[reportArgumentType]
            ),
            tune=self.tune,
            data=DataConf(packing=self.packing),
            optim=self.optim,
            train=TrainConf(steps=self.steps, batch_size=self.batch_size),
        )


@dataclass(frozen=True)
class Outcome:
    """What a run gave, put together from all ranks; `gradients` are those of the last step, before clipping."""

    losses: list[float]
    norms: list[float]
    gradients: dict[str, Tensor]
    parameters: dict[str, Tensor]


def rows_of(step: int, batch_size: int, vocab: int) -> list[Row]:
    """Ragged rows, some with a single target, one of one token and thus none."""
    random = np.random.default_rng(step)
    rows = []
    for i in range(batch_size):
        length = 1 if i == 2 else int(random.integers(2, 24))
        targets = random.random(length) < 0.6
        targets[-1] = length > 1
        rows.append(Row(random.integers(0, vocab, length).astype(np.int32), targets, 100 * step + i, i + 1))
    return rows


def train(run: Run, each: Callable[..., Any] | None = None, *args: Any) -> Outcome:
    """Runs it, on forked ranks if the layout has several; each does `each(launch, run, *args)`, or `train_rank`."""
    part = each or train_rank
    parts = on_ranks(run.ranks, part, run, *args) if run.ranks > 1 else [part(Launch(), run, *args)]
    losses, norms = parts[0][:2]
    for other in parts[1:]:
        assert other[0] == losses
        assert other[1] == norms
    return Outcome(losses, norms, _join(parts, 2), _join(parts, 3))


def train_rank(launch: Launch, run: Run) -> Any:
    """One rank's part: losses, norms, and its blocks of gradients and parameters."""
    config = run.config
    mesh = mesh_of(launch, run)
    dtype = getattr(torch, run.dtype)
    model = build_model(config, RandomWeights(run.architecture), mesh, dispatch.select(torch.device("cpu"), dtype))
    if model.adapter is not None and model.adapter.kind == "lora":
        perturb(model.trainable())
    trainer = Trainer(config, model) if run.plan is None else _Planned(config, model, run.plan)
    results = []
    for step in range(1, run.steps + 1):
        rows = rows_of(step, run.batch_size, run.architecture.vocab_size)
        results.append(trainer.step(step, rows))
        assert differing_replicas(trainer) == []
    for bucket in trainer.gradients._buckets:
        if bucket.scattered:
            gather(Strip.of([p.grad for _, p in bucket.members if p.grad is not None]), bucket.shares, mesh.replicas)
    gradients, parameters = [], []
    clip = min(1.0, 1.0 / (results[-1].grad_norm + 1e-6)) if results[-1].grad_norm > 1 else 1.0
    for spec, parameter in trainer.placed:
        assert parameter.grad is not None
        gradients.append((spec, (parameter.grad / clip).numpy()))
        parameters.append((spec, parameter.detach().numpy()))
    return [r.loss for r in results], [r.grad_norm for r in results], gradients, parameters


def mesh_of(launch: Launch, run: Run) -> Mesh:
    """The mesh of its layout."""
    ulysses = run.config.parallel.ulysses_size
    sizes = {"data": run.data, "pipeline": run.pipeline, "context": run.context, "tensor": run.tensor}
    return Mesh.build(launch, **sizes, ulysses=ulysses)


class _Planned(Trainer):
    """Executes a given plan."""

    def __init__(self, config: Config, model: Model, plan: Plan) -> None:
        super().__init__(config, model)
        self.plan = plan

    def _plan(self, num_microbatches: int) -> Plan:
        assert num_microbatches == self.plan.microbatches
        return self.plan


def differing_replicas(trainer: Trainer) -> list[str]:
    """Names of this rank's parameters that aren't bitwise the same on every replica; collective, told to all of them."""
    hashes = {
        spec.name: hashlib.blake2b(parameter.detach().view(torch.uint8).numpy()).hexdigest()
        for spec, parameter in trainer.placed
    }
    return comm.disagreements(hashes, trainer.mesh.replicas)


def perturb(placed: Sequence[tuple[Spec, torch.nn.Parameter]]) -> None:
    """Gives LoRA's B, which starts at zero, values: the same in every layout."""
    for spec, parameter in placed:
        if spec.name.endswith("lora_B.weight"):
            generator = torch.Generator().manual_seed(len(spec.name) + sum(map(ord, spec.name)))
            full = 0.05 * torch.randn(spec.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(full[spec.index])


def _join(parts: Sequence[Any], at: int) -> dict[str, Tensor]:
    """Full tensors from the ranks' blocks; ranks that hold the same entries must agree bitwise."""
    full: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}
    for part in parts:
        for spec, block in part[at]:
            values = torch.from_numpy(block)
            if spec.name not in full:
                full[spec.name] = torch.zeros(spec.shape, dtype=values.dtype)
                seen[spec.name] = torch.zeros(spec.shape, dtype=torch.bool)
            target, mask = full[spec.name][spec.index], seen[spec.name][spec.index]
            assert torch.equal(target[mask], values[mask]), f"replicas of {spec.name} differ"
            full[spec.name][spec.index] = values
            seen[spec.name][spec.index] = True
    for name, mask in seen.items():
        assert mask.all(), f"{name} is held by no rank in part"
    return full


def layout(**fields: Any) -> Run:
    """A run with these fields; shorter to write in tables."""
    return replace(Run(), **fields)

"""One optimizer step over all ranks, and the loss over an evaluation set."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from conf.layout import chunks_per_rank
from conf.schema import Config
from kernels.master import packs_kept
from parallel import comm
from parallel.adapters.prefix import StepPrefix
from parallel.context.plan import Cost, balance
from parallel.context.plan import Plan as ContextPlan
from parallel.gradients import Gradients
from parallel.pipeline import run, schedules
from parallel.pipeline.plan import Plan
from parallel.pipeline.trace import Writer
from parallel.randomness import DropoutKey
from train import agreement
from train.batches import Microbatch, microbatches, packs, share
from train.data import Dataset, Row
from train.model import Model
from train.optim import LossScale, adamw, learning_rate


class NotFinite(RuntimeError):
    """The loss or the gradient is NaN or infinite: training can't go on."""


@dataclass(frozen=True)
class StepResult:
    """What a step did, the same on every rank."""

    loss: float
    """Mean over the step's target tokens, before the update."""
    tokens: int
    """Tokens that went through the model, over all ranks."""
    grad_norm: float
    lr: float
    skipped: bool
    """Whether the update was left out because float16 overflowed."""
    context_balance: float | None = None
    """Work of the fullest context rank over their mean; None without context parallelism."""


class Trainer:
    """Model, gradients and optimizer of a run; `step` advances them."""

    def __init__(self, config: Config, model: Model) -> None:
        self.config, self.model, self.mesh = config, model, model.mesh
        self.placed = model.trainable()
        overlapped = model.prefix is None or model.prefix.hidden is None
        sharded = config.optim.kind == "zero1"
        self.gradients = Gradients(model.mesh, self.placed, overlapped, model.tied_heads(), sharded)
        self.pieces = self.gradients.pieces()
        self.optimizer = adamw(config.optim, [(p.spec, p.tensor) for p in self.pieces])
        self.updates = 0
        """Steps of the optimizer, those of earlier runs included."""
        self.loss_scale = LossScale.start(config.model.dtype)
        self.names = self._all_names()
        first = model.mesh.replicas.is_first and model.mesh.tensor.is_first
        traces = config.parallel.trace and first
        self.trace = Writer(Path(config.run_dir), model.mesh.pipeline.rank) if traces else None
        self.cost = Cost.of(model.decoder.architecture)

    def _all_names(self) -> list[str]:
        """`Spec.parts` of the trainable parameters of the whole model, sorted by name: the canonical order."""
        mine = "\n".join(name for spec, _ in self.placed for name, _ in spec.parts()).encode()
        group = self.mesh.model
        parts = [comm.broadcast_bytes(mine, group, source).decode() for source in range(group.size)]
        return sorted({name for part in parts for name in part.split("\n") if name})

    def step(self, number: int, rows: Sequence[Row]) -> StepResult:
        """Runs step `number` (from 1) on the step's rows (the same list on every rank).

        Raises:
            NotFinite: the gradient is not finite, and no smaller loss scale could help.
        """
        batches = self._batches(rows)
        tokens, targets = self._counts(batches)
        context_balance = self._context_balance(batches)
        self.gradients.zero(len(batches))
        loss = self._backward(number, batches, self.loss_scale.scale / targets) / targets
        self.gradients.scale(1 / self.loss_scale.scale)
        norm = self.gradients.norm(self.names)
        finite = math.isfinite(norm)
        if not finite and self.loss_scale.scale == 1:
            raise NotFinite(
                f"step {number}: the gradient's norm is {norm} (loss {loss}); lower optim.lr, or use a model.dtype "
                "with more range than float16. The last checkpoint is as it was"
            )
        lr = learning_rate(self.config.optim, number)
        if finite:
            self._update(norm, lr)
        self.loss_scale = self.loss_scale.after(overflow=not finite)
        return StepResult(loss, tokens, norm, lr, not finite, context_balance)

    def evaluate(self, data: Dataset) -> float:
        """Mean loss over all target tokens of `data`, batch by batch, without dropout."""
        total, targets = 0.0, 0
        size = self.config.train.batch_size
        with torch.no_grad():
            for first in range(0, len(data), size):
                rows = [data[i] for i in range(first, min(first + size, len(data)))]
                batches = self._batches(rows)
                targets += self._counts(batches)[1]
                total += self._forward(batches)
        return total / targets

    def _batches(self, rows: Sequence[Row]) -> list[Microbatch]:
        data, count = self.mesh.data, self.config.parallel.microbatches
        assert count is not None, "microbatches of an unchecked config"
        parts = microbatches(rows, data.size, data.rank, count)
        whole = [batch for part in parts for batch in packs(part, self.config.data.packing)]
        agreement.check(whole, self.mesh)
        device = self.model.decoder.device
        return [self._share(batch).to(device) for batch in whole]

    def _share(self, batch: Microbatch) -> Microbatch:
        """What this context rank holds of a pack."""
        ring, ulysses = self.mesh.ring, self.mesh.ulysses
        if self.mesh.context.size == 1:
            return batch
        plan = ContextPlan.make(batch.cu_seqlens_B1.tolist(), self.cost, ring=ring.size, ulysses=ulysses.size)
        return share(batch, plan, ring.rank, ulysses.rank)

    def _context_balance(self, batches: Sequence[Microbatch]) -> float | None:
        """As `StepResult` says, of the data rank where it is worst."""
        plans = [batch.plan for batch in batches if batch.plan is not None]
        if self.mesh.context.size == 1:
            return None
        return float(comm.all_reduce(torch.tensor([balance(plans)], dtype=torch.float64), self.mesh.data, "max"))

    def _counts(self, batches: Sequence[Microbatch]) -> tuple[int, int]:
        """(tokens, target tokens) of the step over all ranks; one all-reduce of two integers."""
        local = [sum(batch.num_tokens for batch in batches), sum(batch.num_targets for batch in batches)]
        both = comm.all_reduce(torch.tensor(local), self.mesh.replicas).tolist()
        return both[0], max(1, both[1])

    def _backward(self, number: int, batches: Sequence[Microbatch], scale: float) -> float:
        """Accumulates the gradient of `scale` times the loss's sum; returns that sum over all ranks."""
        model, pipeline = self.model, self.mesh.pipeline
        step_prefix = None if model.prefix is None else StepPrefix.begin(model.prefix)
        weights = [[p for _, p in chunk.placed()] for chunk in model.chunks]

        def forward(chunk: int, m: int, hidden: Tensor | None) -> Tensor:
            batch = batches[m]
            dropout = DropoutKey(self.config.train.seed, number, batch.row_T, batch.positions_T)
            return model.loss(batch, chunk, hidden, step_prefix, dropout)

        schedule = self._plan(len(batches))
        with self._packs(len(batches), ahead=True):
            losses = run.run(
                schedule,
                pipeline,
                forward,
                border=model.border(batches),
                scale=scale,
                weights=weights,
                note=None if self.trace is None else self.trace.note,
            )
        if self.trace is not None:
            self.trace.step(number, schedule)
        if step_prefix is not None:
            step_prefix.end()
        self.gradients.finish()
        return self._total(losses)

    def _packs(self, passes: int, *, ahead: bool) -> AbstractContextManager[None]:
        """Keeps the weights' packs where they spare more than every second packing: they take room."""
        if passes <= 2:
            return nullcontext()
        heads = [head for (_, head), _ in self.model.tied_heads()]
        return packs_kept([*(parameter for _, parameter in self.placed), *heads], ahead=ahead)

    def _plan(self, num_microbatches: int) -> Plan:
        """The step's schedule."""
        parallel = self.config.parallel
        return schedules.make(parallel.schedule, self.mesh.pipeline.size, num_microbatches, chunks_per_rank(parallel))

    def _forward(self, batches: Sequence[Microbatch]) -> float:
        model = self.model
        step_prefix = None if model.prefix is None else StepPrefix.begin(model.prefix)
        with self._packs(len(batches), ahead=False):
            losses = run.run(
                self._plan(len(batches)).forwards,
                self.mesh.pipeline,
                lambda chunk, m, hidden: model.loss(batches[m], chunk, hidden, step_prefix, None),
                border=model.border(batches),
            )
        return self._total(losses)

    def _total(self, losses: Sequence[Tensor]) -> float:
        """The sum of the microbatches' losses over data and context, told to every stage."""
        total = torch.tensor([math.fsum(float(loss) for loss in losses)], dtype=torch.float64)
        comm.all_reduce(total, self.mesh.replicas)
        return float(comm.all_reduce(total, self.mesh.pipeline))

    def _update(self, norm: float, lr: float) -> None:
        clip = self.config.optim.clip_norm
        if clip is not None and norm > clip:
            self.gradients.scale(clip / (norm + 1e-6))
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.gradients.gather()
        self.updates += 1

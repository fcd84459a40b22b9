"""The run: steps, metrics, evaluation, checkpoints, and stopping when asked to."""

from __future__ import annotations

import resource
import signal
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from conf.schema import Config
from parallel import checkpoint, comm
from parallel.comm import Group
from parallel.model.source import Source
from train import curve, saving
from train.batches import StepOrder
from train.data import TrainingData
from train.metrics import EVAL_FILE, METRICS_FILE, Logger, MetricsFile, Progress, open_logger
from train.step import Trainer

STOPPED = 75
"""Exit code of a run that was asked to stop, saved, and can be started again (EX_TEMPFAIL)."""


class StopRequest:
    """Remembers SIGTERM and SIGUSR1; the loop asks between steps whether any rank got one."""

    def __init__(self) -> None:
        self._asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._remember)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self._asked = True

    def asked(self, world: Group) -> bool:
        """Whether any rank was asked to stop; collective (one integer, max over all ranks)."""
        flag = torch.tensor([int(self._asked)])
        return bool(comm.all_reduce(flag, world, "max").item())


class Recorder:
    """Rank 0's files, progress bar and tracker; on other ranks everything is a no-op."""

    def __init__(self, config: Config, resume: saving.Resume | None, writes: bool) -> None:
        self.run_dir, self._writes = Path(config.run_dir), writes
        self._run_id = None if resume is None else resume.run_id
        if not writes:
            return
        first = 0 if resume is None else resume.step
        checkpoint.begin(self.run_dir / "checkpoints", None if resume is None else resume.directory)
        self._metrics, self._eval = MetricsFile(self.run_dir), MetricsFile(self.run_dir, EVAL_FILE)
        for file in (self._metrics, self._eval):
            file.cut_after(first)
        self._logger: Logger = open_logger(config.logger, self.run_dir, self._run_id, asdict(config))
        self._run_id = self._logger.run_id
        self._progress = Progress(config.train.steps, start=first)

    @property
    def run_id(self) -> str | None:
        """The tracker's id of this run (rank 0)."""
        return self._run_id

    def step(self, record: Mapping[str, Any]) -> None:
        """Writes, shows and logs a step's metrics."""
        if self._writes:
            self._metrics.append(record)
            self._logger.log(record)
            self._progress.update(record["step"], record)

    def evaluation(self, step: int, loss: float) -> None:
        """Writes, shows and logs an evaluation."""
        if self._writes:
            self._eval.append({"step": step, "eval_loss": loss})
            self._logger.log({"step": step, "eval_loss": loss})
            self._progress.note(f"step {step}: evaluation loss {loss:.4f}")

    def note(self, text: str) -> None:
        """Prints a line."""
        if self._writes:
            self._progress.note(text)

    def close(self, exit_code: int) -> None:
        """Closes all of them."""
        if self._writes:
            self._progress.close()
            self._metrics.close()
            self._eval.close()
            self._logger.close(exit_code)


def train(config: Config, trainer: Trainer, source: Source, data: TrainingData, resume: saving.Resume | None) -> int:
    """Runs to `train.steps` or until asked to stop; returns the exit code (0 or 75)."""
    writes = trainer.mesh.world.is_first
    stop = StopRequest()
    recorder = Recorder(config, resume, writes)
    code = 1
    try:
        code = _steps(config, trainer, source, data, resume, stop, recorder)
    finally:
        recorder.close(code)
    if writes:
        _draw(recorder.run_dir)
    return code


def _steps(
    config: Config,
    trainer: Trainer,
    source: Source,
    data: TrainingData,
    resume: saving.Resume | None,
    stop: StopRequest,
    recorder: Recorder,
) -> int:
    order = StepOrder(len(data.train), config.train.seed, config.train.batch_size)
    step = 0 if resume is None else resume.step
    if step >= config.train.steps:
        recorder.note(f"nothing to do: step {step} is done and train.steps={config.train.steps}; raise it to go on")
    while step < config.train.steps:
        step += 1
        record = _one_step(trainer, step, data, order)
        recorder.step(record)
        last = step == config.train.steps
        stopping = not last and stop.asked(trainer.mesh.world)
        if last or stopping or _due(step, config.train.save_every):
            directory = saving.save(trainer, source, data.train.fingerprint, step, recorder.run_id)
            recorder.note(f"step {step}: saved {directory}")
        if stopping:
            recorder.note(f"step {step}: asked to stop; the same command with train.resume=auto goes on from here")
            return STOPPED
        if data.evaluate is not None and (last or _due(step, config.train.evaluate_every)):
            recorder.evaluation(step, trainer.evaluate(data.evaluate))
    return 0


def _due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _one_step(trainer: Trainer, step: int, data: TrainingData, order: StepOrder) -> dict[str, Any]:
    begin = time.perf_counter()
    result = trainer.step(step, [data.train[number] for number in order.rows(step)])
    return {
        "step": step,
        "loss": result.loss,
        "tokens": result.tokens,
        "tokens_per_second": result.tokens / (time.perf_counter() - begin),
        "grad_norm": result.grad_norm,
        "lr": result.lr,
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **({"skipped": True} if result.skipped else {}),
        **({} if result.context_balance is None else {"context_balance": result.context_balance}),
    }


def _draw(run_dir: Path) -> None:
    """The loss's picture; a run that is done doesn't fail for it."""
    try:
        curve.picture(run_dir / METRICS_FILE, run_dir / curve.PICTURE_FILE)
    except Exception as error:
        warnings.warn(f"no picture of the loss: {error}", RuntimeWarning, stacklevel=2)

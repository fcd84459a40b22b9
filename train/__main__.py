"""`python -m train k=v ...` or `torchrun --nproc-per-node=N -m train k=v ...`: trains and writes `run_dir`.

Exit codes: 0 done, 2 bad configuration or input (one message, before any process group exists), 75 stopped on
SIGTERM or SIGUSR1 after saving, anything else a failure.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from conf import load
from conf.check import check
from conf.schema import Config, ConfigError
from kernels import dispatch
from parallel import comm
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.model.source import Source, open_source
from train import saving
from train.data import TrainingData, load_training_data
from train.loop import train
from train.model import build_model
from train.step import NotFinite, Trainer


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads before it starts, all checked."""

    config: Config
    source: Source
    """The base model."""
    weights: Source
    """Where the decoder's weights come from: the base model, or the checkpoint of a full fine-tuning."""
    data: TrainingData
    resume: saving.Resume | None


def main(arguments: Sequence[str]) -> int:
    """Runs training with hydra overrides; returns the exit code."""
    launch = Launch.from_environment()
    try:
        inputs = prepare(arguments, launch)
    except ConfigError as error:
        if launch.rank == 0:
            print(error, file=sys.stderr)
        return 2
    if launch.rank == 0:
        announce(inputs)
    comm.start(launch)
    try:
        return run(inputs, launch)
    except (NotFinite, comm.PeerLost) as error:
        print(f"train: {error}", file=sys.stderr, flush=True)
        return 1
    finally:
        comm.stop()


def prepare(arguments: Sequence[str], launch: Launch) -> Inputs:
    """Reads and checks configuration, model header, data and checkpoint; touches no weight and no process group.

    Raises:
        ConfigError: anything of it is wrong.
    """
    config = load.load(arguments, "train")
    source = open_source(config.model)
    config = check(config, "train", launch.world_size, source.architecture)
    resume = saving.find_resume(config)
    saving.check_base(resume, source, config)
    data = load_training_data(config.data, source.tokenizer())
    saving.check_data(resume, data.train.fingerprint, config)
    weights = source
    if resume is not None and config.tune.kind == "full":
        weights = open_source(replace(config.model, path=str(resume.directory), architecture=None))
    return Inputs(config, source, weights, data, resume)


def announce(inputs: Inputs) -> None:
    """Prints what is about to run and writes `run_dir/config.yaml` (rank 0)."""
    print(load.short(inputs.config))
    for report in inputs.data.reports:
        print(report.text)
    if inputs.resume is not None:
        print(f"going on after step {inputs.resume.step} from {inputs.resume.directory}")
    run_dir = Path(inputs.config.run_dir)
    run_dir.mkdir(parents=True, exist_ok=True)
    load.save(inputs.config, run_dir / "config.yaml")


def run(inputs: Inputs, launch: Launch) -> int:
    """Builds mesh, model and optimizer, and trains; returns the exit code."""
    config = inputs.config
    data, pipeline, context, tensor = config.parallel.sizes
    mesh = Mesh.build(launch, data=data, pipeline=pipeline, context=context, tensor=tensor)
    device = comm.device(launch)
    ops = dispatch.select(device, getattr(torch, config.model.dtype))
    if launch.rank == 0:
        print(f"kernels: {ops.name}", flush=True)
    model = build_model(config, inputs.weights, mesh, ops, saving.adapter_reader(config, inputs.resume), device)
    trainer = Trainer(config, model)
    if inputs.resume is not None:
        saving.restore(trainer, inputs.resume)
    return train(config, trainer, inputs.source, inputs.data, inputs.resume)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

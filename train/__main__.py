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
from kernels.memory import keep_freed_memory
from parallel import backend, comm
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
        if launch.rank == 0:
            announce(inputs)
        comm.start(launch)
    except ConfigError as error:
        comm.tell(launch, error)
        return 2
    try:
        return run(inputs, launch)
    except ConfigError as error:
        print(error, file=sys.stderr, flush=True)
        return 2
    except NotFinite as error:
        if launch.rank == 0:
            print(f"train: {error}", file=sys.stderr, flush=True)
        return 1
    except comm.PeerLost as error:
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
    backend.check_instruction_set()
    resume = saving.find_resume(config)
    saving.check_base(resume, source, config)
    saving.check_saving(config, source)
    data = load_training_data(config.data, source.tokenizer())
    check_ids(data, source)
    saving.check_data(resume, data.train.fingerprint, config)
    weights = source
    if resume is not None and config.tune.kind == "full":
        weights = open_source(replace(config.model, path=str(resume.directory), architecture=None))
    return Inputs(config, source, weights, data, resume)


def check_ids(data: TrainingData, source: Source) -> None:
    """Raises ConfigError when the tokenizer makes ids that the model has no embedding for."""
    highest = max(int(rows.ids.max()) for rows in (data.train, data.evaluate) if rows is not None)
    vocab = source.architecture.vocab_size
    if highest >= vocab:
        raise ConfigError(
            f"the tokenizer gives token {highest}, but the model's vocab_size={vocab}; "
            "use the tokenizer that belongs to the model"
        )


def announce(inputs: Inputs) -> None:
    """Prints what is about to run and writes `run_dir/config.yaml` (rank 0).

    Raises:
        ConfigError: nothing can be written there.
    """
    print(load.short(inputs.config))
    for report in inputs.data.reports:
        print(report.text)
    if inputs.resume is not None:
        print(f"going on after step {inputs.resume.step} from {inputs.resume.directory}")
    run_dir = Path(inputs.config.run_dir)
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        load.save(inputs.config, run_dir / "config.yaml")
    except OSError as error:
        raise ConfigError(f"run_dir={run_dir} can't be written ({error.strerror}); choose another") from None


def run(inputs: Inputs, launch: Launch) -> int:
    """Builds mesh, model and optimizer, and trains; returns the exit code."""
    config = inputs.config
    data, pipeline, context, tensor = config.parallel.sizes
    ulysses = config.parallel.ulysses_size
    mesh = Mesh.build(launch, data=data, pipeline=pipeline, context=context, tensor=tensor, ulysses=ulysses)
    device = comm.device(launch)
    facts = {
        "the configuration": load.to_yaml(config),
        "the checkpoint": f"{inputs.resume and inputs.resume.step}",
        "the rows of data.path": inputs.data.train.fingerprint,
        "the weights of model.path": inputs.weights.fingerprint,
    }
    differing = comm.disagreements(facts, mesh.world)
    if differing:
        raise ConfigError(
            f"[{mesh.label}] ranks disagree on {' and '.join(differing)}; "
            "give every host the same files (run_dir on a shared file system)"
        )
    ops = dispatch.select(device, getattr(torch, config.model.dtype))
    if launch.rank == 0:
        print(f"kernels: {ops.name}", flush=True)
    model = build_model(config, inputs.weights, mesh, ops, saving.adapter_reader(config, inputs.resume), device)
    trainer = Trainer(config, model)
    if inputs.resume is not None:
        saving.restore(trainer, inputs.resume)
    if pipeline > 1:  # activations of several microbatches come and go together
        keep_freed_memory()
    return train(config, trainer, inputs.source, inputs.data, inputs.resume)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

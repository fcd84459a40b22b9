"""What a run's checkpoint holds, and how a run goes on from one under any layout.

checkpoints/step-20/
  adapter_config.json, adapter_model.safetensors     an adapter: PEFT's directory, or
  config.json, model.safetensors, tokenizer files    full fine-tuning: a Hugging Face model directory
  train_state/
    state.json                                       step, tracker's run id, optimizer steps, loss scale
    config.yaml                                      the run's configuration
    optimizer.safetensors                            AdamW's moments by full parameter name
    checksums.json                                   of every tensor in the files
    parameters.safetensors                           a reparameterised prefix's MLP (only then)
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from conf import load
from conf.check import difference
from conf.schema import Config, ConfigError
from parallel import checkpoint
from parallel.adapters import peft
from parallel.checkpoint import Block, TensorFile, renamed
from parallel.model.hf import places, write_config
from parallel.model.safetensors_io import read_header
from parallel.model.source import Source
from parallel.tensor import master_dtype
from train.model import Model, Read
from train.optim import LossScale
from train.step import Trainer

STATE = "train_state/state.json"
CONFIG = "train_state/config.yaml"
OPTIMIZER = "train_state/optimizer.safetensors"
PARAMETERS = "train_state/parameters.safetensors"
MODEL = "model.safetensors"
MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Resume:
    """A checkpoint to go on from."""

    directory: Path
    step: int
    optimizer_steps: int
    run_id: str | None
    loss_scale: float
    calm: int
    base: str
    """Fingerprint of the base model's weights (adapters)."""
    data: str
    """Fingerprint of the tokenised training rows."""


def find_resume(config: Config) -> Resume | None:
    """The checkpoint that `train.resume` means, checked against this run's configuration; None to start afresh.

    Raises:
        ConfigError: no checkpoint where one was named, a damaged one, or options that may not change.
    """
    if config.train.resume == "never":
        return None
    directory = Path(config.run_dir) / "checkpoints" / "latest"
    if config.train.resume != "auto":
        directory = Path(config.train.resume)
    elif not directory.is_symlink() and not directory.exists():
        return None
    elif not directory.exists():
        raise ConfigError(
            f"{directory} points to {directory.readlink()}, which is missing: a crash while that step was saved again "
            f"left it as .{directory.readlink()}.old.partial; rename it back, or use train.resume=never"
        )
    elif not directory.is_symlink():
        raise ConfigError(f"{directory} is no link to a checkpoint; rename it to step-N and link latest to it")
    try:
        state = json.loads((directory / STATE).read_text())
        saved = load.read_saved(directory / CONFIG)
        found = Resume(
            directory.resolve(),
            state["step"],
            state["optimizer_steps"],
            state["run_id"],
            state["loss_scale"],
            state["calm"],
            state["base"],
            state["data"],
        )
    except FileNotFoundError as error:
        raise ConfigError(
            f"train.resume={config.train.resume}: {directory} is no checkpoint of a run ({error.filename} is missing)"
        ) from None
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"train.resume={config.train.resume}: {directory / STATE} is damaged ({error})") from None
    changed = difference(saved, config)
    if changed:
        lines = "\n".join(f"  {line}" for line in changed)
        raise ConfigError(
            f"train.resume={config.train.resume}: {directory} was written with other options:\n{lines}\n"
            "only parallel.*, optim (adamw, zero1), train.steps, train.save_every, train.keep_checkpoints and logger.* "
            "may change; set the others back, use another run_dir, or train.resume=never"
        )
    for name in _tensor_files(config):
        if not (found.directory / name).is_file():
            raise ConfigError(f"train.resume={config.train.resume}: {found.directory / name} is missing")
        read_header(found.directory / name)
    return found


def _tensor_files(config: Config) -> list[str]:
    """The files with tensors that a checkpoint of this configuration holds."""
    if config.tune.kind == "full":
        return [MODEL, OPTIMIZER]
    projected = config.tune.kind == "prefix" and config.tune.prefix_projection
    return [peft.WEIGHTS, OPTIMIZER, *([PARAMETERS] if projected else [])]


def check_saving(config: Config, source: Source) -> None:
    """Raises ConfigError when the checkpoints of a full fine-tuning couldn't be written as a Hugging Face model."""
    if config.tune.kind == "full":
        write_config(source.architecture, source.hf_config, config.model.dtype)


def check_base(resume: Resume | None, source: Source, config: Config) -> None:
    """Raises ConfigError when the checkpoint's adapter was trained on other weights than `source`."""
    if resume is not None and config.tune.kind != "full" and resume.base != source.fingerprint:
        raise ConfigError(
            f"{resume.directory} was trained on other weights than model.path={config.model.path} now holds; "
            "give the base model it was trained on, or use another run_dir"
        )


def check_data(resume: Resume | None, fingerprint: str, config: Config) -> None:
    """Raises ConfigError when the training rows aren't those of the checkpoint: its position in them means nothing."""
    if resume is not None and resume.data != fingerprint:
        raise ConfigError(
            f"data.path={config.data.path} holds other rows than when {resume.directory} was written; "
            "give the same file, use another run_dir, or train.resume=never"
        )


def adapter_reader(config: Config, resume: Resume | None) -> Read | None:
    """Blocks of the saved adapter's trainable parameters, None for a new adapter or full fine-tuning."""
    if resume is None or config.tune.kind == "full":
        return None
    projected = config.tune.kind == "prefix" and config.tune.prefix_projection
    path = resume.directory / (PARAMETERS if projected else peft.WEIGHTS)
    return checkpoint.reader(path)


def restore(trainer: Trainer, resume: Resume) -> None:
    """Puts the optimizer's moments and the loss scale of the checkpoint into the trainer."""
    dtype = master_dtype(trainer.model.decoder.dtype)
    readers = {name: checkpoint.reader(resume.directory / OPTIMIZER, f"{name}.") for name in MOMENTS}
    for piece in trainer.pieces:
        device = piece.tensor.device
        trainer.optimizer.state[piece.tensor] = {
            "step": torch.tensor(float(resume.optimizer_steps), device=device),
            **{name: read(piece.spec, dtype, piece.stretch).to(device) for name, read in readers.items()},
        }
    trainer.updates = resume.optimizer_steps
    trainer.loss_scale = LossScale(trainer.loss_scale.dynamic, resume.loss_scale, resume.calm)


def save(trainer: Trainer, source: Source, data: str, step: int, run_id: str | None) -> Path:
    """Writes `run_dir/checkpoints/step-<step>`; collective. Returns the directory. data: the rows' fingerprint."""
    config = trainer.config
    directory = Path(config.run_dir) / "checkpoints" / f"step-{step}"
    with torch.no_grad():
        files = [*_public_files(trainer.model, source), _optimizer_file(trainer)]
    state = {
        "step": step,
        "optimizer_steps": trainer.updates,
        "run_id": run_id,
        "loss_scale": trainer.loss_scale.scale,
        "calm": trainer.loss_scale.calm,
        "base": source.fingerprint,
        "data": data,
    }
    texts = {STATE: json.dumps(state, indent=2) + "\n", CONFIG: load.to_yaml(config)}
    if trainer.mesh.world.rank == 0:
        texts |= _public_texts(config, trainer.model, source)
    checkpoint.save(directory, files, texts, trainer.mesh)
    if trainer.mesh.world.rank == 0 and config.train.keep_checkpoints is not None:
        checkpoint.keep_newest(directory.parent, config.train.keep_checkpoints)
    return directory


def _public_files(model: Model, source: Source) -> list[TensorFile]:
    metadata = {"format": "pt"}
    if model.adapter is None:
        found = places(source.architecture, source.hf_config)
        return [TensorFile(MODEL, [Block(found[spec.name].spec(spec), p) for spec, p in model.placed()], metadata)]
    metadata[peft.BASE] = source.fingerprint
    if model.prefix is None:
        return [TensorFile(peft.WEIGHTS, [Block(spec, p) for spec, p in model.trainable()], metadata)]
    tokens, *body = model.prefix.file_specs[0].shape
    flat = (tokens, body[0] * body[1] * body[2] * body[3])
    blocks = [Block(spec, kv, flat) for spec, kv in zip(model.prefix.file_specs, model.prefix(), strict=True)]
    files = [TensorFile(peft.WEIGHTS, blocks, metadata)]
    if model.prefix.hidden is not None:
        files.append(TensorFile(PARAMETERS, [Block(spec, p) for spec, p in model.trainable()], {}))
    return files


def _optimizer_file(trainer: Trainer) -> TensorFile:
    blocks: list[Block] = []
    for piece in trainer.pieces:
        state = trainer.optimizer.state.get(piece.tensor, {})
        for name in MOMENTS:
            moment: Tensor = state[name] if name in state else torch.zeros_like(piece.tensor)
            spec = renamed(piece.spec, f"{name}.{piece.spec.name}")
            blocks.append(Block(spec, moment, stretch=piece.stretch))
    return TensorFile(OPTIMIZER, blocks, {})


def _public_texts(config: Config, model: Model, source: Source) -> Mapping[str, str]:
    """The text files that make the directory a valid adapter or model."""
    if model.adapter is not None:
        base = config.model.path or config.model.name
        text = peft.write_config(model.adapter, config.tune, source.architecture, base)
        return {peft.CONFIG: text}
    stored = str(master_dtype(model.decoder.dtype)).removeprefix("torch.")
    hf: Mapping[str, Any] = write_config(source.architecture, source.hf_config, stored)
    texts = {"config.json": json.dumps(hf, indent=2) + "\n"}
    with tempfile.TemporaryDirectory() as folder:
        source.tokenizer().save(Path(folder))
        texts |= {path.name: path.read_text(encoding="utf-8") for path in Path(folder).iterdir()}
    return texts

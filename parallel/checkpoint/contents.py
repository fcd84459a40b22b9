"""What is in a checkpoint, as text: kind, position, tensors by group, and how much of it a rank of a layout holds."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from conf import load
from conf.layout import balanced_stages
from conf.schema import Architecture, Config, ConfigError, ModelConf
from kernels import dispatch
from parallel.adapters import lora, peft
from parallel.adapters.prefix import Prefix
from parallel.comm import Group
from parallel.mesh import Mesh
from parallel.model.decoder import placed
from parallel.model.load import build_decoder
from parallel.model.safetensors_io import read_header
from parallel.model.source import open_source
from parallel.sharding import Index, Spec

STATE = "train_state/state.json"
CONFIG = "train_state/config.yaml"
_META = torch.device("meta")
_DEGREES = (1, 2, 4, 8, 16)
_MOMENTS = 2 * 4
_TRAINED = 4 + 4 + _MOMENTS
"""Bytes of a trained parameter: float32 weight, gradient, AdamW's moments."""


def describe(directory: Path) -> str:
    """The text of `python -m parallel.checkpoint inspect`; reads headers, no weights.

    Raises:
        ConfigError: no checkpoint, a damaged file.
    """
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("train_state/*.safetensors")])
    if not files:
        raise ConfigError(f"{directory} holds no .safetensors file; give a checkpoint, as <run_dir>/checkpoints/latest")
    config = load.read_saved(directory / CONFIG) if (directory / CONFIG).is_file() else None
    lines = [*_about(directory, config), ""]
    for path in files:
        lines += [*_groups(path, str(path.relative_to(directory))), ""]
    return "\n".join([*lines, *_layouts(directory, config)])


def _about(directory: Path, config: Config | None) -> Iterator[str]:
    yield f"{directory.resolve()}"
    adapter = _json(directory / peft.CONFIG)
    model = _json(directory / "config.json")
    if adapter is not None:
        yield f"  kind       adapter, {adapter.get('peft_type')} on {adapter.get('base_model_name_or_path')}"
    elif model is not None:
        yield f"  kind       model, {model.get('model_type')}"
    state = _json(directory / STATE)
    if state is None or config is None:
        yield "  no train_state: nothing to resume"
        return
    rows = state["step"] * config.train.batch_size
    yield f"  step       {state['step']} of {config.train.steps}"
    yield f"  data       {rows} rows done, {config.train.batch_size} a step; rows {state['data']}"
    yield f"  base       {state['base']} ({config.model.path or config.model.name})"
    scale = "" if state["loss_scale"] == 1 else f", loss scale {state['loss_scale']:g}"
    yield f"  optimizer  {config.optim.kind}, {state['optimizer_steps']} updates, lr {config.optim.lr:g}{scale}"
    axes = ("data", "pipeline", "context", "tensor")
    sizes = " ".join(f"{axis}={size}" for axis, size in zip(axes, config.parallel.sizes, strict=True))
    yield f"  saved by   {sizes}; any other layout goes on from it"


def _json(path: Path) -> dict[str, Any] | None:
    """The object in a JSON file, None where there is no such file."""
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error})") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: it holds no object")
    return found


def _groups(path: Path, name: str) -> Iterator[str]:
    """The tensors of one file: those that differ in the layer's number alone on one line."""
    entries = read_header(path).entries
    groups: dict[tuple[str, str, tuple[int, ...]], tuple[int, int]] = {}
    for tensor, entry in entries.items():
        key = (re.sub(r"\.\d+\.", ".*.", tensor), str(entry.dtype).removeprefix("torch."), entry.shape)
        count, size = groups.get(key, (0, 0))
        groups[key] = (count + 1, size + entry.end - entry.start)
    yield f"{name}: {len(entries)} tensors, {_size(path.stat().st_size)}"
    for (pattern, dtype, shape), (count, size) in groups.items():
        yield f"  {count:>4} x {dtype} {list(shape)!s:<16} {_size(size):>9}  {pattern}"


@dataclass(frozen=True)
class _Held:
    """Elements on the rank of a layout that holds most."""

    frozen: int
    trained: int


def _layouts(directory: Path, config: Config | None) -> Iterator[str]:
    """What weights, gradients and moments take on the fullest rank, under each layout."""
    config = config or Config(model=ModelConf(path=str(directory)))
    model = config.model
    if (directory / "config.json").is_file():
        model = replace(model, path=str(directory), architecture=None)
    try:
        architecture = open_source(model).architecture
    except ConfigError as error:
        yield f"no memory by layout: the base model isn't here ({error})"
        return
    dtype: torch.dtype = getattr(torch, config.model.dtype)
    yield f"memory of the fullest rank, weights computed in {config.model.dtype}; activations and KV cache come on top"
    yield "  tensor  pipeline    serving   training   its moments (zero1 divides them by data x context)"
    for tensor in (size for size in _DEGREES if size <= architecture.num_heads):
        for pipeline in (size for size in _DEGREES if size <= architecture.num_layers):
            held = _fullest(config, architecture, tensor, pipeline)
            serving = (held.frozen + held.trained) * dtype.itemsize
            training = held.frozen * dtype.itemsize + held.trained * _TRAINED
            columns = f"{_size(serving):>9}  {_size(training):>9}     {_size(held.trained * _MOMENTS):>9}"
            yield f"  {tensor:>6}  {pipeline:>8}  {columns}"


def _fullest(config: Config, architecture: Architecture, tensor: int, pipeline: int) -> _Held:
    stages = balanced_stages(architecture, pipeline)
    ranks = [
        _held(config, architecture, stages, (t, tensor), (p, pipeline)) for t in range(tensor) for p in range(pipeline)
    ]
    return max(ranks, key=lambda held: held.frozen + held.trained * _TRAINED)


class _Shapes:
    """Weights without values."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture

    def read(self, name: str, index: Index, dtype: torch.dtype) -> torch.Tensor:
        """A block's shape."""
        return torch.empty([part.stop - part.start for part in index], dtype=dtype, device=_META)


def _held(
    config: Config,
    architecture: Architecture,
    stages: tuple[int, ...],
    tensor: tuple[int, int],
    pipeline: tuple[int, int],
) -> _Held:
    """What the rank at these places, (rank, size) each, holds."""
    mesh = Mesh(tensor=_apart("tensor", *tensor), pipeline=_apart("pipeline", *pipeline))
    ops = dispatch.select(torch.device("cpu"), torch.float64)
    full = config.tune.kind == "full"
    decoder = build_decoder(
        _Shapes(architecture), mesh, stages, dtype=torch.float32, ops=ops, trainable=full, device=_META
    )
    parameters = [parameter for _, parameter in decoder.placed()]
    trained = sum(parameter.numel() for parameter in parameters)
    if full:
        return _Held(0, trained)
    adapter = peft.from_tune(config.tune, architecture)

    def read(spec: Spec, dtype: torch.dtype) -> torch.Tensor:
        return torch.empty(spec.local_shape, dtype=dtype, device=_META)

    frozen = trained
    if adapter.kind == "lora":
        lora.install(decoder, adapter, 0, read, trainable=True)
        return _Held(frozen, sum(parameter.numel() for _, parameter in decoder.placed()) - frozen)
    prefix = Prefix(adapter, [decoder], read, trainable=True)
    return _Held(frozen, sum(parameter.numel() for _, parameter in placed(prefix)))


def _apart(axis: str, rank: int, size: int) -> Group:
    """A rank's view of a group nobody talks in."""
    return Group(axis, rank, tuple(range(size)))


def _size(num_bytes: int) -> str:
    for unit, factor in (("GB", 10**9), ("MB", 10**6), ("KB", 10**3)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:.1f} {unit}"
    return f"{num_bytes} B"

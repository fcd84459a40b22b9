"""Where a model comes from: one interface over directories, GGUF files, the hub and random weights."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from conf.schema import Architecture, ConfigError, ModelConf
from parallel.model.directory import DirectorySource
from parallel.model.gguf import GgufSource
from parallel.model.random_source import RandomSource
from parallel.model.tokenizer import Tokenizer

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Source(Protocol):
    """Read-only weights, by Hugging Face name and block, with what belongs to them."""

    @property
    def architecture(self) -> Architecture:
        """Shape of the model."""
        ...

    @property
    def fingerprint(self) -> str:
        """Cheap identity of the weights: names, shapes, dtypes and sampled bytes (reads 3 KB a tensor)."""
        ...

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The config.json to write beside a saved model (`hf.write_config` takes it as its base)."""
        ...

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all parameters, in canonical order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of the parameter `name`, e.g. "model.layers.0.self_attn.q_proj.weight"."""
        ...

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The block `full[index]` (one slice of step 1 per dimension) as a new contiguous `dtype` tensor.

        Only the block's bytes are read, and beyond the result at most 16 MB are held.
        """
        ...

    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer and chat template."""
        ...


def open_source(model: ModelConf) -> Source:
    """Open the model that `model.path` names: a Hugging Face directory, a .gguf file, `package:<package>/<file>` (a
    file inside an installed Python package, which is not imported), or a hub id; without a path, random weights.

    Headers are read and checked, weights aren't.

    Raises:
        ConfigError: nothing there, not a supported model, or a corrupt or truncated file.
    """
    if not model.path:
        if model.architecture is None:
            raise ConfigError("model.path is empty; set it, or choose a random model such as model=tiny")
        return RandomSource(model.architecture, model.seed)
    path = locate(model.path)
    try:
        if path.is_dir():
            return DirectorySource(path)
        if path.suffix == ".gguf":
            return GgufSource(path)
    except ConfigError as error:
        raise ConfigError(f"model.path={model.path}: {error}") from None
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise ConfigError(
            f"model.path={model.path} is a pickle, which can run any code when opened and is refused; "
            "convert it to safetensors where you trust it and give the directory"
        )
    raise ConfigError(f"model.path={model.path} is neither a model directory nor a .gguf file; give the directory")


def locate(path: str) -> Path:
    """The local file or directory that `model.path` means; a hub id is downloaded into the Hugging Face cache.

    Raises:
        ConfigError: it doesn't exist, or the hub can't be reached.
    """
    if path.startswith("package:"):
        return _package_file(path)
    local = Path(path).expanduser()
    if local.exists():
        return local
    if _HUB_ID.fullmatch(path) and local.suffix != ".gguf":
        return _download(path)
    raise ConfigError(
        f"model.path={path} does not exist; give a model directory, a .gguf file or a hub id (owner/name)"
    )


def _package_file(path: str) -> Path:
    package, _, file = path.removeprefix("package:").partition("/")
    if not package.isidentifier() or not file:
        raise ConfigError(f"model.path={path} must be package:<package>/<file>")
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(f"model.path={path}: the Python package {package} is not installed; run make install")
    for folder in spec.submodule_search_locations:
        if (Path(folder) / file).is_file():
            return Path(folder) / file
    raise ConfigError(f"model.path={path}: the installed package {package} has no file {file}")


def _download(repository: str) -> Path:
    """A snapshot of a hub repository, from the local cache when it is complete there."""
    from huggingface_hub import snapshot_download

    patterns = ["*.json", "*.safetensors", "*.jinja"]
    try:
        return Path(snapshot_download(repository, allow_patterns=patterns))
    except Exception as error:  # many kinds: offline, proxy, no such repository, gated, disk
        raise ConfigError(
            f"model.path={repository} is no local path, and downloading it from the Hugging Face hub failed "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}); "
            "check the name and the network, or give a local directory"
        ) from None

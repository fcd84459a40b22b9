"""A model in a Hugging Face directory: config.json, safetensors (one file, or several with an index), tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from conf.schema import ConfigError
from parallel.model.hf import (
    check_layers,
    check_parameters,
    parameter_shapes,
    places,
    read_architecture,
    read_config_file,
)
from parallel.model.ranges import fingerprint
from parallel.model.safetensors_io import Entry, Header, read_block, read_header
from parallel.model.tokenizer import Tokenizer
from parallel.model.tokenizer_files import directory_tokenizer

_INDEX, _SINGLE = "model.safetensors.index.json", "model.safetensors"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class SafetensorsFiles:
    """All tensors of a directory's safetensors files, by name."""

    def __init__(self, directory: Path) -> None:
        """Read and check the headers of all files.

        Raises:
            ConfigError: no safetensors, a file named by the index that is missing, truncated or corrupt, or pickle
                files only.
        """
        # a training run may move the link `directory` to newer weights while we read
        root = directory.resolve()
        names = self._weight_map(root)
        headers = {file: read_header(root / file) for file in sorted(set(names.values()))}
        for name, file in names.items():
            if name not in headers[file].entries:
                raise ConfigError(f"{root / _INDEX} says {name} is in {file}, which doesn't hold it")
        self._places: Mapping[str, tuple[Path, Entry]] = MappingProxyType(
            {name: (root / file, headers[file].entries[name]) for name, file in names.items()}
        )

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of every tensor."""
        return {name: entry.shape for name, (_, entry) in self._places.items()}

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The block `full[index]` of tensor `name` as a new contiguous `dtype` tensor; reads only its bytes."""
        path, entry = self._places[name]
        return read_block(path, entry, index, dtype)

    @property
    def fingerprint(self) -> str:
        """Identity of the tensors: names, dtypes, shapes and sampled bytes; independent of how files are split."""
        return fingerprint(
            (name, str(entry.dtype), entry.shape, path, entry.start, entry.end)
            for name, (path, entry) in sorted(self._places.items())
        )

    @staticmethod
    def _weight_map(root: Path) -> dict[str, str]:
        """Tensor name -> file name."""
        if (root / _INDEX).is_file():
            names = read_config_file(root / _INDEX).get("weight_map")
            if not isinstance(names, dict) or not all(isinstance(file, str) for file in names.values()):
                raise ConfigError(f"{root / _INDEX} has no weight_map of tensor names to file names")
            for file in set(names.values()):
                if Path(file).name != file or not (root / file).is_file():
                    raise ConfigError(f"{root / _INDEX} names {file}, which is missing; copy or download it again")
            return names
        if (root / _SINGLE).is_file():
            header: Header = read_header(root / _SINGLE)
            return dict.fromkeys(header.entries, _SINGLE)
        pickles = sorted(path.name for pattern in _PICKLES for path in root.glob(pattern))
        if pickles:
            raise ConfigError(
                f"{root} has its weights as pickle ({pickles[0]}), which can run any code when opened and is refused; "
                "convert it where you trust it: load it with transformers and call save_pretrained(), which writes "
                "safetensors"
            )
        raise ConfigError(f"{root} holds neither {_SINGLE} nor {_INDEX}; a model directory needs one of them")


class DirectorySource:
    """Weights, architecture and tokenizer of a Hugging Face directory; a `Source`."""

    def __init__(self, directory: Path) -> None:
        """Read config.json and the headers of the weight files.

        Raises:
            ConfigError: a file is missing, corrupt or truncated, or the model isn't supported.
        """
        self._directory = directory.resolve()
        if (self._directory / "adapter_config.json").is_file() and not (self._directory / "config.json").is_file():
            raise ConfigError(f"{directory} is an adapter; give its base model, and serve it as adapters.<name>=<dir>")
        self.hf_config: Mapping[str, Any] = MappingProxyType(read_config_file(self._directory / "config.json"))
        try:
            self.architecture = read_architecture(self.hf_config)
        except ConfigError as error:
            raise ConfigError(f"{directory}: {error}") from None
        self._files = SafetensorsFiles(self._directory)
        found = self._files.shapes()
        check_layers(self.architecture, found, str(directory))
        self._places = places(self.architecture, self.hf_config)
        check_parameters(self.architecture, found, str(directory), self._places)
        self._shapes = parameter_shapes(self.architecture)

    @property
    def fingerprint(self) -> str:
        """Identity of the weights: names, dtypes, shapes and sampled bytes."""
        return self._files.fingerprint

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all parameters, in canonical order."""
        return tuple(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of the parameter `name`."""
        return self._shapes[name]

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The block `full[index]` of parameter `name` as a new contiguous `dtype` tensor; reads only its bytes."""
        place = self._places[name]
        return self._files.read(place.name, place.index(index), dtype)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template in the directory."""
        return directory_tokenizer(self._directory)

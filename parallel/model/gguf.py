"""A model in a GGUF file: llama.cpp's names, metadata and row order turned into Hugging Face's.

Architectures: `llama` (Llama 2 and 3, SmolLM2, Mistral, ...) and `qwen2`. llama.cpp rotates neighbouring pairs where
we rotate halves, so its converter reorders the rows of q and k in `llama` files; within a head of width H

    row of the file    0  1    2  3      4  5    ...  H-2  H-1
    row of ours        0  H/2  1  H/2+1  2  H/2+2     H/2-1  H-1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema import Architecture, ConfigError
from parallel.model.gguf_file import GgufArray, GgufFile, read_gguf, read_rows
from parallel.model.gguf_rope import read_gguf_rope
from parallel.model.hf import check_parameters, parameter_shapes, write_config
from parallel.model.ranges import block_ranges, fingerprint
from parallel.model.tokenizer import Tokenizer
from parallel.model.tokenizer_gguf import gguf_tokenizer

_PERMUTED = ("llama",)
_ARCHITECTURES = ("llama", "qwen2")

# our name -> theirs
_TOP: Mapping[str, str] = MappingProxyType(
    {
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    }
)
_LAYER: Mapping[str, str] = MappingProxyType(
    {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
)
_NOT_WEIGHTS = re.compile(r"rope_freqs\.weight|rope_factors_.*|blk\.\d+\.attn_rot_embd.*")


class GgufSource:
    """Weights, architecture and tokenizer of one GGUF file; a `Source`."""

    def __init__(self, path: Path) -> None:
        """Read and check the header of `path`.

        Raises:
            ConfigError: corrupt or truncated file, or a model that isn't supported.
        """
        self._file = read_gguf(path.resolve())
        self.architecture = read_gguf_architecture(self._file)
        ours = {_our_name(name): tensor.shape for name, tensor in self._file.tensors.items()}
        ours.pop("", None)
        check_parameters(self.architecture, ours, str(path))
        self._names = tuple(parameter_shapes(self.architecture))
        self._permuted = self._file.fields["general.architecture"] in _PERMUTED

    @property
    def fingerprint(self) -> str:
        """Identity of the weights: names, types, shapes and sampled bytes."""
        return fingerprint(
            (name, tensor.kind.name, tensor.shape, self._file.path, tensor.start, tensor.end)
            for name, tensor in sorted(self._file.tensors.items())
        )

    @property
    def hf_config(self) -> Mapping[str, Any]:
        """The config.json to write beside a saved model."""
        fields = self._file.fields
        ids = {
            f"{kind}_token_id": fields[key]
            for kind in ("bos", "eos")
            if (key := f"tokenizer.ggml.{kind}_token_id") in fields
        }
        return {**write_config(self.architecture, None, "bfloat16"), **ids}

    def names(self) -> tuple[str, ...]:
        """Hugging Face names of all parameters, in canonical order."""
        return self._names

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of the parameter `name`."""
        return self._file.tensors[_their_name(name)].shape

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The block `full[index]` of parameter `name`, dequantised, as a new contiguous `dtype` tensor.

        Raises:
            ConfigError: the file has become shorter.
        """
        tensor = self._file.tensors[_their_name(name)]
        ranges = block_ranges(tensor.shape, index)
        rows: Any = range(*ranges[0])
        if self._permuted and (".q_proj." in name or ".k_proj." in name):
            rows = _file_rows(ranges[0], self.architecture.head_dim)
        columns = ranges[1] if len(ranges) > 1 else (0, 1)
        block = read_rows(self._file.path, tensor, rows, columns, dtype)
        return block.view([stop - start for start, stop in ranges])

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template in the metadata."""
        return gguf_tokenizer(self._file)


def read_gguf_architecture(file: GgufFile) -> Architecture:
    """The architecture in the metadata of `file`.

    Raises:
        ConfigError: an architecture or feature that isn't supported, or metadata that is missing.
    """
    fields, path = file.fields, file.path
    kind = fields.get("general.architecture")
    if kind not in _ARCHITECTURES:
        raise ConfigError(
            f"{path}: general.architecture={kind!r} is not supported; supported are {', '.join(_ARCHITECTURES)}"
        )
    if fields.get("split.count", 1) != 1:
        raise ConfigError(f"{path} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge")
    if fields.get(f"{kind}.expert_count"):
        raise ConfigError(f"{path}: {kind}.expert_count={fields[f'{kind}.expert_count']}; mixtures are not supported")
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{path}: token_embd.weight is missing")
    heads, width = _count(file, "attention.head_count"), _count(file, "embedding_length")
    head_dim = _count(file, "attention.key_length", width // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if _count(file, key, head_dim) != head_dim:
            raise ConfigError(f"{path}: {kind}.{key} must equal the head width {head_dim}")
    max_positions = _count(file, "context_length")
    theta, scaling = read_gguf_rope(file, head_dim, max_positions)
    # qwen2 files name a window that their models don't use
    has_window = kind == "llama" and bool(fields.get("llama.attention.sliding_window"))
    return Architecture(
        num_layers=_count(file, "block_count"),
        width=width,
        num_heads=heads,
        num_kv_heads=_count(file, "attention.head_count_kv", heads),
        head_dim=head_dim,
        ffn_width=_count(file, "feed_forward_length"),
        vocab_size=file.tensors["token_embd.weight"].shape[0],
        max_positions=max_positions,
        norm_eps=file.number(f"{kind}.attention.layer_norm_rms_epsilon", 1e-5),
        rope_theta=theta,
        rope_scaling=scaling,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
        sliding_window=_count(file, "attention.sliding_window") if has_window else None,
    )


def _file_rows(rows: tuple[int, int], head_dim: int) -> np.ndarray:
    """The file's row numbers of our rows [start, stop) of q or k."""
    head, within = np.divmod(np.arange(*rows), head_dim)
    second_half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + second_half


def _their_name(name: str) -> str:
    if name in _TOP:
        return _TOP[name]
    layer, _, rest = name.removeprefix("model.layers.").partition(".")
    module, _, kind = rest.rpartition(".")
    return f"blk.{layer}.{_LAYER[module]}.{kind}"


def _our_name(name: str) -> str:
    """Our name of their tensor; unknown ones keep theirs, rotary factors become empty."""
    if _NOT_WEIGHTS.fullmatch(name):
        return ""
    for ours, theirs in _TOP.items():
        if name == theirs:
            return ours
    match = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    for ours, theirs in _LAYER.items():
        if match and match[2] == theirs:
            return f"model.layers.{match[1]}.{ours}.{match[3]}"
    return name


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    full = f"{file.fields['general.architecture']}.{key}"
    value = file.fields.get(full, default)
    if isinstance(value, GgufArray):
        values = set(file.array(full) or ())
        value = values.pop() if len(values) == 1 else sorted(values)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{file.path}: {full}={value!r} must be a positive integer, the same for all layers")
    return value

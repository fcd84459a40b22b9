"""A model in a GGUF file: llama.cpp's names, metadata and row order turned into Hugging Face's.

Architectures: `llama` (Llama 2 and 3, SmolLM2, Mistral, ...), `qwen2`, `qwen3`, `gemma2` and `gemma3` (whose files
hold the weights of norms with their 1 added), `glm4`, `chatglm` (ChatGLM 2 and 3, GLM-4) and `baichuan` (the head of
whose second version must have been normalised in the file: nothing there would ask for it). llama.cpp rotates
neighbouring pairs where we rotate halves, so its converter reorders the rows of q and k in files of `llama` and
`baichuan`; within a head of width H

    row of the file    0  1    2  3      4  5    ...  H-2  H-1
    row of ours        0  H/2  1  H/2+1  2  H/2+2     H/2-1  H-1
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from conf.schema import Architecture, ConfigError
from parallel.model.gguf_file import GgufArray, GgufFile, read_gguf, read_rows
from parallel.model.gguf_rope import read_gguf_rope
from parallel.model.hf import check_layers, check_parameters, parameter_shapes, write_config
from parallel.model.names import Spelling
from parallel.model.ranges import block_ranges, fingerprint
from parallel.model.tokenizer import Tokenizer
from parallel.model.tokenizer_gguf import gguf_tokenizer

_LLAMA = Spelling(
    layers="blk.",
    others={
        "model.embed_tokens.weight": "token_embd.weight",
        "model.norm.weight": "output_norm.weight",
        "lm_head.weight": "output.weight",
    },
    modules={
        "input_layernorm": "attn_norm",
        "post_self_attn_layernorm": "post_attention_norm",
        "post_attention_layernorm": "ffn_norm",
        "post_mlp_layernorm": "post_ffw_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "self_attn.q_norm": "attn_q_norm",
        "self_attn.k_norm": "attn_k_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    },
)


@dataclass(frozen=True, kw_only=True)
class _Family:
    """What a general.architecture leaves unsaid in the metadata."""

    permuted: bool = False
    """Whether rows of q and k are in llama.cpp's order."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture that all models of the family share."""
    window: bool = False
    """Whether the window in the metadata is used."""
    period: int = 1
    """All layers but every period-th have the window, if more than one."""
    gemma: bool = False
    """Whether embeddings are scaled by the root of the width, and caps exist."""
    root_of_width: int = 0
    """Gemma: the number of layers of the model whose scores are scaled by the width of a query head, not by its own."""
    theta: float = 10000.0
    """rope.freq_base when the key is absent."""
    local_theta: float | None = None
    """The base in layers with the window."""
    alibi_layers: int = 0
    """The number of layers of the model that has ALiBi, which files don't mark."""
    spelling: Spelling = _LLAMA


_GLM = replace(_LLAMA, fused={"ffn_up": ("mlp.gate_proj", "mlp.up_proj")})
_QKV = "attn_qkv"
"""The tensor that some files hold q, k and v in."""

_GEMMA: Mapping[str, Any] = MappingProxyType({"norm_offset": True, "post_norms": True, "activation": "gelu_tanh"})
_FAMILIES: Mapping[str, _Family] = MappingProxyType(
    {
        "llama": _Family(permuted=True, window=True),
        "qwen2": _Family(),  # its files name a window that their models don't use
        "qwen3": _Family(fixed={"qk_norm": True}),
        "gemma2": _Family(fixed=_GEMMA, window=True, period=2, gemma=True, root_of_width=46),
        "gemma3": _Family(
            fixed={**_GEMMA, "qk_norm": True},
            window=True,
            period=6,
            gemma=True,
            root_of_width=62,
            theta=1e6,
            local_theta=1e4,
        ),
        "glm4": _Family(fixed={"rotary_interleaved": True, "post_norms": True}, spelling=_GLM),
        "chatglm": _Family(fixed={"rotary_interleaved": True}, spelling=_GLM),
        "baichuan": _Family(permuted=True, alibi_layers=40),
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
        self._family = _FAMILIES[family_of(self._file)]
        self.architecture = read_gguf_architecture(self._file)
        found = {name: t.shape for name, t in self._file.tensors.items() if not _NOT_WEIGHTS.fullmatch(name)}
        check_layers(self.architecture, found, str(path))
        self._places = _spelling(self._file, self._family).places(self.architecture)
        check_parameters(self.architecture, found, str(path), self._places)

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
        return tuple(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Full shape of the parameter `name`."""
        return parameter_shapes(self.architecture)[name]

    def read(self, name: str, index: tuple[slice, ...], dtype: torch.dtype) -> Tensor:
        """The block `full[index]` of parameter `name`, dequantised, as a new contiguous `dtype` tensor.

        Raises:
            ConfigError: the file has become shorter.
        """
        place = self._places[name]
        tensor = self._file.tensors[place.name]
        ranges = block_ranges(tensor.shape, place.index(index))
        rows: Any = range(*ranges[0])
        if self._family.permuted and (".q_proj." in name or ".k_proj." in name):
            rows = _file_rows(ranges[0], self.architecture.head_dim)
        columns = ranges[1] if len(ranges) > 1 else (0, 1)
        shape = [stop - start for start, stop in ranges]
        if self.architecture.norm_offset and name.endswith("norm.weight"):  # files hold 1 + weight
            exact = read_rows(self._file.path, tensor, rows, columns, torch.float64)
            return (exact.view(shape) - 1).to(dtype)
        return read_rows(self._file.path, tensor, rows, columns, dtype).view(shape)

    def tokenizer(self) -> Tokenizer:
        """The tokenizer and chat template in the metadata."""
        return gguf_tokenizer(self._file)


def read_gguf_architecture(file: GgufFile) -> Architecture:
    """The architecture in the metadata of `file`.

    Raises:
        ConfigError: an architecture or feature that isn't supported, or metadata that is missing.
    """
    fields, path, kind = file.fields, file.path, family_of(file)
    family = _FAMILIES[kind]
    if fields.get("split.count", 1) != 1:
        raise ConfigError(f"{path} is one of {fields['split.count']} parts; join them with llama-gguf-split --merge")
    if fields.get(f"{kind}.expert_count"):
        raise ConfigError(f"{path}: {kind}.expert_count={fields[f'{kind}.expert_count']}; mixtures are not supported")
    if "token_embd.weight" not in file.tensors:
        raise ConfigError(f"{path}: token_embd.weight is missing")
    heads, width = _count(file, "attention.head_count"), _count(file, "embedding_length")
    head_dim = _count(file, "attention.key_length", width // heads)
    partial = bool(family.fixed.get("rotary_interleaved"))
    for key in ("attention.value_length", *(() if partial else ("rope.dimension_count",))):
        if _count(file, key, head_dim) != head_dim:
            raise ConfigError(f"{path}: {kind}.{key} must equal the head width {head_dim}")
    turned = _count(file, "rope.dimension_count", head_dim)
    max_positions = _count(file, "context_length")
    theta, scaling = read_gguf_rope(file, head_dim, max_positions, family.theta)
    layers = _count(file, "block_count")
    window, window_layers = _windows(file, family, layers)
    return Architecture(
        num_layers=layers,
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
        rotary_dim=None if turned == head_dim else turned,
        alibi=layers == family.alibi_layers,
        qkv_bias=f"blk.0.{_QKV}.bias" in file.tensors or "blk.0.attn_q.bias" in file.tensors,
        output_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        tied_embeddings="output.weight" not in file.tensors,
        sliding_window=window,
        window_layers=window_layers,
        window_rope_theta=family.local_theta if window else None,
        **(_gemma_fields(file, family, width, layers, width // heads) if family.gemma else {}),
        **family.fixed,
    )


def _spelling(file: GgufFile, family: _Family) -> Spelling:
    """With q, k and v in one tensor, if this file has them so."""
    if f"blk.0.{_QKV}.weight" not in file.tensors:
        return family.spelling
    joined = {_QKV: ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}
    return replace(family.spelling, fused={**family.spelling.fused, **joined})


def family_of(file: GgufFile) -> str:
    """general.architecture.

    Raises:
        ConfigError: one that isn't supported.
    """
    kind = file.fields.get("general.architecture")
    if not isinstance(kind, str) or kind not in _FAMILIES:
        raise ConfigError(
            f"{file.path}: general.architecture={kind!r} is not supported; supported are {', '.join(_FAMILIES)}"
        )
    return kind


def _windows(file: GgufFile, family: _Family, layers: int) -> tuple[int | None, tuple[bool, ...] | None]:
    """(window in tokens or None, which layers have it or None for all)."""
    if not (family.window and _has(file, "attention.sliding_window")):
        return None, None
    window = _count(file, "attention.sliding_window")
    if family.period == 1:
        return window, None
    flags = tuple((layer + 1) % family.period > 0 for layer in range(layers))
    return window, None if all(flags) else flags


def _gemma_fields(file: GgufFile, family: _Family, width: int, layers: int, head_share: int) -> dict[str, Any]:
    """Scores are scaled by the head's width; in the family's largest model, which files don't mark, by its share of
    the residual stream."""
    kind = family_of(file)
    caps = {
        ours: file.number(f"{kind}.{theirs}", 1.0) if _has(file, theirs) else None
        for ours, theirs in (("score_cap", "attn_logit_softcapping"), ("logit_cap", "final_logit_softcapping"))
    }
    scalar = float(head_share) if layers == family.root_of_width else None
    return {"embedding_scale": width**0.5, "attention_scalar": scalar, **caps}


def _has(file: GgufFile, key: str) -> bool:
    return bool(file.fields.get(f"{family_of(file)}.{key}"))


def _file_rows(rows: tuple[int, int], head_dim: int) -> np.ndarray:
    """The file's row numbers of our rows [start, stop) of q or k."""
    head, within = np.divmod(np.arange(*rows), head_dim)
    second_half, pair = np.divmod(within, head_dim // 2)
    return head * head_dim + 2 * pair + second_half


def _count(file: GgufFile, key: str, default: int | None = None) -> int:
    full = f"{family_of(file)}.{key}"
    value = file.fields.get(full, default)
    if isinstance(value, GgufArray):
        values = set(file.array(full) or ())
        value = values.pop() if len(values) == 1 else sorted(values)
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{file.path}: {full}={value!r} must be a positive integer, the same for all layers")
    return value

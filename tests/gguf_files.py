"""Small GGUF files, written with the gguf package."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import torch

from conf.schema import Architecture
from parallel.model.hf import parameter_shapes

SMALL = Architecture(
    num_layers=2,
    width=64,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    ffn_width=96,
    vocab_size=50,
    max_positions=128,
    norm_eps=1e-6,
    rope_theta=5e5,
)
THEIRS = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "post_mlp_layernorm": "post_ffw_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "model.layers.": "blk.",
}


_GATES = {"ffn_up": ("ffn_gate", "ffn_up")}
JOINED = {"glm4": _GATES, "chatglm": {**_GATES, "attn_qkv": ("attn_q", "attn_k", "attn_v")}}


def their_name(name: str) -> str:
    for ours, theirs in THEIRS.items():
        name = name.replace(ours, theirs)
    return name


def weights_of(architecture: Architecture) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator) for name, shape in parameter_shapes(architecture).items()}


def interleave(weight: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's converter: halves of a head become neighbouring pairs."""
    halves = weight.reshape(heads, 2, weight.shape[0] // heads // 2, *weight.shape[1:])
    return halves.swapaxes(1, 2).reshape(weight.shape)


def add_architecture(writer: gguf.GGUFWriter, architecture: Architecture) -> None:
    """The metadata that every file has; lengths of heads only where they don't follow from the rest."""
    writer.add_block_count(architecture.num_layers)
    writer.add_context_length(architecture.max_positions)
    writer.add_embedding_length(architecture.width)
    writer.add_feed_forward_length(architecture.ffn_width)
    writer.add_head_count(architecture.num_heads)
    writer.add_head_count_kv(architecture.num_kv_heads)
    writer.add_layer_norm_rms_eps(architecture.norm_eps)
    writer.add_rope_freq_base(architecture.rope_theta)
    if architecture.head_dim * architecture.num_heads != architecture.width:
        writer.add_key_length(architecture.head_dim)
        writer.add_value_length(architecture.head_dim)
    if architecture.rotary_dim is not None:
        writer.add_rope_dimension_count(architecture.rotary_dim)
    if architecture.sliding_window is not None:
        writer.add_sliding_window(architecture.sliding_window)
    if architecture.score_cap is not None:
        writer.add_attn_logit_softcapping(architecture.score_cap)
    if architecture.logit_cap is not None:
        writer.add_final_logit_softcapping(architecture.logit_cap)


def write_model(
    path: Path,
    architecture: Architecture,
    *,
    kind: str = "llama",
    extra: Callable[[gguf.GGUFWriter], None] | None = None,
) -> dict[str, torch.Tensor]:
    """A float32 GGUF file as llama.cpp's converter would write it."""
    writer = gguf.GGUFWriter(path, kind)
    add_architecture(writer, architecture)
    if extra:
        extra(writer)
    weights = weights_of(architecture)
    tensors: dict[str, np.ndarray] = {}
    for name, weight in weights.items():
        values = weight.numpy()
        if kind in ("llama", "baichuan") and ".q_proj." in name:
            values = interleave(values, architecture.num_heads)
        if kind in ("llama", "baichuan") and ".k_proj." in name:
            values = interleave(values, architecture.num_kv_heads)
        if architecture.norm_offset and name.endswith("norm.weight"):
            values = values + 1
        tensors[their_name(name)] = values
    for layer in range(architecture.num_layers):
        for joined, parts in JOINED.get(kind, {}).items():
            for leaf in ("weight", "bias"):
                names = [f"blk.{layer}.{part}.{leaf}" for part in parts]
                if names[0] in tensors:
                    tensors[f"blk.{layer}.{joined}.{leaf}"] = np.concatenate([tensors.pop(name) for name in names])
    for name, values in tensors.items():
        writer.add_tensor(name, np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return weights

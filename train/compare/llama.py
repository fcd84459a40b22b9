"""A plain Llama in PyTorch, with Hugging Face's names: the model that PyTorch's and DeepSpeed's harnesses train."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from conf.schema import Architecture
from train.compare.cases import LENGTH
from train.compare.peer import NOT_TRAINED


class Attention(nn.Module):
    """Grouped-query causal attention with rotary positions."""

    cos: Tensor
    sin: Tensor

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.head_dim, self.group = a.head_dim, a.num_heads // a.num_kv_heads
        self.q_proj = nn.Linear(a.width, a.num_heads * a.head_dim, bias=False)
        self.k_proj = nn.Linear(a.width, a.num_kv_heads * a.head_dim, bias=False)
        self.v_proj = nn.Linear(a.width, a.num_kv_heads * a.head_dim, bias=False)
        self.o_proj = nn.Linear(a.num_heads * a.head_dim, a.width, bias=False)
        powers = torch.arange(0, a.head_dim, 2) / a.head_dim
        angles = torch.outer(torch.arange(LENGTH), a.rope_theta**-powers).repeat(1, 2)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to the same; the heads may be this rank's share."""
        q, k, v = (
            linear(x_BTD).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for linear in (self.q_proj, self.k_proj, self.v_proj)
        )
        k, v = self.rotate(k).repeat_interleave(self.group, 1), v.repeat_interleave(self.group, 1)
        out = F.scaled_dot_product_attention(self.rotate(q), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def rotate(self, x: Tensor) -> Tensor:
        """Heads [B, heads, T, H], turned by their positions; the two halves of a head are the pairs."""
        first, second = x.chunk(2, -1)
        return (x * self.cos + torch.cat([-second, first], -1) * self.sin).to(x.dtype)


class Mlp(nn.Module):
    """Gated feed-forward."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(a.width, a.ffn_width, bias=False)
        self.up_proj = nn.Linear(a.width, a.ffn_width, bias=False)
        self.down_proj = nn.Linear(a.ffn_width, a.width, bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        return self.down_proj(F.silu(self.gate_proj(x_BTD)) * self.up_proj(x_BTD))


class Block(nn.Module):
    """A decoder layer."""

    def __init__(self, a: Architecture) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(a.width, a.norm_eps)
        self.self_attn = Attention(a)
        self.post_attention_layernorm = nn.RMSNorm(a.width, a.norm_eps)
        self.mlp = Mlp(a)

    def forward(self, x_BTD: Tensor) -> Tensor:
        """[B, T, D] to the same."""
        x_BTD = x_BTD + self.self_attn(self.input_layernorm(x_BTD))
        return x_BTD + self.mlp(self.post_attention_layernorm(x_BTD))


class Llama(nn.Module):
    """The layers [first, last) with the embedding before the first layer, norm and head after the last one.

    Whoever holds embedding and head ties them.
    """

    def __init__(self, a: Architecture, first: int = 0, last: int | None = None) -> None:
        super().__init__()
        last = a.num_layers if last is None else last
        self.embed_tokens = nn.Embedding(a.vocab_size, a.width) if first == 0 else None
        self.layers = nn.ModuleDict({str(layer): Block(a) for layer in range(first, last)})
        is_last = last == a.num_layers
        self.norm = nn.RMSNorm(a.width, a.norm_eps) if is_last else None
        self.lm_head = nn.Linear(a.width, a.vocab_size, bias=False) if is_last else None
        self.tie()

    def tie(self) -> None:
        """Makes the head the embedding."""
        if self.embed_tokens is not None and self.lm_head is not None:
            self.lm_head.weight = self.embed_tokens.weight

    def forward(self, x: Tensor) -> Tensor:
        """Ids [B, T] or hidden states [B, T, D] to hidden states or logits [B, T, V]."""
        x = x if self.embed_tokens is None else self.embed_tokens(x)
        for block in self.layers.values():
            x = block(x)
        return x if self.lm_head is None or self.norm is None else self.lm_head(self.norm(x))

    def load(self, directory: str) -> None:
        """Takes this part's weights from a Hugging Face directory."""
        weights = read_weights(directory)
        self.load_state_dict({name: weights[_name(name)] for name in self.state_dict()})


def read_weights(directory: str) -> dict[str, Tensor]:
    """All weights of a Hugging Face directory, by name."""
    return load_file(Path(directory) / "model.safetensors")


def _name(name: str) -> str:
    return "model.embed_tokens.weight" if name == "lm_head.weight" else f"model.{name}"


def cross_entropy(logits_BTV: Tensor, labels_BT: Tensor) -> Tensor:
    """Mean loss over the targets."""
    return F.cross_entropy(logits_BTV.float().flatten(0, 1), labels_BT.flatten(), ignore_index=NOT_TRAINED)

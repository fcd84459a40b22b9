"""One transformer block of the Llama family on this rank's cut of heads and ffn columns."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from parallel.model.step import Angles, Step
from parallel.recompute import Make, made_again
from parallel.tensor import Build, Linear, Norm, together


class Attention(nn.Module):
    """Grouped-query attention: q, k, v column-parallel by heads, o row-parallel."""

    def __init__(self, build: Build, name: str, layer: int) -> None:
        super().__init__()
        a = build.architecture
        self.layer, self.head_dim = layer, a.head_dim
        q_width, kv_width = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.q_proj = Linear(build, f"{name}.q_proj", q_width, a.width, bias=a.qkv_bias, row=False)
        self.k_proj = Linear(build, f"{name}.k_proj", kv_width, a.width, bias=a.qkv_bias, row=False)
        self.v_proj = Linear(build, f"{name}.v_proj", kv_width, a.width, bias=a.qkv_bias, row=False)
        self.o_proj = Linear(build, f"{name}.o_proj", a.width, q_width, bias=a.output_bias, row=True)

    def forward(self, x_TD: Tensor, again: Make, angles: Angles, step: Step) -> Tensor:
        """[T, D], which `again` makes, -> [T, D] summed over the tensor axis; with a split shares [T_r, D] of both."""
        heads = together((self.q_proj, self.k_proj, self.v_proj), x_TD, again, step)
        q_TNH, k_TKH, v_TKH = (x.unflatten(-1, (-1, self.head_dim)) for x in heads)
        out_TNH = step.attend(self.layer, q_TNH, k_TKH, v_TKH, angles)
        return self.o_proj(out_TNH.flatten(1), step)


class GatedMlp(nn.Module):
    """SwiGLU feed-forward (arXiv:2002.05202): gate and up column-parallel, down row-parallel."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        a = build.architecture
        self.ops = build.ops
        self.gate_proj = Linear(build, f"{name}.gate_proj", a.ffn_width, a.width, bias=a.mlp_bias, row=False)
        self.up_proj = Linear(build, f"{name}.up_proj", a.ffn_width, a.width, bias=a.mlp_bias, row=False)
        self.down_proj = Linear(build, f"{name}.down_proj", a.width, a.ffn_width, bias=a.mlp_bias, row=True)

    def forward(self, x_TD: Tensor, again: Make, step: Step) -> Tensor:
        """[T, D], which `again` makes, -> [T, D] summed over the tensor axis; with a split shares [T_r, D] of both."""
        gate_TF, up_TF = together((self.gate_proj, self.up_proj), x_TD, again, step)
        product_TF = self.ops.silu_gate(gate_TF, up_TF)
        make = partial(self.ops.silu_gate, gate_TF, up_TF)
        with made_again((product_TF, make if step.recompute == "selective" else None)):
            return self.down_proj(product_TF, step)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)).

    Each addition happens in one kernel with the norm behind it, so that the last one is left to the next block's norm.
    """

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = Norm(build, f"{name}.input_layernorm")
        self.self_attn = Attention(build, f"{name}.self_attn", layer)
        self.post_attention_layernorm = Norm(build, f"{name}.post_attention_layernorm")
        self.mlp = GatedMlp(build, f"{name}.mlp")

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None, angles: Angles, step: Step) -> tuple[Tensor, Tensor]:
        """Input x (+ delta, if there is one), output x + delta: [T, D] each, replicated over the tensor axis, or with a
        split this rank's share [T_r, D]."""
        x_TD, h_TD = self.input_layernorm(x_TD, delta_TD)
        delta_TD = self.self_attn(h_TD, partial(self.input_layernorm.again, x_TD), angles, step)
        x_TD, h_TD = self.post_attention_layernorm(x_TD, delta_TD)
        return x_TD, self.mlp(h_TD, partial(self.post_attention_layernorm.again, x_TD), step)

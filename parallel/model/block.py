"""One transformer block on this rank's cut of heads and ffn columns."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from parallel.model.rope import paired
from parallel.model.step import Angles, Step
from parallel.recompute import Make, made_again
from parallel.tensor import Build, Linear, Norm, together


class Attention(nn.Module):
    """Grouped-query attention: q, k, v column-parallel by heads, o row-parallel."""

    def __init__(self, build: Build, name: str, layer: int) -> None:
        super().__init__()
        a = build.architecture
        self.architecture, self.layer, self.head_dim = a, layer, a.head_dim
        q_width, kv_width = a.num_heads * a.head_dim, a.num_kv_heads * a.head_dim
        self.q_proj = Linear(build, f"{name}.q_proj", q_width, a.width, bias=a.qkv_bias, row=False)
        self.k_proj = Linear(build, f"{name}.k_proj", kv_width, a.width, bias=a.qkv_bias, row=False)
        self.v_proj = Linear(build, f"{name}.v_proj", kv_width, a.width, bias=a.qkv_bias, row=False)
        self.o_proj = Linear(build, f"{name}.o_proj", a.width, q_width, bias=a.output_bias, row=True)
        self.q_norm = Norm(build, f"{name}.q_norm", a.head_dim) if a.qk_norm else None
        self.k_norm = Norm(build, f"{name}.k_norm", a.head_dim) if a.qk_norm else None

    def forward(self, x_TD: Tensor, again: Make, angles: Angles, step: Step) -> Tensor:
        """[T, D], which `again` makes, -> [T, D] summed over the tensor axis; with a split shares [T_r, D] of both."""
        heads = together((self.q_proj, self.k_proj, self.v_proj), x_TD, again, step)
        q_TNH, k_TKH, v_TKH = (x.unflatten(-1, (-1, self.head_dim)) for x in heads)
        q_TNH = paired(_heads_normed(self.q_norm, q_TNH), self.architecture)
        k_TKH = paired(_heads_normed(self.k_norm, k_TKH), self.architecture)
        out_TNH = step.attend(self.layer, q_TNH, k_TKH, v_TKH, angles)
        return self.o_proj(out_TNH.flatten(1), step)


def _heads_normed(norm: Norm | None, x_TNH: Tensor) -> Tensor:
    """Each head of x by itself (arXiv:2302.05442, sec. 2.1, with RMSNorm), or x as it is."""
    return x_TNH if norm is None else norm(x_TNH.flatten(0, 1))[1].view(x_TNH.shape)


class GatedMlp(nn.Module):
    """Gated feed-forward (arXiv:2002.05202: SwiGLU or GEGLU): gate and up column-parallel, down row-parallel."""

    def __init__(self, build: Build, name: str) -> None:
        super().__init__()
        a = build.architecture
        self.gate = build.ops.silu_gate if a.activation == "silu" else build.ops.gelu_gate
        self.gate_proj = Linear(build, f"{name}.gate_proj", a.ffn_width, a.width, bias=a.mlp_bias, row=False)
        self.up_proj = Linear(build, f"{name}.up_proj", a.ffn_width, a.width, bias=a.mlp_bias, row=False)
        self.down_proj = Linear(build, f"{name}.down_proj", a.width, a.ffn_width, bias=a.mlp_bias, row=True)

    def forward(self, x_TD: Tensor, again: Make, step: Step) -> Tensor:
        """[T, D], which `again` makes, -> [T, D] summed over the tensor axis; with a split shares [T_r, D] of both."""
        gate_TF, up_TF = together((self.gate_proj, self.up_proj), x_TD, again, step)
        product_TF = self.gate(gate_TF, up_TF)
        make = partial(self.gate, gate_TF, up_TF)
        with made_again((product_TF, make if step.recompute == "selective" else None)):
            return self.down_proj(product_TF, step)


class Block(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + mlp(norm(x)); with post-norms x + norm(attention(norm(x))), ....

    Each addition happens in one kernel with the norm behind it, so that the last one is left to the next block's norm.
    """

    def __init__(self, build: Build, layer: int) -> None:
        super().__init__()
        name = f"model.layers.{layer}"
        self.input_layernorm = Norm(build, f"{name}.input_layernorm")
        self.self_attn = Attention(build, f"{name}.self_attn", layer)
        self.post_attention_layernorm = Norm(build, f"{name}.post_attention_layernorm")
        self.mlp = GatedMlp(build, f"{name}.mlp")
        post_norms = build.architecture.post_norms
        self.post_self_attn_layernorm = Norm(build, f"{name}.post_self_attn_layernorm") if post_norms else None
        self.post_mlp_layernorm = Norm(build, f"{name}.post_mlp_layernorm") if post_norms else None

    def forward(self, x_TD: Tensor, delta_TD: Tensor | None, angles: Angles, step: Step) -> tuple[Tensor, Tensor]:
        """Input x (+ delta, if there is one), output x + delta: [T, D] each, replicated over the tensor axis, or with a
        split this rank's share [T_r, D]."""
        x_TD, h_TD = self.input_layernorm(x_TD, delta_TD)
        out_TD = self.self_attn(h_TD, partial(self.input_layernorm.again, x_TD), angles, step)
        if self.post_self_attn_layernorm is not None:
            out_TD = self.post_self_attn_layernorm(out_TD)[1]
        x_TD, h_TD = self.post_attention_layernorm(x_TD, out_TD)
        out_TD = self.mlp(h_TD, partial(self.post_attention_layernorm.again, x_TD), step)
        if self.post_mlp_layernorm is not None:
            out_TD = self.post_mlp_layernorm(out_TD)[1]
        return x_TD, out_TD

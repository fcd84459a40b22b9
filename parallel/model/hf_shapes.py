"""The names and shapes of all parameters of an architecture."""

from __future__ import annotations

from conf.schema import Architecture


def parameter_shapes(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Every parameter of the full model in canonical order: our name (`hf_names`) -> full shape.

    Linear weights are [out, in]. The head is absent when it is tied to the embedding.
    """
    width, ffn = architecture.width, architecture.ffn_width
    queries = architecture.num_heads * architecture.head_dim
    keys = architecture.num_kv_heads * architecture.head_dim
    linears = (
        ("self_attn.q_proj", queries, width, architecture.qkv_bias),
        ("self_attn.k_proj", keys, width, architecture.qkv_bias),
        ("self_attn.v_proj", keys, width, architecture.qkv_bias),
        ("self_attn.o_proj", width, queries, architecture.output_bias),
        ("mlp.gate_proj", ffn, width, architecture.mlp_bias),
        ("mlp.up_proj", ffn, width, architecture.mlp_bias),
        ("mlp.down_proj", width, ffn, architecture.mlp_bias),
    )
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (architecture.vocab_size, width)}
    norms = {"post_attention_layernorm": width}
    if architecture.qk_norm:
        norms |= {"self_attn.q_norm": architecture.head_dim, "self_attn.k_norm": architecture.head_dim}
    if architecture.post_norms:
        norms |= {"post_self_attn_layernorm": width, "post_mlp_layernorm": width}
    for layer in range(architecture.num_layers):
        prefix = f"model.layers.{layer}."
        shapes[f"{prefix}input_layernorm.weight"] = (width,)
        for name, rows, columns, has_bias in linears:
            shapes[f"{prefix}{name}.weight"] = (rows, columns)
            if has_bias:
                shapes[f"{prefix}{name}.bias"] = (rows,)
        shapes |= {f"{prefix}{name}.weight": (size,) for name, size in norms.items()}
    shapes["model.norm.weight"] = (width,)
    if not architecture.tied_embeddings:
        shapes["lm_head.weight"] = (architecture.vocab_size, width)
    return shapes

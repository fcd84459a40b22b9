"""The supported model types of Hugging Face's config.json: what each leaves unsaid there, or can't say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

from conf.schema import ConfigError
from parallel.model import hf_windows
from parallel.model.names import Spelling


@dataclass(frozen=True, kw_only=True)
class Family:
    """A model_type."""

    architecture: str
    """transformers' class."""
    max_positions: int
    kv_heads: int | None = None
    """num_key_value_heads when the key is absent; None means as many as query heads."""
    head_dim: int | None = None
    """head_dim when the key is absent; None means hidden_size / num_attention_heads."""
    norm_eps: float = 1e-6
    """rms_norm_eps when the key is absent."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of the architecture that all models of the type share."""
    attention_bias: bool | None = None
    """attention_bias (of q, k and v) when the key is absent; None means that there is no such key."""
    output_bias: bool = True
    """Whether `attention_bias` is o's too."""
    mlp_bias_key: bool = False
    windows: hf_windows.Kind = "none"
    period: int = 1
    """Of the layers without the window, with `windows="period"`."""
    tied: bool = False
    """tie_word_embeddings when the key is absent."""
    activation_key: str = "hidden_act"
    gemma: bool = False
    """Whether embeddings are scaled by the root of the width, and query_pre_attn_scalar and the two caps exist."""
    caps: tuple[float | None, float | None] = (None, None)
    """attn_logit_softcapping and final_logit_softcapping when the keys are absent."""
    rotary_share: float = 1.0
    """partial_rotary_factor when the key is absent; 1 means that no other value is possible."""
    local_rope: bool = False
    """Whether windowed layers have a rotary base of their own."""
    spelling: Spelling = Spelling()
    """Names in the files."""


_GEMMA: Mapping[str, Any] = MappingProxyType({"norm_offset": True, "post_norms": True, "activation": "gelu_tanh"})
_GEMMA_NAMES = Spelling(
    {
        "post_self_attn_layernorm": "post_attention_layernorm",
        "post_attention_layernorm": "pre_feedforward_layernorm",
        "post_mlp_layernorm": "post_feedforward_layernorm",
    }
)

_GLM = Family(
    architecture="GlmForCausalLM",
    max_positions=131072,
    kv_heads=2,
    head_dim=128,
    norm_eps=1.5625e-7,
    fixed={"rotary_interleaved": True},
    attention_bias=True,
    output_bias=False,
    rotary_share=0.5,
    spelling=Spelling(fused={"mlp.gate_up_proj": ("mlp.gate_proj", "mlp.up_proj")}),
)

FAMILIES: Mapping[str, Family] = MappingProxyType(
    {
        "llama": Family(architecture="LlamaForCausalLM", max_positions=2048, attention_bias=False, mlp_bias_key=True),
        "mistral": Family(architecture="MistralForCausalLM", max_positions=131072, kv_heads=8, windows="all"),
        "qwen2": Family(
            architecture="Qwen2ForCausalLM",
            max_positions=32768,
            kv_heads=32,
            fixed={"qkv_bias": True},
            windows="switch",
        ),
        "qwen3": Family(
            architecture="Qwen3ForCausalLM",
            max_positions=32768,
            kv_heads=32,
            head_dim=128,
            fixed={"qk_norm": True},
            attention_bias=False,
            windows="switch",
        ),
        "gemma2": Family(
            architecture="Gemma2ForCausalLM",
            max_positions=8192,
            kv_heads=4,
            head_dim=256,
            fixed=_GEMMA,
            attention_bias=False,
            windows="period",
            period=2,
            tied=True,
            activation_key="hidden_activation",
            gemma=True,
            caps=(50.0, 30.0),
            spelling=_GEMMA_NAMES,
        ),
        "gemma3_text": Family(
            architecture="Gemma3ForCausalLM",
            max_positions=131072,
            kv_heads=4,
            head_dim=256,
            fixed={**_GEMMA, "qk_norm": True},
            attention_bias=False,
            windows="period",
            period=6,
            tied=True,
            activation_key="hidden_activation",
            gemma=True,
            local_rope=True,
            spelling=_GEMMA_NAMES,
        ),
        "glm": _GLM,
        "glm4": replace(_GLM, architecture="Glm4ForCausalLM", fixed={**_GLM.fixed, "post_norms": True}),
        "chatglm": replace(
            _GLM,
            architecture="ChatGLMModel",
            max_positions=2048,
            spelling=Spelling(
                layers="transformer.encoder.layers.",
                others={
                    "model.embed_tokens.weight": "transformer.embedding.word_embeddings.weight",
                    "model.norm.weight": "transformer.encoder.final_layernorm.weight",
                    "lm_head.weight": "transformer.output_layer.weight",
                },
                modules={"self_attn.o_proj": "self_attention.dense", "mlp.down_proj": "mlp.dense_4h_to_h"},
                fused={
                    "self_attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                    "mlp.dense_h_to_4h": ("mlp.gate_proj", "mlp.up_proj"),
                },
            ),
        ),
        "baichuan": Family(
            architecture="BaichuanForCausalLM",
            max_positions=4096,
            spelling=Spelling(fused={"self_attn.W_pack": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")}),
        ),
        "xverse": Family(architecture="XverseForCausalLM", max_positions=8192),
    }
)


def family_of(model_type: object) -> Family:
    """The family of a config.json's `model_type`.

    Raises:
        ConfigError: one that isn't supported.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ConfigError(f"config.json model_type={model_type!r} is not supported; use one of {sorted(FAMILIES)}")
    return FAMILIES[model_type]

"""PEFT's adapter directories, read and written: adapter_config.json and the tensor names in adapter_model.safetensors.

A directory holds one adapter. Written files open in the `peft` library as they are, and the other way round;
anything in a config that would change the numbers and that we don't compute is refused by name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from conf.schema import LINEARS, Architecture, ConfigError, TuneConf
from parallel.model.hf import parameter_shapes
from parallel.model.safetensors_io import Header, read_header

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX_NAME = "prompt_embeddings"
BASE = "onemesh.base"
"""Metadata key of the weights file: fingerprint of the base model that the adapter was trained on."""
_OTHER_MODEL = f"the adapter was made for another model, give the one that its {CONFIG} names"
_LORA_NAME = re.compile(r"base_model\.model\.(?P<module>.+)\.lora_(?P<factor>[AB])\.weight")


@dataclass(frozen=True)
class LoraModule:
    """LoRA on one linear: `scale * B A` of rank `rank`."""

    module: str
    """Hugging Face's name of the linear, e.g. model.layers.3.self_attn.q_proj."""
    rank: int
    scale: float

    @property
    def name_a(self) -> str:
        """Name of A [rank, in] in the file."""
        return f"base_model.model.{self.module}.lora_A.weight"

    @property
    def name_b(self) -> str:
        """Name of B [out, rank] in the file."""
        return f"base_model.model.{self.module}.lora_B.weight"


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """What an adapter is, without its numbers."""

    kind: Literal["lora", "prefix"]
    modules: tuple[LoraModule, ...] = ()
    """LoRA: the linears that have one, in canonical order."""
    dropout: float = 0.0
    virtual_tokens: int = 0
    """Prefix: its length P."""
    hidden: int | None = None
    """Prefix: inner width of the reparameterisation while training; None without one."""


def from_tune(tune: TuneConf, architecture: Architecture) -> Adapter:
    """The adapter that a training config asks for; `tune.kind` is lora or prefix."""
    if tune.kind == "prefix":
        width = architecture.num_kv_heads * architecture.head_dim
        hidden = (tune.prefix_hidden or width) if tune.prefix_projection else None
        return Adapter(kind="prefix", virtual_tokens=tune.virtual_tokens, hidden=hidden)
    scale = tune.alpha / tune.rank
    modules = tuple(
        LoraModule(name, tune.rank, scale)
        for name in linear_shapes(architecture)
        if name.rsplit(".", 1)[-1] in tune.targets
    )
    return Adapter(kind="lora", modules=modules, dropout=tune.dropout)


def linear_shapes(architecture: Architecture) -> dict[str, tuple[int, int]]:
    """(out, in) of every linear that can have LoRA, by Hugging Face name in canonical order."""
    shapes: dict[str, tuple[int, int]] = {}
    for name, shape in parameter_shapes(architecture).items():
        module, _, leaf = name.rpartition(".")
        if leaf == "weight" and module.rsplit(".", 1)[-1] in LINEARS:
            shapes[module] = (shape[0], shape[1])
    return shapes


def prefix_shape(adapter: Adapter, architecture: Architecture) -> tuple[int, int, int, int, int]:
    """[P, layers, 2 (key, value), K, H]: how the file's [P, layers * 2 * K * H] is read."""
    return (
        adapter.virtual_tokens,
        architecture.num_layers,
        2,
        architecture.num_kv_heads,
        architecture.head_dim,
    )


def write_config(adapter: Adapter, tune: TuneConf, architecture: Architecture, base: str) -> str:
    """The text of adapter_config.json; `base` is the model's path or name."""
    common: dict[str, Any] = {
        "base_model_name_or_path": base,
        "task_type": "CAUSAL_LM",
        "inference_mode": True,
    }
    if adapter.kind == "lora":
        own = {
            "peft_type": "LORA",
            "r": tune.rank,
            "lora_alpha": int(tune.alpha) if tune.alpha == int(tune.alpha) else tune.alpha,
            "lora_dropout": tune.dropout,
            "target_modules": list(tune.targets),
            "bias": "none",
            "use_rslora": False,
            "use_dora": False,
            "fan_in_fan_out": False,
            "modules_to_save": None,
        }
    else:
        own = {
            "peft_type": "PREFIX_TUNING",
            "num_virtual_tokens": adapter.virtual_tokens,
            "token_dim": architecture.num_kv_heads * architecture.head_dim,
            "num_transformer_submodules": 1,
            "num_attention_heads": architecture.num_kv_heads,
            "num_layers": architecture.num_layers,
            "encoder_hidden_size": adapter.hidden or architecture.num_kv_heads * architecture.head_dim,
            # the file holds the finished prefix, so there is nothing left to project
            "prefix_projection": False,
        }
    return json.dumps(common | own, indent=2) + "\n"


def read(directory: Path, architecture: Architecture) -> Adapter:
    """The adapter in `directory`, checked against the base model's shapes.

    Raises:
        ConfigError: no adapter there, a kind or option that isn't supported, or tensors that don't match the base.
    """
    try:
        return _read(directory, architecture)
    except OSError as error:
        raise ConfigError(f"{directory} can't be read ({error.strerror}); give the directory PEFT wrote") from None


def _read(directory: Path, architecture: Architecture) -> Adapter:
    config_path, weights = directory / CONFIG, directory / WEIGHTS
    if not config_path.is_file():
        raise ConfigError(f"{directory} is no adapter directory: it has no {CONFIG}; give the directory PEFT wrote")
    if not weights.is_file():
        found = sorted(path.name for path in directory.glob("adapter_model.*"))
        pickle = f"{found[0]} is a pickle, which is refused: save it as safetensors" if found else ""
        raise ConfigError(f"{directory} has no {WEIGHTS}; {pickle or 'give the directory PEFT wrote'}")
    try:
        config = json.loads(config_path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
        raise ConfigError(f"{config_path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ConfigError(f"{config_path} is not a JSON object; give the file PEFT wrote")
    kind = config.get("peft_type")
    if kind == "LORA":
        return _read_lora(config, read_header(weights), directory, architecture)
    if kind == "PREFIX_TUNING":
        return _read_prefix(config, read_header(weights), directory, architecture)
    raise ConfigError(f"{config_path}: peft_type={kind} is not supported; use LORA or PREFIX_TUNING")


def check_base(directory: Path, fingerprint: str) -> None:
    """Raises ConfigError when the adapter in `directory` says it was trained on weights of another fingerprint."""
    if read_header(directory / WEIGHTS).metadata.get(BASE, fingerprint) != fingerprint:
        raise ConfigError(
            f"{directory / WEIGHTS}: {BASE} is not the fingerprint of the base model's weights, so the adapter was "
            f"trained on other weights of the same shapes; give the model that its {CONFIG} names"
        )


_NEUTRAL_LORA: Mapping[str, tuple[Any, ...]] = {
    # others (pissa, corda, olora, ...) also change the base model's weights when PEFT loads them
    "init_lora_weights": (None, "gaussian", "eva", "orthogonal", False, True),
    "bias": (None, "none"),
    "use_dora": (None, False),
    "fan_in_fan_out": (None, False),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, [], {}),
    "use_qalora": (None, False),
    "lora_bias": (None, False),
    "target_parameters": (None, []),
    "layer_replication": (None, []),
    "alora_invocation_tokens": (None, []),
    "use_bdlora": (None, False),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
}


def _read_lora(config: Mapping[str, Any], header: Header, directory: Path, architecture: Architecture) -> Adapter:
    for key, neutral in _NEUTRAL_LORA.items():
        if config.get(key) not in neutral:
            raise ConfigError(f"{directory / CONFIG}: {key}={config[key]} is not supported; use {key}={neutral[-1]}")
    shapes = linear_shapes(architecture)
    ranks: dict[str, dict[str, int]] = {}
    for name, entry in header.entries.items():
        match = _LORA_NAME.fullmatch(name)
        module = match["module"] if match else ""
        if match is None or module not in shapes:
            raise ConfigError(f"{directory / WEIGHTS}: tensor {name} matches nothing in the base model; {_OTHER_MODEL}")
        rank = max(1, entry.shape[0 if match["factor"] == "A" else -1]) if entry.shape else 1
        out_width, in_width = shapes[module]
        expected = (rank, in_width) if match["factor"] == "A" else (out_width, rank)
        if entry.shape != expected:
            raise ConfigError(
                f"{directory / WEIGHTS}: {name} has shape {list(entry.shape)} where the base model needs "
                f"{list(expected)}; {_OTHER_MODEL}"
            )
        ranks.setdefault(module, {})[match["factor"]] = rank
    for module, factors in ranks.items():
        if len(set(factors.values())) != 1 or len(factors) != 2:
            raise ConfigError(
                f"{directory / WEIGHTS}: {module} has factors of rank {factors} where it needs A and B of one "
                "rank; the file is incomplete, copy it again"
            )
    if not ranks:
        raise ConfigError(f"{directory / WEIGHTS} holds no tensor")
    try:
        modules = tuple(LoraModule(m, ranks[m]["A"], _scale(config, m, ranks[m]["A"])) for m in shapes if m in ranks)
        dropout = float(config.get("lora_dropout") or 0.0)
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise ConfigError(
            f"{directory / CONFIG}: lora_alpha, alpha_pattern or lora_dropout is no number ({error}); export it again"
        ) from None
    return Adapter(kind="lora", modules=modules, dropout=dropout)


def _scale(config: Mapping[str, Any], module: str, rank: int) -> float:
    """alpha / rank, or alpha / sqrt(rank) with rsLoRA; alpha_pattern's keys match the end of the module's name."""
    alpha = config.get("lora_alpha", 8)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.fullmatch(rf"(.*\.)?({pattern})", module):
            alpha = value
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _read_prefix(config: Mapping[str, Any], header: Header, directory: Path, architecture: Architecture) -> Adapter:
    entry = header.entries.get(PREFIX_NAME)
    if entry is None or len(header.entries) != 1:
        raise ConfigError(f"{directory / WEIGHTS} should hold {PREFIX_NAME} alone; it holds {sorted(header.entries)}")
    width = architecture.num_layers * 2 * architecture.num_kv_heads * architecture.head_dim
    if len(entry.shape) != 2 or entry.shape[0] < 1 or entry.shape[1] != width:
        raise ConfigError(
            f"{directory / WEIGHTS}: {PREFIX_NAME} has shape {list(entry.shape)} where the base model needs "
            f"[tokens, {width}]; {_OTHER_MODEL}"
        )
    if config.get("num_virtual_tokens", entry.shape[0]) != entry.shape[0]:
        raise ConfigError(
            f"{directory / CONFIG}: num_virtual_tokens={config['num_virtual_tokens']} but {PREFIX_NAME} has "
            f"{entry.shape[0]} rows"
        )
    return Adapter(kind="prefix", virtual_tokens=entry.shape[0])

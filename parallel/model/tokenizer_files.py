"""The tokenizer of a Hugging Face directory.

| file                                        | gives                                                              |
|---------------------------------------------|--------------------------------------------------------------------|
| tokenizer.json                              | vocabulary, merges, splitting: the ids                             |
| tokenizer_config.json                       | bos, eos, pad, unk; a chat template in older models                |
| special_tokens_map.json                     | bos, eos, pad, unk where the config is silent                      |
| chat_template.jinja                         | the chat template; comes before one in the config                  |
| generation_config.json, config.json         | eos_token_id: further ids that end an answer                       |
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from conf.schema import ConfigError
from parallel.model.hf import read_config_file
from parallel.model.tokenizer import Tokenizer, TokenizerFacts


def directory_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer in `directory`.

    Raises:
        ConfigError: tokenizer.json is missing or can't be read, or another file is corrupt.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing; save it with transformers: AutoTokenizer.from_pretrained(...).save_pretrained(...)"
        )
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # the library raises bare Exception
        raise ConfigError(f"{path} can't be read: {error}") from None
    backend.no_truncation()
    backend.no_padding()
    config = _optional(directory / "tokenizer_config.json")
    named = {
        **_optional(directory / "special_tokens_map.json"),
        **{k: v for k, v in config.items() if v is not None},
    }
    tokens = {kind: _text(named.get(f"{kind}_token")) for kind in ("bos", "eos", "pad", "unk")}
    known = {kind: token for kind, token in tokens.items() if token and backend.token_to_id(token) is not None}
    return Tokenizer(
        backend,
        TokenizerFacts(
            bos=known.get("bos"),
            eos=known.get("eos"),
            pad=known.get("pad"),
            unknown=known.get("unk"),
            eos_ids=_end_ids(directory),
            template=_template(directory, config),
            config=config,
            generation=_optional(directory / "generation_config.json"),
        ),
    )


def _end_ids(directory: Path) -> frozenset[int]:
    """eos_token_id of the generation config, else of the config: an id or a list of ids."""
    for name in ("generation_config.json", "config.json"):
        value = _optional(directory / name).get("eos_token_id")
        if value is None:
            continue
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(id, int) and id >= 0 for id in ids):
            raise ConfigError(f"{directory / name} eos_token_id={value!r} must be an id or a list of ids")
        return frozenset(ids)
    return frozenset()


def _template(directory: Path, config: Mapping[str, Any]) -> str | None:
    path = directory / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if isinstance(template, list):
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, Mapping)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise ConfigError(f"{directory / 'tokenizer_config.json'} chat_template must be text or a list of named ones")
    return template


def _text(token: Any) -> str | None:
    """The text of a special token, which may be written as an object."""
    return token.get("content") if isinstance(token, Mapping) else token


def _optional(path: Path) -> dict[str, Any]:
    return read_config_file(path) if path.is_file() else {}

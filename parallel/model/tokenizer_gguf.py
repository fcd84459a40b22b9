"""A tokenizer rebuilt from GGUF metadata: byte-level BPE (`gpt2`) and SentencePiece BPE (`llama`).

How text is split before BPE isn't in the file, only its name (`tokenizer.ggml.pre`); the rules are those of the
models' own tokenizer.json files. SmolLM2 splits digits one by one before GPT-2's regex.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from conf.schema import ConfigError
from parallel.model.gguf_file import GgufFile
from parallel.model.tokenizer import Tokenizer, TokenizerFacts

_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3, _QWEN2 = _WORDS + r"\p{N}{1,3}" + _REST, _WORDS + r"\p{N}" + _REST

# name in the file -> rule
_PRE: Mapping[str, str] = MappingProxyType(
    {
        "default": "gpt2",
        "gpt-2": "gpt2",
        "gpt2": "gpt2",
        "smollm": "smollm",
        "llama-bpe": "llama3",
        "llama3": "llama3",
        "llama-v3": "llama3",
        "qwen2": "qwen2",
        "deepseek-r1-qwen": "qwen2",
    }
)

_UNKNOWN, _CONTROL, _USER = 2, 3, 4  # token types


def gguf_tokenizer(file: GgufFile) -> Tokenizer:
    """The tokenizer in the metadata of `file`, with its chat template.

    Raises:
        ConfigError: no tokenizer in the file, or a kind that isn't supported.
    """
    tokens = file.array("tokenizer.ggml.tokens")
    kind = file.fields.get("tokenizer.ggml.model")
    if tokens is None or kind not in ("gpt2", "llama"):
        raise ConfigError(f"{file.path}: tokenizer.ggml.model={kind!r} is not supported; supported are gpt2 and llama")
    types = file.array("tokenizer.ggml.token_type") or [1] * len(tokens)
    if len(types) != len(tokens):
        raise ConfigError(f"{file.path}: {len(types)} token types for {len(tokens)} tokens")
    backend = _byte_level(file, tokens) if kind == "gpt2" else _sentencepiece(file, tokens)
    backend.add_special_tokens(
        [_added(token, True) for token, type in zip(tokens, types, strict=True) if type in (_UNKNOWN, _CONTROL)]
    )
    backend.add_tokens([_added(token, False) for token, type in zip(tokens, types, strict=True) if type == _USER])
    names = {
        name: _token(file, tokens, f"{name}_token_id") for name in ("bos", "eos", "eot", "eom", "padding", "unknown")
    }
    if _adds_bos(file, kind) and names["bos"] is not None:
        bos = names["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=[bos, "$A"], pair=[bos, "$A", bos, "$B"], special_tokens=[(bos, tokens.index(bos))]
        )
    ends = {file.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    template = file.fields.get("tokenizer.chat_template")
    facts = TokenizerFacts(
        bos=names["bos"],
        eos=names["eos"],
        pad=names["padding"],
        unknown=names["unknown"],
        eos_ids=frozenset(id for id in ends if id is not None),
        template=template,
    )
    return Tokenizer(backend, facts)


def _byte_level(file: GgufFile, tokens: Sequence[str]) -> Backend:
    name = file.fields.get("tokenizer.ggml.pre", "default")
    if name not in _PRE:
        raise ConfigError(f"{file.path}: tokenizer.ggml.pre={name!r} is not supported; supported are {', '.join(_PRE)}")
    merges = file.array("tokenizer.ggml.merges")
    if merges is None:
        raise ConfigError(f"{file.path}: tokenizer.ggml.merges is missing")
    pairs: list[tuple[str, str]] = []
    for merge in merges:
        left, _, right = merge.partition(" ")
        pairs.append((left, right))
    rule = _PRE[name]
    try:
        model = models.BPE(
            vocab={token: id for id, token in enumerate(tokens)}, merges=pairs, ignore_merges=rule == "llama3"
        )
    except Exception as error:
        raise ConfigError(f"{file.path}: tokenizer.ggml.merges don't fit the tokens: {error}") from None
    backend = Backend(model)
    backend.pre_tokenizer = _pre_tokenizer(rule)
    if rule == "qwen2":
        backend.normalizer = normalizers.NFC()
    backend.decoder = decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    return backend


def _pre_tokenizer(rule: str) -> Any:
    if rule in ("llama3", "qwen2"):
        pattern = Regex(_LLAMA3 if rule == "llama3" else _QWEN2)
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        return pre_tokenizers.Sequence([pre_tokenizers.Split(pattern, "isolated"), plain])
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    if rule == "smollm":
        return pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), words])
    return words


def _sentencepiece(file: GgufFile, tokens: Sequence[str]) -> Backend:
    """SentencePiece merges the neighbours whose union has the best score: as BPE, unions in order of score."""
    scores = file.array("tokenizer.ggml.scores")
    if scores is None or len(scores) != len(tokens):
        raise ConfigError(f"{file.path}: tokenizer.ggml.scores must have one score per token")
    vocabulary = {token: id for id, token in enumerate(tokens)}
    ranked = [
        (-score, vocabulary[token[:cut]], vocabulary[token[cut:]], token[:cut], token[cut:])
        for token, score in zip(tokens, scores, strict=True)
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    ranked.sort(key=lambda merge: merge[:3])
    unknown = _token(file, tokens, "unknown_token_id") or "<unk>"
    model = models.BPE(
        vocab=vocabulary,
        merges=[(left, right) for *_, left, right in ranked],
        unk_token=unknown if unknown in vocabulary else None,
        fuse_unk=True,
        byte_fallback="<0x00>" in vocabulary,
    )
    prefix = file.fields.get("tokenizer.ggml.add_space_prefix", True)
    backend = Backend(model)
    space = "\u2581"
    replace = normalizers.Replace(" ", space)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(space), replace]) if prefix else replace
    steps: list[Any] = [decoders.Replace(space, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return backend


def _adds_bos(file: GgufFile, kind: str) -> bool:
    implied = kind == "llama" or _PRE.get(file.fields.get("tokenizer.ggml.pre", "default")) == "llama3"
    return bool(file.fields.get("tokenizer.ggml.add_bos_token", implied))


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _token(file: GgufFile, tokens: Sequence[str], key: str) -> str | None:
    id = file.fields.get(f"tokenizer.ggml.{key}")
    if id is None:
        return None
    if not isinstance(id, int) or not 0 <= id < len(tokens):
        raise ConfigError(f"{file.path}: tokenizer.ggml.{key}={id!r} is not one of {len(tokens)} tokens")
    return tokens[id]

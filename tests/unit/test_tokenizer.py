"""The tokenizer from directories and in code: ids, bytes, saved directories against transformers."""

from __future__ import annotations

import json
import re
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from conf.schema import ConfigError
from parallel.model.tokenizer import Tokenizer, TokenizerFacts
from parallel.model.tokenizer_bytes import byte_tokenizer
from parallel.model.tokenizer_files import directory_tokenizer

CORPUS = (
    "the quick brown fox jumps over the lazy dog; pack my box with five dozen liquor jugs",
    "def f(x):\n    return x + 1  # 12345\n\n\nprint(f(2024))",
    "naive cafe, na\u00efve caf\u00e9, \u65e5\u672c\u8a9e\u306e\u6587\u7ae0",
)
TEXTS = (
    "",
    "the quick brown fox",
    " leading and trailing ",
    "two  spaces\n\n1. item\r\n\t2024",
    "cafe\u0301 caf\u00e9 \u2603 \U0001f642",
    "<s>the<|end|>fox</s> jumps",
)
KINDS = ("bytes", "regex", "prepend", "metaspace")
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def backend_of(kind: str) -> Backend:
    """A small trained tokenizer in the manner of GPT-2, Llama 3, Llama 2 and newer SentencePiece conversions."""
    special = [AddedToken(token, special=True, normalized=False) for token in ("<unk>", "<s>", "</s>", "<|end|>")]
    if kind in ("bytes", "regex"):
        backend = Backend(models.BPE())
        plain = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=kind == "bytes")
        split = pre_tokenizers.Split(Regex(r"\p{N}{1,3}|\p{L}+|[^\p{L}\p{N}]+"), "isolated")
        backend.pre_tokenizer = plain if kind == "bytes" else pre_tokenizers.Sequence([split, plain])
        backend.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    else:
        backend = Backend(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
        special += [AddedToken(f"<0x{byte:02X}>", special=False, normalized=False) for byte in range(256)]
        alphabet = []
        if kind == "prepend":
            backend.normalizer = normalizers.Sequence(
                [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
            )
        else:
            backend.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme="first", split=False)
        steps = [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
        backend.decoder = decoders.Sequence(steps)
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(CORPUS, trainer)
    if kind in ("prepend", "metaspace"):
        backend = _without_added_bytes(backend)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", backend.token_to_id("<s>"))]
    )
    return backend


def _without_added_bytes(backend: Backend) -> Backend:
    """Byte tokens belong to the vocabulary alone, as in real conversions."""
    state = json.loads(backend.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if not token["content"].startswith("<0x")]
    return Backend.from_str(json.dumps(state))


TINY = byte_tokenizer()
TRAINED = Tokenizer(backend_of("regex"), TokenizerFacts())


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    folder = tmp_path_factory.mktemp("tiny")
    TINY.save(folder)
    return AutoTokenizer.from_pretrained(folder)


def write_directory(folder: Path, kind: str) -> Path:
    backend_of(kind).save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": {"content": "</s>", "__type": "AddedToken"},
        "unk_token": "<unk>",
        "chat_template": TEMPLATE,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "top_p": 0.9}))
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_a_directory_gives_transformers_ids_before_and_after_saving(tmp_path: Path, kind: str) -> None:
    ours = directory_tokenizer(write_directory(tmp_path, kind))
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    for theirs, again in (
        (AutoTokenizer.from_pretrained(tmp_path), ours),
        (AutoTokenizer.from_pretrained(saved), directory_tokenizer(saved)),
    ):
        for text in TEXTS:
            ids = theirs.encode(text, add_special_tokens=False)
            assert ours.encode(text) == ids == again.encode(text), text
            assert ours.encode(text, bos=True) == theirs.encode(text) == again.encode(text, bos=True)
            assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
            assert ours.decode(ids, skip_special=False) == theirs.decode(ids)
        messages = [{"role": "user", "content": " the fox\n"}]
        prompt = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert ours.chat(messages) == list(prompt) == again.chat(messages)
        assert (again.bos_id, again.eos_id, again.eos_ids) == (1, 2, frozenset({2, 3}))
        assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)
    generation = GenerationConfig.from_pretrained(saved)
    assert (generation.top_p, generation.eos_token_id, generation.bos_token_id) == (0.9, [2, 3], 1)


@pytest.mark.parametrize("kind", KINDS)
def test_token_bytes_add_up_to_the_text(tmp_path: Path, kind: str) -> None:
    ours = directory_tokenizer(write_directory(tmp_path, kind))
    for text in TEXTS:
        joined = b"".join(ours.token_bytes(id) for id in ours.encode(text)).decode()
        expected = text
        if kind == "prepend":  # a space before each stretch between special tokens
            expected = "".join(
                part if part in ("<s>", "</s>", "<|end|>") or not part else " " + part
                for part in re.split(r"(<s>|</s>|<\|end\|>)", text)
            )
        if kind == "metaspace":
            joined, expected = joined.removeprefix(" "), expected.removeprefix(" ")
        assert joined == expected
    assert ours.token_bytes(10**6) == b""
    assert ours.decode([10**6]) == ""


def test_special_tokens_in_text_are_ids_only_when_asked(tmp_path: Path) -> None:
    ours = directory_tokenizer(write_directory(tmp_path, "bytes"))
    assert ours.encode("</s>") == [2]
    plain = ours.encode("</s>", special=False)
    assert 2 not in plain
    assert ours.decode(plain) == "</s>"
    assert ours.is_special(2)
    assert not ours.is_special(plain[0])
    assert ours.encode("</s>") == [2], "the plain view must not change the other one"


@pytest.mark.parametrize("special", [True, False])
def test_text_that_is_not_unicode(special: bool) -> None:
    with pytest.raises(ConfigError, match="half a surrogate pair at character 2; it is not Unicode"):
        TINY.encode(json.loads('"ab\\ud83d"'), special=special)


def test_byte_tokenizer_ids_are_bytes() -> None:
    tiny = byte_tokenizer()
    assert tiny.vocab_size == 259
    assert tiny.encode("A\u00e9\n") == [65, 0xC3, 0xA9, 10]
    assert tiny.encode("<|endoftext|><|im_start|><|im_end|>") == [256, 257, 258]
    assert tiny.eos_ids == {258}
    assert [tiny.token_bytes(id) for id in (0, 255, 257, 299)] == [b"\0", b"\xff", b"<|im_start|>", b""]


@given(st.text())
@settings(deadline=None)
def test_byte_tokenizer_round_trip(text: str) -> None:
    ids = TINY.encode(text, special=False)
    assert ids == list(text.encode())
    assert TINY.decode(ids) == text


@given(st.text())
@settings(deadline=None)
def test_byte_level_bpe_round_trip(text: str) -> None:
    ids = TRAINED.encode(text, special=False)
    assert TRAINED.decode(ids, skip_special=False) == text
    assert b"".join(TRAINED.token_bytes(id) for id in ids) == text.encode()


@given(st.text(alphabet=st.characters(codec="utf-8")))
@settings(deadline=None)
def test_saved_byte_tokenizer_agrees_with_transformers(saved: PreTrainedTokenizerBase, text: str) -> None:
    assert saved.encode(text, add_special_tokens=False) == TINY.encode(text)
    assert saved.decode(TINY.encode(text)) == text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("tokenizer.json", None, "tokenizer.json is missing"),
        ("tokenizer.json", "{}", "tokenizer.json can't be read"),
        ("tokenizer_config.json", "{", "tokenizer_config.json is not valid JSON"),
        ("tokenizer_config.json", "[]", "must hold a JSON object"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template must be text"),
        ("tokenizer_config.json", '{"chat_template": "{% if %}"}', "chat_template is not valid Jinja"),
        ("generation_config.json", '{"eos_token_id": "2"}', "eos_token_id='2' must be an id"),
    ],
)
def test_broken_files_are_named(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    write_directory(tmp_path, "bytes")
    if content is None:
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        directory_tokenizer(tmp_path)


def test_template_file_comes_before_the_config(tmp_path: Path) -> None:
    write_directory(tmp_path, "bytes")
    (tmp_path / "chat_template.jinja").write_text("other{{ eos_token }}")
    assert directory_tokenizer(tmp_path).render([{"role": "user", "content": "x"}], generation_prompt=False) == (
        "other</s>"
    )


def test_named_templates_give_the_default(tmp_path: Path) -> None:
    write_directory(tmp_path, "bytes")
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert directory_tokenizer(tmp_path).render([{"role": "user", "content": "x"}], generation_prompt=False) == (
        "plain"
    )


def test_without_a_template_chat_says_so(tmp_path: Path) -> None:
    write_directory(tmp_path, "bytes")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    ours = directory_tokenizer(tmp_path)
    assert not ours.has_chat_template
    with pytest.raises(ConfigError, match="the model has no chat template"):
        ours.chat([{"role": "user", "content": "x"}])


def test_composed_and_decomposed_text_stay_apart() -> None:
    text = unicodedata.normalize("NFD", "caf\u00e9")
    assert TINY.decode(TINY.encode(text)) == text

"""Chat templates: rendering as transformers does it, messages checked, conversations cut into targets."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, decoders, models, normalizers
from tokenizers import Tokenizer as Backend
from transformers import AutoTokenizer

from conf.schema import ConfigError
from parallel.model.template import ChatTemplate
from parallel.model.tokenizer import Tokenizer, TokenizerFacts
from parallel.model.tokenizer_bytes import CHATML, byte_tokenizer

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "2 + 2?"},
    {"role": "assistant", "content": "4"},
    {"role": "user", "content": "<b>&\u00e9</b>"},
    {"role": "assistant", "content": "bold & accent"},
]
HEADERS = """{{ bos_token }}
{%- for message in messages %}
    {{- '<|head|>' + message.role + '<|body|>\n\n' + message.content | trim + '<|end|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|head|>assistant<|body|>\n\n' }}{% endif %}
"""
INSTRUCTION = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set rest = messages[1:] %}{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if m.role == 'user' %}{{ bos_token + '[Q] ' + (first if loop.first else '') + m.content + ' [A]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
TOOLS = """{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}
{% endfor %}{{ '<|im_end|>\n' }}{% endif %}
{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}
{%- if message.role == 'assistant' %}{% generation %}{{ message.content }}
{%- for call in message.tool_calls or [] %}{{ '<call>' + call.function | tojson + '</call>' }}{% endfor %}
{{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ message.content + '<|im_end|>\n' }}{% endif %}
{%- if message.role == 'never' %}{% continue %}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
ENDS = {CHATML: "<|im_end|>", HEADERS: "<|end|>", INSTRUCTION: "</s>", TOOLS: "<|im_end|>"}


def template_of(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"})


@pytest.mark.parametrize("source", ENDS)
def test_pieces_add_up_and_targets_are_the_answers(source: str) -> None:
    template = template_of(source)
    pieces = template.split(CHAT, [ENDS[source]])
    assert "".join(piece.text for piece in pieces) == template.render(CHAT, generation_prompt=False)
    assert [piece.text.strip(" ") for piece in pieces if piece.target] == [
        answer + ENDS[source]
        for answer in (("4", "bold & accent") if source != INSTRUCTION else ("4 ", "bold & accent "))
    ]
    assert [piece.target for piece in pieces[:4]] == [False, True, False, True]
    for number in (2, 4):
        before = "".join(piece.text for piece in pieces[: pieces.index(pieces[number - 1])])
        assert before == template.render(CHAT[:number], generation_prompt=True)


@pytest.mark.parametrize("source", [CHATML, HEADERS, TOOLS])
def test_rendering_is_transformers(source: str, tmp_path: Path) -> None:
    tiny = byte_tokenizer()
    tiny.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    theirs.bos_token = theirs.eos_token
    ours = ChatTemplate(source, {"bos_token": "<|im_end|>", "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"})
    tools = [{"type": "function", "function": {"name": "f", "description": "a < b & \u00e9", "parameters": {}}}]
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": "<1>"}}}]
    chat: list[dict[str, Any]] = [*CHAT[:2], {"role": "assistant", "content": "", "tool_calls": calls}]
    chat += [{"role": "tool", "content": "5"}]
    for given in (None, tools):
        for prompt in (False, True):
            expected = theirs.apply_chat_template(
                chat, tools=given, chat_template=source, add_generation_prompt=prompt, tokenize=False
            )
            assert ours.render(chat, tools=given, generation_prompt=prompt) == expected


def test_tool_calls_are_part_of_the_target() -> None:
    calls = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    chat = [
        {"role": "user", "content": "go"},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "tool", "content": "1"},
        {"role": "assistant", "content": "done"},
    ]
    targets = [piece.text for piece in template_of(TOOLS).split(chat, ["<|im_end|>"]) if piece.target]
    assert targets == ['<call>{"name": "f", "arguments": {"x": 1}}</call><|im_end|>', "done<|im_end|>"]


@pytest.mark.parametrize(("arguments", "shown"), [('{"x": 1}', '{"x": 1}'), ("[1]", '"[1]"'), ("{", '"{"')])
def test_arguments_as_json_text_become_objects(arguments: str, shown: str) -> None:
    chat = [{"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]
    text = template_of(TOOLS).render(chat, generation_prompt=False)
    assert f'"arguments": {shown}}}</call>' in text
    assert chat[0]["tool_calls"][0]["function"]["arguments"] == arguments


@pytest.mark.parametrize("content", ["", "\n", "  a\n", "\n\n"])
@pytest.mark.parametrize("source", ENDS)
def test_the_end_of_blank_and_trimmed_answers(source: str, content: str) -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    pieces = template_of(source).split(chat, [ENDS[source]])
    assert [piece.target for piece in pieces[:2]] == [False, True]
    assert pieces[1].text.endswith(ENDS[source])
    assert pieces[1].text.count(ENDS[source]) == 1


def test_content_that_holds_an_end_token_stays_whole() -> None:
    chat = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "a<|im_end|>b"}]
    (_, answer, tail) = template_of(CHATML).split(chat, ["<|im_end|>"])
    assert (answer.text, tail.text) == ("a<|im_end|>b<|im_end|>", "\n")


def test_answers_in_a_row_and_messages_after_the_last_answer() -> None:
    chat = [
        {"role": "assistant", "content": "hello"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "bye"},
    ]
    pieces = template_of(CHATML).split(chat, ["<|im_end|>"])
    assert [(piece.text, piece.role, piece.target) for piece in pieces] == [
        ("<|im_start|>assistant\n", "system", False),
        ("hello<|im_end|>", "assistant", True),
        ("\n<|im_start|>assistant\n", "assistant", False),
        ("<|im_end|>", "assistant", True),
        ("\n<|im_start|>user\nbye<|im_end|>\n", "user", False),
    ]


def test_a_template_that_rewrites_earlier_turns_is_refused() -> None:
    source = "{% for m in messages %}{{ m.content if loop.last else '...' }}<|im_end|>{% endfor %}"
    message = "can't be trained on: the text of the first 1 messages changes when more follow, from 'one"
    with pytest.raises(ConfigError, match=message):
        template_of(source).split(
            [{"role": "assistant", "content": "one"}, {"role": "user", "content": "x"}], ["<|im_end|>"]
        )


def test_a_template_without_end_token_is_refused() -> None:
    with pytest.raises(ConfigError, match="writes no end token after an assistant's answer"):
        template_of("{% for m in messages %}{{ m.content }}\n{% endfor %}").split(CHAT, ["<|im_end|>"])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "messages must be a non-empty list"),
        ("hello", "messages must be a non-empty list"),
        (["hello"], r"messages\[0\] must be an object, not str"),
        ([{"content": "x"}], r"messages\[0\].role=None is unknown; use one of system, developer, user"),
        ([CHAT[0], {"role": "human", "content": "x"}], r"messages\[1\].role='human' is unknown"),
        ([{"role": "user"}], r"messages\[0\].content must be text or a list of text parts, not NoneType"),
        ([{"role": "user", "content": 3}], r"messages\[0\].content must be text .* not int"),
        ([{"role": "assistant", "content": None}], r"messages\[0\].content must be text"),
        ([{"role": "user", "content": [{"type": "image_url"}]}], "part of type 'image_url'; only text"),
        ([{"role": "user", "content": [7]}], "part of type 'int'; only text"),
        ([{"role": "assistant", "content": "", "tool_calls": "f"}], "tool_calls must be a list of objects"),
    ],
)
def test_malformed_messages(messages: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        template_of(CHATML).render(messages, generation_prompt=False)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, "b", {"type": "text", "text": "c"}]
    assert "user\na\nb\nc<|im_end|>" in template_of(CHATML).render(
        [{"role": "user", "content": parts}], generation_prompt=False
    )


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (
            "{{ raise_exception('no system here') }}",
            "messages don't fit the model's chat template: no system here",
        ),
        ("{{ messages[0].content + 1 }}", "messages don't fit the model's chat template: TypeError"),
        ("{{ messages.append(1) }}", "messages don't fit the model's chat template"),
        ("{{ ''.__class__.__mro__ }}", "messages don't fit the model's chat template: access to attribute"),
    ],
)
def test_template_errors_are_the_users(source: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        template_of(source).render(CHAT, generation_prompt=False)


def test_strftime_now() -> None:
    text = template_of("{{ strftime_now('%Y-%m-%d') }}").render(CHAT, generation_prompt=False)
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", text)


def test_segments_are_the_prompts_of_serving_and_what_follows() -> None:
    tiny = byte_tokenizer()
    segments = tiny.segments(CHAT)
    ids: list[int] = []
    for number, segment in enumerate(segments):
        if segment.target:
            turn = 2 if number == 1 else 4
            assert ids == tiny.chat(CHAT[:turn])
            assert segment.ids == tuple(tiny.encode(CHAT[turn]["content"] + "<|im_end|>"))
        ids.extend(segment.ids)
    assert ids == tiny.encode(tiny.render(CHAT, generation_prompt=False))
    assert [segment.role for segment in segments] == ["user", "assistant", "user", "assistant", "assistant"]


def test_segments_add_no_space_inside_a_conversation() -> None:
    """SentencePiece puts a space before a text's first word; an answer is not a first word."""
    characters = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581[]QAabc"]
    backend = Backend(
        models.BPE({token: id for id, token in enumerate(characters)}, [], unk_token="<unk>", byte_fallback=True)
    )
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    backend.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in ("<s>", "</s>")])
    tokenizer = Tokenizer(backend, TokenizerFacts(bos="<s>", eos="</s>", template=INSTRUCTION))
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    chat += [{"role": "user", "content": "c"}, {"role": "assistant", "content": "ab"}]
    ids = [id for segment in tokenizer.segments(chat) for id in segment.ids]
    assert ids == tokenizer.encode(tokenizer.render(chat, generation_prompt=False))
    answers = [segment.ids for segment in tokenizer.segments(chat) if segment.target]
    assert answers == [
        tuple(characters.index(token) for token in ["\u2581", "b", "\u2581", "</s>"]),
        tuple(characters.index(token) for token in ["\u2581", "a", "b", "\u2581", "</s>"]),
    ]


def test_the_templates_own_end_token_ends_answers() -> None:
    """A base model's eos may differ from what its template writes after answers."""
    tiny = byte_tokenizer()
    base = Tokenizer(tiny._backend, TokenizerFacts(eos="<|endoftext|>", template=CHATML))
    assert base.eos_ids == {256, 258}
    assert base.segments(CHAT)[1].ids[-1] == 258


def test_json_is_not_escaped_for_html() -> None:
    source = "{{ messages[0] | tojson(indent=1) }}"
    text = template_of(source).render([{"role": "user", "content": "<&\u00e9>"}], generation_prompt=False)
    assert text == json.dumps({"role": "user", "content": "<&\u00e9>"}, indent=1, ensure_ascii=False)

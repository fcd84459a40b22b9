"""Row shapes and the messages of bad data files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from conf.schema import ConfigError
from train.rows import Chat, Entry, Text, read_entries

CHAT = {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}


def write_lines(folder: Path, *rows: object) -> str:
    path = folder / "rows.jsonl"
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return str(path)


def read_one(folder: Path, row: object) -> Chat | Text:
    (entry,) = read_entries(write_lines(folder, row))
    return entry.content


def refusal(path: str) -> str:
    with pytest.raises(ConfigError) as caught:
        list(read_entries(path))
    return str(caught.value)


def test_messages_keep_every_key_of_a_turn(tmp_path: Path) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": None, "tool_calls": [call]}]
    chat = read_one(tmp_path, {"messages": turns, "id": 7})
    assert isinstance(chat, Chat)
    assert chat.messages[0] == turns[0]
    assert chat.messages[1] == {"role": "assistant", "content": "", "tool_calls": [call]}


def test_sharegpt_speakers_become_roles(tmp_path: Path) -> None:
    speakers = ("system", "human", "function_call", "observation", "gpt", "user", "assistant", "tool")
    turns = [{"from": speaker, "value": speaker.upper()} for speaker in speakers]
    chat = read_one(tmp_path, {"conversations": turns, "tools": '[{"name": "f"}]'})
    assert isinstance(chat, Chat)
    roles = [message["role"] for message in chat.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant", "user", "assistant", "tool"]
    assert chat.messages[2] == {"role": "assistant", "content": "FUNCTION_CALL"}
    assert chat.tools == ({"name": "f"},)


@pytest.mark.parametrize(
    ("extra", "prompt"), [({}, "Add."), ({"input": ""}, "Add."), ({"input": "1 2"}, "Add.\n\n1 2")]
)
def test_instructions_become_one_turn(tmp_path: Path, extra: dict[str, str], prompt: str) -> None:
    chat = read_one(tmp_path, {"instruction": "Add.", **extra, "output": "3"})
    expected = ({"role": "user", "content": prompt}, {"role": "assistant", "content": "3"})
    assert chat == Chat(expected)


def test_text_and_system_key(tmp_path: Path) -> None:
    assert read_one(tmp_path, {"text": "Once.", "id": 1}) == Text("Once.")
    chat = read_one(tmp_path, {**CHAT, "system": "Be brief."})
    assert isinstance(chat, Chat)
    assert chat.messages[0] == {"role": "system", "content": "Be brief."}


def test_lines_count_blank_ones_and_only_newlines_end_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    separator = '{"text": "a\u2028b"}'
    path.write_bytes(b"\xef\xbb\xbf" + f'{separator}\r\n\n  \n{{"text": "c"}}'.encode())
    entries = list(read_entries(str(path)))
    assert entries == [Entry(0, 1, "line 1", Text("a\u2028b")), Entry(1, 4, "line 4", Text("c"))]


def test_array_rows_know_their_lines(tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text('\n[{"text": "a"},\n {"text":\n "b"}\n,{"text": "c"}]\n')
    entries = list(read_entries(str(path)))
    assert [(e.index, e.line, e.place) for e in entries] == [
        (0, 2, "row 1 (line 2)"), (1, 3, "row 2 (line 3)"), (2, 5, "row 3 (line 5)"),
    ]  # fmt: skip
    path.write_text(json.dumps([CHAT, {"text": "x"}], indent=2))
    assert [e.content for e in read_entries(str(path))][1] == Text("x")


BAD_ROWS: list[tuple[object, str]] = [
    ('{"text": ', "line 2 is not JSON"),
    ("[1]", "line 2: not an object but a list"),
    ("7", "line 2: not an object but a number"),
    ({}, r"line 2: unknown row shape \(keys: none\); a row has"),
    ({"question": "a", "answer": "b"}, r"line 2: unknown row shape \(keys: answer, question\); a row has"),
    ({"instruction": "a"}, r"line 2: unknown row shape \(keys: instruction\)"),
    ({"text": None}, "line 2: text is null or missing; it must be text"),
    ({"messages": []}, "line 2: messages is an empty list; it must be a list with at least one message"),
    ({"messages": {"a": 1}}, "line 2: messages is an object; it must be a list"),
    ({"messages": ["a"]}, "line 2: message 1 is text; it must be an object with role and content"),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "bot", "content": "y"}]},
        "line 2: message 2 has unknown role 'bot'; use one of system, user, assistant, tool",
    ),
    ({"messages": [{"role": "user"}]}, "line 2: content of message 1 is null or missing; it must be text"),
    ({"messages": [{"role": "user", "content": {"a": 1}}]}, "content of message 1 is an object"),
    (
        {"conversations": [{"from": "bing", "value": "x"}]},
        r"line 2: message 1 has unknown role \(from\) 'bing'; use one of human, gpt, system",
    ),
    ({"conversations": [{"from": "human", "value": 3}]}, "line 2: value of message 1 is a number"),
    ({"conversations": [3]}, "line 2: message 1 is a number; it must be an object with from and value"),
    ({"instruction": "a", "output": True}, "line 2: output is true or false; it must be text"),
    ({**CHAT, "tools": "{"}, "line 2: tools is not JSON"),
    ({**CHAT, "tools": {"a": 1}}, "line 2: tools is an object; it must be a list of objects"),
    (
        {"messages": [{"role": "system", "content": "a"}], "system": "b"},
        "line 2: both a system key and a system message; keep one",
    ),
]


@pytest.mark.parametrize(("row", "rule"), BAD_ROWS)
def test_a_bad_row_is_refused_with_file_and_line(tmp_path: Path, row: object, rule: str) -> None:
    path = write_lines(tmp_path, CHAT, row)
    with pytest.raises(ConfigError, match=rule) as caught:
        list(read_entries(path))
    assert str(caught.value).startswith(f"data.path={path} line 2")


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        ('[{"text": "a"},\n{"text": "b"\n', r"row 2 \(line 2\) is not JSON \(line 3: "),
        ('[{"text": "a"},\n{"text" "b"}]', r"row 2 \(line 2\) is not JSON \(line 2: "),
        ('[{"text": "a"} {"text": "b"}]', r"row 1 \(line 1\) is not JSON \(neither a comma"),
        ('[{"text": "a"},]', r"row 2 \(line 1\) is not JSON"),
        ('[{"text": "a"}', r"row 1 \(line 1\) is not JSON \(neither a comma"),
        ('[{"text": "a"}]\n\n{"text": "b"}', "line 1 is not JSON .text follows the array"),
        ('[{"text": "a"},\n\n 3]', r"row 2 \(line 3\): not an object but a number"),
        ("[]", "is empty; a row has"),
        ("", "is empty; a row has"),
        (" \n\n", "is empty; a row has"),
        ('{\n "text": "a"\n}', "line 1 is not JSON .*a file is one object a line or one array"),
        ("[" * 100000, r"row 1 \(line 1\) is not JSON \(too deep\)"),
        ('{"a":' * 100000, "line 1 is not JSON .nested too deeply"),
    ],
)
def test_a_bad_file_is_refused(tmp_path: Path, content: str, rule: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=rule):
        list(read_entries(str(path)))


def test_bytes_that_are_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "\xff"}\n')
    assert f"data.path={path} line 2 is not UTF-8 text" in refusal(str(path))
    path.write_bytes(b'[{"text": "a"},\n{"text": "\xff"}]\n')
    assert f"data.path={path} line 2 is not UTF-8 text" in refusal(str(path))


def test_missing_files(tmp_path: Path) -> None:
    assert refusal(str(tmp_path / "no.jsonl")) == (
        f"data.path={tmp_path}/no.jsonl does not exist; give a JSONL file or a JSON array"
    )
    assert "is not a file" in refusal(str(tmp_path))
    assert "data.path= does not exist" in refusal("")
    assert "names package 'nowhere', which is not installed" in refusal("package:nowhere/x.jsonl")
    assert "does not exist" in refusal("package:train/demo/none.jsonl")


def test_the_demo_is_found_from_any_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    chats = list(read_entries("package:train/demo/chats.jsonl"))
    questions = list(read_entries("package:train/demo/questions.jsonl"))
    assert 150 <= len(chats) <= 300
    asked = {text(message) for entry in chats for message in turns(entry) if message["role"] == "user"}
    assert not asked & {text(turns(entry)[0]) for entry in questions}
    answers = {text(message) for entry in chats for message in turns(entry) if message["role"] == "assistant"}
    assert {text(turns(entry)[1]) for entry in questions} <= answers


def turns(entry: Entry) -> tuple[Any, ...]:
    assert isinstance(entry.content, Chat)
    return entry.content.messages


def text(message: dict[str, str]) -> str:
    return message["content"].lower()

"""Tokens, masks, cuts and reports of a data set, with a tokenizer of one token a character."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conf.schema import ConfigError, DataConf
from train.data import Dataset, Row, load_training_data

END = 3
DATA = DataConf(max_length=1000)


@dataclass(frozen=True)
class Part:
    ids: tuple[int, ...]
    role: str
    target: bool


class CharTokenizer:
    """A turn is its role's letter, ":", content, END, newline; an assistant's content and END are targets."""

    eos_id: int | None = END

    def encode(self, text: str, *, bos: bool = False) -> list[int]:
        return [ord(character) for character in text]

    def segments(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None) -> list[Part]:
        if messages[0]["role"] == "tool":
            raise ValueError("a chat can't begin with a tool")
        parts: list[Part] = []
        for message in messages:
            role, body = message["role"], (*self.encode(message["content"]), END)
            parts.append(Part(tuple(self.encode(role[0] + ":")), role, target=False))
            parts.append(Part(body, role, target=role == "assistant"))
            parts.append(Part((10,), role, target=False))
        return parts


class ToolTokenizer(CharTokenizer):
    def segments(self, messages: Sequence[Mapping[str, Any]], *, tools: Any = None) -> list[Part]:
        shown = [] if tools is None else [Part(tuple(self.encode(json.dumps(tools))), "system", target=False)]
        return [*shown, *super().segments(messages)]


def chat(*turns: str, **extra: Any) -> dict[str, Any]:
    roles = {"s": "system", "u": "user", "a": "assistant", "t": "tool"}
    return {"messages": [{"role": roles[turn[0]], "content": turn[2:]} for turn in turns], **extra}


def write(folder: Path, *rows: Mapping[str, Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def trained(row: Row) -> list[str]:
    """The texts of the runs of trained tokens."""
    tokens = zip(row.ids, row.targets, strict=True)
    runs = groupby(tokens, key=lambda token: bool(token[1]))
    return ["".join(chr(token) for token, _ in run) for flag, run in runs if flag]


def load_one(folder: Path, row: Mapping[str, Any], data: DataConf = DATA) -> Row:
    dataset, _ = Dataset.load(write(folder, row), CharTokenizer(), data)
    assert len(dataset) == 1
    return dataset[0]


@pytest.mark.parametrize(
    ("loss_on", "runs"),
    [
        ("assistant", ["Yo\x03", "Ok\x03"]),
        ("last", ["Ok\x03"]),
        ("all", ["s:Hey\x03\na:Yo\x03\nu:\x03\na:Ok\x03\nu:Unheard\x03\n"]),
    ],
)
def test_loss_on_chooses_the_trained_turns(tmp_path: Path, loss_on: Any, runs: list[str]) -> None:
    row = load_one(tmp_path, chat("s:Hey", "a:Yo", "u:", "a:Ok", "u:Unheard"), replace(DATA, loss_on=loss_on))
    assert "".join(map(chr, row.ids)) == "s:Hey\x03\na:Yo\x03\nu:\x03\na:Ok\x03\nu:Unheard\x03\n"
    assert trained(row) == runs


@pytest.mark.parametrize("loss_on", ["assistant", "last", "all"])
def test_documents_train_every_token_and_end(tmp_path: Path, loss_on: Any) -> None:
    row = load_one(tmp_path, {"text": "abc"}, replace(DATA, loss_on=loss_on))
    assert trained(row) == ["abc\x03"]
    assert row.num_targets == 3
    assert trained(load_one(tmp_path, {"text": "abc\x03"})) == ["abc\x03"]


def test_documents_without_an_end_token(tmp_path: Path) -> None:
    tokenizer = CharTokenizer()
    tokenizer.eos_id = None
    dataset, _ = Dataset.load(write(tmp_path, {"text": "abc"}, {"text": "a"}), tokenizer, DATA)
    assert [trained(row) for row in dataset] == [["abc"]]


def test_rows_are_compact_views(tmp_path: Path) -> None:
    path = write(tmp_path, chat("u:a", "a:b"), chat("u:c"), chat("u:dd", "a:e"))
    dataset, _ = Dataset.load(path, CharTokenizer(), DATA)
    assert (dataset.ids.dtype, dataset.targets.dtype) == (np.int32, np.bool_)
    assert [(row.index, row.line) for row in dataset] == [(0, 1), (2, 3)]
    assert np.shares_memory(dataset[1].ids, dataset.ids)
    with pytest.raises(IndexError, match="row 2 of a dataset of 2 rows"):
        dataset[2]


def test_long_rows_are_cut(tmp_path: Path) -> None:
    rows = (
        chat("u:1", "a:long answer"),
        chat("u:a long question", "a:2"),
        chat("u:1", "a:2"),
        {"text": "0123456789"},
    )
    path = write(tmp_path, *rows)
    dataset, report = Dataset.load(path, CharTokenizer(), replace(DATA, max_length=10))
    assert [trained(row) for row in dataset] == [["lon"], ["2\x03"], ["0123456789"]]
    assert (report.truncated, report.untrained, report.too_long) == (2, ("line 2",), ())
    assert report.text == (
        f"data.path={path}: 3 of 4 rows, 30 tokens, 14 of them trained; 2 rows cut to data.max_length=10; "
        "1 row with nothing to train dropped: line 2."
    )


def test_long_rows_are_dropped_or_refused(tmp_path: Path) -> None:
    path = write(tmp_path, *[chat("u:1", "a:2")] * 2, *[chat("u:1", "a:long answer")] * 13)
    dataset, report = Dataset.load(path, CharTokenizer(), replace(DATA, max_length=10, too_long="drop"))
    assert [row.line for row in dataset] == [1, 2]
    assert report.truncated == 0
    listed = ", ".join(f"line {line}" for line in range(3, 13))
    assert f"13 rows over data.max_length=10 dropped: {listed} and 3 more." in report.text
    rule = r"line 3 has 20 tokens, over data.max_length=10; raise data.max_length or set data.too_long="
    with pytest.raises(ConfigError, match=rule):
        Dataset.load(path, CharTokenizer(), replace(DATA, max_length=10, too_long="error"))


def test_a_file_with_nothing_to_train(tmp_path: Path) -> None:
    path = write(tmp_path, chat("u:a"), chat("s:b", "u:c"))
    rule = "has no row to train on: .*2 rows with nothing to train dropped: line 1, line 2"
    with pytest.raises(ConfigError, match=rule):
        Dataset.load(path, CharTokenizer(), DATA)
    dataset, _ = Dataset.load(path, CharTokenizer(), replace(DATA, loss_on="all"))
    assert len(dataset) == 2


def test_what_the_template_refuses_names_the_line(tmp_path: Path) -> None:
    path = write(tmp_path, chat("u:a", "a:b"), chat("t:x", "a:b"))
    with pytest.raises(ConfigError, match=f"^data.path={path} line 2: a chat can't begin with a tool"):
        Dataset.load(path, CharTokenizer(), DATA)


def test_tools_that_a_template_ignores_are_reported(tmp_path: Path) -> None:
    path = write(tmp_path, chat("u:a", "a:b"), *[chat("u:a", "a:b", tools=[{"name": "f"}])] * 2)
    _, ignored = Dataset.load(path, CharTokenizer(), DATA)
    assert "2 rows with tools that this chat template does not show to the model" in ignored.text
    _, shown = Dataset.load(path, ToolTokenizer(), DATA)
    assert shown.ignored_tools == 0
    assert "have tools" not in shown.text


def test_every_kth_row_is_held_out_by_its_number_in_the_file(tmp_path: Path) -> None:
    rows = [chat(f"u:{i}", f"a:{i}") if i != 3 else chat("u:3") for i in range(12)]
    data = replace(DATA, path=write(tmp_path, *rows), evaluate_fraction=0.2)
    loaded = load_training_data(data, CharTokenizer())
    assert loaded.evaluate is not None
    assert [row.index for row in loaded.evaluate] == [4, 9]
    assert [row.index for row in loaded.train] == [0, 1, 2, 5, 6, 7, 8, 10, 11]
    assert [trained(row) for row in loaded.evaluate] == [["4\x03"], ["9\x03"]]
    assert trained(loaded.train[8]) == ["11\x03"]
    (report,) = loaded.reports
    assert (report.kept, report.held_out, report.rows) == (9, 2, 12)
    assert report.target_tokens == loaded.train.num_targets == 2 * 9 + 2
    with pytest.raises(ConfigError, match=r"evaluate_fraction=0.01 leaves none of 11 rows for evaluation"):
        load_training_data(replace(data, evaluate_fraction=0.01), CharTokenizer())
    with pytest.raises(ConfigError, match=r"evaluate_fraction=0.9 leaves none of 11 rows for training"):
        load_training_data(replace(data, evaluate_fraction=0.9), CharTokenizer())


def test_a_second_file_for_evaluation(tmp_path: Path) -> None:
    path = write(tmp_path, chat("u:a", "a:b"))
    other = write(tmp_path, chat("u:c", "a:d"), name="other.jsonl")
    data = replace(DATA, path=path, evaluate_path=other)
    loaded = load_training_data(data, CharTokenizer())
    assert loaded.evaluate is not None
    assert trained(loaded.evaluate[0]) == ["d\x03"]
    assert [report.key for report in loaded.reports] == ["data.path", "data.evaluate_path"]
    with pytest.raises(ConfigError, match=r"^data.evaluate_path=gone.jsonl does not exist"):
        load_training_data(replace(data, evaluate_path="gone.jsonl"), CharTokenizer())


def test_the_fingerprint_follows_what_is_trained(tmp_path: Path) -> None:
    def fingerprint(data: DataConf, *rows: Mapping[str, Any]) -> str:
        return Dataset.load(write(tmp_path, *rows), CharTokenizer(), data)[0].fingerprint

    rows = chat("u:a", "a:b"), chat("u:c", "a:d", "u:e", "a:f")
    assert fingerprint(DATA, *rows) == fingerprint(DATA, chat("u:none"), *rows)
    assert fingerprint(DATA, *rows) != fingerprint(DATA, *reversed(rows))
    assert fingerprint(DATA, *rows) != fingerprint(replace(DATA, loss_on="last"), *rows)


def test_loading_is_linear_and_compact(tmp_path: Path) -> None:
    def seconds(rows: int) -> float:
        path = write(tmp_path, *[chat("u:How are you?", "a:Well, and you?")] * rows)
        begin = time.process_time()
        dataset, _ = Dataset.load(path, CharTokenizer(), DATA)
        assert dataset.ids.nbytes + dataset.targets.nbytes == 5 * len(dataset.ids)
        return time.process_time() - begin

    seconds(100)
    assert seconds(8000) < 16 * seconds(1000) + 0.5

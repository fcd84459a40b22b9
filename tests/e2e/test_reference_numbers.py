"""Known numbers of SmolLM2-135M-Instruct in float32, through our files, tokenizer, template, data and decoder."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from conf.check import check
from conf.load import load
from kernels import dispatch
from parallel.comm import Launch
from parallel.mesh import Mesh
from parallel.model.source import Source, open_source
from tests.ranks import on_ranks
from train.data import Dataset, load_training_data
from train.model import build_model
from train.step import Trainer

WINDOWS, WINDOW = 20, 1024
PERPLEXITY = 24.975
"""Of the wiki windows, as published with the data."""
CHATS, CHAT_TOKENS, CHAT_TARGETS, CHAT_LOSS = 100, 8295, 3138, 3.25153
"""The held-out chats and the loss before any tuning, as published with the data."""
TRANSFORMERS = {"wiki": 3.2179022, "chat": 3.2512044}
"""What transformers 5.23 computes from the same dequantised weights and tokens."""


@pytest.mark.parametrize(("data", "tensor"), [(2, 1), (1, 2), (1, 3)])
def test_perplexity_and_untuned_chat_loss(real_data: Path, data: int, tensor: int) -> None:
    results = on_ranks(data * tensor, _measure, real_data, data, tensor, timeout_s=900)
    assert len(set(results)) == 1
    wiki, chat = results[0]
    print(f"data={data} tensor={tensor}: NLL {wiki:.6f}, perplexity {math.exp(wiki):.4f}, chat loss {chat:.6f}")
    assert math.exp(wiki) == pytest.approx(PERPLEXITY, abs=0.01)
    assert chat == pytest.approx(CHAT_LOSS, abs=0.001)
    assert (wiki, chat) == pytest.approx(tuple(TRANSFORMERS.values()), abs=5e-6)


def _measure(launch: Launch, folder: Path, data: int, tensor: int) -> tuple[float, float]:
    """(mean loss over the wiki windows, mean loss over the held-out chats), as a training run evaluates."""
    options = [
        "model=smollm2", "model.dtype=float32", "train.batch_size=10", "data.evaluate_fraction=0.2",
        f"data.path={folder}/chat/fastchat_dummy_conversation.json", f"parallel.tensor={tensor}",
    ]  # fmt: skip
    config = load(options, "train")
    source = open_source(config.model)
    config = check(config, "train", launch.world_size, source.architecture)
    mesh = Mesh.build(launch, data=data, tensor=tensor)
    ops = dispatch.select(torch.device("cpu"), torch.float32)
    trainer = Trainer(config, build_model(config, source, mesh, ops))
    chats = load_training_data(config.data, source.tokenizer()).evaluate
    assert chats is not None
    assert (len(chats), len(chats.ids), chats.num_targets) == (CHATS, CHAT_TOKENS, CHAT_TARGETS)
    return trainer.evaluate(_windows(source, folder / "text" / "wiki_demo.txt")), trainer.evaluate(chats)


def _windows(source: Source, path: Path) -> Dataset:
    """The text's first tokens in disjoint windows, every token but a window's first to be predicted; no BOS."""
    ids = source.tokenizer().encode(path.read_text(encoding="utf-8"))[: WINDOWS * WINDOW]
    rows = np.arange(WINDOWS)
    everything = np.ones(len(ids), dtype=np.bool_)
    windows = Dataset(np.array(ids, dtype=np.int32), everything, np.arange(WINDOWS + 1) * WINDOW, rows, rows)
    assert windows.num_targets == WINDOWS * (WINDOW - 1)
    return windows

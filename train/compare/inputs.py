"""The files that every contender reads: a random model with a tokenizer of words, and the rows of a step."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer as Backend
from tokenizers import models, pre_tokenizers

from conf.schema import Architecture
from parallel.model.hf import write_config
from parallel.model.random_source import RandomSource
from parallel.model.tokenizer import Tokenizer, TokenizerFacts
from train.compare.cases import LENGTH, ROWS

SEED = 0


@dataclass(frozen=True)
class Inputs:
    """Where they are."""

    model: Path
    rows: Path
    """JSON lines, as `data.path` takes them."""
    ids: Path
    """The same rows as the tensor `ids` [ROWS, LENGTH]."""


def write_inputs(folder: Path, architecture: Architecture) -> Inputs:
    """Writes them into the new `folder`. Token n is the word `w<n>`, so the rows may hold any tokens."""
    inputs = Inputs(folder / "model", folder / "rows.jsonl", folder / "ids.safetensors")
    inputs.model.mkdir(parents=True)
    (inputs.model / "config.json").write_text(json.dumps(write_config(architecture, None, "float32")))
    source = RandomSource(architecture, SEED)
    whole = {name: tuple(slice(0, size) for size in source.shape(name)) for name in source.names()}
    weights = {name: source.read(name, index, torch.float32) for name, index in whole.items()}
    save_file(weights, inputs.model / "model.safetensors", {"format": "pt"})
    words = Backend(models.WordLevel({f"w{id}": id for id in range(architecture.vocab_size)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    Tokenizer(words, TokenizerFacts()).save(inputs.model)
    draw = torch.Generator().manual_seed(SEED)
    ids_BT = torch.randint(0, architecture.vocab_size, (ROWS, LENGTH), generator=draw)
    save_file({"ids": ids_BT}, inputs.ids)
    texts = (" ".join(f"w{id}" for id in row) for row in ids_BT.tolist())
    inputs.rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return inputs

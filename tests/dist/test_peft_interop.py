"""Adapters in both directions: what `peft` writes serves here, what is trained here opens in `peft`; same logits."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft import LoraConfig, PeftModel, PrefixTuningConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from conf.schema import DataConf, ModelConf
from parallel.comm import Launch
from parallel.model.source import open_source
from parallel.model.tokenizer_bytes import byte_tokenizer
from serve.engine import Engine
from serve.request import Request, SamplingParams
from serve.scheduler import Chunk
from serve.start import build_engine
from tests.commands import train, write_chats
from tests.serving import Serving, serve
from train.data import Dataset

NEW_TOKENS = 12
PROMPTS = [[int(c) for c in text.encode()] for text in ("What is a mesh?", "x", "A page goes with a slot. " * 3)]

WRITTEN = {
    "lora": LoraConfig(
        r=4, lora_alpha=12, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", init_lora_weights=False
    ),
    "lora_everywhere": LoraConfig(
        r=3, lora_alpha=5, target_modules="all-linear", use_rslora=True, task_type="CAUSAL_LM", init_lora_weights=False,
        rank_pattern={"down_proj": 6}, alpha_pattern={"layers.1.self_attn.k_proj": 9},
    ),
    "prefix": PrefixTuningConfig(num_virtual_tokens=6, task_type="CAUSAL_LM"),
    "prefix_projected": PrefixTuningConfig(
        num_virtual_tokens=5, task_type="CAUSAL_LM", prefix_projection=True, encoder_hidden_size=32
    ),
}  # fmt: skip

TRAINED = {
    "lora": ["tune=lora", "tune.rank=4"],
    "lora_some": ["tune=lora", "tune.rank=3", "tune.alpha=7.5", "tune.targets=[o_proj,gate_proj,k_proj]"],
    "prefix": ["tune=prefix", "tune.virtual_tokens=6"],
    "prefix_projected": [
        "tune=prefix",
        "tune.virtual_tokens=6",
        "tune.prefix_projection=true",
        "tune.prefix_hidden=16",
    ],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama as transformers saves it, with uneven heads."""
    directory = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=300, hidden_size=72, intermediate_size=100, num_hidden_layers=3, num_attention_heads=9,
        num_key_value_heads=3, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.15,
        bos_token_id=256, eos_token_id=258,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(directory)
    byte_tokenizer().save(directory)
    return directory


def theirs(base: Path) -> LlamaForCausalLM:
    """The base in transformers."""
    return LlamaForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()


def serving(base: Path, adapter: Path) -> Serving:
    """The base with the adapter."""
    return Serving(model=ModelConf(path=str(base), dtype="float32"), adapters={"mine": str(adapter)})


def engine_logits(engine: Engine, ids: Sequence[int]) -> torch.Tensor:
    """Logits [len(ids), V] after every token, computed one by one through the paged cache."""
    pages = tuple(engine.pool.allocate(engine.pool.pages_for(len(ids))))
    rows = []
    for at, token in enumerate(ids):
        used = pages[: engine.pool.pages_for(at + 1)]
        chunk = Chunk(id="0", adapter="mine", start=at, tokens=(token,), pages=used, samples=True)
        logits = engine.runner.forward([chunk])
        assert logits is not None
        rows.append(logits[0].clone())  # the next step overwrites it
    engine.pool.free(pages)
    return torch.stack(rows)


def compare(base: Path, adapter: Path, tensor: int) -> None:
    """Logits after every token, and greedy answers, are those of peft."""
    oracle = PeftModel.from_pretrained(theirs(base), adapter).eval()
    alone = serving(base, adapter)
    engine = build_engine(alone.config, open_source(alone.model), Launch())
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    requests = [
        Request(id=str(i), prompt=tuple(prompt), sampling=sampling, adapter="mine") for i, prompt in enumerate(PROMPTS)
    ]
    served = serve(replace(alone, tensor=tensor), [requests])
    plain = theirs(base)
    for request in requests:
        ids = torch.tensor([request.prompt])
        with torch.no_grad():
            expected, without = oracle(input_ids=ids).logits[0], plain(input_ids=ids).logits[0]
        assert (expected - without).abs().max() > 0.05, "the adapter hardly does anything"
        assert torch.allclose(engine_logits(engine, request.prompt), expected, atol=1e-4, rtol=0)
        assert served.tokens[request.id] == greedy(oracle, request.prompt)
    assert len({tuple(answer) for answer in served.tokens.values()}) > 1


def greedy(oracle: Any, prompt: Sequence[int]) -> list[int]:
    """peft's own generate."""
    ids = torch.tensor([list(prompt)])
    oracle.generation_config.eos_token_id = None
    out = oracle.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
    )
    return out[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", WRITTEN)
def test_an_adapter_written_by_peft_serves_here(base: Path, tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    model = get_peft_model(theirs(base), WRITTEN[name])
    for parameter in (p for p in model.parameters() if p.requires_grad):
        torch.nn.init.normal_(parameter, std=0.2)  # at 0.3 transformers itself is 1e-4 off its own float64
    model.save_pretrained(tmp_path)
    assert peft.PeftConfig.from_pretrained(tmp_path).peft_type == WRITTEN[name].peft_type
    compare(base, tmp_path, tensor=2)


@pytest.mark.parametrize("name", TRAINED)
def test_an_adapter_trained_here_opens_in_peft(base: Path, tmp_path: Path, name: str) -> None:
    data = write_chats(tmp_path / "chats.jsonl")
    options = [
        f"model.path={base}", "model=hf", "model.dtype=float32", f"data.path={data}", "data.max_length=200",
        f"data.evaluate_path={data}",
        f"run_dir={tmp_path / 'run'}", "train.steps=3", "optim.lr=0.02", "parallel.tensor=2", "parallel.pipeline=2",
        *TRAINED[name],
    ]  # fmt: skip
    code, printed = train(4, options)
    assert code == 0, printed
    adapter = tmp_path / "run" / "checkpoints" / "latest"
    compare(base, adapter, tensor=1)
    (evaluated,) = (tmp_path / "run" / "eval.jsonl").read_text().splitlines()
    assert json.loads(evaluated)["eval_loss"] == pytest.approx(loss_in_peft(base, adapter, data), abs=1e-5)


def loss_in_peft(base: Path, adapter: Path, data: Path) -> float:
    """Mean loss over the targets of the rows."""
    oracle = PeftModel.from_pretrained(theirs(base), adapter).eval()
    rows, _ = Dataset.load(str(data), byte_tokenizer(), DataConf(max_length=200))
    total = 0.0
    for row in rows:
        ids = torch.from_numpy(row.ids).long()
        with torch.no_grad():
            logits = oracle(input_ids=ids[None]).logits[0, :-1]
        losses = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total += float(losses[torch.tensor(row.targets[1:].tolist())].sum())
    return total / rows.num_targets

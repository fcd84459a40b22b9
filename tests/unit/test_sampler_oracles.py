"""The sampler against transformers' logits processors, in the same order, and a draw spelled out."""

import numpy as np
import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from serve.request import Request, SamplingParams
from serve.sampler import Sampler, draw

VOCAB = 1500
CASES = [
    {"temperature": 0.7},
    {"top_k": 5},
    {"top_k": 1000},
    {"top_p": 0.3},
    {"top_p": 0.95, "temperature": 1.4},
    {"min_p": 0.05},
    {"min_p": 0.3, "temperature": 0.5},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9},
    {"temperature": 1.5, "min_p": 0.02, "top_k": 30, "top_p": 0.7},
    {"repetition_penalty": 1.3, "top_k": 20},
    {"repetition_penalty": 0.7, "temperature": 0.0},
    {"logit_bias": ((3, 8.0), (9, -5.0)), "repetition_penalty": 1.8, "top_p": 0.8},
    {"min_tokens": 6, "temperature": 0.0},
    {"min_tokens": 6, "top_p": 0.9},
]


def processed(logits_V, sampling, tokens, num_prompt, eos):
    """float64 logits after transformers' processors, in vLLM's order of min_p, top_k and top_p."""
    steps = LogitsProcessorList()
    if sampling.min_tokens:
        steps.append(MinLengthLogitsProcessor(num_prompt + sampling.min_tokens, list(eos)))
    if sampling.logit_bias:
        steps.append(SequenceBiasLogitsProcessor({(token,): bias for token, bias in sampling.logit_bias}))
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature:
        steps.append(TemperatureLogitsWarper(float(sampling.temperature)))
        if sampling.min_p:
            steps.append(MinPLogitsWarper(sampling.min_p))
        if sampling.top_k > 0:
            steps.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            steps.append(TopPLogitsWarper(sampling.top_p))
    return steps(torch.tensor([tokens]), logits_V[None].double())[0]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
@pytest.mark.parametrize("seed", range(3))
def test_tokens_over_all_quantiles_agree_with_transformers(monkeypatch, kwargs, seed):
    generator = torch.Generator().manual_seed(seed)
    logits_V = torch.randn(VOCAB, generator=generator) * 2
    logits_V[[4, 8]] += 9.0  # likely ends
    prompt = tuple(torch.randint(VOCAB, (20,), generator=generator).tolist())
    output = [*torch.randint(VOCAB, (4,), generator=generator).tolist(), int(logits_V.argsort()[-3])]
    sampling = SamplingParams(**kwargs)
    oracle_V = processed(logits_V, sampling, [*prompt, *output], len(prompt), (4, 8))
    order = oracle_V.argsort(descending=True, stable=True)
    sums = oracle_V.softmax(0)[order].cumsum(0).numpy()
    sampler = Sampler(frozenset({4, 8}))
    request = Request(id="r", prompt=prompt, sampling=sampling)
    compared = 0
    for u in np.random.default_rng(seed).random(200):
        place = 0 if sampling.is_greedy else int(np.searchsorted(sums, u, side="right"))
        if np.abs(sums - u).min() < 1e-5 and not sampling.is_greedy:
            continue  # on the border of two tokens
        monkeypatch.setattr("serve.sampler.uniform", lambda seed, index, u=u: u)
        assert sampler.sample(logits_V[None], [request], [[*prompt, *output]])[0] == [int(order[place])]
        compared += 1
    assert compared > 150


@pytest.mark.parametrize("kwargs", CASES[:9], ids=str)
def test_the_filtered_set_is_exactly_transformers(kwargs):
    logits_V = torch.randn(VOCAB, generator=torch.Generator().manual_seed(9)) * 2
    sampling = SamplingParams(**kwargs)
    oracle_V = processed(logits_V, sampling, [0], 1, ())
    order = oracle_V.argsort(descending=True, stable=True)
    kept = order[oracle_V[order] > -torch.inf]
    assert draw(logits_V.numpy(), sampling, 0.0) == int(kept[0])
    assert draw(logits_V.numpy(), sampling, 1 - 2**-53) == int(kept[-1])

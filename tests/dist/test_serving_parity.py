"""The engine's tokens don't depend on layout, chunking, page pool or company, and are transformers' own."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch

from parallel.comm import Launch
from parallel.model.source import open_source
from serve.request import Request, SamplingParams
from serve.start import build_engine
from tests.ranks import on_ranks
from tests.serving import SERVED, ListFront, Served, Serving, serve

NEW_TOKENS = 12


def requests(**sampling: object) -> list[Request]:
    """16 prompts of 1 to 60 tokens."""
    generator = torch.Generator().manual_seed(3)
    lengths = [1, 2, 3, 4, 5, 7, 8, 9, 12, 15, 16, 17, 23, 31, 44, 60]
    fields = {"max_tokens": NEW_TOKENS, "temperature": 0.0, "ignore_eos": True, "logprobs": 0} | sampling
    prompts = [torch.randint(0, 256, (n,), generator=generator).tolist() for n in lengths]
    params = SamplingParams(**fields)  # pyright: ignore[reportArgumentType]
    return [Request(id=str(i), prompt=tuple(prompt), sampling=params) for i, prompt in enumerate(prompts)]


@cache
def reference() -> Served:
    """One rank, all at once, plenty of pages."""
    return serve(Serving(), [requests()])


def test_tokens_are_those_of_transformers() -> None:
    from tests.unit.test_decoder import hf_model

    source = open_source(Serving().model)

    class Weights:
        architecture = SERVED

        def state(self, dtype: torch.dtype) -> dict[str, torch.Tensor]:
            whole = {name: tuple(slice(0, n) for n in source.shape(name)) for name in source.names()}
            return {name: source.read(name, index, dtype) for name, index in whole.items()}

    oracle = hf_model(SERVED, Weights(), torch.float32)  # pyright: ignore[reportArgumentType]
    oracle.generation_config.eos_token_id = None  # pyright: ignore
    for request in requests():
        ids = torch.tensor([request.prompt])
        mask = torch.ones_like(ids)
        out = oracle.generate(  # pyright: ignore[reportCallIssue]
            ids, attention_mask=mask, max_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
        )
        assert out[0, len(request.prompt) :].tolist() == reference().tokens[request.id]


def test_output_is_no_constant() -> None:
    answers = reference().tokens.values()
    assert len({tuple(answer) for answer in answers}) == 16
    assert len({token for answer in answers for token in answer}) > 20


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 2), (1, 3), (1, 4), (2, 1), (2, 2)], ids=lambda value: str(value))
def test_every_layout_gives_the_same_tokens(pipeline: int, tensor: int) -> None:
    assert serve(Serving(pipeline=pipeline, tensor=tensor), [requests()]).tokens == reference().tokens


@pytest.mark.parametrize("max_chunk", [1, 7, 512])
def test_chunking_changes_no_bit(max_chunk: int) -> None:
    served = serve(Serving(max_chunk=max_chunk), [requests()])
    assert served.tokens == reference().tokens
    assert served.logprobs == reference().logprobs


def test_company_changes_no_bit() -> None:
    for request in requests():
        alone = serve(Serving(), [[request]])
        assert alone.tokens[request.id] == reference().tokens[request.id]
        assert alone.logprobs[request.id] == reference().logprobs[request.id]


def test_arriving_one_by_one_changes_no_bit() -> None:
    served = serve(Serving(), [[request] for request in requests()])
    assert served.logprobs == reference().logprobs


@pytest.mark.parametrize("tensor", [1, 2, 3])
def test_preemption_changes_no_bit(tensor: int) -> None:
    plenty = serve(Serving(tensor=tensor), [requests()])
    short = serve(Serving(tensor=tensor, pages=25, max_batch_tokens=64), [requests()])
    assert short.stats["preemptions"] > 0
    assert short.tokens == plenty.tokens
    assert short.logprobs == plenty.logprobs


def test_seeded_sampling_is_the_same_in_any_company_and_layout() -> None:
    drawn = requests(temperature=0.9, top_p=0.95, seed=5)
    together = serve(Serving(), [drawn])
    assert together.tokens != reference().tokens
    assert serve(Serving(tensor=2), [drawn]).tokens == together.tokens
    assert serve(Serving(max_chunk=3), [drawn[5:6]]).tokens["5"] == together.tokens["5"]


def _rows_sampled(launch: Launch, serving: Serving) -> tuple[list[int], Served | None]:
    """Rows that this rank sampled, by step, and rank 0's result."""
    engine = build_engine(serving.config, open_source(serving.model), launch)
    steps: list[int] = []
    sample = engine.sampler.sample

    def counted(logits_BV: torch.Tensor, requests: Any, histories: Any) -> Any:
        steps.append(len(logits_BV))
        return sample(logits_BV, requests, histories)

    engine.sampler.sample = counted
    front = ListFront([requests()]) if launch.rank == 0 else None
    engine.run(front)
    return steps, None if front is None else front.result


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 2), (1, 3), (1, 4), (2, 2)], ids=lambda value: str(value))
def test_the_last_stages_ranks_share_the_rows_to_sample(pipeline: int, tensor: int) -> None:
    """16 rows a step; each is sampled once, by one of them, and what it gave comes back to its request."""
    found = on_ranks(pipeline * tensor, _rows_sampled, Serving(pipeline=pipeline, tensor=tensor))
    served = found[0][1]
    assert served.tokens == reference().tokens
    for id, expected in reference().logprobs.items():
        assert torch.allclose(torch.tensor(served.logprobs[id]), torch.tensor(expected), atol=1e-4)
    *earlier, last = [[sum(steps) for steps, _ in found[i : i + tensor]] for i in range(0, len(found), tensor)]
    assert not any(map(any, earlier)), "an earlier stage has no logits"
    assert sum(last) == 16 * NEW_TOKENS
    shares = [16 // tensor + (rank < 16 % tensor) for rank in range(tensor)]
    assert last == [NEW_TOKENS * share for share in shares]


def test_a_request_that_cannot_fit_is_refused_and_the_others_live() -> None:
    long = replace(requests()[0], id="long", prompt=tuple(range(100)))
    served = serve(Serving(pages=20), [[*requests()[:4], long]])
    assert served.ends["long"].finish == "error"
    assert "KV cache" in (served.ends["long"].error or "")
    for request in requests()[:4]:
        assert served.tokens[request.id] == reference().tokens[request.id]

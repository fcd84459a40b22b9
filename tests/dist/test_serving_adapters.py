"""LoRA, P-tuning v2 and base requests in one batch: each gets what it gets alone, under every layout."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conf import load
from serve.engine import Events, Turn
from serve.request import Request, SamplingParams
from serve.start import build_engine
from tests.commands import train, write_chats
from tests.serving import Served, Serving, serve

NAMES = (None, "lora", "other", "prefix")


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Serving:
    """The tiny model with two LoRA adapters and a prefix, trained long enough to answer differently."""
    folder = tmp_path_factory.mktemp("adapters")
    data = write_chats(folder / "chats.jsonl")
    keys = {
        "lora": ["tune=lora", "optim.lr=0.01"],
        "other": ["tune=lora", "tune.rank=3", "tune.targets=[q_proj,down_proj]", "optim.lr=0.02", "train.seed=1"],
        "prefix": ["tune=prefix", "tune.virtual_tokens=7", "optim.lr=0.02"],
    }
    for name, own in keys.items():
        code, printed = train(1, ["model=tiny", f"data.path={data}", f"run_dir={folder / name}", "train.steps=4", *own])
        assert code == 0, printed
    model = load.load(["model=tiny"], "serve").model
    return Serving(
        model=model,
        max_length=200,
        adapters={name: str(folder / name / "checkpoints" / "latest") for name in keys},
    )


def mixed() -> list[Request]:
    """16 requests over base and adapters, in turn."""
    sampling = SamplingParams(max_tokens=16, temperature=0.0, ignore_eos=True, logprobs=0)
    prompts = [tuple((7 * i + 3 * j) % 256 for j in range(1 + (5 * i) % 40)) for i in range(16)]
    return [
        Request(id=str(i), prompt=prompt, sampling=sampling, adapter=NAMES[i % 4]) for i, prompt in enumerate(prompts)
    ]


@pytest.fixture(scope="module")
def together(serving: Serving) -> Served:
    """All of them at once on one rank."""
    return serve(serving, [mixed()])


def test_adapters_answer_differently(serving: Serving, together: Served) -> None:
    same = [replace(request, adapter=name) for request in mixed()[5:6] for name in NAMES]
    same = [replace(request, id=str(i)) for i, request in enumerate(same)]
    answers = serve(serving, [same]).tokens
    assert len({tuple(answer) for answer in answers.values()}) == 4


def test_company_changes_no_bit(serving: Serving, together: Served) -> None:
    for request in mixed():
        alone = serve(serving, [[request]])
        assert alone.tokens[request.id] == together.tokens[request.id]
        assert alone.logprobs[request.id] == together.logprobs[request.id]


@pytest.mark.parametrize("max_chunk", [1, 7])
def test_chunking_and_preemption_change_no_bit(serving: Serving, together: Served, max_chunk: int) -> None:
    served = serve(replace(serving, max_chunk=max_chunk, pages=24), [mixed()])
    assert served.stats["preemptions"] > 0 or max_chunk == 1  # chunks of one token grow too slowly to collide
    assert served.logprobs == together.logprobs


@pytest.mark.parametrize(("pipeline", "tensor"), [(1, 2), (1, 4), (2, 1), (2, 2)])
def test_every_layout_gives_the_same_tokens(serving: Serving, together: Served, pipeline: int, tensor: int) -> None:
    assert serve(replace(serving, pipeline=pipeline, tensor=tensor), [mixed()]).tokens == together.tokens


def test_unloading_waits_for_live_requests_and_frees_pages(serving: Serving, together: Served) -> None:
    from parallel.comm import Launch
    from parallel.model.source import open_source

    engine = build_engine(serving.config, open_source(serving.model), Launch())
    pinned = engine.pool.num_used
    request = next(request for request in mixed() if request.adapter == "prefix")
    engine.turn(Events(submit=[request.to_dict()]))
    turn = engine.turn(Events(adapters=[{"op": "unload", "name": "prefix", "path": "", "reply": 1}]))
    assert not turn.replies
    late = engine.turn(Events(submit=[replace(request, id="late").to_dict()]))
    assert [(o.id, o.finish) for o in late.outputs if o.finish] == [("late", "error")]
    turns: list[Turn] = []
    while engine.scheduler.has_work:
        turns.append(engine.turn(Events()))
    assert [reply for turn in turns for reply in turn.replies] == [{"reply": 1, "error": None}]
    assert engine.pool.num_used == pinned - 2
    again = engine.turn(Events(adapters=[{"op": "unload", "name": "prefix", "path": "", "reply": 2}]))
    assert "is not loaded" in again.replies[0]["error"]

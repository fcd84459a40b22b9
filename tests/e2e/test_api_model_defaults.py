"""What the API takes from a model's `generation_config.json`."""

import httpx

from tests.fake_engine import running

SAY = [{"role": "user", "content": "say x"}]


def test_the_models_sampling_fills_in_what_a_request_does_not_say():
    generation = {"temperature": 0.6, "top_p": 0.9, "top_k": None, "repetition_penalty": 1.1, "do_sample": False}
    with running(generation=generation) as engine:

        def sampled(path: str, **fields) -> tuple:
            httpx.post(engine.url + path, json={"max_tokens": 1, **fields}, timeout=20).raise_for_status()
            seen = engine.seen[-1].sampling
            return seen.temperature, seen.top_p, seen.top_k, seen.min_p, seen.repetition_penalty

        assert sampled("/v1/chat/completions", messages=SAY) == (0.6, 0.9, 0, 0.0, 1.1)
        assert sampled("/v1/completions", prompt="say x", temperature=None) == (0.6, 0.9, 0, 0.0, 1.1)
        said = {"temperature": 1.0, "top_k": 5, "repetition_penalty": 1}  # 1 is what it would be without the file
        assert sampled("/v1/chat/completions", messages=SAY, **said) == (1.0, 0.9, 5, 0.0, 1)
